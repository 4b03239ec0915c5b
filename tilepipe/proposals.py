"""Proposals: windows of any place and size, each segmented by itself, and their scores pasted into one map.

This is the inference of DeconvNet (Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation",
arXiv 1505.04366, section 5.1): candidate windows at several scales are resized to the network's
input, and their score maps, back at the windows' sizes, are joined by the pixelwise maximum or mean.

    raster  0 |---------------------------------------------|
    windows     |-----------|   |----|
                      |----------------------|        |---------|   clipped
    blocks    |----------|----------|----------|----------|          touched by windows: computed and written
                                               the others are never written

Everything is out of core: the map is made block by block; each block loads the score maps of its own windows, which
an index by blocks finds, and forgets all but the most recently used.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tilepipe.errors import InputError, UsageError
from tilepipe.window import Interval, Window

Array = NDArray[Any]
Reduce = Literal["max", "mean"]

REDUCTIONS: tuple[Reduce, ...] = ("max", "mean")
CACHE_BYTES = 256 << 20
LARGEST_RESULT = 2 << 30
"""Bytes of the map that `aggregate` makes in memory; a larger one needs `out`."""


class Indexable(Protocol):
    """Score maps by their window's number: a list, an array or zarr array of all, or whatever loads on access."""

    def __getitem__(self, index: int, /) -> Any:
        """The scores (classes, h, w) of window `index`."""


class Writable(Protocol):
    """A map (classes, rows, columns) in memory or on disk: numpy and zarr arrays."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(classes, rows, columns)."""

    @property
    def dtype(self) -> Any:
        """The type of a score."""

    def __setitem__(self, place: Any, values: Any, /) -> None:
        """Write a block."""


Maps = Indexable | Callable[[int], Any]
"""Score maps as `aggregate` takes them."""


# ---- windows ----------------------------------------------------------------------------------------------------


def propose_windows(
    shape: tuple[int, int], scales: Sequence[int | tuple[int, int]], overlap: float = 0.5
) -> list[Window]:
    """Regular windows over a raster of `shape`, at every scale, in row-major order.

    `scales` are sides, or (rows, columns), in pixels; neighbours share at least the part `overlap` of a side (0 to
    below 1). The last window of an axis is shifted back to end with the raster; one longer than the axis is centred
    on it and reaches beyond. These stand in for the 50 best edge boxes that DeconvNet takes: proposals from a
    detector can be used instead, in the same form.

    >>> [str(window) for window in propose_windows((4, 10), [(4, 6)])]
    ['rows 0:4, columns 0:6', 'rows 0:4, columns 3:9', 'rows 0:4, columns 4:10']
    """
    if min(shape) < 1:
        raise UsageError(f"a raster of {shape[0]} x {shape[1]} pixels has no windows; it needs at least 1 x 1")
    if not 0 <= overlap < 1:
        raise UsageError(f"overlap {overlap} is not legal; choose a part of a window's side from 0 to below 1")
    windows = []
    for scale in scales:
        sides = (scale, scale) if isinstance(scale, int) else scale
        if min(sides) < 1:
            raise UsageError(f"scale {scale} is not legal; give a window's side in pixels, at least 1")
        rows, cols = (_starts(length, side, overlap) for length, side in zip(shape, sides, strict=True))
        windows += [Window.of(r, r + sides[0], c, c + sides[1]) for r in rows for c in cols]
    return windows


