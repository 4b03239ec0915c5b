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
from pyproj import CRS
from rasterio import crs as rasterio_crs
from stores import CLASSES, OUTPUTS, TRANSFORM, UTM, make_spec, make_store, value_spec

from tilepipe.errors import StoreError
from tilepipe.store.attributes import flag_meanings
from tilepipe.store.output import create_or_resume
from tilepipe.store.spec import LabelClass


def dataset(path: Path) -> xr.Dataset:
    with warnings.catch_warnings():
        # A folder that xarray does not know, or attributes that clash, would be warnings.
        warnings.simplefilter("error")
        return xr.open_zarr(path, consolidated=False, chunks=None)


def attributes(path: Path, array: str = "labels") -> dict[str, Any]:
    return json.loads((path / array / "zarr.json").read_text())["attributes"]


def test_xarray_finds_crs_transform_nodata_and_classes(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    whole = make_store(path, make_spec(confidence=True, probabilities="float16"))
    found = dataset(path)
    assert found.rio.crs == rasterio_crs.CRS.from_epsg(32632)
    for name, values in whole.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name].values, values)
        assert tuple(found[name].rio.transform())[:6] == TRANSFORM
        assert found[name].rio.crs.to_epsg() == 32632
    labels = found["labels"]
    assert labels.rio.nodata == 255
    assert labels.attrs["flag_values"] == [0, 1, 2]
    assert labels.attrs["flag_meanings"].split() == ["bare_soil", "water", "trees_shrubs"]
    assert labels.attrs["flag_colors"].split() == ["#c89664", "#0000ff", "#008000"]
    assert labels.attrs["class_names"] == [c.name for c in CLASSES]
    assert labels.rio.bounds() == (500000.0, 4999500.0, 500700.0, 5000000.0)
    np.testing.assert_array_equal(found["x"].values, 500005.0 + 10 * np.arange(70))
    np.testing.assert_array_equal(found["y"].values, 4999995.0 - 10 * np.arange(50))
    assert found["x"].attrs["standard_name"] == "projection_x_coordinate"


@pytest.mark.parametrize("kept", ["float16", "float32"])
def test_xarray_finds_crs_and_transform_of_values(tmp_path: Path, kept: Any) -> None:
    path = tmp_path / "out.zarr"
    whole = make_store(path, value_spec(values=kept))["values"]
    found = dataset(path)
    assert set(found.variables) == {"values", "x", "y", "spatial_ref"}
    assert found.rio.crs == found["values"].rio.crs == rasterio_crs.CRS.from_epsg(32632)
    values = found["values"]
    assert values.dims == ("channel", "y", "x")
    assert values.dtype == np.dtype(kept)
    np.testing.assert_array_equal(values.values, whole)
    assert tuple(values.rio.transform())[:6] == TRANSFORM
    assert values.rio.bounds() == (500000.0, 4999500.0, 500700.0, 5000000.0)
    assert values.attrs["channel_names"] == list(OUTPUTS)
    assert not {"flag_values", "class_names", "nodata", "_FillValue"} & values.attrs.keys()
    own = attributes(path, "values")
    assert own["grid_mapping"] == own["coordinates"] == "spatial_ref"
    assert own["proj:code"] == "EPSG:32632"
    assert own["spatial:transform"] == list(TRANSFORM)
    assert [c["name"] for c in own["zarr_conventions"]] == ["proj:", "spatial:"]
    group = json.loads((path / "zarr.json").read_text())["attributes"]
    assert [level["asset"] for level in group["multiscales"]["layout"]] == ["values"]
    assert group["multiscales"]["resampling_method"] == "average"
    tree = xr.open_datatree(path, engine="zarr", consolidated=False)
    assert tree["values"].shape == (2, 50, 70)


def test_xarray_reads_the_store_as_a_tree(tmp_path: Path) -> None:
    make_store(tmp_path / "out.zarr")
    tree = xr.open_datatree(tmp_path / "out.zarr", engine="zarr", consolidated=False)
    assert tree["labels"].shape == (50, 70)


