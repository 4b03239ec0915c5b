"""Window functions, and the CPU kernels that blend overlapping tiles by averaging their class probabilities.

Tiles are added in global row-major order, each pixel's sum in float32, so that the result does not depend on how
the raster is cut into blocks. Only the rows that later tiles may still touch are held, in a `Strip`:

    block  +------------------+
           | finished rows    |
           |==================|  <- strip's row 0: the current row of tiles begins here
           | strip            |
           |==================|  <- the current tiles end here
           | untouched        |
           +------------------+

Scores, patches and undefined pixels are those of `tilepipe.predict.scores`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tilepipe.errors import UsageError
from tilepipe.predict.lanes import LANES, load, store
from tilepipe.predict.scores import Patch
from tilepipe.predict.softmax import SEGMENT, Array, Segment, best_of, count_undefined, segment_of, softmax


def _hann(n: int) -> Array:
    return np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2


def _gaussian(n: int) -> Array:
    return np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2)


def _pyramid(n: int) -> Array:
    return np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) / ((n + 1) // 2)


WINDOWS: dict[str, Callable[[int], Array]] = {
    "hann": _hann,
    "gaussian": _gaussian,
    "pyramid": _pyramid,
    "flat": np.ones,
}
"""Profiles along one axis, sampled at pixel centres: a raised cosine, a normal curve whose deviation is an eighth
of the axis, a triangle, a constant. All are symmetric and positive."""


def window_weights(kind: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    """The weight of each pixel of a tile's output: float32 (rows, columns), positive, at most 1.

    The product of one profile per axis. `kind` is one of WINDOWS.

    >>> window_weights("pyramid", (1, 4)).tolist()
    [[0.5, 1.0, 1.0, 0.5]]
    """
    if kind not in WINDOWS:
        raise UsageError(f"window {kind!r} is not known; use one of {', '.join(WINDOWS)}")
    if min(shape) < 1:
        raise UsageError(f"a window of {shape[0]} x {shape[1]} pixels is empty; it needs at least 1 x 1")
    rows, cols = (WINDOWS[kind](n) for n in shape)
    return np.outer(rows, cols).astype(np.float32)


class Strip(NamedTuple):
    """The sums of the rows of a block that tiles may still add to; its row 0 moves down the block."""

    sums: Array
    """Weighted probabilities, float32 (rows, classes, columns), with some columns more than the strip has."""
    weights: Array
    """The weights' sum, float32 (rows, columns)."""
    first: Array
    """The label that the first tile gave, uint16 (rows, columns)."""
    seen: Array
    """0: no tile; 1: one; 2: several, of one label; 3: several, of different labels; uint8 (rows, columns)."""

    @classmethod
    def empty(cls, classes: int, rows: int, cols: int) -> Strip:
        """A strip to which no tile has added."""
        shape = rows, cols
        # An odd number of cache lines between classes: were it a power of two, a cache would keep but a few of them.
        lines = -(-cols // LANES) | 1
        return cls(
            np.zeros((rows, classes, lines * LANES), np.float32),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.uint16),
            np.zeros(shape, np.uint8),
        )

    def advance(self, by: int) -> None:
        """Drop the first `by` rows, move the others up, and clear what is freed."""
        for array in self:
            kept = max(len(array) - by, 0)
            array[:kept] = array[by : by + kept]
            array[kept:] = 0


@njit(nogil=True, inline="always")
def _add(segment: Segment, at: int, count: int, weights: Array, total: Array, sums: Array, to: int) -> None:
    # Add a segment's probabilities from `at` on, times their weights, to the sums (classes, columns) from `to` on.
    weight = load(weights, at, count)
    store(load(total, at, count) + weight, total, at, count)
    share = weight / load(segment.sums, at, LANES)
    for c in range(sums.shape[0]):
        power, line = load(segment.powers[c], at, LANES), sums[c]
        store(load(line, to, count) + power * share, line, to, count)


