"""LeNet, fully convolutional: a digit classifier that slides over an image of any size it can step through.

LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition" (Proc. IEEE 86, 1998), with
the layer table of Caffe's published definition, whose linear layers become convolutions:

    width 1          kernel   features         a side of 28 becomes
    convolution      5x5      20               24
    maximum of       2x2                       12
    convolution      5x5      50               8
    maximum of       2x2                       4
    linear layer     4x4      500, ReLU        1
    linear layer     1x1      classes          1

Nothing is padded. Legal sizes are 28 + 4n, with one output per 4 pixels: 28 rows of 280 columns give 1 x 64. At
width 1, with 1 band and 10 classes, it has Caffe's 431,080 parameters.
"""

from __future__ import annotations

import torch.fx
from torch import Tensor, nn

from tilepipe.models.layers import check_numbers, check_sides, initialise, scaled

torch.fx.wrap("check_sides")

WINDOW = 28
"""Rows and columns that one output looks at."""
STRIDE = 4
"""Pixels from one output to the next."""


class LeNet(nn.Sequential):
    """Class scores (N, classes, (H - 24) / 4, (W - 24) / 4) of images (N, bands, H, W) with sides 28 + 4n.

    A plain nn.Sequential of its layers, which beyond that only checks the sides of what it is given.
    """

    def __init__(self, classes: int = 10, bands: int = 1, width: float = 1.0) -> None:
        check_numbers("LeNet", width, classes=classes, bands=bands)
        first, second, hidden = (scaled(published, width) for published in (20, 50, 500))
        super().__init__(
            nn.Conv2d(bands, first, 5),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5),
            nn.MaxPool2d(2),
            nn.Conv2d(second, hidden, 4),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, classes, 1),
        )
        initialise(self)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, the name that nn.Sequential gives it
        """Class scores, before any softmax."""
        check_sides(input.shape, "LeNet", STRIDE, WINDOW)
        return super().forward(input)  # type: ignore[no-untyped-call]


def lenet(classes: int = 10, bands: int = 1, width: float = 1.0) -> LeNet:
    """A LeNet with random weights; 431,080 parameters as Caffe's (10 classes, 1 band, width 1)."""
    return LeNet(classes, bands, width)
