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
from fractions import Fraction
from itertools import chain
from math import floor, lcm

from tilepipe.errors import GeometryError
from tilepipe.geometry.network import AxisGeometry, Geometry, Layer, Sizes, Trace, describe
from tilepipe.geometry.residues import Residue, Sample, fault_of, in_words, judge, loss_of, placement_of, reach_of
from tilepipe.geometry.steps import Mixing, Resample

TraceAt = Callable[[int, int], Trace]
"""A network's trace at (rows, columns); raises whatever the network raises at a size that it does not accept."""

_OBLONG = 64
_BASES = (256, 512, 1024, 2048)
_COMMON = (28, 32, 33, 61, 64, 96, 128, 192, 224, 227, 299, 320, 384, 416, 448, 480, 500, 513, 572, 640, 768, 1024)
_LARGEST_PERIOD = 2048
_RAREST = 64
"""Periods among which a network may admit a single one, as exported programs do that want multiples of 32."""


def derive(trace_at: TraceAt, example: tuple[int, int] | None = None) -> Geometry:
    """The geometry of the network that `trace_at` traces; raises GeometryError where it has none.

    `example` is a size (rows, columns) that is known to pass, for networks that take no square.

    Rows and columns are searched together with square inputs where all layers treat them alike, else one after the
    other, with the other axis held at a size that passes.
    """
    (height, width), trace = first_trace(trace_at, example)
    if height == width and all(layer.rows == layer.cols and layer.size[0] == layer.size[1] for layer in trace.layers):
        rows, obstacle = _axis(lambda n: trace_at(n, n), 0, height, trace)
        cols = rows
        obstacle = obstacle or _squares_only(trace_at, rows)
    else:
        rows, row_obstacle = _axis(lambda n: trace_at(n, width), 0, height, trace)
        cols, col_obstacle = _axis(lambda n: trace_at(height, n), 1, width, trace)
        obstacle = row_obstacle or col_obstacle
    return Geometry(rows, cols, trace.channels_in, trace.channels_out, obstacle)


def first_trace(trace_at: TraceAt, example: tuple[int, int] | None = None) -> tuple[tuple[int, int], Trace]:
    """A size that passes, square if possible, and its trace; tries sizes in the order of their likelihood."""
    last: Exception | None = None
    for n in chain(range(256, 320), _COMMON, range(128, 0, -1), range(132, 640, 4)):
        try:
            return (n, n), trace_at(n, n)
        except GeometryError as error:
            if n >= _BASES[0]:
                raise
            last = error
        except Exception as error:
            last = error
    if example is not None:
        return example, trace_at(*example)
    raise GeometryError(
        f"none of many input sizes from 1 x 1 to 636 x 636 passes through the network; last: {in_words(last)}"
    )


def _squares_only(trace_at: TraceAt, axis: AxisGeometry) -> str | None:
    """Why an oblong input does not pass through a network that accepts square ones; None where it does."""
    least = axis.sizes.ceil(_OBLONG) if axis.sizes.step else axis.sizes.minimums[0]
    for shape in (least, least + axis.sizes.step), (least + axis.sizes.step, least):
        try:
            trace = trace_at(*shape)
        except Exception as error:
            return f"the network accepts square inputs but not {shape[0]} x {shape[1]}: {in_words(error)}"
        size = axis.output_size(shape[0]), axis.output_size(shape[1])
        if trace.layers[-1].size != size:
            return f"the network's output for {shape[0]} x {shape[1]} is not {size[0]} x {size[1]}"
    return None


def _axis(sample: Sample, axis: int, start: int, trace: Trace) -> tuple[AxisGeometry, str | None]:
    """The geometry of one axis, and the obstacle to exact stitching if there is one."""
    period = _period(trace, axis)
    classes, refusal = _classes(sample, axis, period)
    alignment = _alignment(classes) if classes else 0
    if not classes and (wider := _wider(sample, start, period)) is not None:
        classes, _ = _classes(sample, axis, wider)
        period = alignment = wider
    if not classes:
        return _fixed(sample, axis, start, period, refusal)
    if alignment < period and classes[0].clean:
        classes, _ = _classes(sample, axis, alignment)
        period = alignment
    classes = _alike(classes, axis)
    minimums = tuple(_minimum(sample, axis, period, each) for each in classes)
    mixing = classes[0].trace.mixing
    obstacle = _blame(mixing, axis) if mixing else classes[0].fault or classes[0].loss
    reach = None if obstacle else reach_of(classes, axis, alignment)
    scale, shortfall = classes[0].scale(), classes[0].shortfall(axis)
    trim, offset = placement_of(classes[0], axis, shortfall)
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


