"""Odd real rasters through the whole path: the network sees what rasterio reads, or one line says why not."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
from commands import assert_one_line, run
from rasterio.enums import ColorInterp
from rasters import real_data
from runs import Seen, pixel_labels, pixel_model, saved, segment

from tilepipe.store.output import open_store

LARGE = 4_000_000
"""Pixels from which on a raster is left to the slow tests."""


def rows() -> list[dict[str, str] | None]:
    try:
        with open(Path(os.environ["TILEPIPE_TEST_DATA"], "robust", "manifest.csv"), newline="") as file:
            return list(csv.DictReader(file))
    except (KeyError, OSError):
        return [None]


def readable(row: dict[str, str]) -> bool:
    return row["read"].startswith("ok") and "complex" not in row["dtype"]


def cases(want: bool) -> list[object]:
    found: list[object] = []
    for row in rows():
        if row is None:
            return [pytest.param(None, id="absent")]
        if readable(row) != want:
            continue
        width, _, height = row["size"].partition("x")
        slow = want and int(width) * int(height) > LARGE
        found.append(pytest.param(row, id=row["file"], marks=[pytest.mark.slow] if slow else []))
    return found


@pytest.mark.parametrize("row", cases(want=True))
def test_the_network_sees_what_rasterio_reads(tmp_path: Path, monkeypatch, row: dict[str, str]) -> None:
    path = real_data("robust") / row["file"]
    with rasterio.open(path) as dataset:
        colours = [band for band, kind in enumerate(dataset.colorinterp, 1) if kind != ColorInterp.alpha]
        values = dataset.read(colours)
        valid = (dataset.read_masks() != 0).all(axis=0) & np.isfinite(values).all(axis=0)
    model = pixel_model(len(colours), tuple(f"band{n}" for n in colours))
    seen = Seen(monkeypatch, valid.shape, len(colours))
    labels, _ = segment(path, tmp_path / "out.zarr", model, tile=(512, 512), block=(512, 512))
    assert not (valid & ~seen.shown).any()
    np.testing.assert_array_equal(seen.valid, valid)
    if valid.any():
        assert seen.values is not None
        np.testing.assert_array_equal(seen.values[:, seen.shown], values[:, seen.shown])
    np.testing.assert_array_equal(labels, pixel_labels(model, values, valid))


@pytest.mark.parametrize("row", cases(want=False))
def test_what_cannot_be_read_ends_in_one_line(tmp_path: Path, monkeypatch, row: dict[str, str]) -> None:
    monkeypatch.setattr("tilepipe.pipeline.HOPELESS", 50)
    path = real_data("robust") / row["file"]
    model = saved(pixel_model(int(row["bands"] or 1)), tmp_path / "net.safetensors")
    result = run("segment", path, tmp_path / "out.zarr", "--model", model, "--device", "cpu", "-q")
    assert_one_line(result, 3, str(path))


def test_of_a_corrupt_file_the_readable_blocks_are_labelled(tmp_path: Path) -> None:
    path, out = real_data("robust") / "rasterio" / "corrupt.tif", tmp_path / "out.zarr"
    model = pixel_model()
    command = ("segment", path, out, "--model", saved(model, tmp_path / "net.safetensors"), "--device", "cpu", "-q")
    more = ("--tile", 512, "--block", 512, "--precision", "float64")
    assert_one_line(run(*command, *map(str, more)), 3, "1 of 4 blocks", "3 finished blocks are kept")
    labels = open_store(out).array()[:]
    with rasterio.open(path) as dataset:
        for row, col in ((0, 0), (0, 512), (512, 0)):
            window = rasterio.windows.Window(col, row, 512, 512)
            values, valid = dataset.read(window=window), dataset.read_masks(window=window).all(axis=0)
            found = labels[row : row + 512, col : col + 512]
            np.testing.assert_array_equal(found, pixel_labels(model, values, valid))
    assert (labels[512:, 512:] == 255).all()


def labelled_by_command(path: Path, folder: Path) -> None:
    """Runs the command on an RGB raster, and compares its labels with those of its pixels."""
    model, out = pixel_model(), folder / f"{path.stem}.zarr"
    net = saved(model, folder / f"{path.stem}.safetensors")
    words = ("segment", path, out, "--model", net, "--device", "cpu", "--precision", "float64", "-q")
    result = run(*words)
    assert result.exit_code == 0, result.output
    with rasterio.open(path) as dataset:
        values, valid = dataset.read([1, 2, 3]), (dataset.read_masks([1, 2, 3]) != 0).all(axis=0)
    np.testing.assert_array_equal(open_store(out).array()[:], pixel_labels(model, values, valid))


def test_an_aerial_scene_of_four_bands(tmp_path: Path) -> None:
    labelled_by_command(next(real_data("naip").glob("*.tif")), tmp_path)


def test_a_drone_mosaic(tmp_path: Path) -> None:
    labelled_by_command(min(mosaics(), key=lambda path: path.stat().st_size), tmp_path)


@pytest.mark.slow
def test_all_drone_mosaics(tmp_path: Path) -> None:
    for path in mosaics():
        labelled_by_command(path, tmp_path)


def mosaics() -> list[Path]:
    return sorted(real_data("buildings").glob("*_rgb.tif"))
