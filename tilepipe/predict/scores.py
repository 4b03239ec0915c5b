"""CPU kernels between pixels and scores: normalising a tile, and turning its scores into maps.

Scores are one tile's, of shape (classes, h, w) ("planar") or (h, w, classes) ("channels last"), float32 or
float64, C-contiguous. A `Patch` says which rectangle of a tile is used and where it goes in the block:

    scores                      block's maps
    +---------------+           +-------------------+
    |  +-------+    |           |                   |
    |  | patch |----|---------->|  (to_row, to_col) |
    |  +-------+    |           |                   |
    +---------------+           +-------------------+

Every kernel releases the GIL, uses one thread, and does the same floating-point operations for a pixel wherever
the pixel lies, so results do not depend on how a raster is cut. The lowest class wins a tie. A pixel is
*undefined* when one of its scores is NaN or its best score is infinite; kernels count the undefined pixels that
are valid, so that callers can refuse them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tilepipe.errors import ModelError, UsageError
from tilepipe.predict.prefetch import prefetch
from tilepipe.predict.transpose import planes_of
from tilepipe.window import Placement

Array = NDArray[Any]

CONFIDENCE_STEPS = 254
"""A probability p is stored as round(p * 254) in uint8; 255 stays free for nodata."""

SEGMENT = 256
"""Pixels handled together: few enough that classes x 256 scores stay in the nearest caches."""


def label_dtype(classes: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds the labels 0..classes-1 and a nodata value: uint8 or uint16."""
    if not 1 <= classes <= 65535:
        raise UsageError(f"{classes} classes cannot be labelled; 1 to 65535 can")
    return np.dtype(np.uint8 if classes <= 255 else np.uint16)


def label_nodata(classes: int) -> int:
    """The label of pixels without data: 255, or 65535 above 255 classes."""
    return int(np.iinfo(label_dtype(classes)).max)


def statistics_of(mean: Sequence[float], std: Sequence[float], precision: str) -> tuple[Array, Array]:
    """(mean, std) per band, in the precision of normalising: float64 for "float64", else float32."""
    if len(mean) != len(std) or not all(map(math.isfinite, [*mean, *std])) or min(std, default=0.0) <= 0:
        raise ModelError(f"mean {list(mean)} and std {list(std)} do not serve: one finite pair a band, std above 0")
    dtype = np.float64 if precision == "float64" else np.float32
    return np.array(mean, dtype), np.array(std, dtype)


def normalised(
    values: Array, valid: Array | None, mean: Sequence[float], std: Sequence[float], precision: str
) -> Array:
    """A network's input for pixels (bands, H, W), of their shape in float32 or float64: tiles are cut from it."""
    statistics = statistics_of(mean, std, precision)
    out = np.empty(values.shape, statistics[0].dtype)
    normalise(np.ascontiguousarray(values), valid, (0, 0), *statistics, out)
    return out


class Patch(NamedTuple):
    """A rectangle of a tile's scores and its place in a block's maps, in pixels."""

    row: int
    col: int
    to_row: int
    to_col: int
    height: int
    width: int

    @classmethod
    def of(cls, placement: Placement, origin: tuple[int, int] = (0, 0)) -> Patch:
        """The patch of a placement's crop and target, in scores whose first lies at `origin` of the tile's output."""
        crop = placement.crop.shift(-origin[0], -origin[1])
        return cls(*crop.origin, *placement.target.origin, *crop.shape)


@njit(nogil=True, cache=True)
def normalise(values: Array, valid: Array | None, origin: tuple[int, int], mean: Array, std: Array, out: Array) -> None:
    """Fill `out` (bands, h, w) with (values - mean) / std in out's precision, and 0 where valid is False.

    values: (bands, H, W) of any numeric type, C-contiguous; valid: (H, W) bool or None; origin: where out's first
    pixel lies in them; mean and std: one per band, of out's type.
    """
    bands, height, width = out.shape
    row, col = origin
    for b in range(bands):
        m, d = mean[b], std[b]
        for y in range(height):
            source = values[b, row + y, col : col + width]
            target = out[b, y]
            for x in range(width):
                target[x] = (out.dtype.type(source[x]) - m) / d
            if valid is not None:
                mask = valid[row + y, col : col + width]
                for x in range(width):
                    target[x] = target[x] if mask[x] else out.dtype.type(0)


@njit(nogil=True, cache=True)
def normalise_last(
    values: Array, valid: Array | None, origin: tuple[int, int], mean: Array, std: Array, out: Array
) -> None:
    """Fill `out` (h, w, bands) as `normalise` does."""
    height, width, bands = out.shape
    row, col = origin
    for y in range(height):
        target = out[y]
        for b in range(bands):
            m, d = mean[b], std[b]
            source = values[b, row + y, col : col + width]
            for x in range(width):
                target[x, b] = (out.dtype.type(source[x]) - m) / d
        if valid is not None:
            mask = valid[row + y, col : col + width]
            for x in range(width):
                if not mask[x]:
                    for b in range(bands):
                        target[x, b] = out.dtype.type(0)