def _classes(sample: Sample, axis: int, period: int) -> tuple[list[Residue], str]:
    """The best residue classes that exist, clean ones before others, and where there are none a reason."""
    lossy: list[int] = []
    reasons: list[str] = []
    for base in _BASES:
        begin = -(-base // period) * period
        found: list[Residue] = []
        for size in range(begin, begin + period):
            if found and _covers(found[0], axis) and _differs(sample, size, axis, found[0]):
                continue
            judged = judge(sample, axis, period, size)
            if isinstance(judged, Residue):
                found.append(judged)
            elif judged is None:
                lossy.append(size)
            else:
                reasons.append(judged)
        if found:
            return [each for each in found if each.clean] or found, ""
    despite = [judge(sample, axis, period, size, lossless=False) for size in lossy[:period]]
    reasons += [each for each in despite if isinstance(each, str)]
    return [each for each in despite if isinstance(each, Residue)], next(iter(reasons), "none passes")


def _wider(sample: Sample, start: int, period: int) -> int | None:
    """The multiple of the period at which sizes pass that the network itself admits more rarely; None: not found."""
    found = (period * n for n in range(2, _RAREST + 1) if _passes(sample, start + period * n))
    return next(found, None)


def _covers(given: Residue, axis: int) -> bool:
    return given.clean and given.shortfall(axis) == 0


def _differs(sample: Sample, size: int, axis: int, given: Residue) -> bool:
    """Whether the output for `size` does not cover the input as that of a class does, or is resized otherwise.

    A ratio that stays the same over a class is that of its layers' strides, so all classes share it.
    """
    try:
        layers = sample(size).layers
    except Exception:
        return True
    pairs = zip(layers, given.trace.layers, strict=False)
    resized = ((a.step(axis), b.step(axis)) for a, b in pairs)
    other = any(a != b for a, b in resized if isinstance(a, Resample) and isinstance(b, Resample))
    return other or size != given.scale() * layers[-1].size[axis]


def _alignment(classes: list[Residue]) -> int:
    return lcm(*(scale.numerator for each in classes for scale in each.scales if scale is not None))


def _alike(classes: list[Residue], axis: int) -> list[Residue]:
    """The classes whose output's size follows one formula: the one closest to covering the input."""
    best = min(classes, key=lambda each: (abs(each.shortfall(axis)), each.scale()))
    same = (best.scale(), best.shortfall(axis))
    return [each for each in classes if (each.scale(), each.shortfall(axis)) == same]


def _minimum(sample: Sample, axis: int, period: int, given: Residue) -> int:
    """The smallest size of a class, by bisection: what passes at one size passes at larger ones."""

    def passes(size: int) -> bool:
        try:
            trace = sample(size)
        except Exception:
            return False
        if given.clean:
            fault = fault_of(trace, given.trace, axis, given.scales, given.size - size)
            return fault is None and loss_of(trace, axis) is None
        out = trace.layers[-1].size[axis]
        return (
            size - given.scale() * out == given.shortfall(axis) and (given.loss or loss_of(trace, axis)) == given.loss
        )

    residue = given.size % period
    low, high = 0 if residue == 0 else -1, given.size // period
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(residue + middle * period) else (middle, high)
    return residue + high * period


def _fixed(sample: Sample, axis: int, start: int, period: int, refusal: str) -> tuple[AxisGeometry, str | None]:
    """The geometry of a network that accepts single sizes around `start`, for blended stitching."""
    found = [] if _passes(sample, start + 2 * period) else list(_single_sizes(sample, axis, start, period))
    if not found:
        raise GeometryError(f"no input size gives a map of the input: {refusal}")
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


def _passes(sample: Sample, size: int) -> bool:
    try:
        sample(size)
    except Exception:
        return False
    return True


def _single_sizes(sample: Sample, axis: int, start: int, period: int) -> Iterator[tuple[int, int, int]]:
    """(size, scale, shortfall) of the lossless sizes within a period of `start`."""
    for size in range(max(1, start - period), start + period + 1):
        try:
            trace = sample(size)
        except Exception:
            continue
        out = trace.layers[-1].size[axis]
        if out and loss_of(trace, axis) is None and size >= out:
            scale = max(1, round(size / out))
            yield size, scale, size - scale * out
