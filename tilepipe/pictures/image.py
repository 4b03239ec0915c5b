"""The raster that a map was made from, as a picture of any part of the map: found, laid under it, and reduced.

map window --the two transforms, or the job's region--> place in the raster --overviews--> cells
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.windows import Window as RasterioWindow

from tilepipe.errors import InputError
from tilepipe.pictures.colors import NODATA_COLOR, on_grey, stretched
from tilepipe.pictures.view import View, grid_info
from tilepipe.plan import TilePlan
from tilepipe.raster.bands import RGB, select_bands
from tilepipe.raster.gdal import GdalBackend, GdalRecipe
from tilepipe.raster.info import BandChoice, RasterInfo
from tilepipe.raster.overlap import require_same_crs
from tilepipe.raster.reader import palette_table
from tilepipe.raster.source import RasterSource, Reader, open_raster
from tilepipe.store.spec import StoreSpec
from tilepipe.window import Interval, Window

LARGE = 1 << 30
"""Pixels that are read of a raster without overviews, unless it was asked for by name."""
STRIP_BYTES = 64 << 20
"""Of a raster that GDAL does not read: what is read at once."""

_SIDECARS = re.compile(r"\.(ovr|msk|aux\.xml|xml|tfw|tifw|jgw|pgw|wld|prj|imd|rpb|txt|vrt)$", re.IGNORECASE)


Cells = tuple[NDArray[Any], NDArray[np.bool_]]
"""(bands, rows, columns), and which of (rows, columns) are valid."""


class Axis(NamedTuple):
    """Where a map's pixels lie along an axis of the raster: pixel n starts at `start` + n * `step`."""

    start: float
    step: float

    def place(self, interval: Interval) -> tuple[float, float]:
        """(start, stop) of an interval of map pixels, in raster pixels."""
        # To a millionth of a pixel, which is what transforms tell.
        return round(self.start + interval.start * self.step, 6), round(self.start + interval.stop * self.step, 6)


@dataclass(frozen=True, slots=True)
class ImageLayer:
    """A raster under a map."""

    source: RasterSource
    rows: Axis
    cols: Axis
    patient: bool
    """Whether a large raster without overviews is read all the same."""

    @property
    def name(self) -> str:
        """What the raster is called, without its folder."""
        return os.path.basename(self.source.raw.name.rstrip("/"))

    def read(self, view: View) -> NDArray[np.uint8]:
        """(rows, columns, 3) of the view's cells: the raster in red, green and blue, or grey; light grey without data.

        Bytes are shown as they are, all else from its 2nd to its 98th percentile. InputError where the raster does
        not reach the view, or is too large to read without overviews; ReadError where it cannot be read.
        """
        rows, cols = self.rows.place(view.window.rows), self.cols.place(view.window.cols)
        height, width = self.source.raw.shape
        inside = max(rows[0], 0.0), min(rows[1], height), max(cols[0], 0.0), min(cols[1], width)
        top, bottom, left, right = inside
        if bottom <= top or right <= left:
            raise InputError(f"{self.source.raw.name} shows another place than the map, or the window of it")
        down, across = _cells(rows, top, bottom, view.shape[0]), _cells(cols, left, right, view.shape[1])
        place = RasterioWindow(left, top, right - left, bottom - top)
        shape = down.stop - down.start, across.stop - across.start
        picture = np.full((*view.shape, 3), NODATA_COLOR, np.uint8)
        recipe = self.source.recipe
        if isinstance(recipe, GdalRecipe):
            with closing(recipe.backend()) as backend:
                values, valid = self._reduced(backend, place, shape)
        else:
            with self.source.open() as reader:
                values, valid = _sampled(reader, place, shape)
        picture[down, across] = _shown(values, valid)
        return picture

    def _reduced(self, backend: GdalBackend, place: RasterioWindow, shape: tuple[int, int]) -> Cells:
        choice = self.source.choice
        if not self.patient and place.width * place.height > LARGE and not backend.has_overviews():
            raise InputError(
                f"{self.source.raw.name} is large and has no overviews; make some (gdaladdo -ro), or name it with "
                "--image to wait for it"
            )
        values, valid = backend.reduced(choice.indices, place, shape, nearest=bool(choice.palette))
        if choice.palette:
            values = palette_table(self.source.raw, choice)[:, values[0]]
        return values, valid


def _cells(whole: tuple[float, float], start: float, stop: float, count: int) -> slice:
    """Which of `count` cells over `whole` show its part from `start` to `stop`, at least one."""
    scale = count / (whole[1] - whole[0])
    first = min(int((start - whole[0]) * scale + 0.5), count - 1)
    return slice(first, max(first + 1, int((stop - whole[0]) * scale + 0.5)))


