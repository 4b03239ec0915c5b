"""Writing the overviews of a finished store, square by square, so that a killed job goes on where it was.

    squares -> their shards of the large levels, and a record with their parts of the small ones
            -> shards of the small levels -> metadata -> the group's `multiscales` -> the marker

    labels/.tilepipe/overviews/done.json                 what the overviews that are there were made from
    labels/.tilepipe/overviews/<digest>/<row>-<col>.npz  a square that is done, while they are being made

What is there counts only for the content it was made from: a digest of all blocks' checksums. Readers see the
overviews once they are whole, since the arrays' own metadata and the group's list of levels come last.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray

from tilepipe.errors import ReadError, StoreError
from tilepipe.store.attributes import (
    group_attributes,
    overview_attributes,
    overview_group,
    overview_group_attributes,
)
from tilepipe.store.creation import OVERVIEW, OVERVIEWS, ROOT, write_coordinates
from tilepipe.store.output import OutputStore
from tilepipe.store.pyramid import Pyramid
from tilepipe.store.records import Record
from tilepipe.store.reduction import majority_levels, mean_levels
from tilepipe.store.shards import array_json, encode_block, group_json
from tilepipe.store.spec import ArraySpec, StoreSpec
from tilepipe.window import Window

T = TypeVar("T")
R = TypeVar("R")

Square = tuple[int, int]
Layer = tuple[int, ...]
"""() of an array of (y, x), (n,) of one of (n, y, x)."""


def write_overviews(
    store: OutputStore,
    pyramid: Pyramid,
    overwrite: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> None:
    """Make the overviews of a finished store that this process holds the lease of; those that are there stay.

    `progress` hears of (squares done, squares in all, pixels of this run) and may raise to stop. Raises StoreError
    for an unfinished store, ReadError where a block cannot be read back.
    """
    digest = pyramid.digest(content_digest(store))
    if pyramid.levels == 0:
        return
    job = _Job(store, pyramid, digest)
    if overwrite or not job.finished():
        job.begin(overwrite)
        job.make_squares(progress)
        job.join_squares()
        job.publish()
    job.tidy()


def overview_factors(store: OutputStore, records: Sequence[Record]) -> list[int]:
    """The factors of the overviews that fit what all its blocks' `records` tell, 2, 4, ...; none where some lack."""
    pyramid = Pyramid.of(store.spec)
    if pyramid.levels == 0 or len(records) < store.blocks or store.files.read(_marker(store)) is None:
        return []
    if not _Job(store, pyramid, pyramid.digest(_digest(records))).finished():
        return []
    return [1 << level for level in range(1, pyramid.levels + 1)]


def content_digest(store: OutputStore) -> str:
    """SHA-256 of the checksums of all that the blocks hold; StoreError where the store is not finished."""
    records = list(store.records())
    if len(records) < store.blocks:
        raise StoreError(
            f"{store.path} has {len(records)} of {store.blocks} blocks; overviews are of a whole map: run the command "
            "that made it again to finish it"
        )
    return _digest(records)


