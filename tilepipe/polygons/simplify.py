"""Fewer corners on the borders between regions, once for both sides, so that neighbours stay neighbours.

A border between two junctions, where three or more regions meet, is an arc. Junctions and the raster's corners stay.
An arc is thinned by D. H. Douglas and T. K. Peucker (Algorithms for the reduction of the number of points, 1973): a
shortcut is taken where no corner between its ends lies further from it than the tolerance, and only where the area
between shortcut and arc holds no other corner of the map (A. Saalfeld, Topologically consistent line simplification,
1999). Where that is so for all shortcuts, no two of them cross: one that crossed another would have to end in the
other's area, or let the other's arc turn within its own. So there are neither gaps nor overlaps, and what lay within
a polygon stays within. What is looked at are corners as they were, so the order of decisions does not matter.

An arc keeps at least one corner between its ends, a loop two, so that no region vanishes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilepipe.polygons.sweep import (
    CELL,
    CHAIN,
    COL,
    DROPPED,
    JUNCTION,
    NONE,
    PASSES,
    ROW,
    SETTLED,
    SPOT,
    Graph,
    bucket,
    compiled,
)

LONGEST = 256
"""Pixels that a shortcut spans at most along an axis: what bounds the search for corners in its way."""


class Thinning(NamedTuple):
    """How borders are simplified."""

    tolerance: float
    """In the map's units; negative for no simplification."""
    metric: NDArray[np.float64]
    """(a, b, d, e) of the map's transform."""
    shape: tuple[int, int]
    """(rows, columns) of the map, whose four corners stay."""


@compiled
def thin_ring(graph: Graph, ring: NDArray[np.int32], thinning: Thinning) -> None:
    """Decide which corners of a ring of vertices are dropped, where that was not decided from the other side."""
    start = NONE
    for i in range(ring.size):
        if _fixed(graph.vertices, ring[i], thinning.shape):
            start = i
            break
    if start == NONE:
        if not graph.vertices[ring[0], PASSES] & SETTLED:
            _settle(graph, _arc(ring, _first(graph.vertices, ring), ring.size + 1), thinning)
        return
    begin = start
    for step in range(1, ring.size + 1):
        end = start + step
        if not _fixed(graph.vertices, ring[end % ring.size], thinning.shape):
            continue
        inner = ring[(begin + 1) % ring.size]
        if end - begin > 1 and not graph.vertices[inner, PASSES] & SETTLED:
            _settle(graph, _arc(ring, begin, end - begin + 1), thinning)
        begin = end


@compiled
def _arc(ring: NDArray[np.int32], begin: int, size: int) -> NDArray[np.int32]:
    """So many vertices of a ring from a place on."""
    arc = np.empty(size, np.int32)
    for i in range(size):
        arc[i] = ring[(begin + i) % ring.size]
    return arc


@compiled
def _fixed(vertices: NDArray[np.int32], vertex: int, shape: tuple[int, int]) -> bool:
    row, col = vertices[vertex, ROW], vertices[vertex, COL]
    if vertices[vertex, PASSES] & JUNCTION:
        return True
    return (row == 0 or row == shape[0]) and (col == 0 or col == shape[1])


@compiled
def _first(vertices: NDArray[np.int32], ring: NDArray[np.int32]) -> int:
    """The place in a ring of the vertex that comes first by rows and columns."""
    best = 0
    for i in range(1, ring.size):
        row, col = vertices[ring[i], ROW], vertices[ring[i], COL]
        if (row, col) < (vertices[ring[best], ROW], vertices[ring[best], COL]):
            best = i
    return best


@compiled
def _settle(graph: Graph, arc: NDArray[np.int32], thinning: Thinning) -> None:
    """Mark the corners between an arc's ends as kept or dropped; a loop ends where it starts."""
    vertices, last = graph.vertices, arc.size - 1
    for i in range(1, last):
        vertices[arc[i], PASSES] |= SETTLED | DROPPED
        vertices[arc[i], SPOT] = i
    far, _ = _farthest(vertices, arc, 0, last, thinning.metric)
    stack = [(0, far), (far, last)]
    vertices[arc[far], PASSES] &= ~DROPPED
    if arc[0] == arc[last]:
        # A third corner, for else both halves may fall on one line.
        one, high = _farthest(vertices, arc, 0, far, thinning.metric)
        other, higher = _farthest(vertices, arc, far, last, thinning.metric)
        if high >= higher:
            stack = [(0, one), (one, far), (far, last)]
        else:
            one = other
            stack = [(0, far), (far, one), (one, last)]
        vertices[arc[one], PASSES] &= ~DROPPED
    while stack:
        begin, end = stack.pop()
        if end - begin < 2:
            continue
        far, distance = _farthest(vertices, arc, begin, end, thinning.metric)
        if distance <= thinning.tolerance and _free(graph, arc, begin, end, distance, thinning.metric):
            continue
        vertices[arc[far], PASSES] &= ~DROPPED
        stack.append((begin, far))
        stack.append((far, end))
    for i in range(1, last):
        vertices[arc[i], SPOT] = NONE


