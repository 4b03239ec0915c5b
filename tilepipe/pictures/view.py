"""What part of a map a picture shows, and in how many cells."""

from __future__ import annotations

from dataclasses import dataclass

from tilepipe.errors import UsageError
from tilepipe.raster.area import region_window
from tilepipe.raster.info import RasterInfo
from tilepipe.store.spec import StoreSpec
from tilepipe.window import Window

LEAST, MOST = 64, 4096
"""Pixels of a panel's longer side that can be asked for."""


@dataclass(frozen=True, slots=True)
class View:
    """A window of a map, and the cells that it is shown in."""

    window: Window
    """In pixels of the map."""
    shape: tuple[int, int]
    """(rows, columns) of cells; never more than the window has pixels."""
    enlarged: int = 1
    """Pixels of the picture per cell, a side."""

    @property
    def ratio(self) -> float:
        """Map pixels per cell, a side."""
        return max(len(self.window.rows) / self.shape[0], len(self.window.cols) / self.shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of the picture."""
        return self.shape[0] * self.enlarged, self.shape[1] * self.enlarged


def view_of(spec: StoreSpec, window: str | None, side: int, whole: int) -> View:
    """The view of a window, spelled as regions are, or of all of the map; UsageError where it holds no pixel.

    At most `side` pixels a side; what has fewer is enlarged by a whole number to at most `whole`.

    >>> from tilepipe.store.spec import LabelClass
    >>> spec = StoreSpec((3000, 9000), (1024, 1024), (512, 512), [LabelClass("a", (0, 0, 0))])
    >>> view_of(spec, None, 900, 900).shape, view_of(spec, "0:100,50:250", 900, 900).size
    ((300, 900), (400, 800))
    """
    part = Window.whole(spec.shape) if window is None else region_window(grid_info(spec), window, "window")
    longest = max(part.shape)
    if longest <= side:
        return View(part, part.shape, max(1, min(whole, side) // longest))
    rows, cols = (max(1, round(length * side / longest)) for length in part.shape)
    return View(part, (rows, cols))


def checked_side(side: int) -> int:
    """`side`; UsageError where no panel is so large or small."""
    if not LEAST <= side <= MOST:
        raise UsageError(f"size {side}; a panel's longer side has {LEAST} to {MOST} pixels")
    return side


def grid_info(spec: StoreSpec) -> RasterInfo:
    """The map as a raster without bands' particulars: its grid and place."""
    dtype = spec.label_dtype.name if spec.values is None else spec.values
    return RasterInfo("the map", spec.shape, (dtype,), (None,), ("gray",), (None,), spec.crs_wkt, spec.transform)
