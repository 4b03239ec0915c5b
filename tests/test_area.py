from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pyogrio
import pytest
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.features import rasterize
from rasters import GRID, UTM, noise, write

from tilepipe.errors import InputError, UsageError
from tilepipe.raster.area import open_area, region_window
from tilepipe.raster.info import RasterInfo
from tilepipe.raster.source import open_raster
from tilepipe.window import Window

SHAPE = (300, 400)
RASTER = RasterInfo("a.tif", SHAPE, ("uint8",), (None,), ("gray",), (None,), transform=tuple(GRID)[:6])


@pytest.fixture
def raster(tmp_path):
    return open_raster(write(tmp_path / "raster.tif", noise((1, *SHAPE)))).info


def polygons(path, shapes, crs=UTM, **options):
    geometry = np.array([shapely.to_wkb(shape) for shape in shapes], dtype=object)
    kind = options.pop("geometry_type", "Unknown")
    pyogrio.raw.write(str(path), geometry, field_data=[], fields=[], geometry_type=kind, crs=crs, **options)
    return path


def blob(col, row, radius, grid=GRID):
    """A disc of `radius` pixels around (col, row), in the raster's CRS."""
    disc = shapely.Point(col, row).buffer(radius, quad_segs=400)
    return shapely.transform(disc, lambda p: np.column_stack(grid * (p[:, 0], p[:, 1])))


def drawn(shapes, grid=GRID):
    return rasterize(shapes, out_shape=SHAPE, transform=grid, fill=0, default_value=1, dtype="uint8").astype(bool)


SHAPES = [blob(50, 60, 40.3), blob(390, 290, 33.3), shapely.box(500100, 4999500, 500300.5, 4999999)]


@pytest.mark.parametrize("name", ["a.gpkg", "a.geojson", "a.shp", "a.fgb"])
def test_polygons_are_drawn_as_rasterio_draws_them(tmp_path, raster, name):
    crs = "EPSG:4326" if name.endswith("json") else UTM
    shapes = SHAPES
    if crs != UTM:
        from pyproj import Transformer

        move = Transformer.from_crs(UTM, crs, always_xy=True).transform
        shapes = [shapely.transform(shape, lambda p: np.column_stack(move(p[:, 0], p[:, 1]))) for shape in SHAPES]
    area = open_area(polygons(tmp_path / name, shapes, crs), raster)
    for reader in (area.open(), pickle.loads(pickle.dumps(area)).open(), pickle.loads(pickle.dumps(area.open()))):
        inside = reader.read(Window.whole(SHAPE))
        assert inside.dtype == bool
        # A reprojected edge may pass a pixel's centre on its other side.
        assert (inside != drawn(SHAPES)).sum() <= (0 if crs == UTM else 3)
    assert json.loads(json.dumps(area.identity())) == area.identity()


def test_windows_are_parts_of_the_whole_and_false_beyond(tmp_path):
    info = replace(RASTER, shape=(2300, 2100))
    shapes = [blob(1000, 1100, 800.7), blob(1020, 1030, 5)]
    area = open_area(polygons(tmp_path / "a.gpkg", shapes), info)
    reader = area.open()
    whole = reader.read(Window.whole(info.shape))
    expected = rasterize(shapes, out_shape=info.shape, transform=GRID, fill=0, default_value=1, dtype="uint8")
    assert (whole != expected).sum() == 0
    wide = np.pad(whole, 50)
    random = np.random.default_rng(0)
    for _ in range(20):
        top, left = int(random.integers(-50, 2000)), int(random.integers(-50, 1900))
        window = Window.of(top, top + int(random.integers(0, 300)), left, left + int(random.integers(1, 200)))
        expected = wide[window.rows.start + 50 : window.rows.stop + 50, window.cols.start + 50 : window.cols.stop + 50]
        np.testing.assert_array_equal(reader.read(window), expected)
        assert reader.touches(window) or not expected.any()
    assert not reader.touches(Window.of(0, 50, 0, 50))
    assert not reader.touches(Window.of(2300, 2400, 0, 50))


def test_all_layers_and_collections_count(tmp_path, raster):
    polygons(tmp_path / "a.gpkg", SHAPES[:1], layer="one")
    collection = shapely.GeometryCollection([shapely.MultiPolygon([SHAPES[1]]), shapely.Point(0, 0)])
    polygons(tmp_path / "a.gpkg", [collection, SHAPES[2]], layer="two", append=False)
    inside = open_area(tmp_path / "a.gpkg", raster).open().read(Window.whole(SHAPE))
    np.testing.assert_array_equal(inside, drawn(SHAPES))


