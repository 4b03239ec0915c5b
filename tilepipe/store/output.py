"""The output: a georeferenced zarr v3 group that is written block by block, and that a killed job resumes.

    out.zarr/
      zarr.json               written last of the metadata: without it, creation was cut short and starts again
      labels/ confidence/ probabilities/     zarr.json and shards (or chunks)
      x/ y/ spatial_ref/      coordinates and CRS
      labels/.tilepipe/       records of finished blocks, the lease, temporary files

Arrays and metadata are the same bytes in every run of the same job, in whichever order its blocks are written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import zarr
from numpy.typing import NDArray

from tilepipe.errors import StoreError
from tilepipe.store.attributes import (
    GRID_MAPPING,
    array_attributes,
    axis_attributes,
    axis_values,
    group_attributes,
    has_axes,
    has_grid_mapping,
    spatial_ref_attributes,
)
from tilepipe.store.durable import STATE, TEMPORARY, Files
from tilepipe.store.lease import Lease, acquire, check
from tilepipe.store.objects import files_at
from tilepipe.store.records import EMPTY, Record, read_records, record_key, record_rows
from tilepipe.store.shards import array_json, encode_block, encode_chunk, group_json
from tilepipe.store.spec import ARRAYS, ArraySpec, StoreSpec, differences

ROOT = "zarr.json"


class BlockMaps(Protocol):
    """What the network says of a block of (h, w) pixels."""

    @property
    def labels(self) -> NDArray[Any]:
        """(h, w), of the store's label dtype."""

    @property
    def confidence(self) -> NDArray[Any] | None:
        """(h, w) uint8: the best probability times 254, 255 without data."""

    @property
    def probabilities(self) -> NDArray[Any] | None:
        """(class, h, w) uint8, times 254 with 255 without data, or float16 with NaN without."""


@dataclass(frozen=True, slots=True)
class Status:
    """How far a job is, and what it found, over the finished blocks."""

    blocks: int
    """Blocks in all."""
    done: int
    """Blocks finished."""
    counts: tuple[int, ...]
    """Pixels of each class."""
    nodata: int
    """Pixels without data."""
    differing: int
    """Pixels, counted once per pair of overlapping tiles, whose two labels differ."""
    compared: int
    """Pixels that were compared so."""
    seconds: Mapping[str, float]
    """Seconds spent, by stage, summed over blocks."""


def create_or_resume(path: str | os.PathLike[str], spec: StoreSpec, overwrite: bool = False) -> OutputStore:
    """The store at a path or URL, leased to this process: new, or as an earlier run of the same job left it.

    Raises StoreError where another job's store or anything else is there, StoreBusyError where another process
    writes to it, RunError where the disk is full. `overwrite` replaces a tilepipe store, its records first, and
    never anything else.
    """
    files = files_at(path)
    _refuse_foreign(files)
    attributes = {array.name: array_attributes(spec, array) for array in spec.arrays()}
    lease = acquire(files)
    try:
        stored = None if overwrite else _stored_spec(files)
        if stored is not None:
            _refuse_other(files, stored, spec)
            spec = stored
            files.clean()
        else:
            _clear(files)
            _create(files, spec, attributes)
    except BaseException:
        lease.release()
        raise
    return OutputStore(files, spec, lease.owner.token, lease)


def open_store(path: str | os.PathLike[str]) -> OutputStore:
    """The store at a path or fsspec URL, for reading; StoreError where there is none."""
    files = files_at(path)
    spec = _stored_spec(files)
    if spec is None:
        raise StoreError(f"{files.root} is not a tilepipe store; give the path of one that `tilepipe segment` made")
    return OutputStore(files, spec)


def stored_spec(path: str | os.PathLike[str]) -> StoreSpec | None:
    """What a resume would go by: the spec of the tilepipe store at the path; None where there is none."""
    return _stored_spec(files_at(path))


