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
from tilepipe.predict.lanes import LANES, cast, store, zeros
from tilepipe.predict.softmax import SEGMENT, best_of, count_undefined, segment_of, softmax
from tilepipe.predict.transpose import planes_of
from tilepipe.window import Placement

Array = NDArray[Any]

CONFIDENCE_STEPS = 254
"""A probability p is stored as round(p * 254) in uint8; 255 stays free for nodata."""


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


@njit(nogil=True, inline="always")
def _label(planes: Array, row: int, col: int, count: int, out: Array, to: int) -> Any:
    _, label, total = best_of(planes, row, col, count)
    store(cast(label, out.dtype.type), out, to, count)
    return total - total  # 0, or NaN where a score is not finite


@njit(nogil=True, cache=True)
def label_pixels(scores: Array, last: bool, patch: Patch, valid: Array | None, labels: Array) -> int:
    """Write the best class of each pixel into `labels`; the number of undefined pixels.

    last: whether scores are (h, w, classes); labels and valid: (rows, columns) of the block.
    """
    classes = scores.shape[2] if last else scores.shape[0]
    raw, doubts = np.empty((classes, 1, SEGMENT), scores.dtype), np.empty(LANES, scores.dtype)
    undefined = 0
    for y in range(patch.height):
        top, from_row = patch.to_row + y, patch.row + y
        for start in range(0, patch.width, SEGMENT):
            n, first, left = min(SEGMENT, patch.width - start), patch.col + start, patch.to_col + start
            planes, row, col = scores, from_row, first
            if last:
                planes_of(scores[from_row, first : first + n], raw.reshape(classes, SEGMENT))
                planes, row, col = raw, 0, 0
            doubt, whole = zeros(scores.dtype.type), n // LANES * LANES
            for x in range(0, whole, LANES):
                doubt = doubt + _label(planes, row, col + x, LANES, labels[top], left + x)
            if whole < n:
                doubt = doubt + _label(planes, row, col + whole, n - whole, labels[top], left + whole)
            store(doubt, doubts, 0, LANES)
            if doubts.sum() != 0:
                for x in range(n):
                    pixel = scores[from_row, first + x] if last else scores[:, from_row, first + x]
                    undefined += (valid is None or valid[top, left + x]) and _undefined(pixel)
    return undefined


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
    _, powers, sums, label = segment
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
