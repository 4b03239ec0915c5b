"""Polygons as well-known binary, the bytes that vector formats share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tilepipe.polygons.rings import Traced
from tilepipe.polygons.sweep import compiled

POLYGON = 3
"""The number of the geometry's type (OGC 06-103r4, table 7)."""


def encode(traced: Traced, transform: NDArray[np.float64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(bytes, offsets): polygon i is bytes[offsets[i]:offsets[i + 1]], little-endian.

    `transform` (6,) is (a, b, c, d, e, f): x = a * col + b * row + c, y = d * col + e * row + f.
    """
    return _encode(traced.points, traced.rings, traced.polygons, transform)


@compiled
def _encode(
    points: NDArray[np.int32], rings: NDArray[np.int64], polygons: NDArray[np.int64], transform: NDArray[np.float64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    # 9 bytes a polygon: byte order, type, rings. 4 a ring: its points, the first of which comes twice. 16 a point.
    out = np.empty(9 * polygons.size + 4 * rings.size + 16 * (points.shape[0] + rings.size), np.uint8)
    offsets = np.zeros(polygons.size + 1, np.int64)
    pair = np.empty(2, np.float64)
    used = ring = point = 0
    for i in range(polygons.size):
        out[used] = 1
        _put_number(out, used + 1, POLYGON)
        _put_number(out, used + 5, polygons[i] - ring)
        used += 9
        while ring < polygons[i]:
            first, size = point, rings[ring] - point
            _put_number(out, used, size + 1)
            used += 4
            for k in range(size + 1):
                row, col = points[first + k % size]
                pair[0] = transform[0] * col + transform[1] * row + transform[2]
                pair[1] = transform[3] * col + transform[4] * row + transform[5]
                out[used : used + 16] = pair.view(np.uint8)
                used += 16
            point += size
            ring += 1
        offsets[i + 1] = used
    return out, offsets


@compiled
def _put_number(out: NDArray[np.uint8], place: int, number: int) -> None:
    for i in range(4):
        out[place + i] = (number >> (8 * i)) & 255
