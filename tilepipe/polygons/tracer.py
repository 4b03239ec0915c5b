"""Rows of labels in, polygons out as soon as they are whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.polygons.rings import Traced, collect
from tilepipe.polygons.simplify import Thinning
from tilepipe.polygons.sweep import (
    CLOSED,
    FREE_REGION,
    FREE_VERTEX,
    HEAD,
    LABEL,
    MERGED,
    NONE,
    REGION_COLUMNS,
    SEEN,
    TOP_REGION,
    TOP_VERTEX,
    VERTEX_COLUMNS,
    Graph,
    index_again,
    sweep_rows,
)

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
BUCKETS = 1 << 12
"""Of the index of vertices, at first; a power of 2."""


class Tracer:
    """Turns a label map of a width, given as rows from the top, into the polygons of its regions.

    Each polygon comes with the rows in which its region ends, ordered by that row and then by column: in one order,
    however the rows are given. Pixels labelled `nodata` make no polygon. With a tolerance, in units of the map that
    `transform` (a, b, c, d, e, f) leads to, borders are simplified, in the same way for both sides.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        nodata: int,
        transform: Sequence[float] = IDENTITY,
        tolerance: float | None = None,
    ) -> None:
        self._nodata, self._width, self._row = nodata, shape[1], 0
        self._written = np.ones(nodata + 1, bool)
        self._written[nodata] = False
        a, b, _, d, e, _ = transform
        thins = tolerance is not None
        self._thinning = Thinning(-1.0 if tolerance is None else tolerance, np.array([a, b, d, e], np.float64), shape)
        # Which shortcuts are free depends on the borders of what has no data, too: it is a region then.
        self._void = NONE if thins else nodata
        counts = np.zeros(6, np.int64)
        counts[[FREE_VERTEX, FREE_REGION, MERGED]] = NONE
        counts[TOP_REGION] = thins
        outside = np.zeros((int(thins), REGION_COLUMNS), np.int64)
        outside[:, [LABEL, HEAD, SEEN]] = nodata, NONE, NONE
        self._graph = Graph(
            np.empty((0, VERTEX_COLUMNS), np.int32),
            outside,
            np.zeros(len(outside)),
            np.empty(len(outside), np.int64),
            np.full((2, self._width + 2), nodata, np.uint16),
            np.full((2, self._width + 2), 0 if thins else NONE, np.int64),
            np.full(self._width + 1, NONE, np.int32),
            counts,
            np.full(BUCKETS if thins else 0, NONE, np.int32),
        )

    def feed(
        self, labels: NDArray[np.uint16], cells: NDArray[np.float64], confidence: NDArray[np.uint8] | None = None
    ) -> Traced:
        """The polygons of regions that end above the last of these rows (n, width).

        `cells` (n,) are the areas of the rows' pixels; confidence is uint8, 255 where there is none.
        """
        self._reserve(len(labels))
        known = np.empty((0, 0), np.uint8) if confidence is None else confidence
        sweep_rows(self._graph, labels, known, cells, self._row, self._void)
        self._row += len(labels)
        return collect(self._graph, self._written, self._thinning)

    def finish(self) -> Traced:
        """The polygons of the regions that are left, once the last row was given."""
        beyond = np.full((1, self._width), self._nodata, np.uint16)
        return self.feed(beyond, np.zeros(1))

    def _reserve(self, rows: int) -> None:
        """Make room for all that these many rows can bring."""
        graph = self._graph
        vertices = int(graph.counts[TOP_VERTEX]) + rows * (self._width + 1)
        if vertices > len(graph.vertices):
            graph = graph._replace(vertices=_grown(graph.vertices, int(graph.counts[TOP_VERTEX]), vertices))
        regions = int(graph.counts[TOP_REGION]) + rows * (self._width + 2)
        if regions > len(graph.regions):
            used = int(graph.counts[TOP_REGION])
            size = max(regions, used + used // 2)
            graph = graph._replace(
                regions=_grown(graph.regions, used, size),
                ground=_grown(graph.ground, used, size),
                closed=_grown(graph.closed, int(graph.counts[CLOSED]), size),
            )
        if 0 < graph.cells.size < int(graph.counts[TOP_VERTEX]) // 4:
            graph = graph._replace(cells=np.empty(4 * graph.cells.size, np.int32))
            index_again(graph)
        self._graph = graph


def _grown(values: NDArray[Any], used: int, size: int) -> NDArray[Any]:
    """At least `size` rows, the first `used` of them as they were."""
    larger = np.empty((max(size, used + used // 2), *values.shape[1:]), values.dtype)
    larger[:used] = values[:used]
    return larger
