"""A network's sizes as one would derive them on paper: the arithmetic, with numbers, of every layer that changes them.

    61 -> (61 - 5)/2 + 1 = 29 -> 13 -> 5 -> 1 -> 2(1 - 1) + 5 = 5 -> 13 -> 29 -> 61

    convolution, pooling          floor((i + 2p - d(k - 1) - 1) / s) + 1, in ceil mode the ceiling
    transposed, unpooling         s(i - 1) + a + d(k - 1) + 1 - 2p
    padding, cropping             i + p + p'
    resizing                      the factor times i, or 1/ratio (i - 1) + 1 with aligned corners

A step that follows one of its kind is written as its result only. Where branches join, the *trunk* is the one that
went through the coarsest map, and of equals the longest; the others are side branches, which have to arrive at the
trunk's size. Maps of pooling positions are branches too: unpooling has to give the size that its pool took. The
formulas are those of Dumoulin and Visin, "A guide to convolution arithmetic" (arXiv 1603.07285).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from tilepipe.geometry.network import AxisGeometry, Trace
from tilepipe.geometry.steps import Mixing, Resample, Slide, Spread, Step

Stride = Fraction | None
"""Input pixels per pixel of a layer; None behind a layer that reduces the map to a fixed size."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A side branch that arrives at a join."""

    fork: str
    """The layer at which it left the trunk; with its operator where its module ran several."""
    sizes: tuple[tuple[int, int], ...]
    """(rows, columns) at the fork and after each layer of the branch that changes them; the last arrive."""
    positions: bool = False
    """Whether it brings a pool's positions, so that its fork is the pool's input."""

    def to_json(self) -> dict[str, Any]:
        """The branch as JSON values."""
        return {"fork": self.fork, "sizes": [list(size) for size in self.sizes], "positions": self.positions}


@dataclass(frozen=True, slots=True)
class DerivationRow:
    """One layer that changes the size, or at which branches of different depth join."""

    name: str
    operator: str
    formulas: tuple[str, str]
    """How the rows and the columns of its output follow from its input's; empty where a layer keeps them."""
    size: tuple[int, int]
    """(rows, columns) of its output."""
    stride: tuple[Stride, Stride]
    """Accumulated, (rows, columns)."""
    trunk: bool
    """Whether it lies on the way through the coarsest map."""
    branches: tuple[Branch, ...] = ()
    """What joins the trunk here."""

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {
            "name": self.name,
            "operator": self.operator,
            "formulas": list(self.formulas),
            "size": list(self.size),
            "stride": [None if each is None else str(each) for each in self.stride],
            "trunk": self.trunk,
            "branches": [branch.to_json() for branch in self.branches],
        }


@dataclass(frozen=True, slots=True)
class Derivation:
    """A network's sizes from input to output."""

    size: tuple[int, int]
    """The input's (rows, columns)."""
    rows: tuple[DerivationRow, ...]
    chains: tuple[str, str]
    """The trunk in one line, for rows and for columns: "61 -> (61 - 5)/2 + 1 = 29 -> ... -> 61"."""
    narrowest: tuple[int, int]
    """The smallest size on the trunk, for rows and for columns."""
    product: tuple[Fraction, Fraction]
    """The largest accumulated stride on the trunk, for rows and for columns."""

    @property
    def out(self) -> tuple[int, int]:
        """The output's (rows, columns)."""
        return self.rows[-1].size if self.rows else self.size

    def to_json(self) -> dict[str, Any]:
        """The derivation as JSON values."""
        return {
            "size": list(self.size),
            "chains": list(self.chains),
            "narrowest": list(self.narrowest),
            "product": [str(each) for each in self.product],
            "layers": [row.to_json() for row in self.rows],
        }


def derivation_of(trace: Trace) -> Derivation:
    """The derivation of a traced network's sizes at the traced input size."""
    strides = _strides(trace, 0), _strides(trace, 1)
    back = _way_back(trace, strides)
    trunk = _path(back, len(trace.layers) - 1)
    sizes = [[trace.layers[index].size[axis] for index in trunk] for axis in (0, 1)]
    largest = [max(stride for index in trunk if (stride := each[index]) is not None) for each in strides]
    return Derivation(
        trace.layers[0].size,
        tuple(_rows(trace, strides, back, frozenset(trunk))),
        (_chain(trace, trunk, 0), _chain(trace, trunk, 1)),
        (min(sizes[0]), min(sizes[1])),
        (largest[0], largest[1]),
    )


