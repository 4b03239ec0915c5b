"""A label map's regions and the corners of their borders, found row by row.

A region is a set of pixels of one label that are connected along their sides. Borders run along the lines between
pixels; a vertex is where a border bends or where more than two borders meet:

    row r - 1     a | b          edges: north a != b, south d != e, west a != d, east b != e
                 ---v---         two edges in line: no vertex
    row r         d | e          three or four: a junction, where three or four regions meet

Each vertex knows its neighbours in the four directions; that is the whole planar graph. A region that no longer
touches the last row is closed: all of its vertices are there, and its rings can be walked. Numbers of vertices
and of regions are given out again once they are free, so that what is held belongs to the rows last read, to regions
that are still open, and to the borders they share with others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

compiled = njit(nogil=True, cache=True, error_model="numpy")

NONE = -1

# Columns of `Graph.vertices`.
ROW, COL = 0, 1
EAST, NORTH, WEST, SOUTH = 2, 3, 4, 5
"""The next vertex in that direction; in a free vertex, EAST is the next free one."""
NEXT = 6
"""The next vertex of the same region's list: those from which a border runs east with the region beneath it."""
PASSES = 7
"""How often rings will still pass here, in the bits of COUNT; and flags."""
SPOT = 8
"""Where the ring that is being walked was here before."""
CHAIN = 9
"""The next vertex of the same cell of an index."""
VERTEX_COLUMNS = 10

COUNT, START, JUNCTION, SETTLED, DROPPED = 7, 8, 16, 32, 64
"""Bits of PASSES: a ring still starts here; three borders or more meet; simplification has decided, and against it."""

CELL = 4
"""Cells of the index are 2 ** CELL pixels on a side."""

# Columns of `Graph.regions`.
PARENT, LABEL, PIXELS, TRUST, SURE, HEAD, TAIL, SEEN = range(8)
"""TRUST is the sum of the confidences of SURE pixels; SEEN the last row; in a free region, HEAD is the next free."""
REGION_COLUMNS = 8

FREE_VERTEX, TOP_VERTEX, FREE_REGION, TOP_REGION, MERGED, CLOSED = range(6)
"""Places in `Graph.counts`: first free and first never used of both, regions merged in this row, regions closed."""


class Graph(NamedTuple):
    """What the sweep holds between rows. Rows of pixels have one more at both ends, which lies outside."""

    vertices: NDArray[np.int32]
    """(vertex, column)"""
    regions: NDArray[np.int64]
    """(region, column)"""
    ground: NDArray[np.float64]
    """(region,): the sum of its pixels' areas."""
    closed: NDArray[np.int64]
    """(region,): numbers of closed regions, in the order in which they closed; `counts` says how many."""
    labels: NDArray[np.uint16]
    """(2, width + 2): the last two rows; row r is at r modulo 2."""
    owners: NDArray[np.int64]
    """(2, width + 2): the regions of these rows' pixels."""
    columns: NDArray[np.int32]
    """(width + 1,): the last vertex on the border that runs south there."""
    counts: NDArray[np.int64]
    cells: NDArray[np.int32]
    """(buckets,): the first vertex of each bucket of an index by cells of the map; of size 0 where none is needed."""


@compiled
def sweep_rows(
    graph: Graph,
    labels: NDArray[np.uint16],
    confidence: NDArray[np.uint8],
    cells: NDArray[np.float64],
    first: int,
    void: int,
) -> None:
    """Take in rows (n, width) of labels from row `first` on; `graph` must have room for their vertices and regions.

    `confidence` is like the labels or of size 0; `cells` (n,) are the areas of the rows' pixels. Pixels labelled
    `void` belong to no region.
    """
    for i in range(labels.shape[0]):
        row = first + i
        for col in range(labels.shape[1]):
            graph.labels[row & 1, col + 1] = labels[i, col]
        _join_pixels(graph, row, confidence[i] if confidence.size else confidence[:0, 0], cells[i], void)
        _close_regions(graph, row)
        _flatten(graph, row)
        _mark_vertices(graph, row, void)


