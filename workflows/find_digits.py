"""Find handwritten digits in a large image: train LeNet on windows, slide it over every pixel, take the peaks.

    python workflows/find_digits.py found/ [--size 2048] [--digits 400] [--epochs 5] [--seed 0]

1. Scikit-learn's handwritten digits (8 x 8) are enlarged and painted on noisy ground among lines that are no digits.
   LeNet learns from windows of such fields: a digit in the middle, or nothing (ground, lines, a digit off centre).
2. Digits that it never saw are painted at random places of a large image, `field.tif`.
3. LeNet gives one output per 4 pixels; `stride=1` makes it one per pixel, as if it had been run on every window.
   tilepipe tiles the image, and `probabilities` are those of all classes for the window around each pixel.
4. The heat map is the probability that a digit is there, 1 - P(nothing); its peaks are the digits found.

Writes into the folder: lenet.safetensors, field.tif, found.zarr, heat.tif and picture.png. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
import zarr
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rasterio.transform import from_origin
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tilepipe import ClassInfo, ModelCard, SegmentOptions, save_model, segment_raster
from tilepipe.models import build

WINDOW = 28
NOTHING = 10
"""The class of windows without a digit in their middle."""
NEAR = 2
"""Pixels that a digit may be off a window's centre in training."""
BESIDE = 6
"""Pixels from which on a window counts as having no digit in its middle."""
COLORS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe")
PLACE = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_400_000, 0.1, 0.1)}


@dataclass(frozen=True)
class Field:
    """An image, and the digits on it."""

    image: NDArray[np.uint8]
    """(rows, columns)."""
    places: NDArray[np.int64]
    """(digits, 2): the row and column of each digit's centre."""
    digits: NDArray[np.int64]
    """Which digit, 0 to 9."""


@dataclass(frozen=True)
class Found:
    """A peak of the heat map."""

    row: int
    col: int
    digit: int
    probability: float
    """That a digit is there."""


# ---- fields ------------------------------------------------------------------------------------------------------


