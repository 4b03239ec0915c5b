"""Operators that read a neighbourhood or the whole map: convolution, pooling, resizing, products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from tilepipe.geometry.steps import Filter, Mixing, Resample, Same, Slide, Spread, Step
from tilepipe.tracing.axes import Dims, Field, plain
from tilepipe.tracing.call import Call, Result
from tilepipe.tracing.views import join

Handler = Callable[[Call], Sequence[Result]]

_TRIVIAL = (Same(), Slide())


def _pair(value: Any, count: int, default: int) -> list[int]:
    """A per-dimension argument as a list: torch accepts one number for all, or none."""
    values = [value] if isinstance(value, int) else list(value or [])
    return values * count if len(values) == 1 else values or [default] * count


def sliding(call: Call, field: Field, steps: Sequence[Step]) -> Field:
    """What an operator delivers that moves over the last dimensions, one step for each."""
    chosen: dict[str, Step] = {}
    for dim, step in enumerate(steps, start=len(field.dims) - len(steps)):
        axis = field.axis_of(dim)
        if axis is not None:
            chosen[axis] = step
        elif field.spatial(dim) and step not in _TRIVIAL:
            return call.mix("slides over a flattened map")
    return call.move(field, chosen)


# ---- convolution and pooling -----------------------------------------------------------------------------------


def convolution(call: Call) -> Sequence[Result]:
    """Convolution and transposed convolution, of one to three dimensions."""
    field = call.field("input")
    if field is None or call.field("weight") is not None:
        return [call.mix("convolves with weights that are computed from the input")]
    if field.spatial(1):
        return [call.mix("takes rows or columns as channels")]
    kernel = call.arguments["weight"].shape[2:]
    count = len(kernel)
    stride, padding = _pair(call.get("stride"), count, 1), _pair(call.get("padding"), count, 0)
    dilation = _pair(call.get("dilation"), count, 1)
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if call.get("transposed"):
        return [sliding(call, field, [Spread(s, p, e) for s, p, e in zip(stride, padding, extents, strict=True)])]
    return [sliding(call, field, [Slide(s, p, e, p) for s, p, e in zip(stride, padding, extents, strict=True)])]


def _pool_steps(call: Call) -> list[Step]:
    kernel = call.get("kernel_size")
    count = call.outputs[0].dim() - 2 if isinstance(kernel, int) or len(kernel) == 1 else len(kernel)
    sizes = _pair(kernel, count, 1)
    stride = _pair(call.get("stride"), count, 0)
    padding, dilation = _pair(call.get("padding"), count, 0), _pair(call.get("dilation"), count, 1)
    return [Slide(s or k, p, d * (k - 1) + 1, p) for k, s, p, d in zip(sizes, stride, padding, dilation, strict=True)]


def pool(call: Call) -> Sequence[Result]:
    """Pooling over windows."""
    return [sliding(call, call.first, _pool_steps(call))]


def pool_with_indices(call: Call) -> Sequence[Result]:
    """Max-pooling that also returns where it found each maximum: a map of its own that reads the same input."""
    values = sliding(call, call.first, _pool_steps(call))
    indices = sliding(call, call.first, _pool_steps(call))
    return [values, Field(indices.node, indices.dims, pool=indices.node)]


def unpool(call: Call) -> Sequence[Result]:
    """Max-unpooling: each value goes to a place in the window that its pool took."""
    values, indices = call.field("self", "input"), call.field("indices")
    if indices is None or indices.pool is None or values is None:
        return [call.mix("unpools by positions that are not a max-pooling's own")]
    layers = call.recorder.layers
    pool = layers[indices.pool]
    steps: dict[str, Step] = {}
    for axis, step in (("rows", pool.rows), ("cols", pool.cols)):
        if not isinstance(step, Slide):
            return [call.mix("unpools a pooling over a flattened map")]
        steps[axis] = Spread(step.stride, step.before, step.extent)
    dims = call.shaped(values.dims)
    expected = layers[pool.inputs[0]].size
    return [Field(call.recorder.add([values, indices], steps, dims, expected=expected), dims)]


def adaptive(call: Call) -> Sequence[Result]:
    """Pooling to a given size: the identity, or windows that change with the input's size."""
    if tuple(call.outputs[0].shape) == tuple(call.arguments["self"].shape):
        return [call.move(call.first, {})] * len(call.outputs)
    return [call.mix("pools over the whole map")] * len(call.outputs)


