"""Arrays in memory as rasters: pieces that together hold every pixel that is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import ReadError
from tilepipe.window import Window


class Piece(NamedTuple):
    """Some bands of a part of a raster."""

    bands: range
    """Their numbers, from 1."""
    window: Window
    """Where the part lies in the raster."""
    values: NDArray[Any]
    """(bands, rows, columns)."""


@dataclass(frozen=True, slots=True, eq=False)
class ArrayRecipe:
    """A raster whose pixels are handed over piece by piece; without pieces it can be planned, and not read."""

    name: str
    token: str
    """What tells this raster's content from another's."""
    pieces: tuple[Piece, ...] = ()

    def backend(self) -> PieceBackend:
        """A backend that reads the pieces."""
        return PieceBackend(self)

    def identity(self) -> list[dict[str, Any]]:
        """The token alone."""
        return [{"array": self.token}]


class PieceBackend:
    """Reads pieces from any number of threads."""

    def __init__(self, recipe: ArrayRecipe) -> None:
        self._recipe = recipe

    def fetch(self, bands: Sequence[int], window: Window, out: NDArray[Any]) -> None:
        """Fill `out` (bands, rows, columns) with the 1-based `bands` of `window`, which lies in the raster."""
        filled = 0
        for piece in self._recipe.pieces:
            shared = piece.window.intersect(window)
            if not shared.area:
                continue
            source, target = shared.within(piece.window), shared.within(window)
            for plane, band in zip(out, bands, strict=True):
                if band in piece.bands:
                    plane[target] = piece.values[piece.bands.index(band)][source]
                    filled += shared.area
        if filled != len(bands) * window.area:
            raise ReadError(f"{self._recipe.name}: {window} is not in the pieces that were handed over")

    def fetch_mask(self, bands: Sequence[int], window: Window) -> NDArray[np.bool_]:
        """All true: arrays have no mask beside their values."""
        return np.ones(window.shape, np.bool_)

    def close(self) -> None:
        """Nothing: pieces are not files."""
