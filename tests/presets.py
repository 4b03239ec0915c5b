"""The table of presets: what every architecture of `tilepipe.models.MODELS` is, in numbers that the tests hold it to.

A row says which arguments make the network small enough for the fast tests, what its geometry has to be, how many
parameters it has at the published width, and, where the source publishes a table, each of its convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from tilepipe.models import build


@dataclass(frozen=True)
class Preset:
    """What one architecture has to be; geometries hold for rows and for columns."""

    reduced: Mapping[str, Any]
    """Arguments of the network in the fast tests."""
    sizes: str
    """Legal input sizes."""
    alignment: int
    """Input pixels at which tiles may begin."""
    reach: tuple[int, int]
    """Input pixels (before, after) an aligned core that it depends on."""
    halo: tuple[int, int]
    """The reach, in whole alignment steps."""
    parameters: int
    """Counted, at the published width, with the arguments `full`."""
    published: str
    """What the source says of the number of parameters, or how it was counted."""
    full: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the published network."""
    bands: int = 3
    """Input channels of the network in the fast tests."""
    outputs: int = 3
    """Output channels of the network in the fast tests."""
    scale: int = 1
    """Input pixels per output pixel."""
    layers: tuple[str, ...] = ()
    """The published convolutions in order, as `layers_of` writes them; empty: none are published."""

    def make(self, name: str, full: bool = False) -> nn.Module:
        """The small or the published network, its weights drawn from a fixed seed, in evaluation mode."""
        torch.manual_seed(1)
        return build(name.split(maxsplit=1)[0], **(self.full if full else self.reduced)).eval()


def layers_of(network: nn.Module) -> tuple[str, ...]:
    """Each convolution of a network as text: "conv 3x3 3>64", "deconv 8x8 /2 11>11", "conv 3x3 dilated 2 64>64"."""
    found = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            kind = "deconv" if isinstance(module, nn.ConvTranspose2d) else "conv"
            parts = [kind, f"{module.kernel_size[0]}x{module.kernel_size[1]}"]
            parts += [f"/{module.stride[0]}"] if module.stride[0] > 1 else []
            parts += [f"dilated {module.dilation[0]}"] if module.dilation[0] > 1 else []
            parts += [f"{module.in_channels}>{module.out_channels}"]
            parts += [f"in {module.groups} groups"] if module.groups > 1 else []
            found.append(" ".join(parts))
    return tuple(found)


def chain(layer: str, *channels: int) -> tuple[str, ...]:
    """A layer repeated from each number of channels to the next: chain("conv 3x3", 3, 64, 64)."""
    return tuple(f"{layer} {incoming}>{outgoing}" for incoming, outgoing in pairwise(channels))