def test_areas_that_cannot_be_used(tmp_path, raster):
    (tmp_path / "text.txt").write_text("no area")
    points = polygons(tmp_path / "points.gpkg", [shapely.Point(1, 2)])
    good = polygons(tmp_path / "good.gpkg", SHAPES)
    for path, info, message in (
        (tmp_path / "none.gpkg", raster, "cannot open .*none.gpkg: No such file"),
        (tmp_path / "text.txt", raster, "cannot open .*text.txt"),
        (points, raster, "points.gpkg holds no polygon"),
        (good, replace(raster, transform=None), "no affine transform"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            open_area(path, info)
        assert "\n" not in str(caught.value)


def test_a_raster_on_the_same_grid(tmp_path, raster):
    values = noise((1, *SHAPE)) % 3
    area = open_area(write(tmp_path / "mask.tif", values, nodata=2), raster)
    inside = area.open().read(Window.of(-4, SHAPE[0] + 3, 5, SHAPE[1] + 9))
    np.testing.assert_array_equal(inside, np.pad(values[0] == 1, ((4, 3), (0, 9)))[:, 5:])
    assert pickle.loads(pickle.dumps(area)).open().touches(Window.of(0, 5, 0, 5))
    assert json.dumps(area.identity())


def test_a_raster_on_another_grid_is_read_at_the_nearest_pixel(tmp_path, raster):
    # Pixels of 6 m over part of the raster: each stands for three by three.
    values = noise((1, 60, 70)) % 2
    grid = GRID * Affine.translation(30, 45) * Affine.scale(3)
    area = open_area(write(tmp_path / "mask.tif", values, transform=grid), raster)
    expected = np.zeros(SHAPE, bool)
    expected[45 : 45 + 180, 30 : 30 + 210] = np.repeat(np.repeat(values[0], 3, axis=0), 3, axis=1)
    reader = area.open()
    np.testing.assert_array_equal(reader.read(Window.whole(SHAPE)), expected)
    np.testing.assert_array_equal(reader.read(Window.of(100, 177, 33, 90)), expected[100:177, 33:90])
    assert not reader.touches(Window.of(0, 45, 0, 400))


def test_a_raster_in_another_crs(tmp_path, raster):
    from pyproj import Transformer

    degree_grid = Affine(2e-5, 0, 8.9995, 0, -2e-5, 45.1565)
    values = noise((1, 500, 700)) % 2
    values = np.repeat(np.repeat(values, 20, axis=1), 20, axis=2)[:, :500, :700]
    area = open_area(write(tmp_path / "mask.tif", values, crs="EPSG:4326", transform=degree_grid), raster)
    inside = area.open().read(Window.whole(SHAPE))
    rows, cols = np.mgrid[0 : SHAPE[0], 0 : SHAPE[1]] + 0.5
    lon, lat = Transformer.from_crs(UTM, 4326, always_xy=True).transform(*(GRID * (cols, rows)))
    col, row = ~degree_grid * (lon, lat)
    expected = np.zeros(SHAPE, bool)
    found = (row >= 0) & (row < 500) & (col >= 0) & (col < 700)
    expected[found] = values[0, row[found].astype(int), col[found].astype(int)] > 0
    assert found.any()
    assert (inside != expected).mean() < 1e-3


def test_rasters_that_cannot_be_laid_over_each_other(tmp_path, raster):
    bare = write(tmp_path / "bare.tif", noise((1, 20, 20)), crs=None, transform=Affine.identity())
    with pytest.raises(InputError, match="needs the raster's own size"):
        open_area(bare, raster)
    with pytest.raises(InputError, match=r"bare2\.tif has no CRS"):
        open_area(write(tmp_path / "bare2.tif", noise((1, 20, 20)), crs=None), raster)
    own = write(tmp_path / "own.tif", noise((1, 20, 20)) % 2, crs=None, transform=Affine.identity())
    info = open_raster(bare).info
    assert open_area(own, info).open().read(Window.whole((20, 20))).sum() == (noise((1, 20, 20)) % 2).sum()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10:20,30:50", (10, 20, 30, 50)),
        (":20,30:", (0, 20, 30, 400)),
        (":,:", (0, 300, 0, 400)),
        ("250:900,0:1", (250, 300, 0, 1)),
        (" 1 : 2 , 3 : 4 ", (1, 2, 3, 4)),
        ("500010,4999900,500030,4999980", (10, 50, 5, 15)),
        ("500011,4999901,500029,4999979", (10, 50, 5, 15)),
        ("499000,4999990,500002,5001000", (0, 5, 0, 1)),
        ("500010.0000001,4999900,500030,4999980.0000001", (10, 50, 5, 15)),
    ],
)
def test_regions(text, expected):
    assert region_window(RASTER, text) == Window.of(*expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10:20", "not understood"),
        ("a:b,c:d", "not understood"),
        ("1:2:3,4:5", "not understood"),
        ("1,2,3", "not understood"),
        ("20:10,0:5", "is empty"),
        ("-5:10,0:5", "before 0"),
        ("300:400,0:5", "holds no pixel"),
        ("3,4,1,2", "is empty"),
        ("nan,0,1,1", "is empty"),
        ("0,0,1,1", "holds no pixel"),
    ],
)
def test_regions_that_cannot_be(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        region_window(RASTER, text)
    assert "\n" not in str(caught.value)


def test_bounds_need_a_transform():
    with pytest.raises(UsageError, match="row0:row1"):
        region_window(replace(RASTER, transform=None), "0,0,1,1")


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 350), st.floats(0, 350), st.floats(0, 1000), st.floats(0.1, 500), st.floats(0.1, 500))
def test_a_region_of_a_turned_raster_holds_every_pixel_it_touches(turn, x, y, width, height):
    grid = Affine.rotation(turn) * Affine.scale(2, -2)
    info = replace(RASTER, transform=tuple(grid)[:6])
    rows, cols = np.mgrid[0 : SHAPE[0], 0 : SHAPE[1]] + 0.5
    xs, ys = grid * (cols, rows)
    touched = (xs > x) & (xs < x + width) & (ys > y) & (ys < y + height)
    try:
        window = region_window(info, f"{x},{y},{x + width},{y + height}")
    except UsageError:
        assert not touched.any()
        return
    inside = np.zeros(SHAPE, bool)
    inside[window.within(Window.whole(SHAPE))] = True
    assert not (touched & ~inside).any()
