"""From labels, confidences, values and bands to red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import InputError
from tilepipe.store.spec import ClassLike

NODATA_COLOR = (236, 236, 236)
NO_CONFIDENCE = 255
"""What a store's confidence holds where there is no data; all other values are probabilities times 254."""
PERCENTS = (2.0, 98.0)
"""Of a channel's values: from which to which its colours run."""

_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Evenly spaced colours of "viridis", in which equal steps look equally large, to the colour-blind, too."""


def colorize(labels: NDArray[Any], classes: Sequence[ClassLike]) -> NDArray[np.uint8]:
    """(rows, columns, 3): each pixel's class colour; light grey where the label is no class's.

    `labels` is (rows, columns) of unsigned integers.
    """
    if labels.ndim != 2 or labels.dtype.kind != "u":
        raise InputError(f"labels are {labels.dtype} {labels.shape}; give (rows, columns) of unsigned integers")
    colors = np.full((np.iinfo(labels.dtype).max + 1, 3), NODATA_COLOR, np.uint8)
    colors[: len(classes)] = [item.color for item in classes]
    return colors[labels]


def ramp(steps: int) -> NDArray[np.uint8]:
    """(steps, 3): colours from the lowest to the highest value, dark violet to yellow."""
    at = np.linspace(0, len(_STOPS) - 1, steps)
    channels = [np.interp(at, range(len(_STOPS)), channel) for channel in zip(*_STOPS, strict=True)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


def confidence_palette() -> NDArray[np.uint8]:
    """(256, 3): the colour of each value that a store's confidence may hold."""
    return np.concatenate([ramp(NO_CONFIDENCE), np.array([NODATA_COLOR], np.uint8)])


def shown_channels(count: int) -> int:
    """How many of `count` channels are shown: three as red, green and blue, or one in grey."""
    return 3 if count >= 3 else 1


def limits(values: NDArray[Any], percents: tuple[float, float] = PERCENTS) -> list[tuple[float, float]]:
    """(lower, upper) percentile of each channel that is shown; none where no pixel is valid in all of them."""
    shown = values[: shown_channels(len(values))].astype(np.float64)
    valid = np.isfinite(shown).all(axis=0)
    if not valid.any():
        return []
    return [(float(low), float(high)) for low, high in (np.percentile(channel[valid], percents) for channel in shown)]


def stretched(values: NDArray[Any], percents: tuple[float, float] = PERCENTS) -> NDArray[np.uint8]:
    """(rows, columns, 4): red, green and blue from the first three channels, or grey from the first; and opacity.

    `values` is (channels, rows, columns) of real numbers. Each channel is stretched from its lower to its upper
    percentile; a pixel that is NaN in one of the channels shown is white and transparent.
    """
    if values.ndim != 3 or values.dtype.kind not in "fiu" or not values.size:
        raise InputError(f"values are {values.dtype} {values.shape}; give (channels, rows, columns) of real numbers")
    shown = values[: shown_channels(len(values))].astype(np.float64)
    valid = np.isfinite(shown).all(axis=0)
    picture = np.full((*valid.shape, 4), 255, np.uint8)
    picture[..., 3] = np.where(valid, 255, 0)
    found = limits(values, percents)
    if found:
        for number in range(3):
            channel = shown[number % len(shown)][valid]
            low, high = found[number % len(shown)]
            # One value everywhere is a middle grey.
            share = (channel - low) / (high - low) if high > low else np.full_like(channel, 0.5)
            picture[valid, number] = np.rint(255 * share.clip(0, 1))
    return picture


def on_grey(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(rows, columns, 3) of (rows, columns, 4): what is transparent has the colour of no data."""
    return np.where(picture[..., 3:] > 0, picture[..., :3], np.array(NODATA_COLOR, np.uint8))


def web_color(color: Sequence[int]) -> str:
    """A colour as web pages spell it.

    >>> web_color((255, 128, 0))
    '#ff8000'
    """
    return "#{:02x}{:02x}{:02x}".format(*color)
