"""CUDA kernels that turn a tile's scores into maps: what `scores` and `blend` do on the CPU, one thread per pixel.

Scores are a tile's crop, (classes, h, w) of any strides, float32 or float64. An array that is not wanted has
size 0. No sum is formed by several threads, so results do not depend on the order of execution; the only atomic
operation counts undefined pixels. The module needs the `gpu` extra, and is imported only where a CUDA device (or
numba's simulator) is used.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

THREADS = (32, 8)
"""Pixels of a thread block, (columns, rows): a warp reads along a row."""


def blocks_for(shape: tuple[int, int]) -> tuple[int, int]:
    """The launch grid, (columns, rows), that covers `shape` (rows, columns)."""
    return -(-shape[1] // THREADS[0]), -(-shape[0] // THREADS[1])


@cuda.jit(device=True)
def _best(scores: Any, y: int, x: int) -> tuple[int, bool]:
    # The lowest class of the best score, and whether the pixel is undefined (see `tilepipe.predict.scores`).
    best = scores[0, y, x]
    label = 0
    broken = math.isnan(best)
    for c in range(1, scores.shape[0]):
        v = scores[c, y, x]
        broken = broken or math.isnan(v)
        if v > best:
            best = v
            label = c
    return label, broken or math.isinf(best)


@cuda.jit(device=True)
def _power_sum(scores: Any, y: int, x: int, label: int) -> Any:
    best = scores[label, y, x]
    total = np.float32(0)
    for c in range(scores.shape[0]):
        total += math.exp(np.float32(scores[c, y, x] - best))
    return total


@cuda.jit(cache=True)
def score_maps(
    scores: Any, to: Any, keep: Any, labels: Any, confidence: Any, probabilities: Any, scale: Any, undefined: Any
) -> None:
    """Write a crop's best classes, their and all classes' probabilities into a block's maps.

    to: the crop's (row, column) in the block. keep: (rows, columns) of the block, bool. scale: (factor, offset) of
    stored probabilities. undefined: int32 (1,); counts kept pixels without a best class.
    """
    x, y = cuda.grid(2)
    if y < scores.shape[1] and x < scores.shape[2]:
        row, col = to[0] + y, to[1] + x
        label, broken = _best(scores, y, x)
        labels[row, col] = label
        if broken:
            if keep.size == 0 or keep[row, col]:
                cuda.atomic.add(undefined, 0, 1)
        elif confidence.size > 0 or probabilities.size > 0:
            share = np.float32(1) / _power_sum(scores, y, x, label)
            if confidence.size > 0:
                confidence[row, col] = int(share * np.float32(254) + np.float32(0.5))
            if probabilities.size > 0:
                best = scores[label, y, x]
                for c in range(scores.shape[0]):
                    p = math.exp(np.float32(scores[c, y, x] - best)) * share
                    probabilities[c, row, col] = p * np.float32(scale[0]) + np.float32(scale[1])


@cuda.jit(cache=True)
def accumulate(scores: Any, to: Any, keep: Any, weights: Any, sums: Any, state: Any, undefined: Any) -> None:
    """Add a crop's softmax probabilities, times `weights`, to a strip from `to` (row, column) on.

    keep: (rows, columns) of the strip, bool. weights: the crop's, float32 (h, w). sums: float32
    (classes + 1, rows, columns), the weights' sum last. state: int32 (rows, columns), 4 * first tile's label +
    (0: no tile, 1: one, 2: several of one label, 3: several of different labels). One call per tile, in order.
    """
    x, y = cuda.grid(2)
    if y < scores.shape[1] and x < scores.shape[2]:
        row, col = to[0] + y, to[1] + x
        label, broken = _best(scores, y, x)
        if broken:
            if keep.size == 0 or keep[row, col]:
                cuda.atomic.add(undefined, 0, 1)
            return
        classes = scores.shape[0]
        best = scores[label, y, x]
        weight = weights[y, x]
        sums[classes, row, col] += weight
        part = weight / _power_sum(scores, y, x, label)
        for c in range(classes):
            sums[c, row, col] += math.exp(np.float32(scores[c, y, x] - best)) * part
        before = state[row, col]
        seen, first = before & 3, before >> 2
        if seen == 0:
            state[row, col] = 4 * label + 1
        elif label != first:
            state[row, col] = 4 * first + 3
        elif seen == 1:
            state[row, col] = 4 * first + 2


@cuda.jit(cache=True)
def finish(sums: Any, rows: Any, labels: Any, confidence: Any, probabilities: Any, scale: Any) -> None:
    """Turn a strip's first rows into rows[0]..rows[1]-1 of a block's maps: normalise, best class, confidence."""
    x, y = cuda.grid(2)
    if y < rows[1] - rows[0] and x < sums.shape[2]:
        row, classes = rows[0] + y, sums.shape[0] - 1
        best = sums[0, y, x]
        label = 0
        for c in range(1, classes):
            if sums[c, y, x] > best:
                best = sums[c, y, x]
                label = c
        labels[row, x] = label
        weight = sums[classes, y, x]
        if weight > 0:
            if confidence.size > 0:
                share = min(best / weight, np.float32(1))
                confidence[row, x] = int(share * np.float32(254) + np.float32(0.5))
            if probabilities.size > 0:
                for c in range(classes):
                    share = min(sums[c, y, x] / weight, np.float32(1))
                    probabilities[c, row, x] = share * np.float32(scale[0]) + np.float32(scale[1])
