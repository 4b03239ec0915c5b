"""Windows on objects, for training in two stages: first centred on each, then where candidates overlap one enough.

As Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation" (arXiv 1505.04366, section 4.2),
train DeconvNet. An object is a connected component of a class's pixels, which stands in for annotated instances;
candidates are boxes of random place and shape, which stand in for proposals. In both stages all labels of a window
count, where the paper's first one keeps the centred object's alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import InputError, UsageError
from tilepipe.training.pairs import Pair
from tilepipe.training.statistics import target_table, targets_of
from tilepipe.training.windows import Augmentation, Draw, check_scales, draw_of, drawn_flip, random_of, turned
from tilepipe.window import Interval, Window

SMALLEST = 64
"""Pixels; smaller components are mostly errors of the labels."""
STRIP_AREA = 1 << 22
"""Pixels of the strips of whole rows in which objects are looked for: some 80 MB of memory, whatever the raster."""
CANDIDATES = 64
"""Boxes that are drawn for a candidate; where none overlaps enough, the object's own is taken."""

Box = tuple[Interval, Interval]


@dataclass(frozen=True, slots=True)
class Object:
    """A connected component of the pixels of one class."""

    pair: int
    """The pair's place in the data set."""
    label: int
    """Its class."""
    box: Window
    """The smallest window that holds it."""
    pixels: int
    """How many it has."""


@dataclass(frozen=True, slots=True)
class ObjectDraws:
    """The first stage: windows centred on objects, all objects alike likely.

    A window has the crop's aspect, holds the object's box grown `margin` times, and is resampled to the crop; it is
    moved into the raster where it would reach beyond. `zoom` bounds how many crops long it is: around smaller
    objects there is more to see, and larger ones are seen in part, at a random place of their box.
    """

    objects: tuple[Object, ...]
    shapes: tuple[tuple[int, int], ...]
    """(rows, columns) of each pair."""
    augmentation: Augmentation
    seed: int
    margin: float = 1.2
    zoom: tuple[float, float] = (0.25, 4.0)

    def __post_init__(self) -> None:
        _check(self.objects, self.margin, self.zoom)

    def __call__(self, index: int, attempt: int = 0) -> Draw:
        """The draw of item `index`."""
        random = random_of(self.seed, index, attempt)
        found = self.objects[random.integers(len(self.objects))]
        return _around(random, found.pair, (found.box.rows, found.box.cols), self)


@dataclass(frozen=True, slots=True)
class CandidateDraws:
    """The second stage: windows as of `ObjectDraws`, around boxes of random place and shape that overlap an object's.

    `overlap`: the least intersection over union of both boxes, before the margin.
    """

    objects: tuple[Object, ...]
    shapes: tuple[tuple[int, int], ...]
    """(rows, columns) of each pair."""
    augmentation: Augmentation
    seed: int
    margin: float = 1.2
    zoom: tuple[float, float] = (0.25, 4.0)
    overlap: float = 0.5

    def __post_init__(self) -> None:
        _check(self.objects, self.margin, self.zoom)
        if not 0 < self.overlap <= 1:
            raise UsageError(f"an overlap of {self.overlap} is not legal; choose one above 0, up to 1")

    def __call__(self, index: int, attempt: int = 0) -> Draw:
        """The draw of item `index`."""
        random = random_of(self.seed, index, attempt)
        found = self.objects[random.integers(len(self.objects))]
        return _around(random, found.pair, candidate(random, found.box, self.overlap), self)


def candidate(random: np.random.Generator, box: Window, overlap: float) -> Box:
    """A box whose intersection over union with `box` is at least `overlap`: rows and columns.

    Sides are up to 1 / overlap times as long or short, their logarithm uniform, and moved evenly.
    """
    lengths = np.array(box.shape, np.float64)
    centres = np.array([(axis.start + axis.stop) / 2 for axis in (box.rows, box.cols)])
    sides = lengths * overlap ** random.uniform(-1, 1, (CANDIDATES, 2))
    # Further off no box of these sides can overlap enough.
    reach = (sides + lengths) / 2 - overlap * np.maximum(sides, lengths)
    middles = centres + random.uniform(-1, 1, (CANDIDATES, 2)) * reach
    starts = np.round(middles - sides / 2).astype(np.int64)
    stops = np.maximum(starts + 1, np.round(middles + sides / 2).astype(np.int64))
    enough = np.flatnonzero(_overlaps(starts, stops, box) >= overlap)
    if not len(enough):
        return box.rows, box.cols
    first = enough[0]
    rows, cols = (Interval(int(starts[first, axis]), int(stops[first, axis])) for axis in (0, 1))
    return rows, cols


def find_objects(
    pairs: Sequence[Pair],
    classes: int,
    void: Sequence[int] = (),
    background: Sequence[int] = (0,),
    smallest: int = SMALLEST,
) -> tuple[Object, ...]:
    """The objects of all pairs: components, also across corners, of at least `smallest` pixels of a class.

    Classes in `background` have none. Labels are read once, in strips of whole rows, and joined across them, so
    that memory depends on no raster's size. Raises InputError where there is none, or for a label beyond the classes.
    """
    table = target_table(classes, void)
    wanted = [label for label in range(classes) if label not in background]
    found = []
    for number, pair in enumerate(pairs):
        parts = {label: _Parts() for label in wanted}
        for window in _strips(pair.shape):
            targets = targets_of(pair, window, pair.read_labels(window), table)
            for label in wanted:
                parts[label].add(targets == label, window.rows.start)
        for label in wanted:
            joined = [Object(number, label, box, pixels) for box, pixels in parts[label].joined() if pixels >= smallest]
            found.extend(sorted(joined, key=lambda each: each.box.origin))
    if not found:
        raise InputError(
            f"no class but the background has an object of {smallest} pixels or more; train on windows anywhere"
        )
    return tuple(found)


