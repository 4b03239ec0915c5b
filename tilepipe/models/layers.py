"""What the presets share: layers with batch normalisation, upsampling, first weights, checks of arguments and sides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tilepipe.errors import GeometryError, ModelError

UPSAMPLINGS = ("unpool", "nearest", "bilinear")
"""How a decoder stage may undo a 2x2 pooling."""


def conv_norm(incoming: int, outgoing: int, kernel: int, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size, in groups of channels, and its batch normalisation."""
    conv = nn.Conv2d(incoming, outgoing, kernel, padding=kernel // 2, groups=groups)
    return [conv, nn.BatchNorm2d(outgoing)]


def conv_stage(widths: list[int]) -> nn.Sequential:
    """3x3 convolutions from each width to the next, each with batch normalisation and ReLU."""
    layers: list[nn.Module] = []
    for incoming, outgoing in pairwise(widths):
        layers += [*conv_norm(incoming, outgoing, 3), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def check_upsampling(how: str) -> None:
    """Nothing; raises ModelError where `how` is not one of UPSAMPLINGS."""
    if how not in UPSAMPLINGS:
        raise ModelError(f"upsampling {how!r} is not known; use one of {', '.join(UPSAMPLINGS)}")


def upsample(x: Tensor, indices: Tensor, size: tuple[int, ...], how: str) -> Tensor:
    """The map (N, C, rows, columns) of `size` (rows, columns) from one that a 2x2 pooling made of such a size.

    `how`: "unpool" puts each value where `indices` say that the pooling found it, zeros elsewhere; "nearest" and
    "bilinear" interpolate and ignore `indices`.
    """
    if how == "unpool":
        return F.max_unpool2d(x, indices, (2, 2), (2, 2), output_size=size)
    return F.interpolate(x, size=size, mode=how)


def scaled(published: int, width: float) -> int:
    """The number of features, at least 1, of a layer that has `published` of them at width 1."""
    return max(1, round(published * width))


def check_numbers(name: str, width: float, **counts: int) -> None:
    """Nothing; raises ModelError for a width or a number of classes or bands that no network can have."""
    for what, count in counts.items():
        if count < 1:
            raise ModelError(f"{name}: {what} {count} cannot be; use 1 or more")
    if not 0.0 < width <= 16.0:
        raise ModelError(f"{name}: width {width} is not legal; choose a factor above 0, up to 16")


def initialise(network: nn.Module) -> None:
    """Draws the convolutions' weights so that ReLU layers keep the variance (He et al., arXiv 1502.01852).

    A transposed convolution of stride 1 reads kernel area x incoming features too: torch's "fan_out" of its weights.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not module.weight.is_meta:
            mode: Literal["fan_in", "fan_out"] = "fan_out" if isinstance(module, nn.ConvTranspose2d) else "fan_in"
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_sides(shape: Sequence[int], name: str, step: int, least: int | None = None) -> None:
    """Nothing; raises GeometryError where a side of (N, C, H, W) is not `least` + n x `step`, which it names.

    `least` is the smallest legal side; None stands for one step. A module that calls this says
    `torch.fx.wrap("check_sides")`, so that its networks can be traced.
    """
    least = step if least is None else least
    for axis, side in zip(("rows", "columns"), shape[-2:], strict=True):
        if side < least or (side - least) % step:
            below = least + (side - least) // step * step
            nearest = f"{below} and {below + step}" if below >= least else f"{least}"
            legal = f"multiples of {step}" if least == step else f"{least} + {step}n"
            raise GeometryError(f"{name} cannot take {side} {axis}; legal are {legal}, nearest {nearest}")
