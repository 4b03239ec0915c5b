"""Reading a raster that is put together from files, file by file, from any number of threads at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.env import set_gdal_config

from tilepipe.raster.dataset import COMPOSED, GDAL_ERRORS, environment, open_dataset, read_window
from tilepipe.raster.parts import Part, Parts, disjoint
from tilepipe.window import Window

IDLE = 64
"""The most files that are kept open without being read."""


class PartReader:
    """Puts windows together from files.

    What it cannot do it leaves to GDAL, which also is the one to say what is wrong with a file.
    """

    def __init__(self, parts: Parts, cache_bytes: int) -> None:
        self._parts, self._files = parts, _Files(cache_bytes)

    def fetch(self, bands: Sequence[int], window: Window, out: NDArray[Any]) -> bool:
        """Whether `out` (bands, rows, columns) now holds the 1-based `bands` of `window`, which lies in the raster."""
        parts = self._parts.touching(window)
        if not self._can_join(parts, bands, out):
            return False
        for band, plane in zip(bands, out, strict=True):
            plane[...] = self._parts.background[band - 1]
        try:
            with environment():
                return all(self._put(part, bands, window, out) for part in parts)
        except GDAL_ERRORS:
            return False

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _can_join(self, parts: Sequence[Part], bands: Sequence[int], out: NDArray[Any]) -> bool:
        if any(self._parts.dtypes[band - 1] != out.dtype.name for band in bands):
            return False
        # Which of two floats counts as a hole is GDAL's to say.
        compared = out.dtype.kind == "f" and any(part.holes[band - 1] is not None for part in parts for band in bands)
        return not compared or disjoint(parts)

    def _put(self, part: Part, bands: Sequence[int], window: Window, out: NDArray[Any]) -> bool:
        """Whether a part's pixels are now in `out`: they are not where the file is not what its raster takes it for."""
        seen, there = part.within(window)
        at = seen.within(window)
        with self._files.open(part.target) as dataset:
            if not _fits(dataset, part, bands, out.dtype):
                return False
            holes = [part.holes[band - 1] for band in bands]
            if out.dtype.kind == "f" or holes == [None] * len(holes):
                read_window(dataset, bands, there, out[:, *at])
                return True
            values = np.empty((len(bands), *seen.shape), out.dtype)
            read_window(dataset, bands, there, values)
        for plane, given, hole in zip(out, values, holes, strict=True):
            np.copyto(plane[at], given, where=True if hole is None else given != hole)
        return True


def _fits(dataset: Any, part: Part, bands: Sequence[int], dtype: np.dtype[Any]) -> bool:
    (rows, cols), whole = part.place.shape, (dataset.height, dataset.width)
    inside = part.origin[0] + rows <= whole[0] and part.origin[1] + cols <= whole[1]
    if not inside or dataset.driver in COMPOSED or max(bands) > dataset.count:
        return False
    if any(dataset.dtypes[band - 1] != dtype.name for band in bands):
        return False
    # A strip serves many windows: it is decoded less often where threads take turns.
    block_rows, block_cols = dataset.block_shapes[0]
    return bool(block_cols < dataset.width or block_rows >= dataset.height)


class _Files:
    """Datasets that are lent to one thread at a time, and kept open for the next."""

    def __init__(self, cache_bytes: int) -> None:
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._idle: OrderedDict[str, list[Any]] = OrderedDict()
        self._generation = 0

    @contextmanager
    def open(self, target: str) -> Iterator[Any]:
        """A dataset that no other thread has meanwhile."""
        with self._lock:
            generation, idle = self._generation, self._idle.get(target, [])
            dataset = idle.pop() if idle else None
        if dataset is None:
            set_gdal_config("GDAL_CACHEMAX", self._cache_bytes)
            dataset = open_dataset(target)
        try:
            yield dataset
        except BaseException:
            dataset.close()
            raise
        for unwanted in self._keep(target, dataset, generation):
            unwanted.close()

    def _keep(self, target: str, dataset: Any, generation: int) -> list[Any]:
        """What has to be closed, now that a dataset came back."""
        with self._lock:
            if generation != self._generation:
                return [dataset]
            self._idle.setdefault(target, []).append(dataset)
            self._idle.move_to_end(target)
            if sum(map(len, self._idle.values())) <= IDLE:
                return []
            return self._idle.popitem(last=False)[1]

    def close(self) -> None:
        """Close what is not lent, and the rest when it comes back."""
        with self._lock:
            self._generation += 1
            idle, self._idle = self._idle, OrderedDict()
        for dataset in (dataset for datasets in idle.values() for dataset in datasets):
            dataset.close()
