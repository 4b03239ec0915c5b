"""Scoring label maps against the truth: read block by block, so that memory does not grow with the rasters.

    pairs -> blocks of the pixels both have --read both, with a margin--> counts of a block -> their sums -> scores

Blocks are counted side by side; sums of whole numbers do not depend on their order, and boundary pixels see as far
as the tolerance: the result is that of the whole images whatever the block.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilepipe.comparison.error_map import CORRECT, IGNORED, WRONG, ErrorMap, error_map
from tilepipe.comparison.labels import NONE, LabelReader
from tilepipe.comparison.pairs import Classes, Maps, Pair, classes_of, notes_of, open_pairs
from tilepipe.comparison.scores import Evaluation, ImageScore
from tilepipe.errors import InputError, UsageError
from tilepipe.metrics import BoundaryCounts, Confusion, boundary_counts, boundary_margin, default_tolerance
from tilepipe.progress import Progress
from tilepipe.raster.source import Nodata
from tilepipe.window import Window

DEFAULT_LIMIT = 256.0
"""Pixels that the default boundary tolerance does not exceed."""
TOLERANCE_LIMIT = 1024.0
"""The largest boundary tolerance, in pixels: it widens each block that is held in memory."""


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What is scored, and how."""

    classes: tuple[str, ...] | None = None
    """Names of the labels 0, 1, ...; None for those that the maps tell, or else for a class per value below 256."""
    void: tuple[int, ...] = ()
    """Values of the truth that are ignored, beside its nodata."""
    tolerance: float | None = None
    """Of boundaries, in pixels; None for 0.75 % of each image's diagonal, but at most 256."""
    boundary: bool = True
    """Whether boundary F1 is computed, which takes most of the time."""
    nodata: Nodata = None
    """The prediction's value for nodata, in place of its own; "none" for none."""
    truth_nodata: Nodata = None
    """The truth's value for nodata, in place of its own; "none" for none."""
    errors: str | os.PathLike[str] | None = None
    """Where a map of the errors goes, .tif or .png; of one pair of maps only."""
    overwrite: bool = False
    """Whether that map may replace a file."""
    block: int = 2048
    """Rows and columns that are read at once, without the margin."""
    threads: int | None = None
    """Blocks that are counted at once; None for one a core, four at most."""

    def __post_init__(self) -> None:
        if self.tolerance is not None and not 0 <= self.tolerance <= TOLERANCE_LIMIT:
            raise UsageError(f"boundary tolerance {self.tolerance}; give 0 to {TOLERANCE_LIMIT:g} pixels")
        if self.block < 1:
            raise UsageError(f"block {self.block}; give 1 pixel or more")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"{self.threads} threads; give 1 or more")

    def tolerance_of(self, shape: tuple[int, int]) -> float:
        """The boundary tolerance of an image of `shape`, in pixels."""
        return min(default_tolerance(shape), DEFAULT_LIMIT) if self.tolerance is None else self.tolerance


