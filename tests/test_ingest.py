from __future__ import annotations

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import zarr
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasters import GRID, noise, real_data, write

from tilepipe.errors import InputError, ReadError, StoreError
from tilepipe.raster import ingest as module
from tilepipe.raster.info import RasterInfo
from tilepipe.raster.ingest import decode_factor, ingest, needs_staging, staged
from tilepipe.raster.source import open_raster
from tilepipe.window import Window

RGB = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]


def holes(shape):
    return np.where(np.random.default_rng(7).random(shape) < 0.3, 0, 255).astype("uint8")


def alpha(values):
    values[-1] = holes(values.shape[1:])
    return values


POINTS = [GroundControlPoint(0, 0, 10, 50), GroundControlPoint(0, 9, 11, 50), GroundControlPoint(9, 0, 10, 49)]
RASTERS = {
    "strips": (noise((3, 150, 130)), {"blockysize": 7, "interleave": "pixel"}),
    "tiles": (noise((3, 150, 130), "int16"), {"tiled": True, "blockxsize": 32, "blockysize": 16}),
    "odd tiles": (noise((1, 150, 130)), {"tiled": True, "blockxsize": 48, "blockysize": 80}),
    "tall strips": (noise((2, 150, 130)), {"blockysize": 100, "compress": "deflate"}),
    "jpeg": (noise((3, 150, 130)), {"driver": "JPEG", "crs": None, "transform": Affine.identity()}),
    "nodata": (noise((2, 60, 70)) // 32, {"nodata": 3, "descriptions": ["one", None]}),
    "float": (noise((2, 60, 70), "float64"), {"nodata": float("nan")}),
    "mask": (noise((3, 60, 70)), {"mask": holes((60, 70))}),
    "alpha": (alpha(noise((4, 60, 70))), {"interp": [*RGB, ColorInterp.alpha]}),
    "palette": (noise((1, 60, 70)), {"colormap": {i: (i, 0, 255 - i, 255) for i in range(256)}}),
    "no CRS": (noise((1, 60, 70)), {"crs": None, "transform": Affine.identity()}),
    "control points": (noise((1, 60, 70)), {"crs": "EPSG:4326", "transform": None, "gcps": POINTS}),
    "rotated": (noise((1, 60, 70)), {"transform": Affine.rotation(30) * GRID}),
    "one pixel": (noise((2, 1, 1)), {}),
}


def same(one, other, window):
    first, second = one.open().read(window), other.open().read(window)
    np.testing.assert_array_equal(first.values, second.values)
    assert first.values.dtype == second.values.dtype
    np.testing.assert_array_equal(first.validity(), second.validity())


def same_but_for_storage(one: RasterInfo, other: RasterInfo):
    storage = {"name": "", "block_shape": (0, 0), "interleaved": False, "driver": "", "compression": None}
    # repr: a NaN nodata is not equal to itself.
    assert repr(replace(one, **storage)) == repr(replace(other, **storage))


@pytest.mark.parametrize("name", RASTERS)
def test_a_staged_raster_reads_the_same(tmp_path, name):
    values, options = RASTERS[name]
    source = open_raster(write(tmp_path / "a.tif", values, **options))
    seen = []
    copy = ingest(source, tmp_path / "a.zarr", chunk=32, progress=lambda done, total: seen.append((done, total)))
    rows, cols = source.info.shape
    for other in (copy, open_raster(tmp_path / "a.zarr"), pickle.loads(pickle.dumps(copy))):
        same_but_for_storage(source.info, other.info)
        same(source, other, Window.of(-9, rows + 5, -40, cols + 3))
    assert seen[-1] == (rows * cols, rows * cols)
    assert os.listdir(tmp_path).count("a.zarr") == 1
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


@pytest.mark.parametrize("name", ["strips", "tiles", "odd tiles", "mask", "one pixel"])
def test_any_memory_and_chunk_gives_the_same(tmp_path, name):
    values, options = RASTERS[name]
    source = open_raster(write(tmp_path / "a.tif", values, **options))
    for i, (chunk, memory) in enumerate([(1024, 1 << 30), (32, 1), (64, 1 << 16), (23, 1 << 20)]):
        copy = ingest(source, tmp_path / f"{i}.zarr", chunk=chunk, memory=memory, workers=2)
        same(source, copy, Window.whole(source.info.shape))


def test_only_the_chosen_bands_and_alpha_are_staged(tmp_path):
    path = write(tmp_path / "a.tif", alpha(noise((4, 60, 70))), interp=[*RGB, ColorInterp.alpha])
    source = open_raster(path, bands=(3, 1))
    copy = ingest(source, tmp_path / "a.zarr")
    assert zarr.open_array(tmp_path / "a.zarr" / "image", mode="r").shape == (3, 60, 70)
    same(source, copy, Window.of(0, 70, 0, 70))
    # The alpha band has another number among fewer bands.
    same_but_for_storage(replace(source.info, alpha=3), copy.info)


def test_a_palette_is_expanded_after_staging(tmp_path):
    source = open_raster(write(tmp_path / "a.tif", *RASTERS["palette"][:1], **RASTERS["palette"][1]))
    from tilepipe.raster.bands import select_bands

    source = source.select(select_bands(source.info, ("red", "green", "blue")))
    same(source, ingest(source, tmp_path / "a.zarr"), Window.of(-3, 60, 0, 70))


def test_masks_of_single_bands_are_kept(tmp_path):
    flags = (np.random.default_rng(0).random((2, 40, 30)) < 0.5).astype("uint8") * 255
    write(tmp_path / "pixels.tif", noise((2, 40, 30)))
    write(tmp_path / "flags.tif", flags)

    def source_of(name, band):
        return (
            f'<SimpleSource><SourceFilename relativeToVRT="1">{name}</SourceFilename>'
            f"<SourceBand>{band}</SourceBand></SimpleSource>"
        )

    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}">{source_of("pixels.tif", band)}<MaskBand>'
        f'<VRTRasterBand dataType="Byte">{source_of("flags.tif", band)}</VRTRasterBand></MaskBand></VRTRasterBand>'
        for band in (1, 2)
    )
    (tmp_path / "a.vrt").write_text(f'<VRTDataset rasterXSize="30" rasterYSize="40">{bands}</VRTDataset>')
    source = open_raster(tmp_path / "a.vrt")
    assert source.info.stored_mask == "bands"
    whole = Window.whole((40, 30))
    np.testing.assert_array_equal(source.open().read(whole).validity(), (flags > 0).all(axis=0))
    copy = ingest(source, tmp_path / "a.zarr", chunk=16)
    same(source, copy, whole)
    for band in (1, 2):
        choice = type(source.choice)((band,))
        same(source.select(choice), copy.select(choice), whole)
        np.testing.assert_array_equal(copy.select(choice).open().read(whole).validity(), flags[band - 1] > 0)