def _starts(length: int, side: int, overlap: float) -> list[int]:
    if side >= length:
        return [(length - side) // 2]
    stride = max(1, math.floor(side * (1 - overlap)))
    return [*range(0, length - side, stride), length - side]


# ---- resizing ---------------------------------------------------------------------------------------------------


class Taps(NamedTuple):
    """Linear interpolation along one axis: output i is low[i] x (1 - weight[i]) + high[i] x weight[i]."""

    low: Array
    high: Array
    weight: Array

    @classmethod
    def of(cls, size_in: int, size: int, outputs: Interval) -> Taps:
        """Where `outputs` of an axis of `size` pixels lie in one of `size_in`.

        Pixel edges correspond, as in torch.nn.functional.interpolate without aligned corners.
        """
        source = (np.arange(outputs.start, outputs.stop) + 0.5) * (size_in / size) - 0.5
        source = np.clip(source, 0, size_in - 1)
        low = np.floor(source).astype(np.int64)
        return cls(low, np.minimum(low + 1, size_in - 1), source - low)


def resize_scores(scores: Array, shape: tuple[int, int]) -> Array:
    """Scores (classes, h, w) resized bilinearly to (classes, *shape), in their own floating-point type.

    As torch.nn.functional.interpolate, mode "bilinear", without aligned corners and without antialiasing. This is
    what `aggregate` does to a map that is not of its window's size.
    """
    scores = _floating(scores)
    out, count = np.empty((len(scores), *shape), scores.dtype), np.zeros(shape, np.int32)
    rows, cols = (Taps.of(have, size, Interval(0, size)) for have, size in zip(scores.shape[1:], shape, strict=True))
    paste(scores, rows, cols, (0, 0), out, count, True)
    return out


@njit(nogil=True, cache=True)
def paste(
    scores: Array, rows: Taps, cols: Taps, at: tuple[int, int], total: Array, count: Array, maximum: bool
) -> None:
    """Bring interpolated scores into a block: by maximum, or by sum where not `maximum`.

    scores: (classes, h, w); total: (classes, rows, columns), meaningless where count is 0; count: int32 (rows,
    columns), of the windows so far; at: the block's pixel that gets the first output. A NaN stays NaN.
    """
    for c in range(scores.shape[0]):
        for y in range(len(rows.low)):
            upper, lower, down = scores[c, rows.low[y]], scores[c, rows.high[y]], rows.weight[y]
            target, seen = total[c, at[0] + y], count[at[0] + y]
            for x in range(len(cols.low)):
                left, right, along = cols.low[x], cols.high[x], cols.weight[x]
                # A weight of 0 leaves the other pixel out: infinity times 0 is not a number.
                value = upper[left] if along == 0 else upper[left] * (1 - along) + upper[right] * along
                if down != 0:
                    below = lower[left] if along == 0 else lower[left] * (1 - along) + lower[right] * along
                    value = value * (1 - down) + below * down
                place = at[1] + x
                if seen[place] == 0:
                    target[place] = value
                elif not maximum:
                    target[place] += value
                elif value > target[place] or np.isnan(value):
                    target[place] = value
    for y in range(len(rows.low)):
        for x in range(len(cols.low)):
            count[at[0] + y, at[1] + x] += 1


# ---- aggregation ------------------------------------------------------------------------------------------------


def aggregate(
    maps: Maps,
    windows: Sequence[Window],
    shape: tuple[int, int],
    *,
    reduce: Reduce = "max",
    fill: float = math.nan,
    out: Writable | None = None,
    block: tuple[int, int] = (1024, 1024),
    cache_bytes: int = CACHE_BYTES,
) -> Any:
    """One map (classes, rows, columns) of all windows' scores: `out`, or a float32 array made in memory.

    maps: the scores (classes, h, w) of each window, floating point, as a list, anything that loads maps[i], or a
    function of i; one whose (h, w) is not its window's shape is resized bilinearly. Windows may reach beyond the
    raster of `shape`. `reduce` "max" takes each class's largest score over the windows that cover a pixel, "mean"
    the mean over these windows, summed in float64 in their order: the result does not depend on `block`.

    Pixels that no window covers get `fill` where a block is written, and blocks that no window touches are never
    written: `out`, a numpy or zarr array, has to hold `fill` before (zarr: as its fill value). Where blocks are
    multiples of the zarr chunks, each chunk is written once. Memory: one block, and `cache_bytes` of recently used
    maps, besides which a map is loaded once for each block that it touches.

    DeconvNet counts the scores outside of a window as 0, so that a negative score never wins: for its very result
    give `fill=0` and scores of at least 0. Raises UsageError for arguments, InputError for maps that do not fit.
    """
    if reduce not in REDUCTIONS:
        raise UsageError(f"reduce {reduce!r} is not known; use one of {', '.join(REDUCTIONS)}")
    if min(block) < 1:
        raise UsageError(f"blocks of {block[0]} x {block[1]} pixels are empty; use at least 1 x 1")
    loader = _Loader(maps, len(windows), cache_bytes)
    out = _empty(loader, shape, fill) if out is None else out
    if tuple(out.shape[1:]) != tuple(shape) or len(out.shape) != 3:
        raise UsageError(f"out is {tuple(out.shape)}; the map needs (classes, {shape[0]}, {shape[1]})")
    for place, touching in _touched(windows, shape, block):
        values = _block(loader, [(each, windows[each]) for each in touching], place, out.shape[0], (reduce, fill))
        out[:, place.rows.start : place.rows.stop, place.cols.start : place.cols.stop] = values.astype(out.dtype)
    return out


def _touched(
    windows: Sequence[Window], shape: tuple[int, int], block: tuple[int, int]
) -> Iterator[tuple[Window, list[int]]]:
    """The blocks that windows touch, in row-major order, and the numbers of these windows, ascending."""
    index: dict[tuple[int, int], list[int]] = {}
    for number, window in enumerate(windows):
        inside = window.clip(shape)
        if inside.area == 0:
            continue
        for row in range(inside.rows.start // block[0], (inside.rows.stop - 1) // block[0] + 1):
            for col in range(inside.cols.start // block[1], (inside.cols.stop - 1) // block[1] + 1):
                index.setdefault((row, col), []).append(number)
    for (row, col), touching in sorted(index.items()):
        place = Window.of(row * block[0], (row + 1) * block[0], col * block[1], (col + 1) * block[1])
        yield place.clip(shape), touching


def _block(
    loader: _Loader, touching: Sequence[tuple[int, Window]], place: Window, classes: int, how: tuple[Reduce, float]
) -> Array:
    """The scores (classes, rows, columns) of one block of the map."""
    reduce, fill = how
    total = np.zeros((classes, *place.shape), np.float64 if reduce == "mean" else np.float32)
    count = np.zeros(place.shape, np.int32)
    for number, window in touching:
        scores = loader.load(number)
        if len(scores) != classes:
            raise InputError(f"the scores of window {number} have {len(scores)} classes; the map has {classes}")
        part = window.intersect(place)
        rows, cols = (
            Taps.of(have, len(whole), piece.shift(-whole.start))
            for have, whole, piece in zip(
                scores.shape[1:], (window.rows, window.cols), (part.rows, part.cols), strict=True
            )
        )
        at = part.rows.start - place.rows.start, part.cols.start - place.cols.start
        paste(scores, rows, cols, at, total, count, reduce == "max")
    if reduce == "mean":
        total /= np.maximum(count, 1)
    total[:, count == 0] = fill
    return total


@dataclass(slots=True)
class _Loader:
    """Loads score maps, and keeps the most recently used ones within a number of bytes."""

    maps: Maps
    count: int
    limit: int
    kept: OrderedDict[int, Array] = field(default_factory=OrderedDict)
    held: int = 0

    def load(self, number: int) -> Array:
        """The scores (classes, h, w) of window `number`."""
        if number in self.kept:
            self.kept.move_to_end(number)
            return self.kept[number]
        scores = _floating(np.asarray(self.maps(number) if callable(self.maps) else self.maps[number]), number)
        self.kept[number] = scores
        self.held += scores.nbytes
        while self.held > self.limit and len(self.kept) > 1:
            self.held -= self.kept.popitem(last=False)[1].nbytes
        return scores


def _floating(scores: Array, number: int | None = None) -> Array:
    """Contiguous scores (classes, h, w) in float32 or float64; InputError where they are no such map."""
    if scores.ndim != 3 or min(scores.shape) < 1 or scores.dtype.kind not in "fiu":
        name = "scores" if number is None else f"the scores of window {number}"
        raise InputError(f"{name} are {scores.dtype} of shape {scores.shape}; give numbers (classes, h, w)")
    return np.ascontiguousarray(scores, np.float64 if scores.dtype == np.float64 else np.float32)


def _empty(loader: _Loader, shape: tuple[int, int], fill: float) -> Array:
    if loader.count == 0:
        raise UsageError("without windows the number of classes is not known; give out, an array of the result's shape")
    full = (len(loader.load(0)), *shape)
    if 4 * math.prod(full) > LARGEST_RESULT:
        raise UsageError(
            f"a map of {full} scores takes {4 * math.prod(full) >> 20} MiB; give out, such as a zarr array"
        )
    return np.full(full, fill, np.float32)
