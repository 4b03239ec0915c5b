"""What is asked of one block's inference, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from tilepipe.errors import ModelError, UsageError
from tilepipe.predict.scores import CONFIDENCE_STEPS, Array, label_dtype, label_nodata
from tilepipe.window import Placement, Window

Quantity = Literal["uint8", "float16", "float32"]
Floating = Literal["float16", "float32", "float64"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which maps a block gives: labels and what goes with them, or the network's own output."""

    confidence: bool = False
    """The best class's probability."""
    probabilities: Quantity | None = None
    """All classes' probabilities, and how they are stored."""
    values: Floating | None = None
    """The network's own output in this type, and nothing else."""

    def __post_init__(self) -> None:
        if self.probabilities not in (None, *get_args(Quantity)):
            raise UsageError(f"probabilities as {self.probabilities!r}; use {', '.join(get_args(Quantity))}")
        if self.values not in (None, *get_args(Floating)):
            raise UsageError(f"values as {self.values!r}; use {', '.join(get_args(Floating))}")
        if self.values is not None and (self.confidence or self.probabilities is not None):
            raise UsageError("a network's own output has no confidence and no probabilities; ask for either")

    @property
    def scale(self) -> tuple[float, float]:
        """(factor, offset): a probability p is stored as p * factor + offset, cut to the type."""
        return (float(CONFIDENCE_STEPS), 0.5) if self.probabilities == "uint8" else (1.0, 0.0)


class BlockMaps(NamedTuple):
    """One block's maps, each of its output's (rows, columns)."""

    labels: Array | None = None
    """Best class, the lowest on a tie; uint8 with nodata 255, uint16 with 65535 above 255 classes."""
    confidence: Array | None = None
    """uint8: round(best probability * 254); 255 without data."""
    probabilities: Array | None = None
    """(classes, rows, columns): uint8 as confidence, or float16 or float32 with NaN without data."""
    values: Array | None = None
    """(channels, rows, columns): the network's own output; NaN without data."""
    overlapped: int = 0
    """Blended: pixels with data that several tiles labelled."""
    disagreed: int = 0
    """Blended: of these, the pixels whose tiles' own labels differ."""

    @classmethod
    def unfilled(cls, shape: tuple[int, int], classes: int, wanted: Wanted) -> BlockMaps:
        """Maps whose pixels are still to be written; what is stored as float16 is gathered in float32."""
        if wanted.values is not None:
            kept = np.float64 if wanted.values == "float64" else np.float32
            return cls(values=np.empty((classes, *shape), kept))
        labels = np.empty(shape, label_dtype(classes))
        confidence = np.empty(shape, np.uint8) if wanted.confidence else None
        if wanted.probabilities is None:
            return cls(labels, confidence)
        return cls(labels, confidence, np.empty((classes, *shape), probability_dtype(wanted)))

    def finished(self, keep: Array | None, classes: int, wanted: Wanted) -> BlockMaps:
        """The maps with nodata where `keep` is False, in the types wanted.

        Raises ModelError where a value is beyond what float16 holds.
        """
        if keep is not None:
            gone = ~keep
            for array, fill in (
                (self.labels, label_nodata(classes) if self.labels is not None else 0),
                (self.confidence, 255),
                (self.probabilities, np.nan if wanted.probabilities != "uint8" else 255),
                (self.values, np.nan),
            ):
                if array is not None:
                    np.copyto(array, fill, where=gone)
        return self._replace(
            probabilities=_halved(self.probabilities, wanted.probabilities), values=_halved(self.values, wanted.values)
        )


def probability_dtype(wanted: Wanted) -> type[np.generic]:
    """The type that probabilities are gathered in before they are stored."""
    return np.uint8 if wanted.probabilities == "uint8" else np.float32


def _halved(array: Array | None, kind: str | None) -> Array | None:
    """The array as float16 where that is wanted."""
    if array is None or kind != "float16":
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if np.isinf(half).any():
        raise ModelError(
            f"the network gives values up to {np.nanmax(np.abs(array)):g}, beyond float16's 65504; use --dtype float32"
        )
    return half


@dataclass(frozen=True, slots=True, eq=False)
class BlockJob:
    """One block's pixels and tiles."""

    values: Array
    """(bands, H, W) as stored in the raster, extended where the block reaches beyond it."""
    valid: Array | None
    """(H, W) bool: pixels that count; None for all. The others enter the network as 0."""
    keep: Array | None
    """(rows, columns) bool: outputs that get a label; None for all."""
    placements: Sequence[Placement]
    shape: tuple[int, int]
    """The output's (rows, columns)."""
    wanted: Wanted

    def kept_placements(self) -> list[Placement]:
        """The tiles that give some output its label, in order."""
        keep = self.keep
        if keep is None:
            return list(self.placements)
        return [p for p in self.placements if keep[_slices(p.target)].any()]

    def refuse_undefined(self, count: int, placements: Sequence[Placement]) -> None:
        """Raises ModelError if `count` outputs of these tiles have no best class."""
        if count == 0:
            return
        lows, highs = zip(*(self._span(p.source) for p in placements), strict=True)
        outputs = sum(p.crop.area for p in placements)
        raise ModelError(
            f"the network gives scores that are not finite for {count} of {outputs} pixels, from values between "
            f"{min(lows):g} and {max(highs):g}: name the raster's nodata value with --nodata, check the model's "
            "mean, std and weights, or try --precision float32 or float64"
        )

    def _span(self, source: Window) -> tuple[float, float]:
        window = _slices(source)
        values = self.values[:, *window]
        if self.valid is not None:
            values = values[:, self.valid[window]]
        return (float(values.min()), float(values.max())) if values.size else (np.inf, -np.inf)


def _slices(window: Window) -> tuple[slice, slice]:
    return slice(window.rows.start, window.rows.stop), slice(window.cols.start, window.cols.stop)


def blend_rows(tiles: Sequence[Placement]) -> tuple[int, list[tuple[int, list[Placement]]]]:
    """How many rows a block's strip needs, and the tiles by the row of the block at which their targets begin.

    Tiles must come in row-major order. When the tiles that begin at a row are added, all rows above it are final.
    """
    groups: list[tuple[int, list[Placement]]] = []
    deepest = needed = 0
    for tile in tiles:
        start = tile.target.rows.start
        if not groups or groups[-1][0] != start:
            groups.append((start, []))
        groups[-1][1].append(tile)
        deepest = max(deepest, tile.target.rows.stop)
        needed = max(needed, deepest - start)
    return needed, groups
