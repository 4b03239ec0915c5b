"""What is damaged, lies, or cannot be written: one line that says so, and nothing that was finished is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import zarr
from affine import Affine
from commands import assert_one_line, forget_variables, run
from numpy.typing import NDArray
from rasters import GRID, noise, write
from runs import OPTIONS, pixel_labels, pixel_model, saved, segment

from tilepipe.errors import InputError, ReadError, RunError, StoreError, TilepipeError
from tilepipe.pipeline import segment_raster
from tilepipe.raster.ingest import ingest
from tilepipe.raster.source import open_raster
from tilepipe.schedule import Stop
from tilepipe.store.durable import LocalFiles
from tilepipe.store.output import open_store

SIZE = (128, 192)
VALUES = noise((3, *SIZE))
TILED = {"tiled": True, "blockxsize": 32, "blockysize": 32, "interleave": "pixel"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch) -> None:
    forget_variables(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return saved(pixel_model(), tmp_path_factory.mktemp("model") / "net.safetensors")


SMALL = ("--tile", "64", "--block", "64")


def words(*paths: Path | str, model: Path) -> tuple[str | Path, ...]:
    return ("segment", *paths, "--model", model, "--device", "cpu", "--precision", "float64", *SMALL, "-q")


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


# ---- models ----


def no_card(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros((3, 3), "float32")}, path)


MODELS: dict[str, Callable[[Path], object]] = {
    "nothing.safetensors": lambda path: None,
    "empty.safetensors": lambda path: path.touch(),
    "text.safetensors": lambda path: path.write_text("weights"),
    "folder.safetensors": lambda path: path.mkdir(),
    "no card.safetensors": no_card,
    "raster.tif": lambda path: write(path, VALUES),
    "pickle.pt": lambda path: path.write_bytes(b"\x80\x04N."),
    "program.pt2": lambda path: path.write_bytes(b"PK\x03\x04"),
    "no.module:factory": lambda path: None,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_none(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    MODELS[name](path)
    raster = write(tmp_path / "in.tif", VALUES)
    given = name if ":" in name else path
    result = run(*words(raster, tmp_path / "out.zarr", model=given))
    assert_one_line(result, 3, name)
    assert not (tmp_path / "out.zarr").exists()


def test_a_truncated_model(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "net.safetensors"
    broken.write_bytes(model.read_bytes()[:-10])
    raster = write(tmp_path / "in.tif", VALUES)
    assert_one_line(run(*words(raster, tmp_path / "out.zarr", model=broken)), 3, "net.safetensors")


# ---- outputs ----


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def a_folder(out: Path, raster: Path) -> None:
    (out / "thesis").mkdir(parents=True)
    (out / "thesis" / "chapter.txt").write_text("the only copy")


def a_zarr_group(out: Path, raster: Path) -> None:
    zarr.create_group(out).create_array("labels", shape=(9, 9), dtype="u1")[...] = 3


def an_ingested_raster(out: Path, raster: Path) -> None:
    ingest(open_raster(raster), out)


@pytest.mark.parametrize("make", [a_folder, a_zarr_group, an_ingested_raster])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_something_else_is_left_alone(
    tmp_path: Path, model: Path, make: Callable[[Path, Path], None], overwrite: bool
) -> None:
    raster, out = write(tmp_path / "in.tif", VALUES), tmp_path / "out.zarr"
    make(out, raster)
    before = contents(out)
    more = ["--overwrite"] if overwrite else []
    assert_one_line(run(*words(raster, out, model=model), *more), 3, "out.zarr", "choose another output path")
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tif", "out.zarr"]


def test_the_input_is_never_the_output(tmp_path: Path, model: Path) -> None:
    ingest(open_raster(write(tmp_path / "in.tif", VALUES)), tmp_path / "in.zarr")
    before = contents(tmp_path)
    assert_one_line(run(*words(tmp_path / "in.zarr", tmp_path / "in.zarr", model=model), "--overwrite"), 2, "in.zarr")
    assert contents(tmp_path) == before


def test_labels_are_a_raster_but_not_to_be_written_over_while_they_are_read(tmp_path: Path) -> None:
    raster = write(tmp_path / "in.tif", VALUES)
    labels, _ = segment(raster, tmp_path / "one.zarr", pixel_model())
    model = pixel_model(1)
    again, _ = segment(tmp_path / "one.zarr", tmp_path / "two.zarr", model)
    np.testing.assert_array_equal(again, pixel_labels(model, labels[None]))
    with pytest.raises(TilepipeError, match=r"one\.zarr/labels is read by this job"):
        segment(tmp_path / "one.zarr", tmp_path / "one.zarr", model, overwrite=True)
    np.testing.assert_array_equal(open_store(tmp_path / "one.zarr").array()[:], labels)


def test_an_output_where_nothing_can_be(tmp_path: Path, model: Path) -> None:
    raster = write(tmp_path / "in.tif", VALUES)
    assert_one_line(run(*words(raster, raster / "out.zarr", model=model)), 3, "Not a directory", "written to")
    (tmp_path / "file.zarr").write_text("a file")
    assert_one_line(run(*words(raster, tmp_path / "file.zarr", model=model)), 2, "would be a file")
    with pytest.raises(StoreError, match="Not a directory"):
        segment(raster, tmp_path / "file.zarr", pixel_model())
    assert (tmp_path / "file.zarr").read_text() == "a file"


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Callable[[str], None]]:
    """A file system in memory at `folder`, and how to change its options; a skip where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here; run as root")
    try:
        yield lambda text: subprocess.run(["mount", "-o", f"remount,{text}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_an_output_on_a_read_only_file_system(tmp_path: Path, model: Path) -> None:
    raster = write(tmp_path / "in.tif", VALUES)
    with mounted(tmp_path / "disk", "size=1m", "ro"):
        result = run(*words(raster, tmp_path / "disk" / "out.zarr", model=model))
    assert_one_line(result, 3, "Read-only file system", "out.zarr")


LARGE = noise((3, 512, 512))


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, model: Path) -> None:
    raster = write(tmp_path / "in.tif", LARGE)
    with mounted(tmp_path / "disk", "size=300k") as remount:
        command = words(raster, tmp_path / "disk" / "out.zarr", model=model)
        result = run(*command)
        assert_one_line(result, 1, "No space left on device", "free some space", "finished blocks are kept")
        done = len(open_store(tmp_path / "disk" / "out.zarr").done())
        assert 0 < done < 64
        remount("size=4m")
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert f"{done} of them done before" in result.output
        labels = open_store(tmp_path / "disk" / "out.zarr").array()[:]
        assert list(open_store(tmp_path / "disk" / "out.zarr").verify()) == []
    np.testing.assert_array_equal(labels, pixel_labels(pixel_model(), LARGE))


def full_after(monkeypatch, writes: int) -> None:
    """Let the disk be full after so many files."""
    left = [writes]
    make = LocalFiles._temporary

    def temporary(files: LocalFiles, data: bytes) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return make(files, data)

    monkeypatch.setattr(LocalFiles, "_temporary", temporary)


@pytest.mark.parametrize("writes", [0, 1, 3, 7, 14, 15])
def test_a_disk_that_fills_at_any_write_keeps_what_is_finished(tmp_path: Path, monkeypatch, writes: int) -> None:
    raster, out = write(tmp_path / "in.tif", VALUES), tmp_path / "out.zarr"
    with monkeypatch.context() as patch:
        full_after(patch, writes)
        with pytest.raises(RunError, match="No space left on device; free some space") as caught:
            segment(raster, out, pixel_model())
        assert caught.value.exit_code == 1
    labels, summary = segment(raster, out, pixel_model())
    np.testing.assert_array_equal(labels, pixel_labels(pixel_model(), VALUES))
    assert summary.resumed + summary.computed == 6
    assert list(open_store(out).verify()) == []


def test_a_disk_that_fills_while_staging(tmp_path: Path) -> None:
    raster = write(tmp_path / "in.tif", LARGE)
    with mounted(tmp_path / "disk", "size=300k") as remount:
        out = tmp_path / "disk" / "out.zarr"
        with pytest.raises(RunError, match=r"cannot stage .*in\.tif.*No space left on device; free some space"):
            segment(raster, out, pixel_model(), stage="always")
        assert not list((tmp_path / "disk").glob("*.partial-*"))
        remount("size=8m")
        labels: NDArray[Any] = segment(raster, out, pixel_model(), stage="always")[0]
    np.testing.assert_array_equal(labels, pixel_labels(pixel_model(), LARGE))