# ---- resizing, padding, shuffling -----------------------------------------------------------------------------


def resize(filter_: Filter, antialias: bool = False) -> Handler:
    """The handler for an interpolation."""

    def handler(call: Call) -> Sequence[Result]:
        source = call.arguments["self"] if "self" in call.arguments else call.arguments["input"]
        aligned = bool(call.get("align_corners", default=False))
        factors = call.get("scale_factors") or [call.get("scales_h"), call.get("scales_w")]
        steps: list[Step] = []
        for dim, factor in zip((-2, -1), factors, strict=True):
            size, out = source.shape[dim], call.outputs[0].shape[dim]
            if aligned:
                ratio = Fraction(size - 1, out - 1) if out > 1 else Fraction(0)
            else:
                ratio = 1 / Fraction(factor).limit_denominator(1024) if factor else Fraction(size, out)
            steps.append(Resample(ratio, filter_, aligned, antialias) if ratio else Mixing("resizes to one pixel"))
        return [sliding(call, call.first, steps)]

    return handler


def _pads(call: Call) -> list[tuple[int, int]]:
    """(before, after) per dimension that is padded, the last dimension last."""
    pad = call.get("pad", "padding")
    return [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]


def pad(mirror: bool) -> Handler:
    """The handler for a padding or, where negative, cropping; `mirror` for reflection."""

    def handler(call: Call) -> Sequence[Result]:
        steps = [Slide(1, before, 1, after, mirror) if before or after else Same() for before, after in _pads(call)]
        return [sliding(call, call.first, steps)]

    return handler


def pixel_shuffle(call: Call) -> Sequence[Result]:
    """Channels spread over a finer map."""
    factor = call.get("upscale_factor")
    return [sliding(call, call.first, [Spread(factor, 0, factor)] * 2)]


def pixel_unshuffle(call: Call) -> Sequence[Result]:
    """A finer map gathered into channels."""
    factor = call.get("downscale_factor")
    return [sliding(call, call.first, [Slide(factor, 0, factor)] * 2)]


