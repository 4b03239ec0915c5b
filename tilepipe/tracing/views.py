"""Operators that compute nothing or one pixel from one pixel: views, slices, joins, element-wise arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number
from typing import Any

import torch

from tilepipe.geometry.steps import Slide, Step
from tilepipe.tracing.axes import Dim, Dims, Field, TangledError, plain, reshape
from tilepipe.tracing.call import Call, Result, guessed


def same(call: Call) -> Sequence[Result]:
    """The input itself: copies, conversions, aliases."""
    field = call.first
    return [Field(field.node, field.dims, field.pool)] * len(call.outputs)


# ---- joins -----------------------------------------------------------------------------------------------------


def assign(call: Call) -> Sequence[Result]:
    """A copy into an existing tensor, with numpy's broadcasting."""
    source = call.get("src", "source")
    if call.recorder.field(source) is None:
        return [None] if call.recorder.uniform(source) or source.numel() == 1 else join(call)
    return [_joined(call, [source], call.outputs[0].shape)]


def join(call: Call) -> Sequence[Result]:
    """An element-wise operator of one or several maps, with numpy's broadcasting."""
    shape = call.outputs[0].shape
    return [_joined(call, call.tensors, shape, _numbers(call))] * len(call.outputs)


def _numbers(call: Call) -> str:
    """The plain numbers among the arguments: another size must not change them."""
    numbers = [f"{value:g}" for value in call.arguments.values() if _is_number(value)]
    return f"({', '.join(numbers)})" if numbers else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) and not isinstance(value, bool | complex)


def _joined(call: Call, tensors: Sequence[torch.Tensor], shape: Sequence[int], numbers: str = "") -> Field:
    fields = [field for tensor in tensors if (field := call.recorder.field(tensor)) is not None]
    dims: list[Dim] = [plain(size) for size in shape]
    for tensor in tensors:
        field = call.recorder.field(tensor)
        for dim, factors in enumerate(field.dims if field else ()):
            at = dim + len(shape) - tensor.dim()
            if any(kind != "x" for kind, _ in factors) and tensor.shape[dim] == shape[at]:
                if any(kind != "x" for kind, _ in dims[at]) and dims[at] != factors:
                    return call.mix("combines rows with columns", tuple(dims))
                dims[at] = factors
    result = tuple(dims)
    reason = _misfit(call, tensors, shape, result)
    if reason is None and any(field.pool is not None for field in fields):
        reason = "computes with pooling positions, which are coordinates"
    return call.recorder.mix(fields, reason, result) if reason else call.recorder.join(fields, result, numbers)


def _misfit(call: Call, tensors: Sequence[torch.Tensor], shape: Sequence[int], dims: Dims) -> str | None:
    """Why some operand makes the result depend on the place; None where none does."""
    for tensor in tensors:
        field = call.recorder.field(tensor)
        for dim in range(tensor.dim()):
            at = dim + len(shape) - tensor.dim()
            if all(kind == "x" for kind, _ in dims[at]):
                continue
            size = tensor.shape[dim]
            if field is None and size > 1 and not call.recorder.uniform(tensor):
                return "joins the map with a fixed tensor that varies over it (coordinates, a positional embedding)"
            if field is not None and size == 1 and shape[at] > 1 and field.spatial(dim):
                return "spreads one row or column over the whole map"
            if field is not None and size > 1 and not field.spatial(dim):
                return "joins the map with one whose rows or columns were lost"
    return None


def cat(call: Call) -> Sequence[Result]:
    """Concatenation along a dimension that is neither rows nor columns."""
    dim = call.get("dim", default=0) % call.outputs[0].dim()
    if any(field.spatial(dim) for field in call.fields):
        return [call.mix("concatenates along rows or columns")]
    tensors = [tensor for tensor in call.tensors if tensor.dim() == call.outputs[0].dim()]
    return [_joined(call, tensors, call.outputs[0].shape)]


