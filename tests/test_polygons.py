"""The tracer against rasterio's shapes: the same polygons, valid, in one order, and nothing held for longer."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from shapes_of import NODATA, assert_same_shapes, label_maps, rasterio_shapes, regions_of, trace

from tilepipe.polygons.sweep import CLOSED, EAST, FREE_VERTEX, NONE, TOP_VERTEX
from tilepipe.polygons.tracer import Tracer


@given(label_maps(), st.integers(1, 9))
def test_the_polygons_are_rasterios(labels, rows) -> None:
    found = trace(labels, rows)
    assert all(region.polygon.is_valid for region in found)
    assert [region.polygon.area for region in found] == [region.pixels for region in found]
    assert_same_shapes(found, rasterio_shapes(labels))


@given(label_maps(), st.integers(1, 9))
def test_neither_polygons_nor_their_order_depend_on_how_rows_are_given(labels, rows) -> None:
    at_once = [(region.label, region.pixels, region.polygon.wkt) for region in trace(labels)]
    assert [(region.label, region.pixels, region.polygon.wkt) for region in trace(labels, rows)] == at_once


@given(label_maps())
def test_neighbours_have_their_borders_corners_in_common(labels) -> None:
    assert shapely.coverage_is_valid([region.polygon for region in trace(labels)])


def test_a_ring_around_a_hole_that_touches_itself_is_two() -> None:
    # The region of 1 meets itself at the corner of the hole and of the outside.
    labels = np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], np.uint8)
    one, hole, rest = sorted(trace(labels), key=lambda region: (-region.label, region.pixels))
    assert (one.pixels, hole.pixels, rest.pixels) == (7, 1, 8)
    assert len(one.polygon.interiors) == 1
    assert one.polygon.is_valid
    assert one.polygon.interiors[0].coords[0] == (1, 1) or (1, 1) in one.polygon.interiors[0].coords


@pytest.mark.parametrize("value", [3, NODATA])
def test_pixels_that_touch_at_a_corner_are_apart(value) -> None:
    labels = np.full((2, 2), value, np.uint8)
    labels[0, 0] = labels[1, 1] = 7
    found = [region.polygon for region in trace(labels) if region.label == 7]
    assert [polygon.bounds for polygon in found] == [(0, 0, 1, 1), (1, 1, 2, 2)]


def test_one_class_is_the_whole_raster() -> None:
    (whole,) = trace(np.zeros((300, 200), np.uint8), 7)
    assert whole.pixels == 60000
    assert whole.polygon.equals(shapely.box(0, 0, 200, 300))
    assert shapely.get_num_coordinates(whole.polygon) == 5


def test_a_map_without_data_has_no_polygons() -> None:
    assert trace(np.full((5, 6), NODATA, np.uint8), 2) == []


def test_a_lake_with_islands_is_one_polygon() -> None:
    labels = np.zeros((64, 64), np.uint8)
    labels[3:60, 5:62] = 1
    labels[10:50:4, 10:50:4] = 2
    (lake,) = [region for region in trace(labels, 5) if region.label == 1]
    assert lake.pixels == 57 * 57 - 100
    assert len(lake.polygon.interiors) == 100


def test_outer_rings_turn_one_way_and_holes_the_other() -> None:
    labels = np.zeros((9, 9), np.uint8)
    labels[2:7, 2:7] = 1
    labels[4, 4] = 2
    for region in trace(labels):
        # Rows run downwards here, so what is clockwise to shapely is counter-clockwise on the map.
        assert not region.polygon.exterior.is_ccw
        assert all(ring.is_ccw for ring in region.polygon.interiors)


def test_polygons_come_as_soon_as_their_regions_end() -> None:
    labels = np.zeros((40, 10), np.uint16)
    labels[5:8, 2:4] = 1
    tracer = Tracer(labels.shape, NODATA)
    assert regions_of(tracer.feed(labels[:8], np.ones(8))) == []
    (early,) = regions_of(tracer.feed(labels[8:9], np.ones(1)))
    assert early.label == 1


@given(label_maps(), st.sampled_from((None, 0.0, 2.0)))
def test_what_is_written_is_let_go(labels, tolerance) -> None:
    tracer = Tracer(labels.shape, NODATA, tolerance=tolerance)
    tracer.feed(labels.astype(np.uint16), np.ones(len(labels)))
    tracer.finish()
    graph, free, vertex = tracer._graph, 0, int(tracer._graph.counts[FREE_VERTEX])
    while vertex != NONE:
        free, vertex = free + 1, int(graph.vertices[vertex, EAST])
    assert graph.counts[CLOSED] == 0
    if tolerance is None:
        assert free == graph.counts[TOP_VERTEX]


def test_memory_is_that_of_the_open_borders() -> None:
    random = np.random.default_rng(0)
    tracer = Tracer((4000, 100), NODATA)
    for _ in range(100):
        tracer.feed(random.integers(0, 4, (40, 100), np.uint16), np.ones(40))
    # Each of 4000 rows made some 90 vertices.
    assert tracer._graph.counts[TOP_VERTEX] < 12_000


def test_areas_and_confidence_are_summed_over_each_region() -> None:
    random = np.random.default_rng(1)
    labels = random.integers(0, 2, (30, 40)).astype(np.uint16)
    confidence = random.integers(0, 256, (30, 40)).astype(np.uint8)
    cells = random.random(30)
    tracer = Tracer(labels.shape, NODATA)
    found = [tracer.feed(labels[r : r + 7], cells[r : r + 7], confidence[r : r + 7]) for r in range(0, 30, 7)]
    found.append(tracer.finish())
    from rasterio.features import rasterize

    for traced in found:
        for region, fact, ground in zip(regions_of(traced), traced.facts, traced.ground, strict=True):
            inside = rasterize([region.polygon], labels.shape).astype(bool)
            known = inside & (confidence != 255)
            assert tuple(fact[2:]) == (confidence[known].sum(), known.sum())
            assert ground == pytest.approx((inside * cells[:, None]).sum())