def im2col(call: Call) -> Sequence[Result]:
    """Windows as columns: (batch, channels of all taps, flattened places)."""
    field = call.first
    kernel, dilation = _pair(call.get("kernel_size"), 2, 1), _pair(call.get("dilation"), 2, 1)
    padding, stride = _pair(call.get("padding"), 2, 0), _pair(call.get("stride"), 2, 1)
    axes = [field.axis_of(len(field.dims) - 2), field.axis_of(len(field.dims) - 1)]
    if None in axes:
        return [call.mix("slides over a flattened map")]
    steps: dict[str, Step] = {}
    cells: list[tuple[str, int]] = []
    for i, axis in enumerate(axes):
        extent = dilation[i] * (kernel[i] - 1) + 1
        size = call.arguments["self"].shape[i - 2]
        steps[str(axis)] = Slide(stride[i], padding[i], extent, padding[i])
        cells.append((str(axis), (size + 2 * padding[i] - extent) // stride[i] + 1))
    shape = call.outputs[0].shape
    dims = (*(plain(size) for size in shape[:-1]), tuple(cells))
    return [call.move(field, steps, dims)]


# ---- normalisation, reductions, products ------------------------------------------------------------------------


def batch_norm(call: Call) -> Sequence[Result]:
    """Batch normalisation: element-wise by stored statistics, mixing by its own."""
    field = call.field("input", "self")
    own = call.get("training", "train", default=call.name.endswith("no_stats"))
    if own or call.get("running_mean") is None:
        result = call.mix("normalises by the mean and variance of its own input instead of stored statistics")
        return [result] + [None] * (len(call.outputs) - 1)
    return [call.move(field or call.first, {})] + [None] * (len(call.outputs) - 1)


def group_norm(call: Call) -> Sequence[Result]:
    """Group normalisation, and whatever else takes statistics over the map."""
    return [call.mix("normalises by the mean and variance of its own input")] + [None] * (len(call.outputs) - 1)


def layer_norm(call: Call) -> Sequence[Result]:
    """Layer normalisation: element-wise over channels, mixing over rows or columns."""
    field, count = call.first, len(call.get("normalized_shape"))
    over = range(len(field.dims) - count, len(field.dims))
    if any(field.spatial(dim) for dim in over):
        return group_norm(call)
    return [join(call)[0]] + [None] * (len(call.outputs) - 1)


def reduction(call: Call) -> Sequence[Result]:
    """Sums, means, extremes and softmax along some dimensions."""
    field = call.first
    over = call.get("dim")
    dims = list(range(len(field.dims))) if over is None or over == [] else [over] if isinstance(over, int) else over
    reduced = {dim % len(field.dims) for dim in dims}
    kept = len(call.outputs[0].shape) == len(field.dims)
    left: list[Any] = []
    for dim, factors in enumerate(field.dims):
        if dim not in reduced:
            left.append(factors)
        elif kept:
            left.append(plain(call.outputs[0].shape[dim]))
    if any(field.spatial(dim) for dim in reduced):
        alike = tuple(call.outputs[0].shape) == tuple(call.tensors[0].shape)
        result = call.mix("combines all rows or columns", field.dims if alike else tuple(left))
    else:
        result = call.move(field, {}, tuple(left))
    return [result] * len(call.outputs)


def product(call: Call) -> Sequence[Result]:
    """Matrix products: mm, bmm, addmm, baddbmm, mv, dot-like ones that contract one dimension."""
    a_tensor, b_tensor = call.get("mat1", "batch1", "self"), call.get("mat2", "batch2", "vec")
    a, b = call.recorder.field(a_tensor), call.recorder.field(b_tensor)
    a_dims = a.dims if a else tuple(plain(size) for size in a_tensor.shape)
    b_dims = b.dims if b else tuple(plain(size) for size in b_tensor.shape)
    inner = b_dims[-2] if len(b_dims) > 1 else b_dims[0]
    outer = b_dims[-1:] if len(b_dims) > 1 else ()
    batch = tuple(_richer(x, y) for x, y in zip(a_dims[:-2], b_dims[:-2], strict=False))
    dims: Dims = (*batch, a_dims[-2], *outer)
    kinds = [kind for dim in dims for kind, _ in dim if kind != "x"]
    if any(kind != "x" for kind, _ in (*a_dims[-1], *inner)):
        return [call.mix("combines all places by a matrix product (attention, or a linear layer over the map)", dims)]
    if len(kinds) != len(set(kinds)):
        axes_once = (*batch, a_dims[-2], *(plain(size) for size in call.outputs[0].shape[-1:] if outer))
        return [call.mix("compares all places with each other (attention)", axes_once)]
    return [call.recorder.join(call.fields, dims)]


def _richer(x: Any, y: Any) -> Any:
    return y if all(kind == "x" for kind, _ in x) and any(kind != "x" for kind, _ in y) else x


def attention(call: Call) -> Sequence[Result]:
    """Fused attention: bounded where the compared places are a window's own, split off the rows and columns."""
    query = call.field("query") or call.first
    if any(field.spatial(len(field.dims) - 2) for field in call.fields):
        result: Field = call.mix("compares all places with each other (attention)", query.dims)
    else:
        result = call.recorder.join(call.fields, query.dims)
    return [result] + [None] * (len(call.outputs) - 1)
