"""The sizes that a network accepts without loss, found by running it, and the geometry that follows from them.

A network may compute its crops, paddings and resizes from its input's size, so no formula is trusted: the search
traces the network at candidate sizes and compares the traces.

1. A first size that passes gives the period P, the least common multiple of the accumulated strides.
2. Each residue modulo P is tried at a size well above the period, and at one and two periods more. It is a class
   of legal sizes when no strided step drops data, every layer's step stays the same, and every layer grows in
   proportion: then a tile and the raster, both of that class, see the same network.
3. Bisection downwards gives the class its smallest size.
4. Where no residue is such a class, exact stitching is impossible and the layer that spoils it is named; sizes are
   still found for blended stitching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from math import ceil, floor, lcm

from tilepipe.errors import GeometryError
from tilepipe.geometry import AxisGeometry, Geometry, Layer, Sizes, Trace, describe, fold
from tilepipe.steps import Mixing, Resample, Slide, Spread, Step
from tilepipe.window import Interval

TraceAt = Callable[[int, int], Trace]
"""A network's trace at (rows, columns); raises whatever the network raises at a size that it does not accept."""

Sample = Callable[[int], Trace]
"""A network's trace as a function of one axis's size."""


class SizeRefusedError(Exception):
    """A network that raised at one input size; the message names the layer. Another size may do."""


_OBLONG = 64
_BASES = (256, 512, 1024, 2048)
_COMMON = (28, 32, 33, 61, 64, 96, 128, 192, 224, 227, 299, 320, 384, 416, 448, 480, 500, 513, 572, 640, 768, 1024)
_LARGEST_PERIOD = 2048


def derive(trace_at: TraceAt) -> Geometry:
    """The geometry of the network that `trace_at` traces; raises GeometryError where it has none.

    Rows and columns are searched together with square inputs where all layers treat them alike, else one after the
    other, with the other axis held at a size that passes.
    """
    start, trace = _first_trace(trace_at)
    if all(layer.rows == layer.cols and layer.size[0] == layer.size[1] for layer in trace.layers):
        rows, obstacle = _axis(lambda n: trace_at(n, n), 0, start, trace)
        cols = rows
        obstacle = obstacle or _squares_only(trace_at, rows)
    else:
        rows, row_obstacle = _axis(lambda n: trace_at(n, start), 0, start, trace)
        cols, col_obstacle = _axis(lambda n: trace_at(start, n), 1, start, trace)
        obstacle = row_obstacle or col_obstacle
    return Geometry(rows, cols, trace.channels_in, trace.channels_out, obstacle)


def _first_trace(trace_at: TraceAt) -> tuple[int, Trace]:
    """A square size that passes, and its trace; tries sizes in the order of their likelihood."""
    last: Exception | None = None
    for n in chain(range(256, 320), _COMMON, range(255, 0, -1), range(320, 640)):
        try:
            return n, trace_at(n, n)
        except GeometryError as error:
            if n >= _BASES[0]:
                raise
            last = error
        except Exception as error:
            last = error
    raise GeometryError(f"no input from 1 x 1 to 639 x 639 pixels passes through the network; last: {_line(last)}")


def _line(error: Exception | None) -> str:
    if isinstance(error, SizeRefusedError | GeometryError):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _squares_only(trace_at: TraceAt, axis: AxisGeometry) -> str | None:
    """Why an oblong input does not pass through a network that accepts square ones; None where it does."""
    least = axis.sizes.ceil(_OBLONG) if axis.sizes.step else axis.sizes.minimums[0]
    for shape in (least, least + axis.sizes.step), (least + axis.sizes.step, least):
        try:
            trace = trace_at(*shape)
        except Exception as error:
            return f"the network accepts square inputs but not {shape[0]} x {shape[1]}: {_line(error)}"
        size = axis.output_size(shape[0]), axis.output_size(shape[1])
        if trace.layers[-1].size != size:
            return f"the network's output for {shape[0]} x {shape[1]} is not {size[0]} x {size[1]}"
    return None


# ---- one axis -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Class:
    """A residue class of sizes, judged at one size and the two that follow it."""

    size: int
    trace: Trace
    scales: tuple[Fraction | None, ...]
    """Input pixels per pixel of each layer; None for a layer whose size does not grow."""
    loss: str | None
    fault: str | None
    """Why tile and raster would not see the same network; None where they do."""

    @property
    def clean(self) -> bool:
        return self.loss is None and self.fault is None

    def scale(self) -> int:
        scale = self.scales[-1]
        if scale is None or scale.denominator != 1:
            raise GeometryError("a class without a whole scale")
        return int(scale)

    def shortfall(self, axis: int) -> int:
        return self.size - self.scale() * self.trace.layers[-1].size[axis]


