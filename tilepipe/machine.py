"""What a job may use of this machine: its device, its memory, its threads; and the libraries that run there."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import psutil
import torch

from tilepipe.errors import UsageError
from tilepipe.options import SegmentOptions
from tilepipe.projection import RESIDENT, Resources
from tilepipe.version import __version__

MEMORY_SHARE = 0.8
"""Of the memory that is free when the job starts, what it may use unless told otherwise."""

MOST_BLOCKS = 12
"""In flight for one device, however many cores there are: more would only take memory."""


def device_of(options: SegmentOptions) -> Literal["cpu", "cuda"]:
    """The kind of device that the options ask for; a GPU where there is one and none is named."""
    asked = options.device or ("cuda" if options.gpus else None)
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cpu":
        return "cpu"
    if asked != "cuda" and not asked.startswith("cuda:"):
        raise UsageError(f"device {asked!r} is not known; legal are cpu, cuda and cuda:N")
    # Devices of a running cluster are its workers' affair.
    if options.scheduler is None and not torch.cuda.is_available():
        raise UsageError(f"device {asked} was asked for, but torch sees no CUDA device here; use --device cpu")
    return "cuda"


def resources_of(options: SegmentOptions, device: Literal["cpu", "cuda"]) -> Resources:
    """The memory, threads and blocks in flight that a job may use on this device."""
    workers, cores = max(options.workers or 1, len(options.gpus or ())), len(os.sched_getaffinity(0))
    host = options.memory or int(free_memory() * MEMORY_SHARE)
    if device == "cuda":
        limit = options.device_memory
        if limit is None and torch.cuda.is_available():
            limit = int(torch.cuda.mem_get_info()[0] * 0.95)
        # Reading and writing a block takes a core several times as long as a fast device computes it.
        blocks = min(MOST_BLOCKS, max(RESIDENT, cores // workers))
        return Resources("cuda", host, limit, threads=1, blocks=blocks, workers=workers)
    threads = options.threads or max(1, cores // workers)
    # A block has about four tiles; one more block than the threads need is being read.
    return Resources("cpu", host, None, threads=threads, blocks=1 + -(-threads // 4), workers=workers)


def free_memory() -> int:
    """Bytes that this process may take now: what is free on the host, within the control group's limit."""
    available = int(psutil.virtual_memory().available)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            root = Path("/sys/fs/cgroup")
            return min(available, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):
            continue
    return available


def versions() -> dict[str, str]:
    """The libraries that decide the map's bytes, and GDAL, which decodes the raster."""
    import rasterio

    found = {name: version(name) for name in ("torch", "numpy", "numba", "rasterio")}
    return {"tilepipe": __version__, **found, "gdal": rasterio.__gdal_version__}
