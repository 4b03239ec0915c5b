"""`segment` for arrays: dask, numpy and xarray in; lazy maps of the same kind out, with coordinates, CRS, classes."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np

from tilepipe.errors import InputError
from tilepipe.job import Job
from tilepipe.lazy import lazy_maps
from tilepipe.member import Models
from tilepipe.options import SegmentOptions
from tilepipe.raster.cf import crs_wkt_of, nodata_of, transform_of, transform_of_centres
from tilepipe.raster.info import RasterInfo, Transform
from tilepipe.store import attributes as cf
from tilepipe.store.spec import ArraySpec, StoreSpec

if TYPE_CHECKING:
    import xarray

ROWS, COLUMNS = ("y", "lat", "latitude", "row", "rows"), ("x", "lon", "longitude", "col", "column", "columns")
"""Names of the two axes of the ground; the last two axes are taken where none has one of these."""

log = logging.getLogger("tilepipe")


def segment(array: Any, model: Models = None, options: SegmentOptions | None = None) -> Any:
    """The label map of a lazy array, as lazy: nothing is computed until it is asked for, and then only what it needs.

    array: a dask or numpy array (bands, rows, columns) or (rows, columns), in any chunks; or an xarray DataArray of
    such axes, in any order, or a Dataset whose variables are the bands. Of these two, CRS, transform, nodata and the
    bands' names are used as in a file. The map is that of `segment_raster`, exactly.

    Gives an array (rows, columns) of the same kind, or a dict or Dataset of several where the options ask for
    confidence or probabilities; with `options.values` the network's own output instead. What a user should hear, such
    as which bundled model is used, is logged as `tilepipe`. Raises TilepipeError for what does not fit together.

    Under `dask.annotate(resources={"GPU": 1})` the networks run on workers that have this resource, as long as dask
    fuses no tasks: build and compute under `dask.config.set({"optimization.fuse.active": False})`.
    """
    options = options or SegmentOptions()
    if _is_xarray(array):
        return _segment_labelled(array, model, options)
    lazy = array if isinstance(array, da.Array) else da.from_array(np.asarray(array))
    job, maps = lazy_maps(lazy, _info(lazy, "the array"), model, options)
    _tell(job)
    return _single(maps)


def _tell(job: Job) -> None:
    for note in job.notes:
        log.info(note)
    if dask.get_annotations() and dask.config.get("optimization.fuse.active", None) is not False:
        log.warning(
            "dask forgets annotations where it fuses tasks: build and compute the map under "
            'dask.config.set({"optimization.fuse.active": False})'
        )


def _single(maps: Mapping[str, Any]) -> Any:
    return next(iter(maps.values())) if len(maps) == 1 else dict(maps)


def _info(array: da.Array, name: str, **known: Any) -> RasterInfo:
    """What is known of an array as a raster; InputError for one that is none."""
    if array.ndim not in (2, 3) or 0 in array.shape or np.isnan(array.shape).any():
        raise InputError(f"{name} has shape {array.shape}; a raster is (rows, columns) or (bands, rows, columns)")
    bands, kind = (1 if array.ndim == 2 else array.shape[0]), np.dtype(array.dtype)
    if kind.kind not in "biuf":
        raise InputError(f"{name} holds {kind} values; a raster holds integers or real numbers")
    shown = {
        "nodata": (None,) * bands,
        "color_interp": ("gray",) if bands == 1 else ("undefined",) * bands,
        "descriptions": (None,) * bands,
        **known,
    }
    return RasterInfo(
        name,
        (array.shape[-2], array.shape[-1]),
        (("uint8" if kind.kind == "b" else kind.name),) * bands,
        block_shape=(array.chunksize[-2], array.chunksize[-1]),
        driver="array",
        **shown,
    )


# ---- xarray --------------------------------------------------------------------------------------------------------


def _is_xarray(array: Any) -> bool:
    return type(array).__module__.partition(".")[0] == "xarray"


def _segment_labelled(given: Any, model: Models, options: SegmentOptions) -> Any:
    whole = _one_array(given)
    rows, cols = _ground_axes(whole)
    others = [axis for axis in whole.dims if axis not in (rows, cols)]
    if len(others) > 1:
        raise InputError(
            f"{_named(whole)} has axes ({', '.join(map(str, whole.dims))}); besides {rows} and {cols} one may be the "
            "bands': select one place along the others"
        )
    ordered = whole.transpose(*others, rows, cols)
    lazy = ordered.data if isinstance(ordered.data, da.Array) else da.from_array(ordered.data)
    job, maps = lazy_maps(lazy, _labelled_info(ordered, lazy, others, (rows, cols)), model, options)
    _tell(job)
    spec = job.spec()
    found = {each.name: _labelled(maps[each.name], each, spec, ordered, (rows, cols)) for each in spec.arrays()}
    if len(found) == 1:
        return next(iter(found.values()))
    import xarray

    return xarray.Dataset(found)


def _one_array(given: Any) -> Any:
    """A Dataset's variables as the bands of one array; a DataArray as it is."""
    if not hasattr(given, "data_vars"):
        return given
    names = [name for name, each in given.data_vars.items() if each.ndim >= 2]
    if not names:
        raise InputError(f"the Dataset has no variable of rows and columns; it has {', '.join(map(str, given))}")
    if len(names) == 1:
        return given[names[0]]
    odd = next((name for name in names if given[name].dims != given[names[0]].dims), None)
    if odd is not None:
        raise InputError(f"variables {names[0]} and {odd} have different axes; give those that are the bands")
    joined = given[names].to_dataarray("band")
    joined.attrs = {**given.attrs, **given[names[0]].attrs}
    joined.encoding = given[names[0]].encoding
    joined.attrs.pop("long_name", None)
    return joined


