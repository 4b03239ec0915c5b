"""Zarr arrays, v2 or v3, as rasters: their georeferencing from attributes, their pixels by zarr-python."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import BaseZarrError

from tilepipe.errors import InputError, ReadError
from tilepipe.raster.cf import crs_wkt_of, nodata_of, transform_of, transform_of_centres
from tilepipe.raster.identity import file_identity
from tilepipe.raster.info import GroundPoint, RasterInfo, Transform
from tilepipe.window import Window

STAGED = "tilepipe_raster"
"""The attribute in which a staged raster's array keeps what zarr has no field for."""

_METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup")
_ZARR_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, BaseZarrError)
_COORDINATES = {"x", "y", "lat", "lon", "latitude", "longitude", "band", "time", "spatial_ref", "crs"}


@dataclass(frozen=True, slots=True)
class ZarrRecipe:
    """How to open a zarr array anywhere."""

    name: str
    array: str
    """The array's path or URL."""
    mask: str | None = None
    """The path or URL of the array of flags that says where pixels are valid: (y, x) or (band, y, x)."""

    def backend(self) -> ZarrBackend:
        """A backend that opens the arrays when they are first read."""
        return ZarrBackend(self)

    def identity(self) -> list[dict[str, Any]]:
        """The digest of each metadata file, and the modification times of it and of the chunks' folder."""
        parts = []
        for node in filter(None, (os.path.dirname(self.array), self.array, self.mask)):
            part: dict[str, Any] = {"path": node if "://" in node else os.path.abspath(node)}
            if "://" in node:
                part["metadata"] = _digest(json.dumps(_attributes(node), sort_keys=True, default=str).encode())
            for file in (os.path.join(node, name) for name in _METADATA):
                if os.path.isfile(file):
                    with open(file, "rb") as opened:
                        part[os.path.basename(file)] = _digest(opened.read())
                    part[f"{os.path.basename(file)} mtime_ns"] = file_identity(file)["mtime_ns"]
            chunks = os.path.join(node, "c")
            if os.path.isdir(chunks):
                part["chunks mtime_ns"] = os.stat(chunks).st_mtime_ns
            parts.append(part)
        return parts


class ZarrBackend:
    """Reads a zarr array from any number of threads: zarr-python's arrays may be shared."""

    def __init__(self, recipe: ZarrRecipe) -> None:
        self._recipe = recipe
        self._array: Any = None
        self._mask: Any = None

    def fetch(self, bands: Sequence[int], window: Window, out: NDArray[Any]) -> None:
        """Fill `out` (bands, rows, columns) with the 1-based `bands` of `window`, which lies in the raster."""
        try:
            if self._array is None:
                self._array = zarr.open_array(self._recipe.array, mode="r")
            _fill(self._array, bands, window, out)
        except _ZARR_ERRORS as error:
            raise ReadError(f"{self._recipe.name}: cannot read {window}: {_reason(error)}") from error

    def fetch_mask(self, bands: Sequence[int], window: Window) -> NDArray[np.bool_]:
        """(rows, columns): where the flags of every one of `bands` are set."""
        try:
            if self._mask is None:
                self._mask = zarr.open_array(str(self._recipe.mask), mode="r")
            planes = bands if self._mask.ndim == 3 else (1,)
            flags = np.empty((len(planes), *window.shape), dtype=bool)
            _fill(self._mask, planes, window, flags)
        except _ZARR_ERRORS as error:
            raise ReadError(f"{self._recipe.name}: cannot read the mask of {window}: {_reason(error)}") from error
        return np.asarray(flags.all(axis=0))

    def close(self) -> None:
        """Let go of the arrays."""
        self._array = self._mask = None


def is_zarr(path: str) -> bool:
    """Whether `path` is a zarr array or group: a folder with its metadata, or a URL that names one."""
    if "://" in path:
        return any(part.endswith(".zarr") for part in path.split("/"))
    return os.path.isdir(path) and any(os.path.isfile(os.path.join(path, name)) for name in _METADATA)


def describe_zarr(path: str) -> tuple[ZarrRecipe, RasterInfo]:
    """How to open the raster at `path` (an array, or a group with one raster in it), and what it is."""
    path = path.rstrip("/") if "://" in path else os.path.abspath(path)
    try:
        node = zarr.open(path, mode="r")
        if isinstance(node, zarr.Group):
            inner = _raster_of(path, node)
            path, array = f"{path}/{inner}", node[inner]
        else:
            array = node
    except _ZARR_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot open {path}: {_reason(error)}") from error
    if not isinstance(array, zarr.Array):
        raise InputError(f"{path} is a zarr group in a group; name the array in it")
    return _describe(path, array)


def _describe(path: str, array: Any) -> tuple[ZarrRecipe, RasterInfo]:
    attributes = dict(array.attrs)
    _require_raster(path, array, attributes)
    count = 1 if array.ndim == 2 else array.shape[0]
    parent = path.rpartition("/")[0]
    staged = attributes.get(STAGED)
    dtype = np.dtype("uint8") if array.dtype.kind == "b" else np.dtype(array.dtype).newbyteorder("=")
    wkt, transform = _georeference(array, attributes, parent)
    info = RasterInfo(
        name=path,
        shape=(array.shape[-2], array.shape[-1]),
        dtypes=(dtype.name,) * count,
        nodata=(nodata_of(attributes, dtype),) * count,
        color_interp=("gray",) * count if count == 1 else ("undefined",) * count,
        descriptions=(None,) * count,
        crs_wkt=wkt,
        transform=transform,
        scales=(1.0,) * count,
        offsets=(0.0,) * count,
        block_shape=tuple(array.chunks[-2:]),
        interleaved=array.ndim == 3 and array.chunks[0] > 1,
        driver="zarr",
    )
    if staged is None:
        return ZarrRecipe(path, path), info
    info = staged_info(info, staged)
    mask = f"{parent}/valid" if info.stored_mask != "none" else None
    return ZarrRecipe(path, path, mask), info


