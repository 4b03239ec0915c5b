"""Where labels lie and which are wanted: georeference, mosaics, zarr, staging, regions and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import rioxarray
import shapely
import xarray
import zarr
from affine import Affine
from pyproj import CRS, Transformer
from rasterio.control import GroundControlPoint
from rasterio.features import rasterize
from rasters import GRID, UTM, noise, read_whole, write
from runs import pixel_labels, pixel_model, segment

from tilepipe.errors import InputError, UsageError
from tilepipe.raster.ingest import ingest
from tilepipe.raster.source import open_raster
from tilepipe.store.output import open_store
from tilepipe.window import Window

SIZE = (97, 131)
VALUES = noise((3, *SIZE))
POINTS = [
    GroundControlPoint(0, 0, 10, 50, 0, id="1"),
    GroundControlPoint(0, 131, 11, 50.1, 3, id="2"),
    GroundControlPoint(97, 0, 10.1, 49, 0, id="3"),
    GroundControlPoint(97, 131, 11.2, 49.2, 0, id="4"),
]


def opened(path: Path) -> Any:
    return xarray.open_zarr(path, consolidated=False)["labels"]


# ---- georeference ----

PLACES: dict[str, dict[str, Any]] = {
    "north-up": {},
    "south-up": {"transform": Affine(2, 0, 500000, 0, 2, 4999000)},
    "rotated": {"transform": Affine.translation(500000, 5000000) * Affine.rotation(30) * Affine.scale(2, -2)},
    "mirrored": {"transform": Affine(-2, 0, 500000, 0, -2, 5000000)},
    "no CRS": {"crs": None},
    "nothing": {"crs": None, "transform": Affine.identity()},
    "degrees": {"crs": "EPSG:4326", "transform": Affine(0.01, 0, 8, 0, -0.01, 50)},
    "feet": {"crs": "EPSG:2263"},
    "its own CRS": {"crs": "+proj=laea +lat_0=47.5 +lon_0=9.3 +ellps=GRS80 +units=m"},
    "Mars": {"crs": "+proj=eqc +lat_ts=0 +R=3396190 +units=m"},
}


@pytest.mark.parametrize("place", PLACES)
def test_labels_lie_where_the_raster_lies(tmp_path: Path, place: str) -> None:
    path = write(tmp_path / "in.tif", VALUES, **PLACES[place])
    segment(path, tmp_path / "out.zarr", pixel_model())
    found, expected = opened(tmp_path / "out.zarr"), rioxarray.open_rasterio(path)
    assert found.rio.transform().almost_equals(expected.rio.transform())
    assert (found.rio.crs is None) == (expected.rio.crs is None)
    if found.rio.crs is not None:
        assert CRS(found.rio.crs).equals(CRS(expected.rio.crs), ignore_axis_order=True)
    if place != "rotated":
        np.testing.assert_allclose(found.x, expected.x)
        np.testing.assert_allclose(found.y, expected.y)
    assert found.dtype == np.uint8


@pytest.mark.parametrize("place", ["south-up", "rotated", "no CRS", "nothing", "degrees"])
def test_a_region_lies_in_its_part_of_the_raster(tmp_path: Path, place: str) -> None:
    path, model = write(tmp_path / "in.tif", VALUES, **PLACES[place]), pixel_model()
    labels, _ = segment(path, tmp_path / "out.zarr", model, region="30:80,17:")
    np.testing.assert_array_equal(labels, pixel_labels(model, VALUES)[30:80, 17:])
    with rasterio.open(path) as dataset:
        moved = dataset.transform * Affine.translation(17, 30)
    # Without any georeference x and y count the output's own pixels.
    expected = Affine.identity() if place == "nothing" else moved
    assert opened(tmp_path / "out.zarr").rio.transform().almost_equals(expected)


@pytest.mark.parametrize("region", [None, "30:80,17:"])
def test_control_points_are_kept(tmp_path: Path, region: str | None) -> None:
    path = write(tmp_path / "in.tif", VALUES, crs="EPSG:4326", transform=None, gcps=POINTS)
    segment(path, tmp_path / "out.zarr", pixel_model(), region=region)
    found, expected = opened(tmp_path / "out.zarr"), rioxarray.open_rasterio(path)
    assert found.rio.crs == expected.rio.crs == rasterio.crs.CRS.from_epsg(4326)
    down, right = (30, 17) if region else (0, 0)
    points = [(p.row - down, p.col - right, p.x, p.y, p.z) for p in expected.rio.get_gcps()]
    assert [(p.row, p.col, p.x, p.y, p.z) for p in found.rio.get_gcps()] == points
    assert len(points) == 4
    assert {"x", "y"}.isdisjoint(found.coords)


def test_a_transform_that_maps_no_area_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "in.tif", VALUES, driver="GTiff")
    text = (
        f'<VRTDataset rasterXSize="131" rasterYSize="97"><GeoTransform>5, 0, 0, 7, 0, -1</GeoTransform>'
        f'<VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename>{path}</SourceFilename>'
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    (tmp_path / "flat.vrt").write_text(text)
    with pytest.raises(InputError, match=r"flat\.vrt has the geotransform .* maps no area"):
        segment(tmp_path / "flat.vrt", tmp_path / "out.zarr", pixel_model(1))


# ---- other forms of the same raster ----


@pytest.mark.parametrize("fmt", [2, 3])
def test_a_zarr_array_gives_the_labels_of_the_file(tmp_path: Path, fmt: int) -> None:
    values, model = VALUES.astype("uint16") * 9, pixel_model()
    group = zarr.open_group(tmp_path / "in.zarr", mode="w", zarr_format=fmt)
    array = group.create_array("image", shape=values.shape, dtype=values.dtype, chunks=(1, 40, 50))
    array[...] = values
    array.attrs.update({"proj:code": UTM, "spatial:transform": list(GRID)[:6], "nodata": int(values[0, 5, 5])})
    labels, _ = segment(tmp_path / "in.zarr", tmp_path / "out.zarr", model)
    valid = (values != values[0, 5, 5]).all(axis=0)
    np.testing.assert_array_equal(labels, pixel_labels(model, values, valid))
    path = write(tmp_path / "in.tif", values, nodata=int(values[0, 5, 5]))
    np.testing.assert_array_equal(labels, segment(path, tmp_path / "file.zarr", model)[0])
    found = opened(tmp_path / "out.zarr")
    assert (found.rio.transform(), found.rio.crs) == (GRID, rasterio.crs.CRS.from_string(UTM))


def holes() -> Any:
    return np.where(np.random.default_rng(3).random(SIZE) < 0.3, 0, 255).astype("uint8")


FORMS: dict[str, dict[str, Any]] = {
    "strips and mask": {"blockysize": 5, "mask": holes(), "interleave": "pixel"},
    "tiles and nodata": {"tiled": True, "blockxsize": 48, "blockysize": 16, "nodata": 7},
    "rotated": PLACES["rotated"],
    "control points": {"crs": "EPSG:4326", "transform": None, "gcps": POINTS},
    "nothing": PLACES["nothing"],
}


@pytest.mark.parametrize("form", FORMS)
def test_staged_or_not_the_labels_are_the_same(tmp_path: Path, form: str) -> None:
    path, model = write(tmp_path / "in.tif", VALUES, **FORMS[form]), pixel_model()
    never, _ = segment(path, tmp_path / "never.zarr", model, stage="never")
    np.testing.assert_array_equal(never, pixel_labels(model, *read_whole(path)))
    always, summary = segment(path, tmp_path / "always.zarr", model, stage="always", bands=(1, 2, 3))
    assert "staged first: --stage always" in summary.notes
    np.testing.assert_array_equal(always, never)
    assert not (tmp_path / "always.zarr.staged.zarr").exists()
    # Staging is no part of what the map means: the other way of reading finishes and resumes the same job.
    assert segment(path, tmp_path / "never.zarr", model, stage="always")[1].computed == 0
    ingest(open_raster(path), tmp_path / "in.zarr", chunk=32)
    ingested, _ = segment(tmp_path / "in.zarr", tmp_path / "ingested.zarr", model)
    np.testing.assert_array_equal(ingested, never)
    one, other = (open_store(tmp_path / name).spec for name in ("never.zarr", "ingested.zarr"))
    assert (one.transform, one.crs_wkt, one.gcps) == (other.transform, other.crs_wkt, other.gcps)


def pieces(folder: Path, **options: Any) -> list[Path]:
    """VALUES cut into four files, which overlap by some pixels."""
    folder.mkdir()
    found = []
    for row in (slice(0, 50), slice(44, 97)):
        for col in (slice(0, 70), slice(61, 131)):
            place = GRID * Affine.translation(col.start, row.start)
            name = folder / f"{row.start:02}_{col.start:02}.tif"
            found.append(write(name, VALUES[:, row, col], transform=place, **options))
    return found


@pytest.mark.parametrize("how", ["files", "glob", "files in any order"])
def test_a_mosaic_gives_the_labels_of_the_whole(tmp_path: Path, how: str) -> None:
    files, model = pieces(tmp_path / "parts", nodata=7), pixel_model()
    inputs = {"files": files, "glob": str(tmp_path / "parts" / "*.tif"), "files in any order": files[::-1]}[how]
    labels, _ = segment(inputs, tmp_path / "out.zarr", model)
    np.testing.assert_array_equal(labels, pixel_labels(model, VALUES, (VALUES != 7).all(axis=0)))
    assert opened(tmp_path / "out.zarr").rio.transform() == GRID


def test_what_a_mosaic_does_not_cover_is_nodata(tmp_path: Path) -> None:
    files, model = pieces(tmp_path / "parts"), pixel_model()
    labels, _ = segment([files[0], files[3]], tmp_path / "out.zarr", model)
    covered = np.zeros(SIZE, bool)
    covered[:50, :70] = covered[44:, 61:] = True
    np.testing.assert_array_equal(labels, pixel_labels(model, VALUES, covered))


# ---- regions and masks ----


def test_a_region_in_pixels_or_coordinates_is_a_part_of_the_whole(tmp_path: Path) -> None:
    path, model = write(tmp_path / "in.tif", VALUES), pixel_model()
    whole = pixel_labels(model, VALUES)
    left, top = GRID * (20, 10)
    right, bottom = GRID * (90, 75)
    for number, text in enumerate(("10:75,20:90", f"{left},{bottom},{right},{top}")):
        labels, _ = segment(path, tmp_path / f"{number}.zarr", model, region=text)
        np.testing.assert_array_equal(labels, whole[10:75, 20:90])
        assert opened(tmp_path / f"{number}.zarr").rio.transform() == GRID * Affine.translation(20, 10)
    with pytest.raises(UsageError, match="holds no pixel of"):
        segment(path, tmp_path / "no.zarr", model, region="97:120,0:10")


BLOBS = [shapely.Point(40, 50).buffer(30.3), shapely.box(80.2, 10.7, 125.4, 90.9)]


def inside() -> Any:
    return rasterize(BLOBS, out_shape=SIZE, fill=0, default_value=1, dtype="uint8") > 0


def area(path: Path, crs: str | None = UTM) -> Path:
    placed = [shapely.transform(blob, lambda p: np.column_stack(GRID * (p[:, 0], p[:, 1]))) for blob in BLOBS]
    if crs not in (None, UTM):
        move = Transformer.from_crs(UTM, crs, always_xy=True).transform
        placed = [shapely.transform(blob, lambda p: np.column_stack(move(p[:, 0], p[:, 1]))) for blob in placed]
    wkb = np.array([shapely.to_wkb(blob) for blob in placed], dtype=object)
    pyogrio.raw.write(str(path), wkb, field_data=[], fields=[], geometry_type="Polygon", crs=crs)
    return path


@pytest.mark.parametrize("name", ["area.gpkg", "area.geojson", "area.tif", "finer.tif"])
def test_outside_of_a_mask_is_nodata_and_inside_is_as_ever(tmp_path: Path, name: str) -> None:
    path, model = write(tmp_path / "in.tif", VALUES, nodata=7), pixel_model()
    wanted = inside()
    if name == "area.tif":
        mask = write(tmp_path / name, wanted[None].astype("uint8"))
    elif name == "finer.tif":
        finer = np.kron(wanted, np.ones((3, 3)))[None].astype("uint8")
        mask = write(tmp_path / name, finer, transform=GRID * Affine.scale(1 / 3))
    else:
        mask = area(tmp_path / name, "EPSG:4326" if name.endswith("json") else UTM)
    labels, summary = segment(path, tmp_path / "out.zarr", model, mask=str(mask))
    full = pixel_labels(model, VALUES, (VALUES != 7).all(axis=0))
    off = labels != np.where(wanted, full, 255)
    # A reprojected edge may pass a pixel's centre on its other side.
    assert off.sum() <= (3 if name.endswith("json") else 0)
    assert summary.nodata == (labels == 255).sum()
    region, _ = segment(path, tmp_path / "part.zarr", model, mask=str(mask), region="15:70,33:120")
    np.testing.assert_array_equal(region, labels[15:70, 33:120])


def test_masks_that_are_none(tmp_path: Path) -> None:
    path, model = write(tmp_path / "in.tif", VALUES), pixel_model()
    (tmp_path / "text.geojson").write_text("no area")
    for name in ("none.gpkg", "text.geojson"):
        with pytest.raises(InputError, match=f"cannot open .*{name}") as caught:
            segment(path, tmp_path / "out.zarr", model, mask=str(tmp_path / name))
        assert "\n" not in str(caught.value)
    bare = write(tmp_path / "bare.tif", VALUES, **PLACES["nothing"])
    with pytest.raises(InputError, match="no affine transform"):
        segment(bare, tmp_path / "out.zarr", model, mask=str(area(tmp_path / "area.gpkg")))
    assert not (tmp_path / "out.zarr").exists()


# ---- another resolution ----


def test_a_raster_is_read_at_the_models_resolution(tmp_path: Path) -> None:
    path = write(tmp_path / "in.tif", VALUES, mask=holes())
    model = pixel_model(resolution=3.1)
    labels, _ = segment(path, tmp_path / "out.zarr", model, resample=True)
    read = open_raster(path, resample_to=3.1)
    pixels = read.select(read.choice._replace(indices=(1, 2, 3))).open().read(Window.whole(read.info.shape))
    assert labels.shape == (round(97 * 2 / 3.1), round(131 * 2 / 3.1))
    np.testing.assert_array_equal(labels, pixel_labels(model, pixels.values, pixels.validity()))
    found = opened(tmp_path / "out.zarr")
    assert found.rio.transform().almost_equals(Affine(3.1, 0, GRID.c, 0, -3.1, GRID.f))
    assert found.rio.crs == rasterio.crs.CRS.from_string(UTM)


def test_resampling_needs_a_resolution_on_both_sides(tmp_path: Path) -> None:
    path = write(tmp_path / "in.tif", VALUES)
    with pytest.raises(UsageError, match="--resample needs a model that states its ground resolution"):
        segment(path, tmp_path / "out.zarr", pixel_model(), resample=True)
    bare = write(tmp_path / "bare.tif", VALUES, crs=None)
    with pytest.raises(InputError, match="no CRS and transform"):
        segment(bare, tmp_path / "out.zarr", pixel_model(resolution=3.1), resample=True)


def test_another_resolution_than_the_models_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "in.tif", VALUES)
    _, summary = segment(path, tmp_path / "out.zarr", pixel_model(resolution=30.0))
    assert any("pixels are 2 m, the model was trained at 30 m" in note for note in summary.notes)
