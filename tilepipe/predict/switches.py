"""2x2 max-pooling and its undoing on the CPU, where the maximum was found being a byte.

Maps are (rows, columns, channels), float32, C-contiguous. A *switch* says which pixel of a 2x2 square gave the maximum:
0, 1 in its upper row, 2, 3 in its lower one; the first of equals. Kernels release the GIL and use one thread.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from tilepipe.predict.scores import Array


@njit(nogil=True, cache=True, inline="always")
def _taken(value: np.float32, relu: bool) -> np.float32:
    return np.float32(0) if relu and value < np.float32(0) else value


@njit(nogil=True, cache=True)
def pool(x: Array, relu: bool, maxima: Array, switches: Array) -> None:
    """Fill `maxima` and `switches` (uint8) from a map; an odd last row or column is dropped.

    relu: whether each value counts as its own, or 0 where that is more. NaN is the maximum of its square.
    """
    channels = x.shape[2]
    for y in range(x.shape[0] // 2):
        upper, lower = x[2 * y].reshape(-1), x[2 * y + 1].reshape(-1)
        best, where = maxima[y].reshape(-1), switches[y].reshape(-1)
        for col in range(x.shape[1] // 2):
            left, out = 2 * col * channels, col * channels
            right = left + channels
            for c in range(channels):
                most, place = _taken(upper[left + c], relu), np.uint8(0)
                v = _taken(upper[right + c], relu)
                better = (v > most) | np.isnan(v)
                most, place = v if better else most, np.uint8(1) if better else place
                v = _taken(lower[left + c], relu)
                better = (v > most) | np.isnan(v)
                most, place = v if better else most, np.uint8(2) if better else place
                v = _taken(lower[right + c], relu)
                better = (v > most) | np.isnan(v)
                best[out + c] = v if better else most
                where[out + c] = np.uint8(3) if better else place


@njit(nogil=True, cache=True)
def unpool(x: Array, switches: Array, at: tuple[int, int], out: Array) -> None:
    """Fill `out` with the unpooled map: each value where its switch says, zeros elsewhere.

    x: pooled values; at: where the first of them lies in `switches`, (row, column). What no pooled value covers is 0.
    """
    rows, cols, channels = x.shape
    zero = np.float32(0)
    for y in range(out.shape[0]):
        row = y // 2
        line = out[y].reshape(-1)
        if row >= rows:
            line[:] = zero
            continue
        left_place = np.uint8(2 * (y % 2))
        right_place = np.uint8(left_place + 1)
        values, where = x[row].reshape(-1), switches[at[0] + row, at[1] : at[1] + cols].reshape(-1)
        for col in range(cols):
            base, left = col * channels, 2 * col * channels
            right = left + channels
            for c in range(channels):
                v, place = values[base + c], where[base + c]
                line[left + c] = v if place == left_place else zero
                line[right + c] = v if place == right_place else zero
        line[2 * cols * channels :] = zero
