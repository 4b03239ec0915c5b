"""How fast the raster is read in the windows of blocks, and how fast it is copied into zarr chunks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from functools import reduce
from pathlib import Path
from threading import Lock

from tilepipe.bench.report import ReadFigure, StageFigure
from tilepipe.job import Job
from tilepipe.plan import BlockIndex
from tilepipe.raster.ingest import staged
from tilepipe.raster.reader import Reader
from tilepipe.raster.source import strips
from tilepipe.window import Window


def read(job: Job, seconds: float) -> ReadFigure:
    """How fast windows of the job's blocks are read, by one thread and by those of a worker.

    The windows begin in the middle of the raster. Once all were read, the raster is opened anew, so that every
    window is decoded; its file may then come from the system's memory.
    """
    threads, plan = job.resources.blocks, job.plan
    middle = plan.grid[0] // 2 * plan.grid[1] + plan.grid[1] // 2
    windows = _Windows(job, middle)
    single = _rate(job, windows, 1, seconds)
    together = _rate(job, windows, threads, seconds)
    index = BlockIndex(middle // plan.grid[1], middle % plan.grid[1])
    window, cells = block_reads(job, index), job.grid.cells(plan.block_window(index))
    return ReadFigure(window.shape, single, threads, together, window.area / cells.clip(job.source.info.shape).area)


def block_reads(job: Job, index: BlockIndex) -> Window:
    """The raster pixels that a block reads, without those that reflection adds."""
    outputs = job.plan.block_window(index)
    hulls = [made.placements(outputs if made.exact else made.needed(outputs))[0] for made in job.plans]
    return reduce(Window.hull, hulls).clip(job.source.info.shape)


class _Windows:
    """The windows of a job's blocks, in rounds over all of them; each call of `round` goes on where the last ended."""

    def __init__(self, job: Job, first: int) -> None:
        self._job, self._next = job, first

    def round(self, threads: int) -> Iterator[Window]:
        """The windows of every block, cut where there are fewer than threads."""
        columns, count = self._job.plan.grid[1], self._job.plan.block_count
        for _ in range(count):
            number, self._next = self._next, (self._next + 1) % count
            window = block_reads(self._job, BlockIndex(number // columns, number % columns))
            if count < threads:
                yield from strips(self._job.source.info, window, math.ceil(threads / count))
            else:
                yield window


def _rate(job: Job, windows: _Windows, threads: int, seconds: float) -> float:
    """Mpx/s of windows."""
    pixels, spent = 0, 0.0
    with ThreadPoolExecutor(threads, "tilepipe-bench") as pool:
        while spent < seconds:
            started = time.perf_counter()
            with closing(job.source.open()) as reader:
                shared = _Shared(windows.round(threads), reader, started + seconds - spent)
                tasks = [pool.submit(shared.read) for _ in range(threads)]
                # All of them end, also where one fails, before the files that they read are closed.
                wait(tasks)
                pixels += sum(task.result() for task in tasks)
            spent += time.perf_counter() - started
    return pixels / 1e6 / spent


class _Shared:
    """One round's windows, which several threads take from until there are none or time is up."""

    def __init__(self, windows: Iterator[Window], reader: Reader, deadline: float) -> None:
        self._windows, self._reader, self._deadline = windows, reader, deadline
        self._lock = Lock()

    def read(self) -> int:
        """The pixels that this thread read."""
        pixels = 0
        while (window := self._take()) is not None:
            self._reader.read(window)
            pixels += window.area
            if time.perf_counter() >= self._deadline:
                break
        return pixels

    def _take(self) -> Window | None:
        with self._lock:
            return next(self._windows, None)


class _EnoughError(Exception):
    """Ends staging when the time is up."""


def stage(job: Job, folder: Path, seconds: float) -> StageFigure:
    """How fast the raster is copied into zarr chunks in `folder`, where nothing of it is left."""
    found: list[tuple[int, float]] = []
    started = time.perf_counter()

    def check(done: int, total: int) -> None:
        found.append((done, time.perf_counter() - started))
        if found[-1][1] >= seconds and done < total:
            raise _EnoughError

    try:
        with staged(job.source, folder / "staged.zarr", check):
            complete = True
    except _EnoughError:
        complete = False
    done, spent = found[-1]
    return StageFigure(done / 1e6 / spent, complete, job.staging)
