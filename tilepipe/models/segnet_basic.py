"""SegNet-Basic and the decoders that its paper compares it with, on one encoder of four stages.

Badrinarayanan, Kendall and Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation" (arXiv 1511.00561), sections 3.2 and 3.3 and table 1, with the layer table of the authors' published
definition of SegNet-Basic. At width 1, K classes:

    encoder        four times: 7x7 convolution to 64 features, padding 3, batch normalisation, ReLU; 2x2 pooling

                                        each of the four decoder stages                        last layer
    segnet-basic                        unpool; 7x7 convolution, batch normalisation           1x1, 64 to K
    ..-encoder-addition                 the same, plus the encoder's 64 maps of that size      1x1, 64 to K
    ..-single-channel-decoder           unpool; each map convolved by itself, normalised       1x1, 64 to K
    bilinear-interpolation              bilinear interpolation by 2 of K maps
    fcn-basic                           8x8 deconvolution by 2, K to K; plus K encoder maps
    fcn-basic-noaddition                8x8 deconvolution by 2, K to K
    fcn-basic-nodimreduction            8x8 deconvolution by 2, 64 to 64; plus 64 maps         1x1, 64 to K
    fcn-basic-noaddition-nodimreduction 8x8 deconvolution by 2, 64 to 64                       1x1, 64 to K

No decoder has a ReLU. In the FCN forms and the bilinear one, 1x1 convolutions compress the encoder's maps to K before
the decoder gets them, except without dimensionality reduction. What an FCN decoder adds is the output of the pooling
whose size it has reached (figure 3), so the last adds nothing; SegNet's adds what went into the pooling, for it has no
pooled map of full size. Open in the paper and chosen here: deconvolutions have a bias and no normalisation, and start
as bilinear interpolation by 2, whose 4x4 weights lie in the middle of the 8x8 kernel.

Parameters at 11 classes and 3 bands, counted and in millions as table 1 has them. Its figures are multiples of 0.025,
which explains what differs:

    segnet-basic                        1,416,587    1.425     fcn-basic                            646,168    0.65
    ..-encoder-addition                 1,416,587    1.425     fcn-basic-noaddition                 644,023    0.65
    ..-single-channel-decoder             626,315    0.625     fcn-basic-nodimreduction           1,661,835    1.625
    bilinear-interpolation                613,003    0.625     fcn-basic-noaddition-nodimr...     1,661,835    1.625

Legal sizes are 16n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from tilepipe.models.layers import check_sides, conv_norm, initialise
from tilepipe.models.partial import Unpooling, decoded_part
from tilepipe.models.pooling import pools, unpools
from tilepipe.models.segnet import SegNetConfig
from tilepipe.window import Window

torch.fx.wrap("check_sides")

STAGES = 4
STEP = 2**STAGES
FEATURES = 64
KERNEL = 7
DECONVOLUTION = 8
"""Rows and columns of an FCN decoder's kernel."""


@dataclass(frozen=True, slots=True)
class FCNForm:
    """What makes one FCN decoder different from another."""

    addition: bool = True
    """Whether the encoder's pooled maps are added."""
    reduction: bool = True
    """Whether the encoder's maps are compressed to as many as there are classes."""
    learnt: bool = True
    """Whether upsampling is learnt; else it is bilinear interpolation."""


class SegNetBasic(nn.Module):
    """Class scores (N, classes, H, W) of images (N, bands, H, W) whose sides are multiples of 16."""

    def __init__(self, config: SegNetConfig, addition: bool = False, single_channel: bool = False) -> None:
        super().__init__()
        self.config = config
        self.addition = addition
        features = config.features(FEATURES)
        groups = features if single_channel else 1
        self.encoder = basic_encoder(config)
        self.decoder = nn.ModuleList(
            nn.Sequential(*conv_norm(features, features, KERNEL, groups)) for _ in range(STAGES)
        )
        self.classifier = nn.Conv2d(features, config.classes, 1)
        self.pools, self.unpools = pools(STAGES), unpools(STAGES)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, before any softmax."""
        x, unpoolings = self._encoded(x)
        for stage, unpool, (indices, size, added) in zip(self.decoder, self.unpools, unpoolings, strict=True):
            x = stage(unpool(x, indices, size))
            x = x if added is None else x + added
        return self.classifier(x)

    def forward_part(self, x: Tensor, part: Window) -> Tensor:
        """What `forward` gives in `part` of its output: (N, classes, *part.shape)."""
        x, unpoolings = self._encoded(x)
        return decoded_part(x, unpoolings, list(zip(self.unpools, self.decoder, strict=True)), self.classifier, part)

    def _encoded(self, x: Tensor) -> tuple[Tensor, list[Unpooling]]:
        """The innermost map, and what the decoder's stages need, from the innermost on."""
        check_sides(x.shape, "SegNet-Basic", STEP)
        unpoolings: list[Unpooling] = []
        for stage, pool in zip(self.encoder, self.pools, strict=True):
            x = stage(x)
            size, added = x.shape[-2:], x if self.addition else None
            x, indices = pool(x)
            unpoolings.insert(0, Unpooling(indices, size, added))
        return x, unpoolings