def stack(call: Call) -> Sequence[Result]:
    """Maps put side by side along a new dimension."""
    tensors, dim = call.tensors, call.get("dim", default=0) % call.outputs[0].dim()
    shape = call.outputs[0].shape
    inner = _joined(call, tensors, (*shape[:dim], *shape[dim + 1 :]))
    return [Field(inner.node, (*inner.dims[:dim], plain(shape[dim]), *inner.dims[dim:]))]


# ---- views ----------------------------------------------------------------------------------------------------


def view(call: Call) -> Sequence[Result]:
    """A reshape: flattened maps, pixels split into windows, windows merged into pixels."""
    field, shape = call.first, call.outputs[0].shape
    try:
        dims, moves = reshape(field.dims, shape)
    except TangledError as error:
        return [call.mix(str(error), guessed(shape, field.dims))]
    if not moves:
        return [Field(field.node, dims, field.pool if dims == field.dims else None)]
    for steps in moves:
        field = Field(call.recorder.add([field], steps, dims), dims)
    return [field]


def permute(call: Call) -> Sequence[Result]:
    """Dimensions in another order."""
    field = call.first
    count = len(field.dims)
    if "dims" in call.arguments:
        order = [dim % count for dim in call.arguments["dims"]]
    else:
        order = list(range(count))
        a, b = call.get("dim0", default=0) % count, call.get("dim1", default=-1) % count
        order[a], order[b] = order[b], order[a]
    return [Field(field.node, tuple(field.dims[dim] for dim in order), field.pool)]


def as_real(call: Call) -> Sequence[Result]:
    """Complex numbers as pairs, in a last dimension of 2."""
    return [Field(call.first.node, (*call.first.dims, plain(2)))]


def as_complex(call: Call) -> Sequence[Result]:
    """Pairs as complex numbers: the last dimension taken away."""
    return [Field(call.first.node, call.first.dims[:-1])]


def unsqueeze(call: Call) -> Sequence[Result]:
    """A new dimension of size 1."""
    field, dim = call.first, call.get("dim") % call.outputs[0].dim()
    return [Field(field.node, (*field.dims[:dim], plain(1), *field.dims[dim:]), field.pool)]


def squeeze(call: Call) -> Sequence[Result]:
    """Dimensions of size 1 taken away."""
    field, shape = call.first, call.tensors[0].shape
    given = call.get("dim", default=list(range(len(shape))))
    over = {dim % len(shape) for dim in ([given] if isinstance(given, int) else given)}
    kept = [dims for dim, dims in enumerate(field.dims) if dim not in over or shape[dim] != 1]
    return [Field(field.node, tuple(kept), field.pool)]


def expand(call: Call) -> Sequence[Result]:
    """Dimensions of size 1 repeated."""
    field, shape, source = call.first, call.outputs[0].shape, call.tensors[0].shape
    new = len(shape) - len(source)
    dims = (*(plain(size) for size in shape[:new]), *field.dims)
    grown = [dim for dim in range(new, len(shape)) if shape[dim] != source[dim - new]]
    if any(field.spatial(dim - new) for dim in grown):
        return [call.mix("spreads one row or column over the whole map", guessed(shape, ()))]
    spread = tuple(plain(shape[dim]) if dim in grown else dims[dim] for dim in range(len(shape)))
    return [Field(field.node, spread, field.pool)]


# ---- parts ----------------------------------------------------------------------------------------------------


def cut(call: Call) -> Sequence[Result]:
    """A slice."""
    field, shape = call.first, call.tensors[0].shape
    dim = call.get("dim", default=0) % len(shape)
    size = shape[dim]
    step = call.get("step", default=1)
    start, stop, _ = slice(call.get("start"), call.get("end")).indices(size)
    return [_part(call, field, dim, start, max(start, stop), step, call.outputs[0])]


