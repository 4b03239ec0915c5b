"""The workflows that make the bundled models, end to end on small data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import train_buildings
import train_synthetic
from rasters import write

from tilepipe.checkpoint import load_model
from tilepipe.errors import InputError, UsageError
from tilepipe.scene.synthetic import CLASSES, synthetic_scene
from tilepipe.training.samples import Sample

QUICK = ("--width", "0.05", "--steps", "4", "--every", "2", "--crop", "64", "--batch", "2", "--workers", "0")


# ---- buildings ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mosaics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three mosaics of two areas: bright squares are buildings."""
    folder = tmp_path_factory.mktemp("mosaics")
    for seed, name in enumerate(("here_0", "here_1", "there_0")):
        random = np.random.default_rng(seed)
        labels = np.kron(random.random((8, 9)) < 0.4, np.ones((32, 32))).astype(np.uint8)
        image = 60 + 120 * labels + random.normal(0, 20, (3, *labels.shape))
        labels[:5] = 255
        write(folder / f"{name}_rgb.tif", image.clip(0, 255).astype(np.uint8), photometric="rgb")
        write(folder / f"{name}_label.tif", labels[None])
    return folder


def buildings(mosaics: Path, out: Path, *words: str) -> None:
    train_buildings.main([str(mosaics), str(out), *QUICK, "--threads", "1", "--device", "cpu", *words])


def test_a_held_out_area_is_scored_and_the_card_tells_it(mosaics: Path, tmp_path: Path, capsys) -> None:
    buildings(mosaics, tmp_path, "--hold", "there")
    told = json.loads((tmp_path / "hold-there" / "scores.json").read_text())
    assert set(told["iou"]) == {"1", "2", "4"}
    card = load_model(tmp_path / "hold-there" / "run" / "model.safetensors").card
    assert card.provenance["data"] == "2 images for training, 1 for validation"
    assert card.provenance["steps"] == 4
    assert f"{told['iou']['4']['building']:.4f}" in capsys.readouterr().out
    buildings(mosaics, tmp_path)
    model = load_model(tmp_path / "buildings.safetensors")
    assert model.card.resolution == (2.0, 8.0)
    assert [each.name for each in model.card.classes] == ["background", "building"]
    held = model.card.provenance["held out"]["there"]["mean and building IoU"]
    assert held["2x"] == [round(told["iou"]["2"][name], 3) for name in ("mean", "building")]
    last = load_model(tmp_path / "all" / "run" / "model.safetensors")
    train_buildings.shifted(last)
    for own, kept in zip(model.network.parameters(), last.network.parameters(), strict=True):
        np.testing.assert_array_equal(own.detach().numpy(), kept.detach().half().float().numpy())


@pytest.mark.slow
def test_a_shift_makes_buildings_likelier(mosaics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is what the held-out area is scored with."""
    monkeypatch.setattr(train_buildings, "FACTORS", (1,))
    found = {}
    for shift in (-100.0, 0.0, 100.0):
        monkeypatch.setattr(train_buildings, "SHIFT", shift)
        buildings(mosaics, tmp_path, "--hold", "there")
        found[shift] = json.loads((tmp_path / "hold-there" / "scores.json").read_text())["iou"]["1"]
    with rasterio.open(mosaics / "there_0_label.tif") as labels:
        values = labels.read(1)
    share = (values == 1).sum() / (values != 255).sum()
    assert found[100.0]["building"] == pytest.approx(share)
    assert found[-100.0]["background"] == pytest.approx(1 - share)
    card = load_model(tmp_path / "hold-there" / "run" / "model.safetensors").card
    assert found[0.0]["mean"] == pytest.approx(card.provenance["mean_iou"], abs=1e-4)


@pytest.mark.parametrize("factor", [2, 4])
def test_larger_pixels_are_means_and_the_commonest_labels(mosaics: Path, tmp_path: Path, factor: int) -> None:
    sample = Sample(str(mosaics / "here_0_rgb.tif"), str(mosaics / "here_0_label.tif"), "validation")
    found = train_buildings.coarser(sample, factor, tmp_path)
    with rasterio.open(sample.image) as whole, rasterio.open(found.image) as image:
        rows, cols = image.shape
        cells = whole.read().reshape(3, rows, factor, cols, factor).astype(float)
        assert np.abs(image.read() - cells.mean((2, 4))).max() <= 0.5
        assert image.bounds == whole.bounds
    with rasterio.open(sample.label) as whole, rasterio.open(found.label) as labels:
        cells = whole.read(1).reshape(rows, factor, cols, factor)
        counts = np.stack([(cells == value).sum((1, 3)) for value in (0, 1, 255)])
        clear = counts.max(0) > factor**2 / 2
        np.testing.assert_array_equal(labels.read(1)[clear], np.array([0, 1, 255])[counts.argmax(0)][clear])


def test_areas_that_are_not_there_are_refused(mosaics: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"area nowhere is not in .*; it has here, there"):
        buildings(mosaics, tmp_path, "--hold", "nowhere")
    with pytest.raises(InputError, match=r"has no file NAME_rgb\.tif"):
        buildings(tmp_path, tmp_path)
    write(tmp_path / "alone_rgb.tif", np.zeros((3, 9, 9), np.uint8))
    with pytest.raises(InputError, match=r"alone_rgb\.tif has no labels"):
        buildings(tmp_path, tmp_path)


# ---- synthetic scenes --------------------------------------------------------------------------------------------


def synthetic(out: Path, *words: str) -> bytes:
    train_synthetic.main([str(out), *QUICK, "--scenes", "2", "--side", "96", *words])
    return (out / "synthetic-landcover.safetensors").read_bytes()


def test_synthetic_scenes_are_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_synthetic, "VALIDATION_SIDE", 96)
    made = synthetic(tmp_path / "a")
    model = load_model(tmp_path / "a" / "synthetic-landcover.safetensors")
    assert tuple(each.name for each in model.card.classes) == tuple(name for name, _ in CLASSES)
    assert (model.card.resolution, model.card.licence) == (0.3, "MIT")
    assert "seeds 1000000 to 1000001" in model.card.provenance["data"]
    with rasterio.open(tmp_path / "a" / "scenes" / "1000001" / "image.tif") as image:
        np.testing.assert_array_equal(image.read(), synthetic_scene((96, 96), 1_000_001).image)
    assert synthetic(tmp_path / "a") == made, "a finished run is found again"
    assert synthetic(tmp_path / "b") == made
    with pytest.raises(UsageError, match="other settings"):
        synthetic(tmp_path / "a", "--seed", "1")


def test_rare_classes_count_more(tmp_path: Path) -> None:
    labels = np.zeros((1, 10, 10), np.uint8)
    labels[0, 0] = np.arange(10) % 6
    labels[0, 1:5] = 1
    path = str(write(tmp_path / "labels.tif", labels))
    weights = train_synthetic.class_weights([Sample(path, path)])
    counts = np.bincount(labels.ravel())
    assert np.mean(weights) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(np.array(weights) * np.sqrt(counts), weights[0] * np.sqrt(counts[0]), rtol=1e-3)
