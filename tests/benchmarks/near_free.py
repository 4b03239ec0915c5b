"""Whole-process time and memory of `tilepipe segment` with a network that costs next to nothing.

    python tests/benchmarks/near_free.py BIG.tif [--against 'COMMAND with {input} and {output}'] [--runs 5]

What is measured is everything around the network: start-up, reading, normalising, best class, writing. A second
command is run in alternation, so that both meet the same state of the machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from tilepipe.checkpoint import ClassInfo, ModelCard, save_model
from tilepipe.models import build


def near_free_model(path: Path, classes: int = 12) -> Path:
    """A model file of one 1x1 convolution on raw RGB values."""
    torch.manual_seed(0)
    card = ModelCard(
        architecture="linear",
        arguments={"classes": classes, "bands": 3},
        classes=tuple(ClassInfo(f"class{n}", (n * 20, 128, 255 - n * 20)) for n in range(classes)),
        bands=("red", "green", "blue"),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        nodata="0 after normalisation",
        resolution=None,
        licence="MIT",
        provenance={"made": "random weights, seed 0"},
    )
    save_model(path, build("linear", classes=classes, bands=3).eval(), card)
    return path


def timed(command: list[str]) -> tuple[float, float, float]:
    """(wall seconds, processor seconds, peak MiB) of one process."""
    started = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"failed: {shlex.join(command)}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input")
    parser.add_argument("--against")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path(args.input).resolve().parent) as folder:
        model = near_free_model(Path(folder) / "linear.safetensors")
        ours, theirs = Path(folder) / "out.zarr", Path(folder) / "other.tif"
        segment = [sys.executable, "-m", "tilepipe", "segment", args.input, str(ours), "--model", str(model), "-q"]
        commands = {"tilepipe": segment}
        if args.against:
            commands["other"] = shlex.split(args.against.format(input=args.input, output=theirs))
        results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for number in range(args.runs + 1):
            for name, command in commands.items():
                shutil.rmtree(ours, ignore_errors=True)
                theirs.unlink(missing_ok=True)
                result = timed(command)
                if number:  # the first run fills caches, of files and of compiled kernels
                    results[name].append(result)
    for name, rows in results.items():
        wall, cpu, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:10} wall {wall:6.2f} s   processor {cpu:6.2f} s   peak {peak:6.0f} MiB   (median of {len(rows)})")
    if args.against:
        ratios = [a[0] / b[0] for a, b in zip(results["tilepipe"], results["other"], strict=True)]
        print(f"tilepipe / other, wall: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