def test_each_block_is_fetched_once(tmp_path, monkeypatch):
    for name in ("strips", "tiles", "odd tiles"):
        values, options = RASTERS[name]
        source = open_raster(write(tmp_path / "a.tif", values, **options))
        read = np.zeros(values.shape[1:], int)
        backend = type(source.recipe.backend())
        fetch = backend.fetch

        def counting(self, bands, window, out, fetch=fetch, read=read):
            read[window.rows.start : window.rows.stop, window.cols.start : window.cols.stop] += 1
            fetch(self, bands, window, out)

        monkeypatch.setattr(backend, "fetch", counting)
        ingest(source, tmp_path / f"{name}.zarr", chunk=32)
        monkeypatch.undo()
        assert (read == 1).all()


def test_a_copy_that_fails_leaves_nothing(tmp_path):
    path = write(
        tmp_path / "a.tif", noise((1, 64, 64)) // 4, tiled=True, blockxsize=32, blockysize=32, compress="deflate"
    )
    data = bytearray(path.read_bytes())
    data[-3000:-2900] = b"\xff" * 100
    path.write_bytes(data)
    with pytest.raises(ReadError, match=r"a\.tif"):
        ingest(open_raster(path), tmp_path / "a.zarr", chunk=32)
    assert os.listdir(tmp_path) == ["a.tif"]


