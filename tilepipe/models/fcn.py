"""FCN-32s, FCN-16s and FCN-8s: VGG16 made fully convolutional, its scores upsampled and joined with finer ones.

Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation" (arXiv 1411.4038; with the fixed
and learnt upsampling of 1605.06211, section 4), with the layer tables of the authors' published definitions:

    VGG16 without batch normalisation; conv1_1 pads by 100, so that any image gives fc6 its 7x7
    fc6, fc7     4096 each, 7x7 without padding and 1x1, with ReLU and dropout of 0.5
    score        1x1 to the classes
    FCN-32s      upsampled 32 times
    FCN-16s      upsampled twice, plus scores of pool4 (1x1); then 16 times
    FCN-8s       upsampled twice, plus scores of pool4; twice, plus scores of pool3 (1x1); then 8 times

Upsampling by s is a transposed convolution of stride s whose 2s x 2s kernel starts bilinear. Poolings use ceil mode, as
Caffe's do, so that every size passes, from 1 x 1 on; a map of a size that is no multiple of 32 has its last windows
reach over the end.

Maps are cropped at the places where their pixels' centres meet. With input pixel i at i, and p the pixel's index:

    conv1_1      p - 99               (padded by 100, kernel 3)
    pool3        8p - 95.5            pool4   16p - 91.5            fc6, fc7, score   32p + 12.5
    score x 2    16p - 11.5           so pool4 is cropped by 5      score x 32        p - 19
    sum x 2      8p - 23.5            so pool3 is cropped by 9      sum x 16          p - 27
                                                                    sum x 8           p - 31

The scores start random, as the paper found no better or worse than its zeros. Class-to-class kernels count as one per
class where they are frozen.

Parameters at 21 classes and 3 bands: VGG16's convolutions 14,714,688, fc6 102,764,544, fc7 16,781,312, scores 86,037;
with those of pool4 and pool3 and the upsampling, 134.4 million each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from tilepipe.errors import ModelError
from tilepipe.models.layers import check_numbers, check_sides, initialise, scaled
from tilepipe.models.vgg import DROPOUT, FC_SIZE, FC_WIDTH, plain_encoder, stage_widths

torch.fx.wrap("check_sides")

PADDING = 100
"""Zeros that conv1_1 puts around the image."""
CROPS = {32: 19, 16: 27, 8: 31}
"""Pixels of the upsampled scores before the image's first, for the stride of the finest scores."""
UPSAMPLING = ("published", "frozen", "learnt")


@dataclass(frozen=True, slots=True)
class Skip:
    """Scores of an earlier pooling, added to the upsampled ones."""

    pool: int
    """The pooling: 4 is the one behind stage 4."""
    crop: int
    """Its pixels before the first of the upsampled scores."""
    factor: float
    """On its features, in networks that are trained at once."""


SKIPS = (Skip(4, 5, 0.01), Skip(3, 9, 0.0001))
"""Coarse to fine: FCN-16s has the first, FCN-8s both."""


@dataclass(frozen=True, slots=True)
class FCNConfig:
    """What an FCN is made from."""

    stride: int
    """Pixels per pixel of the finest scores: 32, 16 or 8."""
    classes: int = 21
    """Number of scores per pixel."""
    bands: int = 3
    """Number of input channels."""
    width: float = 1.0
    """Factor on every layer's number of features, rounded, at least 1; 1 is the published network."""
    fc_width: int = FC_WIDTH
    """Features of fc6 and fc7 at width 1."""
    upsampling: str = "published"
    """ "published": all start bilinear, the last is frozen and those before it are learnt; "frozen", "learnt": all."""
    at_once: bool = False
    """Whether the features of pool4 and pool3 are multiplied by 0.01 and 0.0001 before they are scored, as in the
    authors' networks that are trained in one go instead of in stages."""

    def __post_init__(self) -> None:
        check_numbers(self.name, self.width, classes=self.classes, bands=self.bands, fc_width=self.fc_width)
        if self.upsampling not in UPSAMPLING:
            raise ModelError(f"upsampling {self.upsampling!r} is not known; use one of {', '.join(UPSAMPLING)}")

    @property
    def name(self) -> str:
        """What the paper calls it."""
        return f"FCN-{self.stride}s"

    @property
    def skips(self) -> tuple[Skip, ...]:
        """The poolings whose scores are added, coarse to fine."""
        return SKIPS[: {32: 0, 16: 1, 8: 2}[self.stride]]