def _named(array: Any) -> str:
    return "the array" if array.name is None else str(array.name)


def _ground_axes(array: Any) -> tuple[Hashable, Hashable]:
    if array.ndim < 2:
        raise InputError(f"{_named(array)} has axes ({', '.join(map(str, array.dims))}); rows and columns are needed")
    rows = [axis for axis in array.dims if str(axis).lower() in ROWS]
    cols = [axis for axis in array.dims if str(axis).lower() in COLUMNS]
    return (rows[0], cols[0]) if len(rows) == len(cols) == 1 else (array.dims[-2], array.dims[-1])


def _labelled_info(array: Any, lazy: da.Array, bands: list[Hashable], ground: tuple[Hashable, Hashable]) -> RasterInfo:
    mapping = _mapping(array)
    above = [array.attrs, mapping]
    count = 1 if not bands else array.sizes[bands[0]]
    nodata = nodata_of({**array.encoding, **array.attrs}, np.dtype(array.dtype))
    return _info(
        lazy,
        _named(array),
        nodata=(nodata,) * count,
        descriptions=_band_names(array, bands, count),
        crs_wkt=next(filter(None, map(crs_wkt_of, above)), None),
        transform=next(filter(None, map(transform_of, above)), None) or _from_coordinates(array, ground),
    )


def _mapping(array: Any) -> dict[str, Any]:
    """The attributes of the array's grid mapping, which may be named in three ways."""
    name = array.encoding.get("grid_mapping") or array.attrs.get("grid_mapping") or cf.GRID_MAPPING
    return dict(array.coords[name].attrs) if name in array.coords else {}


def _from_coordinates(array: Any, ground: tuple[Hashable, Hashable]) -> Transform | None:
    if any(axis not in array.coords for axis in ground):
        return None
    rows, cols = (np.asarray(array.coords[axis]) for axis in ground)
    if rows.dtype.kind not in "iuf" or cols.dtype.kind not in "iuf":
        return None
    return transform_of_centres(rows.astype(float), cols.astype(float))


def _band_names(array: Any, bands: list[Hashable], count: int) -> tuple[str | None, ...]:
    """The bands' names, by the axis's coordinates where these are words, else by `long_name`."""
    if bands and bands[0] in array.coords:
        told = np.asarray(array.coords[bands[0]])
        if told.dtype.kind in "UTO" and told.shape == (count,):
            return tuple(map(str, told))
    names = array.attrs.get("long_name")
    if isinstance(names, list | tuple) and len(names) == count:
        return tuple(map(str, names))
    return (None,) * count


def _labelled(
    lazy: da.Array, each: ArraySpec, spec: StoreSpec, given: Any, ground: tuple[Hashable, Hashable]
) -> xarray.DataArray:
    """One map with what a store of it would say: coordinates, grid mapping, classes."""
    import xarray

    coords: dict[Hashable, Any] = {}
    for axis, dim in zip(ground, ("y", "x"), strict=True):
        if axis in given.coords and given.sizes[axis] == spec.shape[dim == "x"]:
            coords[axis] = given.coords[axis]
        elif cf.has_axes(spec):
            coords[axis] = (axis, cf.axis_values(spec, dim), cf.axis_attributes(spec, dim))
    mapped = cf.has_grid_mapping(spec) or spec.crs_wkt is not None
    if mapped:
        coords[cf.GRID_MAPPING] = ((), 0, cf.spatial_ref_attributes(spec))
    leading = each.dims[:-2]
    if leading:
        names = [item.name for item in spec.classes] if leading == ("class",) else list(spec.outputs)
        coords[leading[0]] = list(names)
    found = xarray.DataArray(lazy, coords, (*leading, *ground), each.name, cf.own_attributes(spec, each))
    if mapped:
        found.encoding["grid_mapping"] = cf.GRID_MAPPING
    return found
