"""Where labels are wanted: regions given as text, and areas given as polygons or as another raster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import ProjError
from rasterio.features import rasterize

from tilepipe.errors import InputError, UsageError
from tilepipe.raster.dataset import COMPOSED, Warp
from tilepipe.raster.description import describe
from tilepipe.raster.gdal import GdalRecipe
from tilepipe.raster.identity import file_identity, gdal_path
from tilepipe.raster.info import BandChoice, RasterInfo, Transform, cells
from tilepipe.raster.reader import Reader
from tilepipe.window import Window

_CELL = 1024
"""Rows and columns of the cells that polygons are drawn in."""

_MARGIN = 2
"""Pixels kept around a cell when polygons are cut to it, so that the cut itself draws nothing."""

_LONG = 1000
"""Points from which on a polygon is cut to the cell before it is drawn."""


def region_window(info: RasterInfo, text: str, what: str = "region") -> Window:
    """The part of the raster that `text` names, clipped to it; messages call it `what`.

    "row0:row1,col0:col1" are pixels, half-open, where a missing number means the raster's edge; or
    "left,bottom,right,top" are coordinates in the raster's CRS: every pixel they touch belongs to the region.

    >>> raster = RasterInfo("a.tif", (100, 200), ("uint8",), (None,), ("gray",), (None,))
    >>> str(region_window(raster, "10:50,:80"))
    'rows 10:50, columns 0:80'
    """
    asked = _pixel_region(info, text, what) if ":" in text else _bounds_region(info, text, what)
    window = asked.clip(info.shape)
    if window.area == 0:
        rows, cols = info.shape
        raise UsageError(f"{what} {text} holds no pixel of {info.name}, which has rows 0:{rows}, columns 0:{cols}")
    return window


def _pixel_region(info: RasterInfo, text: str, what: str) -> Window:
    axes = text.split(",")
    try:
        bounds = [
            (int(start) if start.strip() else 0, int(stop) if stop.strip() else length)
            for (start, stop), length in zip((axis.split(":") for axis in axes), info.shape, strict=True)
        ]
    except ValueError as error:
        raise UsageError(f"{what} {text} is not understood; write row0:row1,col0:col1") from error
    (top, bottom), (left, right) = bounds
    if min(top, left) < 0 or bottom <= top or right <= left:
        raise UsageError(f"{what} {text} is empty or starts before 0; rows and columns count up from 0")
    return Window.of(top, bottom, left, right)


def _bounds_region(info: RasterInfo, text: str, what: str) -> Window:
    try:
        left, bottom, right, top = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"{what} {text} is not understood; write row0:row1,col0:col1 or left,bottom,right,top"
        ) from error
    if info.transform is None:
        raise UsageError(f"{info.name} has no affine transform; give the {what} as row0:row1,col0:col1")
    if not (left < right and bottom < top and all(map(math.isfinite, (left, bottom, right, top)))):
        raise UsageError(f"{what} {text} is empty; left is below right, bottom below top, in the raster's CRS")
    inverse = ~Affine(*info.transform)
    corners = [inverse * (x, y) for x in (left, right) for y in (bottom, top)]
    cols, rows = ([corner[i] for corner in corners] for i in (0, 1))
    # A bound that lies on a pixel's edge but for rounding does not touch the next pixel.
    return Window.of(
        math.floor(min(rows) + 1e-6),
        math.ceil(max(rows) - 1e-6),
        math.floor(min(cols) + 1e-6),
        math.ceil(max(cols) - 1e-6),
    )


class AreaReader(Protocol):
    """Tells which pixels of a raster lie in an area; any number of threads may ask."""

    def read(self, window: Window) -> NDArray[np.bool_]:
        """(rows, columns) of `window`: True inside; False beyond the raster."""

    def touches(self, window: Window) -> bool:
        """Whether some pixel of the window may be inside; never False where one is."""

    def close(self) -> None:
        """Let go of open files."""


@dataclass(frozen=True, slots=True)
class AreaMask:
    """An area on a raster's grid, and how to open it anywhere. It masks outputs; a network sees every pixel."""

    path: str
    shape: tuple[int, int]
    """(rows, columns) of the raster whose pixels are asked about."""
    transform: Transform | None
    crs_wkt: str | None
    raster: GdalRecipe | None = None
    """How to read an area that is a raster, on the grid of the other; None for polygons."""
    raster_info: RasterInfo | None = None

    def open(self) -> AreaReader:
        """A reader of the area; polygons are loaded and moved to the raster's CRS here."""
        if self.raster is not None and self.raster_info is not None:
            return _RasterArea(self, Reader(self.raster, self.raster_info, BandChoice((1,))))
        return _VectorArea(self)

    def identity(self) -> list[dict[str, Any]]:
        """What tells this area from another: its files, as JSON-able parts."""
        if self.raster is not None:
            return self.raster.identity()
        files = [path for path in _companions(self.path) if path == self.path or Path(path).is_file()]
        return [file_identity(path) for path in files]


