"""Overviews for the tests: small ones, and by brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.store.output import create_or_resume, open_store
from tilepipe.store.overviews import write_overviews
from tilepipe.store.pyramid import Pyramid

LEVELS = {"smallest": 4, "square": 32, "chunk": 8}
"""Levels of a small map: of 50 x 70 five, two in shards of a square's size, three of joined ones."""


def add(path: Any, **how: int) -> Pyramid:
    """The overviews that a store now has: LEVELS, with changes."""
    spec = open_store(path).spec
    pyramid = Pyramid.of(spec, **{**LEVELS, **how})
    with create_or_resume(path, spec) as store:
        write_overviews(store, pyramid)
    return pyramid


def cell_sums(values: NDArray[Any], factor: int) -> NDArray[Any]:
    """The sum over each cell of `factor` x `factor`, those at the ends cut short."""
    rows, cols = (np.arange(0, side, factor) for side in values.shape)
    return np.add.reduceat(np.add.reduceat(values, rows, axis=0), cols, axis=1)


def most_frequent(labels: NDArray[Any], factor: int, nodata: int) -> NDArray[Any]:
    """Each cell's most frequent label, the lowest of several; nodata where it has no other."""
    present = np.setdiff1d(labels, [nodata])
    if not present.size:
        return np.full_like(cell_sums(labels, factor), nodata, labels.dtype)
    counts = np.stack([cell_sums((labels == label).astype(np.int64), factor) for label in present])
    return np.where(counts.max(axis=0) > 0, present[counts.argmax(axis=0)], nodata).astype(labels.dtype)


def mean(values: NDArray[Any], factor: int, fill: float) -> NDArray[Any]:
    """Each cell's mean over the pixels that do not hold `fill` or NaN, rounded halves up where they are integers."""
    counted = (values != fill) & ~np.isnan(values)
    counts = cell_sums(counted.astype(np.int64), factor)
    sums = cell_sums(np.where(counted, values, 0).astype(np.float64), factor)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), fill)
    if values.dtype.kind == "u":
        means = np.floor(means + 0.5)
    return means.astype(values.dtype)
