"""A folded network's modules replaced by ours for the CPU in float32: convolutions of one kind, poolings with switches.

    ReLU, `Pool`              ->  one pass over the map, which is read alone
    `Unpool`                  ->  one pass that writes every value of the map, zeros included

torch's own take passes over indices of 64 bits. The results have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tilepipe.models.pooling import Pool, Unpool
from tilepipe.predict import switches as kernels
from tilepipe.predict.graphs import Joins, calls_of, has_hooks, pairs_pools, replace_module, traced
from tilepipe.predict.scores import Array
from tilepipe.window import Window


def adapt(network: nn.Module) -> None:
    """Puts, into a folded network in float32, what computes the same sooner, or with the same bits for any size.

    Poolings and unpoolings are those of `tilepipe.models.pooling`, and are replaced together.
    """
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        for module in network.modules():
            if type(module) is nn.Conv2d and module.padding_mode == "zeros" and isinstance(module.padding, tuple):
                module.__class__ = OneKernelConv2d
    if pairs_pools(network):
        _replace_pools(network)


class OneKernelConv2d(nn.Conv2d):
    """A convolution that oneDNN computes whatever the input's size.

    torch hands small inputs to a matrix product whose float32 results differ by column in the last bit. On flat
    ground a pooling would then take its maximum from another pixel in a small tile than in the whole image, and
    max-unpooling would put it elsewhere.
    """

    def _conv_forward(self, pixels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        padding = [side for side in self.padding if isinstance(side, int)]
        return torch.mkldnn_convolution(pixels, weight, bias, padding, self.stride, self.dilation, self.groups)


class SwitchPool(nn.Module):
    """`Pool`, of relu(x) where it says so, with switches of a byte."""

    def __init__(self, relu: bool = False) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(maxima, switches)."""
        half = x.shape[2] // 2, x.shape[3] // 2
        maxima, switches = _empty(x, half, torch.float32), _empty(x, half, torch.uint8)
        for image in zip(_images(x), _images(maxima), _images(switches), strict=True):
            kernels.pool(image[0], self.relu, *image[1:])
        return maxima, switches


class SwitchUnpool(nn.Module):
    """`Unpool` by such switches."""

    def forward(self, x: torch.Tensor, switches: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """The map (N, C, *size)."""
        return self._unpooled(x, switches, (0, 0), (size[0], size[1]))

    def part(self, x: torch.Tensor, switches: torch.Tensor, size: Sequence[int], part: Window) -> torch.Tensor:
        """As `Unpool.part`."""
        return self._unpooled(x, switches, part.origin, (2 * part.shape[0], 2 * part.shape[1]))

    def _unpooled(
        self, x: torch.Tensor, switches: torch.Tensor, origin: tuple[int, int], size: tuple[int, int]
    ) -> torch.Tensor:
        out = _empty(x, size, torch.float32)
        for values, places, image in zip(_images(x), _images(switches), _images(out), strict=True):
            kernels.unpool(values, places, origin, image)
        return out


def _replace_pools(network: nn.Module) -> None:
    modules = dict(network.named_modules(remove_duplicate=False))
    graph = traced(network, lambda module: isinstance(module, Pool | Unpool))
    pooled: dict[nn.Module | None, nn.Module] = {}
    if graph is not None:
        joins = Joins(modules, calls_of(graph, modules))
        relus = [module for module in joins.calls if type(module) is nn.ReLU and not has_hooks(module)]
        pooled = {joins.follower(relu): relu for relu in relus}
    for module in set(modules.values()):
        if isinstance(module, Pool):
            relu = pooled.get(module)
            replace_module(network, module, SwitchPool(relu is not None))
            if relu is not None:
                replace_module(network, relu, nn.Identity())
        elif isinstance(module, Unpool):
            replace_module(network, module, SwitchUnpool())


def _empty(like: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """A map of as many images and channels, and of no values yet."""
    return torch.empty((*like.shape[:2], *size), dtype=dtype, memory_format=torch.channels_last)


def _images(x: torch.Tensor) -> list[Array]:
    """Each image's values, (rows, columns, channels): those of `x` itself where it is channels last."""
    laid_out = x.contiguous(memory_format=torch.channels_last)
    return [image.permute(1, 2, 0).numpy() for image in laid_out]