def _rows(
    trace: Trace, strides: Sequence[Sequence[Stride]], back: Sequence[int], trunk: frozenset[int]
) -> Iterator[DerivationRow]:
    """The layers that change the size, and the joins; a pool's positions are not listed beside its values."""
    positions = {layer.inputs[1] for layer in trace.layers if layer.expected is not None and len(layer.inputs) > 1}
    for index, layer in enumerate(trace.layers[1:], start=1):
        branches = tuple(_branches(trace, back, index))
        if index not in positions and (branches or _changes(trace, index)):
            yield DerivationRow(
                layer.name,
                layer.operator,
                (_formula(trace, index, back[index], 0), _formula(trace, index, back[index], 1)),
                layer.size,
                (strides[0][index], strides[1][index]),
                index in trunk,
                branches,
            )


def conclusion(derivation: Derivation, axis: int, geometry: AxisGeometry) -> str:
    """What the chain of one axis shows: its narrowest point, the strides' product, the legal sizes."""
    size, out, least = derivation.size[axis], derivation.out[axis], derivation.narrowest[axis]
    if least == size == out:
        shape = f"length {size} throughout"
    else:
        end = f"back to {out}" if out == size else f"{out} at the end"
        shape = f"length {least} at the narrowest point, {end}" if least < min(size, out) else f"from {size} to {out}"
    if geometry.scale > 1:
        shape += f", one output per {geometry.scale} pixels"
    sizes, product = geometry.sizes, derivation.product[axis]
    follows = len(sizes.minimums) == 1 and sizes.step == product
    strides = f"the product of strides is {product}"
    if geometry.alignment != product and sizes.step:
        strides += f", those of all paths agree every {geometry.alignment} pixels"
    return f"{shape}; {strides}{', so ' if follows else '; legal: '}{sizes}"


# ---- paths ------------------------------------------------------------------------------------------------------


def _strides(trace: Trace, axis: int) -> list[Stride]:
    """Input pixels per pixel of each layer."""
    found: list[Stride] = [Fraction(1)]
    for layer in trace.layers[1:]:
        known = [stride for index in layer.inputs if (stride := found[index]) is not None]
        step, size_in = layer.step(axis), trace.layers[layer.inputs[0]].size[axis]
        if isinstance(step, Mixing):
            found.append(known[0] if known and layer.size[axis] == size_in else None)
        else:
            found.append(known[0] * step.place[0] if known else None)
    return found


def _way_back(trace: Trace, strides: Sequence[Sequence[Stride]]) -> list[int]:
    """For each layer the input on the trunk: through the coarsest map, by most layers, not by one that fixes sizes."""
    deepest: list[tuple[bool, Fraction, int]] = [(True, Fraction(1), 0)]
    back = [0]
    for index, layer in enumerate(trace.layers[1:], start=1):
        source = max(layer.inputs, key=lambda each: deepest[each])
        grows, stride, length = deepest[source]
        own = [each for axis in (0, 1) if (each := strides[axis][index]) is not None]
        deepest.append((grows and len(own) == 2, max([stride, *own]), length + 1))
        back.append(source)
    return back


def _path(back: Sequence[int], index: int) -> list[int]:
    """The layers from the input to `index`, along the trunk."""
    path = [index]
    while index:
        index = back[index]
        path.append(index)
    return path[::-1]


def _changes(trace: Trace, index: int) -> bool:
    """Whether a layer's output has another size or spacing than its input."""
    layer = trace.layers[index]
    moved = any(not isinstance(step, Mixing) and step.place[0] != 1 for step in (layer.rows, layer.cols))
    # The sizes of what a join broadcasts do not count.
    return moved or all(trace.layers[source].size != layer.size for source in layer.inputs)


def _branches(trace: Trace, back: Sequence[int], index: int) -> Iterator[Branch]:
    """The side branches that arrive at a layer, where they or the trunk changed the size since they parted."""
    layer = trace.layers[index]
    if len(layer.inputs) < 2:
        return
    if layer.expected is not None:
        pool = trace.layers[layer.inputs[1]]
        yield Branch(_label(trace, pool.inputs[0]), (layer.expected,), positions=True)
        return
    trunk = _path(back, back[index])
    places = {each: place for place, each in enumerate(trunk)}
    for source in layer.inputs:
        if source == back[index]:
            continue
        side = [source]
        while side[-1] not in places:
            side.append(back[side[-1]])
        side.reverse()
        changing = [each for each in side[1:] if _changes(trace, each)]
        passed = trunk[places[side[0]] + 1 :]
        if changing or any(_changes(trace, each) for each in passed):
            sizes = tuple(trace.layers[each].size for each in (side[0], *changing))
            yield Branch(_label(trace, side[0]), sizes)