def staged_facts(info: RasterInfo) -> dict[str, Any]:
    """What of `info` a staged array keeps in its attribute, as JSON; `staged_info` undoes it."""
    return {
        "dtypes": list(info.dtypes),
        "nodata": [repr(value) if isinstance(value, float) else value for value in info.nodata],
        "color_interp": list(info.color_interp),
        "descriptions": list(info.descriptions),
        "crs_wkt": info.crs_wkt,
        "transform": None if info.transform is None else list(info.transform),
        "gcps": [list(point) for point in info.gcps],
        "gcps_crs_wkt": info.gcps_crs_wkt,
        "colormap": None if info.colormap is None else [list(entry) for entry in info.colormap],
        "scales": list(info.scales),
        "offsets": list(info.offsets),
        "alpha": info.alpha,
        "stored_mask": info.stored_mask,
    }


def staged_info(info: RasterInfo, facts: Mapping[str, Any]) -> RasterInfo:
    """`info` with what a staged array's attribute tells."""
    transform, colormap = facts["transform"], facts["colormap"]
    return replace(
        info,
        dtypes=tuple(facts["dtypes"]),
        nodata=tuple(float(value) if isinstance(value, str) else value for value in facts["nodata"]),
        color_interp=tuple(facts["color_interp"]),
        descriptions=tuple(facts["descriptions"]),
        crs_wkt=facts["crs_wkt"],
        transform=None if transform is None else tuple(transform),
        gcps=tuple(GroundPoint(*point) for point in facts["gcps"]),
        gcps_crs_wkt=facts["gcps_crs_wkt"],
        colormap=None if colormap is None else tuple(tuple(entry) for entry in colormap),
        scales=tuple(facts["scales"]),
        offsets=tuple(facts["offsets"]),
        alpha=facts["alpha"],
        stored_mask=facts["stored_mask"],
    )


def _fill(array: Any, bands: Sequence[int], window: Window, out: NDArray[Any]) -> None:
    rows = slice(window.rows.start, window.rows.stop)
    cols = slice(window.cols.start, window.cols.stop)
    if array.ndim == 2:
        for plane in out:
            plane[...] = array[rows, cols]
        return
    for first, length in _runs(bands):
        start = bands[first] - 1
        out[first : first + length] = array[start : start + length, rows, cols]


def _runs(bands: Sequence[int]) -> Iterable[tuple[int, int]]:
    """(first, length) of each run of bands that follow each other: one read each."""
    first = 0
    for i in range(1, len(bands) + 1):
        if i == len(bands) or bands[i] != bands[i - 1] + 1:
            yield first, i - first
            first = i


def _raster_of(path: str, group: zarr.Group) -> str:
    arrays = dict(group.arrays())
    staged = [name for name, array in arrays.items() if STAGED in array.attrs]
    names = staged or [
        name
        for name, array in arrays.items()
        if array.ndim in (2, 3) and array.dtype.kind in "biuf" and name not in _COORDINATES
    ]
    if len(names) == 1:
        return names[0]
    if not names:
        raise InputError(f"{path} is a zarr group without a (y, x) or (band, y, x) array; it holds {sorted(arrays)}")
    raise InputError(f"{path} is a zarr group of {len(names)} rasters: name one, {path}/{{{','.join(sorted(names))}}}")


def _require_raster(path: str, array: Any, attributes: Mapping[str, Any]) -> None:
    names = _dimensions(array, attributes)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise InputError(f"{path} has shape {array.shape}; a raster is (y, x) or (band, y, x), none of them empty")
    if array.dtype.kind not in "biuf":
        raise InputError(f"{path} holds {array.dtype} values; a raster holds integers or real numbers")
    if array.ndim == 3 and names and names[2] in ("band", "bands", "channel", "channels", "c", "time"):
        raise InputError(f"{path} has axes ({', '.join(map(str, names))}); a raster's are (band, y, x): transpose it")


def _dimensions(array: Any, attributes: Mapping[str, Any]) -> tuple[str | None, ...]:
    names = getattr(array.metadata, "dimension_names", None) or attributes.get("_ARRAY_DIMENSIONS") or ()
    return tuple(names)


def _georeference(array: Any, attributes: Mapping[str, Any], parent: str) -> tuple[str | None, Transform | None]:
    """(CRS as WKT, transform) from the array's attributes, its grid mapping, its group's, or its coordinates."""
    above = _attributes(parent)
    mapping = _attributes(f"{parent}/{attributes.get('grid_mapping', 'spatial_ref')}")
    wkt = next(filter(None, map(crs_wkt_of, (attributes, mapping, above))), None)
    transform = next(filter(None, map(transform_of, (attributes, mapping, above))), None)
    if transform is None:
        names = _dimensions(array, attributes)[-2:]
        transform = _from_coordinates(parent, names, array.shape[-2:]) if len(names) == 2 else None
    return wkt, transform


def _from_coordinates(parent: str, names: Sequence[str | None], shape: tuple[int, int]) -> Transform | None:
    """The transform from evenly spaced coordinates of pixel centres; None where there are none."""
    try:
        rows, cols = (np.asarray(zarr.open_array(f"{parent}/{name}", mode="r")[:], dtype=float) for name in names)
    except _ZARR_ERRORS:
        return None
    return transform_of_centres(rows, cols) if (rows.size, cols.size) == shape else None


def _attributes(path: str) -> dict[str, Any]:
    try:
        return dict(zarr.open(path, mode="r").attrs)
    except _ZARR_ERRORS:
        return {}


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
