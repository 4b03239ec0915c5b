from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from stores import CLASSES, OUTPUTS, STATE, TRANSFORM, block_maps, expected, make_spec, make_store, value_spec

import tilepipe.export as exporting
from tilepipe.errors import RunError, StoreError, UsageError
from tilepipe.export import ExportOptions, export_geotiff
from tilepipe.store.output import create_or_resume
from tilepipe.store.pyramid import Pyramid
from tilepipe.store.spec import LabelClass


@pytest.mark.parametrize("cog", [False, True])
@pytest.mark.parametrize("compress", ["deflate", "zstd", "lzw", "none"])
def test_the_geotiff_is_the_store(tmp_path: Path, compress: Any, cog: bool) -> None:
    whole = make_store(tmp_path / "o.zarr")
    target = tmp_path / "map.tif"
    assert export_geotiff(tmp_path / "o.zarr", target, ExportOptions(compress=compress, cog=cog)) == target
    with rasterio.open(target) as tif:
        np.testing.assert_array_equal(tif.read(1), whole["labels"])
        assert tif.dtypes == ("uint8",)
        assert tif.nodata == 255
        assert tif.crs == CRS.from_epsg(32632)
        assert tuple(tif.transform)[:6] == TRANSFORM
        assert tif.block_shapes == [(512, 512)]
        assert tif.compression is None if compress == "none" else tif.compression.value.lower() == compress
        assert tif.colorinterp == (ColorInterp.palette,)
        assert [tif.colormap(1)[n][:3] for n in range(3)] == [c.color for c in CLASSES]
        assert tif.colormap(1)[255][3] == 0
        assert {key: value for key, value in tif.tags(1).items() if key.startswith("CLASS_")} == {
            f"CLASS_{n}": c.name for n, c in enumerate(CLASSES)
        }
        assert (tif.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG") == cog
    assert sorted(os.listdir(tmp_path)) == ["map.tif", "map.tif.aux.xml", "o.zarr"]


def test_gdal_knows_the_classes_names(tmp_path: Path) -> None:
    names = ["roads & <rails>", "Wälder", "c"]
    make_store(tmp_path / "o.zarr", make_spec(classes=[LabelClass(n, (1, 2, 3)) for n in names]))
    export_geotiff(tmp_path / "o.zarr", tmp_path / "map.tif")
    rasterio.shutil.copy(tmp_path / "map.tif", tmp_path / "map.vrt", driver="VRT")
    text = (tmp_path / "map.vrt").read_text()
    assert "<Category>roads &amp; &lt;rails&gt;</Category>" in text
    assert "<Category>Wälder</Category>" in text


@pytest.mark.parametrize("shard", [(512, 512), (600, 400), (1024, 512), (200, 1400)])
def test_blocks_that_are_not_tiles_are_joined(tmp_path: Path, shard: tuple[int, int]) -> None:
    chunk = (shard[0] // 4, shard[1] // 4)
    whole = make_store(tmp_path / "o.zarr", make_spec(shape=(1300, 1100), shard=shard, chunk=chunk))
    seen: list[tuple[int, int]] = []
    export_geotiff(tmp_path / "o.zarr", tmp_path / "map.tif", progress=lambda n, total: seen.append((n, total)))
    with rasterio.open(tmp_path / "map.tif") as tif:
        np.testing.assert_array_equal(tif.read(1), whole["labels"])
    assert seen[-1] == (1300 * 1100, 1300 * 1100)
    assert sorted(seen) == seen


def test_many_classes_are_sixteen_bits(tmp_path: Path) -> None:
    spec = make_spec(classes=[LabelClass(f"c{n}", (n % 256, 0, 0)) for n in range(300)])
    whole = make_store(tmp_path / "o.zarr", spec)
    export_geotiff(tmp_path / "o.zarr", tmp_path / "map.tif", ExportOptions(compress="zstd"))
    with rasterio.open(tmp_path / "map.tif") as tif:
        np.testing.assert_array_equal(tif.read(1), whole["labels"])
        assert tif.dtypes == ("uint16",)
        assert tif.nodata == 65535
        assert tif.tags(1)["CLASS_299"] == "c299"


def test_confidence_is_exported_on_request(tmp_path: Path) -> None:
    whole = make_store(tmp_path / "o.zarr", make_spec(confidence=True))
    export_geotiff(tmp_path / "o.zarr", tmp_path / "c.tif", ExportOptions(array="confidence", cog=True))
    with rasterio.open(tmp_path / "c.tif") as tif:
        np.testing.assert_array_equal(tif.read(1), whole["confidence"])
        assert tif.colorinterp == (ColorInterp.gray,)
    assert not (tmp_path / "c.tif.aux.xml").exists()
    make_store(tmp_path / "p.zarr")
    with pytest.raises(UsageError, match="no array 'confidence'"):
        export_geotiff(tmp_path / "p.zarr", tmp_path / "d.tif", ExportOptions(array="confidence"))


@pytest.mark.parametrize("cog", [False, True])
@pytest.mark.parametrize("compress", ["deflate", "zstd", "lzw", "none"])
def test_values_are_a_band_for_each_channel(tmp_path: Path, compress: Any, cog: bool) -> None:
    kept: Any = "float16" if cog else "float32"
    spec = value_spec(shape=(700, 600), shard=(128, 256), chunk=(64, 64), values=kept)
    whole = make_store(tmp_path / "o.zarr", spec)["values"]
    seen: list[tuple[int, int]] = []
    options = ExportOptions(compress=compress, cog=cog)
    export_geotiff(tmp_path / "o.zarr", tmp_path / "v.tif", options, lambda *pair: seen.append(pair))
    with rasterio.open(tmp_path / "v.tif") as tif:
        np.testing.assert_array_equal(tif.read(), whole.astype(np.float32))
        assert tif.dtypes == ("float32", "float32")
        assert np.isnan(tif.nodata)
        assert tif.descriptions == OUTPUTS
        assert tif.crs == CRS.from_epsg(32632)
        assert tuple(tif.transform)[:6] == TRANSFORM
        assert tif.block_shapes == [(512, 512)] * 2
        assert (tif.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG") == cog
        assert bool(tif.overviews(1)) == cog
    assert seen[-1] == (700 * 600, 700 * 600)
    assert sorted(os.listdir(tmp_path)) == ["o.zarr", "v.tif"]


def test_values_without_data_are_written_and_found(tmp_path: Path) -> None:
    spec = value_spec(shape=(600, 1100), shard=(128, 512), chunk=(128, 128))
    with create_or_resume(tmp_path / "o.zarr", spec) as store:
        for index in spec.blocks():
            store.write_nodata(index, {})
    export_geotiff(tmp_path / "o.zarr", tmp_path / "v.tif")
    with rasterio.open(tmp_path / "v.tif") as tif:
        assert np.isnan(tif.read()).all()


def test_unfinished_values_are_blank_where_blocks_lack(tmp_path: Path) -> None:
    spec = value_spec()
    whole = expected(spec)
    with create_or_resume(tmp_path / "o.zarr", spec) as store:
        for index in spec.blocks():
            store.write_block(index, block_maps(spec, whole, index), {})
        store.forget((1, 0))
    with pytest.raises(StoreError, match="5 of 6 blocks"):
        export_geotiff(tmp_path / "o.zarr", tmp_path / "v.tif")
    export_geotiff(tmp_path / "o.zarr", tmp_path / "v.tif", ExportOptions(allow_partial=True))
    whole["values"][:, 32:, :32] = np.nan
    with rasterio.open(tmp_path / "v.tif") as tif:
        np.testing.assert_array_equal(tif.read(), whole["values"])


@pytest.mark.parametrize("array", ["labels", "confidence"])
def test_values_have_no_labels_to_export(tmp_path: Path, array: Any) -> None:
    make_store(tmp_path / "o.zarr", value_spec())
    with pytest.raises(UsageError, match=f"has no array '{array}' to export; it has values"):
        export_geotiff(tmp_path / "o.zarr", tmp_path / "v.tif", ExportOptions(array=array))
    make_store(tmp_path / "l.zarr")
    with pytest.raises(UsageError, match="has no array 'values' to export; it has labels"):
        export_geotiff(tmp_path / "l.zarr", tmp_path / "v.tif", ExportOptions(array="values"))


def test_control_points_take_the_transforms_place(tmp_path: Path) -> None:
    points = [(0.0, 0.0, 9.5, 47.5, 0.0), (0.0, 70.0, 9.6, 47.5, 0.0), (50.0, 0.0, 9.5, 47.4, 2.0)]
    spec = make_spec(transform=None, gcps=points, crs_wkt=CRS.from_epsg(4326).to_wkt())
    make_store(tmp_path / "o.zarr", spec)
    export_geotiff(tmp_path / "o.zarr", tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as tif:
        found, crs = tif.gcps
    assert [(p.row, p.col, p.x, p.y, p.z) for p in found] == points
    assert crs.to_epsg() == 4326


def test_an_unfinished_store_is_refused_or_blank_where_blocks_lack(tmp_path: Path) -> None:
    spec = make_spec()
    whole = make_store(tmp_path / "o.zarr", spec)
    # A shard without a record proves nothing: its pixels may be another run's.
    (tmp_path / "o.zarr" / STATE / "1" / "0.json").unlink()
    with pytest.raises(StoreError, match="5 of 6 blocks"):
        export_geotiff(tmp_path / "o.zarr", tmp_path / "map.tif")
    assert not (tmp_path / "map.tif").exists()
    export_geotiff(tmp_path / "o.zarr", tmp_path / "map.tif", ExportOptions(allow_partial=True))
    wanted = whole["labels"].copy()
    wanted[32:, :32] = 255
    with rasterio.open(tmp_path / "map.tif") as tif:
        np.testing.assert_array_equal(tif.read(1), wanted)


def test_what_exists_is_replaced_only_when_told(tmp_path: Path) -> None:
    make_store(tmp_path / "o.zarr")
    target = tmp_path / "map.tif"
    target.write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        export_geotiff(tmp_path / "o.zarr", target)
    assert target.read_text() == "precious"
    export_geotiff(tmp_path / "o.zarr", target, ExportOptions(overwrite=True))
    with rasterio.open(target) as tif:
        assert tif.shape == (50, 70)
    with pytest.raises(UsageError, match="exists"):
        export_geotiff(tmp_path / "o.zarr", tmp_path / "o.zarr", ExportOptions(overwrite=True))


def test_a_failed_export_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "o.zarr")
    target = tmp_path / "map.tif"
    target.write_text("precious")

    def fail(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left") as caught:
        export_geotiff(tmp_path / "o.zarr", target, ExportOptions(overwrite=True), fail)
    assert str(target) in str(caught.value)
    assert target.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["map.tif", "o.zarr"]
    with pytest.raises(RunError):
        export_geotiff(tmp_path / "o.zarr", tmp_path / "nowhere" / "map.tif")


def test_options_and_stores_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a tilepipe store"):
        export_geotiff(tmp_path / "o.zarr", tmp_path / "map.tif")
    with pytest.raises(UsageError, match="zstd"):
        export_geotiff(tmp_path / "o.zarr", tmp_path / "map.tif", ExportOptions(compress="jpeg"))  # type: ignore[arg-type]


def test_a_disk_that_is_full_when_gdal_closes_the_file_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "o.zarr", make_spec(shape=(700, 700), shard=(512, 512), chunk=(256, 256)))
    checksums = exporting._checksums

    def torn(path: Path, pyramid: Pyramid) -> list[int]:
        with path.open("rb+") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\0" * 4096)
        return checksums(path, pyramid)

    monkeypatch.setattr(exporting, "_checksums", torn)
    with pytest.raises(RunError, match=r"map\.tif"):
        export_geotiff(tmp_path / "o.zarr", tmp_path / "map.tif")
    assert os.listdir(tmp_path) == ["o.zarr"]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_store_without_georeference_is_exported(tmp_path: Path) -> None:
    spec = make_spec(crs_wkt=None, transform=None)
    whole = expected(spec)
    with create_or_resume(tmp_path / "o.zarr", spec) as store:
        for index in spec.blocks():
            store.write_block(index, block_maps(spec, whole, index), {})
    export_geotiff(tmp_path / "o.zarr", tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as tif:
        assert tif.crs is None
        np.testing.assert_array_equal(tif.read(1), whole["labels"])
