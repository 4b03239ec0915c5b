"""What a network costs at one input shape, counted on meta tensors without computing anything."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tilepipe.tracing.run import on_meta
from tilepipe.tracing.shapes import shape_only


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a network holds while it runs once, and what it computes."""

    peak: int
    """Activations alive at the same time, at most: input, results and pooling positions."""
    workspace: int
    """Input and output of the largest convolution: what a library may need again to compute it."""
    weights: int
    """Parameters and buffers."""
    largest: int
    """Elements, not bytes, of the largest tensor."""
    flops: int
    """Multiplications and additions of its convolutions and matrix products."""


@torch.inference_mode(mode=False)
def activation_bytes(network: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Memory:
    """What the network holds for an input of `shape` (batch, channels, rows, columns) in `dtype`.

    A tensor counts from the operator that makes it until nothing refers to it; views and in-place operators add
    nothing. Pooling positions count as the 8 bytes that torch gives them.
    """
    meta = on_meta(network, dtype)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*meta.parameters(), *meta.buffers()))
    ledger = _Ledger()
    image = torch.empty(shape, dtype=dtype, device="meta")
    ledger.enter(image)
    with torch.no_grad(), ledger:
        meta(image)
    return Memory(ledger.peak, ledger.workspace, weights, ledger.largest, ledger.flops)


_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Matrix products, and which argument's last dimension they contract."""


class _Ledger(TorchDispatchMode):
    """Counts the bytes of live storages."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}
        self.total = self.peak = self.workspace = self.largest = self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: guarding against torch.compile would import its two seconds' worth of modules."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = shape_only(func, args)
        if result is None:
            result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self.enter(tensor)
        if func.overloadpacket.__name__ == "convolution":
            self.workspace = max(self.workspace, _bytes(args[0]) + _bytes(result))
            self.flops += 2 * (args[0] if args[6] else result).numel() * args[1][0].numel()
        elif func.overloadpacket.__name__ in _PRODUCTS:
            self.flops += 2 * result.numel() * args[_PRODUCTS[func.overloadpacket.__name__]].shape[-1]
        return result

    def enter(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage, unless it is counted already, until it is freed."""
        self.largest = max(self.largest, tensor.numel())
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive or tensor.device.type != "meta":
            return
        self.alive[key] = storage.nbytes()
        self.total += storage.nbytes()
        self.peak = max(self.peak, self.total)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.total -= self.alive.pop(key, 0)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
