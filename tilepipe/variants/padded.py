"""A network that takes any size: its input extended to the next legal size, its result cropped back.

For people who call a network by themselves on images that fit into memory. The result is the reference result that
tiling reproduces for larger ones:

    image            |0 ------------------ H|
    extended  |trim--|----------------------|-- trim, and on to the next legal size|     by reflection
    result           |0 ------------------ H|   at scale 1, else one output per `scale` pixels
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tilepipe.axis import extended_size, kept_outputs
from tilepipe.errors import GeometryError, ModelError
from tilepipe.geometry.network import AxisGeometry, Geometry
from tilepipe.trace import first_map, geometry_of
from tilepipe.window import Interval


class Padded(nn.Module):
    """Scores (N, classes, H, W) of images (N, C, H, W) of any size, by a network that accepts only some.

    The image is extended by reflection (numpy's "reflect", repeated as needed; an axis of one pixel repeats) at the
    bottom and right to the network's next legal size; a network whose output is smaller than its input is first
    extended on all sides by what it trims. The result is cropped to the image. A network that gives one output per
    s x s pixels gives those whose centre lies in the image, at least one. Gradients pass through.

    `channels` is C, by default that of the network's first convolution. Where a network returns several tensors, the
    first, or "out", counts. Raises GeometryError where no input size passes through the network, ModelError where C
    is not told and there is no convolution.
    """

    def __init__(self, network: nn.Module, channels: int | None = None) -> None:
        super().__init__()
        self.network = network
        self.geometry: Geometry = geometry_of(network, _channels(network) if channels is None else channels)
        """The network's own: legal sizes, what it trims, its scale."""

    def forward(self, x: Tensor) -> Tensor:
        """The scores; raises GeometryError for an x that is no image of the network's channels, or too large for it."""
        channels = self.geometry.channels_in
        if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
            raise GeometryError(f"the input is {tuple(x.shape)}; legal: (N, {channels}, rows, columns), none of them 0")
        rows, cols = self.geometry.axes
        extended = _extend(_extend(x, 2, rows), 3, cols)
        scores = first_map(self.network(extended))
        return scores[:, :, : _kept(rows, x.shape[2]), : _kept(cols, x.shape[3])]

    def extra_repr(self) -> str:
        """The legal sizes."""
        return f"rows {self.geometry.rows.sizes}, columns {self.geometry.cols.sizes}"


def _extend(x: Tensor, dim: int, axis: AxisGeometry) -> Tensor:
    """The image with one axis extended to a legal size."""
    length, size = x.shape[dim], extended_size(axis, x.shape[dim])
    if size == length:
        return x
    # By indices: torch's own reflection fails where it is wider than the image.
    positions = Interval(-axis.trim[0], size - axis.trim[0]).reflect(length)
    return x.index_select(dim, torch.from_numpy(positions).to(x.device))


def _kept(axis: AxisGeometry, length: int) -> int:
    size = extended_size(axis, length)
    axis.output_size(size)  # raises where a network of fixed size is given a larger image
    return kept_outputs(axis, length, size)


def _channels(network: nn.Module) -> int:
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return module.in_channels
    raise ModelError(f"{type(network).__name__} has no convolution that tells its input channels; give channels=")
