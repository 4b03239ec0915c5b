"""The attributes by which readers find CRS, pixel grid, nodata, classes and channels of an output store.

Each reader knows another set, so all are written: CF (grid_mapping, x, y, flags) for xarray, rioxarray and GDAL,
the zarr conventions `proj:` and `spatial:` on the arrays themselves (GDAL ignores the group's), and `multiscales`
on the group. Two attributes are as important by their presence as by their absence: `coordinates: spatial_ref`,
without which `open_zarr(...).rio.crs` is None, and `_FillValue`, which would turn labels into floats.

A grid that is rotated against its CRS has no 1-D x and y: it carries `spatial:transform` and `GeoTransform` only.
A grid with control points instead of a transform has neither: its `spatial_ref` holds the points as rioxarray does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS
from pyproj.exceptions import CRSError

from tilepipe.errors import StoreError
from tilepipe.store.spec import ArraySpec, ClassLike, ControlPoint, StoreSpec

Attributes = dict[str, Any]

PROJ: Attributes = {
    "uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f",
    "name": "proj:",
    "schema_url": "https://raw.githubusercontent.com/zarr-experimental/geo-proj/refs/tags/v1/schema.json",
    "spec_url": "https://github.com/zarr-experimental/geo-proj/blob/v1/README.md",
    "description": "Coordinate reference system information for geospatial data",
}
SPATIAL: Attributes = {
    "uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
    "name": "spatial:",
    "schema_url": "https://raw.githubusercontent.com/zarr-conventions/spatial/refs/tags/v1/schema.json",
    "spec_url": "https://github.com/zarr-conventions/spatial/blob/v1/README.md",
    "description": "Spatial coordinate information",
}
MULTISCALES: Attributes = {
    "uuid": "d35379db-88df-4056-af3a-620245f8e347",
    "name": "multiscales",
    "schema_url": "https://raw.githubusercontent.com/zarr-conventions/multiscales/refs/tags/v1/schema.json",
    "spec_url": "https://github.com/zarr-conventions/multiscales/blob/v1/README.md",
    "description": "Multiscale layout of zarr datasets",
}
GRID_MAPPING = "spatial_ref"
RESAMPLING = {"labels": "mode", "values": "average"}
"""How coarser scales come of finer ones, by the kind of store."""

LONGEST_AXIS = 1 << 24
"""Pixels up to which an axis gets coordinates: 128 MiB of them."""


@lru_cache(maxsize=8)
def parsed_crs(wkt: str) -> CRS:
    """The CRS that the WKT describes; StoreError where it describes none."""
    try:
        return CRS.from_wkt(wkt)
    except CRSError as error:
        raise StoreError(f"the CRS {wkt[:60]!r} is not valid WKT; give the input a CRS that PROJ knows") from error


def array_attributes(spec: StoreSpec, array: ArraySpec) -> Attributes:
    """The attributes of labels, confidence, probabilities or values."""
    return {**own_attributes(spec, array), **_grid_attributes(spec)}


def own_attributes(spec: StoreSpec, array: ArraySpec) -> Attributes:
    """What an array's values mean, without where they lie."""
    own = {
        "labels": _label_attributes,
        "confidence": _confidence_attributes,
        "probabilities": _probability_attributes,
        "values": _value_attributes,
    }
    return own[array.name](spec)


def group_attributes(spec: StoreSpec, levels: Mapping[int, StoreSpec] | None = None) -> Attributes:
    """The group's attributes: conventions, the layout of scales, and `tilepipe`.

    `levels` are the overviews: for each factor the spec of its grid.
    """
    layout: list[Attributes] = [{"asset": spec.kind, **_scale(1, spec)}]
    for factor, level in (levels or {}).items():
        resampling = {"derived_from": spec.kind, "resampling_method": RESAMPLING[spec.kind]}
        layout.append({"asset": overview_group(factor), **resampling, **_scale(factor, level)})
    georeference = _group_georeference(spec, ("y", "x"))
    conventions = [*georeference.pop("zarr_conventions", []), MULTISCALES]
    return {
        "Conventions": "CF-1.11",
        **georeference,
        "zarr_conventions": conventions,
        "multiscales": {"resampling_method": RESAMPLING[spec.kind], "layout": layout},
        "tilepipe": spec.to_json(),
    }


