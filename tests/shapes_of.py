"""Label maps traced into shapely polygons, by tilepipe and by rasterio; random maps to trace."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import shapely
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.features import shapes
from scipy.ndimage import gaussian_filter

from tilepipe.polygons.rings import Traced
from tilepipe.polygons.tracer import Tracer

NODATA = 255


class Region(NamedTuple):
    label: int
    pixels: int
    polygon: shapely.Polygon


def regions_of(traced: Traced) -> list[Region]:
    """The polygons, x being the column and y the row."""
    rings = np.split(traced.points[:, ::-1], traced.rings)[:-1]
    begin, found = 0, []
    for end, fact in zip(traced.polygons, traced.facts, strict=True):
        polygon = shapely.Polygon(rings[begin], rings[begin + 1 : end])
        found.append(Region(int(fact[0]), int(fact[1]), polygon))
        begin = end
    return found


def trace(labels: NDArray[Any], rows: int = 1000, tolerance: float | None = None) -> list[Region]:
    """The map's regions, traced from so many rows at a time."""
    tracer = Tracer(labels.shape, NODATA, tolerance=tolerance)
    found = []
    for row in range(0, len(labels), rows):
        part = labels[row : row + rows].astype(np.uint16)
        found += regions_of(tracer.feed(part, np.ones(len(part))))
    return found + regions_of(tracer.finish())


def rasterio_shapes(labels: NDArray[Any]) -> dict[int, list[shapely.Polygon]]:
    """The polygons of each label, by GDAL."""
    found: dict[int, list[shapely.Polygon]] = {}
    for geometry, value in shapes(labels, mask=labels != NODATA, connectivity=4):
        found.setdefault(int(value), []).append(shapely.geometry.shape(geometry))
    return found


def assert_same_shapes(found: list[Region], wanted: dict[int, list[shapely.Polygon]]) -> None:
    """That both are the same sets of polygons, wherever rings start and whatever lies on straight lines."""

    def key(polygon: shapely.Polygon) -> tuple[float, ...]:
        return (*polygon.bounds, polygon.area)

    left = {(label, *key(polygon)): [] for label in wanted for polygon in wanted[label]}
    for label, polygons in wanted.items():
        for polygon in polygons:
            left[(label, *key(polygon))].append(polygon)
    for label, _, polygon in found:
        candidates = left[(label, *key(polygon))]
        same = [other for other in candidates if other.equals(polygon)]
        assert len(same) == 1
        candidates.remove(same[0])
    assert not any(left.values())


@st.composite
def label_maps(draw: st.DrawFn, side: int = 24, speckles: bool = False) -> NDArray[np.uint8]:
    """Noise and blobs of up to five classes, in part with nodata, and with single pixels of a sixth if asked for."""
    shape = (draw(st.integers(1, side)), draw(st.integers(1, side)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    classes, grain = draw(st.integers(1, 5)), draw(st.sampled_from((0, 0.6, 1.5, 3)))
    fields = [gaussian_filter(random.random(shape), grain) for _ in range(classes)]
    labels = np.argmax(fields, axis=0).astype(np.uint8)
    if draw(st.booleans()):
        labels[gaussian_filter(random.random(shape), draw(st.sampled_from((0, 1)))) < 0.4] = NODATA
    if speckles:
        labels[random.random(shape) < draw(st.sampled_from((0, 0.02, 0.05)))] = 5
    return labels