def open_area(path: str | Path, info: RasterInfo) -> AreaMask:
    """The area that `path` holds (polygons in any vector format, or a raster: not 0 and not nodata is inside).

    Polygons hold the pixels whose centre they hold. A raster on another grid or CRS is read at the nearest pixel.
    Raises InputError where the file cannot be read, holds no polygon, or cannot be placed on the raster `info`.
    """
    name = str(path)
    if "://" not in name and not name.startswith("/vsi"):
        if not Path(name).exists():
            raise InputError(f"cannot open {name}: No such file or directory")
        name = str(Path(name).absolute())
    if _is_vector(name):
        area = AreaMask(name, info.shape, info.transform, info.crs_wkt)
        _polygons(area)
        return area
    target = gdal_path(name)
    found = describe(name, target)
    warp = None
    if found.shape != info.shape or found.transform != info.transform or not _same_crs(found.crs_wkt, info.crs_wkt):
        warp = _onto(found, info)
    recipe = GdalRecipe(name, target, (name,), warp, composed=found.driver in COMPOSED)
    placed = found if warp is None else describe(name, target, warp)
    return AreaMask(name, info.shape, info.transform, info.crs_wkt, recipe, placed)


class _RasterArea:
    def __init__(self, area: AreaMask, reader: Reader) -> None:
        self._area, self._reader = area, reader

    def __reduce__(self) -> tuple[Any, ...]:
        return AreaMask.open, (self._area,)

    def read(self, window: Window) -> NDArray[np.bool_]:
        inside = np.zeros(window.shape, dtype=bool)
        part = window.clip(self._area.shape)
        if part.area:
            pixels = self._reader.read(part)
            inside[part.within(window)] = pixels.values[0] != 0
            if pixels.valid is not None:
                inside[part.within(window)] &= pixels.valid
        return inside

    def touches(self, window: Window) -> bool:
        return bool(self.read(window).any())

    def close(self) -> None:
        self._reader.close()


class _VectorArea:
    """Polygons in pixel coordinates (x = column, y = row), loaded once and shared by threads."""

    def __init__(self, area: AreaMask) -> None:
        self._area = area
        self._tree = shapely.STRtree(_polygons(area))

    def __reduce__(self) -> tuple[Any, ...]:
        return AreaMask.open, (self._area,)

    def read(self, window: Window) -> NDArray[np.bool_]:
        inside = np.zeros(window.shape, dtype=bool)
        for cell in cells(window, _CELL, self._area.shape):
            part = cell.intersect(window)
            drawn = self._draw(cell)
            if drawn is not None:
                inside[part.within(window)] = drawn[part.within(cell)]
        return inside

    def touches(self, window: Window) -> bool:
        return window.clip(self._area.shape).area > 0 and len(self._near(window)) > 0

    def close(self) -> None:
        """Nothing is open."""

    def _draw(self, cell: Window) -> NDArray[np.bool_] | None:
        shapes = [_cut(polygon, cell) for polygon in self._near(cell)]
        shapes = [polygon for polygon in shapes if not polygon.is_empty]
        if not shapes:
            return None
        place = Affine.translation(cell.cols.start, cell.rows.start)
        drawn = rasterize(shapes, out_shape=cell.shape, transform=place, fill=0, default_value=1, dtype="uint8")
        return np.asarray(drawn, dtype=bool)

    def _near(self, window: Window) -> NDArray[Any]:
        box = shapely.box(window.cols.start, window.rows.start, window.cols.stop, window.rows.stop)
        return np.asarray(self._tree.geometries.take(np.sort(self._tree.query(box))))