@compiled
def _farthest(
    vertices: NDArray[np.int32], arc: NDArray[np.int32], begin: int, end: int, metric: NDArray[np.float64]
) -> tuple[int, float]:
    """The place strictly between two places of an arc that is farthest from the segment of both, and how far."""
    far, most = begin + 1, -1.0
    for i in range(begin + 1, end):
        distance = _distance(vertices, arc[i], arc[begin], arc[end], metric)
        if distance > most:
            far, most = i, distance
    return far, most


@compiled
def _distance(vertices: NDArray[np.int32], vertex: int, begin: int, end: int, metric: NDArray[np.float64]) -> float:
    """From a vertex to the segment between two others, in the map's units."""
    row, col = vertices[begin, ROW], vertices[begin, COL]
    rows, cols = float(vertices[end, ROW] - row), float(vertices[end, COL] - col)
    x, y = metric[0] * cols + metric[1] * rows, metric[2] * cols + metric[3] * rows
    rows, cols = float(vertices[vertex, ROW] - row), float(vertices[vertex, COL] - col)
    u, v = metric[0] * cols + metric[1] * rows, metric[2] * cols + metric[3] * rows
    length = x * x + y * y
    along = 0.0 if length == 0 else min(1.0, max(0.0, (u * x + v * y) / length))
    return np.hypot(u - along * x, v - along * y)


@compiled
def _free(
    graph: Graph, arc: NDArray[np.int32], begin: int, end: int, distance: float, metric: NDArray[np.float64]
) -> bool:
    """Whether no other vertex lies in the area between a part of an arc and its shortcut."""
    vertices, head = graph.vertices, arc[begin]
    top, left = vertices[head, ROW], vertices[head, COL]
    bottom, right = top, left
    for i in range(begin + 1, end + 1):
        top, bottom = min(top, vertices[arc[i], ROW]), max(bottom, vertices[arc[i], ROW])
        left, right = min(left, vertices[arc[i], COL]), max(right, vertices[arc[i], COL])
    if bottom - top > LONGEST or right - left > LONGEST:
        return False
    for i in range(top >> CELL, (bottom >> CELL) + 1):
        for j in range(left >> CELL, (right >> CELL) + 1):
            vertex = graph.cells[bucket(i, j, graph.cells.size)]
            while vertex != NONE:
                row, col, spot = vertices[vertex, ROW], vertices[vertex, COL], vertices[vertex, SPOT]
                within = top <= row <= bottom and left <= col <= right
                own = begin <= spot <= end or vertex == head or vertex == arc[end]
                # What lies between chord and arc is no farther from the chord than the arc is.
                if (
                    within
                    and not own
                    and _distance(vertices, vertex, head, arc[end], metric) <= distance * (1 + 1e-9)
                    and _encloses(vertices, arc, begin, end, row, col)
                ):
                    return False
                vertex = vertices[vertex, CHAIN]
    return True


@compiled
def _encloses(vertices: NDArray[np.int32], arc: NDArray[np.int32], begin: int, end: int, row: int, col: int) -> bool:
    """Whether a point lies in the area between a part of an arc and its shortcut, or on the shortcut."""
    inside = False
    for i in range(begin, end + 1):
        one, other = arc[i], arc[i + 1 if i < end else begin]
        top, left = np.int64(vertices[one, ROW]), np.int64(vertices[one, COL])
        rows, cols = vertices[other, ROW] - top, vertices[other, COL] - left
        # Twice the area of the triangle of edge and point: 0 on the edge's line.
        side = rows * (col - left) - cols * (row - top)
        level = min(0, rows) <= row - top <= max(0, rows) and min(0, cols) <= col - left <= max(0, cols)
        if i == end and side == 0 and level:
            return True
        if (top <= row) != (top + rows <= row) and (side < 0) == (rows > 0):
            inside = not inside
    return inside
