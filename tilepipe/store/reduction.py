"""Coarser maps from a map: labels by majority, numbers by mean, each cell from all the pixels that lie in it.

The majority of majorities is another map than the majority of pixels, so every level counts the map's own pixels.
Up to the level whose cells have as many pixels as there are classes, a cell is counted on its own; from there on
counts of all classes are kept and summed 2 x 2, at less than one addition per pixel. Ties go to the lowest class.
A pixel without data counts nowhere: a cell is without data only where all of it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


def majority_levels(
    labels: NDArray[np.unsignedinteger], levels: int, classes: int, nodata: int
) -> list[NDArray[np.unsignedinteger]]:
    """Each cell's most frequent class, for cells of 2, 4, ..., 2 ** `levels` pixels a side.

    `labels` is (h, w); level k is (ceil(h / 2^k), ceil(w / 2^k)), with cells that are cut short at the end of an axis.
    Values of `classes` and more, `nodata` among them, are no class.
    """
    limits = np.array((classes, nodata))
    found: list[NDArray[np.unsignedinteger]] = []
    below, counts = labels, None
    uniform = np.empty(_coarse(labels.shape, 2), np.bool_)
    for level in range(1, levels + 1):
        out = np.empty(_coarse(labels.shape, 1 << level), labels.dtype)
        if level == 1:
            _majority_of_four(labels, limits, out, uniform)
        elif classes > 1 << 2 * (level - 1):
            uniform = _uniform(below, uniform)
            _majority(labels, below, uniform, 1 << level, limits, out)
        else:
            counts = _count(labels, below, uniform, 1 << level, classes) if counts is None else _merge(counts)
            _most_frequent(counts, nodata, out)
        if counts is None:
            below = out
        found.append(out)
    return found


def mean_levels(values: NDArray[Any], levels: int, fill: float) -> list[NDArray[Any]]:
    """Each cell's mean, for cells of 2, 4, ..., 2 ** `levels` pixels a side.

    `values` is (h, w) of unsigned integers, whose means are rounded to the nearest, halves up, or of floats. Pixels
    that hold `fill`, or NaN, count nowhere; a cell without any other holds `fill`. Sums are in float64, of 2 x 2 sums
    each, whatever the threads.
    """
    # Kernels know no 16-bit floats.
    wide = values.astype(np.float32) if values.dtype == np.float16 else values
    found: list[NDArray[Any]] = []
    for sums, counts in _sums(wide, levels, fill):
        with np.errstate(invalid="ignore"):
            means = sums / counts
        if values.dtype.kind == "u":
            means = np.floor(means + 0.5)
        found.append(np.where(counts > 0, means, fill).astype(values.dtype))
    return found


def _sums(values: NDArray[Any], levels: int, fill: float) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    sums, counts = _first_sums(values, fill) if levels else (np.zeros((0, 0)), np.zeros((0, 0), np.int64))
    for level in range(levels):
        if level:
            sums, counts = _merge_sums(sums), _merge_sums(counts)
        yield sums, counts


def _coarse(shape: tuple[int, ...], factor: int) -> tuple[int, int]:
    return -(-shape[0] // factor), -(-shape[1] // factor)


LOW = (1 << 20) - 1
"""Above every label; a vote is a count in the bits above it and the label, counted down, in those below."""


@njit(nogil=True, cache=True)
def _vote(label, count, classes):  # type: ignore[no-untyped-def]
    """The largest vote is the most frequent class's, the lowest class's of several; 0 is no class's."""
    return (count << 20) | (LOW - label) if label < classes else 0


@njit(nogil=True, cache=True)
def _majority_of_four(labels, limits, out, uniform):  # type: ignore[no-untyped-def]
    """Level 1, and which of its cells are of one value: pixels are compared, not counted."""
    classes, nodata = limits
    for row in range(out.shape[0]):
        # At the end of an axis each pixel stands for two, which changes no majority.
        top, bottom = 2 * row, min(2 * row + 1, labels.shape[0] - 1)
        for col in range(out.shape[1]):
            left, right = 2 * col, min(2 * col + 1, labels.shape[1] - 1)
            a, b = np.int64(labels[top, left]), np.int64(labels[top, right])
            c, d = np.int64(labels[bottom, left]), np.int64(labels[bottom, right])
            ab, ac, ad = np.int64(a == b), np.int64(a == c), np.int64(a == d)
            bc, bd, cd = np.int64(b == c), np.int64(b == d), np.int64(c == d)
            best = max(
                _vote(a, ab + ac + ad, classes),
                _vote(b, ab + bc + bd, classes),
                _vote(c, ac + bc + cd, classes),
                _vote(d, ad + bd + cd, classes),
            )
            out[row, col] = LOW - (best & LOW) if best else nodata
            uniform[row, col] = ab + ac + ad == 3


