"""Reading rasters that GDAL opens, from many threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import MaskFlags, Resampling
from rasterio.windows import Window as RasterioWindow

from tilepipe.errors import ReadError
from tilepipe.raster.dataset import (
    COMPOSED_TURN,
    GDAL_ERRORS,
    OPTIONS,
    Warp,
    environment,
    files_of,
    rasterio_window,
    read_window,
    reason,
)
from tilepipe.raster.identity import file_identity
from tilepipe.raster.info import cells
from tilepipe.raster.part_reader import PartReader
from tilepipe.raster.parts import Parts
from tilepipe.raster.pool import DatasetPool
from tilepipe.window import Window

CACHE_BYTES = 64 << 20
"""GDAL's block cache for sources read by tiles: a larger one makes a single pass slower."""

WARP_BLOCK = 512
"""Rows and columns of the cells that a resampled raster is computed in, whatever the windows that are read: GDAL
rounds differently for different rectangles."""


@dataclass(frozen=True, slots=True)
class GdalRecipe:
    """How to open a raster with GDAL anywhere."""

    name: str
    target: str
    """A path, a /vsi path, or the XML of a VRT."""
    files: tuple[str, ...]
    """What was given: the files whose content is read, without their sidecars."""
    warp: Warp | None = None
    cache_bytes: int = CACHE_BYTES
    """Of GDAL's block cache, which is one for the whole process."""
    one_dataset: bool = False
    """Whether threads take turns at one dataset. Files stored in strips want it: a strip serves many windows, and
    each dataset would decode it and keep it for itself."""
    composed: bool = False
    """Whether GDAL puts it together from other files. It keeps their datasets in a pool of the whole process, and
    tells of one that cannot be opened once: later reads, of any thread, give 0 and no error. So all such rasters
    take turns, and after an error their datasets are closed, which empties the pool."""
    parts: Parts | None = None
    """The files behind it, where they can be read without GDAL's help: then threads need no turns."""

    def backend(self) -> GdalBackend:
        """A backend that opens its datasets when they are first read."""
        return GdalBackend(self)

    def identity(self) -> list[dict[str, Any]]:
        """Path, size and modification time of every file, sidecar and VRT source; of URLs what they tell."""
        paths = dict.fromkeys(path for file in self.files for path in files_of(file))
        parts = [file_identity(path) for path in paths]
        if self.warp is not None:
            parts.append({"resampled": [*self.warp.transform, *self.warp.shape], "by": self.warp.resampling})
        return parts


_COMPOSED: WeakSet[GdalBackend] = WeakSet()
"""Every backend of this process that reads a raster which GDAL puts together."""

_READ: set[tuple[str, ...]] = set()
"""What GDAL has put together in this process, by the files that were given."""