@njit(nogil=True, cache=True)
def _undefined(scores: Array) -> bool:
    best = scores[0]
    for c in range(scores.size):
        if scores[c] != scores[c]:
            return True
        best = scores[c] if scores[c] > best else best
    return not np.isfinite(best)


@njit(nogil=True, cache=True)
def best_of(scores: Array, at: tuple[int, int], best: Array, label: Array, total: Array | None = None) -> None:
    """Fill in, for each pixel, the best of its scores, the class of that (int32), and the sum of all.

    scores: (classes, h, w), C-contiguous; the pixels are those from `at` (row, column) on, as many as `best` holds.
    """
    one, two, three, zero = np.int32(1), np.int32(2), np.int32(3), np.int32(0)
    classes, (row, col), n = scores.shape[0], at, best.size
    end = col + n
    best[:] = scores[0, row, col:end]
    label[:] = 0
    if total is not None:
        total[:] = best
    c = 1
    # Four classes at a time: the best so far is loaded and stored a quarter as often, and four lines come from
    # memory side by side. Each comparison has a name: of two choices that compare anew the compiler makes a jump.
    while c + 4 <= classes:
        s0, s1 = scores[c, row, col:end], scores[c + 1, row, col:end]
        s2, s3 = scores[c + 2, row, col:end], scores[c + 3, row, col:end]
        base = np.int32(c)
        for x in range(n):
            v0, v1, v2, v3, most = s0[x], s1[x], s2[x], s3[x], best[x]
            second, fourth = v1 > v0, v3 > v2
            left, left_class = v1 if second else v0, one if second else zero
            right, right_class = v3 if fourth else v2, three if fourth else two
            on_right = right > left
            four, four_class = right if on_right else left, right_class if on_right else left_class
            better = four > most
            label[x] = base + four_class if better else label[x]
            best[x] = four if better else most
            if total is not None:
                total[x] += (v0 + v1) + (v2 + v3)
        c += 4
    while c < classes:
        line, base = scores[c, row, col:end], np.int32(c)
        for x in range(n):
            v, most = line[x], best[x]
            better = v > most
            label[x] = base if better else label[x]
            best[x] = v if better else most
            if total is not None:
                total[x] += v
        c += 1


@njit(nogil=True, cache=True)
def label_pixels(scores: Array, last: bool, patch: Patch, valid: Array | None, labels: Array) -> int:
    """Write the best class of each pixel into `labels`; the number of undefined pixels.

    last: whether scores are (h, w, classes); labels and valid: (rows, columns) of the block.
    """
    most = min(SEGMENT, patch.width) if last else patch.width
    raw = np.empty((scores.shape[2] if last else 1, most), scores.dtype)
    best, total = np.empty(most, scores.dtype), np.empty(most, scores.dtype)  # total: not finite where a score is not
    found = np.empty(most, np.int32)
    undefined = 0
    for y in range(patch.height):
        row, top = patch.row + y, patch.to_row + y
        for start in range(0, patch.width, most):
            n, first, left = min(most, patch.width - start), patch.col + start, patch.to_col + start
            if last:
                planes_of(scores[row, first : first + n], raw)
                best_of(raw.reshape(-1, 1, most), (0, 0), best[:n], found[:n], total[:n])
            else:
                best_of(scores, (row, first), best[:n], found[:n], total[:n])
            out = labels[top, left : left + n]
            suspect = np.int32(0)
            for x in range(n):
                out[x] = found[x]
                suspect += np.int32(total[x] - total[x] != 0)
            if suspect:
                for x in range(n):
                    pixel = scores[row, first + x] if last else scores[:, row, first + x]
                    undefined += (valid is None or valid[top, left + x]) and _undefined(pixel)
    return undefined


# --- probabilities --------------------------------------------------------------------------------------------


FUSED = {"contract"}
"""The one liberty that the compiler has: a product and the sum that follows are rounded once."""

_LOG2E = np.float32(1.44269504)
_LN2, _LN2_REST = np.float32(0.693359375), np.float32(-2.12194440e-4)
"""ln 2, in two parts of which the first has so few bits that its products with small integers are exact."""
_ROUND = np.float32(1.5 * 2**23)
"""Added and taken away again, it leaves the nearest integer; its sum's bits end with that integer's."""
_C2, _C3, _C4 = np.float32(0.49999994), np.float32(0.166665211), np.float32(0.041668389)
_C5, _C6 = np.float32(0.00836871006), np.float32(0.00138146128)
"""e**r = 1 + r + _C2 r**2 + ... within 1e-8 for |r| <= ln(2) / 2: fitted for the least relative error."""


