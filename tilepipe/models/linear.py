"""A linear classifier of single pixels: one 1x1 convolution, the least that a network can be.

It looks at nothing around a pixel, so its reach is 0 and every size is legal: a baseline for accuracy, and a network
that is nearly free, with which everything around the network can be measured.
"""

from __future__ import annotations

from torch import Tensor, nn


class Linear(nn.Module):
    """Class scores (N, classes, H, W) of pixels (N, bands, H, W), each pixel by itself."""

    def __init__(self, classes: int = 2, bands: int = 3) -> None:
        super().__init__()
        self.scores = nn.Conv2d(bands, classes, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores of shape (N, classes, H, W)."""
        return self.scores(pixels)