def evaluate(
    prediction: Maps,
    truth: Maps,
    options: EvaluationOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """The scores of a label map, or of several, against the truth.

    Each side is a tilepipe store or any raster that GDAL opens, several of them, or a folder of them matched by name.
    Maps are laid on each other by their georeference, and scored where both are; without one, pixel by pixel.
    Raises InputError or StoreError in one line where a map cannot be read, has labels beyond the classes, lies on
    another grid or elsewhere, and where no pixel at all can be scored.
    """
    options = options or EvaluationOptions()
    pairs = open_pairs(prediction, truth, options.nodata, options.truth_nodata)
    classes = classes_of(pairs, options.classes)
    if options.errors is not None and len(pairs) > 1:
        raise UsageError(f"{options.errors} would show one pair of maps, and {len(pairs)} are scored; give one pair")
    counter = _Counter(pairs, options.block, progress)
    confusion, images = Confusion.empty(len(classes.names)), []
    for pair in pairs:
        image, counts = _score(pair, options, classes, counter)
        confusion.merge(counts)
        images.append(image)
    found = Evaluation(classes.names, confusion, tuple(images), counter.seconds, notes_of(pairs, classes))
    if confusion.pixels == 0:
        raise InputError(
            f"no pixel of {pairs[0].truth.name} can be scored: {found.ignored} are void or nodata, and at "
            f"{found.missing} more {pairs[0].prediction.name} is nodata; check --void and what both declare as nodata"
        )
    return found if classes.told else found.trimmed()


def _score(pair: Pair, options: EvaluationOptions, classes: Classes, counter: _Counter) -> tuple[ImageScore, Confusion]:
    """One pair's scores, and its confusion matrix."""
    count, tolerance = len(classes.names), options.tolerance_of(pair.shape)
    confusion, boundary = Confusion.empty(count), BoundaryCounts.empty(count)
    ignored = missing = 0
    with ExitStack() as stack:
        prediction = stack.enter_context(
            pair.prediction.open(count, (), classes.remedy("--nodata {value} takes it for nodata"))
        )
        truth = stack.enter_context(pair.truth.open(count, options.void, classes.remedy("--void {value} ignores it")))
        errors = None if options.errors is None else stack.enter_context(_error_map(pair, options))
        task = _Block(pair, prediction, truth, count, tolerance if options.boundary else None)
        for window, block in _in_order(task, _blocks(pair.shape, options.block), _threads(options)):
            confusion.merge(block.confusion)
            boundary.merge(block.boundary)
            ignored, missing = ignored + block.ignored, missing + block.missing
            if errors is not None:
                errors.write(window, block.errors)
            counter.advance(window)
    # Of classes that the truth does not show there is no score, and without boundaries of none.
    shown = np.where((confusion.truth_pixels > 0) & options.boundary, 1.0, math.nan)
    image = ImageScore(
        prediction=pair.prediction.name,
        truth=pair.truth.name,
        shape=pair.shape,
        pixels=confusion.pixels,
        ignored=ignored,
        missing=missing,
        accuracy=confusion.accuracy,
        mean_iou=confusion.mean_iou,
        tolerance=tolerance,
        boundary=np.stack([boundary.precision, boundary.recall, boundary.f1]) * shown,
    )
    return image, confusion


class _BlockScore(NamedTuple):
    """What a block gave."""

    confusion: Confusion
    boundary: BoundaryCounts
    ignored: int
    missing: int
    errors: NDArray[np.uint8]
    """(rows, columns): CORRECT, WRONG or IGNORED."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Reads and counts one block of a pair; any number of threads may call it."""

    pair: Pair
    prediction: LabelReader
    truth: LabelReader
    classes: int
    tolerance: float | None
    """None for no boundaries."""

    def __call__(self, window: Window) -> _BlockScore:
        """The counts of a window of the pixels that both maps have."""
        margin = 0 if self.tolerance is None else boundary_margin(self.tolerance)
        rows, cols = window.rows.grow(margin, margin), window.cols.grow(margin, margin)
        seen = Window(rows, cols).clip(self.pair.shape)
        overlap = self.pair.overlap
        found = self.prediction.read(seen.shift(*overlap.first.origin))
        truth = self.truth.read(seen.shift(*overlap.second.origin))
        valid = (truth != NONE) & (found != NONE)
        core = window.shift(-seen.rows.start, -seen.cols.start)
        own = core.within(Window.whole(seen.shape))
        confusion, boundary = Confusion.empty(self.classes), BoundaryCounts.empty(self.classes)
        confusion.add(truth[own], found[own], valid[own])
        if self.tolerance is not None:
            boundary = boundary_counts(truth, found, self.classes, self.tolerance, valid, core)
        ignored = int(np.count_nonzero(truth[own] == NONE))
        errors = np.full(window.shape, CORRECT, np.uint8)
        errors[truth[own] != found[own]] = WRONG
        errors[~valid[own]] = IGNORED
        return _BlockScore(confusion, boundary, ignored, window.area - confusion.pixels - ignored, errors)


class _Counter:
    """How far the work is over all pairs."""

    def __init__(self, pairs: Sequence[Pair], block: int, progress: Callable[[Progress], None] | None) -> None:
        self._tell, self._started = progress, time.perf_counter()
        self._done = self._pixels = 0
        self._total = sum(math.prod(-(-side // block) for side in pair.shape) for pair in pairs)
        self._total_pixels = sum(math.prod(pair.shape) for pair in pairs)

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.perf_counter() - self._started

    def advance(self, window: Window) -> None:
        """Another block is counted."""
        self._done, self._pixels = self._done + 1, self._pixels + window.area
        if self._tell is not None:
            self._tell(Progress(self._done, self._total, 0, self._pixels, self._total_pixels, self.seconds))


def _blocks(shape: tuple[int, int], side: int) -> Iterator[Window]:
    """Windows that make up a raster of `shape`, row by row."""
    for row in range(0, shape[0], side):
        for col in range(0, shape[1], side):
            yield Window.of(row, row + side, col, col + side).clip(shape)


def _in_order(task: _Block, windows: Iterator[Window], threads: int) -> Iterator[tuple[Window, _BlockScore]]:
    """Each window's result, in order; no more than `threads` blocks and one are held at a time."""
    waiting: deque[tuple[Window, Future[_BlockScore]]] = deque()
    with ThreadPoolExecutor(threads, "tilepipe-score") as pool:
        try:
            for window in windows:
                waiting.append((window, pool.submit(task, window)))
                if len(waiting) > threads:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, result in waiting:
                result.cancel()


def _threads(options: EvaluationOptions) -> int:
    return options.threads or min(4, len(os.sched_getaffinity(0)))


def _error_map(pair: Pair, options: EvaluationOptions) -> ErrorMap:
    return error_map(str(options.errors), pair, options.overwrite)
