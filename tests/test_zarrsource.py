from __future__ import annotations

import base64
import json
import pickle
import struct

import numpy as np
import pytest
import rasterio
import zarr
from pyproj import CRS
from rasters import noise

from tilepipe.errors import InputError, ReadError, UsageError
from tilepipe.raster.source import open_raster
from tilepipe.window import Window

TRANSFORM = (2.0, 0.0, 500000.0, 0.0, -2.0, 5000000.0)
GEOTRANSFORM = "500000.0 2.0 0.0 5000000.0 0.0 -2.0"
UTM = CRS.from_epsg(32632)
VALUES = noise((3, 70, 50), "uint16")


def store(path, values=VALUES, fmt=3, attributes=None, name="image", dims=None, mapping=None, **options):
    group = zarr.open_group(path, mode="a", zarr_format=fmt)
    dims = dims or ("band", "y", "x")[-values.ndim :]
    named = {"dimension_names": dims} if fmt == 3 else {}
    array = group.create_array(
        name, shape=values.shape, dtype=values.dtype, chunks=(1, 16, 16)[-values.ndim :], **named, **options
    )
    array[...] = values
    array.attrs.update(attributes or {})
    if fmt == 2:
        array.attrs["_ARRAY_DIMENSIONS"] = list(dims)
    if mapping is not None:
        group.create_array("spatial_ref", shape=(), dtype="int64").attrs.update(mapping)
    return path


@pytest.mark.parametrize("fmt", [2, 3])
@pytest.mark.parametrize("values", [VALUES, VALUES[0], noise((2, 33, 20), "float32"), noise((1, 9, 1), "int8")])
def test_arrays_are_rasters(tmp_path, fmt, values):
    path = store(tmp_path / "a.zarr", values, fmt)
    planes = values.reshape(-1, *values.shape[-2:])
    for name in (path, path / "image"):
        source = open_raster(name)
        info = source.info
        assert (info.shape, info.bands, info.dtype) == (planes.shape[1:], len(planes), values.dtype.name)
        assert (info.crs_wkt, info.transform, info.driver) == (None, None, "zarr")
        pixels = source.open().read(Window.whole(info.shape))
        np.testing.assert_array_equal(pixels.values, planes)
        assert pixels.valid is None
        rows, cols = info.shape
        beyond = pickle.loads(pickle.dumps(source.open())).read(Window.of(-7, rows + 4, -2, cols + 30))
        np.testing.assert_array_equal(beyond.values, np.pad(planes, ((0, 0), (7, 4), (2, 30)), mode="reflect"))


def test_bands_of_an_array(tmp_path):
    path = store(tmp_path / "a.zarr", noise((6, 20, 20)))
    for bands in ((2, 3, 4, 1), (6,), (5, 5, 6)):
        pixels = open_raster(path, bands=bands).open().read(Window.of(3, 20, 0, 9))
        np.testing.assert_array_equal(pixels.values, noise((6, 20, 20))[[b - 1 for b in bands], 3:, :9])


def test_sharded_big_endian_and_boolean_arrays(tmp_path):
    sharded = store(tmp_path / "a.zarr", VALUES, shards=(3, 32, 32))
    big = store(tmp_path / "b.zarr", VALUES.astype(">u2"), fmt=2)
    for path in (sharded, big):
        pixels = open_raster(path).open().read(Window.whole((70, 50)))
        np.testing.assert_array_equal(pixels.values, VALUES)
        assert pixels.values.dtype == np.dtype("uint16")
    flags = store(tmp_path / "c.zarr", VALUES > 9000)
    assert open_raster(flags).info.dtype == "uint8"
    np.testing.assert_array_equal(open_raster(flags).open().read(Window.whole((70, 50))).values, VALUES > 9000)


MAPPING = {**UTM.to_cf(), "spatial_ref": UTM.to_wkt(), "GeoTransform": GEOTRANSFORM}


@pytest.mark.parametrize("fmt", [2, 3])
@pytest.mark.parametrize(
    ("attributes", "mapping"),
    [
        ({"proj:code": "EPSG:32632", "spatial:transform": list(TRANSFORM)}, None),
        ({"proj:wkt2": UTM.to_wkt(), "spatial:transform": list(TRANSFORM)}, None),
        ({"proj:projjson": UTM.to_json_dict(), "spatial:transform": list(TRANSFORM)}, None),
        ({"grid_mapping": "spatial_ref"}, MAPPING),
        ({}, MAPPING),
        ({"_CRS": {"wkt": UTM.to_wkt()}, "GeoTransform": GEOTRANSFORM}, None),
    ],
)
def test_georeference_from_attributes(tmp_path, fmt, attributes, mapping):
    info = open_raster(store(tmp_path / "a.zarr", fmt=fmt, attributes=attributes, mapping=mapping)).info
    assert info.transform == TRANSFORM
    assert rasterio.crs.CRS.from_wkt(info.crs_wkt).to_epsg() == 32632
    assert info.resolution_m == pytest.approx(2)