def _sampled(reader: Reader, place: RasterioWindow, shape: tuple[int, int]) -> Cells:
    """As `GdalBackend.reduced`, of any raster: the pixel in the middle of each cell, read in strips."""
    rows, cols = (
        (start + (np.arange(count) + 0.5) * length / count).astype(np.intp)
        for start, length, count in zip((place.row_off, place.col_off), (place.height, place.width), shape, strict=True)
    )
    across = Interval(int(cols[0]), int(cols[-1]) + 1)
    values = np.empty((reader.info.bands, *shape), reader.info.dtype)
    valid = np.empty(shape, np.bool_)
    tall = max(1, STRIP_BYTES // (len(across) * reader.info.pixel_bytes))
    count = max(1, int(tall / max(1.0, place.height / shape[0])))
    for first in range(0, shape[0], count):
        inner = rows[first : first + count]
        pixels = reader.read(Window(Interval(int(inner[0]), int(inner[-1]) + 1), across))
        index = np.ix_(inner - inner[0], cols - across.start)
        values[:, first : first + count] = pixels.values[:, index[0], index[1]]
        valid[first : first + count] = pixels.validity()[index]
    return values, valid


def _shown(values: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(rows, columns, 3) of (bands, rows, columns)."""
    values = values if len(values) >= 3 else values[:1].repeat(3, axis=0)
    if values.dtype == np.uint8:
        return np.where(valid[..., None], np.moveaxis(values[:3], 0, -1), np.array(NODATA_COLOR, np.uint8))
    return on_grey(stretched(np.where(valid, values, np.nan)))


def find_image(spec: StoreSpec, asked: str | None) -> ImageLayer:
    """The raster under a map: the one `asked` for, else the one that the map was made from.

    InputError, in one line, where it is not to be found or does not fit.
    """
    names = stored_inputs(spec) if asked is None else [asked]
    if not names:
        raise InputError("the store does not say where its raster is; name it with --image")
    gone = [name for name in names if "://" not in name and not name.startswith("/vsi") and not os.path.exists(name)]
    if asked is None and gone:
        raise InputError(f"{gone[0]} is not there any more; name the raster with --image")
    source = open_raster(names)
    source = source.select(_bands(source.raw, spec))
    rows, cols = _axes(spec, source.raw)
    return ImageLayer(source, rows, cols, patient=asked is not None)


def stored_inputs(spec: StoreSpec) -> list[str]:
    """The raster, or the files of the mosaic, that a store was made from; none where it does not say.

    >>> from tilepipe.store.spec import LabelClass
    >>> files = [{"path": path} for path in ("/d/a.tif", "/d/a.tif.aux.xml", "/d/b.tif")]
    >>> made = {"settings": {"raster": "a.tif and 1 more"}, "fingerprint": {"raster": files}}
    >>> stored_inputs(StoreSpec((9, 9), (8, 8), (4, 4), [LabelClass("a", (0, 0, 0))], **made))
    ['/d/a.tif', '/d/b.tif']
    """
    name = str(spec.settings.get("raster", ""))
    parts = spec.fingerprint.get("raster")
    paths = [str(part["path"]) for part in parts if "path" in part] if isinstance(parts, list) else []
    several = re.search(r" and (\d+) more$", name)
    if several:
        files = [path for path in paths if not _SIDECARS.search(path)]
        return files if len(files) == int(several[1]) + 1 else []
    # Of a zarr array the name is the whole path, and the first part the group that it lies in.
    if name in paths:
        return [name]
    return paths[:1]


def _bands(info: RasterInfo, spec: StoreSpec) -> BandChoice:
    """Red, green and blue where the raster tells them, else the first bands that the network read."""
    try:
        return select_bands(info, RGB)
    except InputError:
        read = [band for band in _job_raster(spec).get("bands", []) if 1 <= band <= info.bands]
        bands = read or list(range(1, info.bands + 1))
        return BandChoice(tuple(bands[: 3 if len(bands) >= 3 else 1]))


def _job_raster(spec: StoreSpec) -> Mapping[str, Any]:
    """Shape, bands and more of the raster, as the store's job read it."""
    parts = spec.fingerprint.get("raster")
    found = [part for part in parts if "bands" in part] if isinstance(parts, list) else []
    return found[0] if found else {}


def _axes(spec: StoreSpec, info: RasterInfo) -> tuple[Axis, Axis]:
    if spec.transform is None or info.transform is None:
        return _axes_by_pixels(spec, info)
    require_same_crs(info, grid_info(spec))
    to_raster = ~Affine(*info.transform) * Affine(*spec.transform)
    skew = max(abs(to_raster.b) * spec.shape[0], abs(to_raster.d) * spec.shape[1])
    if skew > 0.5 or min(to_raster.a, to_raster.e) <= 0:
        raise InputError(f"{info.name} is turned against the map; give a raster on the map's own axes (gdalwarp)")
    return Axis(to_raster.f, to_raster.e), Axis(to_raster.c, to_raster.a)


def _axes_by_pixels(spec: StoreSpec, info: RasterInfo) -> tuple[Axis, Axis]:
    """Without transforms: by the region that the job was about, else the map has the raster's own size."""
    plans = spec.settings.get("plans")
    if plans and list(info.shape) == _job_raster(spec).get("shape"):
        plan = TilePlan.from_json(dict(plans[0]))
        top, left = plan.region.origin
        rows, cols = plan.scale
        return Axis(top * rows, rows), Axis(left * cols, cols)
    if info.shape != spec.shape:
        raise InputError(
            f"{info.name} has {info.shape[0]} x {info.shape[1]} pixels, the map {spec.shape[0]} x {spec.shape[1]}; "
            "without a transform on both they must be of one size"
        )
    return Axis(0.0, 1.0), Axis(0.0, 1.0)
