"""Arrays reduced to the cells of a picture: labels by majority, numbers by mean, of what each cell covers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tilepipe.store.status import label_counts

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of an array, between pixels where it has to be."""

MANY = 64
"""Classes in one picture above which a cell shows the class in its middle."""

EQUAL = 1e-4
"""Shares of a cell that differ by less are the same; a cell covers at most some tens of pixels."""

STRIP = 128
"""Rows of cells that are reduced at once."""


class Part(NamedTuple):
    """Pixels that were read, and what of them is shown."""

    values: NDArray[Any]
    """(rows, columns), or (channels, rows, columns)."""
    box: Box


def majority(part: Part, shape: tuple[int, int], nodata: int) -> NDArray[Any]:
    """(rows, columns) of `shape`: the label that covers most of each cell, the lowest of several.

    As in a store's overviews, a cell is `nodata` only where nothing else lies in it.

    >>> labels = np.array([[0, 1, 1, 255], [2, 1, 255, 255]], np.uint8)
    >>> majority(Part(labels, (0, 0, 4, 2)), (1, 2), 255).tolist()
    [[1, 1]]
    """
    present = [label for label, count in enumerate(label_counts(part.values)) if count and label != nodata]
    if len(present) > MANY or part.values.shape == shape:
        return middle(part, shape)
    found = np.full(shape, nodata, part.values.dtype)
    for rows, strip in _strips(part, shape):
        most = np.zeros((len(found[rows]), shape[1]), np.float32)
        for label in present:
            covered = _mean((strip.values == label).astype(np.float32), strip.box, most.shape)
            # Shares are sums of weights that are rounded: those of a tie may differ in the last bits.
            more = covered > most + EQUAL
            found[rows][more] = label
            most[more] = covered[more]
    return found


def middle(part: Part, shape: tuple[int, int]) -> NDArray[Any]:
    """(..., rows, columns) of `shape`: the value in the middle of each cell."""
    left, top, right, bottom = part.box
    rows = _middles(top, bottom, shape[0], part.values.shape[-2])
    cols = _middles(left, right, shape[1], part.values.shape[-1])
    return part.values[..., rows[:, None], cols[None, :]]


def mean(part: Part, shape: tuple[int, int], nodata: float) -> NDArray[Any]:
    """(..., rows, columns) of `shape`: each cell's mean over what is neither `nodata` nor NaN, in the values' dtype.

    Integers are rounded; a cell with nothing to average is `nodata`.
    """
    values = part.values
    if values.shape[-2:] == shape:
        return middle(part, shape)
    if values.ndim == 3:
        return np.stack([mean(Part(layer, part.box), shape, nodata) for layer in values])
    found = np.full(shape, nodata, values.dtype)
    for rows, strip in _strips(part, shape):
        size = found[rows].shape[0], shape[1]
        known = (strip.values != nodata) & ~np.isnan(strip.values)
        weight = _mean(known.astype(np.float32), strip.box, size)
        total = _mean(np.where(known, strip.values, 0).astype(np.float32), strip.box, size)
        some = weight > EQUAL
        means = total[some] / weight[some]
        found[rows][some] = np.rint(means) if values.dtype.kind in "iu" else means
    return found


def _strips(part: Part, shape: tuple[int, int]) -> Iterator[tuple[slice, Part]]:
    """Some rows of cells after the other, each with what it covers: little is held at once as numbers."""
    left, top, right, bottom = part.box
    scale = (bottom - top) / shape[0]
    for first in range(0, shape[0], STRIP):
        last = min(first + STRIP, shape[0])
        start, stop = top + first * scale, top + last * scale
        row, end = int(start), min(math.ceil(stop), part.values.shape[0])
        yield slice(first, last), Part(part.values[row:end], (left, start - row, right, min(stop, end) - row))


def _mean(values: NDArray[np.float32], box: Box, shape: tuple[int, int]) -> NDArray[np.float32]:
    rows, cols = shape
    reduced = Image.fromarray(values).resize((cols, rows), Image.Resampling.BOX, box=box)
    return np.asarray(reduced)


def _middles(start: float, stop: float, count: int, length: int) -> NDArray[np.intp]:
    at = start + (np.arange(count) + 0.5) * (stop - start) / count
    return np.clip(at.astype(np.intp), 0, length - 1)
