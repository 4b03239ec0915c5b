"""CPU kernels of the conditional random field in `tilepipe.crf.parameters`: a wave of rows through all its steps.

Every kernel releases the GIL, uses one thread, and does the same floating-point operations for a pixel wherever it
lies. The appearance kernel costs an exponential for each pair of neighbours, and the same pairs serve every step:
it is computed once, for one pixel of each pair, and kept for the rows between the first step and the last. So memory
depends on the width of what is refined and not on its height.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from tilepipe.predict.softmax import SEGMENT, Array, exponentials

FLOOR = 1e-6
"""The least probability that a class starts with: no class is ruled out before its neighbours were asked."""

LIMIT = 60.0
"""The most that an appearance exponent counts; e^-60 times a probability is a normal float32."""


def pair_offsets(radius: int) -> Array:
    """The (row, column) offsets of half of a pixel's neighbours, below it or right of it: int64 (pairs, 2).

    The other half are their negatives. There are 2 radius (radius + 1), a multiple of 4.
    """
    rows = [(0, dx) for dx in range(1, radius + 1)]
    below = [(dy, dx) for dy in range(1, radius + 1) for dx in range(-radius, radius + 1)]
    return np.array(rows + below, np.int64)


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
    def empty(cls, classes: int, width: int, dtype: Any, extent: tuple[int, int]) -> Field:
        """A field before its first row; extent: (iterations, radius)."""
        iterations, radius = extent
        wide, kept, slots = width + 2 * radius, 2 * radius + 1, iterations * radius + 1
        return cls(
            np.zeros((iterations, kept, classes, wide), dtype),
            np.zeros((kept, 1, wide), dtype),
            np.zeros((slots, len(pair_offsets(radius)), wide), dtype),
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


@njit(nogil=True, cache=True)
def run(
    probabilities: Array,
    colors: Array,
    valid: Array,
    kernels: Kernels,
    field: Field,
    scratch: Scratch,
    out: Array,
) -> None:
    """Fill `out` with the refined probabilities; all arrays of one type, C-contiguous.

    probabilities and out: (classes, h, w); colors: (bands, h, w); valid: (h, w) bool; field: empty, for rows of
    this width.
    """
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


def _exponentials(values: Array) -> None:
    # e**v of values that are at most 0, in place; kernels take what `_exponentials_of` chooses for their type.
    np.exp(values, out=values)


@overload(_exponentials)
def _exponentials_of(values: Any) -> Any:
    def single(values: Any) -> None:
        exponentials(values)

    def double(values: Any) -> None:
        for x in range(values.size):
            values[x] = math.exp(values[x])

    return single if values.dtype == types.float32 else double


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
    only = field.present.shape[1] - 1  # 0, but no literal, for which the compiler would make functions of their own
    for start in range(0, width, SEGMENT):
        n = min(SEGMENT, width - start)
        strength = field.strength[y % slots, :, start : start + n]
        _appearance(field.similar, field.present, only, y, start, n, kernels.offsets, scratch.sums)
        for x in range(n):
            strength[0, x] = kernels.weights[0] / sums[x] if sums[x] > 0 else 0
        _smoothness(field.present, only, y, start, n, kernels.profile, scratch)
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
