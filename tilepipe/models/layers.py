"""What the presets share: convolutions with batch normalisation, first weights, and the check of an input's sides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from tilepipe.errors import GeometryError


def conv_norm(incoming: int, outgoing: int, kernel: int) -> list[nn.Module]:
    """A convolution that keeps the size, and its batch normalisation."""
    return [nn.Conv2d(incoming, outgoing, kernel, padding=kernel // 2), nn.BatchNorm2d(outgoing)]


def conv_stage(widths: list[int]) -> nn.Sequential:
    """3x3 convolutions from each width to the next, each with batch normalisation and ReLU."""
    layers: list[nn.Module] = []
    for incoming, outgoing in pairwise(widths):
        layers += [*conv_norm(incoming, outgoing, 3), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def initialise(network: nn.Module) -> None:
    """Draws the convolutions' weights so that ReLU layers keep the variance (He et al., arXiv 1502.01852)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
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
