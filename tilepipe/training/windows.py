"""Which window a training step's item shows, and how it is turned: pure functions of a seed and the item's number.

Item k of a run is the same whatever the number of workers and wherever the run was resumed, since its random numbers
come from a generator that is counted, not drawn on: Philox (Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3", 2011) with the seed as key and the item's number in its counter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np

from tilepipe.errors import UsageError
from tilepipe.window import Interval, Window

Flips = Literal["none", "horizontal", "d4"]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How windows are varied before the network sees them."""

    crop: tuple[int, int]
    """(rows, columns) that the network sees."""
    flips: Flips = "none"
    """horizontal: mirrored or not; d4: also turned by quarters. Exact: no pixel is resampled."""
    rotate: float = 0.0
    """Degrees; the angle is uniform in -rotate..rotate."""
    scales: tuple[float, float] = (1.0, 1.0)
    """(least, most): a window has this many times the crop's rows and columns and is resampled to the crop, so its
    pixels become as many times larger on the ground; the logarithm is uniform."""
    jitter: float = 0.0
    """Strength of changes of brightness, contrast and colour, 0 to 1."""

    def __post_init__(self) -> None:
        if min(self.crop) < 1:
            raise UsageError(
                f"a crop of {self.crop[0]} x {self.crop[1]} is not legal; each side needs at least 1 pixel"
            )
        if self.flips not in get_args(Flips):
            raise UsageError(f"flips {self.flips!r} are unknown; legal are {', '.join(get_args(Flips))}")
        if not 0 <= self.rotate <= 180:
            raise UsageError(f"a rotation of {self.rotate} degrees is not legal; choose 0 to 180")
        check_scales(self.scales)
        if not 0 <= self.jitter <= 1:
            raise UsageError(f"a jitter of {self.jitter} is not legal; choose 0 (none) to 1")


@dataclass(frozen=True, slots=True)
class Draw:
    """What one item shows."""

    pair: int
    """The pair's place in the data set."""
    window: Window
    """In the pair's pixels, before it is rotated about its centre; it may reach beyond the raster. Where `turns` is
    odd it has the crop's rows and columns exchanged."""
    angle: float
    """Degrees, counter-clockwise."""
    turns: int
    """Quarter turns counter-clockwise, after the rotation."""
    mirrored: bool
    """Whether left and right are exchanged at the end."""
    seed: int
    """Of the jitter."""


class Draws(Protocol):
    """A rule that gives each item its window."""

    def __call__(self, index: int, attempt: int = 0) -> Draw:
        """The draw of item `index`; higher attempts are others, for when it shows nothing that is labelled."""
        ...


def random_of(seed: int, index: int, attempt: int = 0) -> np.random.Generator:
    """The random numbers of one item, independent of all others'."""
    return np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, attempt, index]))


@dataclass(frozen=True, slots=True)
class UniformDraws:
    """Windows anywhere: an image is drawn by its number of pixels, and a place in it evenly.

    Drawn by pixels, not by places that the window has, small images are not lost to large ones where windows are
    large. Along an axis that is shorter than the window, the image lies wholly in the window, anywhere.
    """

    shapes: tuple[tuple[int, int], ...]
    """(rows, columns) of each pair."""
    augmentation: Augmentation
    seed: int

    def __call__(self, index: int, attempt: int = 0) -> Draw:
        """The draw of item `index`."""
        random = random_of(self.seed, index, attempt)
        areas = np.cumsum([rows * cols for rows, cols in self.shapes])
        pair = int(np.searchsorted(areas, random.integers(areas[-1]), side="right"))
        turns, mirrored = drawn_flip(random, self.augmentation.flips)
        scale = drawn_scale(random, self.augmentation.scales)
        window = Window(
            *(
                _placed(random, length, max(1, round(side * scale)))
                for length, side in zip(self.shapes[pair], turned(self.augmentation.crop, turns), strict=True)
            )
        )
        return draw_of(random, pair, window, self.augmentation, (turns, mirrored))


def draw_of(
    random: np.random.Generator, pair: int, window: Window, augmentation: Augmentation, flip: tuple[int, bool]
) -> Draw:
    """The draw of a window, with what is left to draw for it."""
    angle = float(random.uniform(-augmentation.rotate, augmentation.rotate)) if augmentation.rotate else 0.0
    return Draw(pair, window, angle, *flip, int(random.integers(2**63)))


def drawn_flip(random: np.random.Generator, flips: Flips) -> tuple[int, bool]:
    """(quarter turns, mirrored): evenly among those that `flips` names."""
    turns, mirrored = int(random.integers(4)), bool(random.integers(2))
    return turns if flips == "d4" else 0, mirrored and flips != "none"


def drawn_scale(random: np.random.Generator, scales: tuple[float, float]) -> float:
    """A number between both whose logarithm is uniform."""
    return math.exp(random.uniform(math.log(scales[0]), math.log(scales[1])))


def turned(shape: tuple[int, int], turns: int) -> tuple[int, int]:
    """(rows, columns) before so many quarter turns make it `shape`."""
    return shape if turns % 2 == 0 else (shape[1], shape[0])


def check_scales(scales: Sequence[float]) -> None:
    """Nothing; UsageError where these are no least and most scale."""
    if len(scales) != 2 or not 0 < scales[0] <= scales[1] < math.inf:
        told = ",".join(f"{value:g}" for value in scales)
        raise UsageError(f"scales {told} are not legal; give two numbers above 0, the lesser first, such as 0.5,2")


def _placed(random: np.random.Generator, length: int, side: int) -> Interval:
    """An interval of `side` pixels within an axis, or around one that is shorter; all places are equally likely."""
    free = length - side
    start = int(random.integers(min(0, free), max(0, free), endpoint=True))
    return Interval(start, start + side)