def _part(call: Call, field: Field, dim: int, start: int, stop: int, step: int, out: torch.Tensor) -> Field:
    size = call.tensors[0].shape[dim]
    if (start, stop, step) == (0, size, 1):
        return Field(field.node, field.dims, field.pool)
    axis = field.axis_of(dim)
    if axis is None and field.spatial(dim):
        return call.mix("cuts a flattened map", guessed(out.shape, field.dims))
    new: Dim = ((axis, out.shape[dim]),) if axis else plain(out.shape[dim])
    dims = (*field.dims[:dim], new, *field.dims[dim + 1 :])
    if axis is None:
        return Field(field.node, dims)
    steps: dict[str, Step] = {axis: Slide(step, -start, 1, stop - size)}
    return Field(call.recorder.add([field], steps, dims), dims)


def split(call: Call) -> Sequence[Result]:
    """Consecutive parts along a dimension: split, chunk."""
    field, dim = call.first, call.get("dim", default=0) % call.tensors[0].dim()
    results, start = [], 0
    for out in call.outputs:
        results.append(_part(call, field, dim, start, start + out.shape[dim], 1, out))
        start += out.shape[dim]
    return results


def select(call: Call) -> Sequence[Result]:
    """One index of a dimension, or each of them: select, unbind."""
    field, dim = call.first, call.get("dim", default=0) % call.tensors[0].dim()
    left = (*field.dims[:dim], *field.dims[dim + 1 :])
    if field.spatial(dim):
        return [call.mix("picks a single row or column", left)] * len(call.outputs)
    return [Field(field.node, left)] * len(call.outputs)


def pick(call: Call) -> Sequence[Result]:
    """Entries chosen by an index along one dimension: index_select, gather, sort, cumulative sums."""
    field = call.first
    dim = call.get("dim", default=-1)
    if field.spatial(dim) or any(each.spatial(dim) for each in call.fields[1:]):
        return [call.mix("moves rows or columns by computed positions")] * len(call.outputs)
    dims = tuple(
        plain(call.outputs[0].shape[i]) if i == dim % len(field.dims) else each for i, each in enumerate(field.dims)
    )
    return [Field(call.recorder.add(call.fields, {}, dims), dims)] * len(call.outputs)


def index(call: Call) -> Sequence[Result]:
    """Advanced indexing with one constant index along a dimension other than rows and columns."""
    field = call.first
    used = [dim for dim, each in enumerate(call.get("indices")) if each is not None]
    constant = all(call.recorder.field(each) is None for each in call.get("indices") if each is not None)
    if len(used) != 1 or not constant or field.spatial(used[0]) or call.outputs[0].dim() != len(field.dims):
        return [call.mix("picks pixels by computed positions", guessed(call.outputs[0].shape, field.dims))]
    dims = (*field.dims[: used[0]], plain(call.outputs[0].shape[used[0]]), *field.dims[used[0] + 1 :])
    return [Field(field.node, dims)]


def unfold(call: Call) -> Sequence[Result]:
    """Windows along one dimension, put behind the others."""
    field, dim = call.first, call.get("dimension") % call.tensors[0].dim()
    size, step = call.get("size"), call.get("step")
    axis = field.axis_of(dim)
    new: Dim = ((axis, call.outputs[0].shape[dim]),) if axis else plain(call.outputs[0].shape[dim])
    dims = (*field.dims[:dim], new, *field.dims[dim + 1 :], plain(size))
    if axis is None and field.spatial(dim):
        return [call.mix("slides over a flattened map", guessed(call.outputs[0].shape, field.dims))]
    steps: dict[str, Step] = {axis: Slide(step, 0, size)} if axis else {}
    return [Field(call.recorder.add([field], steps, dims), dims)]


def repeat(call: Call) -> Sequence[Result]:
    """The whole tensor several times over."""
    field, repeats, out = call.first, call.get("repeats"), call.outputs[0].shape
    new = len(repeats) - len(field.dims)
    if any(count > 1 and field.spatial(dim) for dim, count in enumerate(repeats[new:])):
        return [call.mix("repeats the map beside itself", guessed(out, field.dims))]
    dims = [plain(size) for size in out]
    for dim, factors in enumerate(field.dims):
        if field.spatial(dim):
            dims[dim + new] = factors
    return [Field(call.recorder.add([field], {}, tuple(dims)), tuple(dims))]
