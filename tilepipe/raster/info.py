"""What a raster is, as a frozen value, and what a read of it returns; no file is touched here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS
from pyproj.exceptions import CRSError

from tilepipe.window import Window

_T = TypeVar("_T")

Transform = tuple[float, float, float, float, float, float]
"""Affine coefficients (a, b, c, d, e, f): x = a col + b row + c, y = d col + e row + f, of pixel corners."""


class Pixels(NamedTuple):
    """One read's result."""

    values: NDArray[np.generic]
    """(bands, rows, columns), in the raster's own dtype and units."""
    valid: NDArray[np.bool_] | None
    """(rows, columns): every selected band unmasked and finite; None where that holds for every pixel."""

    def validity(self) -> NDArray[np.bool_]:
        """The (rows, columns) flags as an array in any case."""
        return np.ones(self.values.shape[1:], dtype=bool) if self.valid is None else self.valid


class GroundPoint(NamedTuple):
    """A ground control point: pixel (row, col) lies at (x, y, z)."""

    row: float
    col: float
    x: float
    y: float
    z: float


class BandChoice(NamedTuple):
    """Which of a raster's bands a network gets."""

    indices: tuple[int, ...]
    """1-based band numbers, in the network's order."""
    palette: tuple[int, ...] = ()
    """With a colour table: which of its columns (0 red, 1 green, 2 blue) stand in for band `indices[0]`."""


@dataclass(frozen=True, slots=True)
class RasterInfo:
    """A raster's grid, bands and storage. Band-wise tuples are in band order."""

    name: str
    """What messages call it: the path, URL, or the first file of a mosaic and how many follow."""
    shape: tuple[int, int]
    """(rows, columns)."""
    dtypes: tuple[str, ...]
    """Each band's numpy dtype; reads return their common type."""
    nodata: tuple[float | int | None, ...]
    """Each band's nodata value."""
    color_interp: tuple[str, ...]
    """Each band's colour interpretation in rasterio's words: red, green, blue, nir, gray, palette, alpha ..."""
    descriptions: tuple[str | None, ...]
    crs_wkt: str | None = None
    transform: Transform | None = None
    """None where the raster is not georeferenced by an affine transform."""
    gcps: tuple[GroundPoint, ...] = ()
    gcps_crs_wkt: str | None = None
    colormap: tuple[tuple[int, int, int, int], ...] | None = None
    """Red, green, blue, alpha of each pixel value of band 1."""
    scales: tuple[float, ...] = ()
    """Each band's declared scale and, below, offset. Reads return stored values; neither is applied."""
    offsets: tuple[float, ...] = ()
    block_shape: tuple[int, int] = (0, 0)
    """(rows, columns) of the unit the file is decoded in: a tile, a strip, a zarr chunk."""
    interleaved: bool = False
    """Whether a source block holds all bands."""
    driver: str = ""
    compression: str | None = None
    alpha: int | None = None
    """1-based number of the alpha band in the file: where it is 0, no band is valid."""
    stored_mask: Literal["none", "dataset", "bands"] = "none"
    """Whether a mask is stored beside the bands: one for all, or one for each."""

    @property
    def bands(self) -> int:
        """The number of bands."""
        return len(self.dtypes)

    @property
    def dtype(self) -> str:
        """The numpy dtype that reads return: the bands' common type."""
        return np.result_type(*(np.dtype(name) for name in self.dtypes)).name

    @property
    def has_mask(self) -> bool:
        """Whether some pixel may be invalid: a mask, alpha, nodata within the dtype, or values that may be NaN."""
        declared = any(band_nodata(self, band) is not None for band in range(1, self.bands + 1))
        floating = any(np.dtype(name).kind == "f" for name in self.dtypes)
        return declared or floating or self.alpha is not None or self.stored_mask != "none"

    @property
    def flat(self) -> bool:
        """Whether the transform maps no area, so that no place can be told from it."""
        if self.transform is None:
            return False
        a, b, _, d, e, _ = self.transform
        return not all(map(math.isfinite, self.transform)) or a * e == b * d

    @property
    def pixel_bytes(self) -> int:
        """Bytes of one pixel over all bands, as reads return them."""
        return self.bands * np.dtype(self.dtype).itemsize

    @property
    def resolution_m(self) -> float | None:
        """The pixel's size in metres: the root of its area; None without CRS and transform.

        Projected: in the CRS's own unit. Geographic: along the ellipsoid at the raster's centre.
        """
        size = pixel_size_m(self)
        return None if size is None else math.sqrt(size[0] * size[1])

    def select(self, choice: BandChoice) -> RasterInfo:
        """The raster as a reader of `choice` sees it."""

        def chosen(values: tuple[_T, ...]) -> tuple[_T, ...]:
            return tuple(values[band - 1] for band in choice.indices) if values else values

        picked = replace(
            self,
            dtypes=chosen(self.dtypes),
            nodata=chosen(self.nodata),
            color_interp=chosen(self.color_interp),
            descriptions=chosen(self.descriptions),
            scales=chosen(self.scales),
            offsets=chosen(self.offsets),
        )
        if not choice.palette:
            return picked
        names = tuple(("red", "green", "blue")[column] for column in choice.palette)
        count = len(names)
        return replace(
            picked,
            dtypes=("uint8",) * count,
            nodata=(None,) * count,
            color_interp=names,
            descriptions=(None,) * count,
            scales=(1.0,) * count,
            offsets=(0.0,) * count,
            colormap=None,
        )


