"""Rasters that cannot be opened or read: one line that names them."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from rasters import noise, write

from tilepipe.errors import InputError, ReadError, TilepipeError
from tilepipe.raster.source import open_raster
from tilepipe.window import Window


@pytest.mark.parametrize("given", ["no.tif", "no*.tif", [], "."])
def test_inputs_that_are_not_there(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TilepipeError) as caught:
        open_raster(given)
    assert "\n" not in str(caught.value)


def test_complex_pixels_are_refused(tmp_path):
    path = write(tmp_path / "a.tif", np.ones((1, 4, 4), "complex64"))
    with pytest.raises(InputError, match=r"a\.tif holds complex64 pixels"):
        open_raster(path)


def test_containers_name_their_subdatasets(tmp_path):
    for table in ("one", "two"):
        append = {"APPEND_SUBDATASET": "YES"} if table == "two" else {}
        write(tmp_path / "a.gpkg", noise((3, 20, 20)), driver="GPKG", crs="EPSG:3857", RASTER_TABLE=table, **append)
    with pytest.raises(InputError, match=r"no raster band; name one of its subdatasets: GPKG:.*one, GPKG:.*two"):
        open_raster(tmp_path / "a.gpkg")


def test_blocks_too_large_to_decode_are_refused_by_name(tmp_path):
    path = write(tmp_path / "a.tif", noise((3, 64, 64)), compress="deflate", blockysize=64, interleave="pixel")
    open_raster(path, block_limit=3 * 64 * 64)
    with pytest.raises(InputError, match=r"a\.tif is stored in blocks of 64 x 64"):
        open_raster(path, block_limit=3 * 64 * 64 - 1)


@pytest.mark.parametrize("compress", ["deflate", "lzw", "zstd"])
def test_a_damaged_block_names_file_and_window(tmp_path, compress):
    path = write(tmp_path / "a.tif", noise((1, 64, 64)), tiled=True, blockxsize=32, blockysize=32, compress=compress)
    with rasterio.open(path) as dataset:
        offset = int(dataset.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", bidx=1))
    data = bytearray(path.read_bytes())
    data[offset : offset + 100] = b"\xff" * 100
    path.write_bytes(data)
    reader = open_raster(path).open()
    reader.read(Window.of(0, 32, 0, 32))
    with pytest.raises(ReadError, match=r"a\.tif: cannot read rows 32:64, columns 32:64: .+") as caught:
        reader.read(Window.of(32, 64, 32, 64))
    assert "\n" not in str(caught.value)
    reader.read(Window.of(0, 32, 0, 32))


def test_a_truncated_jpeg_is_not_grey(tmp_path):
    path = write(tmp_path / "a.jpg", noise((3, 200, 200)), driver="JPEG", crs=None, transform=None)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ReadError, match=r"a\.jpg"):
        open_raster(path).open().read(Window.whole((200, 200)))
