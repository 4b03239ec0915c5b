"""The raster under a map: found, laid where the map is, reduced, or left out with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import zarr
from affine import Affine
from numpy.typing import NDArray
from rasters import GRID, noise, write
from stores import make_spec

from tilepipe.errors import InputError
from tilepipe.pictures import image as module
from tilepipe.pictures.colors import NODATA_COLOR
from tilepipe.pictures.image import find_image, stored_inputs
from tilepipe.pictures.view import View
from tilepipe.raster.source import open_raster
from tilepipe.store.spec import StoreSpec
from tilepipe.window import Window

RED, GREEN, BLUE = rasterio.enums.ColorInterp.red, rasterio.enums.ColorInterp.green, rasterio.enums.ColorInterp.blue
WKT = rasterio.crs.CRS.from_string("EPSG:32632").to_wkt()


def spec_on(raster: Path, window: Window, **changes: Any) -> StoreSpec:
    """The spec of a map of a window of a raster on GRID, whose store says where that is."""
    place = GRID * Affine.translation(window.cols.start, window.rows.start)
    files = [{"path": str(raster), "size": 1}]
    known = {"fingerprint": {"raster": files}, "settings": {"raster": raster.name}}
    return make_spec(**{"shape": window.shape, "crs_wkt": WKT, "transform": tuple(place)[:6], **known, **changes})


def shown(spec: StoreSpec, view: View | None = None, asked: Any = None) -> NDArray[np.uint8]:
    view = view or View(Window.whole(spec.shape), spec.shape)
    return find_image(spec, None if asked is None else str(asked)).read(view)


def as_picture(bands: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.moveaxis(bands, 0, -1)


@pytest.fixture(scope="module")
def values() -> NDArray[np.uint8]:
    return noise((3, 60, 80))


def test_a_map_of_a_region_shows_its_part_of_the_raster(tmp_path: Path, values: NDArray[np.uint8]) -> None:
    raster = write(tmp_path / "a.tif", values, photometric="rgb")
    spec = spec_on(raster, Window.of(10, 50, 20, 80))
    np.testing.assert_array_equal(shown(spec), as_picture(values)[10:50, 20:80])
    part = View(Window.of(4, 12, 8, 28), (4, 10))
    means = values[:, 14:22, 28:48].reshape(3, 4, 2, 10, 2).mean(axis=(2, 4))
    assert np.abs(shown(spec, part) - as_picture(means)).max() <= 0.5
    raster.rename(tmp_path / "b.tif")
    with pytest.raises(InputError, match="is not there any more; name the raster with --image"):
        shown(spec)
    np.testing.assert_array_equal(shown(spec, asked=tmp_path / "b.tif"), as_picture(values)[10:50, 20:80])


def test_a_raster_that_ends_inside_the_map_leaves_the_rest_grey(tmp_path: Path, values: NDArray[np.uint8]) -> None:
    raster = write(tmp_path / "a.tif", values, photometric="rgb")
    spec = spec_on(raster, Window.of(-10, 30, 40, 100))
    picture = shown(spec)
    np.testing.assert_array_equal(picture[10:, :40], as_picture(values)[:30, 40:])
    assert (picture[:10] == NODATA_COLOR).all()
    assert (picture[:, 40:] == NODATA_COLOR).all()
    with pytest.raises(InputError, match="another place"):
        shown(spec, View(Window.of(0, 10, 0, 60), (10, 60)))


def test_a_map_with_pixels_of_another_size(tmp_path: Path, values: NDArray[np.uint8]) -> None:
    raster = write(tmp_path / "a.tif", values, photometric="rgb")
    coarse = spec_on(raster, Window.of(0, 60, 0, 80), shape=(30, 40), transform=tuple(GRID * Affine.scale(2))[:6])
    means = as_picture(values.reshape(3, 30, 2, 40, 2).mean(axis=(2, 4)))
    assert np.abs(shown(coarse) - means).max() <= 0.5
    fine = spec_on(raster, Window.of(0, 60, 0, 80), shape=(120, 160), transform=tuple(GRID * Affine.scale(0.5))[:6])
    np.testing.assert_array_equal(shown(fine), as_picture(values).repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("overviews", [False, True])
def test_a_large_raster_wants_overviews(
    tmp_path: Path, values: NDArray[np.uint8], overviews: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raster = write(tmp_path / "a.tif", values.repeat(4, 1).repeat(4, 2), photometric="rgb", tiled=True)
    if overviews:
        with rasterio.open(raster, "r+") as tif:
            tif.build_overviews([2, 4], rasterio.enums.Resampling.average)
    monkeypatch.setattr(module, "LARGE", 10_000)
    spec = spec_on(raster, Window.of(0, 240, 0, 320))
    view = View(Window.whole(spec.shape), (60, 80))
    if overviews:
        np.testing.assert_array_equal(shown(spec, view), as_picture(values))
    else:
        with pytest.raises(InputError, match="gdaladdo"):
            shown(spec, view)
        np.testing.assert_array_equal(shown(spec, view, raster), as_picture(values))
        small = View(Window.of(0, 80, 0, 120), (20, 30))
        np.testing.assert_array_equal(shown(spec, small), as_picture(values)[:20, :30])


def test_colours_of_odd_rasters(tmp_path: Path, values: NDArray[np.uint8]) -> None:
    window = Window.of(0, 60, 0, 80)
    grey = write(tmp_path / "grey.tif", values[:1])
    np.testing.assert_array_equal(shown(spec_on(grey, window)), as_picture(values[:1].repeat(3, 0)))
    table = {n: (n, 255 - n, 7, 255) for n in range(256)}
    palette = write(tmp_path / "palette.tif", values[:1], colormap=table)
    wanted = np.stack([values[0], 255 - values[0], np.full_like(values[0], 7)], axis=-1)
    np.testing.assert_array_equal(shown(spec_on(palette, window)), wanted)
    holed = values.copy()
    holed[:, 5:9] = 0
    nodata = write(tmp_path / "nodata.tif", holed, photometric="rgb", nodata=0)
    assert (shown(spec_on(nodata, window))[5:9] == NODATA_COLOR).all()
    floats = write(tmp_path / "float.tif", np.linspace(-1, 1, 4800, dtype=np.float32).reshape(1, 60, 80))
    stretched = shown(spec_on(floats, window))
    assert (stretched[0, 0, 0], stretched[-1, -1, 0]) == (0, 255)
    order = write(tmp_path / "bgr.tif", values, interp=[BLUE, GREEN, RED], photometric="minisblack")
    np.testing.assert_array_equal(shown(spec_on(order, window)), as_picture(values)[..., ::-1])


def test_a_mosaic_and_a_zarr_array(tmp_path: Path, values: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    left = write(tmp_path / "left.tif", values[..., :50], photometric="rgb")
    right = write(
        tmp_path / "right.tif", values[..., 50:], photometric="rgb", transform=GRID * Affine.translation(50, 0)
    )
    both = open_raster([left, right])
    window = Window.of(0, 60, 30, 80)
    known = {"fingerprint": {"raster": both.identity()}, "settings": {"raster": both.raw.name}}
    spec = spec_on(left, window, **known)
    assert stored_inputs(spec) == [str(left), str(right)]
    np.testing.assert_array_equal(shown(spec), as_picture(values)[:, 30:])
    array = zarr.create_array(tmp_path / "a.zarr", data=values, chunks=(3, 16, 16))
    array.attrs.update({"spatial:transform": list(GRID)[:6], "proj:code": "EPSG:32632"})
    staged = open_raster(tmp_path / "a.zarr")
    spec = spec_on(left, window, fingerprint={"raster": staged.identity()}, settings={"raster": staged.raw.name})
    monkeypatch.setattr(module, "STRIP_BYTES", 3 * 50 * 7)
    np.testing.assert_array_equal(shown(spec), as_picture(values)[:, 30:])
    np.testing.assert_array_equal(shown(spec, View(Window.of(0, 60, 0, 50), (20, 10))), as_picture(values)[1::3, 32::5])


def test_without_a_transform_the_region_tells_the_place(tmp_path: Path, values: NDArray[np.uint8]) -> None:
    raster = write(tmp_path / "a.tif", values, photometric="rgb", crs=None, transform=None)
    plain = spec_on(raster, Window.of(0, 60, 0, 80), crs_wkt=None, transform=None)
    np.testing.assert_array_equal(shown(plain), as_picture(values))
    with pytest.raises(InputError, match="60 x 80 pixels, the map 30 x 40"):
        shown(spec_on(raster, Window.of(0, 30, 0, 40), crs_wkt=None, transform=None))


def test_rasters_that_do_not_fit_are_refused(tmp_path: Path, values: NDArray[np.uint8]) -> None:
    spec = spec_on(tmp_path / "a.tif", Window.of(0, 60, 0, 80))
    cases = {
        "elsewhere": (values, {"transform": GRID * Affine.translation(5000, 0)}, "another place"),
        "other": (values, {"crs": "EPSG:32633"}, "EPSG:32633"),
        "turned": (values, {"transform": GRID * Affine.rotation(30)}, "turned against the map"),
        "flipped": (values, {"transform": GRID * Affine.scale(1, -1)}, "turned against the map"),
    }
    for name, (pixels, options, message) in cases.items():
        raster = write(tmp_path / f"{name}.tif", pixels, photometric="rgb", **options)
        with pytest.raises(InputError, match=message) as caught:
            shown(spec, asked=raster)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="does not say where its raster is"):
        shown(make_spec())
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(InputError, match=r"text\.tif"):
        shown(spec, asked=tmp_path / "text.tif")
