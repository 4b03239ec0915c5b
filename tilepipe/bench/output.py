"""How fast blocks are written: compressed, made durable, recorded, by the store's own writer."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.bench.clock import sustained
from tilepipe.bench.report import WriteFigure
from tilepipe.job import Job
from tilepipe.plan import BlockIndex
from tilepipe.predict.maps import BlockMaps
from tilepipe.store.output import create_or_resume
from tilepipe.store.spec import StoreSpec

PATCH = 48
"""Pixels of a side of the patches that share a label, about."""


def write(job: Job, folder: Path, seconds: float) -> WriteFigure:
    """How fast blocks of ragged patches are written to a store in `folder`, by as many threads as a worker has."""
    plan, spec = job.plan, job.spec()
    threads = min(job.resources.blocks, plan.block_count)
    maps = patches(spec, tuple(min(b, n) for b, n in zip(plan.block, plan.shape, strict=True)))
    cells = plan.scale[0] * plan.scale[1] / 1e6
    # Each thread has blocks of its own: no two may write the same one at a time.
    numbers = [count(thread, threads) for thread in range(threads)]
    with create_or_resume(folder / "written.zarr", spec) as store:

        def put(thread: int) -> float:
            number = next(numbers[thread]) % (plan.block_count // threads * threads)
            index = BlockIndex(number // plan.grid[1], number % plan.grid[1])
            window = plan.block_window(index)
            store.write_block(index, _cut(maps, window.shape), {})
            return window.area * cells

        rate = sustained(put, seconds, threads)
    return WriteFigure(plan.block, threads, rate.amount)


def patches(spec: StoreSpec, shape: tuple[int, ...]) -> BlockMaps:
    """A block's maps that compress about as those of a real raster do: patches with ragged edges."""
    rng = np.random.default_rng(0)
    rows, cols = (np.arange(n) for n in shape)
    ragged = rng.integers(0, PATCH // 4, (2, max(shape)))
    down = (rows[:, None] + ragged[0, : shape[1]]) // PATCH
    right = (cols + ragged[1, : shape[0], None]) // PATCH
    grid = tuple(n // PATCH + 2 for n in shape)

    def spread(values: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(values[..., down, right])

    classes = len(spec.classes)
    labels = spread(rng.integers(0, classes, grid).astype(spec.label_dtype))
    confidence = spread(rng.integers(100, 255, grid).astype(np.uint8)) if spec.confidence else None
    probabilities = None
    if spec.probabilities is not None:
        shares = rng.integers(0, 255, (classes, *grid))
        probabilities = spread(shares.astype(spec.probabilities))
    return BlockMaps(labels, confidence, probabilities)


def _cut(maps: BlockMaps, shape: tuple[int, int]) -> BlockMaps:
    labels, confidence, probabilities = (
        None if each is None else each[..., : shape[0], : shape[1]] for each in maps[:3]
    )
    return BlockMaps(labels, confidence, probabilities)
