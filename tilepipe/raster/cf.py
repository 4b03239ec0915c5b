"""Georeferencing and nodata as attributes and coordinates tell them: CF, GDAL, and the zarr conventions."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import CRSError

from tilepipe.raster.info import Transform


def crs_wkt_of(attributes: Mapping[str, Any]) -> str | None:
    """The CRS that attributes name, as WKT; None where they name none."""
    gdal = attributes.get("_CRS") or {}
    for found in (
        attributes.get("spatial_ref"),
        attributes.get("crs_wkt"),
        attributes.get("proj:wkt2"),
        attributes.get("proj:code"),
        attributes.get("proj:projjson"),
        gdal.get("wkt") if isinstance(gdal, dict) else None,
        gdal.get("projjson") if isinstance(gdal, dict) else None,
    ):
        if found:
            try:
                return str(CRS.from_user_input(json.dumps(found) if isinstance(found, dict) else found).to_wkt())
            except CRSError:
                continue
    return None


def transform_of(attributes: Mapping[str, Any]) -> Transform | None:
    """The affine transform (a, b, c, d, e, f) that attributes hold; None where they hold none."""
    spatial = attributes.get("spatial:transform")
    if isinstance(spatial, Sequence) and len(spatial) >= 6:
        a, b, c, d, e, f = (float(x) for x in spatial[:6])
        return a, b, c, d, e, f
    text = attributes.get("GeoTransform")
    if isinstance(text, str) and len(text.split()) == 6:
        c, a, b, f, d, e = (float(x) for x in text.split())
        return a, b, c, d, e, f
    return None


def transform_of_centres(rows: NDArray[Any], cols: NDArray[Any]) -> Transform | None:
    """The transform from evenly spaced coordinates of pixel centres; None where they are not."""
    lines = []
    for values in (rows, cols):
        if values.ndim != 1 or len(values) < 2:
            return None
        step = (values[-1] - values[0]) / (len(values) - 1)
        if step == 0 or not np.allclose(np.diff(values), step, rtol=1e-3, atol=0):
            return None
        lines.append((float(values[0] - step / 2), float(step)))
    (top, height), (left, width) = lines
    return width, 0.0, left, 0.0, height, top


def nodata_of(attributes: Mapping[str, Any], dtype: np.dtype[Any]) -> float | int | None:
    """The declared nodata value. The array's fill value does not count: zarr always has one."""
    value: Any = next((attributes[key] for key in ("_FillValue", "nodata", "missing_value") if key in attributes), None)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        value = _number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if dtype.kind in "iu" and math.isfinite(value) and value == int(value) else float(value)


def _number(text: str) -> float | None:
    """A number written as text, or, as xarray writes floats to zarr v3, as the base64 of its eight bytes."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return float(struct.unpack("<d", base64.b64decode(text))[0])
    except (ValueError, struct.error):
        return None
