"""A job from file to store: its rate, how busy the device was, and the memory at the peak."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import psutil
import torch

from tilepipe.bench.report import ForwardFigure, WholeFigure
from tilepipe.grid import OutputGrid
from tilepipe.job import Job
from tilepipe.pipeline import segment_raster
from tilepipe.plan import TilePlan
from tilepipe.projection import Resources
from tilepipe.window import Interval, Window

EVERY = 0.05
"""Seconds between two looks at the memory."""
ROUNDS = 40
"""Looks between two looks for the processes, which take longer than a look at their memory."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the job runs and writes."""

    device: torch.device
    """The one that this process uses."""
    folder: Path


def whole(
    inputs: Sequence[str | Path], job: Job, network: Callable[[], ForwardFigure], place: Place, pixels: float
) -> WholeFigure:
    """How the job fares on about `pixels` of its raster, in whole blocks; `network` measures its network alone.

    That is done before and after the job, since a machine's pace changes within seconds.

    On fewer blocks than are in flight, or less than two rounds of tiles, it would show its start and end only: it
    gets as many where the raster has them. Its store stays in the folder.
    """
    outputs = pixels / (job.plan.scale[0] * job.plan.scale[1])
    part = middle(job.plan, max(outputs, _least(job.plan, job.resources)))
    region, options = region_text(job.grid, part), job.options
    before = network().network_rate
    # Several GPUs have a process each, whose memory is not seen from here.
    here = job.device == "cuda" and len(options.gpus or ()) < 2
    if job.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place.device)
    announced: list[Job] = []
    with peak_memory() as peak:
        summary = segment_raster(
            inputs,
            place.folder / "whole.zarr",
            [member.reference for member in job.members],
            replace(options, region=region),
            announce=announced.append,
        )
    (run,) = announced
    device_bytes = int(torch.cuda.max_memory_reserved(place.device)) if here else 0
    network_rate = (before + network().network_rate) / 2
    computed = sum(made.tiles * made.tile[0] * made.tile[1] for made in run.plans) / 1e6
    cells = run.plan.scale[0] * run.plan.scale[1]
    return WholeFigure(
        region=region,
        blocks=summary.blocks,
        nodata=summary.nodata,
        tiles=sum(made.tiles for made in run.plans),
        start_seconds=summary.start_seconds,
        seconds=summary.seconds,
        rate=summary.rate * cells,
        network_rate=network_rate,
        busy=computed / (network_rate * run.resources.workers) / summary.seconds,
        host_bytes=peak.size,
        projected_host_bytes=run.plan.projection.host_total,
        device_bytes=device_bytes,
        projected_device_bytes=run.plan.projection.device,
    )


def middle(plan: TilePlan, outputs: float) -> Window:
    """Whole blocks in the middle of a plan's region, of about so many outputs: rows of blocks, or part of one."""
    rows, cols = plan.grid
    wanted = max(1, round(outputs / (plan.block[0] * plan.block[1])))
    down, right = (min(rows, max(1, round(wanted / cols))), cols) if wanted >= cols else (1, wanted)
    starts = (rows - down) // 2, (cols - right) // 2
    axes = zip(starts, (down, right), plan.block, plan.region.origin, strict=True)
    parts = [Interval(origin + first * block, origin + (first + count) * block) for first, count, block, origin in axes]
    return Window(*parts).intersect(plan.region)


def region_text(grid: OutputGrid, outputs: Window) -> str:
    """The `--region` that is computed as these outputs."""
    (rows, cols), axes = grid.scale, outputs
    return f"{axes.rows.start * rows}:{axes.rows.stop * rows},{axes.cols.start * cols}:{axes.cols.stop * cols}"


def _least(plan: TilePlan, use: Resources) -> int:
    """Outputs of two rounds of tiles, and of as many blocks as are in flight."""
    tiles = 2 * use.threads * use.workers * plan.core[0] * plan.core[1]
    return max(tiles, use.blocks * use.workers * plan.block[0] * plan.block[1])


@dataclass(slots=True)
class Peak:
    """The most that was held at once."""

    size: int = 0
    """Bytes."""


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The memory that this process and those it started hold at the peak, while the context lasts."""
    peak, done = Peak(), threading.Event()
    me = psutil.Process()

    def look() -> None:
        processes = [me]
        for number in count():
            if number % ROUNDS == 0:
                processes = [me, *me.children(recursive=True)]
            held = 0
            for process in processes:
                with suppress(psutil.Error):
                    held += process.memory_info().rss
            peak.size = max(peak.size, held)
            if done.wait(EVERY):
                return

    watcher = threading.Thread(target=look, name="tilepipe-memory", daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
