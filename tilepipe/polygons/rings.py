"""The rings of closed regions: walked along the graph of a sweep, the region on the left hand.

A ring is simple: where a region touches itself at a corner, two rings meet there. The outer ring runs counter-clockwise
as the map is seen, with rows downwards, and holes clockwise.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilepipe.polygons.simplify import Thinning, thin_ring
from tilepipe.polygons.sweep import (
    CLOSED,
    COL,
    COUNT,
    DROPPED,
    EAST,
    HEAD,
    LABEL,
    NEXT,
    NONE,
    PASSES,
    PIXELS,
    ROW,
    SPOT,
    START,
    SURE,
    TRUST,
    WEST,
    Graph,
    compiled,
    free_region,
    free_vertex,
)


class Rings(NamedTuple):
    """Rings of vertices of one region while they are found; arrays grow."""

    ids: NDArray[np.int32]
    """The rings' vertices, one ring after another."""
    ends: NDArray[np.int64]
    """Where each ring ends in `ids`."""
    walk: NDArray[np.int32]
    """The ring that is being walked."""


class Traced(NamedTuple):
    """Polygons, as rings of corners on the pixel grid. Rings are not closed: the first corner is not repeated."""

    points: NDArray[np.int32]
    """(n, 2): (row, column)"""
    rings: NDArray[np.int64]
    """Where each ring ends in `points`; the first ring of a polygon is its outer one."""
    polygons: NDArray[np.int64]
    """Where each polygon ends in `rings`."""
    facts: NDArray[np.int64]
    """(polygon, 4): label, pixels, sum of confidences, pixels with confidence."""
    ground: NDArray[np.float64]
    """(polygon,): the sum of its pixels' areas."""


@compiled
def collect(graph: Graph, written: NDArray[np.bool_], thinning: Thinning) -> Traced:
    """The polygons of the closed regions, in order, whose label is `written`; all of these regions are let go."""
    rings = Rings(np.empty(1024, np.int32), np.empty(16, np.int64), np.empty(1024, np.int32))
    points, ends = np.empty((4096, 2), np.int32), np.empty(256, np.int64)
    found = graph.counts[CLOSED]
    polygons, facts, ground = np.empty(found, np.int64), np.empty((found, 4), np.int64), np.empty(found)
    used = ring_count = count = 0
    for i in range(found):
        region = graph.closed[i]
        rings, number, outer = _rings_of(graph, region, rings)
        if thinning.tolerance >= 0:
            for k in range(number):
                thin_ring(graph, rings.ids[(rings.ends[k - 1] if k else 0) : rings.ends[k]], thinning)
        if written[graph.regions[region, LABEL]]:
            points = _roomy_pairs(points, used + rings.ends[number - 1])
            ends = _roomy_ends(ends, ring_count + number)
            for k in range(number):
                ring = outer if k == 0 else (k - 1 if k <= outer else k)
                used = _write_ring(graph, rings, ring, points, used)
                ends[ring_count] = used
                ring_count += 1
            polygons[count] = ring_count
            facts[count, 0] = graph.regions[region, LABEL]
            facts[count, 1] = graph.regions[region, PIXELS]
            facts[count, 2] = graph.regions[region, TRUST]
            facts[count, 3] = graph.regions[region, SURE]
            ground[count] = graph.ground[region]
            count += 1
        _release(graph, rings, number)
        free_region(graph, region)
    graph.counts[CLOSED] = 0
    return Traced(points[:used], ends[:ring_count], polygons[:count], facts[:count], ground[:count])


@compiled
def _rings_of(graph: Graph, region: int, rings: Rings) -> tuple[Rings, int, int]:
    """A region's rings, how many they are, and the number of the outer one."""
    vertices = graph.vertices
    number, outer = 0, NONE
    vertex = graph.regions[region, HEAD]
    while vertex != NONE:
        if vertices[vertex, PASSES] & START:
            rings, number = _walk(vertices, vertex, rings, number)
            # The list starts at the region's first corner; the ring that a walk starts on is the last it gives.
            if outer == NONE:
                outer = number - 1
        vertex = vertices[vertex, NEXT]
    return rings, number, outer


