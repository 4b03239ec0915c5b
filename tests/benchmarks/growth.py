"""Time and memory of `tilepipe segment` as the raster grows, start-up left out, beside the plan's projection.

    python tests/benchmarks/growth.py [--sizes 4096 8192 16384] [--workers 1 2] [--runs 3] [--folder DIR]

The near-free network (one 1x1 convolution), so that everything but the network shows. The rasters are made for the
purpose (RGB, deflate, 512 x 512 blocks) and kept in the folder. Sizes are run in turns, so that all meet the same
state of the machine. A further pixel's cost is that of the step from the size before: what a job spends once (files
opened, kernels loaded with the first block) is in the first size's cost, and not in it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from common import make_raster, model_file, timed


class Run(NamedTuple):
    """One job."""

    seconds: float
    """After the start."""
    peak: float
    """MiB, of all its processes."""


def segment(raster: Path, model: Path, out: Path, workers: int) -> Run:
    """What a job takes."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "tilepipe", "segment", str(raster), str(out), "--model", str(model), "--json"]
    done = timed([*command, "--workers", str(workers), "--no-overviews"])
    shutil.rmtree(out)
    return Run(json.loads(done.output)["seconds"], done.peak)


def projection(raster: Path, model: Path, workers: int) -> float:
    """MiB that the plan projects for all workers."""
    command = [sys.executable, "-m", "tilepipe", "plan", str(raster), "--model", str(model), "--json"]
    return float(json.loads(timed([*command, "--workers", str(workers)]).output)["host_bytes"]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model = model_file(args.folder / "near-free.safetensors", "near-free")
    rasters = {size: make_raster(args.folder / f"noise{size}.tif", size) for size in args.sizes}
    for workers in args.workers:
        found: dict[int, list[Run]] = {size: [] for size in args.sizes}
        segment(rasters[args.sizes[0]], model, args.folder / "out.zarr", workers)  # compiles what is not cached yet
        for _ in range(args.runs):
            for size, raster in rasters.items():
                found[size].append(segment(raster, model, args.folder / "out.zarr", workers))
        before: tuple[int, Run] | None = None
        for size, runs in found.items():
            each = Run(statistics.median(run.seconds for run in runs), max(run.peak for run in runs))
            rate = f"{each.seconds / size**2 * 1e9:6.2f} ns a pixel"
            if before is not None:
                more = (each.seconds - before[1].seconds) / (size**2 - before[0] ** 2)
                rate += f", {more * 1e9:6.2f} ns a further one"
            before = size, each
            print(
                f"{workers} worker{'s' if workers > 1 else ''}  {size:6} x {size:<6} {each.seconds:7.2f} s  "
                f"peak {each.peak:6.0f} MiB  projected {projection(rasters[size], model, workers):6.0f} MiB  {rate}",
                flush=True,
            )


if __name__ == "__main__":
    main()
