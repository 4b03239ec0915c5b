"""Refinement by the conditional random field of `tilepipe.crf.parameters` on a CUDA device, one thread per pixel.

The formula is the same; exponentials round differently, so results agree with the CPU's to a few units in the last
place and not bit for bit. A pixel's sums are formed by one thread, row by row over its neighbours, so they do not
depend on where it lies. Kernels are computed anew in each step: a device has more arithmetic than memory. The
module needs the `gpu` extra, and is imported only where a CUDA device (or numba's simulator) is used.
"""

from __future__ import annotations

import math
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import cuda

from tilepipe.crf.cpu import FLOOR, LIMIT
from tilepipe.crf.parameters import CrfParameters
from tilepipe.crf.refine import profiles
from tilepipe.errors import RunError
from tilepipe.predict.blend_cuda import THREADS, blocks_for
from tilepipe.predict.cuda_device import CudaDevice, Download
from tilepipe.predict.scores import Array

GROUP = 8
"""Classes whose sums a thread holds at once."""


def refine_on(
    device: CudaDevice, probabilities: Array, colors: Array, valid: Array | None, parameters: CrfParameters
) -> Array:
    """The refined probabilities, as of `tilepipe.crf.refine.refine`, computed on a device.

    Any number of threads may call it at once. Device memory: 3 times the probabilities, the colours, and 2 values
    and a flag a pixel. Raises RunError where that does not fit.
    """
    classes, height, width = probabilities.shape
    known = np.ones((height, width), np.bool_) if valid is None else valid
    arrays = [np.ascontiguousarray(a) for a in (probabilities, colors, known)]
    staged = [device.stage(array) for array in arrays]
    for _ in range(2):
        with device.room, suppress(torch.OutOfMemoryError):
            with device.computing():
                download = _queue(device, staged, parameters)
            return download.wait()[0]
        # Only now: while the error was handled, its frames held the tensors.
        device.free()
    raise RunError(
        f"refining {height} x {width} pixels of {classes} classes does not fit into the memory of {device.device}, "
        "caches freed; choose a smaller --tile or --block"
    )


def _queue(device: CudaDevice, staged: list[torch.Tensor], parameters: CrfParameters) -> Download:
    # All steps, queued on the device's current stream.
    given, colors, valid = device.upload(staged)
    kind = np.dtype(str(given.dtype).removeprefix("torch."))
    _, height, width = given.shape
    tables, weights = (torch.from_numpy(a).to(given.device) for a in profiles(parameters, kind))
    colors.mul_(1 / (math.sqrt(2) * parameters.color_deviation))
    prior = given.clamp(min=FLOOR)
    before, after = torch.where(valid, prior, given), given
    strength = torch.empty((2, height, width), dtype=given.dtype, device=given.device)
    strengths, step = kernels_for(kind)
    launch = blocks_for((height, width)), THREADS
    device.run(strengths, *launch, (colors, valid, tables, weights, strength))
    for _ in range(parameters.iterations):
        device.run(step, *launch, (prior, before, after, colors, valid, strength, tables))
        before, after = after, before
    return device.download([before])


@lru_cache
def kernels_for(dtype: np.dtype[Any]) -> tuple[Any, Any]:
    """The two kernels in this type, float32 or float64: both kernels' strengths, and one step.

    strengths(colors, valid, tables, weights, strength) fills `strength` (2, h, w) with each weight / the sum of its
    kernel over a pixel's neighbours. step(prior, before, after, colors, valid, strength, tables) turns the beliefs
    `before` into those `after`, all (classes, h, w); pixels that are not valid keep theirs. colors: (bands, h, w),
    so scaled that the squared distance is the exponent; tables: as of `tilepipe.crf.refine.profiles`.
    """
    real = dtype.type
    zero, limit = real(0), real(LIMIT)

    @cuda.jit(device=True)
    def similar(colors: Any, tables: Any, here: Any, there: Any) -> Any:
        # The appearance kernel of two pixels, each (row, column).
        exponent = tables[0, abs(there[0] - here[0])] + tables[0, abs(there[1] - here[1])]
        for b in range(colors.shape[0]):
            difference = colors[b, here[0], here[1]] - colors[b, there[0], there[1]]
            exponent += difference * difference
        return math.exp(-min(exponent, limit))

    @cuda.jit
    def strengths(colors: Any, valid: Any, tables: Any, weights: Any, strength: Any) -> None:
        x, y = cuda.grid(2)
        height, width, radius = valid.shape[0], valid.shape[1], tables.shape[1] - 1
        if y < height and x < width and valid[y, x]:
            appearance, smoothness = zero, zero
            for v in range(max(0, y - radius), min(height, y + radius + 1)):
                for u in range(max(0, x - radius), min(width, x + radius + 1)):
                    if valid[v, u] and not (v == y and u == x):
                        appearance += similar(colors, tables, (y, x), (v, u))
                        smoothness += tables[1, abs(v - y)] * tables[1, abs(u - x)]
            strength[0, y, x] = weights[0] / appearance if appearance > zero else zero
            strength[1, y, x] = weights[1] / smoothness if smoothness > zero else zero

    @cuda.jit(device=True)
    def normalise(prior: Any, after: Any, y: int, x: int) -> None:
        # From the messages in `after` to beliefs.
        best, total = after[0, y, x], zero
        for c in range(1, after.shape[0]):
            best = max(best, after[c, y, x])
        for c in range(after.shape[0]):
            power = prior[c, y, x] * math.exp(after[c, y, x] - best)
            after[c, y, x] = power
            total += power
        for c in range(after.shape[0]):
            after[c, y, x] /= total

    @cuda.jit
    def step(prior: Any, before: Any, after: Any, colors: Any, valid: Any, strength: Any, tables: Any) -> None:
        x, y = cuda.grid(2)
        classes, height, width = prior.shape
        radius = tables.shape[1] - 1
        if y < height and x < width:
            if not valid[y, x]:
                for c in range(classes):
                    after[c, y, x] = before[c, y, x]
                return
            sums = cuda.local.array(GROUP, dtype)
            for first in range(0, classes, GROUP):
                for c in range(GROUP):
                    sums[c] = zero
                for v in range(max(0, y - radius), min(height, y + radius + 1)):
                    for u in range(max(0, x - radius), min(width, x + radius + 1)):
                        if valid[v, u] and not (v == y and u == x):
                            weight = strength[0, y, x] * similar(colors, tables, (y, x), (v, u))
                            weight += strength[1, y, x] * tables[1, abs(v - y)] * tables[1, abs(u - x)]
                            for c in range(GROUP):
                                if first + c < classes:
                                    sums[c] += weight * before[first + c, v, u]
                for c in range(GROUP):
                    if first + c < classes:
                        after[first + c, y, x] = sums[c]
            normalise(prior, after, y, x)

    return strengths, step
