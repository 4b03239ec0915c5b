"""The denoising workflow from end to end: trained, written, cleaned by tiles, measured."""

from __future__ import annotations

from pathlib import Path

import denoise
import numpy as np
import pytest
import rasterio
import torch
from rasters import write
from scipy import ndimage

from tilepipe.checkpoint import load_model
from tilepipe.errors import UsageError
from tilepipe.scene.synthetic import synthetic_scene
from tilepipe.store.output import open_store

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def waves(shape: tuple[int, int]) -> np.ndarray:
    """A smooth picture, which a small network learns in seconds: (1, rows, columns) uint8."""
    rows, cols = np.mgrid[: shape[0], : shape[1]]
    return (127 + 60 * np.sin(rows / 17) + 60 * np.cos(cols / 23 + rows / 60)).astype(np.uint8)[None]


QUICK = ["--bands", "1", "--steps", "80", "--crop", "77", "--batch", "6", "--patches", "8", "--patch", "96"]


def run(folder: Path, *more: str) -> dict[str, float]:
    words = [str(folder), *QUICK, "--threads", "1", *more]
    return denoise.main(denoise.parse(words))


def test_a_small_network_takes_noise_off(tmp_path: Path) -> None:
    clean = waves((300, 200))
    raster = write(tmp_path / "clean.tif", clean)
    found = run(tmp_path / "a", "--raster", str(raster), "--sigma", "30")
    assert found["autoencoder"] > found["noisy"] + 3

    # What it reports is so: over the rows that it did not learn from.
    with rasterio.open(tmp_path / "a" / "noisy.tif") as tif:
        noisy = tif.read()
    unseen = np.s_[:, 225:]
    assert 25 < np.std((noisy.astype(float) - clean)[unseen]) < 32
    cleaned = open_store(tmp_path / "a" / "cleaned.zarr").array()[...]
    assert cleaned.shape == clean.shape
    smooth = ndimage.median_filter(noisy[0], 3)[None]
    for name, pixels in (("noisy", noisy / 255), ("autoencoder", cleaned), ("median of 3 x 3", smooth / 255)):
        error = np.mean(np.square(pixels - clean / 255)[unseen])
        assert found[name] == pytest.approx(-10 * np.log10(error), abs=0.01)

    # The model file is the network that cleaned: a window at its alignment of 16 agrees where it sees all it needs.
    model = load_model(tmp_path / "a" / "denoise.safetensors")
    assert (model.card.task, model.card.mean, model.card.std) == ("regression", (0.0,), (255.0,))
    with torch.inference_mode():
        whole = model.network(torch.from_numpy(noisy[None, :, 48:237, :189].astype(np.float32) / 255))[0].numpy()
    inner = np.s_[:, 48:-48, 48:-48]
    np.testing.assert_allclose(cleaned[:, 48:237, :189][inner], whole[inner], atol=2e-5)


def test_the_same_arguments_give_the_same_model_and_raster(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tmp_path / name, "--size", "130", "--steps", "3")
    for name in ("denoise.safetensors", "noisy.tif"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    one, two = (open_store(tmp_path / name / "cleaned.zarr").array()[...] for name in ("a", "b"))
    np.testing.assert_array_equal(one, two)


def test_noise_is_rounded_and_cut_to_the_type() -> None:
    random = np.random.default_rng(0)
    grey = denoise.with_noise(np.full((1, 200, 200), 128, np.uint8), 10, random)
    assert grey.dtype == np.uint8
    assert (grey.mean(), grey.std()) == (pytest.approx(128, abs=0.3), pytest.approx(10, abs=0.2))
    assert denoise.with_noise(np.zeros((1, 9, 9), np.uint8), 10, random).min() == 0
    assert denoise.with_noise(np.full((1, 9, 9), 255, np.uint8), 10, random).max() == 255
    real = denoise.with_noise(np.zeros((1, 99, 99), np.float32), 0.5, random)
    assert real.dtype == np.float32
    assert real.std() == pytest.approx(0.5, abs=0.02)


def test_pixels_without_data_keep_their_value_and_teach_nothing(tmp_path: Path) -> None:
    clean = np.maximum(waves((200, 150)), 1)
    clean[:, :, :40] = 0
    raster = write(tmp_path / "clean.tif", clean, nodata=0)
    options = denoise.parse(
        [str(tmp_path), "--raster", str(raster), "--bands", "1", "--patch", "64", "--patches", "20"]
    )
    assert denoise.clean_patches(options, np.random.default_rng(0)).min() > 0
    denoise.write_noisy(raster, tmp_path / "noisy.tif", options)
    with rasterio.open(tmp_path / "noisy.tif") as tif:
        noisy = tif.read()
        assert tif.nodata == 0
    assert (noisy[:, :, :40] == 0).all()
    assert (noisy[:, :, 40:] != clean[:, :, 40:]).mean() > 0.9
    # Noise does not make other pixels nodata, as cutting it at 0 would.
    assert noisy[:, :, 40:].min() == 1
    options.patch = 140
    with pytest.raises(UsageError, match="smaller --patch"):
        denoise.clean_patches(options, np.random.default_rng(0))


def test_training_patches_of_synthetic_scenes_are_not_the_scene_that_is_cleaned() -> None:
    options = denoise.parse(["x", "--bands", "3", "--patch", "40", "--patches", "3"])
    patches = denoise.clean_patches(options, np.random.default_rng(0))
    assert patches.shape == (3, 3, 40, 40)
    unseen = synthetic_scene((40, 40), denoise.UNSEEN_SEED).image
    assert all((patch != unseen).any() for patch in patches)
