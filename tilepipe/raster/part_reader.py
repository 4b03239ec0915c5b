"""Reading a raster that is put together from files, file by file, from any number of threads at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilepipe.raster.dataset import COMPOSED, COMPOSED_TURN, environment, open_dataset, read_window
from tilepipe.raster.parts import Part, Parts, disjoint
from tilepipe.raster.pool import DatasetPool
from tilepipe.window import Window


class PartReader:
    """Puts windows together from files; what it cannot do it leaves to GDAL."""

    def __init__(self, parts: Parts, cache_bytes: int) -> None:
        self._parts, self._files = parts, DatasetPool(cache_bytes)
        self._facts: dict[str, _Facts | None] = {}

    def fetch(self, bands: Sequence[int], window: Window, out: NDArray[Any]) -> bool:
        """Whether `out` (bands, rows, columns) now holds the 1-based `bands` of `window`, which lies in the raster.

        Raises one of GDAL_ERRORS where a file cannot be read.
        """
        parts = self._parts.touching(window)
        with environment():
            if not self._can_join(parts, bands, out.dtype):
                return False
            for band, plane in zip(bands, out, strict=True):
                plane[...] = self._parts.background[band - 1]
            for part in parts:
                self._put(part, bands, window, out)
        return True

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _can_join(self, parts: Sequence[Part], bands: Sequence[int], dtype: np.dtype[Any]) -> bool:
        if any(self._parts.dtypes[band - 1] != dtype.name for band in bands):
            return False
        # Which floats count as holes is GDAL's to say.
        compared = dtype.kind == "f" and any(part.holes[band - 1] is not None for part in parts for band in bands)
        if compared and not disjoint(parts):
            return False
        facts = ((part, self._facts_of(part.target)) for part in parts)
        return all(known is not None and known.has(part, bands, dtype) for part, known in facts)

    def _put(self, part: Part, bands: Sequence[int], window: Window, out: NDArray[Any]) -> None:
        """Puts what a part has of the window into `out`."""
        seen, there = part.within(window)
        at = seen.within(window)
        holes = [part.holes[band - 1] for band in bands]
        through = out.dtype.kind == "f" or holes == [None] * len(holes)
        values = out[:, *at] if through else np.empty((len(bands), *seen.shape), out.dtype)
        with self._files.open(part.target) as dataset:
            read_window(dataset, bands, there, values)
        if not through:
            for plane, given, hole in zip(out, values, holes, strict=True):
                np.copyto(plane[at], given, where=True if hole is None else given != hole)

    def _facts_of(self, target: str) -> _Facts | None:
        if target not in self._facts:
            # It may be one of those that GDAL puts together: none of them is opened without the turn, or kept.
            with COMPOSED_TURN, open_dataset(target) as dataset:
                self._facts[target] = _Facts.of(dataset)
        return self._facts[target]


class _Facts(NamedTuple):
    """What a part's file is."""

    shape: tuple[int, int]
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Any) -> _Facts | None:
        """None for a file that is better read by one thread at a time."""
        block_rows, block_cols = dataset.block_shapes[0]
        # A strip serves many windows: it is decoded less often where threads take turns.
        in_strips = block_cols >= dataset.width and block_rows < dataset.height
        return None if in_strips or dataset.driver in COMPOSED else cls(dataset.shape, dataset.dtypes)

    def has(self, part: Part, bands: Sequence[int], dtype: np.dtype[Any]) -> bool:
        """Whether a part's rectangle lies in the file, and the bands are of this type."""
        (row, col), (rows, cols) = part.origin, part.place.shape
        inside = row + rows <= self.shape[0] and col + cols <= self.shape[1] and max(bands) <= len(self.dtypes)
        return inside and all(self.dtypes[band - 1] == dtype.name for band in bands)
