"""Rows of labels in, polygons out as soon as they are whole."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.polygons.rings import Traced, collect
from tilepipe.polygons.sweep import (
    CLOSED,
    FREE_REGION,
    FREE_VERTEX,
    MERGED,
    NONE,
    REGION_COLUMNS,
    TOP_REGION,
    TOP_VERTEX,
    VERTEX_COLUMNS,
    Graph,
    sweep_rows,
)


class Tracer:
    """Turns a label map of a width, given as rows from the top, into the polygons of its regions.

    Each polygon comes with the rows in which its region ends, ordered by that row and then by column: in one order,
    however the rows are given. Pixels labelled `nodata` make no polygon.
    """

    def __init__(self, width: int, dtype: np.dtype[Any], nodata: int) -> None:
        self._nodata, self._width, self._row = nodata, width, 0
        self._written = np.ones(nodata + 1, bool)
        self._written[nodata] = False
        counts = np.zeros(6, np.int64)
        counts[[FREE_VERTEX, FREE_REGION, MERGED]] = NONE
        self._graph = Graph(
            np.empty((0, VERTEX_COLUMNS), np.int32),
            np.empty((0, REGION_COLUMNS), np.int64),
            np.empty(0),
            np.empty(0, np.int64),
            np.full((2, width + 2), nodata, dtype),
            np.full((2, width + 2), NONE, np.int64),
            np.full(width + 1, NONE, np.int32),
            counts,
        )

    def feed(
        self, labels: NDArray[Any], cells: NDArray[np.float64], confidence: NDArray[np.uint8] | None = None
    ) -> Traced:
        """The polygons of regions that end above the last of these rows (n, width).

        `cells` (n,) are the areas of the rows' pixels; confidence is uint8, 255 where there is none.
        """
        self._reserve(len(labels))
        known = np.empty((0, 0), np.uint8) if confidence is None else confidence
        sweep_rows(self._graph, labels, known, cells, self._row, self._nodata)
        self._row += len(labels)
        return collect(self._graph, self._written)

    def finish(self) -> Traced:
        """The polygons of the regions that are left, once the last row was given."""
        beyond = np.full((1, self._width), self._nodata, self._graph.labels.dtype)
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
        self._graph = graph


def _grown(values: NDArray[Any], used: int, size: int) -> NDArray[Any]:
    """At least `size` rows, the first `used` of them as they were."""
    larger = np.empty((max(size, used + used // 2), *values.shape[1:]), values.dtype)
    larger[:used] = values[:used]
    return larger
