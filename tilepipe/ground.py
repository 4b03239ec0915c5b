"""How large the pixels of a map are on the ground, row by row."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tilepipe.store.attributes import parsed_crs
from tilepipe.store.spec import StoreSpec


def row_areas(spec: StoreSpec) -> NDArray[np.float64] | None:
    """Square metres of a pixel in each row (rows,); None where CRS or transform are unknown, or no lengths follow.

    Projected: the area on the map, in metres, the same in all rows. Geographic: the area on the CRS's ellipsoid
    between the row's parallels and the pixel's meridians (J. P. Snyder, Map Projections, 1987, equation 3-12); where
    the grid is rotated, that of a pixel in the row's middle.
    """
    if spec.crs_wkt is None or spec.transform is None:
        return None
    crs = parsed_crs(spec.crs_wkt)
    a, b, _, d, e, _ = spec.transform
    unit = float(crs.axis_info[0].unit_conversion_factor) if crs.axis_info else 1.0
    if crs.is_projected:
        return np.full(spec.shape[0], abs(a * e - b * d) * unit**2)
    if not crs.is_geographic or crs.ellipsoid is None:
        return None
    polar, equator = crs.ellipsoid.semi_minor_metre, crs.ellipsoid.semi_major_metre
    return _geographic(
        spec.shape, np.array(spec.transform) * unit, polar, math.sqrt(max(0.0, 1 - (polar / equator) ** 2))
    )


def _geographic(
    shape: tuple[int, int], radians: NDArray[np.float64], polar: float, eccentricity: float
) -> NDArray[np.float64]:
    a, b, _, d, e, f = radians
    steps = np.arange(shape[0], dtype=np.float64)
    if b == 0 and d == 0:
        top, bottom, width = f + e * steps, f + e * (steps + 1), abs(a)
    else:
        # A square of a pixel's area in longitude and latitude, around the row's middle.
        width = math.sqrt(abs(a * e - b * d))
        middle = f + d * shape[1] / 2 + e * (steps + 0.5)
        top, bottom = middle + width / 2, middle - width / 2
    return np.abs(_zone(top, polar, eccentricity) - _zone(bottom, polar, eccentricity)) * width


def _zone(latitude: NDArray[np.float64], polar: float, eccentricity: float) -> NDArray[np.float64]:
    """Square metres per radian of longitude from the equator to latitudes, in radians; none lies beyond a pole."""
    sine = np.sin(np.clip(latitude, -math.pi / 2, math.pi / 2))
    if eccentricity == 0:
        return polar**2 * sine
    inner = eccentricity * sine
    return polar**2 / 2 * (sine / (1 - inner**2) + np.arctanh(inner) / eccentricity)