VGG16 = chain("conv 3x3", 3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
"""The thirteen convolutions of configuration D (arXiv 1409.1556, table 1)."""
DECONVNET_DECODER = chain("deconv 3x3", *[512] * 6, 256, 256, 256, 128, 128, 64, 64, 64)
FULLY_CONNECTED = ("conv 7x7 512>4096", "conv 1x1 4096>4096")
SEGNET_DECODER = chain("conv 3x3", *[512] * 6, 256, 256, 256, 128, 128, 64, 64, 11)

BASIC_ENCODER = chain("conv 7x7", 3, *[64] * 4)
TABLE_1 = "M, arXiv 1511.00561, table 1 (a multiple of 0.025); counted from sections 3.2 and 3.3"


def basic(million: str, parameters: int, *decoder: str, reach: int = 93, halo: int = 96) -> Preset:
    """A form of SegNet-Basic: its parameters in millions as published, and counted; its layers behind the encoder."""
    return Preset(
        reduced={"classes": 3, "width": 0.08},
        sizes="16n",
        alignment=16,
        reach=(reach, reach),
        halo=(halo, halo),
        parameters=parameters,
        published=f"{million} {TABLE_1}",
        full={"classes": 11},
        layers=(*BASIC_ENCODER, *decoder),
    )


PRESETS: dict[str, Preset] = {
    "autoencoder": Preset(
        reduced={"bands": 3, "width": 0.12},
        sizes="61 + 16n",
        alignment=16,
        reach=(48, 45),
        halo=(48, 48),
        parameters=360_964,
        published="none published; counted layer by layer for 1 band",
        layers=(
            *chain("conv 5x5 /2", 1, 32, 32, 64, 64),
            *chain("deconv 5x5 /2", 64, 64, 32, 32, 1),
            "conv 1x1 1>1",
        ),
    ),
    "bilinear-interpolation": basic("0.625", 613_003, "conv 1x1 64>11", reach=61, halo=64),
    "deconvnet": Preset(
        reduced={"classes": 3, "width": 0.03},
        sizes="224 + 32n",
        alignment=32,
        reach=(378, 378),
        halo=(384, 384),
        parameters=251_805_653,
        published="about 252 M, arXiv 1505.04366; counted from its table 2",
        full={"classes": 21},
        layers=(*VGG16, *FULLY_CONNECTED, "deconv 7x7 4096>512", *DECONVNET_DECODER, "conv 1x1 64>21"),
    ),
    "dilated-fcn": Preset(
        reduced={"classes": 3, "width": 0.05},
        sizes="any size from 1",
        alignment=1,
        reach=(54, 54),
        halo=(54, 54),
        parameters=795_430,
        published="none published; counted layer by layer",
        full={"classes": 6},
        layers=(
            *("conv 5x5 3>32", "conv 5x5 dilated 2 32>64", "conv 5x5 dilated 4 64>96", "conv 5x5 dilated 8 96>128"),
            *("conv 4x4 dilated 16 128>128", "conv 1x1 128>128", "conv 1x1 128>6"),
        ),
    ),
    "fcn-basic": basic("0.65", 646_168, *["conv 1x1 64>11"] * 4, *["deconv 8x8 /2 11>11"] * 4),
    "fcn-basic-noaddition": basic("0.65", 644_023, "conv 1x1 64>11", *["deconv 8x8 /2 11>11"] * 4),
    "fcn-basic-noaddition-nodimreduction": basic("1.625", 1_661_835, *["deconv 8x8 /2 64>64"] * 4, "conv 1x1 64>11"),
    "fcn-basic-nodimreduction": basic("1.625", 1_661_835, *["deconv 8x8 /2 64>64"] * 4, "conv 1x1 64>11"),
    "fcn32s": Preset(
        reduced={"classes": 3, "width": 0.03},
        sizes="any size from 1",
        alignment=32,
        reach=(221, 215),
        halo=(224, 224),
        parameters=134_432_597,
        published="134 M, arXiv 1411.4038, table 1; counted layer by layer",
        full={"classes": 21},
        layers=(
            *VGG16,
            *FULLY_CONNECTED,
            "conv 1x1 4096>21",
            "deconv 64x64 /32 21>21 in 21 groups",
        ),
    ),
    "fcn16s": Preset(
        reduced={"classes": 3, "width": 0.03},
        sizes="any size from 1",
        alignment=32,
        reach=(221, 215),
        halo=(224, 224),
        parameters=134_385_914,
        published="134 M, arXiv 1411.4038, table 1; counted layer by layer",
        full={"classes": 21},
        layers=(
            *VGG16,
            *FULLY_CONNECTED,
            "conv 1x1 4096>21",
            "conv 1x1 512>21",
            "deconv 4x4 /2 21>21",
            "deconv 32x32 /16 21>21 in 21 groups",
        ),
    ),
    "fcn8s": Preset(
        reduced={"classes": 3, "width": 0.03},
        sizes="any size from 1",
        alignment=32,
        reach=(221, 215),
        halo=(224, 224),
        parameters=134_382_239,
        published="134 M, arXiv 1411.4038, table 1; counted layer by layer",
        full={"classes": 21},
        layers=(
            *VGG16,
            *FULLY_CONNECTED,
            "conv 1x1 4096>21",
            *("conv 1x1 512>21", "conv 1x1 256>21"),
            *("deconv 4x4 /2 21>21", "deconv 4x4 /2 21>21"),
            "deconv 16x16 /8 21>21 in 21 groups",
        ),
    ),
    "lenet": Preset(
        reduced={"classes": 3, "width": 0.2},
        sizes="28 + 4n",
        alignment=4,
        reach=(0, 24),
        halo=(0, 24),
        parameters=431_080,
        published="431,080, Caffe's LeNet",
        bands=1,
        scale=4,
        layers=("conv 5x5 1>20", "conv 5x5 20>50", "conv 4x4 50>500", "conv 1x1 500>10"),
    ),
    "linear": Preset(
        reduced={"classes": 3},
        sizes="any size from 1",
        alignment=1,
        reach=(0, 0),
        halo=(0, 0),
        parameters=12,
        published="counted: 3 bands x 3 classes, and 3 biases",
        full={"classes": 3},
        layers=("conv 1x1 3>3",),
    ),
    "segnet": Preset(
        reduced={"classes": 3, "width": 0.04},
        sizes="32n",
        alignment=32,
        reach=(186, 186),
        halo=(192, 192),
        parameters=29_449_355,
        published="29.45 M, arXiv 1511.00561, section 3; equal to the authors' published definition",
        full={"classes": 11},
        layers=VGG16 + SEGNET_DECODER,
    ),
    "segnet-basic": basic("1.425", 1_416_587, *chain("conv 7x7", *[64] * 5), "conv 1x1 64>11"),
    "segnet-basic-encoder-addition": basic("1.425", 1_416_587, *chain("conv 7x7", *[64] * 5), "conv 1x1 64>11"),
    "segnet-basic-single-channel-decoder": basic(
        "0.625", 626_315, *["conv 7x7 64>64 in 64 groups"] * 4, "conv 1x1 64>11"
    ),
}
"""Every name of `MODELS`."""

VARIANTS: dict[str, Preset] = {
    "segnet nearest": replace(
        PRESETS["segnet"],
        reduced={"classes": 3, "width": 0.04, "upsample": "nearest"},
        full={"classes": 11, "upsample": "nearest"},
    ),
    "segnet bilinear": replace(
        PRESETS["segnet"],
        reduced={"classes": 3, "width": 0.04, "upsample": "bilinear"},
        full={"classes": 11, "upsample": "bilinear"},
        reach=(218, 218),
        halo=(224, 224),
    ),
}
"""Presets with options that change what they compute: the name, and what is changed."""