@compiled
def _walk(vertices: NDArray[np.int32], first: int, rings: Rings, number: int) -> tuple[Rings, int]:
    """The rings with those of a walk that arrives at `first` from the east, and how many they are then."""
    walk, length = rings.walk, 0
    vertex, way = first, WEST
    while True:
        if way == WEST:
            vertices[vertex, PASSES] &= ~START
        spot = vertices[vertex, SPOT]
        if spot != NONE:
            # Here for the second time: what lies between is a ring of its own.
            rings, number = _keep(vertices, Rings(rings.ids, rings.ends, walk), number, spot, length)
            length = spot
        else:
            vertices[vertex, SPOT] = length
        if length == walk.size:
            walk = _roomy(walk, length + 1)
        walk[length] = vertex
        length += 1
        way = _turn(vertices, vertex, way)
        vertex = vertices[vertex, way]
        if vertex == first and way == WEST:
            return _keep(vertices, Rings(rings.ids, rings.ends, walk), number, 0, length)


@compiled
def _turn(vertices: NDArray[np.int32], vertex: int, way: int) -> int:
    """The direction in which the border goes on: leftmost first, which keeps the region's own pixel on the left."""
    for turn in (1, 0, 3):
        onward = EAST + (way - EAST + turn) % 4
        if vertices[vertex, onward] != NONE:
            return onward
    return NONE


@compiled
def _keep(vertices: NDArray[np.int32], rings: Rings, number: int, start: int, stop: int) -> tuple[Rings, int]:
    """The rings and the walk's part from start to stop as one more."""
    begin = rings.ends[number - 1] if number else 0
    ids, ends = _roomy(rings.ids, begin + stop - start), _roomy_ends(rings.ends, number + 1)
    for i in range(start, stop):
        ids[begin + i - start] = rings.walk[i]
        vertices[rings.walk[i], SPOT] = NONE
    ends[number] = begin + stop - start
    return Rings(ids, ends, rings.walk), number + 1


@compiled
def _write_ring(graph: Graph, rings: Rings, ring: int, points: NDArray[np.int32], used: int) -> int:
    """How many points there are once those of a ring that are not dropped are written."""
    for i in range(rings.ends[ring - 1] if ring else 0, rings.ends[ring]):
        vertex = rings.ids[i]
        if not graph.vertices[vertex, PASSES] & DROPPED:
            points[used, 0] = graph.vertices[vertex, ROW]
            points[used, 1] = graph.vertices[vertex, COL]
            used += 1
    return used


@compiled
def _release(graph: Graph, rings: Rings, number: int) -> None:
    """Count one pass less at each vertex of the rings, and free those that no other region needs."""
    for i in range(rings.ends[number - 1]):
        vertex = rings.ids[i]
        graph.vertices[vertex, PASSES] -= 1
        if not graph.vertices[vertex, PASSES] & COUNT:
            free_vertex(graph, vertex)


@compiled
def _roomy(values: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    """The array, or a larger one with its values, of at least `size`."""
    if size <= values.size:
        return values
    larger = np.empty(max(size, values.size + values.size // 2), np.int32)
    for i in range(values.size):
        larger[i] = values[i]
    return larger


@compiled
def _roomy_ends(values: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    if size <= values.size:
        return values
    larger = np.empty(max(size, values.size + values.size // 2), np.int64)
    for i in range(values.size):
        larger[i] = values[i]
    return larger


@compiled
def _roomy_pairs(values: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    if size <= values.shape[0]:
        return values
    larger = np.empty((max(size, values.shape[0] + values.shape[0] // 2), 2), np.int32)
    for i in range(values.shape[0]):
        larger[i, 0], larger[i, 1] = values[i, 0], values[i, 1]
    return larger