class FCNBasic(nn.Module):
    """Class scores (N, classes, H, W) of images (N, bands, H, W) whose sides are multiples of 16."""

    def __init__(self, config: SegNetConfig, form: FCNForm) -> None:
        super().__init__()
        self.config = config
        self.addition = form.addition
        features = config.features(FEATURES)
        maps = config.classes if form.reduction else features
        joins = STAGES if form.addition else 1
        self.encoder = basic_encoder(config)
        self.compress = nn.ModuleList(
            nn.Conv2d(features, maps, 1) if form.reduction else nn.Identity() for _ in range(joins)
        )
        self.decoder = nn.ModuleList(
            deconvolution(maps) if form.learnt else nn.Upsample(scale_factor=2, mode="bilinear") for _ in range(STAGES)
        )
        self.classifier = nn.Identity() if form.reduction else nn.Conv2d(features, config.classes, 1)
        initialise(self)
        for layer in self.decoder:
            start_bilinear(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, before any softmax."""
        check_sides(x.shape, "FCN-Basic", STEP)
        pooled = []
        for stage in self.encoder:
            x = F.max_pool2d(stage(x), 2, 2)
            pooled.append(x)
        pooled = pooled if self.addition else pooled[-1:]
        added = [compress(maps) for compress, maps in zip(self.compress, pooled, strict=True)]
        x = added.pop()
        for upsample in self.decoder:
            x = upsample(x)
            x = x + added.pop() if added else x
        return self.classifier(x)


def basic_encoder(config: SegNetConfig) -> nn.ModuleList:
    """The four stages that all forms share; pooling is left to them."""
    widths = [config.bands, *[config.features(FEATURES)] * STAGES]
    return nn.ModuleList(
        nn.Sequential(*conv_norm(incoming, widths[-1], KERNEL), nn.ReLU(inplace=True)) for incoming in widths[:-1]
    )


def deconvolution(maps: int) -> nn.ConvTranspose2d:
    """A transposed convolution that doubles rows and columns."""
    return nn.ConvTranspose2d(maps, maps, DECONVOLUTION, 2, padding=(DECONVOLUTION - 2) // 2)


def start_bilinear(layer: nn.Module) -> None:
    """Sets a deconvolution's weights to bilinear interpolation by 2 of every map by itself; leaves other layers."""
    if isinstance(layer, nn.ConvTranspose2d) and not layer.weight.is_meta:
        places = torch.arange(DECONVOLUTION) - (DECONVOLUTION - 1) / 2
        hat = (1 - places.abs() / 2).clamp_min(0)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(layer.in_channels)[..., None, None] * hat[:, None] * hat)


def segnet_basic(classes: int = 11, bands: int = 3, width: float = 1.0) -> SegNetBasic:
    """A SegNet-Basic with random weights; 1,416,587 parameters as published (11 classes, 3 bands, width 1)."""
    return SegNetBasic(SegNetConfig(classes, bands, width))


def encoder_addition(classes: int = 11, bands: int = 3, width: float = 1.0) -> SegNetBasic:
    """A SegNet-Basic whose decoder stages add the encoder's maps of their size."""
    return SegNetBasic(SegNetConfig(classes, bands, width), addition=True)


def single_channel_decoder(classes: int = 11, bands: int = 3, width: float = 1.0) -> SegNetBasic:
    """A SegNet-Basic whose decoder convolves each map by itself."""
    return SegNetBasic(SegNetConfig(classes, bands, width), single_channel=True)


def bilinear_interpolation(classes: int = 11, bands: int = 3, width: float = 1.0) -> FCNBasic:
    """SegNet-Basic's encoder, compressed to the classes and interpolated bilinearly; nothing is learnt there."""
    return FCNBasic(SegNetConfig(classes, bands, width), FCNForm(addition=False, learnt=False))


def fcn_basic(classes: int = 11, bands: int = 3, width: float = 1.0) -> FCNBasic:
    """SegNet-Basic's encoder with FCN's decoder: learnt upsampling of class maps, plus compressed encoder maps."""
    return FCNBasic(SegNetConfig(classes, bands, width), FCNForm())


def fcn_basic_noaddition(classes: int = 11, bands: int = 3, width: float = 1.0) -> FCNBasic:
    """An FCN-Basic that adds no encoder maps."""
    return FCNBasic(SegNetConfig(classes, bands, width), FCNForm(addition=False))


def fcn_basic_nodimreduction(classes: int = 11, bands: int = 3, width: float = 1.0) -> FCNBasic:
    """An FCN-Basic that upsamples and adds all 64 maps, and classifies last."""
    return FCNBasic(SegNetConfig(classes, bands, width), FCNForm(reduction=False))


def fcn_basic_noaddition_nodimreduction(classes: int = 11, bands: int = 3, width: float = 1.0) -> FCNBasic:
    """An FCN-Basic that upsamples all 64 maps, adds no encoder maps, and classifies last."""
    return FCNBasic(SegNetConfig(classes, bands, width), FCNForm(addition=False, reduction=False))
