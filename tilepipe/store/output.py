"""The output: a georeferenced zarr v3 group that is written block by block, and that a killed job resumes.

    out.zarr/
      zarr.json               written last of the metadata: without it, creation was cut short and starts again
      labels/ confidence/ probabilities/     zarr.json and shards (or chunks)
      x/ y/ spatial_ref/      coordinates and CRS
      labels/.tilepipe/       records of finished blocks, the lease, temporary files

A store of values has the array `values` in place of the three, and `values/.tilepipe`. Arrays and metadata
are the same bytes in every run of the same job, in whichever order its blocks are written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import zarr
from numpy.typing import NDArray

from tilepipe.errors import StoreBusyError, StoreError
from tilepipe.store.attributes import array_attributes, overview_group
from tilepipe.store.creation import clear, create, refuse_foreign, refuse_other, stored_in
from tilepipe.store.durable import Files
from tilepipe.store.lease import Lease, acquire, check, refuse_held
from tilepipe.store.objects import files_at
from tilepipe.store.records import EMPTY, Record, read_records, record_key
from tilepipe.store.shards import encode_block
from tilepipe.store.spec import KINDS, ArraySpec, StoreSpec
from tilepipe.store.status import Content, Status, label_content, status_of, value_content


class BlockMaps(Protocol):
    """What the network says of a block of (h, w) pixels; what the store has no array for may be None."""

    @property
    def labels(self) -> NDArray[Any] | None:
        """(h, w), of the store's label dtype."""

    @property
    def confidence(self) -> NDArray[Any] | None:
        """(h, w) uint8: the best probability times 254, 255 without data."""

    @property
    def probabilities(self) -> NDArray[Any] | None:
        """(class, h, w) uint8, times 254 with 255 without data, or float16 with NaN without."""

    @property
    def values(self) -> NDArray[Any] | None:
        """(channel, h, w) float16 or float32, with NaN without data."""


def create_or_resume(path: str | os.PathLike[str], spec: StoreSpec, overwrite: bool | StoreSpec = False) -> OutputStore:
    """The store at a path or URL, leased to this process: new, or as an earlier run of the same job left it.

    Raises StoreError where another job's store or anything else is there, StoreBusyError where another process
    writes to it, RunError where the disk is full. `overwrite` replaces a tilepipe store, its records first, and
    never anything else; a spec only the store that has this spec.
    """
    files = files_at(path, spec.kind)
    others = [files_at(path, kind) for kind in KINDS if kind != spec.kind]
    refuse_foreign(files)
    attributes = {array.name: array_attributes(spec, array) for array in spec.arrays()}
    found = None if overwrite else stored_in(files)
    if found is not None and found.kind != spec.kind:
        refuse_other(files, found, spec)
    # Each kind of store has a lease of its own. Whoever looks at the other's before and after taking its own
    # leaves nothing in a store that is being written, and of two that start at once none believes to be alone.
    _refuse_held(others)
    lease = acquire(files)
    try:
        _refuse_held(others)
        stored = _left(files, overwrite)
        if stored is not None:
            refuse_other(files, stored, spec)
            spec = stored
            files.clean()
        else:
            clear(files)
            create(files, spec, attributes)
    except BaseException:
        lease.release()
        raise
    return OutputStore(files, spec, lease.owner.token, lease)


def store_to_resume(
    path: str | os.PathLike[str], spec: StoreSpec, overwrite: bool | StoreSpec = False
) -> OutputStore | None:
    """The store that `create_or_resume` would resume, for reading; None where it would make one.

    Writes nothing, and raises what `create_or_resume` would.
    """
    files = files_at(path, spec.kind)
    refuse_foreign(files)
    stored = _left(files, overwrite)
    if stored is not None:
        refuse_other(files, stored, spec)
    _refuse_held(files_at(path, kind) for kind in KINDS)
    return None if stored is None else OutputStore(files, stored)


def _left(files: Files, overwrite: bool | StoreSpec) -> StoreSpec | None:
    """The spec of the store that is there and stays; None where a new one is made."""
    if overwrite is True:
        return None
    stored = stored_in(files)
    if overwrite is False or stored is None:
        return stored
    if stored.digest != overwrite.digest:
        raise StoreBusyError(f"{files.root} was made anew while this job started; run the same command again")
    return None


