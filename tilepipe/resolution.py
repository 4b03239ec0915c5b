"""Ground sizes of pixels: those that a model was trained on, and how far a raster's is from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Resolution = float | tuple[float, float]
"""Ground size of training pixels in metres: one, or the least and the greatest."""


def is_resolution(value: Any) -> bool:
    """Whether a value is a positive number, or two with the lesser first."""
    several = isinstance(value, list | tuple)
    if several and len(value) != 2:
        return False
    numbers = value if several else (value,)
    if not all(type(each) in (int, float) for each in numbers):
        return False
    return bool(0 < numbers[0] <= numbers[-1] < float("inf"))


def span(resolution: Resolution) -> tuple[float, float]:
    """(least, greatest)."""
    return resolution if isinstance(resolution, tuple) else (resolution, resolution)


def spelled(resolution: float | Sequence[float] | None) -> str:
    """A resolution in words: "0.3 m", "0.075 to 0.3 m", "any size"."""
    if resolution is None:
        return "any size"
    numbers = [resolution] if isinstance(resolution, int | float) else resolution
    return " to ".join(f"{each:.3g}" for each in numbers) + " m"


def nearest(trained: Resolution, actual: float) -> float:
    """The size of pixels that a model knows, in metres, that differs least from the actual one."""
    least, greatest = span(trained)
    return min(max(actual, least), greatest)


def mismatch(trained: Resolution | None, actual: float | None) -> float:
    """By what factor the actual size differs from the nearest that a model knows; 1 where either is unknown."""
    if trained is None or not actual:
        return 1.0
    known = nearest(trained, actual)
    return max(known / actual, actual / known)