def _axis(sample: Sample, axis: int, start: int, trace: Trace) -> tuple[AxisGeometry, str | None]:
    """The geometry of one axis, and the obstacle to exact stitching if there is one."""
    period = _period(trace, axis)
    classes, refusal = _classes(sample, axis, period)
    if not classes:
        return _fixed(sample, axis, start, period, refusal)
    alignment = _alignment(classes)
    if alignment < period and classes[0].clean:
        classes, _ = _classes(sample, axis, alignment)
        period = alignment
    classes = _alike(classes, axis)
    minimums = tuple(_minimum(sample, axis, period, each) for each in classes)
    mixing = trace.mixing
    obstacle = _blame(mixing, axis) if mixing else classes[0].fault or classes[0].loss
    reach = None if obstacle else _reach(classes, axis, alignment)
    scale, shortfall = classes[0].scale(), classes[0].shortfall(axis)
    trim, offset = _placement(classes[0], axis, shortfall)
    geometry = AxisGeometry(
        Sizes(minimums, period), alignment, reach, scale, trim, offset, shortfall if scale > 1 else 0
    )
    return geometry, obstacle


def _blame(layer: Layer, axis: int) -> str:
    step = layer.step(axis) if isinstance(layer.step(axis), Mixing) else layer.step(1 - axis)
    return describe(layer, step.reason if isinstance(step, Mixing) else "")


def _period(trace: Trace, axis: int) -> int:
    """The least common multiple of the accumulated strides, resizing ratios rounded to simple ones."""
    scales: list[Fraction | None] = [Fraction(1)]
    for layer in trace.layers[1:]:
        sources = [scale for index in layer.inputs if (scale := scales[index]) is not None]
        step, first = layer.step(axis), trace.layers[layer.inputs[0]]
        if isinstance(step, Mixing):
            kept = layer.size[axis] == first.size[axis]
            scales.append(sources[0] if sources and kept else None)
        else:
            factor = _snap(step, layer.size[axis]) if isinstance(step, Resample) else step.place[0]
            scales.append(sources[0] * factor if sources else None)
    period = lcm(*(scale.numerator for scale in scales if scale is not None))
    if period > _LARGEST_PERIOD:
        raise GeometryError(f"the network's strides repeat only every {period} pixels; legal: {_LARGEST_PERIOD}")
    return period


def _snap(step: Resample, size: int) -> Fraction:
    """The simplest ratio that the resize may stand for: at most two pixels off over the whole output."""
    simple = sorted(
        {Fraction(a, b) for a in range(1, 9) for b in range(1, 9)}, key=lambda f: f.numerator + f.denominator
    )
    near = (ratio for ratio in simple if abs(ratio - step.ratio) * size <= 2 * max(ratio, Fraction(1)))
    whole = step.ratio if step.ratio >= 1 else 1 / step.ratio
    nearest = Fraction(max(1, round(whole)))
    return next(near, nearest if step.ratio >= 1 else 1 / nearest)