def overview_group(factor: int) -> str:
    """The name of the group whose pixels are `factor` of the map's a side."""
    return f"ovr_{factor}x"


def overview_group_attributes(level: StoreSpec, dims: tuple[str, str]) -> Attributes:
    """The attributes of an overview's group."""
    return {"Conventions": "CF-1.11", **_group_georeference(level, dims)}


def overview_attributes(level: StoreSpec, array: ArraySpec, dims: tuple[str, str]) -> Attributes:
    """The attributes of an overview of `array`, whose last axes are `dims`."""
    found = array_attributes(level, array)
    if "spatial:dimensions" in found:
        found["spatial:dimensions"] = list(dims)
    method = "mode" if array.name == "labels" else "mean"
    return {**found, "cell_methods": f"{dims[0]}: {dims[1]}: {method}"}


def _scale(factor: int, level: StoreSpec) -> Attributes:
    found: Attributes = {"transform": {"scale": [float(factor)] * 2, "translation": [0.0, 0.0]}}
    if level.transform is not None:
        found |= {"spatial:shape": list(level.shape), "spatial:transform": _floats(level.transform)}
    return found


def _group_georeference(spec: StoreSpec, dims: tuple[str, str]) -> Attributes:
    if spec.transform is None:
        return {}
    conventions = [*([PROJ] if spec.crs_wkt else []), SPATIAL]
    return {**_proj_attributes(spec), "spatial:dimensions": list(dims), "zarr_conventions": conventions}


def spatial_ref_attributes(spec: StoreSpec) -> Attributes:
    """The attributes of the CF grid mapping variable; `GeoTransform` is in GDAL's order (c, a, b, f, d, e)."""
    found: Attributes = {}
    if spec.crs_wkt is not None:
        crs = parsed_crs(spec.crs_wkt)
        found |= {key: _jsonable(value) for key, value in crs.to_cf().items()}
        found["spatial_ref"] = found["crs_wkt"] = crs.to_wkt()
    if spec.transform is not None:
        a, b, c, d, e, f = _floats(spec.transform)
        found["GeoTransform"] = " ".join(map(repr, (c, a, b, f, d, e)))
    elif spec.gcps:
        found["gcps"] = json.dumps(_points(spec.gcps))
    return found


def _points(points: Sequence[ControlPoint]) -> Attributes:
    """Control points as the GeoJSON that rioxarray keeps them in."""
    features = [
        {
            "type": "Feature",
            "properties": {"id": str(number), "info": "", "row": point.row, "col": point.col},
            "geometry": {"type": "Point", "coordinates": [point.x, point.y, point.z]},
        }
        for number, point in enumerate(points, 1)
    ]
    return {"type": "FeatureCollection", "features": features}


def has_grid_mapping(spec: StoreSpec) -> bool:
    """Whether something is known of where the grid lies."""
    return spec.transform is not None or bool(spec.gcps)


def has_axes(spec: StoreSpec) -> bool:
    """Whether 1-D x and y describe the grid.

    Not where it is rotated or placed by control points, nor where they would be too long to hold in memory.
    """
    by_points = spec.transform is None and bool(spec.gcps)
    return not spec.rotated and not by_points and max(spec.shape) <= LONGEST_AXIS


def axis_values(spec: StoreSpec, axis: str) -> NDArray[np.float64]:
    """The centres of the pixels along "x" or "y", in the CRS's units; in pixels where there is no transform."""
    centres = np.arange(spec.shape[1 if axis == "x" else 0], dtype=np.float64) + 0.5
    if spec.transform is None:
        return centres
    a, _, c, _, e, f = spec.transform
    return c + a * centres if axis == "x" else f + e * centres


