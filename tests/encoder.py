"""A small SegNet, and networks whose statistics and weights are not the initial ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 5


class Encoder(nn.Module):
    """A small SegNet: two poolings with indices, two unpoolings, batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(3, 8), block(8, 16)])
        self.up = nn.ModuleList([block(16, 8), block(8, 8)])
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = []
        for stage in self.down:
            x, indices = F.max_pool2d(stage(x), 2, return_indices=True)
            pooled.append(indices)
        for stage, indices in zip(self.up, reversed(pooled), strict=True):
            x = stage(F.max_unpool2d(x, indices, 2))
        return self.head(x)


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def fitted(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with batch statistics and weights that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.5, generator=generator)
                module.running_var.uniform_(0.4, 2, generator=generator)
    return network
