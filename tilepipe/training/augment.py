"""What is done to a window's pixels: resampling, rotation, quarter turns and mirroring, jitter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tilepipe.errors import UsageError
from tilepipe.window import Interval, Window

_WHOLE = 1 - 1e-4
"""Of the weights that a resampled pixel is made with: the share that must be valid, up to float32's rounding."""


class Layers(NamedTuple):
    """An image and what goes with it, pixel by pixel."""

    image: Tensor
    """float32 (bands, rows, columns)."""
    valid: Tensor | None
    """bool (rows, columns); None for everywhere."""
    targets: Tensor
    """int64 (rows, columns)."""


def widened(window: Window, shape: tuple[int, int], angle: float) -> tuple[Window, tuple[int, int]]:
    """What must be read to show `window`, resampled to `shape`, turned by `angle` degrees about its centre.

    (a window of the same centre, the (rows, columns) that it is to be resampled to before it is turned.)
    """
    if angle == 0:
        return window, shape
    cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    rows, cols = shape
    # One pixel to each side serves bilinear interpolation.
    wide = math.ceil(rows * cos + cols * sin) + 2, math.ceil(rows * sin + cols * cos) + 2
    return Window(_grown(window.rows, wide[0] / rows), _grown(window.cols, wide[1] / cols)), wide


def resampled(layers: Layers, shape: tuple[int, int]) -> Layers:
    """The layers in `shape`: the image bilinear and antialiased, valid where all is valid, targets by nearest."""
    if layers.targets.shape == shape:
        return layers
    rows, cols = (
        ((torch.arange(to) + 0.5) * (size / to)).long().clamp_(max=size - 1)
        for size, to in zip(layers.targets.shape, shape, strict=True)
    )
    valid = None if layers.valid is None else _resized(layers.valid[None].float(), shape)[0] >= _WHOLE
    return Layers(_resized(layers.image, shape), valid, layers.targets[rows[:, None], cols])


def rotated(layers: Layers, shape: tuple[int, int], angle: float) -> Layers:
    """The middle `shape` of the layers once turned by `angle` degrees counter-clockwise; nothing for 0."""
    if angle == 0:
        return layers
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    (height, width), (rows, cols) = layers.targets.shape, shape
    # Rows point downwards; coordinates count from -1 to 1 along each axis.
    matrix = [[cos * cols / width, -sin * rows / width, 0], [sin * cols / height, cos * rows / height, 0]]
    grid = F.affine_grid(torch.tensor([matrix]), [1, 1, rows, cols], align_corners=False)
    image = F.grid_sample(layers.image[None], grid, "bilinear", "border", align_corners=False)[0]
    targets = F.grid_sample(layers.targets[None, None].float(), grid, "nearest", "border", align_corners=False)
    valid = None
    if layers.valid is not None:
        share = F.grid_sample(layers.valid[None, None].float(), grid, "bilinear", "border", align_corners=False)
        valid = share[0, 0] >= _WHOLE
    return Layers(image, valid, targets[0, 0].long())


def oriented(layers: Layers, turns: int, mirrored: bool) -> Layers:
    """The layers after so many quarter turns counter-clockwise, then mirrored left to right or not; exact."""

    def turn(plane: Tensor) -> Tensor:
        plane = torch.rot90(plane, turns, (-2, -1)) if turns else plane
        return plane.flip(-1) if mirrored else plane

    return Layers(turn(layers.image), None if layers.valid is None else turn(layers.valid), turn(layers.targets))


def filled(values: NDArray[Any], valid: NDArray[np.bool_], mean: Tensor) -> tuple[Tensor, Tensor | None]:
    """(image, valid): float32, the mean where not valid, so that resampling spreads nothing else from there."""
    image = torch.from_numpy(values.astype(np.float32))
    if valid.all():
        return image, None
    kept = torch.from_numpy(valid)
    return torch.where(kept, image, mean), kept


class Jitter:
    """A v2 transform whose random numbers come from a seed alone; of strength 0 it does nothing.

    Colour images are RGB in 0..1, others normalised.
    """

    def __init__(self, strength: float, colour: bool) -> None:
        self._transform: Callable[[Tensor], Tensor] | None = None
        if strength > 0:
            self._transform = _transform(strength, colour)

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """The image (bands, rows, columns), changed as `seed` says."""
        if self._transform is None:
            return image
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._transform(image)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread, so that sums have one order in every process."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _transform(strength: float, colour: bool) -> Any:
    try:
        from tilepipe.training.jitter import BandJitter, color_jitter
    except ImportError:
        raise UsageError(
            "jitter needs torchvision, of the train extra: pip install 'tilepipe[train]', or set jitter to 0"
        ) from None
    return color_jitter(strength) if colour else BandJitter(strength)


def _grown(axis: Interval, factor: float) -> Interval:
    """About `factor` times as long, with the very same centre."""
    more = max(0, math.ceil(len(axis) * (factor - 1) / 2))
    return axis.grow(more, more)


def _resized(planes: Tensor, shape: tuple[int, int]) -> Tensor:
    return F.interpolate(planes[None], shape, mode="bilinear", antialias=True, align_corners=False)[0]
