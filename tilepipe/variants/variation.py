"""How a job runs a network other than as it comes: at stride 1, averaged over flips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from tilepipe.checkpoint import Task
from tilepipe.geometry.network import Geometry
from tilepipe.options import SegmentOptions
from tilepipe.trace import geometry_of
from tilepipe.variants.augment import Augmented, Group, augmented_geometry
from tilepipe.variants.dense import dilated, shift_and_stitch


@dataclass(frozen=True, slots=True)
class Variation:
    """What a network becomes before it runs; what this holds travels to the workers in its place."""

    dense: Literal["dilate", "stitch"] | None = None
    """Slide a classifier whose output step is larger at stride 1."""
    tta: Group | None = None
    """Average over flips, or over flips and quarter turns."""

    @classmethod
    def asked(cls, options: SegmentOptions, network: nn.Module, bands: int) -> Variation:
        """What the options ask of a network with so many bands; nothing to slide where its output step is 1."""
        coarse = options.stride is not None and geometry_of(network, bands).scale != (1, 1)
        return cls(options.dense if coarse else None, options.tta)

    def network(self, network: nn.Module, task: Task) -> nn.Module:
        """The network that runs; `task` says what is averaged."""
        if self.dense is not None:
            network = dilated(network) if self.dense == "dilate" else shift_and_stitch(network)
        return network if self.tta is None else Augmented(network, self.tta, task)

    def geometry(self, network: nn.Module, bands: int) -> Geometry:
        """The geometry of the network that runs."""
        derived = geometry_of(Variation(self.dense).network(network, "segmentation"), bands)
        return derived if self.tta is None else augmented_geometry(derived, self.tta)
