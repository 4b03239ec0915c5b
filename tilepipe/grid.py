"""Where outputs lie on the raster: a network may give one for several pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.geometry.network import AxisGeometry, Geometry
from tilepipe.window import Window


@dataclass(frozen=True, slots=True)
class OutputGrid:
    """The raster pixels that each output stands for: its cell."""

    scale: tuple[int, int]
    """Raster pixels per output, (rows, columns)."""
    offset: tuple[float, float]
    """Raster pixels before output 0's cell, (rows, columns)."""

    @classmethod
    def of(cls, geometry: Geometry) -> OutputGrid:
        """The grid of a network's outputs over a raster."""
        return cls(geometry.scale, (_offset(geometry.rows), _offset(geometry.cols)))

    def cells(self, outputs: Window) -> Window:
        """The raster pixels that `outputs` stand for, to whole pixels."""
        rows, cols = self.scale
        window = Window.of(
            outputs.rows.start * rows, outputs.rows.stop * rows, outputs.cols.start * cols, outputs.cols.stop * cols
        )
        return window.shift(int(self.offset[0]), int(self.offset[1]))

    def middles(self, pixels: NDArray[Any], hull: Window, outputs: Window) -> NDArray[Any]:
        """The value at each output's middle pixel, of pixels (H, W) that cover `hull` of the raster."""
        middle = tuple(slice(scale // 2, None, scale) for scale in self.scale)
        return np.ascontiguousarray(pixels[self.cells(outputs).within(hull)][middle])


def _offset(axis: AxisGeometry) -> float:
    # The raster is extended by what a network of full size trims, so its outputs lie on the raster's own pixels.
    return 0.0 if axis.scale == 1 else float(axis.offset)