@compiled
def _join_pixels(graph: Graph, row: int, confidence: NDArray[np.uint8], cell: float, void: int) -> None:
    """Give each run of equal labels in a row the region of those above it."""
    now, before = graph.labels[row & 1], graph.labels[(row + 1) & 1]
    owners, above = graph.owners[row & 1], graph.owners[(row + 1) & 1]
    regions, width = graph.regions, now.size
    start = 0
    while start < width:
        label, stop = now[start], start + 1
        while stop < width and now[stop] == label:
            stop += 1
        region = NONE
        if label != void:
            for p in range(start, stop):
                if before[p] == label and (p == start or before[p - 1] != label):
                    other = find(regions, above[p])
                    region = other if region == NONE else _unite(graph, region, other)
            if region == NONE:
                region = _new_region(graph, label)
            regions[region, PIXELS] += stop - start
            regions[region, SEEN] = row
            graph.ground[region] += (stop - start) * cell
            if confidence.size:
                for p in range(max(start, 1), min(stop, width - 1)):
                    if confidence[p - 1] != 255:
                        regions[region, TRUST] += confidence[p - 1]
                        regions[region, SURE] += 1
        for p in range(start, stop):
            owners[p] = region
        start = stop


@compiled
def find(regions: NDArray[np.int64], region: int) -> int:
    """The region that a region has become part of."""
    while regions[region, PARENT] != region:
        regions[region, PARENT] = regions[regions[region, PARENT], PARENT]
        region = regions[region, PARENT]
    return region


@compiled
def _unite(graph: Graph, one: int, other: int) -> int:
    """The region that holds both; its list starts at the vertex that comes first by rows and columns."""
    if one == other:
        return one
    regions, vertices = graph.regions, graph.vertices
    a, b = regions[one, HEAD], regions[other, HEAD]
    if a == NONE or (b != NONE and (vertices[b, ROW], vertices[b, COL]) < (vertices[a, ROW], vertices[a, COL])):
        one, other, a, b = other, one, b, a
    if b != NONE:
        vertices[regions[one, TAIL], NEXT] = b
        regions[one, TAIL] = regions[other, TAIL]
    for column in (PIXELS, TRUST, SURE):
        regions[one, column] += regions[other, column]
    graph.ground[one] += graph.ground[other]
    regions[other, PARENT] = one
    # Rows still name the part; its number is free once they do not.
    regions[other, HEAD] = graph.counts[MERGED]
    graph.counts[MERGED] = other
    return one


@compiled
def _new_region(graph: Graph, label: int) -> int:
    counts, regions = graph.counts, graph.regions
    region = counts[FREE_REGION]
    if region == NONE:
        region = counts[TOP_REGION]
        counts[TOP_REGION] += 1
    else:
        counts[FREE_REGION] = regions[region, HEAD]
    for column in range(REGION_COLUMNS):
        regions[region, column] = 0
    regions[region, PARENT] = region
    regions[region, LABEL] = label
    regions[region, HEAD] = NONE
    graph.ground[region] = 0
    return region


@compiled
def free_region(graph: Graph, region: int) -> None:
    """Give the region's number back."""
    graph.regions[region, HEAD] = graph.counts[FREE_REGION]
    graph.counts[FREE_REGION] = region


@compiled
def _close_regions(graph: Graph, row: int) -> None:
    """Note the regions of the row above that this row does not continue, by their first column."""
    above, regions = graph.owners[(row + 1) & 1], graph.regions
    for p in range(above.size):
        if above[p] == NONE or (p > 0 and above[p - 1] == above[p]):
            continue
        region = find(regions, above[p])
        if regions[region, SEEN] != row:
            regions[region, SEEN] = row
            graph.closed[graph.counts[CLOSED]] = region
            graph.counts[CLOSED] += 1


@compiled
def _flatten(graph: Graph, row: int) -> None:
    """Let the row name whole regions, and free those that became part of another."""
    owners, regions, counts = graph.owners[row & 1], graph.regions, graph.counts
    if counts[MERGED] == NONE:
        return
    for p in range(owners.size):
        if owners[p] != NONE:
            owners[p] = find(regions, owners[p])
    while counts[MERGED] != NONE:
        region = counts[MERGED]
        counts[MERGED] = regions[region, HEAD]
        free_region(graph, region)