@njit(nogil=True, cache=True, inline="always", fastmath=FUSED)
def exp_negative(x: Any) -> Any:
    """e**x for x <= 0 in float32, within 2 units in the last place; below -87 as at -87; NaN of NaN.

    Cody and Waite's reduction, then a polynomial: plain arithmetic, which the compiler vectorises. Where FUSED, loops
    that must round alike in every lane take a constant number of steps, a multiple of 32, so that none is left over.
    """
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    shifted = x * _LOG2E + _ROUND
    n = shifted - _ROUND
    r = x - n * _LN2 - n * _LN2_REST
    p = _C6
    p = p * r + _C5
    p = p * r + _C4
    p = p * r + _C3
    p = p * r + _C2
    p = p * r * r + r + np.float32(1)
    exponent = np.int32(np.float32(shifted).view(np.int32) << np.int32(23)) + np.int32(0x3F800000)
    return p * np.int32(exponent).view(np.float32)


class Segment(NamedTuple):
    """What is worked out for SEGMENT pixels of a row, one element per pixel."""

    raw: Array
    """Scores as the network gave them, (classes, SEGMENT)."""
    powers: Array
    """Exponentials of the scores less the best one, (classes, SEGMENT) float32."""
    best: Array
    """Best score."""
    sums: Array
    """The exponentials' sum, float32; NaN for an undefined pixel."""
    labels: Array
    """Best class, int32."""


@njit(nogil=True, cache=True)
def segment_of(scores: Array, classes: int) -> Segment:
    """A segment for scores of this type; what has not been filled is 0."""
    # Arrays of their own, not rows of one: the compiler vectorises only what it can tell apart.
    return Segment(
        np.zeros((classes, SEGMENT), scores.dtype),
        np.zeros((classes, SEGMENT), np.float32),
        np.zeros(SEGMENT, scores.dtype),
        np.zeros(SEGMENT, np.float32),
        np.zeros(SEGMENT, np.int32),
    )


@njit(nogil=True, cache=True, fastmath=FUSED)
def softmax(scores: Array, last: bool, at: tuple[int, int], n: int, segment: Segment, soon: Array | None = None) -> int:
    """Fill `segment` for the n pixels of a tile's row from `at` (row, column) on; how many of them are undefined.

    last: whether scores are (h, w, classes). What lies behind the n pixels is computed, too, from what was there.
    soon: (classes, pixels) that the caller reads next, fetched meanwhile.
    """
    raw, powers, best, sums, labels = segment
    (row, col), classes = at, raw.shape[0]
    if last:
        planes_of(scores[row, col : col + n], raw)
    else:
        for c in range(classes):
            line, source = raw[c], scores[c, row, col : col + n]
            for x in range(n):
                line[x] = source[x]
    best_of(raw.reshape(classes, 1, SEGMENT), (0, 0), best, labels)
    sums[:] = 0
    for c in range(classes):
        # Memory is slower than arithmetic: what this segment's caller and the next segment read comes in meanwhile.
        if soon is not None:
            prefetch(soon[c])
        if last:
            ahead = (col + n) * classes + c * SEGMENT
            prefetch(scores[row].reshape(-1)[ahead : ahead + SEGMENT])
        else:
            prefetch(scores[c, row, col + n : col + n + SEGMENT])
        line, power = raw[c], powers[c]
        for x in range(SEGMENT):
            e = exp_negative(np.float32(line[x] - best[x]))
            power[x] = e
            sums[x] += e
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


@njit(nogil=True, cache=True)
def score_maps(
    scores: Array,
    last: bool,
    patch: Patch,
    valid: Array | None,
    labels: Array,
    confidence: Array | None,
    probabilities: Array | None,
    scale: tuple[float, float],
) -> int:
    """Write a patch's best classes, their and all classes' probabilities (softmax); the undefined pixels' number.

    labels, confidence (uint8), probabilities (classes first): the block's. scale: (factor, offset) by which
    probabilities are stored: (254, 0.5) for uint8, (1, 0) for float32.
    """
    classes = scores.shape[2] if last else scores.shape[0]
    factor, offset = np.float32(scale[0]), np.float32(scale[1])
    segment = segment_of(scores, classes)
    _, powers, _, sums, label = segment
    undefined = 0
    for y in range(patch.height):
        top, row = patch.to_row + y, patch.row + y
        for start in range(0, patch.width, SEGMENT):
            n = min(SEGMENT, patch.width - start)
            left = patch.to_col + start
            if softmax(scores, last, (row, patch.col + start), n, segment):
                undefined += count_undefined(sums, n, valid, (top, left))
            out = labels[top, left : left + n]
            for x in range(n):
                out[x] = label[x]
            for x in range(n):
                sums[x] = np.float32(1) / sums[x]
            if confidence is not None:
                sure = confidence[top, left : left + n]
                for x in range(n):
                    sure[x] = np.int32(sums[x] * np.float32(254) + np.float32(0.5))
            if probabilities is not None:
                for c in range(classes):
                    share, power = probabilities[c, top, left : left + n], powers[c]
                    for x in range(n):
                        share[x] = power[x] * sums[x] * factor + offset
    return undefined
