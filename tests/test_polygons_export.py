"""Stores as files of polygons: what geopandas reads of each format, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import shapely
from commands import assert_one_line, run
from pyproj import CRS, Geod
from shapely.affinity import affine_transform
from shapes_of import rasterio_shapes
from stores import CLASSES, STATE, TRANSFORM, block_maps, expected, make_spec, make_store, value_spec

from tilepipe.cli import polygons as cli
from tilepipe.errors import RunError, StoreError, UsageError
from tilepipe.polygons.export import PolygonOptions, export_polygons
from tilepipe.polygons.write import DRIVERS
from tilepipe.store.output import create_or_resume
from tilepipe.store.spec import LabelClass, StoreSpec

ENDINGS = (".gpkg", ".fgb", ".geojson", ".parquet")


def blobs(path: Path, **changes: Any) -> dict[str, np.ndarray]:
    """The arrays of a store whose labels come in patches of 3 x 3 pixels."""
    spec = make_spec(confidence=True, **changes)
    whole = expected(spec)
    small = np.random.default_rng(4).integers(0, len(spec.classes), (40, 40))
    whole["labels"][:] = np.kron(small, np.ones((3, 3), int))[: spec.shape[0], : spec.shape[1]]
    whole["labels"][20:26, 30:35] = spec.nodata
    with create_or_resume(path, spec) as store:
        for index in spec.blocks():
            store.write_block(index, block_maps(spec, whole, index), {})
    return whole


def read(path: Path) -> geopandas.GeoDataFrame:
    return geopandas.read_parquet(path) if path.suffix == ".parquet" else geopandas.read_file(path)


def on_the_map(polygon: shapely.Polygon, transform: tuple[float, ...] = TRANSFORM) -> shapely.Polygon:
    a, b, c, d, e, f = transform
    return affine_transform(polygon, [a, b, d, e, c, f])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_holds_the_labels_polygons(tmp_path: Path, ending: str) -> None:
    whole = blobs(tmp_path / "o.zarr")
    path, count = export_polygons(tmp_path / "o.zarr", tmp_path / f"map{ending}")
    found, wanted = read(path), rasterio_shapes(whole["labels"])
    assert len(found) == count == sum(map(len, wanted.values()))
    assert sorted(os.listdir(tmp_path)) == sorted([f"map{ending}", "o.zarr"])
    assert found.crs == CRS.from_epsg(4326 if ending == ".geojson" else 32632)
    assert found.is_valid.all()
    for label, polygons in wanted.items():
        these = found[found["class"] == label]
        assert set(these["name"]) == {CLASSES[label].name}
        assert set(these["color"]) == {"#{:02x}{:02x}{:02x}".format(*CLASSES[label].color)}
        assert sorted(these["pixels"]) == sorted(polygon.area for polygon in polygons)
        np.testing.assert_allclose(these["area_m2"], these["pixels"] * 100.0)
        union = shapely.union_all([on_the_map(polygon) for polygon in polygons])
        off = these.to_crs(32632).union_all().symmetric_difference(union).area
        # GeoJSON has 9 decimals of a degree: a tenth of a millimetre along some kilometres of borders.
        assert off < (1.0 if ending == ".geojson" else 1e-9)


@pytest.mark.parametrize("ending", [".fgb", ".parquet"])
def test_confidence_is_the_mean_over_each_polygon(tmp_path: Path, ending: str) -> None:
    from rasterio.features import rasterize
    from rasterio.transform import Affine

    whole = blobs(tmp_path / "o.zarr")
    path, _ = export_polygons(tmp_path / "o.zarr", tmp_path / f"map{ending}")
    found = read(path).to_crs(32632).sample(10, random_state=1)
    for polygon, mean in zip(found.geometry, found["confidence"], strict=True):
        inside = rasterize([polygon], whole["labels"].shape, transform=Affine(*TRANSFORM)).astype(bool)
        known = whole["confidence"][inside & (whole["confidence"] != 255)]
        assert mean == pytest.approx(known.mean() / 254) if known.size else np.isnan(mean)


def test_geojson_is_as_its_rfc_says(tmp_path: Path) -> None:
    blobs(tmp_path / "o.zarr")
    path, _ = export_polygons(tmp_path / "o.zarr", tmp_path / "map.geojson")
    stored = json.loads(path.read_text())
    assert "crs" not in stored
    for feature in stored["features"]:
        outer, *holes = feature["geometry"]["coordinates"]
        assert shapely.LinearRing(outer).is_ccw
        assert not any(shapely.LinearRing(hole).is_ccw for hole in holes)
        assert all(8.9 < x < 9.1 and 45.1 < y < 45.2 for x, y in outer)


@pytest.mark.parametrize("shard", [(16, 16), (32, 64), (64, 80)])
def test_polygons_are_joined_over_blocks(tmp_path: Path, shard: tuple[int, int]) -> None:
    spec = make_spec(shard=shard, chunk=(8, 8))
    whole = expected(spec)
    whole["labels"][:] = 0
    whole["labels"][5:45, 5:65] = 1
    whole["labels"][20:30, 30:40] = 2
    with create_or_resume(tmp_path / "o.zarr", spec) as store:
        for index in spec.blocks():
            store.write_block(index, block_maps(spec, whole, index), {})
    found = read(export_polygons(tmp_path / "o.zarr", tmp_path / "map.gpkg")[0])
    assert sorted(found["pixels"]) == [100, 1100, 2300]
    assert sorted(len(polygon.interiors) for polygon in found.geometry) == [0, 1, 1]
    assert "confidence" not in found


def test_areas_in_degrees_are_geodesic(tmp_path: Path) -> None:
    transform = (0.05, 0.0, 8.0, 0.0, -0.04, 61.0)
    blobs(tmp_path / "o.zarr", crs_wkt=CRS.from_epsg(4326).to_wkt(), transform=transform)
    found = read(export_polygons(tmp_path / "o.zarr", tmp_path / "map.gpkg")[0])
    geod = Geod(ellps="WGS84")
    for polygon, area in zip(found.geometry, found["area_m2"], strict=True):
        # A border along a parallel is no geodesic: between close points it nearly is.
        exact = abs(geod.geometry_area_perimeter(shapely.segmentize(polygon, 0.001))[0])
        assert area == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_map_without_crs_has_areas_in_pixels(tmp_path: Path, ending: str) -> None:
    blobs(tmp_path / "o.zarr", crs_wkt=None, transform=None)
    found = read(export_polygons(tmp_path / "o.zarr", tmp_path / f"map{ending}")[0])
    assert list(found["area_px"]) == list(found["pixels"])
    np.testing.assert_allclose(shapely.area(found.geometry.values), found["pixels"])
    assert tuple(found.total_bounds) == (0, 0, 70, 50)


def test_classes_are_chosen_by_name_or_number(tmp_path: Path) -> None:
    whole = blobs(tmp_path / "o.zarr")
    wanted = rasterio_shapes(whole["labels"])
    for words, labels in ((("water",), (1,)), (("2", "bare soil"), (0, 2))):
        options = PolygonOptions(classes=words, overwrite=True)
        found = read(export_polygons(tmp_path / "o.zarr", tmp_path / "map.fgb", options)[0])
        assert sorted(found["class"]) == sorted(label for label in labels for _ in wanted[label])
    with pytest.raises(UsageError, match=r"no class 'lava'; the map's are bare soil, .* numbers 0 to 2"):
        export_polygons(tmp_path / "o.zarr", tmp_path / "other.fgb", PolygonOptions(classes=("lava",)))


@pytest.mark.parametrize(("given", "pixels"), [("10px", 10), (1000, 10), ("950", 10), (0, 0)])
def test_small_regions_are_merged(tmp_path: Path, given: str | float, pixels: int) -> None:
    from rasterio.features import sieve

    whole = blobs(tmp_path / "o.zarr")
    labels, seen = whole["labels"], []
    options = PolygonOptions(min_area=given)
    path, _ = export_polygons(tmp_path / "o.zarr", tmp_path / "map.gpkg", options, lambda *pair: seen.append(pair))
    wanted = rasterio_shapes(sieve(labels, pixels, connectivity=4, mask=labels != 255) if pixels else labels)
    found = read(path)
    for label, polygons in wanted.items():
        assert sorted(found[found["class"] == label]["pixels"]) == sorted(polygon.area for polygon in polygons)
    assert seen[-1] == (labels.size * (3 if pixels else 1),) * 2
    assert sorted(seen) == seen


@pytest.mark.parametrize("given", ["15", "1.5px", 15.0])
def test_borders_are_simplified(tmp_path: Path, given: str | float) -> None:
    blobs(tmp_path / "o.zarr")
    plain = read(export_polygons(tmp_path / "o.zarr", tmp_path / "plain.gpkg")[0])
    path, _ = export_polygons(tmp_path / "o.zarr", tmp_path / "map.gpkg", PolygonOptions(simplify=given))
    found = read(path)
    assert shapely.coverage_is_valid(found.geometry.values)
    assert found.get_coordinates().shape < plain.get_coordinates().shape
    assert list(found["area_m2"]) == list(plain["area_m2"])
    assert max(found.boundary.hausdorff_distance(plain.boundary)) <= 15


@pytest.mark.parametrize("option", [{"min_area": "large"}, {"min_area": -1}, {"simplify": "nan"}, {"simplify": "px"}])
def test_measures_are_checked(tmp_path: Path, option: dict[str, Any]) -> None:
    make_store(tmp_path / "o.zarr")
    with pytest.raises(UsageError, match="give a number, 0 or more, or pixels as 16px"):
        export_polygons(tmp_path / "o.zarr", tmp_path / "map.gpkg", PolygonOptions(**option))
    assert os.listdir(tmp_path) == ["o.zarr"]


def test_many_classes_are_traced(tmp_path: Path) -> None:
    spec = make_spec(classes=[LabelClass(f"c{n}", (n % 256, 0, 0)) for n in range(300)])
    whole = make_store(tmp_path / "o.zarr", spec)
    found = read(export_polygons(tmp_path / "o.zarr", tmp_path / "map.fgb")[0])
    assert found["pixels"].sum() == np.count_nonzero(whole["labels"] != 65535)
    assert set(found["class"]) == set(np.unique(whole["labels"])) - {65535}


def test_an_unfinished_store_is_refused_or_lacks_what_is_not_done(tmp_path: Path) -> None:
    whole = make_store(tmp_path / "o.zarr")
    (tmp_path / "o.zarr" / STATE / "1" / "0.json").unlink()
    with pytest.raises(StoreError, match="5 of 6 blocks"):
        export_polygons(tmp_path / "o.zarr", tmp_path / "map.gpkg")
    path, _ = export_polygons(tmp_path / "o.zarr", tmp_path / "map.gpkg", PolygonOptions(allow_partial=True))
    whole["labels"][32:, :32] = 255
    assert read(path)["pixels"].sum() == np.count_nonzero(whole["labels"] != 255)


def test_what_has_no_classes_or_place_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "v.zarr", value_spec())
    with pytest.raises(StoreError, match="polygons need classes"):
        export_polygons(tmp_path / "v.zarr", tmp_path / "map.gpkg")
    points = [(0.0, 0.0, 9.5, 47.5, 0.0), (0.0, 70.0, 9.6, 47.5, 0.0), (50.0, 0.0, 9.5, 47.4, 2.0)]
    make_store(tmp_path / "g.zarr", make_spec(transform=None, gcps=points))
    with pytest.raises(StoreError, match="control points"):
        export_polygons(tmp_path / "g.zarr", tmp_path / "map.gpkg")
    with pytest.raises(UsageError, match=r"must end in \.gpkg"):
        export_polygons(tmp_path / "g.zarr", tmp_path / "map.shp")


def test_endings_are_the_commands() -> None:
    assert set(cli.ENDINGS) == set(ENDINGS) == set(DRIVERS)


@pytest.mark.parametrize("ending", [".gpkg", ".parquet"])
def test_a_failed_export_leaves_the_old_file_and_no_other(tmp_path: Path, ending: str) -> None:
    make_store(tmp_path / "o.zarr")
    target = tmp_path / f"map{ending}"
    target.write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        export_polygons(tmp_path / "o.zarr", target)

    def fail(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left"):
        export_polygons(tmp_path / "o.zarr", target, PolygonOptions(overwrite=True), fail)
    assert target.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == sorted([target.name, "o.zarr"])
    export_polygons(tmp_path / "o.zarr", target, PolygonOptions(overwrite=True))
    assert len(read(target)) > 0


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_map_without_data_is_an_empty_file(tmp_path: Path, ending: str) -> None:
    spec: StoreSpec = make_spec()
    with create_or_resume(tmp_path / "o.zarr", spec) as store:
        for index in spec.blocks():
            store.write_nodata(index, {})
    path, count = export_polygons(tmp_path / "o.zarr", tmp_path / f"map{ending}")
    assert count == 0
    assert len(read(path)) == 0


def test_missing_pyarrow_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "o.zarr")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'tilepipe\[vector\]'"):
        export_polygons(tmp_path / "o.zarr", tmp_path / "map.gpkg")


def test_the_command_writes_polygons(tmp_path: Path) -> None:
    blobs(tmp_path / "o.zarr")
    words = ("--min-area", "20px", "--simplify", "1px", "--classes", "water, 2", "--json", "-q")
    result = run("export", tmp_path / "o.zarr", tmp_path / "map.gpkg", *words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["polygons"] == len(read(tmp_path / "map.gpkg"))
    assert set(read(tmp_path / "map.gpkg")["name"]) == {"water", "trees / shrubs"}
    refused = run("export", tmp_path / "o.zarr", tmp_path / "map.gpkg", "--no-cog")
    assert_one_line(refused, 2, "--no-cog is for GeoTIFFs")
    refused = run("export", tmp_path / "o.zarr", tmp_path / "map.tif", "--min-area", "5")
    assert_one_line(refused, 2, "--min-area is for polygons", ".geojson")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_map_of_20000_pixels_a_side_stays_under_2_gib(tmp_path: Path) -> None:
    script = Path(__file__).parent / "benchmarks" / "polygons.py"
    for options in ([], ["--min-area", "16px", "--simplify", "2px"]):
        command = [sys.executable, str(script), "--noise", "3000", "--folder", str(tmp_path), *options]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks = [json.loads(line)["peak_mib"] for line in told.splitlines() if line.startswith("{")]
        assert len(peaks) == 2
        assert max(peaks) < 2048