@njit(nogil=True, cache=True)
def _uniform(below, uniform):  # type: ignore[no-untyped-def]
    """Whether all pixels of a cell are of one value, as the cells of half its side tell."""
    rows, cols = -(-below.shape[0] // 2), -(-below.shape[1] // 2)
    found = np.empty((rows, cols), np.bool_)
    for row in range(rows):
        top, bottom = 2 * row, min(2 * row + 1, below.shape[0] - 1)
        for col in range(cols):
            left, right = 2 * col, min(2 * col + 1, below.shape[1] - 1)
            value = below[top, left]
            found[row, col] = (
                (uniform[top, left] & uniform[top, right] & uniform[bottom, left] & uniform[bottom, right])
                & (below[top, right] == value)
                & (below[bottom, left] == value)
                & (below[bottom, right] == value)
            )
    return found


@njit(nogil=True, cache=True)
def _majority(labels, below, uniform, factor, limits, out):  # type: ignore[no-untyped-def]
    """Counts each cell on its own; most cells of a label map are uniform and need no count."""
    classes, nodata = limits
    counts = np.zeros(classes, np.int64)
    for row in range(out.shape[0]):
        top, bottom = row * factor, min((row + 1) * factor, labels.shape[0])
        for col in range(out.shape[1]):
            if uniform[row, col]:
                out[row, col] = below[2 * row, 2 * col]
                continue
            left, right = col * factor, min((col + 1) * factor, labels.shape[1])
            best = 0
            for r in range(top, bottom):
                for c in range(left, right):
                    label = np.int64(labels[r, c])
                    if label < classes:
                        counts[label] += 1
                        best = max(best, _vote(label, counts[label], classes))
            for r in range(top, bottom):
                for c in range(left, right):
                    if labels[r, c] < classes:
                        counts[labels[r, c]] = 0
            out[row, col] = LOW - (best & LOW) if best else nodata


@njit(nogil=True, cache=True)
def _count(labels, below, uniform, factor, classes):  # type: ignore[no-untyped-def]
    """(rows, columns, classes): how many pixels of each class a cell has; `below` are cells of half its side."""
    rows, cols, half = -(-below.shape[0] // 2), -(-below.shape[1] // 2), factor // 2
    counts = np.zeros((rows, cols, classes), np.int32)
    for row in range(below.shape[0]):
        top, bottom = row * half, min((row + 1) * half, labels.shape[0])
        for col in range(below.shape[1]):
            left, right = col * half, min((col + 1) * half, labels.shape[1])
            cell = counts[row // 2, col // 2]
            if uniform[row, col]:
                if below[row, col] < classes:
                    cell[below[row, col]] += (bottom - top) * (right - left)
                continue
            for r in range(top, bottom):
                for c in range(left, right):
                    if labels[r, c] < classes:
                        cell[labels[r, c]] += 1
    return counts


@njit(nogil=True, cache=True)
def _merge(counts):  # type: ignore[no-untyped-def]
    """The counts of cells of twice the side."""
    rows, cols = -(-counts.shape[0] // 2), -(-counts.shape[1] // 2)
    merged = np.zeros((rows, cols, counts.shape[2]), np.int32)
    for row in range(counts.shape[0]):
        for col in range(counts.shape[1]):
            for label in range(counts.shape[2]):
                merged[row // 2, col // 2, label] += counts[row, col, label]
    return merged


@njit(nogil=True, cache=True)
def _most_frequent(counts, nodata, out):  # type: ignore[no-untyped-def]
    for row in range(counts.shape[0]):
        for col in range(counts.shape[1]):
            best, most = nodata, 0
            for label in range(counts.shape[2]):
                if counts[row, col, label] > most:
                    best, most = label, counts[row, col, label]
            out[row, col] = best


@njit(nogil=True, cache=True)
def _first_sums(values, fill):  # type: ignore[no-untyped-def]
    """The sum and the number of the pixels with data in each cell of 2 x 2."""
    rows, cols = -(-values.shape[0] // 2), -(-values.shape[1] // 2)
    sums, counts = np.empty((rows, cols), np.float64), np.empty((rows, cols), np.int64)
    for row in range(rows):
        bottom = min(2 * row + 2, values.shape[0])
        for col in range(cols):
            right = min(2 * col + 2, values.shape[1])
            total, count = 0.0, 0
            for r in range(2 * row, bottom):
                for c in range(2 * col, right):
                    value = np.float64(values[r, c])
                    if value != fill and not np.isnan(value):
                        total, count = total + value, count + 1
            sums[row, col], counts[row, col] = total, count
    return sums, counts


@njit(nogil=True, cache=True)
def _merge_sums(sums):  # type: ignore[no-untyped-def]
    rows, cols = -(-sums.shape[0] // 2), -(-sums.shape[1] // 2)
    merged = np.zeros((rows, cols), sums.dtype)
    for row in range(sums.shape[0]):
        for col in range(sums.shape[1]):
            merged[row // 2, col // 2] += sums[row, col]
    return merged
