"""Opening rasters: a file, a URL, several files as one mosaic, or a zarr array, as one picklable value."""

from __future__ import annotations

import glob
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tilepipe.errors import InputError, UsageError
from tilepipe.raster.arrays import ArrayRecipe
from tilepipe.raster.bands import check_numbers, select_bands
from tilepipe.raster.dataset import COMPOSED, Warp
from tilepipe.raster.description import BLOCK_LIMIT, describe, warped_to_pixel_size
from tilepipe.raster.gdal import CACHE_BYTES, GdalRecipe
from tilepipe.raster.identity import gdal_path
from tilepipe.raster.info import BandChoice, Pixels, RasterInfo, pixel_size_m
from tilepipe.raster.mosaic import Piece, mosaic_xml
from tilepipe.raster.parts import parts_of
from tilepipe.raster.reader import Reader
from tilepipe.raster.zarr import ZarrRecipe, describe_zarr, is_zarr
from tilepipe.window import Interval, Window

__all__ = [
    "BandChoice",
    "Pixels",
    "RasterInfo",
    "RasterSource",
    "Reader",
    "cache_bytes",
    "open_raster",
    "select_bands",
    "strips",
]

Nodata = float | Literal["none"] | None
"""A value that stands for the raster's own nodata value; "none" lets it have none; None keeps its own."""


STRIP_CACHE = 512 << 20
"""The most that GDAL's block cache gets for a source stored in strips, unless `with_cache` says otherwise."""

STRIP_WINDOW = (4096, 4096)
"""The windows that this cache is made for, where it suffices."""


@dataclass(frozen=True, slots=True)
class RasterSource:
    """A raster and how to open it anywhere: picklable, without open files."""

    recipe: GdalRecipe | ZarrRecipe | ArrayRecipe
    raw: RasterInfo
    """The raster with all its bands."""
    choice: BandChoice

    @property
    def info(self) -> RasterInfo:
        """The raster as its readers return it: the chosen bands only."""
        return self.raw.select(self.choice)

    def select(self, choice: BandChoice) -> RasterSource:
        """The same raster with other bands, numbered as in `raw`."""
        check_numbers(self.raw, choice.indices)
        return replace(self, choice=choice)

    @property
    def cache_bytes(self) -> int:
        """The GDAL block cache that a process reading this raster uses, in bytes; 0 for zarr and arrays."""
        return self.recipe.cache_bytes if isinstance(self.recipe, GdalRecipe) else 0

    def with_cache(self, size: int) -> RasterSource:
        """The same raster, read with a GDAL block cache of `size` bytes for the whole process."""
        if not isinstance(self.recipe, GdalRecipe):
            return self
        return replace(self, recipe=replace(self.recipe, cache_bytes=int(size)))

    def open(self) -> Reader:
        """A reader; any number of threads may share it."""
        return Reader(self.recipe, self.raw, self.choice)

    @property
    def paths(self) -> tuple[str, ...]:
        """The files and zarr arrays that were given, as they are opened."""
        if isinstance(self.recipe, ArrayRecipe):
            return ()
        return (self.recipe.array,) if isinstance(self.recipe, ZarrRecipe) else self.recipe.files

    def identity(self) -> list[dict[str, Any]]:
        """What tells this raster from another, as JSON-able parts: its files, then grid, bands and nodata."""
        info = self.info
        grid = {
            "shape": list(info.shape),
            "dtype": info.dtype,
            "transform": None if info.transform is None else list(info.transform),
            "bands": list(self.choice.indices),
            "palette": list(self.choice.palette),
            "nodata": [repr(value) for value in info.nodata],
        }
        return [*self.recipe.identity(), grid]


def open_raster(
    inputs: str | Path | Sequence[str | Path],
    *,
    bands: Sequence[int] | None = None,
    nodata: Nodata = None,
    resample_to: float | None = None,
    block_limit: int = BLOCK_LIMIT,
) -> RasterSource:
    """The raster that `inputs` name: a path or URL for GDAL, several or a glob as one mosaic, or a zarr array.

    `bands`: 1-based numbers, else all. `nodata` stands for the raster's own value. `resample_to`: a pixel size in
    metres, to which it is resampled bilinearly on its own CRS. `block_limit`: bytes that one block of a file may
    decode to. Of a mosaic's files the first is on top; they must fit together. InputError where anything does not.
    """
    names = _names(inputs)
    zarrs = [name for name in names if is_zarr(name)]
    if zarrs and len(names) > 1:
        raise InputError(f"{zarrs[0]} is zarr; a mosaic is made of files that GDAL opens")
    recipe: GdalRecipe | ZarrRecipe
    if zarrs:
        recipe, raw = _open_zarr(names[0], nodata, resample_to)
    else:
        recipe, raw = _open_gdal(names, nodata, resample_to, block_limit)
    if raw.flat:
        raise InputError(
            f"{raw.name} has the geotransform {raw.transform}, which maps no area; remove it "
            "(gdal_edit.py -unsetgt) or give it the right one (gdal_edit.py -a_ullr)"
        )
    numbers = tuple(range(1, raw.bands + 1)) if bands is None else check_numbers(raw, bands)
    return RasterSource(recipe, raw, BandChoice(numbers))


def in_strips(info: RasterInfo) -> bool:
    """Whether a file is stored in blocks of its whole width, which windows share."""
    return info.driver != "zarr" and info.block_shape[1] >= info.shape[1]