def _classes(sample: Sample, axis: int, period: int) -> tuple[list[_Class], str]:
    """The best residue classes that exist, clean ones before others, and where there are none a reason."""
    lossy: list[int] = []
    reasons: list[str] = []
    for base in _BASES:
        begin = -(-base // period) * period
        found: list[_Class] = []
        for size in range(begin, begin + period):
            judged = _judge(sample, axis, period, size)
            if isinstance(judged, _Class):
                found.append(judged)
            elif judged is None:
                lossy.append(size)
            else:
                reasons.append(judged)
        if found:
            return [each for each in found if each.clean] or found, ""
    despite = (_judge(sample, axis, period, size, lossless=False) for size in lossy[:period])
    return [each for each in despite if isinstance(each, _Class)], next(iter(reasons), "no size passes")


def _judge(sample: Sample, axis: int, period: int, size: int, lossless: bool = True) -> _Class | str | None:
    """The residue class of `size`, or why it is none; None where it is not lossless and has to be."""
    try:
        first = sample(size)
        loss = _loss(first, axis)
        if loss and lossless:
            return None
        second = sample(size + period)
        if len(first.layers) != len(second.layers):
            return f"the network runs other layers at {size + period} pixels than at {size}"
        scales = tuple(
            Fraction(period, grown) if (grown := b.size[axis] - a.size[axis]) > 0 else None
            for a, b in zip(first.layers, second.layers, strict=True)
        )
        fault = _fault(first, second, axis, scales, period)
        third = sample(size + 2 * period)
        fault = fault or _fault(first, third, axis, scales, 2 * period)
    except Exception as error:
        return _line(error)
    unfit = _unfit(size, first.layers[-1].size[axis], scales[-1])
    return unfit or _Class(size, first, scales, loss, fault)


def _unfit(size: int, out: int, scale: Fraction | None) -> str | None:
    """Why an output of `out` pixels, one for `scale` input pixels, cannot be a map of `size` pixels."""
    if scale is None or not out:
        return f"the output does not grow with the input: {out} pixels for {size}"
    if scale.denominator != 1:
        return f"the output has {1 / scale} pixels per input pixel; legal: one for a whole number of input pixels"
    if scale == 1 and out > size:
        return f"the output is {out - size} pixels larger than its input of {size}; crop it to the input's size"
    return None


def _loss(trace: Trace, axis: int) -> str | None:
    """The first strided step that drops data, or unpooling that misses its pool's size, if any."""
    what = ("rows", "columns")[axis]
    for layer in trace.layers[1:]:
        step, size = layer.step(axis), layer.size[axis]
        if isinstance(step, Slide) and step.stride > 1:
            size_in = trace.layers[layer.inputs[0]].size[axis]
            lost = step.dropped(size_in, size)
            if lost:
                return describe(layer, f"drops the last {lost} of {size_in} {what}")
        if layer.expected is not None and size != layer.expected[axis]:
            return describe(layer, f"returns {size} {what} where its pool took {layer.expected[axis]}")
    return None


def _fault(small: Trace, large: Trace, axis: int, scales: tuple[Fraction | None, ...], growth: int) -> str | None:
    """The first layer that differs between two sizes in more than its size; None where all agree."""
    if len(small.layers) != len(large.layers):
        return f"the network runs {len(large.layers)} layers at one size and {len(small.layers)} at another"
    for index, (a, b) in enumerate(zip(small.layers, large.layers, strict=True)):
        if a.inputs != b.inputs or a.operator != b.operator:
            return describe(
                b, f"runs at one size and at another does not, or with other numbers than {a.operator}"
            )
        placed = [scale for source in a.inputs if (scale := scales[source]) is not None]
        step = a.step(axis)
        if not placed or isinstance(step, Mixing):
            continue
        fault = _misfit(a, b, axis, scales[index], growth)
        if fault is None and any(source * step.place[0] != scales[index] for source in placed):
            fault = "joins maps of different resolution"
        if fault:
            return describe(b, fault)
    return None


def _misfit(a: Layer, b: Layer, axis: int, scale: Fraction | None, growth: int) -> str | None:
    """What is wrong with a layer that is `b` for an input larger by `growth` pixels than that of `a`."""
    if a.step(axis) != b.step(axis):
        return _difference(a.step(axis), b.step(axis))
    if scale is None or (b.size[axis] - a.size[axis]) * scale != growth:
        return "does not grow in proportion to the input"
    return None


def _difference(a: Step, b: Step) -> str:
    if isinstance(a, Resample) and isinstance(b, Resample):
        corners = " with aligned corners" if b.aligned else ""
        return f"resizes{corners} by a ratio that changes with the size, {a.ratio} and then {b.ratio}"
    if isinstance(a, Slide | Spread) and isinstance(b, Slide | Spread):
        return "crops, pads or strides by an amount that changes with the size"
    return "treats its input differently at different sizes"


def _alignment(classes: list[_Class]) -> int:
    return lcm(*(scale.numerator for each in classes for scale in each.scales if scale is not None))


def _alike(classes: list[_Class], axis: int) -> list[_Class]:
    """The classes whose output's size follows one formula: the one closest to covering the input."""
    best = min(classes, key=lambda each: (abs(each.shortfall(axis)), each.scale()))
    same = (best.scale(), best.shortfall(axis))
    return [each for each in classes if (each.scale(), each.shortfall(axis)) == same]


def _minimum(sample: Sample, axis: int, period: int, given: _Class) -> int:
    """The smallest size of a class, by bisection: what passes at one size passes at larger ones."""

    def passes(size: int) -> bool:
        try:
            trace = sample(size)
        except Exception:
            return False
        if given.clean:
            fault = _fault(trace, given.trace, axis, given.scales, given.size - size)
            return fault is None and _loss(trace, axis) is None
        out = trace.layers[-1].size[axis]
        return (
            size - given.scale() * out == given.shortfall(axis)
            and (given.loss or _loss(trace, axis)) == given.loss
        )

    residue = given.size % period
    low, high = 0 if residue == 0 else -1, given.size // period
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(residue + middle * period) else (middle, high)
    return residue + high * period


def _reach(classes: list[_Class], axis: int, alignment: int) -> tuple[int, int]:
    """How far beyond an aligned core a tile has to go, (before, after); the widest over all classes.

    Folds a core of one alignment inside the raster, and one at each border, where reflection reads back inwards.
    """
    before = after = 0
    for each in classes:
        scale, size = each.scale(), each.trace.layers[-1].size[axis]
        step = alignment // scale
        last = (size - 1) // step * step
        inside = _margins(each, axis, fold(each.trace, axis, Interval(0, step)))
        at_start = _margins(each, axis, fold(each.trace, axis, Interval(0, step), at_start=True))
        at_end = _margins(each, axis, fold(each.trace, axis, Interval(last, size), at_end=True))
        before = max(before, inside[0], at_end[0] + scale * last)
        after = max(after, inside[1] - alignment, at_start[1] - alignment)
    return before, after


def _margins(given: _Class, axis: int, needs: list[Interval | None]) -> tuple[int, int]:
    """(a, b): a tile from input -a to input b has, in every layer, the pixels that are needed.

    The input alone does not tell: a pixel that reads no input, in a gap of a transposed convolution, or one in
    front of a crop, is a value in the raster and padding in a tile that ends before it.
    """
    before, after = Fraction(-given.size), Fraction(-given.size)
    for layer, need, scale in zip(given.trace.layers, needs, given.scales, strict=True):
        if need is not None and scale is not None and len(need):
            before = max(before, -need.start * scale)
            after = max(after, given.size + (need.stop - layer.size[axis]) * scale)
    return ceil(before), ceil(after)


def _placement(given: _Class, axis: int, shortfall: int) -> tuple[tuple[int, int], Fraction]:
    """(trim, offset) of a class: where its outputs lie among the inputs."""
    if shortfall == 0:
        return (0, 0), Fraction(0)
    shifts: list[Fraction] = [Fraction(0)]
    scales = given.scales
    for layer in given.trace.layers[1:]:
        source = next((index for index in layer.inputs if scales[index] is not None), layer.inputs[0])
        step = layer.step(axis)
        shift = Fraction(0) if isinstance(step, Mixing) else step.place[1]
        shifts.append(shifts[source] + shift * (scales[source] or 0))
    if given.scale() > 1:
        return (0, 0), shifts[-1]
    before = min(max(floor(shifts[-1]), 0), shortfall)
    return (before, shortfall - before), Fraction(before)


# ---- networks of one size ---------------------------------------------------------------------------------------


def _fixed(sample: Sample, axis: int, start: int, period: int, refusal: str) -> tuple[AxisGeometry, str | None]:
    """The geometry of a network that accepts single sizes around `start`, for blended stitching."""
    found = list(_single_sizes(sample, axis, start, period))
    if not found:
        raise GeometryError(f"no class of sizes passes through the network without loss: {refusal}")
    scale, shortfall = found[0][1], found[0][2]
    sizes = Sizes(tuple(size for size, *rest in found if rest == [scale, shortfall]), 0)
    offset = Fraction(shortfall, 2)
    trim = (floor(offset), shortfall - floor(offset)) if scale == 1 else (0, 0)
    if scale == 1:
        offset, shortfall = Fraction(trim[0]), 0
    mixing = sample(sizes.minimums[0]).mixing
    reason = f"{_blame(mixing, axis)}; " if mixing else ""
    obstacle = f"{reason}the network takes {sizes} as its size: {refusal}"
    return AxisGeometry(sizes, scale, None, scale, trim, offset, shortfall), obstacle


def _single_sizes(sample: Sample, axis: int, start: int, period: int) -> Iterator[tuple[int, int, int]]:
    """(size, scale, shortfall) of the lossless sizes within a period of `start`."""
    for size in range(max(1, start - period), start + period + 1):
        try:
            trace = sample(size)
        except Exception:
            continue
        out = trace.layers[-1].size[axis]
        if out and _loss(trace, axis) is None and size >= out:
            scale = max(1, round(size / out))
            yield size, scale, size - scale * out