def _digest(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for block in sorted((record.row, record.col, sorted(record.files.items())) for record in records):
        digest.update(json.dumps(block).encode())
    return digest.hexdigest()


def reduce_block(spec: StoreSpec, array: ArraySpec, block: NDArray[Any], levels: int) -> list[NDArray[Any]]:
    """The levels of (h, w) pixels of one of the map's arrays: labels by majority, all others by mean."""
    if array.name == "labels":
        return majority_levels(block, levels, len(spec.classes), spec.nodata)
    return mean_levels(block, levels, array.fill)


def layers_of(array: ArraySpec) -> list[Layer]:
    """What an array consists of, one (y, x) after the other."""
    return [()] if len(array.shape) == 2 else [(layer,) for layer in range(array.shape[0])]


def _folder(store: OutputStore) -> str:
    return f"{store.files.state}/{OVERVIEWS}"


def _marker(store: OutputStore) -> str:
    return f"{_folder(store)}/done.json"


class _Job:
    """The overviews of one store while they are made."""

    def __init__(self, store: OutputStore, pyramid: Pyramid, digest: str) -> None:
        self.store, self.files, self.pyramid, self.digest = store, store.files, pyramid, digest
        self.folder, self.marker = _folder(store), _marker(store)
        self.records = f"{self.folder}/{digest}"
        self.begun = f"{self.records}/begun"
        self.maps = {array.name: store.array(array.name) for array in pyramid.reduced()}
        self.levels = range(1, pyramid.levels + 1)

    def finished(self) -> bool:
        """Whether these very overviews are there."""
        data = self.files.read(self.marker)
        return data is not None and data == self._mark()

    def _mark(self) -> bytes:
        return (json.dumps({"digest": self.digest, "levels": self.pyramid.levels}) + "\n").encode()

    def begin(self, overwrite: bool) -> None:
        """Remove what is of others, and make the levels' groups, unless an earlier run of this job did."""
        self.store.check_lease()
        if self.files.read(self.begun) is not None and not overwrite:
            return
        # The marker first: it must not outlast what it stands for.
        self.files.delete(self.marker)
        self.files.settle([self.marker])
        self.files.delete(self.folder)
        self.files.write(ROOT, group_json(group_attributes(self.pyramid.spec)))
        self.files.settle([ROOT, self.marker])
        for name in self.files.names(""):
            if name.startswith(OVERVIEW):
                self.files.delete(name)
        written = [f"{overview_group(1 << level)}/{ROOT}" for level in self.levels]
        for level, key in zip(self.levels, written, strict=True):
            attributes = overview_group_attributes(self.pyramid.level(level), self.pyramid.dims(level))
            self.files.write(key, group_json(attributes))
        self.files.settle(written)
        self.files.write(self.begun, b"\n")
        self.files.settle([self.begun])

    def make_squares(self, progress: Callable[[int, int, int], None] | None) -> None:
        """Each square's shards and record."""
        done = {name.removesuffix(".npz") for name in self.files.names(self.records)}
        waiting = [square for square in self.pyramid.squares() if _name(square) not in done]
        total = self.pyramid.grid[0] * self.pyramid.grid[1]
        finished, pixels = total - len(waiting), 0
        if progress is not None:
            progress(finished, total, pixels)
        for square in _each(self._make_square, waiting):
            finished, pixels = finished + 1, pixels + self.pyramid.window(square).area
            if progress is not None:
                progress(finished, total, pixels)

    def _make_square(self, square: Square) -> Square:
        self.store.check_lease()
        small: dict[str, NDArray[Any]] = {}
        written: list[str] = []
        for array in self.pyramid.reduced():
            for layer in layers_of(array):
                block = self._read(array, layer, self.pyramid.window(square))
                for level, part in enumerate(reduce_block(self.pyramid.spec, array, block, len(self.levels)), 1):
                    if self.pyramid.is_direct(level):
                        written += self._write(self.pyramid.overview(array, level), layer, square, part)
                    else:
                        small[_part(array, layer, level)] = part
        self.files.settle(written)
        record = io.BytesIO()
        np.savez_compressed(record, allow_pickle=False, **small)
        self.store.check_lease()
        key = f"{self.records}/{_name(square)}.npz"
        self.files.write(key, record.getvalue())
        self.files.settle([key])
        return square

    def _read(self, array: ArraySpec, layer: Layer, window: Window) -> NDArray[Any]:
        place: Any = (*layer, slice(window.rows.start, window.rows.stop), slice(window.cols.start, window.cols.stop))
        try:
            return np.asarray(self.maps[array.name][place])
        except (OSError, ValueError, RuntimeError, zarr.errors.BaseZarrError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ReadError(f"{self.store.path}: {array.name} cannot be read at {window}: {reason}") from error

    def _write(self, array: ArraySpec, layer: Layer, index: Square, part: NDArray[Any]) -> list[str]:
        """The keys of the files of one shard, of which those without data are deleted."""
        keys = []
        for key, data in encode_block(array, (*layer, *index), part[(None,) * len(layer)]):
            keys.append(key)
            if data is None:
                self.files.delete(key)
            else:
                self.files.write(key, data)
        return keys

    def join_squares(self) -> None:
        """The shards of the levels of which a square has too little for a shard."""
        shards = (
            (array, layer, level, index)
            for level in self.levels
            if not self.pyramid.is_direct(level)
            for array in self.pyramid.reduced()
            for layer in layers_of(array)
            for index in self.pyramid.level(level).blocks()
        )
        for _ in _each(lambda shard: self._join(*shard), shards):
            pass

    def _join(self, array: ArraySpec, layer: Layer, level: int, index: Square) -> None:
        window = self.pyramid.level(level).block_window(index)
        whole = np.full(window.shape, array.fill, array.dtype)
        side = self.pyramid.square >> level
        for row in range(window.rows.start // side, -(-window.rows.stop // side)):
            for col in range(window.cols.start // side, -(-window.cols.stop // side)):
                piece = self.pyramid.window((row, col), level)
                whole[piece.within(window)] = self._part((row, col), _part(array, layer, level))
        self.store.check_lease()
        self.files.settle(self._write(self.pyramid.overview(array, level), layer, index, whole))

    def _part(self, square: Square, name: str) -> NDArray[Any]:
        data = self.files.read(f"{self.records}/{_name(square)}.npz")
        if data is None:
            raise StoreError(
                f"{self.store.path}: the record of square {square} of its overviews is gone; make them anew with "
                "`tilepipe overviews --overwrite`"
            )
        with np.load(io.BytesIO(data)) as record:
            found: NDArray[Any] = record[name]
        return found

    def publish(self) -> None:
        """The metadata, the group's own last but for the marker."""
        self.store.check_lease()
        specs = {1 << level: self.pyramid.level(level) for level in self.levels}
        written = []
        for level, spec in zip(self.levels, specs.values(), strict=True):
            dims = self.pyramid.dims(level)
            written += write_coordinates(self.files, spec, f"{overview_group(1 << level)}/", f"_{1 << level}x")
            for array in self.pyramid.reduced():
                own = self.pyramid.overview(array, level)
                written.append(f"{own.name}/{ROOT}")
                self.files.write(written[-1], array_json(own, overview_attributes(spec, array, dims)))
        self.files.settle(written)
        self.files.write(ROOT, group_json(group_attributes(self.pyramid.spec, specs)))
        self.files.settle([ROOT])
        self.files.write(self.marker, self._mark())
        self.files.settle([self.marker])

    def tidy(self) -> None:
        """Remove the records, which nothing needs any more."""
        self.files.delete(self.records)


def _name(square: Square) -> str:
    return f"{square[0]}-{square[1]}"


def _part(array: ArraySpec, layer: Layer, level: int) -> str:
    return "-".join(map(str, (array.name, *layer, level)))


def _each(function: Callable[[T], R], items: Iterator[T] | list[T]) -> Iterator[R]:
    """function(item) of each item, in order, of a few at a time in threads."""
    threads = min(4, len(os.sched_getaffinity(0)))
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, "tilepipe-overviews") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
