"""A store's arrays as the cells of a picture: from its overviews, or from some of its pixels where it has none.

    window of the map --coarsest overview with at least a pixel a cell--> Part --majority or mean--> cells

So little more is read than is shown, however large the map is. Without overviews every n-th pixel is read, block
by block, with two to four samples a cell and side.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from tilepipe.errors import ReadError
from tilepipe.pictures.cells import Part, majority, mean
from tilepipe.pictures.view import View
from tilepipe.store.output import OutputStore
from tilepipe.store.overviews import overview_factors
from tilepipe.window import Window

SHOWN = 3
"""Channels of values that are shown."""


class StoredMap:
    """What a store holds, as cells of any view; what is not done counts as nodata."""

    def __init__(self, store: OutputStore) -> None:
        self.store, self.spec = store, store.spec
        records = list(store.records())
        self.done = len(records)
        self.factors = overview_factors(store, records)
        """Of the overviews that fit the map as it is now: 2, 4, ...; none in an unfinished store."""
        self._filled = [
            (record.row, record.col)
            for record in records
            if record.nodata < self.spec.block_window((record.row, record.col)).area
        ]

    @property
    def whole(self) -> bool:
        """Whether every block is done."""
        return self.done == self.store.blocks

    def sampled(self, view: View) -> bool:
        """Whether a view shows some pixels only, for want of overviews."""
        return self._scale(view)[1] > 1

    def labels(self, view: View) -> NDArray[Any]:
        """(rows, columns) of the view's cells: each one's most frequent label."""
        return majority(self._part("labels", view), view.shape, self.spec.nodata)

    def confidence(self, view: View) -> NDArray[np.uint8]:
        """(rows, columns) of the view's cells: the mean probability times 254, 255 without data."""
        return mean(self._part("confidence", view), view.shape, 255)

    def values(self, view: View) -> NDArray[Any]:
        """(channels, rows, columns) of the view's cells: means, NaN without data; the first channels only."""
        return mean(self._part("values", view), view.shape, math.nan)

    def _scale(self, view: View) -> tuple[int, int]:
        """(factor of the overview, 1 for the map itself; every how many pixels of it are read)."""
        factor = max(each for each in (1, *self.factors) if each <= view.ratio)
        if self.factors:
            return factor, 1
        return 1, 1 << max(0, math.floor(math.log2(view.ratio)) - 1)

    def _part(self, name: str, view: View) -> Part:
        """What is read of an array for a view."""
        factor, step = self._scale(view)
        side = factor * step
        rows, cols = (-(-length // side) for length in self.spec.shape)
        window = view.window
        hull = Window.of(
            window.rows.start // side,
            min(-(-window.rows.stop // side), rows),
            window.cols.start // side,
            min(-(-window.cols.stop // side), cols),
        )
        top, left = hull.origin
        box = (
            window.cols.start / side - left,
            window.rows.start / side - top,
            min(window.cols.stop / side - left, len(hull.cols)),
            min(window.rows.stop / side - top, len(hull.rows)),
        )
        array = self.store.array(name, factor)
        values = self._read(array, hull, 1) if factor > 1 else self._samples(array, hull, step)
        return Part(values, box)

    def _samples(self, array: zarr.Array[Any], hull: Window, step: int) -> NDArray[Any]:
        """Every `step`-th pixel of the blocks that are done and hold data; `hull` counts them."""
        layers = () if array.ndim == 2 else (min(array.shape[0], SHOWN),)
        found = np.full((*layers, *hull.shape), array.fill_value, array.dtype)
        for index in self._filled:
            block = self.spec.block_window(index)
            # The samples that lie in the block.
            edges = (block.rows.start, block.rows.stop, block.cols.start, block.cols.stop)
            inside = Window.of(*(-(-edge // step) for edge in edges))
            part = inside.intersect(hull)
            if part.area:
                found[(..., *part.within(hull))] = self._read(array, part, step)
        return found

    def _read(self, array: zarr.Array[Any], window: Window, step: int) -> NDArray[Any]:
        rows, cols = (slice(axis.start * step, (axis.stop - 1) * step + 1, step) for axis in (window.rows, window.cols))
        try:
            return np.asarray(array[rows, cols] if array.ndim == 2 else array[:SHOWN, rows, cols])
        except (OSError, ValueError, RuntimeError, zarr.errors.BaseZarrError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ReadError(f"{self.store.path}: {array.name} cannot be read at {window}: {reason}") from error
