"""Test-time augmentation: a network averaged over flips and quarter turns of its input, still tiled exactly.

Flipping a tile whose size is congruent to the raster's puts its pixels on the same alignment grid as flipping the
raster does, so the average over flips of a tile is that of the raster; only the reach grows, since the network now
looks as far to either side as it looked to its wider one. `augmented_geometry` derives that, per axis:

    n input pixels give m outputs at s pixels each; c = n - s m; an aligned core [a, b) needs [s a - L, s b + R).
    Flipped, the core is [m - b, m - a); its aligned hull begins e = (m mod unit) outputs earlier and ends
    (-m mod unit) later. What that needs, flipped back, is [s a + c - s (-m mod unit) - R, s b + c + s e + L).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import gcd
from typing import Any, Literal

import torch
import torch.fx
from torch import Tensor, nn

from tilepipe.checkpoint import Task
from tilepipe.errors import GeometryError
from tilepipe.geometry.network import AxisGeometry, Geometry
from tilepipe.trace import first_map

Group = Literal["flips", "d4"]


class Augmented(nn.Module):
    """A network's mean over the images of its input under a group of symmetries, each turned back.

    "flips": the input, its two reflections, and both; "d4": these and their transposes, eight in all. For a
    segmentation the class probabilities are averaged, and the result is their logarithm, so that a softmax gives
    them back; for a regression the outputs themselves.
    """

    def __init__(self, network: nn.Module, group: Group, task: Task = "segmentation") -> None:
        super().__init__()
        self.network, self.group, self.task = network, group, task
        self.training = False

    def forward(self, pixels: Tensor) -> Tensor:
        """The averaged scores, of the network's own shape; float32 at least."""
        turned = (pixels,) if self.group == "flips" else (pixels, pixels.transpose(2, 3))
        total: Any = None
        for transposed, image in enumerate(turned):
            for axes in ([], [2], [3], [2, 3]):
                scores = torch.flip(_prepared(self.network(torch.flip(image, axes)), self.task), axes)
                scores = scores.transpose(2, 3) if transposed else scores
                total = scores if total is None else total + scores
        return _mean(total, 4 * len(turned), self.task)


# Leaves of a traced graph: they look at types, which a symbolic trace does not know.


def _prepared(output: Any, task: Task) -> Tensor:
    """What is averaged of a network's output, in float32 at least, so that the mean of several loses nothing."""
    scores = first_map(output)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return torch.softmax(scores, 1) if task == "segmentation" else scores


def _mean(total: Tensor, count: int, task: Task) -> Tensor:
    """The averaged scores, from the sum of `count` parts."""
    mean = total / count
    return mean.clamp_min(torch.finfo(mean.dtype).tiny).log() if task == "segmentation" else mean


torch.fx.wrap("_prepared")
torch.fx.wrap("_mean")


def augmented_geometry(geometry: Geometry, group: Group) -> Geometry:
    """The geometry of `Augmented(network, group)`, from the network's own.

    Raises GeometryError where flipped outputs do not lie on the outputs (a network that trims one end more than
    the other), and for "d4" where rows and columns differ.
    """
    if group == "d4" and replace(geometry.rows, reach=None) != replace(geometry.cols, reach=None):
        raise GeometryError(
            f"quarter turns need a network that treats rows ({geometry.rows.sizes}) and columns "
            f"({geometry.cols.sizes}) alike; use --tta flips"
        )
    rows, cols = (_flipped(axis) for axis in geometry.axes)
    if group == "d4" and rows.reach is not None and cols.reach is not None:
        both = max(rows.reach[0], cols.reach[0]), max(rows.reach[1], cols.reach[1])
        rows, cols = replace(rows, reach=both), replace(cols, reach=both)
    return replace(geometry, rows=rows, cols=cols)


def _flipped(axis: AxisGeometry) -> AxisGeometry:
    """The axis of a network averaged over both directions."""
    before, after = axis.trim
    if before != after or (axis.scale > 1 and 2 * axis.offset != axis.shortfall):
        raise GeometryError(
            f"the network's outputs lie {float(axis.offset):g} pixels from the input's start and another distance from "
            "its end, so that flipped outputs fall between the pixels; --tta is not possible with it"
        )
    if axis.reach is None:
        return axis
    left, right = axis.reach
    unit, scale = axis.alignment // axis.scale, axis.scale
    for n in _residues(axis):
        m = axis.output_size(n)
        spare = n - scale * m
        left = max(left, axis.reach[1] - spare + scale * (-m % unit))
        right = max(right, axis.reach[0] + spare + scale * (m % unit))
    return replace(axis, reach=(left, right))


def _residues(axis: AxisGeometry) -> Iterator[int]:
    """Legal sizes, one at least of each residue modulo the alignment."""
    step = axis.sizes.step
    periods = axis.alignment // gcd(step, axis.alignment) if step else 1
    return (least + k * step for least in axis.sizes.minimums for k in range(periods))
