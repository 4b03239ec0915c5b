"""Results on the meta device for operators whose output shape is plain.

torch's own meta kernels for these are written in Python: slow, and some import the compiler on their first call,
which takes two seconds. Whatever is not recognised here goes to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Args = Sequence[Any]


def shape_only(func: Any, args: Args) -> Any:
    """The result of an operator on meta tensors, or None where torch has to find it."""
    name = func.overloadpacket.__name__
    shaper = _SHAPERS.get(name)
    return shaper(name, args) if shaper else None


def _batch_norm(_: str, args: Args) -> Any:
    stored = args[3] is not None and not args[5]
    return (torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)) if stored else None


def _unpool(_: str, args: Args) -> Any:
    return args[0].new_empty((*args[0].shape[:-2], *args[2]))


def _layer_norm(_: str, args: Args) -> Any:
    return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)


def _resize(_: str, args: Args) -> Any:
    return args[0].new_empty((*args[0].shape[:-2], *args[1])) if args[1] is not None else None


def _cat(_: str, args: Args) -> Any:
    tensors, first = args[0], args[0][0]
    if any((each.dtype, each.dim()) != (first.dtype, first.dim()) for each in tensors):
        return None
    dim = (args[1] if len(args) > 1 else 0) % max(1, first.dim())
    if len({(*each.shape[:dim], *each.shape[dim + 1 :]) for each in tensors}) != 1:
        return None
    return first.new_empty((*first.shape[:dim], sum(each.shape[dim] for each in tensors), *first.shape[dim + 1 :]))


def _arithmetic(name: str, args: Args) -> Any:
    operands = [each for each in args[:2] if isinstance(each, torch.Tensor)]
    first = operands[0]
    if not first.is_floating_point() or any(each.dtype != first.dtype for each in operands):
        return None
    shape: torch.Size = torch.broadcast_shapes(*(each.shape for each in operands))  # type: ignore[no-untyped-call]
    if name.endswith("_"):
        return first if shape == first.shape else None
    return torch.empty_like(first) if shape == first.shape else first.new_empty(shape)


_RESIZES = "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
_ARITHMETIC = "add sub mul div relu leaky_relu elu silu gelu hardswish hardtanh sigmoid tanh"

_SHAPERS: Mapping[str, Callable[[str, Args], Any]] = {
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "max_unpool2d": _unpool,
    "cat": _cat,
    **dict.fromkeys(_RESIZES.split(), _resize),
    **{each + mark: _arithmetic for each in _ARITHMETIC.split() for mark in ("", "_")},
}
