"""Integer rectangles of raster pixels: where things are, and how one lies within another.

All intervals are half-open, all pairs are (rows, columns), and a window may reach beyond the raster:

    raster   0 |----------------------------| length
    window   -16 |--------|  grow, clip, shift and intersect give the others
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import UsageError


@dataclass(frozen=True, slots=True, order=True)
class Interval:
    """The pixels start <= i < stop of one axis.

    >>> Interval(2, 10).grow(3, 1)
    Interval(start=-1, stop=11)
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.stop < self.start:
            raise UsageError(f"interval {self.start}:{self.stop} ends before it starts")

    def __len__(self) -> int:
        return self.stop - self.start

    def grow(self, before: int, after: int) -> Interval:
        """The interval with `before` more pixels at its start and `after` more at its end."""
        return Interval(self.start - before, self.stop + after)

    def shift(self, by: int) -> Interval:
        """The interval moved by `by` pixels."""
        return Interval(self.start + by, self.stop + by)

    def clip(self, length: int) -> Interval:
        """The part that lies in an axis of `length` pixels; empty, at the nearer end, where none does."""
        return Interval(min(max(self.start, 0), length), min(max(self.stop, 0), length))

    def intersect(self, other: Interval) -> Interval:
        """The common part; empty where there is none."""
        start = max(self.start, other.start)
        return Interval(start, max(start, min(self.stop, other.stop)))

    def hull(self, other: Interval) -> Interval:
        """The smallest interval that holds both."""
        return Interval(min(self.start, other.start), max(self.stop, other.stop))

    def contains(self, other: Interval) -> bool:
        """Whether every pixel of `other` is in this interval."""
        return self.start <= other.start and other.stop <= self.stop

    def within(self, outer: Interval) -> slice:
        """The slice that selects this interval from an array that holds `outer`.

        >>> Interval(5, 8).within(Interval(4, 20))
        slice(1, 4, None)
        """
        if not outer.contains(self):
            raise UsageError(f"interval {self.start}:{self.stop} is not within {outer.start}:{outer.stop}")
        return slice(self.start - outer.start, self.stop - outer.start)

    def reflect(self, length: int) -> NDArray[np.intp]:
        """Where each pixel's value comes from in an axis of `length` pixels extended by reflection.

        As numpy.pad's mode "reflect" (the border pixel is not repeated), as often as needed; an axis of one
        pixel repeats that pixel. Returns len(self) indices into 0..length-1.

        >>> Interval(-2, 5).reflect(3).tolist()
        [2, 1, 0, 1, 2, 1, 0]
        """
        if length < 1:
            raise UsageError(f"an axis of {length} pixels cannot be extended; it needs at least 1")
        positions = np.arange(self.start, self.stop, dtype=np.intp)
        if length == 1:
            return np.zeros_like(positions)
        period = 2 * (length - 1)
        folded = positions % period
        return np.minimum(folded, period - folded)


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """A rectangle of raster pixels.

    >>> Window.of(0, 4, 2, 8).shape
    (4, 6)
    """

    rows: Interval
    cols: Interval

    @classmethod
    def of(cls, row_start: int, row_stop: int, col_start: int, col_stop: int) -> Window:
        """The window of rows row_start..row_stop-1 and columns col_start..col_stop-1."""
        return cls(Interval(row_start, row_stop), Interval(col_start, col_stop))

    @classmethod
    def whole(cls, shape: tuple[int, int]) -> Window:
        """The window of a whole raster of `shape` (rows, columns)."""
        return cls.of(0, shape[0], 0, shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns), in pixels."""
        return len(self.rows), len(self.cols)

    @property
    def area(self) -> int:
        """The number of pixels."""
        return len(self.rows) * len(self.cols)

    @property
    def origin(self) -> tuple[int, int]:
        """The first (row, column)."""
        return self.rows.start, self.cols.start

    def shift(self, rows: int, cols: int) -> Window:
        """The window moved by (rows, cols) pixels."""
        return Window(self.rows.shift(rows), self.cols.shift(cols))

    def clip(self, shape: tuple[int, int]) -> Window:
        """The part that lies in a raster of `shape`."""
        return Window(self.rows.clip(shape[0]), self.cols.clip(shape[1]))

    def intersect(self, other: Window) -> Window:
        """The common part; empty where there is none."""
        return Window(self.rows.intersect(other.rows), self.cols.intersect(other.cols))

    def hull(self, other: Window) -> Window:
        """The smallest window that holds both."""
        return Window(self.rows.hull(other.rows), self.cols.hull(other.cols))

    def contains(self, other: Window) -> bool:
        """Whether every pixel of `other` is in this window."""
        return self.rows.contains(other.rows) and self.cols.contains(other.cols)

    def within(self, outer: Window) -> tuple[slice, slice]:
        """The slices that select this window from the last two axes of an array that holds `outer`."""
        return self.rows.within(outer.rows), self.cols.within(outer.cols)

    def __str__(self) -> str:
        return f"rows {self.rows.start}:{self.rows.stop}, columns {self.cols.start}:{self.cols.stop}"


class Placement(NamedTuple):
    """One tile's part in a block: where its input lies, which of its outputs count, where they go."""

    source: Window
    """The tile's input, in pixels of the block's pixel array (its last two axes)."""
    crop: Window
    """The outputs that are used, in pixels of the tile's own output."""
    target: Window
    """Where they go, in pixels of the block's output; the shape of `crop`."""
    core: Window | None = None
    """What the tile has to compute wherever it is used, in pixels of its own output; holds `crop`. None: all."""
