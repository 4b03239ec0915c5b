"""A confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tilepipe.errors import UsageError
from tilepipe.metrics import Confusion

LEGIBLE = 30
"""Classes up to which each cell carries its number."""


def check_drawing() -> None:
    """Nothing; UsageError where matplotlib, which draws the picture, is not installed."""
    if find_spec("matplotlib") is None:
        raise UsageError("a picture of the confusion matrix needs matplotlib; pip install 'tilepipe[train]'")


def draw_confusion(path: str | Path, confusion: Confusion, classes: Sequence[str]) -> Path:
    """The path of the PNG that shows, for each true class, the share of its pixels that got each label, in percent.

    Rows of classes that the truth does not show are grey. UsageError where matplotlib is not installed.
    """
    check_drawing()
    from matplotlib.figure import Figure

    pixels = confusion.truth_pixels[:, None]
    shares = 100 * np.ma.masked_array(
        confusion.counts / np.maximum(pixels, 1), np.broadcast_to(pixels == 0, confusion.counts.shape)
    )
    count = len(classes)
    side = min(2.5 + 0.45 * count, 20.0)
    figure = Figure(figsize=(side + 1, side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    colors = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_facecolor("0.9")
    figure.colorbar(colors, label="percent of the true class", shrink=0.8)
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth")
    axes.set_xticks(range(count), classes, rotation=90 if count > 4 else 0)
    axes.set_yticks(range(count), classes)
    if count <= LEGIBLE:
        for row, col in np.argwhere(~np.ma.getmaskarray(shares)):
            share = float(shares[row, col])
            color = "white" if share > 50 else "black"
            axes.text(col, row, _percent(share), ha="center", va="center", color=color, fontsize=7)
    figure.savefig(path)
    return Path(path)


def _percent(share: float) -> str:
    """A percentage in few characters: nothing is lost in rounding to 0 or to 100.

    >>> _percent(0), _percent(0.02), _percent(41.7), _percent(99.97), _percent(100)
    ('0', '<1', '42', '>99', '100')
    """
    if 0 < share < 0.5:
        return "<1"
    return ">99" if 99.5 <= share < 100 else f"{share:.0f}"
