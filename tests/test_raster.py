from __future__ import annotations

import csv
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.windows import Window as RasterioWindow
from rasters import GRID, UTM, noise, read_whole, real_data, same_pixels, write

from tilepipe.errors import InputError, UsageError
from tilepipe.raster.gdal import CACHE_BYTES
from tilepipe.raster.info import RasterInfo
from tilepipe.raster.source import cache_bytes, in_strips, open_raster, strips
from tilepipe.window import Window

RGB = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
RGBA = [*RGB, ColorInterp.alpha]


def holes(shape, seed=5):
    return np.where(np.random.default_rng(seed).random(shape) < 0.3, 0, 255).astype("uint8")


def with_nan(values):
    values[:, 3:6, 2:9] = np.nan
    return values


def with_alpha(values):
    values[3] = holes(values.shape[1:])
    return values


VARIANTS = {
    "strips": (noise((3, 40, 50)), {"interleave": "pixel", "blockysize": 7}),
    "tiles": (noise((3, 70, 90)), {"tiled": True, "blockxsize": 16, "blockysize": 32, "compress": "deflate"}),
    "planar": (noise((3, 40, 50)), {"interleave": "band", "compress": "lzw"}),
    "uint16": (noise((2, 33, 21), "uint16"), {}),
    "int8": (noise((1, 33, 21), "int8"), {}),
    "int64": (noise((1, 33, 21), "int64"), {}),
    "float32 with NaN": (with_nan(noise((2, 33, 21), "float32")), {}),
    "float64 nodata NaN": (with_nan(noise((2, 33, 21), "float64")), {"nodata": float("nan")}),
    "float nodata": (noise((2, 33, 21), "uint8").astype("float32"), {"nodata": 7.0}),
    "huge float nodata": (
        np.full((1, 5, 5), -3.4028234663852886e38, "float32"),
        {"nodata": -3.4028234663852886e38},
    ),
    "nodata": (noise((3, 40, 50)) // 16, {"nodata": 3}),
    "nodata beyond the dtype": (noise((3, 40, 50)), {"nodata": None}),
    "mask": (noise((3, 40, 50)), {"mask": holes((40, 50))}),
    "alpha": (with_alpha(noise((4, 40, 50))), {"interp": RGBA}),
    "alpha uint16": (with_alpha(noise((4, 40, 50), "uint16")), {"interp": RGBA}),
    "palette": (noise((1, 40, 50)), {"colormap": {i: (i, 255 - i, i // 2, 255) for i in range(256)}}),
    "no CRS": (noise((1, 20, 20)), {"crs": None, "transform": Affine.identity()}),
    "south up": (noise((1, 20, 30)), {"transform": Affine(2, 0, 0, 0, 2, 0)}),
    "rotated": (noise((1, 20, 30)), {"transform": Affine.rotation(30) * GRID}),
    "one column": (noise((1, 50, 1)), {}),
    "one row": (noise((2, 1, 50)), {}),
    "one pixel": (noise((1, 1, 1)), {}),
}


@pytest.fixture(params=VARIANTS)
def variant(request, tmp_path):
    values, options = VARIANTS[request.param]
    return write(tmp_path / "a.tif", values.copy(), **options)


def plain_info(shape, bands=1):
    return RasterInfo("a", shape, ("uint8",) * bands, (None,) * bands, ("gray",) * bands, (None,) * bands)


def test_whole_read_is_rasterios(variant):
    source = open_raster(variant)
    values, valid = read_whole(variant)
    same_pixels(source.open().read(Window.whole(source.info.shape)), values, valid)
    assert source.info.shape == values.shape[1:]
    assert source.info.dtype == values.dtype.name
    assert source.info.bands == len(values)
    if not valid.all():
        assert source.info.has_mask


def test_windows_beyond_the_raster_are_numpys_reflection(variant):
    source = open_raster(variant)
    values, valid = read_whole(variant)
    reader, (rows, cols) = source.open(), source.info.shape
    random = np.random.default_rng(1)
    margin = 70
    pad = partial(np.pad, mode="reflect")
    wide = pad(values, ((0, 0), (margin, margin), (margin, margin)))
    wide_valid = pad(valid, margin)
    for _ in range(25):
        top, left = random.integers(-margin, rows + margin), random.integers(-margin, cols + margin)
        bottom, right = random.integers(top, rows + margin + 1), random.integers(left, cols + margin + 1)
        window = Window.of(int(top), int(bottom), int(left), int(right))
        inner = slice(top + margin, bottom + margin), slice(left + margin, right + margin)
        same_pixels(reader.read(window), wide[:, *inner], wide_valid[inner])


def test_reads_into_a_given_array(variant):
    source = open_raster(variant)
    rows, cols = source.info.shape
    for window in (Window.whole((rows, cols)), Window.of(-3, rows + 4, -1, cols + 9)):
        expected = source.open().read(window)
        out = np.empty((source.info.bands, *window.shape), source.info.dtype)
        pixels = source.open().read(window, out)
        assert pixels.values is out
        same_pixels(pixels, expected.values, expected.validity())
    with pytest.raises(UsageError, match="out is"):
        source.open().read(window, out[:, 1:])


def test_only_the_needed_pixels_are_read(tmp_path):
    reader = open_raster(write(tmp_path / "a.tif", noise((1, 100, 100)))).open()
    asked = []
    fetch = reader._backend.fetch
    reader._backend.fetch = lambda bands, window, out: (asked.append(window), fetch(bands, window, out))
    reader.read(Window.of(90, 105, 20, 30))
    reader.read(Window.of(-5, 2, -3, 4))
    assert asked == [Window.of(90, 100, 20, 30), Window.of(0, 6, 0, 4)]


def test_without_any_mask_validity_is_not_computed(tmp_path):
    reader = open_raster(write(tmp_path / "a.tif", noise((3, 20, 20)))).open()
    assert reader.read(Window.of(0, 20, -4, 20)).valid is None
    assert not reader.info.has_mask


def test_bands_in_any_order_and_repeated(tmp_path):
    path = write(tmp_path / "a.tif", with_alpha(noise((4, 20, 20))), interp=RGBA, descriptions=list("abcd"))
    values, valid = read_whole(path)
    source = open_raster(path, bands=(3, 1, 3))
    same_pixels(source.open().read(Window.whole((20, 20))), values[[2, 0, 2]], valid)
    assert source.info.descriptions == ("c", "a", "c")
    assert source.info.color_interp == ("blue", "red", "blue")
    alpha_alone = open_raster(path, bands=(4,)).open().read(Window.whole((20, 20)))
    same_pixels(alpha_alone, values[3:], np.ones((20, 20), bool))
    for wrong in ((0,), (5,), ()):
        with pytest.raises(UsageError, match="4 bands"):
            open_raster(path, bands=wrong)


def test_alpha_counts_whatever_the_number_of_bands(tmp_path):
    values = noise((5, 20, 20))
    values[4] = holes((20, 20))
    path = write(tmp_path / "a.tif", values, interp=[*RGB, ColorInterp.undefined, ColorInterp.alpha])
    pixels = open_raster(path, bands=(1, 2, 3, 4)).open().read(Window.whole((20, 20)))
    same_pixels(pixels, values[:4], values[4] > 0)


def test_nodata_given_or_taken_away(tmp_path):
    values = noise((2, 20, 20)) // 32
    path = write(tmp_path / "a.tif", values, nodata=3)
    whole = Window.whole((20, 20))
    same_pixels(open_raster(path, nodata=5).open().read(whole), values, (values != 5).all(axis=0))
    assert open_raster(path, nodata="none").open().read(whole).valid is None
    for wrong in (-1, 256, 1.5, float("nan")):
        with pytest.raises(UsageError, match="from 0 to 255"):
            open_raster(path, nodata=wrong)
    floats = write(tmp_path / "f.tif", with_nan(noise((1, 20, 20), "float32")))
    assert not open_raster(floats, nodata=float("nan")).open().read(whole).validity().all()


def test_mixed_dtypes_are_read_as_their_common_type(tmp_path):
    write(tmp_path / "a.tif", noise((1, 9, 9)))
    write(tmp_path / "b.tif", noise((1, 9, 9), "int16"))
    bands = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{i}"><SimpleSource><SourceFilename relativeToVRT="1">{name}'
        "</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
        for i, (kind, name) in enumerate([("Byte", "a.tif"), ("Int16", "b.tif")], 1)
    )
    (tmp_path / "c.vrt").write_text(f'<VRTDataset rasterXSize="9" rasterYSize="9">{bands}</VRTDataset>')
    source = open_raster(tmp_path / "c.vrt")
    pixels = source.open().read(Window.whole((9, 9)))
    assert source.info.dtype == pixels.values.dtype.name == "int16"
    np.testing.assert_array_equal(pixels.values[0], read_whole(tmp_path / "a.tif")[0][0])
    np.testing.assert_array_equal(pixels.values[1], read_whole(tmp_path / "b.tif")[0][0])
    assert {part["path"].rpartition("/")[2] for part in source.identity()[:-1]} == {"a.tif", "b.tif", "c.vrt"}


@pytest.mark.parametrize("storage", [{"blockysize": 11}, {"tiled": True, "blockxsize": 32, "blockysize": 32}])
def test_many_threads_read_what_one_reads(tmp_path, storage):
    values = noise((3, 300, 200))
    path = write(tmp_path / "a.tif", values, compress="deflate", interleave="pixel", **storage)
    reader = open_raster(path).open()
    random = np.random.default_rng(2)
    windows = [
        Window.of(row, row + 50, col, col + 50)
        for row, col in zip(random.integers(0, 250, 200).tolist(), random.integers(0, 150, 200).tolist(), strict=True)
    ]
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda window: reader.read(window).values, windows))
    for window, part in zip(windows, parts, strict=True):
        np.testing.assert_array_equal(part, values[:, *window.within(Window.whole((300, 200)))])


def test_readers_and_sources_pickle_and_reopen(tmp_path):
    path = write(tmp_path / "a.tif", noise((1, 20, 20)), mask=holes((20, 20)))
    source = open_raster(path)
    reader = source.open()
    expected = reader.read(Window.of(-2, 20, 0, 25))
    for other in (pickle.loads(pickle.dumps(reader)), pickle.loads(pickle.dumps(source)).open()):
        same_pixels(other.read(Window.of(-2, 20, 0, 25)), expected.values, expected.valid)
    reader.close()
    same_pixels(reader.read(Window.of(-2, 20, 0, 25)), expected.values, expected.valid)
    assert pickle.loads(pickle.dumps(source)) == source


def test_relative_paths_do_not_depend_on_the_folder(tmp_path, monkeypatch):
    write(tmp_path / "a.tif", noise((1, 20, 20)))
    monkeypatch.chdir(tmp_path)
    source = open_raster("a.tif")
    monkeypatch.chdir("/")
    assert source.info.name == "a.tif"
    assert source.open().read(Window.of(0, 1, 0, 1)).values.shape == (1, 1, 1)


def test_georeference(tmp_path):
    info = open_raster(write(tmp_path / "a.tif", noise((1, 20, 20)))).info
    assert info.transform == (2.0, 0.0, 500000.0, 0.0, -2.0, 5000000.0)
    assert rasterio.crs.CRS.from_wkt(info.crs_wkt) == rasterio.crs.CRS.from_string(UTM)
    assert info.resolution_m == pytest.approx(2.0)
    bare = open_raster(write(tmp_path / "b.tif", noise((1, 9, 9)), crs=None, transform=Affine.identity())).info
    assert (bare.transform, bare.crs_wkt, bare.resolution_m) == (None, None, None)
    points = [GroundControlPoint(0, 0, 10, 50), GroundControlPoint(0, 9, 11, 50), GroundControlPoint(9, 0, 10, 49)]
    with_points = write(tmp_path / "c.tif", noise((1, 9, 9)), crs="EPSG:4326", transform=None, gcps=points)
    info = open_raster(with_points).info
    assert [point[:4] for point in info.gcps] == [(0, 0, 10, 50), (0, 9, 11, 50), (9, 0, 10, 49)]
    assert info.transform is None
    assert "WGS 84" in info.gcps_crs_wkt


def test_resolution_in_degrees_and_feet():
    def resolution(crs, transform):
        wkt = rasterio.crs.CRS.from_user_input(crs).to_wkt()
        return replace(plain_info((10, 10)), crs_wkt=wkt, transform=transform).resolution_m

    # One arc second at the equator: 30.922 m along it (6378137 m radius), 30.715 m along the meridian.
    second = 1 / 3600
    at_equator = resolution("EPSG:4326", (second, 0, 20, 0, -second, 5 * second))
    assert at_equator == pytest.approx((30.922 * 30.715) ** 0.5, rel=1e-4)
    at_60 = resolution("EPSG:4326", (second, 0, 20, 0, -second, 60 + 5 * second))
    assert at_60 == pytest.approx((15.500 * 30.948) ** 0.5, rel=1e-3)
    assert resolution("EPSG:4326", (second, 0, 20, 0, second, 90 - 5 * second)) is not None
    assert resolution("EPSG:2263", (1, 0, 0, 0, -1, 0)) == pytest.approx(0.3048, rel=1e-4)


def test_resampled_to_a_pixel_size(tmp_path):
    rows, cols = np.mgrid[0:90, 0:120]
    values = np.stack([rows + cols, 200 - rows]).astype("float32")
    path = write(tmp_path / "a.tif", values)
    source = open_raster(path, resample_to=4.0)
    assert source.info.shape == (45, 60)
    assert source.info.transform == (4.0, 0.0, 500000.0, 0.0, -4.0, 5000000.0)
    assert source.info.resolution_m == pytest.approx(4.0)
    whole = source.open().read(Window.whole((45, 60)))
    # A plane stays the same plane: the middle of a large pixel lies between four small ones.
    inner = whole.values[0, 2:-2, 2:-2]
    np.testing.assert_allclose(inner, (2 * np.mgrid[2:43, 2:58].sum(axis=0) + 1), atol=1e-4)
    assert whole.validity().all()
    finer = open_raster(path, resample_to=0.5)
    assert finer.info.shape == (360, 480)


def test_resampled_windows_agree_whatever_is_asked(tmp_path):
    path = write(tmp_path / "a.tif", noise((3, 500, 1200)), mask=holes((500, 1200)))
    source = open_raster(path, resample_to=3.7)
    shape = source.info.shape
    reader = source.open()
    whole = reader.read(Window.whole(shape))
    assert source.select(type(source.choice)((1, 2, 3))).info.bands == 3
    random = np.random.default_rng(3)
    for _ in range(8):
        top, left = int(random.integers(0, shape[0] - 20)), int(random.integers(0, shape[1] - 20))
        window = Window.of(top, top + int(random.integers(1, 200)), left, left + int(random.integers(1, 200))).clip(
            shape
        )
        part = reader.read(window)
        same_pixels(part, whole.values[:, *window.within(Window.whole(shape))],
                    whole.validity()[window.within(Window.whole(shape))])  # fmt: skip


def test_resampling_that_cannot_be(tmp_path):
    bare = write(tmp_path / "a.tif", noise((1, 9, 9)), crs=None)
    with pytest.raises(InputError, match="no CRS and transform"):
        open_raster(bare, resample_to=1.0)
    palette = write(tmp_path / "b.tif", noise((1, 9, 9)), colormap={0: (1, 2, 3, 255)})
    with pytest.raises(InputError, match="palette"):
        open_raster(palette, resample_to=1.0)
    with pytest.raises(UsageError, match="above 0"):
        open_raster(write(tmp_path / "c.tif", noise((1, 9, 9))), resample_to=0.0)


def test_identity_follows_content_and_sidecars(tmp_path):
    path = write(tmp_path / "a.tif", noise((1, 9, 9)))
    before = open_raster(path).identity()
    assert before == open_raster(path).identity()
    assert json.loads(json.dumps(before)) == before
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(np.zeros((9, 9), bool))
    after = open_raster(path).identity()
    assert {part["path"].rpartition("/")[2] for part in after[:-1]} == {"a.tif", "a.tif.msk"}
    assert open_raster(path, bands=(1, 1)).identity() != after
    assert open_raster(path, nodata=4).identity() != after


def robust():
    import os

    root = os.environ.get("TILEPIPE_TEST_DATA", "")
    try:
        with open(f"{root}/robust/manifest.csv", newline="") as file:
            return list(csv.DictReader(file))
    except OSError:
        return [None]


@pytest.mark.parametrize("row", robust(), ids=lambda row: row["file"] if row else "absent")
def test_odd_real_rasters(row):
    folder = real_data("robust")
    path = folder / row["file"]
    if not row["read"].startswith("ok") or "complex" in row["dtype"]:
        with pytest.raises(InputError) as caught:
            open_raster(path).open().read(
                Window.of(0, 16, 0, 16) if "huge" in row["file"] else Window.of(0, 600, 0, 600)
            )
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        return
    source = open_raster(path)
    shape = source.info.shape
    # The largest file is compared in part.
    window = Window.whole(shape).clip((3000, 3000))
    rows, cols = window.shape
    with rasterio.open(path) as dataset:
        inside = RasterioWindow(0, 0, cols, rows)
        values = dataset.read(window=inside)
        valid = (dataset.read_masks(window=inside) != 0).all(axis=0) & np.isfinite(values).all(axis=0)
    same_pixels(source.open().read(window), values, valid)
    beyond = source.open().read(Window.of(shape[0] - 1, shape[0] + 9, -3, 1))
    assert beyond.values.shape == (source.info.bands, 10, 4)
    assert json.dumps(source.identity())


def test_cache_holds_the_strips_of_a_row_of_windows():
    def info(block, driver="GTiff"):
        return replace(plain_info((50_000, 10_000), 3), block_shape=block, driver=driver)

    assert cache_bytes(info((512, 512)), (2048, 2048)) == CACHE_BYTES
    assert cache_bytes(info((16, 10_000)), (3200, 2048)) == 10_000 * (3200 + 16) * 3
    assert cache_bytes(info((5000, 10_000)), (3200, 2048)) == 10_000 * 10_000 * 3
    assert cache_bytes(info((512, 512), driver="zarr"), (2048, 2048)) == 0
    assert in_strips(info((1, 10_000)))
    assert not in_strips(info((512, 512)))


@settings(max_examples=60, deadline=None)
@given(st.integers(-50, 50), st.integers(1, 300), st.integers(1, 40), st.integers(1, 9), st.integers(100, 200))
def test_strips_make_up_the_window(top, height, block, parts, width):
    info = replace(plain_info((400, 400)), block_shape=(block, 400))
    window = Window.of(top, top + height, 3, 3 + width)
    cut = strips(info, window, parts)
    assert [row for part in cut for row in range(part.rows.start, part.rows.stop)] == list(range(top, top + height))
    assert all(part.cols == window.cols for part in cut)
    assert len(cut) <= parts + 1
    if block < height:
        assert all(part.rows.stop % block == 0 for part in cut[:-1])
