"""Staging: a raster that is slow to read by windows, copied once into zarr shards that are not."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import InputError, StoreError
from tilepipe.raster.info import BandChoice, RasterInfo
from tilepipe.raster.reader import Backend
from tilepipe.raster.source import STRIP_CACHE, RasterSource, cache_bytes, in_strips, open_raster
from tilepipe.raster.zarr import STAGED, staged_facts
from tilepipe.store.attributes import PROJ, SPATIAL, bounds, spatial_ref_attributes
from tilepipe.store.durable import explain
from tilepipe.store.shards import array_json, encode_block, group_json
from tilepipe.store.spec import ArraySpec, LabelClass, StoreSpec
from tilepipe.window import Interval, Window

SEQUENTIAL = ("JPEG", "PNG", "GIF", "WEBP")
"""Drivers that decode a file from its first row to its last, and start again to go back."""

DECODE_FACTOR = 2.0
"""Times that windows may make a source block be decoded before staging is cheaper."""

ORIGIN = "tilepipe_staged"
"""The group's attribute that says what was staged."""

Progress = Callable[[int, int], None]
"""Called with the pixels staged so far, and all."""


def needs_staging(info: RasterInfo, block_shape: tuple[int, int], wanted: int | None = None) -> str | None:
    """Why windows of `block_shape` of the raster are slow to read, in one line; None where they are not.

    `wanted`: the pixels that are read in all, where that is not the whole raster. Staging copies all of it, and is
    not worth that for a small part.
    """
    area = math.prod(info.shape)
    wanted = area if wanted is None else wanted
    if info.driver == "zarr":
        return None
    cache = cache_bytes(info, block_shape)
    rows, cols = info.block_shape
    if area * info.pixel_bytes <= STRIP_CACHE and in_strips(info):
        return None
    if info.driver in SEQUENTIAL and wanted > math.prod(block_shape):
        return f"{info.name} is {info.driver}, which is decoded from its start to reach a window"
    factor = decode_factor(info, block_shape)
    if factor <= DECODE_FACTOR or factor * wanted < area or (in_strips(info) and cache <= STRIP_CACHE):
        return None
    return (
        f"{info.name} is stored in blocks of {rows} x {cols} pixels, and windows of {block_shape[0]} x "
        f"{block_shape[1]} decode each of them about {factor:.0f} times"
    )


def decode_factor(info: RasterInfo, window_shape: tuple[int, int]) -> float:
    """Pixels decoded per pixel read when windows of `window_shape` cover the raster, and nothing is kept."""
    factor = 1.0
    for size, block, window in zip(info.shape, info.block_shape, window_shape, strict=True):
        used = min(window, size)
        touched = used // block if used % block == 0 else used // block + 2
        factor *= min(touched * block, math.ceil(size / block) * block) / used
    return factor


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a raster is staged: the arrays, and the windows that are read one after another or side by side."""

    image: ArraySpec
    valid: ArraySpec | None
    aligned: bool
    """Whether shards end where source blocks end, so that threads may read them side by side."""

    @property
    def shard(self) -> tuple[int, int]:
        return self.image.shard[1], self.image.shard[2]

    def reads(self) -> Iterator[Window]:
        """Windows of whole shards: one each where aligned, else rows of them over the raster's width."""
        rows, cols = self.image.shape[1:]
        height, width = self.shard
        step = width if self.aligned else math.ceil(cols / width) * width
        for top, left in itertools.product(range(0, rows, height), range(0, cols, step)):
            yield Window.of(top, top + height, left, left + step).clip((rows, cols))