def _label(trace: Trace, index: int) -> str:
    """A layer's name, with its operator where its module ran others, too."""
    name, operator = trace.layers[index].name, trace.layers[index].operator
    alone = all(layer.operator == operator for layer in trace.layers if layer.name == name)
    return name if alone else f"{name} {operator}"


# ---- formulas ---------------------------------------------------------------------------------------------------


def _chain(trace: Trace, path: Sequence[int], axis: int) -> str:
    """The sizes along a path, with the formula of each step that is not of the kind before it."""
    words, last = [str(trace.layers[0].size[axis])], None
    for source, index in pairwise(path):
        if _keeps(trace, source, index, axis):
            continue
        layer = trace.layers[index]
        step, size = layer.step(axis), layer.size[axis]
        formula = "" if step == last else formula_of(step, trace.layers[source].size[axis], size)
        reason = f" ({step.reason})" if isinstance(step, Mixing) else ""
        words.append(f"{formula} = {size}" if formula else f"{size}{reason}")
        last = step
    return " -> ".join(words)


def _formula(trace: Trace, index: int, source: int, axis: int) -> str:
    if _keeps(trace, source, index, axis):
        return ""
    size_in, size = trace.layers[source].size[axis], trace.layers[index].size[axis]
    formula = formula_of(trace.layers[index].step(axis), size_in, size)
    return f"{formula} = {size}" if formula else f"{size_in} to {size}"


def _keeps(trace: Trace, source: int, index: int, axis: int) -> bool:
    """Whether a layer leaves an axis as its source has it: the size, and the spacing if that is known."""
    step = trace.layers[index].step(axis)
    same = trace.layers[source].size[axis] == trace.layers[index].size[axis]
    return same and (isinstance(step, Mixing) or step.place[0] == 1)


def formula_of(step: Step, size_in: int, size: int) -> str:
    """The arithmetic that takes `size_in` to `size`, with numbers; empty where there is none.

    >>> formula_of(Slide(stride=2, before=1, extent=3, after=1), 33, 17)
    '(33 + 2*1 - 3)/2 + 1'
    """
    if isinstance(step, Slide):
        return _sliding(step, size_in, size)
    if isinstance(step, Spread):
        first = f"{_times(Fraction(step.stride))}({size_in} - 1) + {step.extent}"
        return first + _signed(-2 * step.before, "2*") + _signed(size - step.size(size_in))
    if isinstance(step, Resample) and step.aligned:
        return f"{_times(1 / step.ratio)}({size_in} - 1) + 1"
    if isinstance(step, Resample):
        return f"{size_in}/{size_in // size}" if size_in % size == 0 else f"{Fraction(size, size_in)}*{size_in}"
    return ""


def _times(factor: Fraction) -> str:
    return "" if factor == 1 else str(factor) if factor.denominator == 1 else f"{factor} "


def _sliding(step: Slide, size_in: int, size: int) -> str:
    before, after = step.before, step.after
    pads = _signed(2 * before, "2*") if before == after and before > 0 else _signed(before) + _signed(after)
    if step.stride == step.extent == 1:
        return f"{size_in}{pads}" if step.size(size_in) == size else ""
    room = f"{size_in}{pads} - {step.extent}"
    if step.stride == 1:
        return f"{room} + 1"
    divided = f"({room})/{step.stride}"
    if size == step.size(size_in):
        exact = (size_in + before + after - step.extent) % step.stride == 0
        return f"{divided if exact else f'floor({divided})'} + 1"
    return f"ceil({divided}) + 1" if size == step.size(size_in, ceil_mode=True) else ""


def _signed(value: int, factor: str = "") -> str:
    """A summand with its sign: " + 3", " - 2*1" of -2 and the factor "2*"; nothing for 0."""
    if value == 0:
        return ""
    shown = abs(value) // 2 if factor else abs(value)
    return f" {'+' if value > 0 else '-'} {factor}{shown}"
