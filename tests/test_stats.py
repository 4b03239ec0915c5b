"""Areas on the ground against pyproj's geodesics, and class statistics against whole arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from commands import assert_one_line, run
from hypothesis import given
from hypothesis import strategies as st
from pyproj import CRS, Geod, Transformer
from stores import STATE, block_maps, expected, make_spec, make_store, value_spec

from tilepipe.ground import row_areas
from tilepipe.stats import map_statistics
from tilepipe.store.output import OutputStore, create_or_resume, open_store

DEGREES = CRS.from_epsg(4326).to_wkt()


@given(st.floats(-89, 89), st.floats(1e-4, 1.0), st.floats(0.2, 2.0))
def test_a_rows_pixels_have_their_geodesic_area(top: float, width: float, ratio: float) -> None:
    height = width * ratio
    spec = make_spec(shape=(3, 5), crs_wkt=DEGREES, transform=(width, 0.0, 7.0, 0.0, -height, top))
    areas = row_areas(spec)
    assert areas is not None
    geod = Geod(ellps="WGS84")
    for row, area in enumerate(areas):
        north, south = top - row * height, top - (row + 1) * height
        if south > -89:
            # A side along a parallel is no geodesic: between close points it nearly is.
            pixel = shapely.segmentize(shapely.box(7, south, 7 + width, north), width / 64)
            assert area == pytest.approx(abs(geod.geometry_area_perimeter(pixel)[0]), rel=1e-4)


def test_the_earth_has_its_area() -> None:
    spec = make_spec(shape=(180, 360), crs_wkt=DEGREES, transform=(1.0, 0.0, -180.0, 0.0, -1.0, 90.0))
    areas = row_areas(spec)
    assert areas is not None
    assert areas.sum() * 360 == pytest.approx(510_065_621_724_088.4, rel=1e-12)
    np.testing.assert_allclose(areas, areas[::-1], rtol=1e-9)
    beyond = row_areas(make_spec(shape=(4, 4), crs_wkt=DEGREES, transform=(1.0, 0.0, 0.0, 0.0, -1.0, 92.0)))
    assert beyond is not None
    assert list(beyond[:2]) == [0, 0]
    assert beyond[2] > 0


def test_a_rotated_grid_has_nearly_the_area_of_the_upright_one() -> None:
    turn = np.deg2rad(30)
    a, b = 0.001 * np.cos(turn), 0.001 * np.sin(turn)
    upright = row_areas(make_spec(crs_wkt=DEGREES, transform=(0.001, 0.0, 7.0, 0.0, -0.001, 47.0)))
    turned = row_areas(make_spec(crs_wkt=DEGREES, transform=(a, b, 7.0, b, -a, 47.0)))
    assert upright is not None
    assert turned is not None
    np.testing.assert_allclose(turned, upright, rtol=2e-3)


@pytest.mark.parametrize("code", [3857, 3395])
def test_mercators_pixels_have_their_area_on_the_ground(code: int) -> None:
    x, y = Transformer.from_crs(4326, code, always_xy=True).transform(11.0, 60.0)
    spec = make_spec(shape=(3, 4), crs_wkt=CRS.from_epsg(code).to_wkt(), transform=(500.0, 0.0, x, 0.0, -400.0, y))
    areas = row_areas(spec)
    assert areas is not None
    degrees = Transformer.from_crs(code, 4326, always_xy=True)
    geod = Geod(ellps="WGS84")
    for row, area in enumerate(areas):
        pixel = shapely.segmentize(shapely.box(x, y - 400 * (row + 1), x + 500, y - 400 * row), 5)
        ground = shapely.transform(pixel, lambda points: np.column_stack(degrees.transform(*points.T)))
        assert area == pytest.approx(abs(geod.geometry_area_perimeter(ground)[0]), rel=1e-5)
    assert areas[0] < 0.3 * 500 * 400


def test_projected_areas_are_in_metres() -> None:
    feet = CRS.from_epsg(2263).to_wkt()
    areas = row_areas(make_spec(crs_wkt=feet, transform=(3.0, 0.0, 0.0, 0.0, -2.0, 0.0)))
    np.testing.assert_allclose(areas, 6 * (1200 / 3937) ** 2)
    assert row_areas(make_spec(crs_wkt=None)) is None
    assert row_areas(make_spec(transform=None)) is None


def filled(path: Path, labels: np.ndarray | None = None, **changes: Any) -> tuple[OutputStore, dict[str, np.ndarray]]:
    spec = make_spec(**changes)
    whole = expected(spec)
    if labels is not None:
        whole["labels"] = labels
    with create_or_resume(path, spec) as store:
        for index in spec.blocks():
            store.write_block(index, block_maps(spec, whole, index), {})
    return open_store(path), whole


@pytest.mark.parametrize("confidence", [False, True])
@pytest.mark.parametrize("degrees", [False, True])
def test_statistics_are_those_of_the_arrays(tmp_path: Path, confidence: bool, degrees: bool) -> None:
    place = {"crs_wkt": DEGREES, "transform": (0.1, 0.0, 8.0, 0.0, -0.1, 60.0)} if degrees else {}
    store, whole = filled(tmp_path / "o.zarr", confidence=confidence, **place)
    found, labels = map_statistics(store), whole["labels"]
    cells = row_areas(store.spec)
    assert cells is not None
    assert (found.pixels, found.nodata) == ((labels != 255).sum(), (labels == 255).sum())
    assert found.area_m2 == pytest.approx(((labels != 255) * cells[:, None]).sum())
    for each in found.classes:
        mine = labels == each.number
        assert each.pixels == mine.sum()
        assert each.share == pytest.approx(mine.sum() / (labels != 255).sum())
        assert each.area_m2 == pytest.approx((mine * cells[:, None]).sum())
        if confidence:
            known = whole["confidence"][mine & (whole["confidence"] != 255)]
            assert each.confidence == pytest.approx(known.mean() / 254)
        else:
            assert each.confidence is None


def test_pixels_are_read_only_where_records_do_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.zeros((50, 70), np.uint8)
    labels[40, 5] = 1
    seen: list[tuple[int, int]] = []
    filled(tmp_path / "m.zarr", labels)
    map_statistics(open_store(tmp_path / "m.zarr"), lambda *pair: seen.append(pair))
    assert seen == []
    place = {"crs_wkt": DEGREES, "transform": (0.1, 0.0, 8.0, 0.0, -0.1, 60.0)}
    store, _ = filled(tmp_path / "d.zarr", labels, **place)
    found = map_statistics(store, lambda *pair: seen.append(pair))
    assert seen[-1] == (18 * 32, 18 * 32)
    cells = row_areas(store.spec)
    assert cells is not None
    assert found.classes[1].area_m2 == pytest.approx(cells[40])
    assert found.classes[0].area_m2 == pytest.approx(cells.sum() * 70 - cells[40])


def test_an_unfinished_map_tells_of_its_finished_blocks(tmp_path: Path) -> None:
    store, whole = filled(tmp_path / "o.zarr", confidence=True)
    (tmp_path / "o.zarr" / STATE / "0" / "1.json").unlink()
    found, done = map_statistics(store), whole["labels"].copy()
    done[:32, 32:64] = 255
    assert (found.done, found.blocks) == (5, 6)
    assert found.pixels == (done != 255).sum()
    known = whole["confidence"][(done == 2) & (whole["confidence"] != 255)]
    assert found.classes[2].confidence == pytest.approx(known.mean() / 254)


def test_the_command_tells_of_classes(tmp_path: Path) -> None:
    whole = make_store(tmp_path / "o.zarr", make_spec(confidence=True))
    result = run("stats", tmp_path / "o.zarr", "--json", "-q")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [each["pixels"] for each in found["classes"]] == [(whole["labels"] == n).sum() for n in range(3)]
    text = run("stats", tmp_path / "o.zarr", "-q").stdout
    assert "trees / shrubs" in text
    assert "confidence" in text.splitlines()[0]
    make_store(tmp_path / "v.zarr", value_spec())
    assert_one_line(run("stats", tmp_path / "v.zarr"), 3, "holds values", "tilepipe status")
