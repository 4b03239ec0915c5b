"""Pictures of label maps, in the classes' colours, beside the image, with a legend; and of a network's own output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tilepipe.errors import InputError
from tilepipe.store.output import OutputStore
from tilepipe.store.spec import ClassLike

NODATA_COLOR = (236, 236, 236)
PAPER, INK, EDGE = (255, 255, 255), (40, 40, 40), (160, 160, 160)
PANEL = 900
"""Pixels of a panel's longer side, at most."""
MARGIN, TITLE, LINE, SWATCH = 24, 40, 34, 20


class Panel(NamedTuple):
    """One of a picture's images and what stands above it."""

    title: str
    picture: Image.Image


def colorize(labels: NDArray[Any], classes: Sequence[ClassLike]) -> NDArray[np.uint8]:
    """(rows, columns, 3): each pixel's class colour; light grey where the label is no class's.

    `labels` is (rows, columns) of unsigned integers.
    """
    if labels.ndim != 2 or labels.dtype.kind != "u":
        raise InputError(f"labels are {labels.dtype} {labels.shape}; give (rows, columns) of unsigned integers")
    colors = np.full((np.iinfo(labels.dtype).max + 1, 3), NODATA_COLOR, np.uint8)
    colors[: len(classes)] = [item.color for item in classes]
    return colors[labels]


def stretched(values: NDArray[Any], percents: tuple[float, float] = (2.0, 98.0)) -> NDArray[np.uint8]:
    """(rows, columns, 4): red, green and blue from the first three channels, or grey from the first; and opacity.

    `values` is (channels, rows, columns) of real numbers. Each channel is stretched from its lower to its upper
    percentile; a pixel that is NaN in one of the channels shown is white and transparent.
    """
    if values.ndim != 3 or values.dtype.kind not in "fiu" or not values.size:
        raise InputError(f"values are {values.dtype} {values.shape}; give (channels, rows, columns) of real numbers")
    shown = values[: 3 if len(values) >= 3 else 1].astype(np.float64)
    valid = np.isfinite(shown).all(axis=0)
    picture = np.full((*valid.shape, 4), 255, np.uint8)
    picture[..., 3] = np.where(valid, 255, 0)
    if valid.any():
        for number in range(3):
            channel = shown[number % len(shown)][valid]
            low, high = np.percentile(channel, percents)
            # One value everywhere is a middle grey.
            share = (channel - low) / (high - low) if high > low else np.full_like(channel, 0.5)
            picture[valid, number] = np.rint(255 * share.clip(0, 1))
    return picture


def store_picture(store: OutputStore, side: int = PANEL) -> Image.Image:
    """The store at a glance: its labels in their classes' colours, or its values stretched over grey or colours.

    Every n-th pixel is shown, so that neither side exceeds `side` pixels; one such picture is what is held in memory.
    """
    step = max(1, -(-max(store.spec.shape) // side))
    pixels = np.asarray(store.array()[..., ::step, ::step])
    if store.spec.kind == "labels":
        return Image.fromarray(colorize(pixels, store.spec.classes))
    return Image.fromarray(stretched(pixels))


def side_by_side(
    image: NDArray[Any], labels: NDArray[Any], truth: NDArray[Any] | None, classes: Sequence[ClassLike]
) -> Image.Image:
    """The image, its labels and, where given, the true ones, side by side over a legend of the classes.

    `image` is (bands, rows, columns) uint8, of which the first three bands are shown as red, green and blue;
    `labels` and `truth` are (rows, columns). Panels larger than 900 pixels are reduced: images by averaging,
    labels by taking the middle.
    """
    height, width = labels.shape
    for name, found in (("image", image.shape[1:]), ("truth", labels.shape if truth is None else truth.shape)):
        if found != (height, width):
            raise InputError(f"{name} of {found} does not fit labels of {height} x {width} pixels")
    panels = [
        Panel("image", _fit(_as_rgb(image), Image.Resampling.BOX)),
        Panel("labels", _fit(colorize(labels, classes), Image.Resampling.NEAREST)),
    ]
    if truth is not None:
        panels.append(Panel("truth", _fit(colorize(truth, classes), Image.Resampling.NEAREST)))
    return _compose(panels, classes)


def _as_rgb(image: NDArray[Any]) -> NDArray[np.uint8]:
    bands = image[:3] if image.shape[0] >= 3 else np.repeat(image[:1], 3, axis=0)
    return np.ascontiguousarray(np.moveaxis(bands, 0, -1)).astype(np.uint8)


def _fit(pixels: NDArray[np.uint8], how: Image.Resampling) -> Image.Image:
    """The pixels as an image whose longer side is at most PANEL."""
    height, width = pixels.shape[:2]
    factor = min(1.0, PANEL / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    picture = Image.fromarray(pixels)
    return picture if size == picture.size else picture.resize(size, how)


def _compose(panels: Sequence[Panel], classes: Sequence[ClassLike]) -> Image.Image:
    panel_width, panel_height = panels[0].picture.size
    width = max(len(panels) * panel_width + (len(panels) + 1) * MARGIN, 360)
    font = ImageFont.load_default(18)
    legend = _legend(classes, width - 2 * MARGIN, font)
    lines = 1 + max((line for line, _ in legend), default=0)
    page = Image.new("RGB", (width, TITLE + panel_height + MARGIN + lines * LINE + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(page)
    for number, panel in enumerate(panels):
        left = MARGIN + number * (panel_width + MARGIN)
        draw.text((left, TITLE / 2), panel.title, fill=INK, font=font, anchor="lm")
        page.paste(panel.picture, (left, TITLE))
        draw.rectangle((left - 1, TITLE - 1, left + panel_width, TITLE + panel_height), outline=EDGE)
    for item, (line, x) in zip(classes, legend, strict=True):
        left, middle = MARGIN + x, TITLE + panel_height + MARGIN + line * LINE + LINE // 2
        box = (left, middle - SWATCH // 2, left + SWATCH, middle + SWATCH // 2)
        draw.rectangle(box, fill=tuple(item.color), outline=EDGE)
        draw.text((left + SWATCH + 8, middle), item.name, fill=INK, font=font, anchor="lm")
    return page


def _legend(classes: Sequence[ClassLike], width: int, font: Any) -> list[tuple[int, int]]:
    """(line, x) of each class's entry, in lines of `width` pixels."""
    places, line, x = [], 0, 0
    for item in classes:
        entry = SWATCH + 8 + math.ceil(font.getlength(item.name)) + 28
        if x and x + entry > width:
            line, x = line + 1, 0
        places.append((line, x))
        x += entry
    return places
