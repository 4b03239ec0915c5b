"""Rasters that are damaged, or that lie: one line that says so, and the labels of all that can be read."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import zarr
from affine import Affine
from commands import assert_one_line, run
from numpy.typing import NDArray
from rasters import GRID, noise, write
from runs import OPTIONS, pixel_labels, pixel_model, saved, segment, words

from tilepipe.errors import InputError, ReadError, TilepipeError
from tilepipe.pipeline import segment_raster
from tilepipe.raster.source import open_raster
from tilepipe.schedule import Stop
from tilepipe.store.output import open_store

SIZE = (128, 192)
VALUES = noise((3, *SIZE))
TILED = {"tiled": True, "blockxsize": 32, "blockysize": 32, "interleave": "pixel"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return saved(pixel_model(), tmp_path_factory.mktemp("model") / "net.safetensors")


def spoil(path: Path, col: int, row: int) -> bytes:
    """What the file held before the start of its tile (col, row) was overwritten."""
    with rasterio.open(path) as dataset:
        offset = int(dataset.get_tag_item(f"BLOCK_OFFSET_{col}_{row}", "TIFF", bidx=1))
    before = path.read_bytes()
    path.write_bytes(before[:offset] + b"\xff" * 200 + before[offset + 200 :])
    return before


# ---- damage ----


@pytest.mark.parametrize("compress", ["deflate", "zstd", "lzw"])
def test_a_damaged_block_costs_its_own_labels_only(tmp_path: Path, model: Path, compress: str) -> None:
    path = write(tmp_path / "in.tif", VALUES, compress=compress, **TILED)
    before, changed = spoil(path, 3, 1), path.stat()
    out = tmp_path / "out.zarr"
    for _ in range(2):  # the second run resumes, and tries the one block again
        result = run(*words(path, out, model=model))
        said = "1 of 6 blocks could not be read, the first: .*in.tif: cannot read rows 0:64, columns 64:128: "
        assert_one_line(result, 3, "5 finished blocks are kept")
        assert re.search(said, result.stderr)
    labels, expected = open_store(out).array()[:], pixel_labels(pixel_model(), VALUES)
    expected[:64, 64:128] = 255
    np.testing.assert_array_equal(labels, expected)
    path.write_bytes(before)
    assert_one_line(run(*words(path, out, model=model)), 3, "made by another job (raster[in.tif].mtime_ns: ")
    # Where size and time are those that were recorded, it is the same file, which can be read again.
    os.utime(path, ns=(changed.st_atime_ns, changed.st_mtime_ns))
    assert run(*words(path, out, model=model)).exit_code == 0
    np.testing.assert_array_equal(open_store(out).array()[:], pixel_labels(pixel_model(), VALUES))


@pytest.mark.parametrize("storage", [TILED, {"blockysize": 16, "interleave": "pixel"}], ids=["tiles", "strips"])
def test_of_a_truncated_file_the_rest_is_read(tmp_path: Path, storage: dict[str, Any]) -> None:
    path = write(tmp_path / "in.tif", VALUES, compress="deflate", **storage)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ReadError, match=r"3 of 6 blocks could not be read, the first: .*in\.tif: .* rows 64:128"):
        segment(path, tmp_path / "out.zarr", pixel_model())
    labels = open_store(tmp_path / "out.zarr").array()[:]
    np.testing.assert_array_equal(labels[:64], pixel_labels(pixel_model(), VALUES)[:64])
    assert (labels[64:] == 255).all()


def test_a_damaged_file_that_has_to_be_staged_names_file_and_window(tmp_path: Path) -> None:
    path = write(tmp_path / "in.tif", VALUES, compress="deflate", **TILED)
    spoil(path, 3, 1)
    with pytest.raises(ReadError, match=r"in\.tif: cannot read rows .*, columns .*: ") as caught:
        segment(path, tmp_path / "out.zarr", pixel_model(), stage="always")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.partial-*"))
    # Without staging, the blocks that can be read are.
    with pytest.raises(ReadError, match="1 of 6 blocks"):
        segment(path, tmp_path / "out.zarr", pixel_model(), stage="never")


def test_a_damaged_zarr_chunk_costs_its_own_labels_only(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "in.zarr", shape=VALUES.shape, dtype="u1", chunks=(3, 64, 64))
    array[...] = VALUES
    chunk = tmp_path / "in.zarr" / "c" / "0" / "1" / "0"
    chunk.write_bytes(b"\xff" * chunk.stat().st_size)
    with pytest.raises(ReadError, match=r"1 of 6 blocks .*in\.zarr: cannot read rows 64:128, columns 0:64: "):
        segment(tmp_path / "in.zarr", tmp_path / "out.zarr", pixel_model())
    expected = pixel_labels(pixel_model(), VALUES)
    expected[64:, :64] = 255
    np.testing.assert_array_equal(open_store(tmp_path / "out.zarr").array()[:], expected)


def test_a_file_that_goes_away_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "in.tif", VALUES, compress="deflate", **TILED)

    def remove(_: object) -> None:
        path.unlink(missing_ok=True)

    with pytest.raises(ReadError, match=r"6 of 6 blocks could not be read, the first: .*in\.tif: cannot read"):
        segment_raster(path, tmp_path / "out.zarr", pixel_model(), OPTIONS, progress=remove)


def mosaic(folder: Path, values: NDArray[Any]) -> list[Path]:
    """The values cut into four files."""
    folder.mkdir()
    side, found = values.shape[1] // 2, []
    for row, col in ((0, 0), (0, side), (side, 0), (side, side)):
        part = values[:, row : row + side, col : col + side]
        place = GRID * Affine.translation(col, row)
        found.append(write(folder / f"{row}_{col}.tif", part, transform=place, compress="deflate", **TILED))
    return found


QUARTERS = noise((1, 256, 256))


@pytest.mark.parametrize("how", ["damaged", "gone", "no raster"])
@pytest.mark.parametrize("through", ["files", "vrt"])
def test_a_broken_part_of_a_mosaic_costs_its_own_labels_only(tmp_path: Path, how: str, through: str) -> None:
    files = mosaic(tmp_path / "parts", QUARTERS)
    inputs: Any = files
    if through == "vrt":
        inputs = tmp_path / "in.vrt"
        inputs.write_text(open_raster(files).recipe.target)
    if how == "damaged":
        spoil(files[1], 0, 0)

    def spoil_later(_: object) -> None:
        if how == "gone":
            files[1].unlink(missing_ok=True)
        elif how == "no raster":
            files[1].write_text("no raster")

    options = replace(OPTIONS, threads=4, stage="never")
    model, lost = pixel_model(1), 1 if how == "damaged" else 4
    with pytest.raises(ReadError, match=f"^{lost} of 16 blocks could not be read, the first: .*cannot read"):
        segment_raster(inputs, tmp_path / "out.zarr", model, options, progress=spoil_later)
    expected = pixel_labels(model, QUARTERS)
    size = 64 if how == "damaged" else 128
    expected[:size, 128 : 128 + size] = 255
    np.testing.assert_array_equal(open_store(tmp_path / "out.zarr").array()[:], expected)


def test_a_part_that_goes_behind_two_vrts_leaves_no_wrong_label(tmp_path: Path) -> None:
    """GDAL tells of it once only, whatever is closed: what it reads of this raster afterwards is not trusted."""
    files = mosaic(tmp_path / "parts", QUARTERS)
    inner, outer = tmp_path / "inner.vrt", tmp_path / "in.vrt"
    inner.write_text(open_raster(files).recipe.target)
    outer.write_text(
        '<VRTDataset rasterXSize="256" rasterYSize="256"><GeoTransform>5, 1, 0, 7, 0, -1</GeoTransform>'
        f'<VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename>{inner}</SourceFilename>'
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )

    def spoil_later(_: object) -> None:
        files[1].unlink(missing_ok=True)

    options, model = replace(OPTIONS, threads=4, stage="never"), pixel_model(1)
    with pytest.raises(ReadError, match=r"^\d+ of 16 blocks could not be read, the first: .*cannot read"):
        segment_raster(outer, tmp_path / "out.zarr", model, options, progress=spoil_later)
    labels, expected = open_store(tmp_path / "out.zarr").array()[:], pixel_labels(model, QUARTERS)
    assert ((labels == expected) | (labels == 255)).all()
    assert (labels[:128, 128:] == 255).all()


def test_a_broken_part_is_told_of_in_large_windows_too(tmp_path: Path) -> None:
    # GDAL reads mosaics by threads of its own from a million pixels on.
    files = mosaic(tmp_path / "parts", noise((1, 1200, 1200)))
    spoil(files[1], 0, 0)
    with pytest.raises(ReadError, match=r"^1 of 1 blocks could not be read, the first: .*cannot read"):
        segment(files, tmp_path / "out.zarr", pixel_model(1), tile=None, block=None)


# ---- dimensions that lie ----


def lie(path: Path, **tags: int) -> Path:
    """The TIFF with other values of some tags."""
    numbers = {"width": 256, "height": 257, "bands": 277, "strip": 278, "tile_width": 322, "tile_height": 323}
    wanted = {numbers[name]: value for name, value in tags.items()}
    data = bytearray(path.read_bytes())
    assert data[:4] == b"II*\0"
    start = struct.unpack_from("<I", data, 4)[0]
    for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        tag = struct.unpack_from("<H", data, entry)[0]
        if tag in wanted:
            struct.pack_into("<HHII", data, entry, tag, 4, 1, wanted.pop(tag))
    assert not wanted
    path.write_bytes(data)
    return path


@contextlib.contextmanager
def little_memory(most: int = 400 << 20) -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < most, f"{grown >> 20} MiB"


LIES = {
    "rows": (TILED, {"height": 2**31 - 1}),
    "columns": (TILED, {"width": 2**31 - 1}),
    "rows and columns": (TILED, {"height": 1_000_000, "width": 1_000_000}),
    "more than GDAL can": (TILED, {"height": 2**32 - 1}),
    "tiles": (TILED, {"tile_width": 1 << 20, "tile_height": 1 << 20}),
    "bands": (TILED, {"bands": 60_000}),
    "strips": ({"blockysize": 16}, {"height": 2_000_000_000, "strip": 2_000_000_000}),
    "wide strips": ({"blockysize": 16}, {"width": 2_000_000_000}),
    "many strips": ({"blockysize": 1}, {"height": 2_000_000_000}),
}


@pytest.mark.parametrize("kind", LIES)
def test_dimensions_that_lie_end_in_one_line(tmp_path: Path, monkeypatch, kind: str) -> None:
    monkeypatch.setattr("tilepipe.pipeline.HOPELESS", 50)
    storage, tags = LIES[kind]
    path = lie(write(tmp_path / "in.tif", VALUES, compress="deflate", **storage), **tags)
    with little_memory(), pytest.raises(InputError, match=r"in\.tif") as caught:
        segment(path, tmp_path / "out.zarr", pixel_model(), tile=None, block=None)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_raster_of_nothing_is_not_tried_to_the_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tilepipe.pipeline.HOPELESS", 50)
    text = (
        '<VRTDataset rasterXSize="2000000" rasterYSize="2000000"><VRTRasterBand dataType="Byte" band="1">'
        "<SimpleSource><SourceFilename>gone.tif</SourceFilename><SourceBand>1</SourceBand>"
        '<SourceProperties RasterXSize="2000000" RasterYSize="2000000" DataType="Byte" BlockXSize="512" '
        'BlockYSize="512"/></SimpleSource></VRTRasterBand></VRTDataset>'
    )
    (tmp_path / "in.vrt").write_text(text)
    with little_memory(), pytest.raises(ReadError, match="none of the first 50 of 976562500 blocks could be read"):
        segment(tmp_path / "in.vrt", tmp_path / "out.zarr", pixel_model(1), stage="never")


def test_a_part_of_an_immense_raster_costs_what_the_part_costs(tmp_path: Path) -> None:
    source = write(tmp_path / "in.tif", VALUES[:1])
    text = (
        '<VRTDataset rasterXSize="2147483647" rasterYSize="2147483647"><VRTRasterBand dataType="Byte" band="1">'
        f"<SimpleSource><SourceFilename>{source}</SourceFilename><SourceBand>1</SourceBand>"
        '<SrcRect xOff="0" yOff="0" xSize="192" ySize="128"/>'
        '<DstRect xOff="2000000000" yOff="1000000000" xSize="192" ySize="128"/>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )
    (tmp_path / "in.vrt").write_text(text)
    region = "1000000000:1000000128,2000000000:2000000192"
    with little_memory():
        labels, _ = segment(tmp_path / "in.vrt", tmp_path / "part.zarr", pixel_model(1), region=region)
    np.testing.assert_array_equal(labels, pixel_labels(pixel_model(1), VALUES[:1]))
    stop = Stop()

    def soon(progress: Any) -> None:
        stop.asked = progress.done > 2

    with little_memory(), pytest.raises(TilepipeError, match=r"stopped after [3-9] of 1125899906842624 blocks"):
        segment_raster(
            tmp_path / "in.vrt",
            tmp_path / "out.zarr",
            pixel_model(1),
            replace(OPTIONS, stage="never"),
            progress=soon,
            stop=stop,
        )
