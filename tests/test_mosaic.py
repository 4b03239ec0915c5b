from __future__ import annotations

import pickle

import numpy as np
import pytest
from affine import Affine
from rasterio.enums import ColorInterp
from rasters import GRID, noise, read_whole, write

from tilepipe.errors import InputError
from tilepipe.raster.source import open_raster
from tilepipe.window import Window

ROWS, COLS = 90, 120
WHOLE = Window.whole((ROWS, COLS))
RGBA = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
CUTS = [Window.of(r, min(r + 40, ROWS), c, min(c + 50, COLS)) for r in (0, 40, 80) for c in (0, 50, 100)]


def place(window, grid=GRID):
    return grid * Affine.translation(window.cols.start, window.rows.start)


def cut(folder, values, windows=CUTS, grid=GRID, mask=None, **options):
    paths = []
    for i, window in enumerate(windows):
        inner = window.within(WHOLE)
        masked = {} if mask is None else {"mask": mask[inner]}
        path = folder / f"piece{i:02d}.tif"
        paths.append(write(path, values[:, *inner], transform=place(window, grid), **masked, **options))
    return paths


def holes(seed=1):
    return np.where(np.random.default_rng(seed).random((ROWS, COLS)) < 0.3, 0, 255).astype("uint8")


@pytest.mark.parametrize(
    "grid", [GRID, Affine(2, 0, 0, 0, 2, 0), Affine.rotation(20) * GRID], ids=["north", "south", "turned"]
)
def test_pieces_are_the_original(tmp_path, grid):
    values = noise((3, ROWS, COLS), "int16")
    paths = cut(tmp_path, values, grid=grid)
    random = np.random.default_rng(0)
    source = open_raster([paths[i] for i in random.permutation(len(paths))])
    pixels = source.open().read(WHOLE)
    np.testing.assert_array_equal(pixels.values, values)
    assert pixels.valid is None
    assert not source.info.has_mask
    np.testing.assert_allclose(source.info.transform, tuple(grid)[:6])
    assert source.info.crs_wkt == open_raster(paths[0]).info.crs_wkt
    beyond = pickle.loads(pickle.dumps(source)).open().read(Window.of(-5, 20, 70, COLS + 9))
    expected = np.pad(values, ((0, 0), (5, 0), (0, 9)), mode="reflect")[:, :25, 70:]
    np.testing.assert_array_equal(beyond.values, expected)


@pytest.mark.parametrize("kind", ["nodata", "mask", "alpha"])
def test_masks_of_pieces_are_the_originals(tmp_path, kind):
    values = noise((4 if kind == "alpha" else 3, ROWS, COLS)) // 8
    options, mask = {}, None
    if kind == "nodata":
        options["nodata"] = 5
    elif kind == "mask":
        mask = holes()
    else:
        values[3] = holes()
        options["interp"] = RGBA
    whole = write(tmp_path / "whole.tif", values, **options, **({} if mask is None else {"mask": mask}))
    paths = cut(tmp_path, values, mask=mask, **options)
    expected, valid = read_whole(whole)
    pixels = open_raster(str(tmp_path / "piece*.tif")).open().read(WHOLE)
    np.testing.assert_array_equal(pixels.validity(), valid)
    np.testing.assert_array_equal(pixels.values[:, valid], expected[:, valid])
    assert len(paths) == 9