class GdalBackend:
    """Reads through as many datasets as threads read at once, or one at a time."""

    def __init__(self, recipe: GdalRecipe) -> None:
        self._recipe = recipe
        self._datasets = DatasetPool(recipe.cache_bytes)
        self._turn: AbstractContextManager[Any] = threading.Lock() if recipe.one_dataset else nullcontext()
        if recipe.composed:
            self._turn = COMPOSED_TURN
            _COMPOSED.add(self)
        self._lost = False
        """Whether GDAL can no longer be trusted to tell what is wrong with it."""
        self._parts: PartReader | None = None
        if recipe.parts is not None and recipe.warp is None:
            self._parts = PartReader(recipe.parts, recipe.cache_bytes)

    def fetch(self, bands: Sequence[int], window: Window, out: NDArray[Any]) -> None:
        """Fill `out` (bands, rows, columns) with the 1-based `bands` of `window`, which lies in the raster."""
        if self._parts is not None:
            with self._telling(window):
                if self._parts.fetch(bands, window, out):
                    return
        if self._recipe.warp is None:
            with self._reading(window) as dataset:
                read_window(dataset, bands, window, out)
            return
        for cell in cells(window, WARP_BLOCK, self._recipe.warp.shape):
            values = np.empty((len(bands), *cell.shape), out.dtype)
            with self._reading(cell) as dataset:
                read_window(dataset, bands, cell, values)
            part = cell.intersect(window)
            out[(slice(None), *part.within(window))] = values[(slice(None), *part.within(cell))]

    def fetch_mask(self, bands: Sequence[int], window: Window) -> NDArray[np.bool_]:
        """(rows, columns): where the mask of every one of `bands` is not 0."""
        with self._reading(window) as dataset:
            shared = MaskFlags.per_dataset in dataset.mask_flag_enums[bands[0] - 1]
            parts = [
                dataset.read_masks(band, window=rasterio_window(window)) != 0
                for band in (bands[:1] if shared else bands)
            ]
        return np.logical_and.reduce(parts)

    def reduced(
        self, bands: Sequence[int], place: RasterioWindow, shape: tuple[int, int], nearest: bool
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """(bands, rows, columns) of `shape` and which are valid: `place`, between pixels too, from its overviews.

        By mean over the pixels or, `nearest`, one of them.
        """
        how = Resampling.nearest if nearest or self._recipe.composed else Resampling.average
        with self._reading(_hull(place)) as dataset:
            values = dataset.read(list(bands), window=place, out_shape=(len(bands), *shape), resampling=how)
            masks = dataset.read_masks(list(bands), window=place, out_shape=(len(bands), *shape))
        return values, (masks != 0).all(axis=0)

    def has_overviews(self) -> bool:
        """Whether the file, or the first of those that it is put together from, has overviews."""
        with self._reading(Window.of(0, 1, 0, 1)) as dataset:
            if dataset.overviews(1) or not self._recipe.composed:
                return bool(dataset.overviews(1))
            # The first of its files is the VRT itself, if it is one.
            parts = [path for path in dataset.files if not path.lower().endswith(".vrt")]
        try:
            with rasterio.Env(**OPTIONS), rasterio.open(parts[0], sharing=False) as first:
                return bool(first.overviews(1))
        except (IndexError, *GDAL_ERRORS):
            return False

    def close(self) -> None:
        """Close every dataset."""
        if self._parts is not None:
            self._parts.close()
        with self._turn:
            self._datasets.close()

    @contextmanager
    def _reading(self, window: Window) -> Iterator[Any]:
        recipe = self._recipe
        with self._telling(window), self._turn, environment():
            if self._lost:
                raise OSError("one of its files could not be read before, and GDAL tells so only once; try again")
            if recipe.composed:
                _READ.add(recipe.files)
            try:
                with self._datasets.open(recipe.target, recipe.warp) as dataset:
                    yield dataset
            except GDAL_ERRORS:
                if recipe.composed:
                    for backend in list(_COMPOSED):
                        backend._datasets.close()
                    self._lost = any(map(_is_nested, _READ))
                raise

    @contextmanager
    def _telling(self, window: Window) -> Iterator[None]:
        """A context from which GDAL's errors come as a ReadError."""
        try:
            yield
        except GDAL_ERRORS as error:
            raise ReadError(f"{self._recipe.name}: cannot read {window}: {reason(error)}") from error


@lru_cache
def _is_nested(files: tuple[str, ...]) -> bool:
    """Whether a VRT is among the files that a raster is put together from.

    GDAL's pool keeps such a one, which keeps the pool: what could not be opened is never told of again.
    """
    listed = {path for file in files for path in files_of(file)}
    return any(path.lower().endswith(".vrt") for path in (listed if len(files) > 1 else listed - {*files}))


def _hull(place: RasterioWindow) -> Window:
    """The pixels that a place between pixels touches."""
    bottom, right = place.row_off + place.height, place.col_off + place.width
    return Window.of(math.floor(place.row_off), math.ceil(bottom), math.floor(place.col_off), math.ceil(right))
