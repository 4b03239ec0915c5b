"""Where two rasters show the same ground, pixel on pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass

from affine import Affine
from pyproj import CRS
from pyproj.exceptions import CRSError

from tilepipe.errors import InputError
from tilepipe.raster.info import RasterInfo
from tilepipe.raster.mosaic import TOLERANCE
from tilepipe.window import Window


@dataclass(frozen=True, slots=True)
class Overlap:
    """The pixels that two rasters share: two windows of one shape."""

    first: Window
    """In pixels of the first raster."""
    second: Window
    """In pixels of the second."""
    georeferenced: bool
    """Whether the windows were found by place; else each is a whole raster."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.first.shape


def overlap_of(first: RasterInfo, second: RasterInfo) -> Overlap:
    """The pixels that both rasters have, which must be at least one.

    With a transform on both they are found by place: CRS, pixel size and pixel grid must be the same, to a hundredth
    of a pixel. Else the rasters are laid on each other pixel by pixel, and must be of one size. InputError, naming
    both, where that does not hold.
    """
    if first.transform is None or second.transform is None:
        return _by_pixel(first, second)
    require_same_crs(first, second)
    row, col = _offset(first, second)
    shared = Window.whole(first.shape).intersect(Window.whole(second.shape).shift(row, col))
    if shared.area == 0:
        raise InputError(
            f"{second.name} and {first.name} do not overlap: {_bounds(second)} is the one's place, "
            f"{_bounds(first)} the other's (left, bottom, right, top); give two maps of one place"
        )
    return Overlap(shared, shared.shift(-row, -col), georeferenced=True)


def _by_pixel(first: RasterInfo, second: RasterInfo) -> Overlap:
    if first.shape != second.shape:
        without = " and ".join(info.name for info in (first, second) if info.transform is None)
        raise InputError(
            f"{second.name} has {second.shape[0]} x {second.shape[1]} pixels, {first.name} {first.shape[0]} x "
            f"{first.shape[1]}; without a transform, which {without} lacks, both must be of one size"
        )
    whole = Window.whole(first.shape)
    return Overlap(whole, whole, georeferenced=False)


def require_same_crs(first: RasterInfo, second: RasterInfo) -> None:
    """Nothing where both rasters are in one CRS, or in none; else InputError, naming both."""
    if (first.crs_wkt is None) != (second.crs_wkt is None):
        lacking, other = (first, second) if first.crs_wkt is None else (second, first)
        raise InputError(f"{lacking.name} has no CRS, {other.name} is in {crs_name(other)}; assign one (gdal_edit.py)")
    if first.crs_wkt is None or second.crs_wkt is None or first.crs_wkt == second.crs_wkt:
        return
    try:
        same = CRS.from_wkt(first.crs_wkt).equals(CRS.from_wkt(second.crs_wkt), ignore_axis_order=True)
    except CRSError:
        same = False
    if not same:
        raise InputError(
            f"{second.name} is in {crs_name(second)}, {first.name} in {crs_name(first)}; "
            "reproject one to the other's grid (gdalwarp -r near)"
        )


def _offset(first: RasterInfo, second: RasterInfo) -> tuple[int, int]:
    """(row, column) of the first raster on which the second one's first pixel lies."""
    (rows, cols) = second.shape
    to_first = ~_affine(first) * _affine(second)
    col, row = to_first * (0.0, 0.0)
    end_col, end_row = to_first * (float(cols), float(rows))
    skew = max(abs(to_first.b) * rows, abs(to_first.d) * cols)
    if max(abs(end_col - col - cols), abs(end_row - row - rows), skew) > TOLERANCE:
        raise InputError(
            f"{second.name} has pixels of {_pixel(second)}, {first.name} of {_pixel(first)}; "
            "resample one to the other's grid (gdalwarp -r near -tr -te)"
        )
    aside = col - round(col), row - round(row)
    if max(map(abs, aside)) > TOLERANCE:
        raise InputError(
            f"{second.name} lies {aside[0]:+.2f} columns and {aside[1]:+.2f} rows off the pixel grid of {first.name}; "
            "resample one to the other's grid (gdalwarp -r near -te)"
        )
    return round(row), round(col)


def _affine(info: RasterInfo) -> Affine:
    return Affine(*(info.transform or Affine.identity()[:6]))


def _pixel(info: RasterInfo) -> str:
    """Width and height in units of the CRS, with the sign of a grid whose rows run south."""
    found = _affine(info)
    turned = "" if found.b == found.d == 0 else f", turned by {math.degrees(math.atan2(found.d, found.a)):.4g} degrees"
    if turned:
        return f"{math.hypot(found.a, found.d):.10g} x {math.hypot(found.b, found.e):.10g}{turned}"
    return f"{found.a:.10g} x {found.e:.10g}"


def _bounds(info: RasterInfo) -> str:
    rows, cols = info.shape
    corners = [_affine(info) * (float(col), float(row)) for row in (0, rows) for col in (0, cols)]
    xs, ys = ([corner[axis] for corner in corners] for axis in (0, 1))
    return " ".join(f"{value:.10g}" for value in (min(xs), min(ys), max(xs), max(ys)))


def crs_name(info: RasterInfo) -> str:
    """What people call the raster's CRS: its code, else its name."""
    if info.crs_wkt is None:
        return "no CRS"
    try:
        crs = CRS.from_wkt(info.crs_wkt)
    except CRSError:
        return info.crs_wkt[:60]
    code = crs.to_authority()
    return crs.name if code is None else ":".join(code)