def make_field(size: int, count: int, images: NDArray[np.float64], digits: NDArray[np.int64], seed: int) -> Field:
    """`size` x `size` pixels of ground with lines, and `count` of the digits (8 x 8 images) where there is room."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.uniform(40, 100, (size // 64 + 2,) * 2).astype(np.float32))
    ground = np.array(coarse.resize((size, size), Image.Resampling.BICUBIC))
    ink = Image.new("L", (size, size))
    pen = ImageDraw.Draw(ink)
    for _ in range(size * size // 8000):
        start = random.integers(0, size, 2)
        end = start + random.integers(-40, 41, 2)
        pen.line([*start.tolist(), *end.tolist()], fill=int(random.integers(40, 160)), width=int(random.integers(1, 4)))
    drawn = np.array(ink, np.float32)
    places = free_places(size, count, random)
    chosen = random.integers(0, len(images), len(places))
    for (row, col), index in zip(places, chosen, strict=True):
        side = int(random.integers(18, 25))
        stretched = Image.fromarray(images[index].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
        top, left = row - side // 2, col - side // 2
        under = drawn[top : top + side, left : left + side]
        under[:] = np.maximum(0.3 * under, random.uniform(90, 150) * np.clip(np.array(stretched), 0, 1))
    noisy = ground + drawn + random.normal(0, 8, ground.shape)
    return Field(np.clip(noisy, 0, 255).astype(np.uint8), places, digits[chosen])


def free_places(size: int, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """(at most `count`, 2) rows and columns, no two windows of which overlap, all of them inside."""
    places: list[NDArray[np.int64]] = []
    for place in random.integers(WINDOW // 2, size - WINDOW // 2, (20 * count, 2)):
        if len(places) < count and all(np.abs(place - other).max() >= WINDOW for other in places):
            places.append(place)
    return np.array(places).reshape(-1, 2)


def windows(field: Field, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Training windows (count, 1, 28, 28) uint8 of a field and their classes: digits, their sides, lines, ground."""
    size, count = field.image.shape[0], len(field.places)
    near = np.repeat(field.places, 3, 0) + random.integers(-NEAR, NEAR + 1, (3 * count, 2))
    aside = np.repeat(field.places, 3, 0) + random.integers(-WINDOW // 2, WINDOW // 2 + 1, (3 * count, 2))
    bright = np.argwhere(field.image > np.percentile(field.image, 95))  # lines, which may look like a one
    others = np.concatenate([aside, random.choice(bright, 3 * count), random.integers(0, size, (2 * count, 2))])
    nearest = np.abs(others[:, None] - field.places[None]).max(2).min(1)
    centres = np.concatenate([near, others[nearest >= BESIDE]])
    labels = np.concatenate([np.repeat(field.digits, 3), np.full(int((nearest >= BESIDE).sum()), NOTHING)])
    inside = ((centres >= WINDOW // 2) & (centres <= size - WINDOW // 2)).all(1)
    cut = [field.image[r - 14 : r + 14, c - 14 : c + 14] for r, c in centres[inside]]
    return torch.from_numpy(np.stack(cut))[:, None], torch.from_numpy(labels[inside])


# ---- the classifier ----------------------------------------------------------------------------------------------


def train(network: nn.Module, fields: list[Field], epochs: int, seed: int) -> tuple[float, float]:
    """The mean and standard deviation that pixels are normalised with; the network learns from the fields."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    mean, std = (round(float(np.mean([f(field.image) for field in fields])), 2) for f in (np.mean, np.std))
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for epoch in range(epochs):
        cut = [windows(field, random) for field in fields]  # cut anew, so that no window is seen twice
        images, labels = torch.cat([each[0] for each in cut]), torch.cat([each[1] for each in cut])
        right = 0
        for batch in torch.randperm(len(labels)).split(64):
            scores = network((images[batch].float() - mean) / std)[:, :, 0, 0]
            loss = F.cross_entropy(scores, labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            right += int((scores.argmax(1) == labels[batch]).sum())
        schedule.step()
        print(f"epoch {epoch + 1}: {len(labels)} windows, {right / len(labels):.3f} of them right", flush=True)
    network.eval()
    return mean, std


def card(width: float, mean: float, std: float) -> ModelCard:
    colors = [*COLORS, "#303030"]
    names = [*map(str, range(10)), "nothing"]
    return ModelCard(
        architecture="lenet",
        arguments={"classes": len(names), "bands": 1, "width": width},
        classes=tuple(
            ClassInfo(name, tuple(bytes.fromhex(color[1:]))) for name, color in zip(names, colors, strict=True)
        ),
        bands=("grey",),
        mean=(mean,),
        std=(std,),
        nodata="0 after normalisation",
        resolution=None,
        licence="MIT",
        provenance={"data": "scikit-learn's digits, enlarged", "command": "python workflows/find_digits.py"},
    )


# ---- what was found ----------------------------------------------------------------------------------------------


def peaks(probabilities: NDArray[np.floating], least: float = 0.5) -> tuple[NDArray[np.float32], list[Found]]:
    """The heat map (rows, columns), and its peaks of at least `least`, from probabilities (11, rows, columns).

    Probabilities are averaged over the pixels that a digit may be off centre: there, one digit gives one answer.
    """
    side = 2 * NEAR + 1
    values = torch.from_numpy(probabilities.astype(np.float32))[None]
    mean = F.avg_pool2d(values, side, 1, NEAR, count_include_pad=False)[0]
    heat = 1 - mean[NOTHING]
    highest = F.max_pool2d(heat[None], WINDOW - 1, 1, WINDOW // 2 - 1)[0]
    rows, cols = torch.nonzero((heat == highest) & (heat >= least), as_tuple=True)
    digits = mean[:NOTHING, rows, cols].argmax(0)
    each = zip(rows.tolist(), cols.tolist(), digits.tolist(), heat[rows, cols].tolist(), strict=True)
    return heat.numpy(), [Found(*told) for told in each]


def compare(found: list[Found], field: Field) -> tuple[set[int], int]:
    """(which of the found are right, how many digits were found): within 5 pixels, and the same digit."""
    right, taken = set(), set()
    for number, each in enumerate(found):
        distances = np.abs(field.places - (each.row, each.col)).max(1)
        nearest = int(distances.argmin()) if len(distances) else -1
        if nearest >= 0 and distances[nearest] < BESIDE and nearest not in taken:
            taken.add(nearest)
            if field.digits[nearest] == each.digit:
                right.add(number)
    return right, len(taken)


def draw(path: Path, field: Field, heat: NDArray[np.float32], found: list[Found], right: set[int]) -> None:
    """The field with what was found (green: right, red: wrong), and its heat map beside it."""
    left = Image.fromarray(field.image).convert("RGB")
    pen = ImageDraw.Draw(left)
    for number, each in enumerate(found):
        box = (each.col - 14, each.row - 14, each.col + 13, each.row + 13)
        color = "#3cff5a" if number in right else "#ff3030"
        pen.rectangle(box, outline=color, width=2)
        pen.text((box[2] + 3, box[1]), str(each.digit), fill=color, font_size=18)
    warm = np.clip(np.stack([3 * heat, 3 * heat - 1, 3 * heat - 2], -1), 0, 1)
    picture = Image.new("RGB", (2 * left.width + 16, left.height), "white")
    picture.paste(left, (0, 0))
    picture.paste(Image.fromarray((255 * warm).astype(np.uint8)), (left.width + 16, 0))
    picture.save(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--size", type=int, default=2048, help="sides of the large image, in pixels")
    parser.add_argument("--digits", type=int, default=400, help="digits on it")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training fields")
    parser.add_argument("--fields", type=int, default=4, help="training fields of 1024 x 1024 pixels")
    parser.add_argument("--width", type=float, default=0.4, help="factor on LeNet's features")
    parser.add_argument("--seed", type=int, default=0, help="of the fields, the weights and the windows")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)

    data = load_digits()
    images, digits = data.images / 16, data.target.astype(np.int64)
    order = np.random.default_rng(options.seed).permutation(len(digits))
    known, unseen = order[:1300], order[1300:]

    fields = [
        make_field(1024, 300, images[known], digits[known], 1000 * options.seed + number + 1)
        for number in range(options.fields)
    ]
    torch.manual_seed(options.seed)
    network = build("lenet", classes=11, bands=1, width=options.width)
    mean, std = train(network, fields, options.epochs, options.seed)
    model = options.folder / "lenet.safetensors"
    save_model(model, network, card(options.width, mean, std))

    field = make_field(options.size, options.digits, images[unseen], digits[unseen], 1000 * options.seed)
    raster, store = options.folder / "field.tif", options.folder / "found.zarr"
    profile = {"driver": "GTiff", "width": options.size, "height": options.size, "count": 1, "dtype": "uint8", **PLACE}
    with rasterio.open(raster, "w", tiled=True, blockxsize=256, blockysize=256, compress="deflate", **profile) as out:
        out.write(field.image, 1)

    summary = segment_raster(
        raster, store, model, SegmentOptions(stride=1, stitch="exact", probabilities="float16", overwrite=True)
    )
    print(f"{summary.pixels / 1e6:.1f} Mpx classified in {summary.seconds:.0f} s, {summary.rate:.3f} Mpx/s")
    heat, found = peaks(zarr.open_group(store, mode="r")["probabilities"][:])
    with rasterio.open(options.folder / "heat.tif", "w", compress="deflate", **{**profile, "dtype": "float32"}) as out:
        out.write(heat, 1)
    right, met = compare(found, field)
    draw(options.folder / "picture.png", field, heat, found, right)
    print(f"{len(field.places)} digits: {met} found, {len(right)} of them read right; {len(found) - met} false finds")
    print(
        f"precision {len(right) / max(1, len(found)):.3f}, recall {len(right) / max(1, len(field.places)):.3f} "
        f"(right place and digit); see {options.folder / 'picture.png'}"
    )


if __name__ == "__main__":
    main()
