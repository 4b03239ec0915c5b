"""The denoising autoencoder of 61 + 16n: strided convolutions without padding, mirrored, with skips that add.

Its layer table is the one of the texts that tilepipe follows, of which "61 + 16n" is the best known line:

    encoder, two halves     two 5x5 convolutions of stride 2, each with batch normalisation and ReLU
                            features 32, 32 and 64, 64
    decoder, two halves     two 5x5 transposed convolutions of stride 2, each with batch normalisation,
                            the first with ReLU, the second with soft-sign: x / (1 + |x|)
                            features 64, 32 and 32, bands
    skips                   the first encoder half's output is added to the first decoder half's,
                            the network's input to the last's
    at the end              clip to [machine epsilon, 1], logarithm, 1x1 convolution without bias, exponential

Dropout lies between the two convolutions of every half but the last. The 1x1 convolution starts as the identity, with
which what follows the clip is the identity too: a power law that is learnt from there. Pixels are expected in 0 to 1.

A side of 61 becomes 29, 13, 5, 1, then 5, 13, 29, 61: legal sizes are 61 + 16n, at which no stride drops a pixel and
nothing has to be cropped where skips are added. At 1 band it has 360,964 parameters, counted from the table.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

from tilepipe.errors import ModelError
from tilepipe.models.layers import check_numbers, check_sides, initialise, scaled

torch.fx.wrap("check_sides")
torch.fx.wrap("clip_to_unit")

SMALLEST = 61
"""The smallest legal side."""
STEP = 16
"""The product of the strides."""


class Autoencoder(nn.Module):
    """Cleaned images (N, bands, H, W) of noisy ones, (N, bands, H, W) with sides 61 + 16n."""

    def __init__(self, bands: int = 1, width: float = 1.0, dropout: float = 0.5) -> None:
        super().__init__()
        check_numbers("autoencoder", width, bands=bands)
        if not 0.0 <= dropout < 1.0:
            raise ModelError(f"autoencoder dropout {dropout} is not legal; choose a share from 0 to below 1")
        few, many = scaled(32, width), scaled(64, width)
        self.fine = encoder_half(bands, few, dropout)
        self.coarse = encoder_half(few, many, dropout)
        self.rise = decoder_half(many, many, few, dropout)
        self.finish = decoder_half(few, few, bands, 0.0)
        self.power = nn.Conv2d(bands, bands, 1, bias=False)
        initialise(self)
        nn.init.dirac_(self.power.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The cleaned image, in 0 to 1 as long as the last convolution is the identity."""
        check_sides(x.shape, "autoencoder", STEP, SMALLEST)
        fine = self.fine(x)
        y = self.rise(self.coarse(fine)) + fine
        y = self.finish(y) + x
        return self.power(clip_to_unit(y).log()).exp()


def encoder_half(incoming: int, features: int, dropout: float) -> nn.Sequential:
    """Two convolutions that leave a quarter of the rows and columns."""
    return nn.Sequential(
        nn.Conv2d(incoming, features, 5, 2),
        nn.BatchNorm2d(features),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Conv2d(features, features, 5, 2),
        nn.BatchNorm2d(features),
        nn.ReLU(inplace=True),
    )


def decoder_half(incoming: int, features: int, outgoing: int, dropout: float) -> nn.Sequential:
    """Two transposed convolutions that undo an encoder half's sizes; no dropout where it is 0."""
    between = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(
        nn.ConvTranspose2d(incoming, features, 5, 2),
        nn.BatchNorm2d(features),
        nn.ReLU(inplace=True),
        *between,
        nn.ConvTranspose2d(features, outgoing, 5, 2),
        nn.BatchNorm2d(outgoing),
        nn.Softsign(),
    )


def clip_to_unit(x: Tensor) -> Tensor:
    """The tensor with values below its type's machine epsilon, or above 1, replaced by these."""
    return x.clamp(torch.finfo(x.dtype).eps, 1.0)


def autoencoder(bands: int = 1, width: float = 1.0, dropout: float = 0.5) -> Autoencoder:
    """A denoising autoencoder with random weights; 61 + 16n, 1 band or several, for regression."""
    return Autoencoder(bands, width, dropout)