def cache_bytes(info: RasterInfo, window_shape: tuple[int, int]) -> int:
    """The GDAL block cache in which windows of `window_shape`, row by row, decode each source block once.

    Sources stored in tiles need little: few of a window's tiles are another's too. Of sources stored in strips it
    holds every strip that a window touches. 0 for zarr, which GDAL does not read.
    """
    if info.driver == "zarr":
        return 0
    if not in_strips(info):
        return CACHE_BYTES
    rows, cols = info.shape
    strip = info.block_shape[0]
    held = min(rows, (math.ceil(window_shape[0] / strip) + 1) * strip)
    return max(CACHE_BYTES, cols * held * info.pixel_bytes)


def strips(info: RasterInfo, window: Window, parts: int) -> tuple[Window, ...]:
    """About `parts` windows that make up `window`, of its whole rows, cut where source blocks end if possible."""
    rows = window.rows
    height = max(1, math.ceil(len(rows) / max(1, parts)))
    step = max(1, info.block_shape[0])
    if step < len(rows):
        height = math.ceil(height / step) * step
    edges = [rows.start]
    while edges[-1] < rows.stop:
        edge = edges[-1] + height
        aligned = edge // step * step
        edges.append(min(rows.stop, aligned if aligned > edges[-1] else edge))
    return tuple(Window(Interval(a, b), window.cols) for a, b in itertools.pairwise(edges))


def _names(inputs: str | Path | Sequence[str | Path]) -> list[str]:
    names: list[str] = []
    for given in [inputs] if isinstance(inputs, str | Path) else inputs:
        name = str(given)
        if "://" in name or name.startswith("/vsi") or os.path.exists(name) or not glob.has_magic(name):
            names.append(name)
            continue
        found = sorted(glob.glob(name, recursive=True))
        if not found:
            raise InputError(f"no file matches {name}")
        names.extend(found)
    if not names:
        raise UsageError("no input raster is given; name a file, a URL, a glob or a zarr array")
    for name in names:
        if os.path.isdir(name) and not is_zarr(name):
            raise InputError(f"{name} is a folder and no zarr store; name its files, e.g. {name.rstrip('/')}/*.tif")
    return names


def _open_gdal(
    names: list[str], nodata: Nodata, resample_to: float | None, block_limit: int
) -> tuple[GdalRecipe, RasterInfo]:
    if len(names) == 1:
        target = _target(names[0])
        raw = _with_nodata(describe(names[0], target, block_limit=block_limit), nodata)
        recipe = GdalRecipe(names[0], target, (target,))
    else:
        recipe, raw = _mosaic(names, nodata, block_limit)
    if resample_to is not None:
        recipe, raw = _resampled(recipe, raw, nodata, resample_to)
    cache = min(STRIP_CACHE, cache_bytes(raw, STRIP_WINDOW))
    composed = len(names) > 1 or raw.driver in COMPOSED
    parts = parts_of(recipe.target) if composed and recipe.warp is None else None
    return replace(recipe, cache_bytes=cache, one_dataset=in_strips(raw), composed=composed, parts=parts), raw


def _target(name: str) -> str:
    """What GDAL opens; files by their whole path, since a worker may run in another folder."""
    return os.path.abspath(name) if os.path.exists(name) else gdal_path(name)


def _mosaic(names: list[str], nodata: Nodata, block_limit: int) -> tuple[GdalRecipe, RasterInfo]:
    pieces = []
    for name in names:
        target = _target(name)
        pieces.append(Piece(target, _with_nodata(describe(name, target, block_limit=block_limit), nodata)))
    name, xml = f"{names[0]} and {len(names) - 1} more", mosaic_xml(pieces)
    first = pieces[0].info
    # What reading costs is said by the files' own storage.
    raw = replace(
        describe(name, xml),
        block_shape=first.block_shape,
        interleaved=first.interleaved,
        driver=first.driver,
        compression=first.compression,
    )
    return GdalRecipe(name, xml, tuple(piece.target for piece in pieces)), raw


def _open_zarr(name: str, nodata: Nodata, resample_to: float | None) -> tuple[ZarrRecipe, RasterInfo]:
    if resample_to is not None:
        raise InputError(f"{name} is zarr, which is not resampled while it is read; stage it resampled, or use a file")
    recipe, info = describe_zarr(name)
    return recipe, _with_nodata(info, nodata)


def _with_nodata(info: RasterInfo, nodata: Nodata) -> RasterInfo:
    if nodata is None:
        return info
    if nodata == "none":
        return replace(info, nodata=(None,) * info.bands)
    for name in info.dtypes:
        dtype = np.dtype(name)
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            if not (float(nodata).is_integer() and limits.min <= nodata <= limits.max):
                raise UsageError(
                    f"nodata {nodata} is no {name} value, which {info.name} holds; "
                    f"choose a whole number from {limits.min} to {limits.max}, or none"
                )
    whole = all(np.dtype(name).kind in "iu" for name in info.dtypes)
    return replace(info, nodata=(int(nodata) if whole else float(nodata),) * info.bands)


def _resampled(
    recipe: GdalRecipe, raw: RasterInfo, nodata: Nodata, resample_to: float
) -> tuple[GdalRecipe, RasterInfo]:
    size = pixel_size_m(raw)
    if not resample_to > 0:
        raise UsageError(f"a pixel size of {resample_to} m cannot be; give one above 0")
    if size is None:
        raise InputError(f"{raw.name} has no CRS and transform in metres or degrees; it cannot be resampled")
    if raw.colormap is not None:
        raise InputError(f"{raw.name} holds palette indices, which cannot be interpolated; expand it to colours first")
    if nodata == "none" and describe(recipe.name, recipe.target).nodata != raw.nodata:
        raise UsageError(f"nodata none does not go with resampling {raw.name}; give a value, or clear its own first")
    warp: Warp = warped_to_pixel_size(raw, (size[0] / resample_to, size[1] / resample_to))
    return replace(recipe, warp=warp), replace(describe(recipe.name, recipe.target, warp), name=raw.name)