@pytest.mark.parametrize("kind", ["plain", "nodata", "mask", "alpha"])
def test_the_first_file_is_on_top_and_its_holes_show_what_is_below(tmp_path, kind):
    windows = [Window.of(0, 60, 0, 80), Window.of(30, 90, 40, 120)]
    layers = [noise((4 if kind == "alpha" else 2, ROWS, COLS), seed=i) // 8 for i in (1, 2)]
    masks = [holes(3), holes(4)]
    paths = []
    expected, valid = np.zeros_like(layers[0]), np.zeros((ROWS, COLS), bool)
    for i in (1, 0):
        values, inner = layers[i], windows[i].within(WHOLE)
        options = {}
        solid = np.zeros((ROWS, COLS), bool)
        solid[inner] = True
        if kind == "mask":
            options, solid = {"mask": masks[i][inner]}, solid & (masks[i] > 0)
        elif kind == "alpha":
            values[3] = masks[i]
            options, solid = {"interp": RGBA}, solid & (masks[i] > 0)
        elif kind == "nodata":
            values[:, masks[i] == 0] = 77
            values[:, masks[i] > 0] %= 77
            options, solid = {"nodata": 77}, solid & (masks[i] > 0)
        paths.insert(0, write(tmp_path / f"{i}.tif", values[:, *inner], transform=place(windows[i]), **options))
        expected[:, solid], valid = values[:, solid], valid | solid
    pixels = open_raster(paths).open().read(WHOLE)
    np.testing.assert_array_equal(pixels.validity(), valid)
    np.testing.assert_array_equal(pixels.values[:, valid], expected[:, valid])


def test_palette_names_and_nodata_pass_through(tmp_path):
    table = {i: (i, 0, 255 - i, 255) for i in range(256)}
    paths = cut(tmp_path, noise((1, ROWS, COLS)), CUTS[:2], colormap=table, descriptions=["cover"], nodata=3)
    one, info = open_raster(paths[0]).info, open_raster(paths).info
    assert info.colormap == one.colormap
    assert (info.descriptions, info.color_interp, info.nodata) == (("cover",), ("palette",), (3,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crs": "EPSG:32633"}, "CRS is EPSG:32633, not EPSG:32632"),
        ({"crs": None}, "CRS is missing"),
        ({"transform": Affine(3, 0, 500000, 0, -3, 5000000)}, "its pixels are 1.5 x 1.5 times"),
        ({"transform": GRID * Affine.translation(0.4, 3)}, r"\+0.40 columns and \+0.00 rows off"),
        ({"transform": Affine.identity(), "crs": None}, "CRS is missing"),
        ({"nodata": 0}, "nodata is 0.0, not None.*--nodata"),
        ({"dtype": "uint16"}, "dtype is uint16, not uint8"),
        ({"bands": 4}, "band count is 4, not 3"),
        ({"photometric": "MINISBLACK"}, "colour interpretation is gray, undefined, undefined, not red"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, change, message):
    values = noise((3, 20, 20))
    bands, dtype = change.pop("bands", 3), change.pop("dtype", "uint8")
    options = {"photometric": "RGB"}
    first = write(tmp_path / "first.tif", values, **options)
    fit = write(tmp_path / "fit.tif", values, transform=GRID * Affine.translation(20, 0), **options)
    odd = write(tmp_path / "odd.tif", noise((bands, 20, 20), dtype), **{**options, **change})
    with pytest.raises(InputError, match=rf"odd\.tif does not fit the mosaic: .*{message}") as caught:
        open_raster([first, fit, odd])
    assert "\n" not in str(caught.value)


def test_nodata_for_all_makes_files_fit(tmp_path):
    values = noise((1, 20, 20)) % 9
    first = write(tmp_path / "a.tif", values)
    second = write(tmp_path / "b.tif", values, transform=GRID * Affine.translation(20, 0), nodata=3)
    pixels = open_raster([first, second], nodata=4).open().read(Window.whole((20, 40)))
    np.testing.assert_array_equal(pixels.validity(), np.hstack([values[0] != 4] * 2))
    source = open_raster([first, second], nodata="none")
    assert source.open().read(Window.whole((20, 40))).valid is None


def test_files_without_georeference_are_refused(tmp_path):
    paths = [write(tmp_path / f"{i}.tif", noise((1, 9, 9)), crs=None, transform=Affine.identity()) for i in (0, 1)]
    with pytest.raises(InputError, match="no affine transform"):
        open_raster(paths)


def test_identity_names_every_file_in_order(tmp_path):
    paths = cut(tmp_path, noise((1, ROWS, COLS)), CUTS[:3])
    source = open_raster(paths)
    assert [part["path"] for part in source.identity()[:-1]] == [str(path) for path in paths]
    assert open_raster(paths[::-1]).identity() != source.identity()
    assert source.info.name.endswith("piece00.tif and 2 more")


def test_a_degree_grid_keeps_its_axes(tmp_path):
    grid = Affine(0.001, 0, 10.0, 0, -0.001, 50.0)
    paths = cut(tmp_path, noise((1, ROWS, COLS)), grid=grid, crs="EPSG:4326")
    one, all_of_them = open_raster(paths[0]).info, open_raster(paths).info
    assert all_of_them.resolution_m == pytest.approx(one.resolution_m, rel=1e-3)
    assert all_of_them.crs_wkt == one.crs_wkt