@compiled
def _mark_vertices(graph: Graph, row: int, void: int) -> None:
    """Make the vertices on the line above a row, and link them with their neighbours north and west."""
    above, below = graph.labels[(row + 1) & 1], graph.labels[row & 1]
    owners, vertices, regions = graph.owners[row & 1], graph.vertices, graph.regions
    last = NONE
    for col in range(above.size - 1):
        a, b, d, e = above[col], above[col + 1], below[col], below[col + 1]
        north, south, west, east = a != b, d != e, a != d, b != e
        if north == south and west == east and not (north and west):
            continue
        vertex = _new_vertex(graph, row, col)
        if north:
            vertices[vertex, NORTH] = graph.columns[col]
            vertices[graph.columns[col], SOUTH] = vertex
        if west:
            vertices[vertex, WEST] = last
            vertices[last, EAST] = vertex
        if south:
            graph.columns[col] = vertex
        # One pass for each region that meets here: each pixel, less the neighbours that are one region.
        passes = (a != void) + (b != void) + (d != void) + (e != void)
        passes -= (not north and a != void) + (not south and d != void)
        passes -= (not west and a != void) + (not east and b != void)
        if east:
            last = vertex
            region = owners[col + 1]
            if region != NONE:
                passes |= START
                if regions[region, HEAD] == NONE:
                    regions[region, HEAD] = vertex
                else:
                    vertices[regions[region, TAIL], NEXT] = vertex
                regions[region, TAIL] = vertex
        if north + south + west + east > 2:
            passes |= JUNCTION
        vertices[vertex, PASSES] = passes


@compiled
def _new_vertex(graph: Graph, row: int, col: int) -> int:
    counts, vertices = graph.counts, graph.vertices
    vertex = counts[FREE_VERTEX]
    if vertex == NONE:
        vertex = counts[TOP_VERTEX]
        counts[TOP_VERTEX] += 1
    else:
        counts[FREE_VERTEX] = vertices[vertex, EAST]
    for column in range(VERTEX_COLUMNS):
        vertices[vertex, column] = NONE
    vertices[vertex, ROW] = row
    vertices[vertex, COL] = col
    if graph.cells.size:
        _enter(graph, vertex)
    return vertex


@compiled
def free_vertex(graph: Graph, vertex: int) -> None:
    """Give the vertex's number back."""
    if graph.cells.size:
        _leave(graph, vertex)
    graph.vertices[vertex, EAST] = graph.counts[FREE_VERTEX]
    graph.counts[FREE_VERTEX] = vertex


@compiled
def bucket(i: int, j: int, buckets: int) -> int:
    """Where the index keeps the vertices of a cell (row, column); `buckets` is a power of 2."""
    return (i * 73856093 ^ j * 19349663) & (buckets - 1)


@compiled
def _place(graph: Graph, vertex: int) -> int:
    row, col = graph.vertices[vertex, ROW], graph.vertices[vertex, COL]
    return bucket(row >> CELL, col >> CELL, graph.cells.size)


@compiled
def _enter(graph: Graph, vertex: int) -> None:
    place = _place(graph, vertex)
    graph.vertices[vertex, CHAIN] = graph.cells[place]
    graph.cells[place] = vertex


@compiled
def _leave(graph: Graph, vertex: int) -> None:
    vertices, place = graph.vertices, _place(graph, vertex)
    onward = vertices[vertex, CHAIN]
    if graph.cells[place] == vertex:
        graph.cells[place] = onward
        return
    before = graph.cells[place]
    while vertices[before, CHAIN] != vertex:
        before = vertices[before, CHAIN]
    vertices[before, CHAIN] = onward


@compiled
def index_again(graph: Graph) -> None:
    """Enter all vertices in use into an index that was made anew."""
    for place in range(graph.cells.size):
        graph.cells[place] = NONE
    for vertex in range(graph.counts[TOP_VERTEX]):
        if graph.vertices[vertex, PASSES] & COUNT:
            _enter(graph, vertex)