class FCN(nn.Module):
    """Class scores (N, classes, H, W) of images (N, bands, H, W) of any size."""

    def __init__(self, config: FCNConfig) -> None:
        super().__init__()
        self.config = config
        classes, stages = config.classes, stage_widths(config.bands, config.width)
        wide = scaled(config.fc_width, config.width)
        self.encoder = plain_encoder(stages, PADDING)
        self.fc6 = _dropping(nn.Conv2d(stages[-1][-1], wide, FC_SIZE))
        self.fc7 = _dropping(nn.Conv2d(wide, wide, 1))
        self.score = nn.Conv2d(wide, classes, 1)
        self.scores = nn.ModuleList(nn.Conv2d(stages[skip.pool - 1][-1], classes, 1) for skip in config.skips)
        initialise(self)
        learnt = config.upsampling != "frozen"
        self.doublings = nn.ModuleList(bilinear_upsampling(classes, 2, learnt) for _ in config.skips)
        self.upsampling = bilinear_upsampling(classes, config.stride, config.upsampling == "learnt")

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, before any softmax."""
        check_sides(x.shape, self.config.name, 1)
        size, kept = x.shape[-2:], {}
        for number, stage in enumerate(self.encoder, start=1):
            x = F.max_pool2d(stage(x), 2, 2, ceil_mode=True)
            if any(skip.pool == number for skip in self.config.skips):
                kept[number] = x
        x = self.score(self.fc7(self.fc6(x)))
        for skip, score, doubling in zip(self.config.skips, self.scores, self.doublings, strict=True):
            x = doubling(x)
            features = kept.pop(skip.pool)
            finer = score(features * skip.factor if self.config.at_once else features)
            x = x + crop(finer, skip.crop, x.shape[-2:])
        return crop(self.upsampling(x), CROPS[self.config.stride], size)


def crop(x: Tensor, before: int, size: tuple[int, ...]) -> Tensor:
    """The part of (N, C, H, W) that starts `before` pixels from the top and the left and has `size`."""
    below, right = (before + size[axis] - x.shape[axis - 2] for axis in (0, 1))
    return F.pad(x, (-before, right, -before, below))


def bilinear_upsampling(classes: int, stride: int, learnt: bool) -> nn.ConvTranspose2d:
    """A transposed convolution that interpolates between the centres of `stride` x `stride` pixels.

    Learnt, its kernels go from every class to every class, as published, and start at 0 between different ones; frozen,
    there is one kernel per class, which computes the same.
    """
    groups = 1 if learnt else classes
    layer = nn.ConvTranspose2d(classes, classes, 2 * stride, stride, groups=groups, bias=False)
    places = torch.arange(2 * stride, device=layer.weight.device, dtype=layer.weight.dtype)
    hat = 1 - (places - (stride - 0.5)).abs() / stride
    with torch.no_grad():
        between = torch.eye(classes) if learnt else torch.ones(classes, 1)
        layer.weight.copy_(between[..., None, None].to(hat) * hat[:, None] * hat)
    return layer.requires_grad_(learnt)


def _dropping(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.ReLU(inplace=True), nn.Dropout(DROPOUT))


def fcn32s(
    classes: int = 21, bands: int = 3, width: float = 1.0, fc_width: int = FC_WIDTH, upsampling: str = "published"
) -> FCN:
    """An FCN-32s with random weights; 134,432,597 parameters (21 classes, 3 bands, width 1).

    86,016 of them are the frozen upsampling's. The options are FCNConfig's; raises ModelError for what is not legal.
    """
    return FCN(FCNConfig(32, classes, bands, width, fc_width, upsampling))


def fcn16s(
    classes: int = 21,
    bands: int = 3,
    width: float = 1.0,
    fc_width: int = FC_WIDTH,
    upsampling: str = "published",
    at_once: bool = False,
) -> FCN:
    """An FCN-16s with random weights; 134,385,914 parameters (21 classes, 3 bands, width 1).

    21,504 of them are the frozen upsampling's. The options are FCNConfig's; raises ModelError for what is not legal.
    """
    return FCN(FCNConfig(16, classes, bands, width, fc_width, upsampling, at_once))


def fcn8s(
    classes: int = 21,
    bands: int = 3,
    width: float = 1.0,
    fc_width: int = FC_WIDTH,
    upsampling: str = "published",
    at_once: bool = False,
) -> FCN:
    """An FCN-8s with random weights; 134,382,239 parameters (21 classes, 3 bands, width 1).

    5,376 of them are the frozen upsampling's. The options are FCNConfig's; raises ModelError for what is not legal.
    """
    return FCN(FCNConfig(8, classes, bands, width, fc_width, upsampling, at_once))