@dataclass(slots=True)
class _Parts:
    """Components of one class's pixels within each strip, and which of them touch across strips."""

    boxes: list[NDArray[np.int64]] = field(default_factory=list)
    """Each (parts, 4): first row, end row, first column, end column."""
    pixels: list[NDArray[np.int64]] = field(default_factory=list)
    touching: list[NDArray[np.int64]] = field(default_factory=list)
    """Each (pairs of parts, 2), numbered from 0."""
    count: int = 0
    last_row: NDArray[np.int64] | None = None
    """The part of each pixel in the last strip's last row, numbered from 1; 0 for none."""

    def add(self, mask: NDArray[np.bool_], first_row: int) -> None:
        """Takes up the next strip, which begins at `first_row`."""
        if not mask.any():
            self.last_row = None
            return
        ndimage = _ndimage()
        labelled, count = ndimage.label(mask, np.ones((3, 3), np.bool_))
        slices = ndimage.find_objects(labelled)
        self.boxes.append(
            np.array([[first_row + r.start, first_row + r.stop, c.start, c.stop] for r, c in slices], np.int64)
        )
        self.pixels.append(np.bincount(labelled.ravel(), minlength=count + 1)[1:])
        numbered = np.where(labelled[[0, -1]] > 0, labelled[[0, -1]].astype(np.int64) + self.count, 0)
        if self.last_row is not None:
            self._touch(self.last_row, numbered[0])
        self.count += count
        self.last_row = numbered[1]

    def joined(self) -> Iterator[tuple[Window, int]]:
        """(box, pixels) of each component of the whole raster."""
        if self.count == 0:
            return
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        edges = np.concatenate([np.empty((0, 2), np.int64), *self.touching])
        graph = coo_array((np.ones(len(edges), np.bool_), (edges[:, 0], edges[:, 1])), (self.count, self.count))
        count, member = connected_components(graph, directed=False)
        boxes, pixels = np.concatenate(self.boxes), np.concatenate(self.pixels)
        least, most = np.full((count, 4), np.iinfo(np.int64).max), np.zeros((count, 4), np.int64)
        np.minimum.at(least, member, boxes)
        np.maximum.at(most, member, boxes)
        sums = np.bincount(member, pixels, count).astype(np.int64)
        for low, high, total in zip(least.tolist(), most.tolist(), sums.tolist(), strict=True):
            yield Window.of(low[0], high[1], low[2], high[3]), total

    def _touch(self, above: NDArray[np.int64], below: NDArray[np.int64]) -> None:
        width = len(above)
        for by in (-1, 0, 1):
            one = above[max(0, -by) : width - max(0, by)]
            other = below[max(0, by) : width - max(0, -by)]
            both = (one > 0) & (other > 0)
            self.touching.append(np.unique(np.stack([one[both], other[both]], axis=1), axis=0) - 1)


def _around(random: np.random.Generator, pair: int, box: Box, draws: ObjectDraws | CandidateDraws) -> Draw:
    """The draw of the window that shows a box."""
    turns, mirrored = drawn_flip(random, draws.augmentation.flips)
    crop = turned(draws.augmentation.crop, turns)
    scale = max(len(axis) * draws.margin / side for axis, side in zip(box, crop, strict=True))
    scale = min(max(scale, draws.zoom[0]), draws.zoom[1])
    rows, cols = (
        _centred(random, axis, max(1, round(side * scale)), length)
        for axis, side, length in zip(box, crop, draws.shapes[pair], strict=True)
    )
    return draw_of(random, pair, Window(rows, cols), draws.augmentation, (turns, mirrored))


def _centred(random: np.random.Generator, box: Interval, side: int, length: int) -> Interval:
    """`side` pixels about the box's centre, or anywhere in a longer box; in the axis, where that is long enough."""
    free = len(box) - side
    start = box.start + (int(random.integers(free, endpoint=True)) if free > 0 else free // 2)
    start = min(max(start, 0), length - side) if side <= length else min(max(start, length - side), 0)
    return Interval(start, start + side)


def _overlaps(starts: NDArray[np.int64], stops: NDArray[np.int64], box: Window) -> NDArray[np.float64]:
    """Intersection over union of each of the boxes (n, 2) with `box`."""
    first = np.array([box.rows.start, box.cols.start])
    end = np.array([box.rows.stop, box.cols.stop])
    common = np.clip(np.minimum(stops, end) - np.maximum(starts, first), 0, None).prod(axis=1)
    either: NDArray[np.float64] = (stops - starts).prod(axis=1) + box.area - common
    return common / either


def _strips(shape: tuple[int, int]) -> Iterator[Window]:
    height = max(1, STRIP_AREA // max(1, shape[1]))
    for row in range(0, shape[0], height):
        yield Window.of(row, min(row + height, shape[0]), 0, shape[1])


def _check(objects: Sequence[Object], margin: float, zoom: tuple[float, float]) -> None:
    if not objects:
        raise UsageError("there is no object to draw; train on windows anywhere")
    if not margin > 0:
        raise UsageError(f"a margin of {margin} is not legal; choose one above 0, such as 1.2")
    check_scales(zoom)


def _ndimage() -> Any:
    try:
        from scipy import ndimage
    except ImportError:
        raise UsageError("finding objects needs scipy, of the train extra: pip install 'tilepipe[train]'") from None
    return ndimage
