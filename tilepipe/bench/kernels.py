"""How fast scores become maps: the kernels that label, and those that blend, beside a plain copy.

Each thread works on scores of its own, of as many classes as the job's network gives, larger than any cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from tilepipe.bench.clock import sustained
from tilepipe.bench.network import settling
from tilepipe.bench.report import KernelFigure
from tilepipe.job import Job
from tilepipe.predict.blend import Strip, accumulate, finish
from tilepipe.predict.maps import BlockMaps, Wanted
from tilepipe.predict.scores import Patch, label_dtype, label_pixels, score_maps

SIZE = 64 << 20
"""Bytes that labelling reads and writes in a call of one thread on a CPU, about."""
TOTAL = 512 << 20
"""Bytes that all threads' calls read and write together, at most."""
COLUMNS = 1024
CUDA_SHAPE = (2048, 2048)

FLOAT = 4
"""Bytes of a sum or weight."""
ROUNDS = 3
"""Times that a kernel and its copy take turns: what else the machine does slows both, so their ratio is steadier."""

Name = Literal["label", "accumulate", "finish"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel, ready to be called by each thread."""

    name: Name
    run: Callable[[int], None]
    pixels: int
    """Of a call."""
    size: int
    """Bytes that a pixel makes it read and write."""

    @property
    def moved(self) -> int:
        """Bytes that a call reads and writes."""
        return self.pixels * self.size


Copy = Callable[[int, int], None]
"""Given how many bytes to read and write, and a thread's number, copies half as many."""


def kernels(job: Job, device: torch.device, last: bool, seconds: float) -> tuple[tuple[KernelFigure, ...], float]:
    """How fast the kernels are, each with all the job's threads, and the GB/s of a plain copy.

    `last`: whether the network's scores lie in memory as (h, w, classes).
    """
    threads = job.resources.threads
    scores = _Scores(
        job.geometry.channels_out,
        np.dtype(np.float64 if job.precision == "float64" else np.float32),
        last,
        Wanted(job.options.confidence, job.options.probabilities),
    )
    made = _cuda_kernels(scores, device) if device.type == "cuda" else _cpu_kernels(scores, threads)
    found, copying = made
    settle = settling(device)

    def rate(work: Callable[[int], None], moved: int) -> float:
        """GB/s of what reads and writes so many bytes."""

        def call(thread: int) -> float:
            work(thread)
            return moved / 1e9

        return sustained(call, seconds / ROUNDS, threads, settle).amount

    figures, copies = [], []
    for kernel in found:
        pairs = [
            (rate(kernel.run, kernel.moved), rate(partial(copying, kernel.moved), kernel.moved)) for _ in range(ROUNDS)
        ]
        moved = median(own for own, _ in pairs)
        share = median(own / copied for own, copied in pairs)
        used = (kernel.name == "label") == job.plan.exact
        figures.append(KernelFigure(kernel.name, used, moved / kernel.size * 1e3, moved, share))
        copies += [copied for _, copied in pairs]
    return tuple(figures), median(copies)


@dataclass(frozen=True, slots=True)
class _Scores:
    """What the kernels are given, and what they are to make of it."""

    classes: int
    dtype: np.dtype[Any]
    last: bool
    wanted: Wanted

    def sizes(self, state: int) -> dict[Name, int]:
        """Bytes per pixel that each kernel reads and writes; `state`: of what a strip holds beside its sums."""
        each = {None: 0, "uint8": 1}.get(self.wanted.probabilities, FLOAT)
        maps = label_dtype(self.classes).itemsize + self.wanted.confidence + self.classes * each
        scores, sums = self.classes * self.dtype.itemsize, self.classes * FLOAT + FLOAT + state
        return {"label": scores + maps, "accumulate": scores + FLOAT + 2 * sums, "finish": sums + maps}


def _cpu_kernels(given: _Scores, threads: int) -> tuple[list[Kernel], Copy]:
    # A strip also holds the first label, 16 bits, and what was seen, 8 bits.
    classes, last, sizes = given.classes, given.last, given.sizes(state=3)
    rows, cols = max(64, min(SIZE, TOTAL // threads) // (COLUMNS * sizes["label"])), COLUMNS
    pixels, patch = rows * cols, Patch(0, 0, 0, 0, rows, cols)
    noise = np.random.default_rng(0).standard_normal(
        (rows, cols, classes) if last else (classes, rows, cols), np.float32
    )
    scores = [noise.astype(given.dtype) for _ in range(threads)]
    maps = [BlockMaps.unfilled((rows, cols), classes, given.wanted)[:3] for _ in range(threads)]
    strips = [Strip.empty(classes, rows, cols) for _ in range(threads)]
    weights = np.ones((rows, cols), np.float32)
    # Written: memory that never was is read as one page of zeros, out of the nearest cache.
    halves = [np.ones((2, pixels * max(sizes.values()) // 2), np.uint8) for _ in range(threads)]
    scale = given.wanted.scale
    plain = given.wanted == Wanted()

    def label(thread: int) -> None:
        labels, *others = maps[thread]
        if plain:
            label_pixels(scores[thread], last, patch, None, labels)
        else:
            score_maps(scores[thread], last, patch, None, labels, *others, scale)

    def add(thread: int) -> None:
        accumulate(scores[thread], last, patch, None, weights, strips[thread])

    def end(thread: int) -> None:
        finish(strips[thread], (0, rows), None, *maps[thread], scale)

    def copying(moved: int, thread: int) -> None:
        source, target = halves[thread][:, : moved // 2]
        np.copyto(target, source)

    runs: dict[Name, Callable[[int], None]] = {"label": label, "accumulate": add, "finish": end}
    return [Kernel(name, run, pixels, sizes[name]) for name, run in runs.items()], copying


def _cuda_kernels(given: _Scores, device: torch.device) -> tuple[list[Kernel], Copy]:
    from tilepipe.predict import blend_cuda
    from tilepipe.predict.cuda_device import CudaDevice

    (rows, cols), classes, sizes = CUDA_SHAPE, given.classes, given.sizes(state=4)
    queue, pixels, scale = CudaDevice(device), rows * cols, given.wanted.scale
    grid, block = blend_cuda.blocks_for(CUDA_SHAPE), blend_cuda.THREADS
    scores = torch.randn((rows, cols, classes), device=device, dtype=getattr(torch, given.dtype.name)).permute(2, 0, 1)
    scores = scores if given.last else scores.contiguous()
    # What is not wanted has size 0.
    keep = torch.empty((0, 0), dtype=torch.bool, device=device)
    unfilled = BlockMaps.unfilled(CUDA_SHAPE, classes, given.wanted)
    empty = unfilled.labels, np.empty((0, 0), np.uint8), np.empty((0, 0, 0), np.float32)
    maps = [
        torch.from_numpy(none if array is None else array).to(device)
        for array, none in zip(unfilled[:3], empty, strict=True)
    ]
    undefined = torch.zeros(1, dtype=torch.int32, device=device)
    weights = torch.ones(CUDA_SHAPE, device=device)
    sums = torch.zeros((classes + 1, rows, cols), device=device)
    state = torch.zeros(CUDA_SHAPE, dtype=torch.int32, device=device)
    halves = torch.zeros((2, pixels * max(sizes.values()) // 2), dtype=torch.uint8, device=device)
    # What made the tensors was queued elsewhere than what the kernels are queued on.
    torch.cuda.synchronize(device)

    def launch(kernel: Any, *arguments: Any) -> Callable[[int], None]:
        def run(_thread: int) -> None:
            with queue.computing():
                queue.run(kernel, grid, block, arguments)

        return run

    def copying(moved: int, _thread: int) -> None:
        with queue.computing():
            halves[1, : moved // 2].copy_(halves[0, : moved // 2])

    runs: dict[Name, Callable[[int], None]] = {
        "label": launch(blend_cuda.score_maps, scores, (0, 0), keep, *maps, scale, undefined),
        "accumulate": launch(blend_cuda.accumulate, scores, (0, 0), keep, weights, sums, state, undefined),
        "finish": launch(blend_cuda.finish, sums, (0, rows), *maps, scale),
    }
    return [Kernel(name, run, pixels, sizes[name]) for name, run in runs.items()], copying