def axis_attributes(spec: StoreSpec, axis: str) -> Attributes:
    """The CF attributes of "x" or "y"."""
    found: Attributes = {"axis": axis.upper()}
    if spec.transform is None:
        return {**found, "long_name": f"pixel {'column' if axis == 'x' else 'row'}", "units": "1"}
    if spec.crs_wkt is None:
        return {**found, "long_name": f"{axis} coordinate"}
    for described in parsed_crs(spec.crs_wkt).cs_to_cf():
        if described.get("axis") == axis.upper():
            found |= {key: _jsonable(value) for key, value in described.items()}
    found.setdefault("standard_name", f"projection_{axis}_coordinate")
    return found


def flag_meanings(classes: Sequence[ClassLike]) -> list[str]:
    """Each class's name as CF wants it: one word of letters, digits and "_-.+@", different from the others'.

    >>> from tilepipe.store.spec import LabelClass
    >>> flag_meanings([LabelClass("bare soil", (0, 0, 0)), LabelClass("bare/soil", (0, 0, 0))])
    ['bare_soil', 'bare_soil_1']
    """
    found: list[str] = []
    for value, label in enumerate(classes):
        word = re.sub(r"[^A-Za-z0-9_.+@-]+", "_", label.name).strip("_") or f"class_{value}"
        while word in found:
            word = f"{word}_{value}"
        found.append(word)
    return found


def _label_attributes(spec: StoreSpec) -> Attributes:
    colors = [label.color for label in spec.classes]
    return {
        "long_name": "class of the highest score",
        "flag_values": list(range(len(spec.classes))),
        "flag_meanings": " ".join(flag_meanings(spec.classes)),
        "flag_colors": " ".join("#{:02x}{:02x}{:02x}".format(*color) for color in colors),
        "class_names": [label.name for label in spec.classes],
        "class_colors": [list(color) for color in colors],
        "nodata": spec.nodata,
    }


def _confidence_attributes(spec: StoreSpec) -> Attributes:  # noqa: ARG001 - one signature for all arrays
    return {"long_name": "probability of the label, times 254", "valid_range": [0, 254], "nodata": 255}


def _probability_attributes(spec: StoreSpec) -> Attributes:
    names = {"class_names": [label.name for label in spec.classes]}
    if spec.probabilities == "float16":
        return {"long_name": "probability of each class", **names}
    return {"long_name": "probability of each class, times 254", "valid_range": [0, 254], "nodata": 255, **names}


def _value_attributes(spec: StoreSpec) -> Attributes:
    return {"long_name": "output of the network", "channel_names": list(spec.outputs)}


def _grid_attributes(spec: StoreSpec) -> Attributes:
    if not has_grid_mapping(spec):
        return {}
    named = {"grid_mapping": GRID_MAPPING, "coordinates": GRID_MAPPING}
    if spec.transform is None:
        return named
    return {
        **named,
        **_proj_attributes(spec),
        "spatial:dimensions": ["y", "x"],
        "spatial:shape": list(spec.shape),
        "spatial:transform": _floats(spec.transform),
        "spatial:bbox": bounds(spec.shape, spec.transform),
        "spatial:registration": "pixel",
        "zarr_conventions": [*([PROJ] if spec.crs_wkt else []), SPATIAL],
    }


def _proj_attributes(spec: StoreSpec) -> Attributes:
    if spec.crs_wkt is None:
        return {}
    crs = parsed_crs(spec.crs_wkt)
    authority = crs.to_authority(min_confidence=100)
    if authority is not None:
        return {"proj:code": ":".join(authority)}
    return {"proj:wkt2": crs.to_wkt("WKT2_2019")}


def bounds(shape: tuple[int, int], transform: Sequence[float]) -> list[float]:
    """(xmin, ymin, xmax, ymax) of a grid of `shape` (rows, columns) under (a, b, c, d, e, f).

    >>> bounds((1000, 1200), (10, 0, 500000, 0, -10, 5000000))
    [500000.0, 4990000.0, 512000.0, 5000000.0]
    """
    a, b, c, d, e, f = _floats(transform)
    corners = [(col, row) for row in (0, shape[0]) for col in (0, shape[1])]
    xs = [a * col + b * row + c for col, row in corners]
    ys = [d * col + e * row + f for col, row in corners]
    return [min(xs), min(ys), max(xs), max(ys)]


def _floats(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values]


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