@njit(nogil=True, cache=True)
def accumulate(scores: Array, last: bool, patch: Patch, valid: Array | None, weights: Array, strip: Strip) -> int:
    """Add a patch's softmax probabilities, times `weights`, to the strip; the number of undefined pixels.

    weights: float32 of the tile's output, (h, w); patch.to_row, valid: in rows of the strip. Pixels are summed
    one tile after the other: call it for the tiles in row-major order.
    """
    classes = strip.sums.shape[1]
    segment = segment_of(scores, classes)
    sums, label = segment.sums, segment.labels
    undefined = 0
    for y in range(patch.height):
        top, row = patch.to_row + y, patch.row + y
        for start in range(0, patch.width, SEGMENT):
            n = min(SEGMENT, patch.width - start)
            left, col = patch.to_col + start, patch.col + start
            if softmax(scores, last, (row, col), n, segment, strip.sums[top, :, left : left + n]):
                undefined += count_undefined(sums, n, valid, (top, left))
            weight, total = weights[row, col : col + n], strip.weights[top, left : left + n]
            whole = n // LANES * LANES
            for x in range(0, whole, LANES):
                _add(segment, x, LANES, weight, total, strip.sums[top], left + x)
            if whole < n:
                _add(segment, whole, n - whole, weight, total, strip.sums[top], left + whole)
            _see(strip.first[top, left : left + n], strip.seen[top, left : left + n], label)
    return undefined


@njit(nogil=True, cache=True)
def _see(first: Array, seen: Array, label: Array) -> None:
    """Note one more tile's labels of some pixels in a strip's `first` and `seen`."""
    for x in range(first.size):
        given, before, old = np.uint16(label[x]), seen[x], first[x]
        new = before == 0
        now = given if new else old
        more = np.uint8(1) if new else np.uint8(2)
        differs = (given != now) | (before == 3)
        seen[x] = np.uint8(3) if differs else more
        first[x] = now


@njit(nogil=True, cache=True)
def _count(seen: Array, valid: Array | None) -> tuple[int, int, int]:
    """Of the valid pixels those that several tiles saw, that got different labels, and that no tile saw."""
    several = np.int32(0)
    differ = np.int32(0)
    none = np.int32(0)
    if valid is None:
        for x in range(seen.size):
            several += np.int32(seen[x] >= 2)
            differ += np.int32(seen[x] == 3)
            none += np.int32(seen[x] == 0)
    else:
        for x in range(seen.size):
            several += np.int32(valid[x] & (seen[x] >= 2))
            differ += np.int32(valid[x] & (seen[x] == 3))
            none += np.int32(valid[x] & (seen[x] == 0))
    return int(several), int(differ), int(none)


@njit(nogil=True, cache=True)
def finish(
    strip: Strip,
    rows: tuple[int, int],
    valid: Array | None,
    labels: Array,
    confidence: Array | None,
    probabilities: Array | None,
    scale: tuple[float, float],
) -> tuple[int, int, int]:
    """Turn the strip's first rows into rows[0]..rows[1]-1 of the block's maps.

    One pass: normalise, best class, confidence, probabilities. Returns how many valid pixels several tiles saw,
    how many of them got different labels, and how many no tile saw. valid: (rows, columns) of the block.
    """
    width, (_, classes, columns) = strip.seen.shape[1], strip.sums.shape
    factor, offset = np.float32(scale[0]), np.float32(scale[1])
    best, label = np.empty(columns, np.float32), np.empty(columns, np.int32)
    overlapped = disagreed = missed = 0
    for y in range(rows[1] - rows[0]):
        top = rows[0] + y
        planes = strip.sums[y].reshape(classes, 1, columns)
        for x in range(0, columns, LANES):
            most, winner, _ = best_of(planes, 0, x, LANES)
            store(most, best, x, LANES)
            store(winner, label, x, LANES)
        labels[top, :width] = label[:width]
        several, differ, none = _count(strip.seen[y], None if valid is None else valid[top])
        overlapped, disagreed, missed = overlapped + several, disagreed + differ, missed + none
        weights = strip.weights[y]
        if confidence is not None:
            for x in range(width):
                share = best[x] / weights[x] if weights[x] > 0 else np.float32(0)
                confidence[top, x] = np.int32(min(share, np.float32(1)) * np.float32(254) + np.float32(0.5))
        if probabilities is not None:
            for c in range(classes):
                for x in range(width):
                    share = strip.sums[y, c, x] / weights[x] if weights[x] > 0 else np.float32(0)
                    probabilities[c, top, x] = min(share, np.float32(1)) * factor + offset
    return overlapped, disagreed, missed
