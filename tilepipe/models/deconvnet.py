"""DeconvNet: VGG16 to a single place per 224 pixels, and its mirror image back to full resolution.

Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation" (arXiv 1505.04366, table 2), width 1 and
an image of 224 x 224:

    encoder (VGG16)                                decoder (mirrored)
    stage 1, 224    64, 64            pool         unpool    64, 64
    stage 2, 112    128, 128          pool         unpool    128, 64
    stage 3, 56     256, 256, 256     pool         unpool    256, 256, 128
    stage 4, 28     512, 512, 512     pool         unpool    512, 512, 256
    stage 5, 14     512, 512, 512     pool         unpool    512, 512, 512
    fc6, 7 to 1     4096, 7x7 without padding      fc6-deconv, 1 to 7    512, 7x7
    fc7, 1          4096, 1x1, whose result goes to fc6-deconv
    output, 224     1x1 to the classes, bare

Convolutions of the encoder are 3x3 with padding 1, those of the decoder are transposed, 3x3 with padding 1. Each but
the output has batch normalisation and ReLU; dropout of 0.5 is behind fc6 and fc7. Unpooling puts values where the
mirrored pooling found its maxima. Fully convolutional, it takes 224 + 32n.

`extra_stages` puts more stages like the fifth in between, mirrored in the decoder, for larger windows: fc6 then looks
at what 5 + extra_stages poolings leave of `size`, its kernel is size / 2^(5 + extra_stages), and the legal sizes are
size + 2^(5 + extra_stages) n. Two extra stages and size 512 give a kernel of 4 and 512 + 128n.

Parameters at 21 classes and 3 bands: VGG16's convolutions 14,714,688, fc6 102,764,544, fc7 16,781,312, fc6-deconv
102,760,960, decoder 14,749,376, output 1,365, normalisations 33,408; together 251,805,653.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.fx
from torch import Tensor, nn

from tilepipe.errors import ModelError
from tilepipe.models.layers import check_numbers, check_sides, check_upsampling, initialise, scaled
from tilepipe.models.pooling import pools, unpools
from tilepipe.models.vgg import DROPOUT, FC_SIZE, FC_WIDTH, VGG16_STAGES, normalised_encoder, stage_widths

torch.fx.wrap("check_sides")

MOST_EXTRA_STAGES = 5


@dataclass(frozen=True, slots=True)
class DeconvNetConfig:
    """What a DeconvNet is made from."""

    classes: int = 21
    """Number of scores per pixel."""
    bands: int = 3
    """Number of input channels."""
    width: float = 1.0
    """Factor on every layer's number of features, rounded, at least 1; 1 is the published network."""
    fc_width: int = FC_WIDTH
    """Features of fc6 and fc7 at width 1; 1024 makes a network of an eighth of the parameters there."""
    extra_stages: int = 0
    """Stages of convolutions and pooling beyond VGG16's five, mirrored in the decoder."""
    size: int | None = None
    """The smallest window, rows and columns; None: what leaves 7x7 to fc6, so 224 without extra stages."""
    upsample: str = "unpool"
    """How the decoder undoes a pooling: one of `tilepipe.models.layers.UPSAMPLINGS`."""

    def __post_init__(self) -> None:
        check_numbers("DeconvNet", self.width, classes=self.classes, bands=self.bands, fc_width=self.fc_width)
        check_upsampling(self.upsample)
        if not 0 <= self.extra_stages <= MOST_EXTRA_STAGES:
            raise ModelError(
                f"DeconvNet with {self.extra_stages} extra stages is not legal; choose 0 to {MOST_EXTRA_STAGES}"
            )
        if self.size is not None and (self.size < self.step or self.size % self.step):
            below = max(self.step, self.size // self.step * self.step)
            raise ModelError(
                f"DeconvNet size {self.size} with {self.extra_stages} extra stages is not legal; "
                f"choose a multiple of {self.step}, such as {below} or {below + self.step}"
            )

    @property
    def step(self) -> int:
        """Pixels from one legal size to the next: the product of the poolings' strides."""
        return 2 ** (len(VGG16_STAGES) + self.extra_stages)

    @property
    def kernel(self) -> int:
        """Rows and columns of the maps that fc6 looks at."""
        return FC_SIZE if self.size is None else self.size // self.step


class DeconvNet(nn.Module):
    """Class scores (N, classes, H, W) of images (N, bands, H, W) whose sides are 224 + 32n."""

    def __init__(self, config: DeconvNetConfig) -> None:
        super().__init__()
        self.config = config
        stages = stage_widths(config.bands, config.width, config.extra_stages)
        narrow, wide, kernel = stages[-1][-1], scaled(config.fc_width, config.width), config.kernel
        self.encoder = normalised_encoder(stages)
        self.fc6 = nn.Sequential(*_normalised(nn.Conv2d(narrow, wide, kernel), wide), nn.Dropout(DROPOUT))
        self.fc7 = nn.Sequential(*_normalised(nn.Conv2d(wide, wide, 1), wide), nn.Dropout(DROPOUT))
        self.fc6_deconv = nn.Sequential(*_normalised(nn.ConvTranspose2d(wide, narrow, kernel), narrow))
        first = stages[0][1]
        self.decoder = nn.ModuleList(_deconv_stage([*reversed(widths[1:]), widths[0]]) for widths in stages[:0:-1])
        self.decoder.append(_deconv_stage([first, first, first]))
        self.classifier = nn.Conv2d(first, config.classes, 1)
        self.pools, self.unpools = pools(len(stages)), unpools(len(stages), config.upsample)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, before any softmax."""
        step = self.config.step
        check_sides(x.shape, "DeconvNet", step, self.config.kernel * step)
        places = []
        for stage, pool in zip(self.encoder, self.pools, strict=True):
            x = stage(x)
            size = x.shape[-2:]
            x, indices = pool(x)
            places.append((indices, size))
        x = self.fc6_deconv(self.fc7(self.fc6(x)))
        for stage, unpool, (indices, size) in zip(self.decoder, self.unpools, reversed(places), strict=True):
            x = stage(unpool(x, indices, size))
        return self.classifier(x)


def _normalised(layer: nn.Module, features: int) -> list[nn.Module]:
    """A convolution of `features`, its batch normalisation and ReLU."""
    return [layer, nn.BatchNorm2d(features), nn.ReLU(inplace=True)]


def _deconv_stage(widths: list[int]) -> nn.Sequential:
    """3x3 transposed convolutions that keep the size, from each width to the next, with normalisation and ReLU."""
    layers: list[nn.Module] = []
    for incoming, outgoing in pairwise(widths):
        layers += _normalised(nn.ConvTranspose2d(incoming, outgoing, 3, padding=1), outgoing)
    return nn.Sequential(*layers)


def deconvnet(
    classes: int = 21,
    bands: int = 3,
    width: float = 1.0,
    fc_width: int = FC_WIDTH,
    extra_stages: int = 0,
    size: int | None = None,
    upsample: str = "unpool",
) -> DeconvNet:
    """A DeconvNet with random weights; 251,805,653 parameters (21 classes, 3 bands, width 1).

    The options are DeconvNetConfig's. Raises ModelError for numbers that do not go together.
    """
    return DeconvNet(DeconvNetConfig(classes, bands, width, fc_width, extra_stages, size, upsample))
