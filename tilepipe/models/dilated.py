"""The FCN without downsampling: filters that are dilated where other networks pool.

Sherrah, "Fully Convolutional Networks for Dense Semantic Labelling of High-Resolution Aerial Imagery" (arXiv
1606.02585): a patch classifier becomes a network at full resolution, with nothing to interpolate, when its poolings
lose their stride and every filter behind one is dilated twice as much as before.

The rule is the paper's. The classifier that it is applied to is chosen here, after the one of the author's earlier work
(Paisitkriangkrai, Sherrah, Janney and van den Hengel, EarthVision 2015): four 5x5 convolutions, each followed by a 2x2
pooling, and two linear layers of 128, on patches of 64 x 64 pixels, of which four poolings leave 4 x 4. So are batch
normalisation, and that the poolings are left out altogether.

    width 1          kernel   dilation   padding   features
    convolution      5x5      1          2         32
    convolution      5x5      2          4         64
    convolution      5x5      4          8         96
    convolution      5x5      8          16        128
    linear layer     4x4      16         24        128
    linear layer     1x1                           128
    linear layer     1x1                           classes

Every layer but the last has batch normalisation and ReLU; dropout follows the linear layers of 128. Padding keeps the
size: every size is legal, from 1 x 1 on, tiles may begin anywhere, and an output sees 54 pixels to each side.
"""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from tilepipe.errors import ModelError
from tilepipe.models.layers import check_numbers, initialise, scaled

CONVOLUTIONS = (32, 64, 96, 128)
"""Features of the 5x5 convolutions, at width 1; each is dilated twice as much as the one before."""
HIDDEN = 128
"""Features of the linear layers, at width 1."""
PATCH = 4
"""Rows and columns that the poolings would have left of a patch."""


class DilatedFCN(nn.Sequential):
    """Class scores (N, classes, H, W) of images (N, bands, H, W) of any size: a plain nn.Sequential of its layers."""

    def __init__(self, classes: int = 6, bands: int = 3, width: float = 1.0, dropout: float = 0.5) -> None:
        check_numbers("dilated-fcn", width, classes=classes, bands=bands)
        if not 0.0 <= dropout < 1.0:
            raise ModelError(f"dilated-fcn: dropout {dropout} is not legal; choose a share from 0 to below 1")
        widths = [bands, *(scaled(published, width) for published in CONVOLUTIONS)]
        hidden = scaled(HIDDEN, width)
        layers: list[nn.Module] = []
        for stage, (incoming, outgoing) in enumerate(pairwise(widths)):
            layers += same_size(incoming, outgoing, 5, 2**stage)
        layers += [*same_size(widths[-1], hidden, PATCH, 2 ** len(CONVOLUTIONS)), nn.Dropout(dropout)]
        layers += [*same_size(hidden, hidden, 1, 1), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Conv2d(hidden, classes, 1))
        initialise(self)


def same_size(incoming: int, outgoing: int, kernel: int, dilation: int) -> list[nn.Module]:
    """A dilated convolution that keeps the size, its batch normalisation, and ReLU."""
    padding = dilation * (kernel - 1) // 2
    return [
        nn.Conv2d(incoming, outgoing, kernel, padding=padding, dilation=dilation),
        nn.BatchNorm2d(outgoing),
        nn.ReLU(inplace=True),
    ]


def dilated_fcn(classes: int = 6, bands: int = 3, width: float = 1.0, dropout: float = 0.5) -> DilatedFCN:
    """An FCN without downsampling with random weights, output at full resolution, any size."""
    return DilatedFCN(classes, bands, width, dropout)
