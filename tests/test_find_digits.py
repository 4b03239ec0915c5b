"""The workflow that finds digits: a tiny run from end to end, its heat map against single windows, its peaks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import zarr

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

import find_digits

from tilepipe.checkpoint import load_model
from tilepipe.window import Interval


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a tiny run wrote."""
    folder = tmp_path_factory.mktemp("found")
    small = ["--size", "150", "--digits", "8", "--epochs", "1", "--fields", "1", "--width", "0.15"]
    find_digits.main([str(folder), *small])
    return folder


def test_all_files_are_there_and_lie_in_one_place(folder: Path) -> None:
    with rasterio.open(folder / "field.tif") as field, rasterio.open(folder / "heat.tif") as heat:
        assert field.shape == heat.shape == (150, 150)
        assert field.transform == heat.transform
        assert field.crs == heat.crs
        values = heat.read(1)
    assert 0 <= values.min() < values.max() <= 1
    store = zarr.open_group(folder / "found.zarr", mode="r")
    assert store["probabilities"].shape == (11, 150, 150)
    assert tuple(store["labels"].attrs["spatial:transform"]) == tuple(field.transform)[:6]
    assert (folder / "picture.png").stat().st_size > 0
    assert load_model(folder / "lenet.safetensors").card.classes[find_digits.NOTHING].name == "nothing"


def test_the_heat_map_is_that_of_single_windows(folder: Path) -> None:
    model = load_model(folder / "lenet.safetensors")
    stored = zarr.open_group(folder / "found.zarr", mode="r")["probabilities"][:]
    with rasterio.open(folder / "field.tif") as raster:
        pixels = (raster.read(1).astype(np.float32) - model.card.mean[0]) / model.card.std[0]
    for row, col in (0, 0), (75, 31), (149, 90), (140, 149):
        rows, cols = (Interval(at - 13, at + 15).reflect(150) for at in (row, col))
        window = torch.from_numpy(pixels[rows][:, cols])[None, None]
        with torch.inference_mode():
            expected = model.network(window)[0, :, 0, 0].softmax(0).numpy()
        np.testing.assert_allclose(stored[:, row, col], expected, atol=1e-3)


def test_fields_hold_their_digits_apart_from_each_other() -> None:
    images, digits = np.ones((3, 8, 8)), np.array([4, 7, 9])
    field = find_digits.make_field(300, 25, images, digits, seed=5)
    again = find_digits.make_field(300, 25, images, digits, seed=5)
    assert (field.image == again.image).all()
    apart = np.abs(field.places[:, None] - field.places[None]).max(2) + 1000 * np.eye(len(field.places))
    assert apart.min() >= 28
    inside = np.array([field.image[row - 8 : row + 8, col - 8 : col + 8].mean() for row, col in field.places])
    assert inside.min() > field.image.mean() + 30
    cut, labels = find_digits.windows(field, np.random.default_rng(0))
    assert cut.shape[1:] == (1, 28, 28)
    assert set(labels.tolist()) == {4, 7, 9, find_digits.NOTHING} & set(labels.tolist())
    assert (labels == find_digits.NOTHING).any()
    assert (labels != find_digits.NOTHING).any()


def test_peaks_are_places_of_high_probability_and_are_matched_once() -> None:
    probabilities = np.zeros((11, 90, 120), np.float32)
    probabilities[find_digits.NOTHING] = 1
    for row, col, digit in (20, 30, 3), (20, 70, 8), (60, 50, 0):
        probabilities[:, row - 2 : row + 3, col - 2 : col + 3] = 0
        probabilities[digit, row - 2 : row + 3, col - 2 : col + 3] = 0.9
        probabilities[find_digits.NOTHING, row - 2 : row + 3, col - 2 : col + 3] = 0.1
    heat, found = find_digits.peaks(probabilities)
    assert heat.shape == (90, 120)
    assert heat[0, 0] == 0, "nothing is found at the border"
    assert [(each.row, each.col, each.digit) for each in found] == [(20, 30, 3), (20, 70, 8), (60, 50, 0)]
    assert all(each.probability == pytest.approx(0.9, abs=1e-5) for each in found)
    places = np.array([[22, 31], [20, 69], [10, 10]])
    truth = find_digits.Field(np.zeros((90, 120), np.uint8), places, np.array([3, 1, 5]))
    assert find_digits.compare(found, truth) == ({0}, 2)


@pytest.mark.slow
def test_most_digits_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    find_digits.main([str(tmp_path), "--size", "700", "--digits", "150"])
    told = capsys.readouterr().out.splitlines()[-1]
    precision, recall = (float(told.split(name)[1].split()[0].strip(",")) for name in ("precision", "recall"))
    assert precision > 0.85
    assert recall > 0.9
