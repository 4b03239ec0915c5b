"""What several benchmarks share: model files of random weights, rasters of any size, and processes that are timed."""

from __future__ import annotations

import os
import shlex
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import rasterio
import torch
from rasterio.transform import from_origin
from rasterio.windows import Window

from tilepipe.checkpoint import ClassInfo, ModelCard, save_model
from tilepipe.models import build

NETWORKS: dict[str, tuple[str, dict[str, float]]] = {
    "near-free": ("linear", {}),
    "segnet": ("segnet", {}),
    "segnet-quarter": ("segnet", {"width": 0.25}),
}
"""Architecture and arguments: one 1x1 convolution, SegNet, and SegNet of a quarter of the width."""
CLASSES, BANDS = 12, 3


def network(name: str) -> torch.nn.Module:
    """One of NETWORKS in evaluation mode: random weights, seed 0; raw RGB values in, scores of 12 classes out."""
    architecture, arguments = NETWORKS[name]
    torch.manual_seed(0)
    return build(architecture, classes=CLASSES, bands=BANDS, **arguments).eval()


def model_file(path: Path, name: str) -> Path:
    """The network as a model file."""
    architecture, arguments = NETWORKS[name]
    return save_random(path, network(name), architecture, {"classes": CLASSES, "bands": BANDS, **arguments})


def save_random(
    path: Path,
    made: torch.nn.Module,
    architecture: str,
    arguments: dict[str, float],
    normalisation: tuple[float, float] = (0.0, 1.0),
) -> Path:
    """A model file of an RGB network with random weights; normalisation: (mean, std) of every band."""
    mean, std = normalisation
    card = ModelCard(
        architecture=architecture,
        arguments=arguments,
        classes=tuple(ClassInfo(f"class{n}", (n * 20, 128, 255 - n * 20)) for n in range(CLASSES)),
        bands=("red", "green", "blue"),
        mean=(mean,) * BANDS,
        std=(std,) * BANDS,
        nodata="0 after normalisation",
        resolution=None,
        licence="MIT",
        provenance={"made": "random weights, seed 0"},
    )
    save_model(path, made, card)
    return path


def make_raster(path: Path, size: int) -> Path:
    """A square RGB raster of slowly varying noise, deflate, 512 x 512 blocks; kept where it is there already."""
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (3, 512, 4096), dtype=np.uint8) // 8 * 8
    part = path.with_suffix(".part.tif")
    with rasterio.open(
        part,
        "w",
        driver="GTiff",
        width=size,
        height=size,
        count=3,
        dtype="uint8",
        tiled=True,
        blockxsize=512,
        blockysize=512,
        compress="deflate",
        interleave="pixel",
        BIGTIFF="IF_SAFER",
        NUM_THREADS="2",
        crs="EPSG:32633",
        transform=from_origin(500000, 5400000, 0.5, 0.5),
    ) as out:
        for row in range(0, size, 512):
            strip = np.roll(texture, row, axis=2)[:, : min(512, size - row)]
            wide = np.tile(strip, (1, 1, -(-size // 4096)))[:, :, :size]
            out.write(wide, window=Window(0, row, size, wide.shape[1]))
    part.rename(path)
    return path


class Timed(NamedTuple):
    """What a process took."""

    wall: float
    """Seconds."""
    processor: float
    """Seconds of all its threads, and of the processes that it waited for."""
    peak: float
    """MiB that it held at the peak, its children included."""
    output: str
    """Its standard output."""


def timed(command: list[str], environment: dict[str, str] | None = None) -> Timed:
    """What one process takes; ends this one where it fails."""
    started = time.perf_counter()
    read, write = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, write, 1), (os.POSIX_SPAWN_CLOSE, read)]
    pid = os.posix_spawnp(command[0], command, {**os.environ, **(environment or {})}, file_actions=actions)
    os.close(write)
    os.set_blocking(read, False)
    said, peak, child, rounds = b"", 0, psutil.Process(pid), 0
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        with suppress(BlockingIOError):
            said += os.read(read, 1 << 16)
        if rounds % 50 == 0:  # looking at every process of the machine takes milliseconds
            peak = max(peak, _held(child))
        rounds += 1
        time.sleep(0.005)
    wall = time.perf_counter() - started
    with suppress(BlockingIOError):
        while part := os.read(read, 1 << 16):
            said += part
    os.close(read)
    if status:
        raise SystemExit(f"failed: {shlex.join(command)}")
    most = peak / 2**20 or usage.ru_maxrss / 1024
    return Timed(wall, usage.ru_utime + usage.ru_stime, most, said.decode())


def _held(process: psutil.Process) -> int:
    """Bytes of a process and all that it started, what they share counted once; the most so far where it is alone."""
    held = 0
    with suppress(psutil.Error, OSError):
        started = process.children(recursive=True)
        if not started:
            # Not what `wait4` says: that begins with the memory of the parent.
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                held += int(line.split()[1]) << 10 if line.startswith("VmHWM:") else 0
        for each in (process, *started) if started else ():
            with suppress(psutil.Error):
                held += each.memory_full_info().pss
    return held