def test_georeference_from_the_group_and_from_coordinates(tmp_path):
    path = store(tmp_path / "a.zarr")
    group = zarr.open_group(path, mode="a")
    group.attrs["proj:code"] = "EPSG:32632"
    for name, first, step, length in (("x", 500001.0, 2.0, 50), ("y", 4999999.0, -2.0, 70)):
        group.create_array(name, shape=(length,), dtype="float64")[:] = first + step * np.arange(length)
    info = open_raster(path).info
    assert info.transform == TRANSFORM
    assert "32N" in info.crs_wkt
    group["y"][3] = 0.0
    assert open_raster(path).info.transform is None


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, None),
        ({"_FillValue": 7}, 7),
        ({"nodata": 7.0}, 7),
        ({"missing_value": "7"}, 7),
        ({"_FillValue": base64.b64encode(struct.pack("<d", 7.0)).decode()}, 7),
        ({"_FillValue": "none at all"}, None),
    ],
)
def test_nodata_only_where_it_is_declared(tmp_path, attributes, expected):
    values = VALUES % 9
    source = open_raster(store(tmp_path / "a.zarr", values, attributes=attributes))
    assert source.info.nodata == (expected,) * 3
    valid = np.ones((70, 50), bool) if expected is None else (values != expected).all(axis=0)
    np.testing.assert_array_equal(source.open().read(Window.whole((70, 50))).validity(), valid)


def test_what_xarray_writes(tmp_path):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("rioxarray")
    values = noise((2, 20, 30), "float32")
    values[:, 4, 5] = np.nan
    data = xarray.DataArray(
        values,
        dims=("band", "y", "x"),
        coords={"x": 500001 + 2.0 * np.arange(30), "y": 4999999 - 2.0 * np.arange(20)},
        name="scene",
    ).rio.write_crs(32632)
    data = data.rio.write_nodata(-9999.0, encoded=True)
    for fmt in (2, 3):
        data.to_dataset().to_zarr(tmp_path / f"{fmt}.zarr", zarr_format=fmt, consolidated=False)
        source = open_raster(tmp_path / f"{fmt}.zarr")
        assert source.info.transform == TRANSFORM
        assert rasterio.crs.CRS.from_wkt(source.info.crs_wkt).to_epsg() == 32632
        pixels = source.open().read(Window.whole((20, 30)))
        expected = ~np.isnan(values).any(axis=0)
        if fmt == 3:
            np.testing.assert_array_equal(pixels.validity(), expected)
        np.testing.assert_array_equal(pixels.values[:, expected], values[:, expected])


def test_arrays_that_are_no_rasters(tmp_path):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    group.create_array("line", shape=(5,), dtype="u1")
    group.create_array("cube", shape=(2, 2, 5, 5), dtype="u1")
    group.create_array("waves", shape=(5, 5), dtype="c8")
    with pytest.raises(InputError, match=r"without a \(y, x\) or \(band, y, x\) array"):
        open_raster(tmp_path / "a.zarr")
    for name, message in (("line", "has shape"), ("cube", "has shape"), ("waves", "complex64")):
        with pytest.raises(InputError, match=message):
            open_raster(tmp_path / "a.zarr" / name)
    store(tmp_path / "b.zarr", VALUES, dims=("y", "x", "band"))
    with pytest.raises(InputError, match="transpose"):
        open_raster(tmp_path / "b.zarr")
    store(tmp_path / "c.zarr", name="one")
    store(tmp_path / "c.zarr", name="two")
    with pytest.raises(InputError, match=r"2 rasters: name one, .*c\.zarr/\{one,two\}"):
        open_raster(tmp_path / "c.zarr")
    with pytest.raises(InputError, match="cannot open"):
        open_raster(tmp_path / "c.zarr" / "three")
    with pytest.raises(InputError, match="mosaic"):
        open_raster([tmp_path / "c.zarr" / "one", tmp_path / "c.zarr" / "two"])
    with pytest.raises(InputError, match="resampled"):
        open_raster(tmp_path / "c.zarr" / "one", resample_to=3.0)
    with pytest.raises(UsageError, match="from 0 to 65535"):
        open_raster(tmp_path / "c.zarr" / "one", nodata=-1)


def test_a_damaged_chunk_names_array_and_window(tmp_path):
    path = store(tmp_path / "a.zarr")
    chunk = path / "image" / "c" / "0" / "1" / "1"
    chunk.write_bytes(b"\xff" * len(chunk.read_bytes()))
    reader = open_raster(path).open()
    reader.read(Window.of(0, 16, 0, 16))
    with pytest.raises(ReadError, match=r"a\.zarr/image: cannot read rows 20:21, columns 20:21: .+") as caught:
        reader.read(Window.of(20, 21, 20, 21))
    assert "\n" not in str(caught.value)


def test_identity_follows_metadata(tmp_path):
    path = store(tmp_path / "a.zarr")
    before = open_raster(path).identity()
    assert json.loads(json.dumps(before)) == before == open_raster(path).identity()
    zarr.open_array(path / "image", mode="a").attrs["nodata"] = 4
    assert open_raster(path).identity() != before
