"""Small networks that cannot be tiled exactly, or have no geometry at all, each for one reason."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


class Aligned(nn.Module):
    """Pooling and upsampling with aligned corners: every size has a ratio of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
        self.up = nn.UpsamplingBilinear2d(scale_factor=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.up(F.max_pool2d(self.a(x), 2)))


class Circular(nn.Module):
    """Padding that wraps around the raster."""

    def __init__(self) -> None:
        super().__init__()
        self.wrap = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wrap(x)


class Coordinates(nn.Module):
    """Row and column numbers as further channels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, cols = x.shape[2:]
        y = torch.linspace(-1, 1, rows).view(1, 1, rows, 1).expand(1, 1, rows, cols).to(x)
        z = torch.linspace(-1, 1, cols).view(1, 1, 1, cols).expand(1, 1, rows, cols).to(x)
        return self.head(torch.cat([x, y, z], 1))


class Squeeze(nn.Module):
    """Channels weighted by their mean over the map (squeeze and excitation)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return x * torch.sigmoid(self.b(self.pool(x)))


class Attention(nn.Module):
    """Every place compared with every other, at an eighth of the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 4, 8, stride=8)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up = nn.ConvTranspose2d(4, 2, 8, stride=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens, _ = self.attend(tokens, tokens, tokens, need_weights=False)
        return self.up(tokens.transpose(1, 2).reshape(x.shape))


def instance_norm() -> nn.Module:
    """Statistics of the tile itself, per channel."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 1))


def group_norm() -> nn.Module:
    """Statistics of the tile itself, per group of channels."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))


def batch_norm_without_statistics() -> nn.Module:
    """Batch normalisation that has nothing stored and normalises by the tile."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False))


class Positional(nn.Module):
    """A learned offset for each place: one input size."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 2, 3, padding=1)
        self.offset = nn.Parameter(torch.randn(1, 2, 48, 48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.offset


class FixedSize(nn.Module):
    """Linear layers over the whole map: one input size."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 3, 4, stride=4), nn.ConvTranspose2d(3, 2, 4, stride=4)
        self.linear = nn.Linear(3 * (size // 4) ** 2, 3 * (size // 4) ** 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        return self.up(self.linear(x.flatten(1)).view(x.shape))


class Unknown(nn.Module):
    """Uses an operator that no table lists."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(self.a(x), torch.linspace(0, 1, 5)).float()


class Deciding(nn.Module):
    """Looks at pixel values to decide what to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if x.mean() > 0 else self.a(-x)


BLENDED: dict[str, tuple[Callable[[], nn.Module], int, str, str]] = {
    "aligned": (Aligned, 1, "up (UpsamplingBilinear2d)", "aligned corners"),
    "circular": (Circular, 1, "wrap (Conv2d)", "circular padding"),
    "coordinates": (Coordinates, 1, "Coordinates", "coordinates"),
    "squeeze": (Squeeze, 1, "pool (AdaptiveAvgPool2d)", "combines all rows or columns"),
    "attention": (Attention, 1, "attend (MultiheadAttention)", "attention"),
    "instance-norm": (instance_norm, 1, "1 (InstanceNorm2d)", "its own input"),
    "group-norm": (group_norm, 1, "1 (GroupNorm)", "its own input"),
    "batch-norm": (batch_norm_without_statistics, 1, "1 (BatchNorm2d)", "its own input"),
    "positional": (Positional, 1, "Positional", "48"),
    "fixed-size": (FixedSize, 1, "linear (Linear)", "32"),
}
"""Networks that do not: how to make each, its input channels, the layer to blame, and a word of the reason."""