class OutputStore:
    """An output store. Pickled copies write, too, for as long as the lease of the store they came from lasts.

    Methods may be called from any thread; no two calls may write the same block at the same time.
    """

    def __init__(self, files: Files, spec: StoreSpec, token: str | None = None, lease: Lease | None = None) -> None:
        self.files = files
        self.spec = spec
        self.digest = spec.digest
        self._token = token
        self._lease = lease

    def __reduce__(self) -> tuple[Any, ...]:
        return OutputStore, (self.files, self.spec, self._token)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the lease, if this object holds it; copies can then no longer write."""
        if self._lease is not None:
            self._lease.release()

    @property
    def path(self) -> str:
        """The path or URL, as it was given."""
        return self.files.root

    @property
    def notice(self) -> str | None:
        """What the user should be told of how the store was opened: a lease taken over."""
        return None if self._lease is None else self._lease.notice

    def write_block(self, index: tuple[int, int], maps: BlockMaps, info: Mapping[str, Any]) -> Record:
        """The block's record, once its files and then the record itself are durable.

        `index` is (row, col) in the grid of blocks. `info` is kept as JSON; `status` sums its `seconds`
        (by stage) and `disagreement` (differing, compared).
        """
        window = self.spec.block_window(index)
        found = label_counts(self._checked("labels", maps.labels, window.shape))
        counts = found[: len(self.spec.classes)]
        if sum(counts) + found[self.spec.nodata] != window.area:
            raise StoreError(
                f"block {tuple(index)} has labels beyond its {len(counts)} classes; legal are 0 to "
                f"{len(counts) - 1} and {self.spec.nodata} (nodata)"
            )
        values = {
            array.name: self._checked(array.name, getattr(maps, array.name), window.shape)
            for array in self.spec.arrays()
        }
        return self._write(index, values, counts, info)

    def write_nodata(self, index: tuple[int, int], info: Mapping[str, Any]) -> Record:
        """The record of a block without any data, of which no array is made and no file is kept."""
        shape = self.spec.block_window(index).shape
        values = {
            array.name: np.broadcast_to(np.array(array.fill, array.dtype), (*array.shape[:-2], *shape))
            for array in self.spec.arrays()
        }
        return self._write(index, values, (0,) * len(self.spec.classes), info)

    def _write(
        self,
        index: tuple[int, int],
        values: Mapping[str, NDArray[Any]],
        counts: tuple[int, ...],
        info: Mapping[str, Any],
    ) -> Record:
        if self._token is None:
            raise StoreError(f"{self.path} was opened for reading; use create_or_resume to write to it")
        check(self.files, self._token)
        row, col = int(index[0]), int(index[1])
        sums: dict[str, str] = {}
        for array in self.spec.arrays():
            for key, data in encode_block(array, (row, col), values[array.name]):
                if data is None:
                    self.files.delete(key)
                else:
                    self.files.write(key, data)
                sums[key] = EMPTY if data is None else hashlib.sha256(data).hexdigest()
        self.files.settle(sums)
        nodata = self.spec.block_window((row, col)).area - sum(counts)
        record = Record(row, col, self.digest, sums, counts, nodata, json.loads(json.dumps(dict(info))))
        # Again: what was written may have taken longer than another process waits for a sign of life.
        check(self.files, self._token)
        self.files.write(record.key, record.to_bytes())
        self.files.settle([record.key])
        return record

    def _checked(self, name: str, values: NDArray[Any] | None, shape: tuple[int, int]) -> NDArray[Any]:
        array = next(a for a in self.spec.arrays() if a.name == name)
        wanted = (*array.shape[:-2], *shape)
        if values is None or values.shape != wanted or values.dtype != array.dtype:
            got = "nothing" if values is None else f"{values.dtype} {values.shape}"
            raise StoreError(f"{name} of a block is {got}; the store needs {array.dtype} {wanted}")
        return values

    def records(self) -> Iterator[Record]:
        """The finished blocks' records, read one after another."""
        return read_records(self.files, self.digest)

    def done(self) -> set[tuple[int, int]]:
        """(row, col) of each finished block."""
        return {(record.row, record.col) for record in self.records()}

    @property
    def blocks(self) -> int:
        """How many blocks there are in all."""
        return self.spec.grid[0] * self.spec.grid[1]

    def status(self) -> Status:
        """How far the job is, and what it found."""
        counts = [0] * len(self.spec.classes)
        done = nodata = differing = compared = 0
        seconds: dict[str, float] = {}
        for record in self.records():
            done += 1
            nodata += record.nodata
            counts = [a + b for a, b in zip(counts, record.counts, strict=True)]
            pair = record.info.get("disagreement") or (0, 0)
            differing, compared = differing + int(pair[0]), compared + int(pair[1])
            for stage, spent in (record.info.get("seconds") or {}).items():
                seconds[stage] = seconds.get(stage, 0.0) + float(spent)
        return Status(self.blocks, done, tuple(counts), nodata, differing, compared, seconds)

    def verify(self) -> Iterator[str]:
        """Each fault of a finished block, in words: a file missing, changed, or there where none should be."""
        for record in self.records():
            for key, expected in record.files.items():
                found = self.files.checksum(key)
                if found != (None if expected == EMPTY else expected):
                    fault = "is missing" if found is None else "was changed after its block was finished"
                    yield f"block ({record.row}, {record.col}): {self.path}/{key} {fault}"

    def forget(self, index: tuple[int, int]) -> None:
        """Delete a block's record, so that a resumed job makes the block anew."""
        if self._token is None:
            raise StoreError(f"{self.path} was opened for reading; use create_or_resume to change it")
        check(self.files, self._token)
        key = record_key(*index)
        self.files.delete(key)
        self.files.settle([key])

    def array(self, name: str = "labels") -> zarr.Array[Any]:
        """One of the arrays, for reading, as zarr gives it; StoreError where the store has no such array."""
        names = [array.name for array in self.spec.arrays()]
        if name not in names:
            raise StoreError(f"{self.path} has no array {name!r}; it has {', '.join(names)}")
        return zarr.open_array(self.files.location, path=name, mode="r", zarr_format=3)


