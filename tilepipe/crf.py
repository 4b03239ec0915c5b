"""Refinement of class probabilities by a conditional random field whose pixels see only their neighbourhood.

Mean field inference with a kernel of position and colour and one of position alone, as in Kraehenbuehl and Koltun
("Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", arXiv 1210.5644, section 2), both cut
off at `radius` (Teichmann and Cipolla, "Convolutional CRFs for Semantic Segmentation", arXiv 1805.04777, section 4).
Positions p are pixels, colours c the bands normalised by the model's mean and standard deviation. Over the valid
neighbours j of pixel i, those of the (2 radius + 1)^2 window without its centre:

    appearance a(i, j) = exp(-min(|p_i - p_j|^2 / (2 appearance_deviation^2)
                                  + |c_i - c_j|^2 / (2 color_deviation^2), 60))
    smoothness s(i, j) = exp(-|p_i - p_j|^2 / (2 smoothness_deviation^2))
    message    m_i(l)  = sum_j (appearance_weight a(i, j) / sum_k a(i, k)
                                + smoothness_weight s(i, j) / sum_k s(i, k)) Q_j(l)
    step       Q_i(l)  = P_i(l) exp(m_i(l)) / sum_k P_i(k) exp(m_i(k))

P are the network's probabilities, at least FLOOR; the first Q are the same. Labels that differ cost alike (Potts).
Pixels that are not valid neither send nor receive, nor does what lies beyond the border; dividing by the sums over
the neighbours that are left keeps the field as strong beside them. After all iterations a pixel has seen `reach` =
iterations x radius pixels to each side, and its arithmetic does not depend on where it lies in the arrays: refining
a window with that margin, cropped where the raster ends, gives the same bits as refining the raster.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from tilepipe.errors import UsageError
from tilepipe.predict.scores import SEGMENT, Array, exp_negative

FLOOR = 1e-6
"""The least probability that a class starts with: no class is ruled out before its neighbours were asked."""

LIMIT = 60.0
"""The most that an appearance exponent counts; e^-60 times a probability is a normal float32."""

_LEAST = {
    "iterations": 1,
    "radius": 1,
    "appearance_deviation": 0.1,
    "smoothness_deviation": 0.1,
    "color_deviation": 1e-3,
}
_MOST = {"iterations": 100, "radius": 32}


@dataclass(frozen=True, slots=True)
class CrfParameters:
    """What a refinement does; see the module's formula."""

    iterations: int = 5
    """Mean field steps, 1 to 100."""
    radius: int = 5
    """How far a pixel's neighbours lie in rows and columns, 1 to 32 pixels."""
    appearance_weight: float = 5.0
    """How much the neighbours of similar colour count; at least 0."""
    appearance_deviation: float = 4.0
    """The deviation of position in the appearance kernel, in pixels; at least 0.1."""
    color_deviation: float = 0.25
    """The deviation of colour, in the model's standard deviations of a band; at least 0.001."""
    smoothness_weight: float = 1.0
    """How much near neighbours count whatever their colour; at least 0."""
    smoothness_deviation: float = 1.0
    """The deviation of position in the smoothness kernel, in pixels; at least 0.1."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least, most = getattr(self, field.name), _LEAST.get(field.name, 0), _MOST.get(field.name, math.inf)
            whole = field.name in _MOST
            if whole and not (isinstance(value, int) and least <= value <= most):
                raise UsageError(f"crf {field.name} {value!r} is not legal; use a whole number from {least} to {most}")
            if not whole and not (math.isfinite(value) and value >= least):
                raise UsageError(f"crf {field.name} {value!r} is not legal; use a finite number of at least {least}")

    @property
    def reach(self) -> int:
        """How many pixels to each side a refined pixel depends on: iterations x radius."""
        return self.iterations * self.radius

    def to_json(self) -> dict[str, Any]:
        """The parameters by name; `CrfParameters(**values)` gives them back."""
        return asdict(self)


KEYS = {
    "iterations": "iterations",
    "radius": "radius",
    "appearance": "appearance_weight",
    "position": "appearance_deviation",
    "color": "color_deviation",
    "smoothness": "smoothness_weight",
    "distance": "smoothness_deviation",
}
"""What a parameter is called on the command line."""


def parse_crf(text: str) -> CrfParameters:
    """The parameters that "crf" or "crf:key=value,..." asks for; those not named keep their defaults.

    Keys are those of KEYS or the fields' own names. Raises UsageError for anything else.

    >>> parse_crf("crf:iterations=3,radius=4,color=0.2").reach
    12
    """
    name, colon, rest = text.strip().partition(":")
    if name != "crf":
        raise UsageError(f"refinement {text!r} is not known; use crf, or crf:KEY=VALUE,... with {', '.join(KEYS)}")
    values: dict[str, int | float] = {}
    for part in rest.split(",") if colon else ():
        key, _, value = (piece.strip() for piece in part.partition("="))
        field = KEYS.get(key, key)
        if field not in KEYS.values() or field in values:
            told = "is given twice" if field in values else "is not known"
            raise UsageError(
                f"{key!r} in {text!r} {told}; use each of {', '.join(KEYS)} at most once, as in crf:radius=5"
            )
        try:
            values[field] = int(value) if field in _MOST else float(value)
        except ValueError:
            kind = "whole number" if field in _MOST else "number"
            raise UsageError(f"{value!r} for {key} in {text!r} is not a {kind}; write it as in {key}=1") from None
    return CrfParameters(**values)  # type: ignore[arg-type]


def pair_offsets(radius: int) -> Array:
    """The (row, column) offsets of half of a pixel's neighbours, below it or right of it: int64 (pairs, 2).

    The other half are their negatives. There are 2 radius (radius + 1), a multiple of 4.
    """
    rows = [(0, dx) for dx in range(1, radius + 1)]
    below = [(dy, dx) for dy in range(1, radius + 1) for dx in range(-radius, radius + 1)]
    return np.array(rows + below, np.int64)


def working_bytes(classes: int, width: int, itemsize: int, parameters: CrfParameters) -> int:
    """The memory that `refine` works in beside its arguments and its result, for rows of `width` pixels."""
    wide = width + 2 * parameters.radius
    kernel_rows = parameters.reach + 1
    pairs = 2 * parameters.radius * (parameters.radius + 1)
    kept_rows = 2 * parameters.radius + 1
    return itemsize * wide * (kernel_rows * (pairs + 2) + kept_rows * (parameters.iterations * classes + 1))


class Field(NamedTuple):
    """The rows that are being worked on; row y of the raster lies in slot y modulo the slots.

    Step t of the inference follows `radius` rows behind step t - 1, whose rows it needs on both sides:

        row y              loaded          (step 0)
        row y - radius     kernels, step 1
        row y - 2 radius   step 2

    Rows are `radius` columns longer at both ends; what lies beyond the raster, or is not valid, is 0 everywhere.
    """

    beliefs: Array
    """Q after each step but the last, (iterations, 2 radius + 1 slots, classes, columns)."""
    present: Array
    """1 where a pixel is valid, (2 radius + 1 slots, 1, columns)."""
    similar: Array
    """The appearance kernel a(i, i + offset), (reach + 1 slots, pairs, columns)."""
    strength: Array
    """Weight / sum of the kernel for appearance and smoothness, (reach + 1 slots, 2, columns)."""

    @classmethod
    def empty(cls, classes: int, width: int, dtype: Any, parameters: CrfParameters) -> Field:
        """A field before its first row."""
        radius, wide = parameters.radius, width + 2 * parameters.radius
        slots, pairs = parameters.reach + 1, 2 * radius * (radius + 1)
        return cls(
            np.zeros((parameters.iterations, 2 * radius + 1, classes, wide), dtype),
            np.zeros((2 * radius + 1, 1, wide), dtype),
            np.zeros((slots, pairs, wide), dtype),
            np.zeros((slots, 2, wide), dtype),
        )


class Kernels(NamedTuple):
    """The parameters as the kernels take them, in the precision of the probabilities."""

    offsets: Array
    """As of `pair_offsets`."""
    position: Array
    """|offset|^2 / (2 appearance_deviation^2) of each pair."""
    color: Any
    """1 / (2 color_deviation^2)."""
    profile: Array
    """The smoothness kernel along one axis, from 0 to `radius` pixels away."""
    weights: Array
    """(appearance_weight, smoothness_weight)."""

    @classmethod
    def of(cls, parameters: CrfParameters, dtype: Any) -> Kernels:
        """The kernels of these parameters."""
        offsets = pair_offsets(parameters.radius)
        position = (offsets**2).sum(axis=1) / (2 * parameters.appearance_deviation**2)
        profile = np.exp(-(np.arange(parameters.radius + 1) ** 2) / (2 * parameters.smoothness_deviation**2))
        return cls(
            offsets,
            position.astype(dtype),
            dtype.type(1 / (2 * parameters.color_deviation**2)),
            profile.astype(dtype),
            np.array([parameters.appearance_weight, parameters.smoothness_weight], dtype),
        )


class Scratch(NamedTuple):
    """What is worked out for SEGMENT pixels of a row, one element per pixel."""

    sums: Array
    """(2, SEGMENT)"""
    column: Array
    """`radius` pixels longer at both ends."""
    powers: Array
    """(classes, SEGMENT)"""
    best: Array

    @classmethod
    def empty(cls, classes: int, radius: int, dtype: Any) -> Scratch:
        """Scratch for pixels of so many classes."""
        return cls(
            np.empty((2, SEGMENT), dtype),
            np.empty(SEGMENT + 2 * radius, dtype),
            np.empty((classes, SEGMENT), dtype),
            np.empty(SEGMENT, dtype),
        )


def refine(probabilities: Array, colors: Array, valid: Array | None, parameters: CrfParameters) -> Array:
    """The refined probabilities, of the shape and type of `probabilities`; those of invalid pixels are unchanged.

    probabilities: (classes, h, w) float32 or float64. colors: (bands, h, w), the same type, normalised by the
    model's statistics; finite where valid. valid: (h, w) bool, None for all. All arithmetic is in that type, in one
    thread without the GIL; memory: the result and `working_bytes`.
    """
    classes, height, width = probabilities.shape
    dtype = probabilities.dtype
    assert dtype in (np.float32, np.float64), f"probabilities in {dtype}"
    assert colors.dtype == dtype, f"colours in {colors.dtype} beside probabilities in {dtype}"
    assert colors.shape[1:] == (height, width), "one colour per pixel"
    assert valid is None or valid.shape == (height, width), "one flag per pixel"
    out = np.empty(probabilities.shape, dtype)
    _refine(
        np.ascontiguousarray(probabilities),
        np.ascontiguousarray(colors),
        np.ones((height, width), np.bool_) if valid is None else np.ascontiguousarray(valid, np.bool_),
        Kernels.of(parameters, dtype),
        Field.empty(classes, width, dtype, parameters),
        Scratch.empty(classes, parameters.radius, dtype),
        out,
    )
    return out


@njit(nogil=True, cache=True)
def _refine(
    probabilities: Array,
    colors: Array,
    valid: Array,
    kernels: Kernels,
    field: Field,
    scratch: Scratch,
    out: Array,
) -> None:
    steps, slots = field.beliefs.shape[:2]
    height, radius = probabilities.shape[1], slots // 2
    for front in range(height + steps * radius):
        _load(probabilities, valid, front, field)
        for step in range(1, steps + 1):
            y = front - step * radius
            if y < 0:
                break
            if y < height:
                if step == 1:
                    _kernel_row(colors, valid, y, kernels, field, scratch)
                _step_row(probabilities, valid, (step, y), kernels, field, scratch, out)
            elif step < steps:
                field.beliefs[step, y % slots] = 0


@njit(nogil=True, cache=True)
def _load(probabilities: Array, valid: Array, y: int, field: Field) -> None:
    # Row y into step 0 of the field.
    classes, height, width = probabilities.shape
    slots = field.present.shape[0]
    radius, floor = slots // 2, probabilities.dtype.type(FLOOR)
    slot = y % slots
    field.beliefs[0, slot] = 0
    field.present[slot] = 0
    if y >= height:
        return
    present = field.present[slot, 0, radius : radius + width]
    for x in range(width):
        present[x] = valid[y, x]
    for c in range(classes):
        out, line = field.beliefs[0, slot, c, radius : radius + width], probabilities[c, y]
        for x in range(width):
            out[x] = max(line[x], floor) if present[x] else 0


@njit(nogil=True, cache=True)
def _exponentials(values: Array) -> None:
    # e**v of values that are at most 0, in place.
    if values.itemsize == 4:
        for x in range(values.size):
            values[x] = exp_negative(np.float32(values[x]))
    else:
        for x in range(values.size):
            values[x] = math.exp(values[x])


@njit(nogil=True, cache=True)
def _kernel_row(colors: Array, valid: Array, y: int, kernels: Kernels, field: Field, scratch: Scratch) -> None:
    # Row y of the appearance kernel, and both kernels' strengths there.
    bands, height, width = colors.shape
    slots, pairs, wide = field.similar.shape
    radius, limit = (wide - width) // 2, colors.dtype.type(LIMIT)
    row = field.similar[y % slots]
    for pair in range(pairs):
        dy, dx = kernels.offsets[pair]
        first, last = max(0, -dx), max(min(width, width - dx), 0)
        line = row[pair, radius + first : radius + max(first, last)]
        if y + dy >= height:
            line[:] = 0
            continue
        line[:] = 0
        for b in range(bands):
            here, there = colors[b, y, first:], colors[b, y + dy, first + dx :]
            for x in range(line.size):
                line[x] += (here[x] - there[x]) * (here[x] - there[x])
        for x in range(line.size):
            line[x] = -min(line[x] * kernels.color + kernels.position[pair], limit)
        _exponentials(line)
        seen, seen_there = valid[y, first:], valid[y + dy, first + dx :]
        for x in range(line.size):
            line[x] = line[x] if seen[x] and seen_there[x] else 0
    sums = scratch.sums[0]
    for start in range(0, width, SEGMENT):
        n = min(SEGMENT, width - start)
        strength = field.strength[y % slots, :, start : start + n]
        _appearance(field.similar, field.present, 0, y, start, n, kernels.offsets, scratch.sums)
        for x in range(n):
            strength[0, x] = kernels.weights[0] / sums[x] if sums[x] > 0 else 0
        _smoothness(field.present, 0, y, start, n, kernels.profile, scratch)
        for x in range(n):
            strength[1, x] = kernels.weights[1] / sums[x] if sums[x] > 0 else 0


@njit(nogil=True, cache=True, inline="always")
def _slot(row: int, slots: int) -> int:
    # `row` modulo `slots` for rows from -slots to 2 slots - 1, without a division.
    if row < 0:
        return row + slots
    return row - slots if row >= slots else row


@njit(nogil=True, cache=True)
def _appearance(similar: Array, rows: Array, c: int, y: int, start: int, n: int, offsets: Array, sums: Array) -> None:
    # sums[:2] = sum_j a(i, j) rows_j of classes c and c + 1 (or c, where it is the last), for the n pixels of row y
    # from `start` on. Two classes and two pairs at a time: each kernel value that is loaded serves twice, and sums
    # are loaded and stored half as often.
    slots, pairs, _ = similar.shape
    size, classes, _ = rows.shape
    also = min(c + 1, classes - 1)
    first, at, y_at = start + size // 2, y % slots, y % size
    here, one, two = similar[at], sums[0], sums[1]
    for x in range(n):
        one[x] = 0
        two[x] = 0
    for pair in range(0, pairs, 2):
        ay, ax = offsets[pair]
        by, bx = offsets[pair + 1]
        k0, k1 = here[pair, first:], here[pair + 1, first:]
        k2 = similar[_slot(at - ay, slots), pair, first - ax :]
        k3 = similar[_slot(at - by, slots), pair + 1, first - bx :]
        r0, r1 = rows[_slot(y_at + ay, size)], rows[_slot(y_at + by, size)]
        r2, r3 = rows[_slot(y_at - ay, size)], rows[_slot(y_at - by, size)]
        p0, p1, p2, p3 = r0[c, first + ax :], r1[c, first + bx :], r2[c, first - ax :], r3[c, first - bx :]
        q0, q1, q2, q3 = r0[also, first + ax :], r1[also, first + bx :], r2[also, first - ax :], r3[also, first - bx :]
        for x in range(n):
            a, b, d, e = k0[x], k1[x], k2[x], k3[x]
            one[x] += (a * p0[x] + b * p1[x]) + (d * p2[x] + e * p3[x])
            two[x] += (a * q0[x] + b * q1[x]) + (d * q2[x] + e * q3[x])


@njit(nogil=True, cache=True)
def _smoothness(rows: Array, c: int, y: int, start: int, n: int, profile: Array, scratch: Scratch) -> None:
    # scratch.sums[0] = sum_j s(i, j) rows_j(c): along columns, then rows, leaving the centre out of both.
    size = rows.shape[0]
    radius, at = size // 2, y % size
    sums, column = scratch.sums[0], scratch.column
    wide = n + 2 * radius
    for x in range(wide):
        column[x] = 0
    for d in range(1, radius + 1):
        above, below = rows[_slot(at - d, size), c, start:], rows[_slot(at + d, size), c, start:]
        g = profile[d]
        for x in range(wide):
            column[x] += g * (above[x] + below[x])
    for x in range(n):
        sums[x] = column[radius + x]
    centre = rows[at, c, start:]
    for x in range(wide):
        column[x] += centre[x]
    for d in range(1, radius + 1):
        left, right = column[radius - d :], column[radius + d :]
        g = profile[d]
        for x in range(n):
            sums[x] += g * (left[x] + right[x])


@njit(nogil=True, cache=True)
def _messages(
    rows: Array, y: int, start: int, n: int, strength: Array, kernels: Kernels, field: Field, scratch: Scratch
) -> None:
    # scratch.powers = m_i(l) for the n pixels of row y from `start` on.
    sums, powers = scratch.sums, scratch.powers
    for c in range(0, len(powers), 2):
        _appearance(field.similar, rows, c, y, start, n, kernels.offsets, sums)
        for k in range(c, min(c + 2, len(powers))):
            power, total = powers[k], sums[k - c]
            for x in range(n):
                power[x] = strength[0, x] * total[x]
    for c in range(len(powers)):
        _smoothness(rows, c, y, start, n, kernels.profile, scratch)
        power, total = powers[c], sums[0]
        for x in range(n):
            power[x] += strength[1, x] * total[x]


@njit(nogil=True, cache=True)
def _step_row(
    probabilities: Array,
    valid: Array,
    place: tuple[int, int],
    kernels: Kernels,
    field: Field,
    scratch: Scratch,
    out: Array,
) -> None:
    # One step of row y, into the field or, after the last step, into `out`.
    step, y = place
    steps, slots, classes, _ = field.beliefs.shape
    width, radius = probabilities.shape[2], slots // 2
    powers, best, total = scratch.powers, scratch.best, scratch.sums[0]
    before, floor = field.beliefs[step - 1], probabilities.dtype.type(FLOOR)
    for start in range(0, width, SEGMENT):
        n = min(SEGMENT, width - start)
        seen, strength = valid[y, start : start + n], field.strength[y % field.strength.shape[0], :, start : start + n]
        _messages(before, y, start, n, strength, kernels, field, scratch)
        for x in range(n):
            best[x] = powers[0, x]
            total[x] = 0
        for c in range(1, classes):
            power = powers[c]
            for x in range(n):
                best[x] = max(best[x], power[x])
        for c in range(classes):
            power, line = powers[c], probabilities[c, y, start : start + n]
            for x in range(n):
                power[x] -= best[x]
            _exponentials(power[:n])
            for x in range(n):
                power[x] *= max(line[x], floor)
                total[x] += power[x]
        for c in range(classes):
            power, line = powers[c], probabilities[c, y, start : start + n]
            target = out[c, y, start:] if step == steps else field.beliefs[step, y % slots, c, radius + start :]
            for x in range(n):
                unseen = line[x] if step == steps else 0
                target[x] = power[x] / total[x] if seen[x] else unseen
