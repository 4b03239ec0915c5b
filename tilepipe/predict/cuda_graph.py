"""A network's passes captured as CUDA graphs: once for each part of the output, replayed for every further tile.

A small tile's pass takes less time on the device than Python takes to launch its kernels; a replay is one launch.
Graphs share one pool of memory: of all captured passes one runs at a time, and its scores are read before the next.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch

from tilepipe.predict.prepare import Prepared, TileScores, scores_of
from tilepipe.window import Window

log = logging.getLogger(__name__)

MOST = 25
"""Parts of the output whose passes are captured; exact tiles have at most 16, blended ones a single one."""


class _Captured(NamedTuple):
    graph: Any
    found: TileScores


class Passes:
    """A prepared network's passes for tiles of one shape; called under the engine's lock, on its stream.

    The first pass runs as it is, since it loads and compiles kernels, which no graph can hold. A network whose pass
    cannot be captured (one that waits for the device, or asks for memory that is not there) runs as it is from then
    on, with a line in the log: its scores are the same.
    """

    def __init__(self, network: Prepared, classes: int, device: Any, capturing: bool) -> None:
        self.network, self.classes, self.device = network, classes, device
        self._capturing = capturing
        self._captured: dict[Window | None, _Captured] = {}
        self._pixels = self._scores = torch.empty(0)
        """What every captured pass reads, and where it leaves its scores."""

    def __call__(self, pixels: torch.Tensor, core: Window | None) -> TileScores:
        """The scores of a tile's `core` at least; they are overwritten by the next call."""
        part = core if self.network.is_partial else None
        if not self._capturing:
            return scores_of(self.network, pixels, self.classes, core)
        if not self._scores.numel():
            found = scores_of(self.network, pixels, self.classes, core)
            self._make_room(pixels, found.scores)
            return found
        if part not in self._captured and not self._capture(pixels, core, part):
            return scores_of(self.network, pixels, self.classes, core)
        self._pixels.copy_(pixels)
        graph, found = self._captured[part]
        graph.replay()
        return found

    def _capture(self, pixels: torch.Tensor, core: Window | None, part: Window | None) -> bool:
        """Whether the pass for that part was captured."""
        if len(self._captured) == MOST:
            return False
        found: list[TileScores] = []

        def run() -> None:
            scores, origin = scores_of(self.network, self._pixels, self.classes, core)
            found.append(TileScores(self._kept(scores), origin))

        try:
            graph = self.device.capture(run)
        except Exception as error:  # whatever a network may do that a graph cannot hold
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            log.warning("the network's pass is not captured as a CUDA graph, and runs without: %s", said)
            self._capturing = False
            self._captured.clear()
            self.device.free()
            return False
        self._captured[part] = _Captured(graph, found[-1])
        return True

    def _make_room(self, pixels: torch.Tensor, scores: torch.Tensor) -> None:
        # A network that computes parts has an output for each pixel; parts are of any size up to that.
        most = self.classes * pixels.shape[2] * pixels.shape[3] if self.network.is_partial else scores.numel()
        self._pixels = torch.empty_like(pixels)
        self._scores = torch.empty(most, dtype=scores.dtype, device=scores.device)

    def _kept(self, scores: torch.Tensor) -> torch.Tensor:
        """A copy where no other pass writes: what a graph allocates is the next one's."""
        _, classes, height, width = scores.shape
        room = self._scores[: scores.numel()].view(1, height, width, classes).permute(0, 3, 1, 2)
        return room.copy_(scores)
