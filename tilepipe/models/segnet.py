"""SegNet and SegNet-Basic: encoders whose pooling indices place the decoder's features.

Badrinarayanan, Kendall and Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation" (arXiv 1511.00561), with the layer tables of the authors' published definitions.

    SegNet, width 1            encoder (VGG16)          decoder (mirrored)
    stage 1, full size         64, 64         pool      unpool   64, classes
    stage 2, 1/2               128, 128       pool      unpool   128, 64
    stage 3, 1/4               256, 256, 256  pool      unpool   256, 256, 128
    stage 4, 1/8               512, 512, 512  pool      unpool   512, 512, 256
    stage 5, 1/16              512, 512, 512  pool      unpool   512, 512, 512

Every convolution is 3x3 with padding 1, batch normalisation and ReLU; the last one gives the class scores bare.
Legal sizes are 32n.

    SegNet-Basic, width 1      64 features everywhere, 7x7 with padding 3 and batch normalisation
    encoder                    four times: convolution, ReLU, pool
    decoder                    four times: unpool, convolution (no bias, no ReLU)
    classifier                 1x1 to the classes

Legal sizes are 16n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from tilepipe.errors import ModelError
from tilepipe.models.layers import check_sides, conv_norm, conv_stage, initialise

torch.fx.wrap("check_sides")

SEGNET_STAGES: tuple[tuple[int, ...], ...] = (
    (64, 64),
    (128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (512, 512, 512),
)
BASIC_STAGES = 4


@dataclass(frozen=True, slots=True)
class SegNetConfig:
    """What a SegNet or SegNet-Basic is made from."""

    classes: int = 11
    """Number of scores per pixel."""
    bands: int = 3
    """Number of input channels."""
    width: float = 1.0
    """Factor on every layer's number of features, rounded, at least 1; 1 is the published network."""

    def __post_init__(self) -> None:
        if self.classes < 1 or self.bands < 1:
            raise ModelError(f"a SegNet of {self.bands} bands and {self.classes} classes cannot be; use 1 or more")
        if not 0.0 < self.width <= 16.0:
            raise ModelError(f"SegNet width {self.width} is not legal; choose a factor above 0, up to 16")

    def features(self, published: int) -> int:
        """The number of features of a layer that has `published` of them at width 1."""
        return max(1, round(published * self.width))


class SegNet(nn.Module):
    """Class scores (N, classes, H, W) of images (N, bands, H, W) whose sides are multiples of 32."""

    def __init__(self, config: SegNetConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.ModuleList()
        self.decoder = nn.ModuleList()
        incoming = config.bands
        for stage in SEGNET_STAGES:
            widths = [incoming, *map(config.features, stage)]
            self.encoder.append(conv_stage(widths))
            incoming = widths[-1]
        for stage, above in zip(SEGNET_STAGES[:0:-1], SEGNET_STAGES[-2::-1], strict=True):
            self.decoder.append(conv_stage([*map(config.features, stage), config.features(above[-1])]))
        last = config.features(SEGNET_STAGES[0][0])
        self.decoder.append(conv_stage([last, last]))
        self.classifier = nn.Conv2d(last, config.classes, 3, padding=1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, before any softmax."""
        check_sides(x.shape, "SegNet", 32)
        return self.classifier(down_and_up(x, self.encoder, self.decoder))


class SegNetBasic(nn.Module):
    """Class scores (N, classes, H, W) of images (N, bands, H, W) whose sides are multiples of 16."""

    def __init__(self, config: SegNetConfig) -> None:
        super().__init__()
        self.config = config
        features = config.features(64)
        self.encoder = nn.ModuleList(
            nn.Sequential(*conv_norm(config.bands if stage == 0 else features, features, 7), nn.ReLU(inplace=True))
            for stage in range(BASIC_STAGES)
        )
        self.decoder = nn.ModuleList(nn.Sequential(*conv_norm(features, features, 7)) for _ in range(BASIC_STAGES))
        self.classifier = nn.Conv2d(features, config.classes, 1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, before any softmax."""
        check_sides(x.shape, "SegNet-Basic", 16)
        return self.classifier(down_and_up(x, self.encoder, self.decoder))


def down_and_up(x: Tensor, encoder: nn.ModuleList, decoder: nn.ModuleList) -> Tensor:
    """The features (N, C, H, W) after all stages: pooled 2x2 behind each encoder stage, put back where they were."""
    places = []
    for stage in encoder:
        x = stage(x)
        size = x.shape[-2:]
        x, indices = F.max_pool2d(x, 2, 2, return_indices=True)
        places.append((indices, size))
    for stage, (indices, size) in zip(decoder, reversed(places), strict=True):
        x = stage(F.max_unpool2d(x, indices, (2, 2), (2, 2), output_size=size))
    return x


def segnet(classes: int = 11, bands: int = 3, width: float = 1.0) -> SegNet:
    """A SegNet with random weights; 29,449,355 parameters as published (11 classes, 3 bands, width 1)."""
    return SegNet(SegNetConfig(classes, bands, width))


def segnet_basic(classes: int = 11, bands: int = 3, width: float = 1.0) -> SegNetBasic:
    """A SegNet-Basic with random weights; 1,416,587 parameters as published (11 classes, 3 bands, width 1)."""
    return SegNetBasic(SegNetConfig(classes, bands, width))