def _cut(polygon: Any, cell: Window) -> Any:
    """The polygon, or where it is long its part near the cell; an invalid one that cannot be cut stays whole."""
    if shapely.get_num_coordinates(polygon) < _LONG:
        return polygon
    rows, cols = cell.rows.grow(_MARGIN, _MARGIN), cell.cols.grow(_MARGIN, _MARGIN)
    try:
        return shapely.clip_by_rect(polygon, cols.start, rows.start, cols.stop, rows.stop)
    except shapely.errors.GEOSException:
        return polygon


def _is_vector(name: str) -> bool:
    import pyogrio  # loads pandas where it is installed, which is slow

    try:
        return len(pyogrio.list_layers(gdal_path(name))) > 0
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError):
        return False


def _polygons(area: AreaMask) -> NDArray[Any]:
    """The polygons of all of the area's layers, in pixel coordinates of the raster."""
    import pyogrio

    path = gdal_path(area.path)
    found: list[NDArray[Any]] = []
    try:
        for layer in pyogrio.list_layers(path)[:, 0]:
            meta, _, wkb, _ = pyogrio.raw.read(path, layer=layer, columns=[], force_2d=True)
            geometries = shapely.from_wkb(wkb if wkb is not None else np.empty(0, dtype=object))
            # Twice, since a collection may hold multipolygons.
            parts = shapely.get_parts(shapely.get_parts(geometries[~shapely.is_missing(geometries)]))
            polygons = parts[(shapely.get_dimensions(parts) == 2) & ~shapely.is_empty(parts)]
            found.append(_reprojected(polygons, meta["crs"], area))
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, shapely.errors.GEOSException) as error:
        raise InputError(f"cannot open {area.path}: {' '.join(str(error).split())}") from error
    polygons = np.concatenate(found)
    if not len(polygons):
        raise InputError(f"{area.path} holds no polygon; an area is made of polygons, or of a raster's pixels")
    if area.transform is None:
        raise InputError(f"the raster has no affine transform, so the polygons of {area.path} have no place on it")
    return _to_pixels(polygons, area.transform)


def _reprojected(polygons: NDArray[Any], crs: str | None, area: AreaMask) -> NDArray[Any]:
    if crs is None or area.crs_wkt is None:
        # Without a CRS on either side, coordinates are taken to be the raster's own.
        return polygons
    source, target = CRS.from_user_input(crs), CRS.from_wkt(area.crs_wkt)
    if source.equals(target, ignore_axis_order=True):
        return polygons
    transformer = Transformer.from_crs(source, target, always_xy=True)

    def move(points: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.column_stack(transformer.transform(points[:, 0], points[:, 1], errcheck=True))

    try:
        return np.asarray(shapely.transform(polygons, move))
    except ProjError as error:
        raise InputError(f"{area.path} cannot be moved to the raster's CRS: {' '.join(str(error).split())}") from error


def _to_pixels(polygons: NDArray[Any], transform: Transform) -> NDArray[Any]:
    inverse = ~Affine(*transform)
    a, b, c, d, e, f = tuple(inverse)[:6]

    def place(points: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = points[:, 0], points[:, 1]
        return np.column_stack((a * x + b * y + c, d * x + e * y + f))

    return np.asarray(shapely.transform(polygons, place))


def _onto(found: RasterInfo, info: RasterInfo) -> Warp:
    if found.transform is None or info.transform is None:
        raise InputError(
            f"{found.name} has {found.shape[0]} x {found.shape[1]} pixels, {info.name} {info.shape[0]} x "
            f"{info.shape[1]}; without a transform on both a mask needs the raster's own size"
        )
    if (found.crs_wkt is None) != (info.crs_wkt is None):
        lacking = found.name if found.crs_wkt is None else info.name
        raise InputError(f"{lacking} has no CRS, so that mask and raster cannot be laid over each other; assign one")
    return Warp(info.crs_wkt, info.transform, info.shape, None, "nearest", nodata=found.nodata[0])


def _same_crs(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return one is other
    return CRS.from_wkt(one).equals(CRS.from_wkt(other), ignore_axis_order=True)


def _companions(path: str) -> Sequence[str]:
    stem = Path(path)
    return (path, *(str(stem.with_suffix(suffix)) for suffix in (".dbf", ".shx", ".prj") if stem.suffix == ".shp"))
