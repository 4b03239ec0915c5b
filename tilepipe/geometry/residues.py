"""Residue classes of input sizes: do a tile and the raster, both of one class, see the same network?

A class is judged by traces at one size and at one and two periods more. It is legal when no strided step drops
data, every layer's step stays the same, and every layer grows in proportion to the input. The reach, the trim and
the offset follow from a legal class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

from tilepipe.errors import GeometryError
from tilepipe.geometry.network import Layer, Trace, describe, fold
from tilepipe.geometry.steps import Mixing, Resample, Slide, Spread, Step
from tilepipe.window import Interval

Sample = Callable[[int], Trace]
"""A network's trace as a function of one axis's size; raises whatever the network raises at that size."""


class SizeRefusedError(Exception):
    """A network that raised at one input size; the message names the layer. Another size may do."""


@dataclass(frozen=True, slots=True)
class Residue:
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
        """Whether tiles of the class can give the reference result, unless some layer's reach has no bound."""
        return self.loss is None and self.fault is None

    def scale(self) -> int:
        """Input pixels per output pixel."""
        scale = self.scales[-1]
        if scale is None or scale.denominator != 1:
            raise GeometryError("a class without a whole scale")
        return int(scale)

    def shortfall(self, axis: int) -> int:
        """Input pixels beyond the scale times the output's size."""
        return self.size - self.scale() * self.trace.layers[-1].size[axis]


def judge(sample: Sample, axis: int, period: int, size: int, lossless: bool = True) -> Residue | str | None:
    """The residue class of `size`, or why it is none; None where it is not lossless and has to be."""
    try:
        first = sample(size)
        loss = loss_of(first, axis)
        if loss and lossless:
            return None
        second = sample(size + period)
        if len(first.layers) != len(second.layers):
            return f"the network runs other layers at {size + period} pixels than at {size}"
        scales = tuple(
            Fraction(period, grown) if (grown := b.size[axis] - a.size[axis]) > 0 else None
            for a, b in zip(first.layers, second.layers, strict=True)
        )
        fault = fault_of(first, second, axis, scales, period)
        fault = fault or fault_of(first, sample(size + 2 * period), axis, scales, 2 * period)
    except Exception as error:
        return in_words(error)
    unfit = _unfit(size, first.layers[-1].size[axis], scales[-1])
    return unfit or Residue(size, first, scales, loss, fault)


def in_words(error: Exception | None) -> str:
    """An exception in one line."""
    if isinstance(error, SizeRefusedError | GeometryError):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _unfit(size: int, out: int, scale: Fraction | None) -> str | None:
    """Why an output of `out` pixels, one for `scale` input pixels, cannot be a map of `size` pixels."""
    if scale is None or not out:
        return f"the output does not grow with the input: {out} pixels for {size}"
    if scale.denominator != 1:
        return f"the output has {1 / scale} pixels per input pixel; legal: one for a whole number of input pixels"
    if scale == 1 and out > size:
        return f"the output is {out - size} pixels larger than its input of {size}; crop it to the input's size"
    return None


def loss_of(trace: Trace, axis: int) -> str | None:
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


def fault_of(small: Trace, large: Trace, axis: int, scales: tuple[Fraction | None, ...], growth: int) -> str | None:
    """The first layer that differs between two sizes in more than its size; None where all agree."""
    if len(small.layers) != len(large.layers):
        return f"the network runs {len(large.layers)} layers at one size and {len(small.layers)} at another"
    for index, (a, b) in enumerate(zip(small.layers, large.layers, strict=True)):
        if a.inputs != b.inputs or a.operator != b.operator:
            return describe(b, f"runs at one size and at another does not, or with other numbers than {a.operator}")
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


def reach_of(classes: list[Residue], axis: int, alignment: int) -> tuple[int, int]:
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


def _margins(given: Residue, axis: int, needs: list[Interval | None]) -> tuple[int, int]:
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


def placement_of(given: Residue, axis: int, shortfall: int) -> tuple[tuple[int, int], Fraction]:
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
