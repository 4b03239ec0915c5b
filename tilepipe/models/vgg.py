"""VGG16's convolutions as an encoder, and the two fully connected layers behind them as convolutions.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (arXiv 1409.1556, table 1,
column D):

    stage 1    64, 64             pool
    stage 2    128, 128           pool
    stage 3    256, 256, 256      pool
    stage 4    512, 512, 512      pool
    stage 5    512, 512, 512      pool
    fc6        4096, from the whole map of 7x7: a 7x7 convolution without padding
    fc7        4096, from those: a 1x1 convolution

Every convolution of a stage is 3x3 with padding 1 and ReLU; pooling takes the maximum of 2x2.
"""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from tilepipe.models.layers import conv_stage, scaled

VGG16_STAGES: tuple[tuple[int, ...], ...] = (
    (64, 64),
    (128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (512, 512, 512),
)
"""Features of the convolutions of each stage, at width 1."""
FC_WIDTH = 4096
"""Features of fc6 and fc7, at width 1."""
FC_SIZE = 7
"""Rows and columns that fc6 looks at: what five poolings leave of 224."""
DROPOUT = 0.5
"""The share of fc6's and fc7's features that training leaves out."""


def stage_widths(bands: int, width: float, extra: int = 0) -> list[list[int]]:
    """For each stage, the features that come in and those of its convolutions; `extra` more stages like the fifth."""
    stages = [[scaled(published, width) for published in stage] for stage in VGG16_STAGES]
    stages += [list(stages[-1]) for _ in range(extra)]
    incoming = [bands, *(stage[-1] for stage in stages)]
    return [[before, *stage] for before, stage in zip(incoming, stages, strict=False)]


def normalised_encoder(stages: list[list[int]]) -> nn.ModuleList:
    """A stage of convolutions with batch normalisation and ReLU for each list of widths."""
    return nn.ModuleList(conv_stage(widths) for widths in stages)


def plain_encoder(stages: list[list[int]], first_padding: int = 1) -> nn.ModuleList:
    """A stage of convolutions with ReLU for each list of widths; the very first convolution pads as told."""
    encoder = nn.ModuleList()
    for number, widths in enumerate(stages):
        layers: list[nn.Module] = []
        for incoming, outgoing in pairwise(widths):
            padding = first_padding if number == 0 and not layers else 1
            layers += [nn.Conv2d(incoming, outgoing, 3, padding=padding), nn.ReLU(inplace=True)]
        encoder.append(nn.Sequential(*layers))
    return encoder
