"""Simplified borders: neighbours stay neighbours, no border moves further than the tolerance, nothing vanishes."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes_of import NODATA, label_maps, regions_of, trace

from tilepipe.polygons.tracer import Tracer


@settings(max_examples=50)
@given(label_maps(36, speckles=True), st.sampled_from((0.0, 0.5, 1.0, 2.0, 5.0)), st.integers(1, 9))
def test_there_are_neither_gaps_nor_overlaps(labels, tolerance, rows) -> None:
    before, after = trace(labels), trace(labels, rows, tolerance)
    assert [(a.label, a.pixels) for a in before] == [(b.label, b.pixels) for b in after]
    polygons = [region.polygon for region in after]
    assert all(polygon.is_valid and polygon.area > 0 for polygon in polygons)
    assert shapely.coverage_is_valid(polygons)
    union = shapely.union_all(polygons)
    assert union.area == pytest.approx(sum(polygon.area for polygon in polygons))
    if (labels != NODATA).all():
        assert union.equals(shapely.box(0, 0, *labels.shape[::-1]))
    for old, new in zip(before, after, strict=True):
        assert len(old.polygon.interiors) == len(new.polygon.interiors)
        assert shapely.hausdorff_distance(old.polygon.boundary, new.polygon.boundary) <= tolerance + 1e-9


@settings(max_examples=50)
@given(label_maps(), st.integers(1, 9))
def test_the_result_does_not_depend_on_how_rows_are_given(labels, rows) -> None:
    at_once = [region.polygon.wkt for region in trace(labels, tolerance=1.5)]
    assert [region.polygon.wkt for region in trace(labels, rows, 1.5)] == at_once


def test_a_slanted_border_gets_straight() -> None:
    rows, cols = np.indices((120, 120))
    labels = (cols > 40 + rows // 3).astype(np.uint8)
    before, after = trace(labels), trace(labels, 10, 1.0)
    assert sum(shapely.get_num_coordinates(region.polygon) for region in before) > 160
    assert sum(shapely.get_num_coordinates(region.polygon) for region in after) <= 16


def test_shortcuts_leave_room_for_what_lies_between() -> None:
    # The border between 0 and 1 has two bays. The deeper one is kept as the arc's farthest corner; the other holds an
    # island of 2, which a shortcut within the tolerance would leave on the wrong side.
    labels = np.zeros((90, 60), np.uint8)
    labels[:, 40:] = 1
    labels[10:20, 40:55] = 0
    labels[50:60, 40:50] = 0
    labels[53:57, 43:47] = 2
    found = {region.label: region.polygon for region in trace(labels, tolerance=14.0)}
    assert len(found[0].interiors) == 1
    assert shapely.coverage_is_valid(list(found.values()))
    labels[labels == 2] = 0
    free = {region.label: region.polygon for region in trace(labels, tolerance=14.0)}
    assert shapely.get_num_coordinates(free[0]) < shapely.get_num_coordinates(shapely.Polygon(found[0].exterior))


def test_small_regions_keep_an_area() -> None:
    labels = np.zeros((9, 9), np.uint8)
    labels[4, 4] = 1
    island = next(region for region in trace(labels, tolerance=50.0) if region.label == 1)
    assert island.polygon.area == 0.5
    assert island.pixels == 1


def test_the_tolerance_is_in_the_maps_units() -> None:
    rows, cols = np.indices((60, 60))
    labels = (cols > 20 + rows // 3).astype(np.uint16)

    def corners(tolerance: float, transform: tuple[float, ...]) -> int:
        tracer = Tracer(labels.shape, NODATA, transform, tolerance)
        tracer.feed(labels, np.ones(60))
        return sum(shapely.get_num_coordinates(region.polygon) for region in regions_of(tracer.finish()))

    assert corners(0.9, (1.0, 0.0, 7.0, 0.0, -1.0, 9.0)) == corners(9.0, (10.0, 0.0, 7.0, 0.0, -10.0, 9.0))
    assert corners(9.0, (10.0, 0.0, 7.0, 0.0, -10.0, 9.0)) < corners(0.9, (10.0, 0.0, 7.0, 0.0, -10.0, 9.0))


@pytest.mark.slow
def test_a_large_map_is_a_coverage() -> None:
    from scipy.ndimage import gaussian_filter

    random = np.random.default_rng(3)
    labels = np.argmax([gaussian_filter(random.random((1500, 1500)), grain) for grain in (2, 4, 4, 6)], axis=0)
    labels = labels.astype(np.uint8)
    labels[random.random(labels.shape) < 0.002] = 5
    for tolerance in (1.0, 3.0, 30.0):
        polygons = [region.polygon for region in trace(labels, 100, tolerance)]
        assert all(polygon.is_valid for polygon in polygons)
        assert shapely.coverage_is_valid(polygons)
        assert sum(polygon.area for polygon in polygons) == pytest.approx(labels.size)
