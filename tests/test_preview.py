"""`tilepipe preview` as a PNG: what each panel shows, pixel by pixel, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from commands import assert_one_line, make_files, run
from numpy.typing import NDArray
from PIL import Image
from rasters import real_data
from stores import CLASSES, Maps, block_maps, expected, make_spec, make_store, value_spec

from tilepipe.job import prepare
from tilepipe.options import SegmentOptions
from tilepipe.pictures.colors import NODATA_COLOR, colorize, confidence_palette, on_grey, stretched
from tilepipe.pictures.layout import HEADER, MARGIN, TITLE
from tilepipe.store.output import create_or_resume
from tilepipe.store.shards import encode_block


def panels(path: Path, size: tuple[int, int], step: int = 1) -> list[NDArray[np.uint8]]:
    """The panels, side by side, of (rows, columns) cells of `step` pixels a side."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    (rows, cols), top = (side * step for side in size), HEADER + TITLE
    found = []
    for left in range(MARGIN, pixels.shape[1] - MARGIN, cols + MARGIN):
        panel = pixels[top : top + rows, left : left + cols]
        np.testing.assert_array_equal(panel, panel[::step, ::step].repeat(step, 0).repeat(step, 1))
        found.append(panel[::step, ::step])
    return found


def test_labels_and_confidence_are_shown_in_their_colours(tmp_path: Path) -> None:
    whole = make_store(tmp_path / "o.zarr", make_spec(confidence=True))
    result = run("preview", tmp_path / "o.zarr", "--confidence", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["file"] == str(tmp_path / "o.png")
    assert (found["window"], found["size"]) == ("rows 0:50, columns 0:70", [600, 840])
    assert found["layers"] == ["labels", "confidence"]
    assert found["bytes"] == (tmp_path / "o.png").stat().st_size
    assert "--image" in found["notes"][0]
    labels, confidence = panels(tmp_path / "o.png", (50, 70), 12)
    np.testing.assert_array_equal(labels, colorize(whole["labels"], CLASSES))
    np.testing.assert_array_equal(confidence, confidence_palette()[whole["confidence"]])


def test_the_same_store_gives_the_same_bytes(tmp_path: Path) -> None:
    make_store(tmp_path / "o.zarr")
    for name in ("a.png", "b.png", "a.html", "b.html"):
        assert run("preview", tmp_path / "o.zarr", tmp_path / name, "-q").exit_code == 0
    for ending in ("png", "html"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.png", "b.html", "b.png", "o.zarr"]


def test_windows_and_sizes(tmp_path: Path) -> None:
    whole = make_store(tmp_path / "o.zarr")
    picture = tmp_path / "p.png"
    for words, shape, step, cells in (
        (["--window", "10:30,5:65"], (20, 60), 15, whole["labels"][10:30, 5:65]),
        (["--window", "500020,4999800,500100,4999900"], (10, 8), 90, whole["labels"][10:20, 2:10]),
        (["--size", "70"], (50, 70), 1, whole["labels"]),
        (["--size", "140"], (50, 70), 2, whole["labels"]),
    ):
        result = run("preview", tmp_path / "o.zarr", picture, *words, "--overwrite")
        assert result.exit_code == 0, result.output
        np.testing.assert_array_equal(panels(picture, shape, step)[0], colorize(cells, CLASSES))


def test_values_and_what_is_not_done(tmp_path: Path) -> None:
    spec = value_spec(outputs=("a", "b", "c", "d"))
    whole = expected(spec)["values"]
    with create_or_resume(tmp_path / "o.zarr", spec) as store:
        for index in ((0, 0), (1, 2)):
            store.write_block(index, block_maps(spec, {"values": whole}, index), {})
    result = run("preview", tmp_path / "o.zarr", "--size", "70")
    assert result.exit_code == 0, result.output
    assert "2 of 6 blocks are done; the others are shown as no data" in result.stderr
    shown = np.full_like(whole, np.nan)
    shown[:, :32, :32], shown[:, 32:, 64:] = whole[:, :32, :32], whole[:, 32:, 64:]
    np.testing.assert_array_equal(panels(tmp_path / "o.png", (50, 70))[0], on_grey(stretched(shown)))


def test_a_store_without_any_block_is_grey(tmp_path: Path) -> None:
    with create_or_resume(tmp_path / "o.zarr", make_spec(settings={"plans": []})):
        pass
    for name in ("o.png", "o.html"):
        assert run("preview", tmp_path / "o.zarr", tmp_path / name).exit_code == 0
    assert (panels(tmp_path / "o.png", (50, 70), 12)[0] == NODATA_COLOR).all()


def test_what_cannot_be_shown_is_said_in_one_line(tmp_path: Path) -> None:
    store = tmp_path / "o.zarr"
    make_store(store)
    (tmp_path / "there.png").write_text("mine")
    for words, code, said in (
        (["--confidence"], 2, "segment --confidence"),
        (["--size", "5"], 2, "64 to 4096"),
        (["--window", "60:70,0:5"], 2, "window 60:70,0:5 holds no pixel"),
        (["--image", "gone.tif"], 3, "gone.tif"),
        ([tmp_path / "p.jpg"], 2, ".png or .html or .htm"),
        ([tmp_path / "there.png"], 2, "--overwrite"),
        ([tmp_path / "no" / "p.png"], 2, "does not exist"),
    ):
        assert_one_line(run("preview", store, *words), code, said)
    assert_one_line(run("preview", tmp_path / "gone.zarr"), 3, "gone.zarr")
    assert (tmp_path / "there.png").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.zarr", "there.png"]


def test_a_job_without_georeference_finds_its_raster(tmp_path: Path) -> None:
    """By the path and the region that the store keeps."""
    files = make_files(tmp_path)
    with rasterio.open(files / "image.tif") as tif:
        pixels = tif.read()
    with rasterio.open(
        files / "image.tif", "w", driver="GTiff", height=150, width=170, count=3, dtype="uint8", photometric="rgb"
    ) as tif:
        tif.write(pixels)
    options = SegmentOptions(device="cpu", region="16:80,32:112")
    make_store(tmp_path / "o.zarr", prepare(files / "image.tif", files / "net.safetensors", options).spec())
    result = run("preview", tmp_path / "o.zarr", "--size", "240")
    assert result.exit_code == 0, result.output
    assert "note" not in result.stderr
    image, _ = panels(tmp_path / "o.png", (64, 80), 3)
    np.testing.assert_array_equal(image, np.moveaxis(pixels[:, 16:80, 32:112], 0, -1))
    alone = run("preview", tmp_path / "o.zarr", "--image", "none", "--overwrite", "--json")
    assert json.loads(alone.stdout)["layers"] == ["labels"]


def test_a_map_of_ten_gigapixels(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly all of it without data: what holds some is found by the records, and little of it is read."""
    spec = make_spec(shape=(100_000, 100_000), shard=(8192, 8192), chunk=(1024, 1024), shards=False)
    # Writing so many files that are not there would take a minute.
    monkeypatch.setattr(
        "tilepipe.store.output.encode_block",
        lambda array, index, values: encode_block(array, index, values) if index == (6, 5) else (),
    )
    block = np.full(spec.shard, spec.nodata, np.uint8)
    block[:2048, :3072] = 1
    with create_or_resume(memory_path / "o.zarr", spec) as store:
        for index in spec.blocks():
            if index == (6, 5):
                store.write_block(index, Maps(block), {})
            else:
                store.write_nodata(index, {})
    result = run("preview", memory_path / "o.zarr", "--json")
    assert result.exit_code == 0, result.output
    assert "tilepipe overviews" in json.loads(result.stdout)["notes"][1]
    shown = panels(memory_path / "o.png", (900, 900))[0]
    rows, cols = np.nonzero((shown != NODATA_COLOR).any(axis=-1))
    assert abs(rows.min() - 442.4) <= 2
    assert abs(rows.max() - 460.8) <= 2
    assert abs(cols.max() - 396.3) <= 2
    assert abs(cols.min() - 368.6) <= 2


@pytest.mark.slow
def test_a_real_raster_shows_beside_its_map(tmp_path: Path) -> None:
    raster = real_data("buildings") / "area2_1_rgb.tif"
    words = ["segment", raster, tmp_path / "o.zarr", "--region", "0:512,0:512", "--device", "cpu", "-q"]
    assert run(*words).exit_code == 0
    assert run("preview", tmp_path / "o.zarr", "--size", "512").exit_code == 0
    with rasterio.open(raster) as tif:
        pixels: Any = np.moveaxis(tif.read()[:, :512, :512], 0, -1)
    np.testing.assert_array_equal(panels(tmp_path / "o.png", (512, 512))[0], pixels)
