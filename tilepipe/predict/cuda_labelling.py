"""Labels straight from a network's last features: its last convolution and what follows in one kernel."""

from __future__ import annotations

from typing import Any

import torch

from tilepipe.predict.cuda_graph import Passes
from tilepipe.predict.prepare import Prepared
from tilepipe.window import Interval, Placement, Window


class Labelling:
    """A prepared network whose last convolution is held back, and the kernel in its place."""

    def __init__(self, network: Prepared, device: Any, capturing: bool) -> None:
        from tilepipe.predict.triton_classify import Classifier

        self._last = network.last
        self._classifier = Classifier.of(self._last.conv)
        self._passes = Passes(network, self._last.conv.in_channels, device, capturing)

    def label(
        self,
        pixels: torch.Tensor,
        tile: Placement,
        labels: torch.Tensor,
        confidence: torch.Tensor,
        keep: torch.Tensor,
        undefined: torch.Tensor,
    ) -> None:
        """Writes the labels of a tile's crop into a block's maps, as `blend_cuda.score_maps` does."""
        from tilepipe.predict.triton_classify import Target, classify

        self._last.held = True
        try:
            features, origin = self._passes(pixels, self._seen(tile.core, (pixels.shape[2], pixels.shape[3])))
        finally:
            self._last.held = False
        crop = tile.crop.shift(-origin[0], -origin[1])
        target = Target(labels, confidence, keep, undefined)
        classify(features, self._classifier, (*crop.origin, *crop.shape), tile.target.origin, target)

    def _seen(self, core: Window | None, shape: tuple[int, int]) -> Window | None:
        """The features that a core's labels depend on: at a tile's border the convolution pads."""
        if core is None:
            return None
        reach = self._last.reach
        grown = (Interval(side.start - reach, side.stop + reach) for side in (core.rows, core.cols))
        return Window(*grown).clip(shape)
