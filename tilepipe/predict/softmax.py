"""CPU kernels that find, for some pixels of a row, the best of their scores, and the exponentials of all (softmax).

Scores are planes, (classes, h, w), C-contiguous, of float32 or float64. Every pixel is computed alike, wherever it
lies. Arrays that hold something for each pixel of a row are written a vector at a time (`tilepipe.predict.lanes`), so
they have room for more pixels than are asked for: up to the next multiple of LANES. What is there is of no pixel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tilepipe.predict.lanes import LANES, cast, exponent, like, load, muladd, store, where, zeros
from tilepipe.predict.prefetch import prefetch
from tilepipe.predict.transpose import planes_of

Array = NDArray[Any]

SEGMENT = 256
"""Pixels handled together: few enough that classes x 256 scores stay in the nearest caches. A multiple of LANES."""

_LEAST = np.float32(-87)
_LOG2E = np.float32(1.44269504)
_LN2, _LN2_REST = np.float32(0.693359375), np.float32(-2.12194440e-4)
"""ln 2, in two parts of which the first has so few bits that its products with small integers are exact."""
_ROUND = np.float32(1.5 * 2**23 + 127)
"""Added and taken away again, it leaves the nearest integer; its sum's bits end with that integer's and 127: those of
a float32's exponent."""
_C1, _C2, _C3 = np.float32(0.9999997), np.float32(0.4999915), np.float32(0.16667636)
_C4, _C5 = np.float32(0.04189793), np.float32(0.008290315)
"""e**r = 1 + _C1 r + _C2 r**2 + ... within 1e-7 for |r| <= ln(2) / 2: fitted for the least relative error."""


@njit(nogil=True, inline="always")
def _exponential(x: Any) -> Any:
    # e**x of a vector of float32 that are at most 0, by Cody and Waite's reduction and a polynomial.
    least, shift = like(x, _LEAST), like(x, _ROUND)
    x = where(least > x, least, x)
    shifted = muladd(x, like(x, _LOG2E), shift)
    n = shifted - shift
    r = muladd(n, like(x, -_LN2_REST), muladd(n, like(x, -_LN2), x))
    p = muladd(like(x, _C5), r, like(x, _C4))
    p = muladd(p, r, like(x, _C3))
    p = muladd(p, r, like(x, _C2))
    p = muladd(p, r, like(x, _C1))
    p = muladd(p, r, like(x, 1))
    return p * exponent(shifted)


@njit(nogil=True, cache=True)
def exponentials(values: Array) -> None:
    """Turn each x <= 0 of a line of float32 into e**x, within 2e-7 of its size; below -87 as at -87; NaN stays NaN."""
    whole = values.size // LANES * LANES
    for x in range(0, whole, LANES):
        store(_exponential(load(values, x, LANES)), values, x, LANES)
    rest = values.size - whole
    store(_exponential(load(values, whole, rest)), values, whole, rest)


@njit(nogil=True, inline="always")
def best_of(planes: Array, row: int, col: int, count: int) -> Any:
    """Vectors of `count` pixels' best score, of its class (int32; the lowest wins a tie), and of their scores' sum.

    planes: (classes, h, w), of which the pixels from (row, col) on are taken, at most LANES. The sum is not finite
    where a score is not.
    """
    best = load(planes[0, row], col, count)
    total, label = best, zeros(np.int32)
    one, number = like(label, 1), label
    for c in range(1, planes.shape[0]):
        number = number + one
        score = load(planes[c, row], col, count)
        better = score > best
        best, label, total = where(better, score, best), where(better, number, label), total + score
    return best, label, total


class Segment(NamedTuple):
    """What is worked out for SEGMENT pixels of a row, one element per pixel."""

    raw: Array
    """Scores as the network gave them, (classes, 1, SEGMENT)."""
    powers: Array
    """Exponentials of the scores less the best one, (classes, SEGMENT) float32."""
    sums: Array
    """The exponentials' sum, float32; NaN for an undefined pixel."""
    labels: Array
    """Best class, int32."""


@njit(nogil=True, cache=True)
def segment_of(scores: Array, classes: int) -> Segment:
    """A segment for scores of this type."""
    return Segment(
        np.empty((classes, 1, SEGMENT), scores.dtype),
        np.empty((classes, SEGMENT), np.float32),
        np.empty(SEGMENT, np.float32),
        np.empty(SEGMENT, np.int32),
    )


@njit(nogil=True, inline="always")
def _powers(planes: Array, row: int, col: int, count: int, to: int, segment: Segment) -> None:
    # Fill a segment from `to` on for `count` pixels.
    _, powers, sums, labels = segment
    best, label, _ = best_of(planes, row, col, count)
    store(label, labels, to, LANES)
    total = zeros(np.float32)
    for c in range(planes.shape[0]):
        power = _exponential(cast(load(planes[c, row], col, count) - best, np.float32))
        store(power, powers[c], to, LANES)
        total = total + power
    store(total, sums, to, LANES)


@njit(nogil=True, cache=True)
def softmax(scores: Array, last: bool, at: tuple[int, int], n: int, segment: Segment, soon: Array | None = None) -> int:
    """Fill `segment` for the n pixels of a tile's row from `at` (row, column) on; how many of them are undefined.

    last: whether scores are (h, w, classes). soon: (classes, pixels) that the caller reads next, fetched meanwhile.
    """
    row, col = at
    sums, classes = segment.sums, segment.powers.shape[0]
    planes = segment.raw if last else scores
    if last:
        planes_of(scores[row, col : col + n], segment.raw.reshape(classes, SEGMENT))
        line, row, col, ahead = scores[row].reshape(-1), 0, 0, (col + n) * classes
    else:
        line, ahead = scores[0, row], 0
    whole = n // LANES * LANES
    for x in range(0, whole, LANES):
        # Memory is slower than arithmetic: what this segment's caller and the next segment read comes in meanwhile.
        for c in range(classes):
            if soon is not None:
                prefetch(soon[c], x)
            if last:
                prefetch(line, ahead + x * classes + c * LANES)
            else:
                prefetch(scores[c, row], col + n + x)
        _powers(planes, row, col + x, LANES, x, segment)
    if whole < n:
        _powers(planes, row, col + whole, n - whole, whole, segment)
    undefined = np.int32(0)
    for x in range(n):
        undefined += np.int32(sums[x] != sums[x])
    return int(undefined)


@njit(nogil=True, cache=True)
def count_undefined(sums: Array, n: int, valid: Array | None, at: tuple[int, int]) -> int:
    """The number of undefined pixels of a segment that are valid; `at`: its place (row, column) in `valid`."""
    count = 0
    for x in range(n):
        seen = valid is None or valid[at[0], at[1] + x]
        count += seen and sums[x] != sums[x]
    return count
