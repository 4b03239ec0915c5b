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


def cells(values: NDArray[Any], factor: int) -> list[list[NDArray[Any]]]:
    """The pixels of each cell of `factor` x `factor`, those at the ends cut short."""
    rows, cols = (range(0, side, factor) for side in values.shape)
    return [[values[r : r + factor, c : c + factor].ravel() for c in cols] for r in rows]


def most_frequent(labels: NDArray[Any], factor: int, nodata: int) -> NDArray[Any]:
    """Each cell's most frequent label, the lowest of several; nodata where it has no other."""

    def of(cell: NDArray[Any]) -> int:
        found, counts = np.unique(cell[cell != nodata], return_counts=True)
        return int(found[counts.argmax()]) if found.size else nodata

    return np.array([[of(cell) for cell in row] for row in cells(labels, factor)], labels.dtype)


def mean(values: NDArray[Any], factor: int, fill: float) -> NDArray[Any]:
    """Each cell's mean over the pixels that do not hold `fill` or NaN, rounded halves up where they are integers."""

    def of(cell: NDArray[Any]) -> float:
        cell = cell[(cell != fill) & ~np.isnan(cell)].astype(np.float64)
        return cell.mean() if cell.size else fill

    means = np.array([[of(cell) for cell in row] for row in cells(values, factor)])
    if values.dtype.kind == "u":
        means = np.floor(means + 0.5)
    return means.astype(values.dtype)
