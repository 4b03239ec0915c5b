"""Random changes of brightness, contrast and colour, as torchvision's v2 transforms; for this it is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

HUE = 0.25
"""Of the strength: hue is turned by at most this share of it, where 0.5 reaches the opposite colour."""


class BandJitter(v2.Transform):
    """Each band gets a gain and an offset of its own.

    For normalised images (bands, rows, columns): the gain, uniform in 1 - strength to 1 + strength, is about the
    band's mean; the offset, uniform in -strength to strength, counts in its standard deviations.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Tensor]:
        """Gain and offset of each band, from torch's random numbers."""
        bands = flat_inputs[0].shape[-3]
        gain, offset = (torch.rand(2, bands, 1, 1) * 2 - 1) * self.strength
        return {"gain": 1 + gain, "offset": offset}

    def transform(self, inpt: Tensor, params: dict[str, Tensor]) -> Tensor:
        """The image with these gains and offsets."""
        return inpt * params["gain"] + params["offset"]


def color_jitter(strength: float) -> Any:
    """Brightness, contrast and saturation by 1 - strength to 1 + strength, hue less, in any order; of RGB in 0..1."""
    return v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength, hue=HUE * strength)