@contextmanager
def staged(source: RasterSource, path: Path, progress: Progress | None = None) -> Iterator[RasterSource]:
    """`source` as a staged copy at `path`, which is removed in the end unless an error interrupts its use.

    A finished copy of the same raster that is found there is used again.
    """
    for left in path.parent.glob(f"{path.name}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)
    yield _found(source, path) or ingest(source, path, progress=progress, overwrite=True)
    gone = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def ingest(
    source: RasterSource,
    path: str | Path,
    *,
    chunk: int = 1024,
    workers: int | None = None,
    memory: int = 1 << 30,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> RasterSource:
    """The staged copy of `source`, which reads the same: bands, masks, georeference, colours.

    A zarr v3 group with `image` (band, y, x) and, where the raster stores a mask, `valid`, in chunks of about
    `chunk` pixels a side and shards of several. It appears at `path` only once it is whole. `memory` bounds, in
    bytes, the pixels held at a time. Each source block is decoded once. ReadError where a block is unreadable.
    `overwrite` replaces an earlier staged copy, and never anything else.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise StoreError(f"{target} exists; choose another path, or --overwrite")
    if target.exists() and _origin(target) is None:
        raise StoreError(f"{target} is no staged raster; choose another path, or remove it yourself")
    raw, choice = _staged_part(source)
    layout = _layout(raw, chunk, memory, workers or min(4, os.cpu_count() or 1))
    partial, old = (target.with_name(f"{target.name}.partial-{uuid.uuid4().hex[:8]}") for _ in range(2))
    try:
        _write_metadata(partial, source, raw, layout)
        _Copy(source, raw, layout, partial, memory).run(workers or min(4, os.cpu_count() or 1), progress)
        if target.exists():
            # By another name first: what a killed removal leaves must not be at `path`.
            os.rename(target, old)
            shutil.rmtree(old, ignore_errors=True)
        os.rename(partial, target)
    except OSError as error:
        raise explain(error, f"cannot stage {raw.name} at {target}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_raster(target).select(choice)


def _origin(path: Path) -> Any:
    """What was staged at `path`, as `RasterSource.identity` says it; None where nothing was."""
    try:
        return json.loads((path / "zarr.json").read_text())["attributes"][ORIGIN]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _found(source: RasterSource, path: Path) -> RasterSource | None:
    """The finished copy of `source` at `path`, if there is one."""
    if _origin(path) != json.loads(json.dumps(source.identity())):
        return None
    try:
        return open_raster(path).select(_staged_part(source)[1])
    except InputError:
        return None


def _staged_part(source: RasterSource) -> tuple[RasterInfo, BandChoice]:
    """The raster with only the bands that are staged (the chosen and alpha), and the choice among those."""
    raw = source.raw
    kept = _kept(source)
    part = raw.select(BandChoice(kept))
    alpha = None if raw.alpha is None else kept.index(raw.alpha) + 1
    colormap = raw.colormap if 1 in kept else None
    chosen = tuple(kept.index(band) + 1 for band in source.choice.indices)
    return replace(part, alpha=alpha, colormap=colormap), BandChoice(chosen, source.choice.palette)


def _kept(source: RasterSource) -> tuple[int, ...]:
    return tuple(sorted({*source.choice.indices, *([] if source.raw.alpha is None else [source.raw.alpha])}))


def _layout(raw: RasterInfo, chunk: int, memory: int, workers: int) -> _Layout:
    rows, cols = raw.shape
    side = [min(chunk, rows), min(chunk, cols)]
    aligned_to = [math.lcm(c, min(b, n)) for c, b, n in zip(side, raw.block_shape, raw.shape, strict=True)]
    budget = memory // (2 * workers)
    aligned = not in_strips(raw) and math.prod(aligned_to) * raw.pixel_bytes <= budget
    if aligned:
        shard = aligned_to
        # Wider shards, up to 4096 pixels, mean fewer files.
        while shard[1] * 2 <= 4096 and 2 * math.prod(shard) * raw.pixel_bytes <= budget:
            shard = [shard[0], shard[1] * 2]
    else:
        # Rows of shards are read over the whole width, two of them held at a time.
        while side[0] > 16 and side[0] * cols * raw.pixel_bytes * 2 > memory:
            side[0] = math.ceil(side[0] / 2)
        shard = [side[0], side[1] * max(1, min(4, 4096 // side[1]))]
    image = ArraySpec(
        "image",
        np.dtype(raw.dtype),
        0,
        (raw.bands, rows, cols),
        (raw.bands, shard[0], shard[1]),
        (1, side[0], side[1]),
        ("band", "y", "x"),
        sharded=True,
    )
    valid = None
    if raw.stored_mask != "none":
        count = raw.bands if raw.stored_mask == "bands" else 1
        valid = replace(
            image, name="valid", dtype=np.dtype(bool), fill=False, shape=(count, rows, cols), shard=(count, *shard)
        )
    return _Layout(image, valid, aligned)


class _Copy:
    """One raster on its way into a folder."""

    def __init__(self, source: RasterSource, raw: RasterInfo, layout: _Layout, folder: Path, memory: int) -> None:
        self._layout, self._folder, self._raw = layout, folder, raw
        self._bands = _kept(source)
        cache = cache_bytes(raw, (layout.shard[0], raw.shape[1]))
        if not layout.aligned and not in_strips(raw) and raw.driver != "zarr":
            cache += raw.shape[1] * raw.block_shape[0] * raw.pixel_bytes
        self._backend: Backend = source.with_cache(min(cache, memory)).recipe.backend()

    def run(self, workers: int, progress: Progress | None) -> None:
        """Reads and writes everything; at most two rows of shards, or two shards a thread, are held at a time."""
        total, done = math.prod(self._raw.shape), 0
        waiting: list[tuple[int, list[Future[None]]]] = []
        try:
            # The threads end before the files that they read are closed, also where an error stops the copy.
            with ThreadPoolExecutor(workers) as pool:
                try:
                    for window in self._layout.reads():
                        if self._layout.aligned:
                            tasks = [pool.submit(self._copy, window)]
                        else:
                            tasks = [pool.submit(self._write, *part) for part in self._cut(window, *self._read(window))]
                        waiting.append((window.area, tasks))
                        while len(waiting) > (2 * workers if self._layout.aligned else 1):
                            done += _finish(waiting.pop(0))
                            if progress is not None:
                                progress(done, total)
                    for pair in waiting:
                        done += _finish(pair)
                        if progress is not None:
                            progress(done, total)
                finally:
                    for _, tasks in waiting:
                        for task in tasks:
                            task.cancel()
        finally:
            self._backend.close()

    def _copy(self, window: Window) -> None:
        self._write(window, *self._read(window))

    def _read(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        image = np.empty((len(self._bands), *window.shape), self._layout.image.dtype)
        self._backend.fetch(self._bands, window, image)
        if self._layout.valid is None:
            return image, None
        if self._raw.stored_mask == "dataset":
            return image, self._backend.fetch_mask(self._bands[:1], window)[None]
        return image, np.stack([self._backend.fetch_mask((band,), window) for band in self._bands])

    def _cut(
        self, window: Window, image: NDArray[Any], valid: NDArray[np.bool_] | None
    ) -> Iterator[tuple[Window, NDArray[Any], NDArray[np.bool_] | None]]:
        width = self._layout.shard[1]
        for left in range(window.cols.start, window.cols.stop, width):
            part = Window(window.rows, Interval(left, min(left + width, window.cols.stop)))
            inner = (slice(None), *part.within(window))
            yield part, image[inner], None if valid is None else valid[inner]

    def _write(self, window: Window, image: NDArray[Any], valid: NDArray[np.bool_] | None) -> None:
        height, width = self._layout.shard
        index = window.rows.start // height, window.cols.start // width
        for array, values in ((self._layout.image, image), (self._layout.valid, valid)):
            if array is None or values is None:
                continue
            for key, data in encode_block(array, index, values):
                if data is not None:
                    _write_durably(self._folder / key, data)


def _finish(pair: tuple[int, list[Future[None]]]) -> int:
    for task in pair[1]:
        task.result()
    return pair[0]


def _write_metadata(folder: Path, source: RasterSource, raw: RasterInfo, layout: _Layout) -> None:
    spec = StoreSpec(
        raw.shape,
        raw.shape,
        (1, 1),
        [LabelClass("staged", (0, 0, 0))],
        crs_wkt=raw.crs_wkt,
        transform=raw.transform,
    )
    grid: dict[str, Any] = {}
    if raw.transform is not None:
        grid = {
            "grid_mapping": "spatial_ref",
            "coordinates": "spatial_ref",
            **({"proj:wkt2": raw.crs_wkt} if raw.crs_wkt else {}),
            "spatial:dimensions": ["y", "x"],
            "spatial:shape": list(raw.shape),
            "spatial:transform": list(raw.transform),
            "spatial:bbox": bounds(raw.shape, raw.transform),
            "spatial:registration": "pixel",
            "zarr_conventions": [*([PROJ] if raw.crs_wkt else []), SPATIAL],
        }
    origin = json.loads(json.dumps(source.identity()))
    _write_durably(folder / "zarr.json", group_json({ORIGIN: origin}))
    image = {**grid, STAGED: staged_facts(raw)}
    _write_durably(folder / "image" / "zarr.json", array_json(layout.image, image))
    if layout.valid is not None:
        _write_durably(folder / "valid" / "zarr.json", array_json(layout.valid, grid))
    scalar = ArraySpec("spatial_ref", np.dtype("int64"), 0, (), (), (), (), sharded=False)
    _write_durably(folder / "spatial_ref" / "zarr.json", array_json(scalar, spatial_ref_attributes(spec)))


def _write_durably(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