def test_all_attributes_that_readers_need_are_on_the_array(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    make_store(path)
    found = attributes(path)
    assert found["grid_mapping"] == found["coordinates"] == "spatial_ref"
    assert found["proj:code"] == "EPSG:32632"
    assert found["spatial:transform"] == list(TRANSFORM)
    assert found["spatial:bbox"] == [500000.0, 4999500.0, 500700.0, 5000000.0]
    assert found["spatial:shape"] == [50, 70]
    assert found["spatial:dimensions"] == ["y", "x"]
    assert [c["name"] for c in found["zarr_conventions"]] == ["proj:", "spatial:"]
    assert "_FillValue" not in found
    assert attributes(path, "spatial_ref")["GeoTransform"] == "500000.0 10.0 0.0 5000000.0 0.0 -10.0"
    assert CRS.from_wkt(attributes(path, "spatial_ref")["spatial_ref"]) == CRS.from_epsg(32632)
    group = json.loads((path / "zarr.json").read_text())["attributes"]
    assert [level["asset"] for level in group["multiscales"]["layout"]] == ["labels"]
    assert "consolidated_metadata" not in json.loads((path / "zarr.json").read_text())


def test_a_geographic_crs_gives_latitude_and_longitude(tmp_path: Path) -> None:
    wkt = rasterio_crs.CRS.from_epsg(4326).to_wkt()
    make_store(tmp_path / "o.zarr", make_spec(crs_wkt=wkt, transform=(0.1, 0, 5, 0, -0.1, 50)))
    found = dataset(tmp_path / "o.zarr")
    assert found["x"].attrs["standard_name"] == "longitude"
    assert found["y"].attrs["standard_name"] == "latitude"
    assert attributes(tmp_path / "o.zarr")["proj:code"] == "EPSG:4326"


def test_a_crs_without_a_code_is_written_as_wkt2(tmp_path: Path) -> None:
    own = CRS.from_proj4("+proj=laea +lat_0=47.5 +lon_0=9.3 +ellps=GRS80 +units=m")
    make_store(tmp_path / "o.zarr", make_spec(crs_wkt=own.to_wkt()))
    assert CRS.from_wkt(attributes(tmp_path / "o.zarr")["proj:wkt2"]) == own
    assert CRS(dataset(tmp_path / "o.zarr").rio.crs.to_wkt()).equals(own, ignore_axis_order=True)


def test_a_rotated_grid_keeps_its_transform_and_has_no_axes(tmp_path: Path) -> None:
    turned = (8.0, 6.0, 500000.0, 6.0, -8.0, 5000000.0)
    make_store(tmp_path / "o.zarr", make_spec(transform=turned))
    found = dataset(tmp_path / "o.zarr")
    assert set(found.variables) == {"labels", "spatial_ref"}
    assert tuple(found["labels"].rio.transform())[:6] == turned
    assert attributes(tmp_path / "o.zarr")["spatial:bbox"] == [500000.0, 4999600.0, 500860.0, 5000420.0]


def test_without_georeference_nothing_is_claimed(tmp_path: Path) -> None:
    make_store(tmp_path / "o.zarr", make_spec(crs_wkt=None, transform=None))
    found = dataset(tmp_path / "o.zarr")
    assert found.rio.crs is None
    assert set(found.variables) == {"labels", "x", "y"}
    assert not any(key.startswith(("spatial:", "proj:", "grid_mapping")) for key in attributes(tmp_path / "o.zarr"))
    np.testing.assert_array_equal(found["x"].values, np.arange(70) + 0.5)


def test_a_transform_without_crs_is_kept(tmp_path: Path) -> None:
    make_store(tmp_path / "o.zarr", make_spec(crs_wkt=None))
    found = dataset(tmp_path / "o.zarr")
    assert found.rio.crs is None
    assert tuple(found["labels"].rio.transform())[:6] == TRANSFORM


def test_a_crs_that_is_none_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not valid WKT"):
        create_or_resume(tmp_path / "o.zarr", make_spec(crs_wkt="somewhere"))
    assert not (tmp_path / "o.zarr").exists()


def test_flag_meanings_are_distinct_words() -> None:
    names = ["a b", "a_b", "", "é", "a-b", "a b"]
    words = flag_meanings([LabelClass(name, (0, 0, 0)) for name in names])
    assert len(set(words)) == len(names)
    assert all(word and not any(c.isspace() for c in word) for word in words)


def test_rasterio_reads_an_unsharded_store(tmp_path: Path) -> None:
    if tuple(map(int, rasterio.__gdal_version__.split(".")[:2])) < (3, 12):
        pytest.skip(f"GDAL {rasterio.__gdal_version__} reads no zarr version 3; 3.12 does")
    whole = make_store(tmp_path / "o.zarr", make_spec(shards=False))
    with rasterio.open(f'ZARR:"{tmp_path / "o.zarr"}":/labels') as found:
        np.testing.assert_array_equal(found.read(1), whole["labels"])
        assert found.crs == rasterio_crs.CRS.from_wkt(UTM)
        assert tuple(found.transform)[:6] == TRANSFORM
        assert found.nodata == 255