def test_an_existing_copy_is_kept_unless_told(tmp_path):
    source = open_raster(write(tmp_path / "a.tif", noise((1, 20, 20))))
    ingest(source, tmp_path / "a.zarr")
    with pytest.raises(StoreError, match="exists"):
        ingest(source, tmp_path / "a.zarr")
    other = open_raster(write(tmp_path / "b.tif", noise((1, 20, 20), seed=9)))
    same(other, ingest(other, tmp_path / "a.zarr", overwrite=True), Window.whole((20, 20)))


def test_staged_reuses_what_an_interrupted_job_left(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", noise((1, 20, 20)))
    source = open_raster(path)
    target = tmp_path / "out.zarr.staged.zarr"

    def use_and_die():
        with staged(source, target) as copy:
            same(source, copy, Window.whole((20, 20)))
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        use_and_die()
    assert target.exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "ingest", None)
        with staged(source, target) as copy:
            same(source, copy, Window.whole((20, 20)))
    assert not target.exists()
    with pytest.raises(RuntimeError):
        use_and_die()
    changed = open_raster(write(path, noise((1, 20, 20), seed=9)))
    with staged(changed, target) as copy:
        same(changed, copy, Window.whole((20, 20)))


def info(block, shape=(40_000, 40_000), driver="GTiff"):
    return RasterInfo(
        "a", shape, ("uint8",) * 3, (None,) * 3, ("gray",) * 3, (None,) * 3, block_shape=block, driver=driver
    )


@pytest.mark.parametrize(
    ("raster", "staged"),
    [
        (info((512, 512)), False),
        (info((4096, 4096)), True),
        (info((1, 4000), (40_000, 4000)), False),
        (info((1, 400_000), (40_000, 400_000)), True),
        (info((40_000, 40_000)), True),
        (info((1, 40_000), driver="PNG"), True),
        (info((1, 4000), (4000, 4000), driver="JPEG"), False),
        (info((4000, 4000), (4000, 4000)), False),
        (info((20_000, 512)), True),
        (info((40_000, 40_000), driver="zarr"), False),
    ],
)
def test_what_needs_staging(raster, staged):
    reason = needs_staging(raster, (2048, 2048))
    assert (reason is not None) == staged
    assert reason is None or "\n" not in reason


@pytest.mark.parametrize(
    ("block", "window"), [((256, 256), (2048, 2048)), ((300, 70), (500, 64)), ((1000, 1000), (10, 1000))]
)
def test_decode_factor_is_what_counting_blocks_gives(block, window):
    shape = (3000, 3000)
    decoded = read = 0
    for top in range(0, shape[0], window[0]):
        for left in range(0, shape[1], window[1]):
            part = Window.of(top, top + window[0], left, left + window[1]).clip(shape)
            rows = -(-part.rows.stop // block[0]) - part.rows.start // block[0]
            cols = -(-part.cols.stop // block[1]) - part.cols.start // block[1]
            decoded += rows * cols * block[0] * block[1]
            read += part.area
    estimate = decode_factor(info(block, shape), window)
    # The estimate is of a window in the worst place, where windows and blocks do not line up.
    assert decoded / read <= estimate * 1.05 <= 3 * decoded / read


@pytest.mark.slow
def test_real_odd_rasters_staged(tmp_path):
    folder = real_data("robust")
    for path in sorted(folder.rglob("*")):
        try:
            source = open_raster(path)
            if source.info.shape[0] * source.info.shape[1] > 1e7:
                continue
            source.open().read(Window.whole(source.info.shape))
        except InputError:
            continue
        copy = ingest(source, tmp_path / path.name, chunk=128)
        same(source, copy, Window.of(-3, source.info.shape[0] + 2, 0, source.info.shape[1]))
        same_but_for_storage(source.info, copy.info)
