"""What readers of georeferenced zarr find of the overviews: xarray, rioxarray, and GDAL by the attributes it took."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401 - gives xarray its .rio
import xarray as xr
from pyramids import add, most_frequent
from rasterio.crs import CRS
from stores import TRANSFORM, UTM, make_spec, make_store, value_spec

from tilepipe.store.attributes import MULTISCALES, PROJ, SPATIAL
from tilepipe.store.spec import StoreSpec

FACTORS = (2, 4, 8, 16, 32)


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Use `@` matmul", category=PendingDeprecationWarning)
        yield


def attributes(path: Path) -> dict[str, Any]:
    return json.loads((path / "zarr.json").read_text())["attributes"]


def made(path: Path, **changes: Any) -> dict[str, Any]:
    whole = make_store(path, make_spec(**changes))
    add(path)
    return whole


@pytest.mark.parametrize("shards", [True, False])
def test_xarray_opens_map_levels_and_tree(memory_path: Path, shards: bool) -> None:
    path = memory_path / "o.zarr"
    whole = made(path, confidence=True, shards=shards)
    root = xr.open_zarr(path, consolidated=False, chunks=None)
    assert set(root.variables) == {"labels", "confidence", "x", "y", "spatial_ref"}
    assert root.rio.crs == CRS.from_epsg(32632)
    tree = xr.open_datatree(path, engine="zarr", consolidated=False)
    assert set(tree.children) == {f"ovr_{factor}x" for factor in FACTORS}
    np.testing.assert_array_equal(tree["labels"].values, whole["labels"])
    for factor in FACTORS:
        level = xr.open_zarr(path, group=f"ovr_{factor}x", consolidated=False, chunks=None)
        labels = level["labels"]
        assert labels.dims == (f"y_{factor}x", f"x_{factor}x")
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels.values, most_frequent(whole["labels"], factor, 255))
        np.testing.assert_array_equal(tree[f"ovr_{factor}x/labels"].values, labels.values)
        for found in (level, labels, level["confidence"]):
            assert found.rio.crs == CRS.from_epsg(32632)
        a, b, c, d, e, f = TRANSFORM
        assert tuple(labels.rio.transform())[:6] == (a * factor, b, c, d, e * factor, f)
        assert labels.rio.nodata == 255
        np.testing.assert_array_equal(level[f"x_{factor}x"], c + a * factor * (np.arange(-(-70 // factor)) + 0.5))
        np.testing.assert_array_equal(level[f"y_{factor}x"], f + e * factor * (np.arange(-(-50 // factor)) + 0.5))


def test_xarray_opens_levels_of_values(memory_path: Path) -> None:
    path = memory_path / "o.zarr"
    make_store(path, value_spec())
    add(path)
    level = xr.open_datatree(path, engine="zarr", consolidated=False)["ovr_4x"]
    assert level["values"].dims == ("channel", "y_4x", "x_4x")
    assert level["values"].rio.crs == CRS.from_epsg(32632)
    layout = attributes(path)["multiscales"]["layout"]
    assert [(each["asset"], each.get("resampling_method")) for each in layout[:2]] == [
        ("values", None),
        ("ovr_2x", "average"),
    ]


def test_the_attributes_are_those_that_readers_took(memory_path: Path) -> None:
    """The layout that xarray, rioxarray and GDAL 3.13 accepted, word for word but for the numbers."""
    path = memory_path / "o.zarr"
    made(path)
    root = attributes(path)
    assert root["proj:code"] == "EPSG:32632"
    assert root["spatial:dimensions"] == ["y", "x"]
    assert root["zarr_conventions"] == [PROJ, SPATIAL, MULTISCALES]
    assert root["multiscales"]["resampling_method"] == "mode"
    first, *others = root["multiscales"]["layout"]
    assert first == {
        "asset": "labels",
        "transform": {"scale": [1.0, 1.0], "translation": [0.0, 0.0]},
        "spatial:shape": [50, 70],
        "spatial:transform": [10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0],
    }
    assert others[0] == {
        "asset": "ovr_2x",
        "derived_from": "labels",
        "resampling_method": "mode",
        "transform": {"scale": [2.0, 2.0], "translation": [0.0, 0.0]},
        "spatial:shape": [25, 35],
        "spatial:transform": [20.0, 0.0, 500000.0, 0.0, -20.0, 5000000.0],
    }
    for factor, level in zip(FACTORS, others, strict=True):
        group = path / level["asset"]
        own, metadata = attributes(group / "labels"), json.loads((group / "labels" / "zarr.json").read_text())
        assert own["grid_mapping"] == own["coordinates"] == "spatial_ref"
        assert own["proj:code"] == "EPSG:32632"
        assert own["spatial:shape"] == level["spatial:shape"] == metadata["shape"]
        assert own["spatial:transform"] == level["spatial:transform"]
        assert own["spatial:registration"] == "pixel"
        assert own["zarr_conventions"] == [PROJ, SPATIAL]
        assert own["flag_values"] == [0, 1, 2]
        assert "_FillValue" not in own
        assert metadata["fill_value"] == 255
        numbers = [str(v) for v in (500000.0, 10.0 * factor, 0.0, 5000000.0, 0.0, -10.0 * factor)]
        assert attributes(group / "spatial_ref")["GeoTransform"] == " ".join(numbers)
        assert CRS.from_wkt(attributes(group / "spatial_ref")["spatial_ref"]).to_epsg() == 32632


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(confidence=True, probabilities="float16"),
        make_spec(transform=None),
        make_spec(crs_wkt=None),
        make_spec(transform=(8.0, 6.0, 500000.0, 6.0, -8.0, 5000000.0)),
        make_spec(transform=None, gcps=[(0.0, 0.0, 9.5, 47.5, 0.0), (0.0, 70.0, 9.6, 47.5, 0.0)]),
        value_spec(),
    ],
)
def test_spatial_dimensions_are_always_the_last_dimension_names(memory_path: Path, spec: StoreSpec) -> None:
    """Where they differ, GDAL 3.13 crashes; and every name of an axis has one length in the whole tree."""
    path = memory_path / "o.zarr"
    make_store(path, spec)
    add(path)
    lengths: dict[str, int] = {}
    for file in path.rglob("zarr.json"):
        node = json.loads(file.read_text())
        if node["node_type"] != "array":
            continue
        names = node["dimension_names"]
        spatial = node["attributes"].get("spatial:dimensions")
        assert spatial is None or spatial == names[-2:], file
        assert (spatial is not None) == (spec.transform is not None and len(names) > 1)
        for name, length in zip(names, node["shape"], strict=True):
            assert lengths.setdefault(name, length) == length
    xr.open_datatree(path, engine="zarr", consolidated=False)


def test_a_rotated_grid_and_control_points_keep_their_place(memory_path: Path) -> None:
    made(memory_path / "r.zarr", transform=(8.0, 6.0, 500000.0, 6.0, -8.0, 5000000.0))
    level = xr.open_zarr(memory_path / "r.zarr", group="ovr_4x", consolidated=False, chunks=None)
    assert set(level.variables) == {"labels", "spatial_ref"}
    assert attributes(memory_path / "r.zarr/ovr_4x/labels")["spatial:transform"] == [32, 24, 500000, 24, -32, 5000000]
    points = [(0.0, 0.0, 9.5, 47.5, 0.0), (0.0, 70.0, 9.6, 47.5, 0.0), (50.0, 0.0, 9.5, 47.4, 2.0)]
    made(memory_path / "g.zarr", transform=None, gcps=points)
    level = xr.open_zarr(memory_path / "g.zarr", group="ovr_2x", consolidated=False, chunks=None)
    found = level["labels"].rio.get_gcps()
    assert [(p.row, p.col, p.x, p.y, p.z) for p in found] == [(r / 2, c / 2, *rest) for r, c, *rest in points]


def test_rasterio_reads_the_levels_of_an_unsharded_store(memory_path: Path) -> None:
    if tuple(map(int, rasterio.__gdal_version__.split(".")[:2])) < (3, 12):
        pytest.skip(f"GDAL {rasterio.__gdal_version__} reads no zarr version 3; 3.12 does")
    whole = made(memory_path / "o.zarr", shards=False)
    with rasterio.open(f'ZARR:"{memory_path / "o.zarr"}":/ovr_2x/labels') as found:
        np.testing.assert_array_equal(found.read(1), most_frequent(whole["labels"], 2, 255))
        assert found.crs == CRS.from_wkt(UTM)
        assert tuple(found.transform)[:6] == (20.0, 0.0, 500000.0, 0.0, -20.0, 5000000.0)
        assert found.nodata == 255