def open_store(path: str | os.PathLike[str]) -> OutputStore:
    """The store at a path or fsspec URL, for reading; StoreError where there is none."""
    files = files_at(path)
    spec = stored_in(files)
    if spec is None:
        raise StoreError(
            f"{files.root} is not a tilepipe store; give the path of one that `tilepipe segment` or "
            "`tilepipe predict` made"
        )
    return OutputStore(files_at(path, spec.kind), spec)


def stored_spec(path: str | os.PathLike[str]) -> StoreSpec | None:
    """What a resume would go by: the spec of the tilepipe store at the path; None where there is none."""
    return stored_in(files_at(path))


def _refuse_held(stores: Iterable[Files]) -> None:
    for files in stores:
        refuse_held(files)


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

    def check_lease(self) -> None:
        """Nothing where this object may write; StoreError where it was opened for reading, or lost the lease."""
        if self._token is None:
            raise StoreError(f"{self.path} was opened for reading; use create_or_resume to write to it")
        check(self.files, self._token)

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
        shape = self.spec.block_window(index).shape
        parts = {array.name: self._checked(array, getattr(maps, array.name), shape) for array in self.spec.arrays()}
        look = label_content if self.spec.kind == "labels" else value_content
        return self._write(index, parts, look(self.spec, index, parts[self.spec.kind]), info)

    def write_nodata(self, index: tuple[int, int], info: Mapping[str, Any]) -> Record:
        """The record of a block without any data, of which no array is made and no file is kept."""
        shape = self.spec.block_window(index).shape
        parts = {
            array.name: np.broadcast_to(np.array(array.fill, array.dtype), (*array.shape[:-2], *shape))
            for array in self.spec.arrays()
        }
        return self._write(index, parts, Content.empty(self.spec, shape[0] * shape[1]), info)

    def _write(
        self,
        index: tuple[int, int],
        parts: Mapping[str, NDArray[Any]],
        content: Content,
        info: Mapping[str, Any],
    ) -> Record:
        self.check_lease()
        row, col = int(index[0]), int(index[1])
        sums: dict[str, str] = {}
        for array in self.spec.arrays():
            for key, data in encode_block(array, (row, col), parts[array.name]):
                if data is None:
                    self.files.delete(key)
                else:
                    self.files.write(key, data)
                sums[key] = EMPTY if data is None else hashlib.sha256(data).hexdigest()
        self.files.settle(sums)
        said = json.loads(json.dumps(dict(info)))
        record = Record(row, col, self.digest, sums, content.counts, content.nodata, said, content.channels)
        # Again: what was written may have taken longer than another process waits for a sign of life.
        self.check_lease()
        key = record_key(self.files, row, col)
        self.files.write(key, record.to_bytes())
        self.files.settle([key])
        return record

    def _checked(self, array: ArraySpec, values: NDArray[Any] | None, shape: tuple[int, int]) -> NDArray[Any]:
        wanted = (*array.shape[:-2], *shape)
        if values is None or values.shape != wanted or values.dtype != array.dtype:
            got = "nothing" if values is None else f"{values.dtype} {values.shape}"
            raise StoreError(f"{array.name} of a block is {got}; the store needs {array.dtype} {wanted}")
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
        return status_of(self.spec, self.records())

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
        self.check_lease()
        key = record_key(self.files, *index)
        self.files.delete(key)
        self.files.settle([key])

    def array(self, name: str | None = None, factor: int = 1) -> zarr.Array[Any]:
        """One of the arrays, for reading, as zarr gives it; StoreError where the store has no such array.

        Without a name it is `labels`, or `values` in a store of values. `factor` is that of an overview that is there.
        """
        name = name or self.spec.kind
        names = [array.name for array in self.spec.arrays()]
        if name not in names:
            raise StoreError(f"{self.path} has no array {name!r}; it has {', '.join(names)}")
        path = name if factor == 1 else f"{overview_group(factor)}/{name}"
        return zarr.open_array(self.files.location, path=path, mode="r", zarr_format=3)


__all__ = [
    "BlockMaps",
    "OutputStore",
    "create_or_resume",
    "open_store",
    "stored_spec",
]
