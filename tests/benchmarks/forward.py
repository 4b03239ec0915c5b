"""The forward pass of a network as a job prepares it, beside eager PyTorch, each in processes of its own, in turns.

    python tests/benchmarks/forward.py [--network segnet] [--tile 1408] [--threads 1] [--runs 5]
    python tests/benchmarks/forward.py --model buildings [--image FILE]

Eager is the preset as it stands, called under `torch.inference_mode` with nothing set but its number of threads.
Prepared is what the workers of a job do: an allocator that keeps what is freed, batch normalisation folded, channels
last, poolings of our own, and one tile per thread with one torch thread each. Both pass the same pixels; the whole
output is computed in both, and agreement is that of the best classes. With --network the weights are random (He), so
that every activation matters, and the pixels are noise: best classes are often nearly tied, as no trained network's
are. With --model, a bundled one or a model file, they are the middle of an RGB image, or a synthetic scene.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
import torch
from common import BANDS, NETWORKS, network, timed
from rasterio.windows import Window

from tilepipe.allocator import worker_environment
from tilepipe.checkpoint import load_model
from tilepipe.predict.prepare import prepare, use_large_pages, use_one_thread
from tilepipe.predict.scores import normalised
from tilepipe.scene.synthetic import synthetic_scene

REPEATS = 3
"""Passes that are timed in a process, after one that is not."""


def trained_like(name: str) -> torch.nn.Module:
    """The network with weights that keep activations at their scale, and batch statistics that are not trivial."""
    made = network(name)
    generator = torch.Generator().manual_seed(0)
    for module in made.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return made


def noise(tile: int) -> torch.Tensor:
    """A normalised tile."""
    return torch.randn(1, BANDS, tile, tile, generator=torch.Generator().manual_seed(1))


class Subject(NamedTuple):
    """What is passed through what."""

    network: torch.nn.Module
    pixels: torch.Tensor

    @classmethod
    def of(cls, args: argparse.Namespace) -> Subject:
        """That of a command line."""
        if not args.model:
            return cls(trained_like(args.network), noise(args.tile))
        model = load_model(args.model)
        image = middle(args.image, args.tile) if args.image else synthetic_scene((args.tile, args.tile), seed=5).image
        taken = normalised(image, None, model.card.mean, model.card.std, "float32")
        return cls(model.network, torch.from_numpy(taken)[None])


def middle(path: Path, side: int) -> np.ndarray:
    """The first three bands (3, side, side) of an image's middle."""
    with rasterio.open(path) as image:
        window = Window((image.width - side) // 2, (image.height - side) // 2, side, side)
        return image.read([1, 2, 3], window=window)


def eager(subject: Subject, threads: int) -> tuple[float, np.ndarray]:
    """Seconds of a tile, and its labels."""
    torch.set_num_threads(threads)
    made, pixels = subject
    with torch.inference_mode():
        seconds = [_seconds(lambda: made(pixels)) for _ in range(1 + REPEATS)][1:]
        return min(seconds), made(pixels)[0].argmax(0).numpy().astype(np.uint8)


def prepared(subject: Subject, threads: int) -> tuple[float, np.ndarray]:
    """Seconds of a tile where `threads` tiles pass at once, and the labels of one."""
    made, pixels = prepare(subject.network), subject.pixels
    taken: list[float] = []

    def work() -> None:
        use_one_thread()
        with torch.inference_mode():
            made(pixels)
            together.wait()
            taken.append(_seconds(lambda: [made(pixels) for _ in range(REPEATS)]) / REPEATS)

    together = threading.Barrier(threads)
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with torch.inference_mode():
        labels = made(pixels)[0].max(0).indices.numpy().astype(np.uint8)
    return max(taken) / threads, labels


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=tuple(NETWORKS), default="segnet")
    parser.add_argument("--model", help="a bundled model or a model file, in the network's place")
    parser.add_argument("--image", type=Path, help="what --model is shown, at least a tile large")
    parser.add_argument("--tile", type=int, default=1408)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", choices=("eager", "prepared"), help="one process's part; for this script itself")
    parser.add_argument("--labels", type=Path, help="where that part puts its labels")
    args = parser.parse_args()
    if args.only:
        part = eager if args.only == "eager" else prepared
        if args.only == "prepared":
            use_large_pages()
        seconds, labels = part(Subject.of(args), args.threads)
        np.save(args.labels, labels)
        print(seconds)
        return
    same = ["--network", args.network, "--tile", str(args.tile), "--threads", str(args.threads)]
    same += ["--model", args.model] if args.model else []
    same += ["--image", str(args.image)] if args.image else []
    found: dict[str, list[float]] = {"eager": [], "prepared": []}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.npy" for name in found}
        environments = {"eager": {}, "prepared": worker_environment()}
        for _ in range(args.runs):
            for name, seconds in found.items():
                command = [sys.executable, __file__, *same, "--only", name, "--labels", str(files[name])]
                seconds.append(float(timed(command, environments[name]).output))
        differ = float((np.load(files["eager"]) != np.load(files["prepared"])).mean())
    for name, seconds in found.items():
        median = statistics.median(seconds)
        print(f"{name:9} {median:7.3f} s a tile of {args.tile} x {args.tile}, {args.tile**2 / median / 1e6:.3f} Mpx/s")
    ratios = [a / b for a, b in zip(found["eager"], found["prepared"], strict=True)]
    print(f"eager / prepared: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"labels that differ: {differ:.2g} of {args.tile**2}")


if __name__ == "__main__":
    main()
