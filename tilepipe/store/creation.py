"""What is at an output's path before a job writes there, and how a new store's metadata comes to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import StoreError
from tilepipe.store.attributes import (
    GRID_MAPPING,
    axis_attributes,
    axis_values,
    group_attributes,
    has_axes,
    has_grid_mapping,
    spatial_ref_attributes,
)
from tilepipe.store.durable import STATE, Files, state_folder, temporary_folder
from tilepipe.store.shards import array_json, encode_chunk, group_json
from tilepipe.store.spec import ARRAYS, KINDS, ArraySpec, StoreSpec, differences

ROOT = "zarr.json"
OVERVIEW = "ovr_"
"""How the names of overviews' groups begin."""
OVERVIEWS = "overviews"
"""The folder, in that of the records, that says which overviews are there or being made."""


def stored_in(files: Files) -> StoreSpec | None:
    """The spec in the group's attributes; None where there is no group, StoreError where it is not ours."""
    data = files.read(ROOT)
    if data is None:
        return None
    try:
        stored = json.loads(data)["attributes"]["tilepipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{files.root}/{ROOT} is not a tilepipe store's; choose another output path, "
            "or --overwrite where it is a damaged one"
        ) from error
    return StoreSpec.from_json(stored, files.root)


def is_ours(files: Files) -> bool:
    """Whether a tilepipe store is there, or what a killed creation or deletion left of one."""
    data = files.read(ROOT)
    if data is not None and b'"tilepipe"' in data:
        return True
    if any(files.names(state_folder(kind)) for kind in KINDS):
        return True
    names = files.names("")
    return len(names) == 1 and names[0] in KINDS and files.names(names[0]) in ([], [STATE])


def refuse_foreign(files: Files) -> None:
    """Nothing where the path is free or holds a tilepipe store; else StoreError."""
    names = files.names("")
    if names and not is_ours(files):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise StoreError(
            f"{files.root} holds something else ({shown}); choose another output path or remove it yourself"
        )


def refuse_other(files: Files, stored: StoreSpec, spec: StoreSpec) -> None:
    """Nothing where the stored spec is this job's; else StoreError, naming what differs."""
    found = differences(stored, spec)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise StoreError(
            f"{files.root} was made by another job ({'; '.join(found[:3])}{more}); repeat the first job's inputs "
            "and settings to resume it, choose another output, or use --overwrite"
        )


def clear(files: Files) -> None:
    """Delete all that is ours but the lease: records first, so that no block counts whose files are gone."""
    for state in map(state_folder, KINDS):
        files.delete(f"{state}/{OVERVIEWS}")
        rows = [name for name in files.names(state) if name.isdigit()]
        for row in rows:
            files.delete(f"{state}/{row}")
        files.settle([f"{state}/-"])
    files.delete(ROOT)
    files.settle([ROOT])
    files.delete(temporary_folder(files))
    own = files.state.split("/")[0]
    for name in files.names(own):
        if name != STATE:
            files.delete(f"{own}/{name}")
    for name in files.names(""):
        if name != own and (name in (*ARRAYS, "x", "y", GRID_MAPPING) or name.startswith(OVERVIEW)):
            files.delete(name)


def create(files: Files, spec: StoreSpec, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Write all metadata and coordinates, the group's last: its presence says that creation was finished."""
    written = []
    for array in spec.arrays():
        written.append(f"{array.name}/zarr.json")
        files.write(written[-1], array_json(array, attributes[array.name]))
    written += write_coordinates(files, spec)
    files.settle(written)
    files.write(ROOT, group_json(group_attributes(spec)))
    files.settle([ROOT])


def write_coordinates(files: Files, spec: StoreSpec, group: str = "", suffix: str = "") -> list[str]:
    """The keys of the files of y, x and spatial_ref, as far as the grid has them, once they are written.

    They lie in `group` ("" or a name with a slash at its end), and `suffix` ends the names of y and x.
    """
    written = []
    for axis in ("y", "x") if has_axes(spec) else ():
        name, values = f"{axis}{suffix}", axis_values(spec, axis)
        written += _write_small(files, f"{group}{name}", values, (name,), axis_attributes(spec, axis))
    if has_grid_mapping(spec):
        attributes = spatial_ref_attributes(spec)
        written += _write_small(files, f"{group}{GRID_MAPPING}", np.zeros((), np.int64), (), attributes)
    return written


def _write_small(
    files: Files, name: str, values: NDArray[Any], dims: tuple[str, ...], attributes: Mapping[str, Any]
) -> list[str]:
    """The keys of a small array, written as one chunk."""
    array = ArraySpec(name, values.dtype, 0, values.shape, values.shape, values.shape, dims, sharded=False)
    keys = [f"{name}/zarr.json"]
    files.write(keys[0], array_json(array, attributes))
    chunk = encode_chunk(values, array)
    if chunk is not None:
        keys.append("/".join([name, "c", *["0"] * values.ndim]))
        files.write(keys[-1], chunk)
    return keys