def band_nodata(info: RasterInfo, band: int) -> float | int | None:
    """Band `band`'s nodata value if a pixel of its dtype can have it, else None (so GDAL's masks count it too)."""
    value = info.nodata[band - 1]
    if value is None:
        return None
    dtype = np.dtype(info.dtypes[band - 1])
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not (math.isfinite(value) and limits.min <= value <= limits.max):
            return None
        return int(value)
    return float(value)


def pixel_size_m(info: RasterInfo) -> tuple[float, float] | None:
    """(along a row, along a column): a pixel's width and height in metres, or None where they are unknown."""
    if info.transform is None or info.crs_wkt is None:
        return None
    try:
        crs = CRS.from_wkt(info.crs_wkt)
    except CRSError:
        return None
    a, b, c, d, e, f = info.transform
    if crs.is_projected:
        unit = float(crs.axis_info[0].unit_conversion_factor) if crs.axis_info else 1.0
        return math.hypot(a, d) * unit, math.hypot(b, e) * unit
    geod = crs.get_geod()
    if not crs.is_geographic or geod is None:
        return None
    row, col = info.shape[0] / 2, info.shape[1] / 2
    lon, lat = a * col + b * row + c, d * col + e * row + f
    if not -90 <= lat <= 90:
        return None
    # Steps are taken towards the equator, since one across a pole would be folded back.
    step = -1.0 if (lat > 0) == (e > 0) else 1.0
    width = geod.inv(lon, lat, lon + a, lat + d)[2]
    height = geod.inv(lon, lat, lon + step * b, lat + step * e)[2]
    return float(width), float(height)


def cells(window: Window, side: int, shape: tuple[int, int]) -> Iterator[Window]:
    """The cells, `side` pixels square and cut to a raster of `shape`, of a fixed grid that make up `window`.

    What is computed by cells does not depend on the windows that ask for it.

    >>> [str(cell) for cell in cells(Window.of(3, 5, 0, 12), 8, (10, 10))]
    ['rows 0:8, columns 0:8', 'rows 0:8, columns 8:10']
    """
    inside = window.clip(shape)
    rows, cols = (range(axis.start // side * side, axis.stop, side) for axis in (inside.rows, inside.cols))
    return (Window.of(row, row + side, col, col + side).clip(shape) for row in rows for col in cols)
