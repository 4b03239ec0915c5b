"""SegNet: an encoder whose pooling indices place the decoder's features.

Badrinarayanan, Kendall and Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation" (arXiv 1511.00561), with the layer table of the authors' published definition.

    SegNet, width 1            encoder (VGG16)          decoder (mirrored)
    stage 1, full size         64, 64         pool      unpool   64, classes
    stage 2, 1/2               128, 128       pool      unpool   128, 64
    stage 3, 1/4               256, 256, 256  pool      unpool   256, 256, 128
    stage 4, 1/8               512, 512, 512  pool      unpool   512, 512, 256
    stage 5, 1/16              512, 512, 512  pool      unpool   512, 512, 512

Every convolution is 3x3 with padding 1, batch normalisation and ReLU; the last one gives the class scores bare. At 11
classes and 3 bands that are 29,449,355 parameters. `upsample` puts interpolation in the place of unpooling: "nearest"
repeats every feature, 2x2, and "bilinear" interpolates by 2, so that switches and repetition can be compared.
Legal sizes are 32n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx
from torch import Tensor, nn

from tilepipe.models.layers import (
    check_numbers,
    check_sides,
    check_upsampling,
    conv_stage,
    initialise,
    scaled,
)
from tilepipe.models.partial import Unpooling, cropped, decoded_part, whole
from tilepipe.models.pooling import pools, unpools
from tilepipe.models.vgg import VGG16_STAGES
from tilepipe.window import Window

torch.fx.wrap("check_sides")


@dataclass(frozen=True, slots=True)
class SegNetConfig:
    """What a SegNet, or a form of SegNet-Basic, is made from."""

    classes: int = 11
    """Number of scores per pixel."""
    bands: int = 3
    """Number of input channels."""
    width: float = 1.0
    """Factor on every layer's number of features, rounded, at least 1; 1 is the published network."""
    upsample: str = "unpool"
    """How SegNet's decoder undoes a pooling, one of UPSAMPLINGS."""

    def __post_init__(self) -> None:
        check_numbers("SegNet", self.width, classes=self.classes, bands=self.bands)
        check_upsampling(self.upsample)

    def features(self, published: int) -> int:
        """The number of features of a layer that has `published` of them at width 1."""
        return scaled(published, self.width)


class SegNet(nn.Module):
    """Class scores (N, classes, H, W) of images (N, bands, H, W) whose sides are multiples of 32."""

    def __init__(self, config: SegNetConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.ModuleList()
        self.decoder = nn.ModuleList()
        incoming = config.bands
        for stage in VGG16_STAGES:
            widths = [incoming, *map(config.features, stage)]
            self.encoder.append(conv_stage(widths))
            incoming = widths[-1]
        for stage, above in zip(VGG16_STAGES[:0:-1], VGG16_STAGES[-2::-1], strict=True):
            self.decoder.append(conv_stage([*map(config.features, stage), config.features(above[-1])]))
        last = config.features(VGG16_STAGES[0][0])
        self.decoder.append(conv_stage([last, last]))
        self.classifier = nn.Conv2d(last, config.classes, 3, padding=1)
        self.pools, self.unpools = pools(len(VGG16_STAGES)), unpools(len(VGG16_STAGES), config.upsample)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, before any softmax."""
        x, unpoolings = self._encoded(x)
        for stage, unpool, (indices, size, _) in zip(self.decoder, self.unpools, unpoolings, strict=True):
            x = stage(unpool(x, indices, size))
        return self.classifier(x)

    def forward_part(self, x: Tensor, part: Window) -> Tensor:
        """What `forward` gives in `part` of its output: (N, classes, *part.shape)."""
        if self.config.upsample != "unpool":
            return cropped(self(x), whole(x), part)
        x, unpoolings = self._encoded(x)
        return decoded_part(x, unpoolings, list(zip(self.unpools, self.decoder, strict=True)), self.classifier, part)

    def _encoded(self, x: Tensor) -> tuple[Tensor, list[Unpooling]]:
        """The innermost map, and what the decoder's stages need, from the innermost on."""
        check_sides(x.shape, "SegNet", 32)
        unpoolings: list[Unpooling] = []
        for stage, pool in zip(self.encoder, self.pools, strict=True):
            x = stage(x)
            size = x.shape[-2:]
            x, indices = pool(x)
            unpoolings.insert(0, Unpooling(indices, size))
        return x, unpoolings


def segnet(classes: int = 11, bands: int = 3, width: float = 1.0, upsample: str = "unpool") -> SegNet:
    """A SegNet with random weights; 29,449,355 parameters as published (11 classes, 3 bands, width 1)."""
    return SegNet(SegNetConfig(classes, bands, width, upsample))