def label_counts(labels: NDArray[Any]) -> tuple[int, ...]:
    """How many pixels of a uint8 or uint16 array have each value that its dtype has.

    Bytes are counted in pairs, half as many look-ups, over strips that stay in cache.
    """
    total = np.zeros(1 << 16, dtype=np.int64)
    flat = np.ascontiguousarray(labels).reshape(-1)
    pairs = flat[: flat.size // 2 * 2].view(np.uint16) if flat.dtype == np.uint8 else flat
    for start in range(0, pairs.size, 1 << 19):
        total += np.bincount(pairs[start : start + (1 << 19)], minlength=1 << 16)
    if flat.dtype == np.uint8:
        table = total.reshape(256, 256)
        total = table.sum(axis=0) + table.sum(axis=1)
        if flat.size % 2:
            total[flat[-1]] += 1
    return tuple(total.tolist())


def _stored_spec(files: Files) -> StoreSpec | None:
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


def _is_ours(files: Files) -> bool:
    """Whether a tilepipe store is there, or what a killed creation or deletion left of one."""
    data = files.read(ROOT)
    if data is not None and b'"tilepipe"' in data:
        return True
    folder, state = STATE.split("/")
    return bool(files.names(STATE)) or (files.names("") == [folder] and files.names(folder) in ([], [state]))


def _refuse_foreign(files: Files) -> None:
    names = files.names("")
    if names and not _is_ours(files):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise StoreError(
            f"{files.root} holds something else ({shown}); choose another output path or remove it yourself"
        )


def _refuse_other(files: Files, stored: StoreSpec, spec: StoreSpec) -> None:
    found = differences(stored, spec)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise StoreError(
            f"{files.root} was made by another job ({'; '.join(found[:3])}{more}); repeat the first job's inputs "
            "and settings to resume it, choose another output, or use --overwrite"
        )


def _clear(files: Files) -> None:
    """Delete all that is ours but the lease: records first, so that no block counts whose files are gone."""
    for row in record_rows(files):
        files.delete(f"{STATE}/{row}")
    files.settle([f"{STATE}/-"] if files.names(STATE) else [])
    files.delete(ROOT)
    files.settle([ROOT])
    files.delete(TEMPORARY)
    for name in files.names("labels"):
        if f"labels/{name}" != STATE:
            files.delete(f"labels/{name}")
    for name in files.names(""):
        if name in (*ARRAYS[1:], "x", "y", GRID_MAPPING) or name.startswith("ovr_"):
            files.delete(name)


def _create(files: Files, spec: StoreSpec, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Write all metadata and coordinates, the group's last: its presence says that creation was finished."""
    written = []
    for array in spec.arrays():
        written.append(f"{array.name}/zarr.json")
        files.write(written[-1], array_json(array, attributes[array.name]))
    for axis in ("y", "x") if has_axes(spec) else ():
        values = axis_values(spec, axis)
        written += _write_small(files, axis, values, (axis,), axis_attributes(spec, axis))
    if has_grid_mapping(spec):
        attrs = spatial_ref_attributes(spec)
        written += _write_small(files, GRID_MAPPING, np.zeros((), np.int64), (), attrs)
    files.settle(written)
    files.write(ROOT, group_json(group_attributes(spec)))
    files.settle([ROOT])


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


__all__ = [
    "BlockMaps",
    "OutputStore",
    "Status",
    "create_or_resume",
    "label_counts",
    "open_store",
    "stored_spec",
]
