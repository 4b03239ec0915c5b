"""Which overviews a store has, and how they are cut: levels of 2, 4, 8 ... times its pixels' side, in squares.

    level 0, the map    | square of 4096 pixels a side | ...
    level 1             | 2048  |   one shard each, as long as a square fills whole chunks of 512
    level 2             | 1024  |
    level 3             | 512   |
    level 4, 5 ...      | 256, 128 ...: too small for files of their own, joined to shards once all squares are done

A square is a power of two, so that every cell of every level lies in one square: the squares need nothing of each
other, and each is read once for all levels. Overviews are of labels, confidence and values. Probabilities have none:
they are numbers to compute with, and as many maps as there are classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tilepipe.store.attributes import overview_group
from tilepipe.store.spec import ArraySpec, ControlPoint, StoreSpec
from tilepipe.window import Window

FORMAT = 1
"""Version of how overviews are made: those of another one are made anew."""
SMALLEST = 512
"""Pixels of the longer side up to which an overview needs no further one."""
SQUARE = 4096
CHUNK = 512
REDUCED = ("labels", "confidence", "values")


@dataclass(frozen=True, slots=True)
class Pyramid:
    """The overviews of a store."""

    spec: StoreSpec
    """The store's own."""
    levels: int
    """How many; none where the map is small."""
    square: int
    """Pixels of the map, a side; a power of two, at least 2 ** `levels`."""
    chunk: int
    """Pixels of an overview, a side; a power of two."""

    @classmethod
    def of(cls, spec: StoreSpec, smallest: int = SMALLEST, square: int = SQUARE, chunk: int = CHUNK) -> Pyramid:
        """Overviews down to one of at most `smallest` pixels a side.

        >>> Pyramid.of(StoreSpec((20000, 9000), (2048, 2048), (1024, 1024), values="float32", outputs=["a"])).levels
        6
        """
        levels = 0
        while -(-max(spec.shape) // (1 << levels)) > smallest:
            levels += 1
        return cls(spec, levels, max(square, 1 << levels), chunk)

    def digest(self, content: str) -> str:
        """What overviews of a map with the content of this digest are made from and how, in hexadecimal."""
        made = [FORMAT, content, self.spec.digest, self.levels, self.square, self.chunk]
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()

    @property
    def grid(self) -> tuple[int, int]:
        """Squares along (rows, columns)."""
        return -(-self.spec.shape[0] // self.square), -(-self.spec.shape[1] // self.square)

    def squares(self) -> Iterator[tuple[int, int]]:
        """Every square's (row, column), row by row."""
        return ((row, col) for row in range(self.grid[0]) for col in range(self.grid[1]))

    def window(self, square: tuple[int, int], level: int = 0) -> Window:
        """The pixels of a level that lie in a square; of the map at level 0."""
        side = self.square >> level
        row, col = square
        shape = self.shape(level)
        return Window.of(row * side, (row + 1) * side, col * side, (col + 1) * side).clip(shape)

    def shape(self, level: int) -> tuple[int, int]:
        """(rows, columns) of a level: cells that the map's end cuts short count whole."""
        rows, cols = self.spec.shape
        return -(-rows // (1 << level)), -(-cols // (1 << level))

    def is_direct(self, level: int) -> bool:
        """Whether a square is a shard of this level."""
        return self.square >> level >= self.chunk

    def reduced(self) -> tuple[ArraySpec, ...]:
        """The map's arrays that have overviews."""
        return tuple(array for array in self.spec.arrays() if array.name in REDUCED)

    def level(self, level: int) -> StoreSpec:
        """A level's grid, as if it were a map of its own: its blocks are its shards. The map's own at level 0."""
        if level == 0:
            return self.spec
        factor, spec = 1 << level, self.spec
        transform, gcps = spec.transform, spec.gcps
        if transform is not None:
            a, b, c, d, e, f = transform
            transform = (a * factor, b * factor, c, d * factor, e * factor, f)
        if gcps is not None:
            gcps = [ControlPoint(p.row / factor, p.col / factor, p.x, p.y, p.z) for p in gcps]
        side = max(self.square >> level if self.is_direct(level) else self.square // 2, self.chunk)
        return replace(
            spec,
            shape=self.shape(level),
            shard=(side, side),
            chunk=(self.chunk, self.chunk),
            transform=transform,
            gcps=gcps,
            probabilities=None,
        )

    def dims(self, level: int) -> tuple[str, str]:
        """The names of a level's axes, which are not the map's, since xarray would take them for the same."""
        return f"y_{1 << level}x", f"x_{1 << level}x"

    def overview(self, array: ArraySpec, level: int) -> ArraySpec:
        """A level of one of the map's arrays. Channels are shards of their own."""
        own = next(each for each in self.level(level).arrays() if each.name == array.name)
        layers = len(own.shape) - 2
        return replace(
            own,
            name=f"{overview_group(1 << level)}/{own.name}",
            dims=(*own.dims[:layers], *self.dims(level)),
            shard=(*(1,) * layers, *own.shard[layers:]),
        )
