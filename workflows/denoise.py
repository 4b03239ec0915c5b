"""Train the autoencoder to take noise off rasters, clean one with it, and report what that gained.

    python workflows/denoise.py out                                           one band of a synthetic scene
    python workflows/denoise.py out --raster clean.tif --bands 3 --width 2    more bands need more features

A clean raster is made noisy, so that the truth is known. DIR then holds noisy.tif, denoise.safetensors and
cleaned.zarr, the network's own output from 0 to 1; `tilepipe export` makes a GeoTIFF of it, and `tilepipe predict`
cleans other rasters with the model. The same arguments, libraries and processor give the same bytes. Two processor
cores take a few minutes. Needs scipy for the filters that it is compared with.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rasterio.windows import Window
from scipy import ndimage
from torch import Tensor, nn

from tilepipe.checkpoint import ModelCard, save_model
from tilepipe.errors import UsageError
from tilepipe.models import build
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import predict_raster
from tilepipe.scene.synthetic import synthetic_scene, write_scene
from tilepipe.store.output import open_store

TRAINING_SEEDS, UNSEEN_SEED = 1_000_000, 1
TRAINED_ROWS = 0.75
"""Of a raster that is given, the share from the top that crops come from; PSNR is of the rows below."""
STRIP, MARGIN = 512, 16
"""Rows that are compared at once; and the edge of crops, of little context, that training leaves out of account."""
FIRST_RESIDUAL = 0.1
"""How strong the network's correction of its input is at first: at 1 it would learn for long to do nothing."""
FILTERS = {
    **{f"gaussian of {s}": (lambda band, s=s: ndimage.gaussian_filter(band, s)) for s in (0.6, 0.9, 1.2, 1.6)},
    **{f"median of {n} x {n}": (lambda band, n=n: ndimage.median_filter(band, n)) for n in (3, 5)},
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--raster", type=Path, help="a clean raster to learn from and to test on; else a synthetic one")
    parser.add_argument("--bands", type=int, default=1, help="how many of its bands, from the first")
    parser.add_argument("--size", type=int, default=1024, help="sides of the synthetic raster, in pixels")
    parser.add_argument("--sigma", type=float, default=25.0, help="standard deviation of the noise, in raster values")
    parser.add_argument("--white", type=float, default=255.0, help="the raster value that is 1 for the network")
    parser.add_argument("--patches", type=int, default=150, help="number of clean patches to learn from")
    parser.add_argument("--patch", type=int, default=256, help="their sides, in pixels")
    parser.add_argument("--crop", type=int, default=93, help="sides of a training crop, 61 + 16n")
    parser.add_argument("--batch", type=int, default=16, help="crops per step")
    parser.add_argument("--steps", type=int, default=1200, help="optimiser steps")
    parser.add_argument("--rate", type=float, default=1e-2, help="highest learning rate")
    parser.add_argument("--width", type=float, default=1.0, help="factor on the network's features")
    parser.add_argument("--dropout", type=float, default=0.0, help="share of features left out in training")
    parser.add_argument("--seed", type=int, default=0, help="of weights, crops and noise")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    return parser.parse_args(arguments)


def with_noise(clean: NDArray[Any], sigma: float, random: np.random.Generator) -> NDArray[Any]:
    """The pixels with additive Gaussian noise, rounded and cut to their type as a sensor does."""
    noisy = clean + sigma * random.standard_normal(clean.shape, np.float32)
    if clean.dtype.kind == "f":
        return noisy.astype(clean.dtype)
    limits = np.iinfo(clean.dtype)
    return np.rint(noisy).clip(limits.min, limits.max).astype(clean.dtype)


def numbers(options: argparse.Namespace) -> list[int]:
    return list(range(1, options.bands + 1))


def with_data(raster: Any, options: argparse.Namespace, window: Window) -> NDArray[np.bool_]:
    """(rows, columns): whether all of the pixel's bands hold data."""
    return (raster.read_masks(numbers(options), window=window) > 0).all(axis=0)


def clean_raster(options: argparse.Namespace) -> Path:
    """The raster to learn from, or a synthetic one that training never sees."""
    if options.raster is not None:
        return Path(options.raster)
    return write_scene(options.folder, (options.size, options.size), UNSEEN_SEED)[0]


def clean_patches(options: argparse.Namespace, random: np.random.Generator) -> NDArray[Any]:
    """(patches, bands, rows, columns) to learn from: of other synthetic scenes, or of the raster's upper part."""
    side = options.patch
    if options.raster is None:
        seeds = range(TRAINING_SEEDS, TRAINING_SEEDS + options.patches)
        return np.stack([synthetic_scene((side, side), seed).image[: options.bands] for seed in seeds])
    found = []
    with rasterio.open(options.raster) as raster:
        rows = int(raster.height * TRAINED_ROWS)
        if min(rows, raster.width) < side:
            raise UsageError(f"{options.raster} is too small for patches of {side} pixels; choose a smaller --patch")
        for _ in range(50 * options.patches):
            row, col = random.integers(0, rows - side + 1), random.integers(0, raster.width - side + 1)
            window = Window(col, row, side, side)
            if with_data(raster, options, window).all():
                found.append(raster.read(numbers(options), window=window))
            if len(found) == options.patches:
                return np.stack(found)
    raise UsageError(f"{options.raster} has too few patches without nodata; choose a smaller --patch")


def batch(patches: NDArray[Any], options: argparse.Namespace, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random crops, turned and mirrored: noisy and clean, each (crops, bands, rows, columns) from 0 to 1."""
    chosen = []
    for index in random.integers(len(patches), size=options.batch):
        row, col = random.integers(0, options.patch - options.crop + 1, 2)
        crop = np.rot90(
            patches[index, :, row : row + options.crop, col : col + options.crop], random.integers(4), (1, 2)
        )
        chosen.append(crop[..., ::-1] if random.integers(2) else crop)
    clean = np.stack(chosen)
    pair = with_noise(clean, options.sigma, random), clean
    noisy, truth = (torch.from_numpy(pixels.astype(np.float32) / np.float32(options.white)) for pixels in pair)
    return noisy, truth


def train(patches: NDArray[Any], options: argparse.Namespace, random: np.random.Generator) -> nn.Module:
    """The autoencoder that gives the clean crop for the noisy one, by mean squared error."""
    network = build("autoencoder", **arguments(options)).train()
    torch.nn.init.constant_(network.finish[-2].weight, FIRST_RESIDUAL)
    inner = np.s_[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.rate, options.steps, pct_start=0.2)
    began, error = time.monotonic(), 0.0
    for step in range(1, options.steps + 1):
        noisy, clean = batch(patches, options, random)
        loss = F.mse_loss(network(noisy)[inner], clean[inner])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        error += loss.item()
        if step % 50 == 0:
            print(f"step {step}: {psnr(error / 50):.2f} dB, {time.monotonic() - began:.0f} s", flush=True)
            error = 0.0
    return network


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {"bands": options.bands, "width": options.width, "dropout": options.dropout}


def card(options: argparse.Namespace) -> ModelCard:
    told = (
        *("bands", "sigma", "white", "patches", "patch", "crop", "batch", "steps"),
        *("rate", "width", "dropout", "seed", "threads"),
    )
    return ModelCard(
        architecture="autoencoder",
        arguments=arguments(options),
        classes=(),
        bands=tuple(f"band {number}" for number in range(1, options.bands + 1)),
        mean=(0.0,) * options.bands,
        std=(options.white,) * options.bands,
        nodata="masked pixels become 0",
        resolution=None,
        licence="MIT",
        provenance={
            "command": " ".join(
                ["python workflows/denoise.py DIR", *(f"--{name} {getattr(options, name)}" for name in told)]
            ),
            "data": "synthetic scenes of tilepipe.scene" if options.raster is None else options.raster.name,
            "torch": torch.__version__,
        },
        task="regression",
    )


def write_noisy(clean: Path, noisy: Path, options: argparse.Namespace) -> None:
    """Write the raster with noise on it; pixels without data stay as they are, and no other gets their value."""
    with rasterio.open(clean) as source:
        profile = {"driver": "GTiff", "tiled": True, "compress": "deflate", "bigtiff": "if_safer"}
        profile["photometric"] = "minisblack"  # else GDAL would take a fourth band for opacity
        kept = {name: source.profile[name] for name in ("width", "height", "dtype", "crs", "transform", "nodata")}
        with rasterio.open(noisy, "w", count=options.bands, **profile, **kept) as target:
            for rows in strips(0, source.height):
                window = Window(0, rows.start, source.width, rows.stop - rows.start)
                random = np.random.default_rng((options.seed, rows.start))
                pixels = source.read(numbers(options), window=window)
                changed = with_noise(pixels, options.sigma, random)
                if source.nodata is not None:
                    changed[changed == source.nodata] = source.nodata + (1 if source.nodata <= 0 else -1)
                target.write(np.where(with_data(source, options, window), changed, pixels), window=window)


def strips(first: int, height: int) -> Iterator[slice]:
    return (slice(row, min(row + STRIP, height)) for row in range(first, height, STRIP))


def psnr(error: float) -> float:
    """The peak signal-to-noise ratio in decibels, of a mean squared error where the peak is 1."""
    return float(-10 * np.log10(max(error, 1e-12)))


def compare(clean: Path, noisy: Path, store: Path, options: argparse.Namespace) -> dict[str, float]:
    """PSNR, over the rows that training did not see, of the noisy raster, of it filtered, and of it cleaned."""
    cleaned = open_store(store).array()
    sums: dict[str, float] = dict.fromkeys(["noisy", *FILTERS, "autoencoder"], 0.0)
    with rasterio.open(clean) as one, rasterio.open(noisy) as two:
        first = 0 if options.raster is None else int(one.height * TRAINED_ROWS)
        count = 0
        for rows in strips(first, one.height):
            above = min(MARGIN, rows.start)
            wider = Window(0, rows.start - above, one.width, rows.stop - rows.start + above + MARGIN)
            wider = wider.intersection(Window(0, 0, one.width, one.height))
            inner = slice(above, above + rows.stop - rows.start)
            valid = with_data(one, options, wider)[inner]
            truth, seen = (raster.read(numbers(options), window=wider) / options.white for raster in (one, two))
            found = {"noisy": seen[:, inner], "autoencoder": np.asarray(cleaned[:, rows])}
            for name, smooth in FILTERS.items():
                found[name] = np.stack([smooth(band) for band in seen])[:, inner]
            for name, pixels in found.items():
                sums[name] += float(np.square(pixels - truth[:, inner], dtype=np.float64)[:, valid].sum())
            count += options.bands * int(valid.sum())
    return {name: psnr(error / max(count, 1)) for name, error in sums.items()}


def main(options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    random = np.random.default_rng(options.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    clean, noisy = clean_raster(options), options.folder / "noisy.tif"
    model, store = options.folder / "denoise.safetensors", options.folder / "cleaned.zarr"
    save_model(model, train(clean_patches(options, random), options, random), card(options))
    write_noisy(clean, noisy, options)
    settings = SegmentOptions(values="float32", threads=options.threads, workers=1, overwrite=True)
    predict_raster(noisy, store, model, settings)
    found = compare(clean, noisy, store, options)
    for name, value in sorted(found.items(), key=lambda pair: pair[1]):
        print(f"{name:>16}: {value:.2f} dB")
    return found


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
