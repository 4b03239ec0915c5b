"""How large the pixels of a map are on the ground."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS, Transformer

from tilepipe.store.attributes import parsed_crs
from tilepipe.store.spec import StoreSpec


def row_areas(spec: StoreSpec) -> NDArray[np.float64] | None:
    """Square metres of a pixel in each row (rows,); None where CRS or transform are unknown, or no lengths follow.

    Projected: the area on the map, in metres, the same in all rows. Geographic, or projected by Mercator, whose maps
    show areas larger the further they are from the equator: the area on the CRS's ellipsoid between the row's
    parallels and the pixel's meridians (J. P. Snyder, Map Projections, 1987, equation 3-12). Where the grid is rotated
    that of a pixel in the row's middle, or, by Mercator, the area on the map.
    """
    if spec.crs_wkt is None or spec.transform is None:
        return None
    crs = parsed_crs(spec.crs_wkt)
    a, b, _, d, e, _ = spec.transform
    unit = float(crs.axis_info[0].unit_conversion_factor) if crs.axis_info else 1.0
    if crs.is_projected:
        if _is_mercator(crs) and b == d == 0:
            return _mercator(crs, spec.shape[0], spec.transform)
        return np.full(spec.shape[0], abs(a * e - b * d) * unit**2)
    if not crs.is_geographic or crs.ellipsoid is None:
        return None
    return _geographic(spec.shape, np.array(spec.transform) * unit, _Ellipsoid.of(crs))


def pixel_width(spec: StoreSpec, row: float, col: float) -> float | None:
    """Metres along a row from one pixel to the next around (row, col); None where CRS or transform are unknown.

    On the ground where the map is geographic or Mercator's, else on the map: as `row_areas`.
    """
    if spec.crs_wkt is None or spec.transform is None:
        return None
    crs = parsed_crs(spec.crs_wkt)
    a, b, c, d, e, f = spec.transform
    if crs.is_projected and not _is_mercator(crs):
        unit = float(crs.axis_info[0].unit_conversion_factor) if crs.axis_info else 1.0
        return math.hypot(a, d) * unit
    geod = crs.get_geod()
    if geod is None or not (crs.is_geographic or crs.is_projected):
        return None
    x, y = a * col + b * row + c, d * col + e * row + f
    ends = np.array([x - a / 2, x + a / 2]), np.array([y - d / 2, y + d / 2])
    degrees = Transformer.from_crs(crs, CRS.from_user_input(crs.geodetic_crs), always_xy=True)
    (west, east), (start, end) = degrees.transform(*ends)
    width = geod.inv(west, start, east, end)[2]
    return float(width) if math.isfinite(width) and width > 0 else None


class _Ellipsoid(NamedTuple):
    polar: float
    """Metres from the centre to a pole."""
    eccentricity: float

    @classmethod
    def of(cls, crs: CRS) -> _Ellipsoid:
        assert crs.ellipsoid is not None, "asked of CRSs that have one"
        polar, equator = crs.ellipsoid.semi_minor_metre, crs.ellipsoid.semi_major_metre
        return cls(polar, math.sqrt(max(0.0, 1 - (polar / equator) ** 2)))


def _is_mercator(crs: CRS) -> bool:
    operation = crs.coordinate_operation
    method = "" if operation is None else operation.method_name
    upright = "Mercator" in method and not any(word in method for word in ("Transverse", "Oblique"))
    return upright and crs.ellipsoid is not None and crs.geodetic_crs is not None


def _mercator(crs: CRS, rows: int, transform: Sequence[float]) -> NDArray[np.float64]:
    # Rows lie between parallels, and all pixels of a row are as wide in longitude.
    a, _, c, _, e, f = transform
    degrees = Transformer.from_crs(crs, CRS.from_user_input(crs.geodetic_crs), always_xy=True)
    (west, east), _ = degrees.transform([c, c + a], [f, f])
    _, edges = degrees.transform(np.full(rows + 1, c), f + e * np.arange(rows + 1))
    zones = _zone(np.radians(edges), _Ellipsoid.of(crs))
    return np.abs(np.diff(zones)) * math.radians(abs(east - west) % 360)


def _geographic(shape: tuple[int, int], radians: NDArray[np.float64], ellipsoid: _Ellipsoid) -> NDArray[np.float64]:
    a, b, _, d, e, f = radians
    steps = np.arange(shape[0], dtype=np.float64)
    if b == 0 and d == 0:
        top, bottom, width = f + e * steps, f + e * (steps + 1), abs(a)
    else:
        # A square of a pixel's area in longitude and latitude, around the row's middle.
        width = math.sqrt(abs(a * e - b * d))
        middle = f + d * shape[1] / 2 + e * (steps + 0.5)
        top, bottom = middle + width / 2, middle - width / 2
    return np.abs(_zone(top, ellipsoid) - _zone(bottom, ellipsoid)) * width


def _zone(latitude: NDArray[np.float64], ellipsoid: _Ellipsoid) -> NDArray[np.float64]:
    """Square metres per radian of longitude from the equator to latitudes, in radians; none lies beyond a pole."""
    polar, eccentricity = ellipsoid
    sine = np.sin(np.clip(latitude, -math.pi / 2, math.pi / 2))
    if eccentricity == 0:
        return polar**2 * sine
    inner = eccentricity * sine
    return polar**2 / 2 * (sine / (1 - inner**2) + np.arctanh(inner) / eccentricity)
