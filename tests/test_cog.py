"""Exported files are Cloud Optimized GeoTIFFs, whose overviews are those of all pixels."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import zarr
from numpy.typing import NDArray
from pyramids import mean, most_frequent
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rio_cogeo import cog_validate
from stores import CLASSES, OUTPUTS, TRANSFORM, make_spec, make_store, value_spec

from tilepipe.export import ExportOptions, export_geotiff
from tilepipe.overviews import make_overviews
from tilepipe.store.pyramid import Pyramid
from tilepipe.store.spec import LabelClass, StoreSpec

LARGE: dict[str, Any] = {"shape": (1101, 1301), "shard": (1024, 1024), "chunk": (512, 512)}


def assert_cloud_optimized(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        valid, errors, remarks = cog_validate(path, strict=True)
    assert (valid, errors, remarks) == (True, [], [])


def level(path: Path, number: int, band: int | None = 1) -> NDArray[Any]:
    with rasterio.open(path, overview_level=number - 1) as tif:
        assert tif.block_shapes[0] == (512, 512) or max(tif.shape) < 512
        return tif.read(band)


@pytest.mark.parametrize("compress", ["deflate", "none"])
def test_labels_have_overviews_by_majority(memory_path: Path, compress: Any) -> None:
    whole = make_store(memory_path / "o.zarr", make_spec(**LARGE))["labels"]
    path = export_geotiff(memory_path / "o.zarr", memory_path / "m.tif", ExportOptions(compress=compress))
    assert_cloud_optimized(path)
    with rasterio.open(path) as tif:
        np.testing.assert_array_equal(tif.read(1), whole)
        assert tif.overviews(1) == [2, 4]
        assert (tif.nodata, tif.crs, tuple(tif.transform)[:6]) == (255, CRS.from_epsg(32632), TRANSFORM)
        assert tif.colorinterp == (ColorInterp.palette,)
        assert [tif.colormap(1)[n][:3] for n in range(3)] == [c.color for c in CLASSES]
        assert tif.tags(1)["CLASS_2"] == "trees / shrubs"
    for number in (1, 2):
        np.testing.assert_array_equal(level(path, number), most_frequent(whole, 1 << number, 255))


def test_the_overviews_are_the_stores(memory_path: Path) -> None:
    make_store(memory_path / "o.zarr", make_spec(**LARGE, confidence=True))
    without = export_geotiff(memory_path / "o.zarr", memory_path / "a.tif").read_bytes()
    make_overviews(memory_path / "o.zarr")
    path = export_geotiff(memory_path / "o.zarr", memory_path / "b.tif")
    assert path.read_bytes() == without
    group = zarr.open_group(memory_path / "o.zarr", mode="r")
    conf = export_geotiff(memory_path / "o.zarr", memory_path / "c.tif", ExportOptions(array="confidence"))
    assert_cloud_optimized(conf)
    for number in (1, 2):
        np.testing.assert_array_equal(level(path, number), group[f"ovr_{1 << number}x/labels"][:])
        np.testing.assert_array_equal(level(conf, number), group[f"ovr_{1 << number}x/confidence"][:])


@pytest.mark.parametrize("compress", ["deflate", "none"])
def test_values_have_overviews_by_mean(memory_path: Path, compress: Any) -> None:
    spec = value_spec(**{**LARGE, "shape": (1101, 600)}, values="float16")
    whole = make_store(memory_path / "o.zarr", spec)["values"].astype(np.float32)
    path = export_geotiff(memory_path / "o.zarr", memory_path / "v.tif", ExportOptions(compress=compress))
    assert_cloud_optimized(path)
    with rasterio.open(path) as tif:
        np.testing.assert_array_equal(tif.read(), whole)
        assert tif.descriptions == OUTPUTS
        assert tif.overviews(2) == [2, 4]
    for number in (1, 2):
        wanted = np.stack([mean(layer, 1 << number, np.nan) for layer in whole])
        np.testing.assert_allclose(level(path, number, None), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(),
        make_spec(**LARGE, shards=False),
        make_spec(shape=(5, 1200), shard=(64, 1024), chunk=(64, 64)),
        make_spec(
            shape=(520, 300),
            shard=(512, 512),
            chunk=(256, 256),
            classes=[LabelClass(f"c{n}", (n % 256, 0, 0)) for n in range(300)],
        ),
        make_spec(**LARGE, transform=(8.0, 6.0, 500000.0, 6.0, -8.0, 5000000.0)),
        make_spec(**LARGE, transform=None, gcps=[(0, 0, 9.5, 47.5, 0), (0, 70, 9.6, 47.5, 0), (9, 0, 9.5, 47.4, 2)]),
    ],
)
def test_maps_of_all_kinds_are_valid(memory_path: Path, spec: StoreSpec) -> None:
    whole = make_store(memory_path / "o.zarr", spec)["labels"]
    path = export_geotiff(memory_path / "o.zarr", memory_path / "m.tif")
    assert_cloud_optimized(path)
    with rasterio.open(path) as tif:
        np.testing.assert_array_equal(tif.read(1), whole)
        levels = len(tif.overviews(1))
        assert len(tif.gcps[0]) == len(spec.gcps or ())
        assert tif.tags(1)["CLASS_1"] == spec.classes[1].name
    assert levels == Pyramid.of(spec).levels
    for number in range(1, levels + 1):
        np.testing.assert_array_equal(level(path, number), most_frequent(whole, 1 << number, spec.nodata))
    assert sorted(file.name for file in memory_path.iterdir()) == ["m.tif", "m.tif.aux.xml", "o.zarr"]


def test_a_map_of_several_squares(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels whose share of a square is less than a tile of the file are written in parts."""
    monkeypatch.setattr(Pyramid, "of", classmethod(lambda cls, spec: cls(spec, 3, 512, 512)))
    whole = make_store(memory_path / "o.zarr", make_spec(**LARGE))["labels"]
    path = export_geotiff(memory_path / "o.zarr", memory_path / "m.tif")
    assert_cloud_optimized(path)
    for number in (1, 2, 3):
        np.testing.assert_array_equal(level(path, number), most_frequent(whole, 1 << number, 255))


def test_no_overviews_without_cog(memory_path: Path) -> None:
    make_store(memory_path / "o.zarr", make_spec(**LARGE))
    path = export_geotiff(memory_path / "o.zarr", memory_path / "m.tif", ExportOptions(cog=False))
    with rasterio.open(path) as tif:
        assert tif.overviews(1) == []


def test_an_unfinished_map_has_overviews_of_what_is_done(memory_path: Path) -> None:
    spec = make_spec(**LARGE)
    whole = make_store(memory_path / "o.zarr", spec)["labels"]
    (memory_path / "o.zarr" / "labels/.tilepipe/0/1.json").unlink()
    path = export_geotiff(memory_path / "o.zarr", memory_path / "m.tif", ExportOptions(allow_partial=True))
    whole[:1024, 1024:] = 255
    np.testing.assert_array_equal(level(path, 2), most_frequent(whole, 4, 255))
