"""Scale bars: a round length that is a fair part of a picture's width."""

from __future__ import annotations

import math
from typing import NamedTuple

from tilepipe.ground import pixel_width
from tilepipe.pictures.view import View
from tilepipe.store.spec import StoreSpec

SHARE = 0.3
"""Of a panel's width, at most."""


class ScaleBar(NamedTuple):
    """A bar and what it stands for."""

    share: float
    """Of the picture's width."""
    text: str


def scale_bar(spec: StoreSpec, view: View) -> ScaleBar:
    """The bar of a view: metres in the middle of its window, or pixels of a map whose place is unknown."""
    rows, cols = view.window.rows, view.window.cols
    width = pixel_width(spec, (rows.start + rows.stop) / 2, (cols.start + cols.stop) / 2)
    if width is None:
        length = max(1.0, round_length(SHARE * len(cols)))
        return ScaleBar(length / len(cols), f"{length:.0f} px")
    length = round_length(SHARE * len(cols) * width)
    return ScaleBar(length / (len(cols) * width), metres(length))


def round_length(most: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is at most `most`.

    >>> round_length(93), round_length(0.35), round_length(1000)
    (50.0, 0.2, 1000.0)
    """
    power = 10.0 ** math.floor(math.log10(most))
    # A bound that is itself round must not fall to the next one by rounding.
    return max(factor * power for factor in (1, 2, 5) if factor * power <= most * (1 + 1e-9))


def metres(length: float) -> str:
    """A length in the unit that fits it.

    >>> metres(5000), metres(20), metres(0.5), metres(0.002), metres(1e-5)
    ('5 km', '20 m', '50 cm', '2 mm', '1e-05 m')
    """
    for unit, scale in (("km", 1e3), ("m", 1.0), ("cm", 1e-2), ("mm", 1e-3)):
        if length >= scale * (1 - 1e-9):
            return f"{length / scale:g} {unit}"
    return f"{length:g} m"
