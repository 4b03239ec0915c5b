"""What a label map holds, class by class: pixels, area on the ground, mean confidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tilepipe.errors import StoreError
from tilepipe.ground import row_areas
from tilepipe.store.output import OutputStore
from tilepipe.store.records import Record
from tilepipe.window import Window

STRIP = 1 << 24
"""Pixels that are read at once, at most."""


@dataclass(frozen=True, slots=True)
class ClassStatistics:
    """What a map holds of a class."""

    number: int
    name: str
    pixels: int
    share: float | None
    """Of the pixels with data; None where there are none."""
    area_m2: float | None
    """On the ground; None where CRS or transform are unknown."""
    confidence: float | None
    """The mean, 0 to 1; None without pixels or in a store without confidence."""


@dataclass(frozen=True, slots=True)
class MapStatistics:
    """What the finished blocks of a map hold."""

    blocks: int
    """In all."""
    done: int
    pixels: int
    """With data."""
    nodata: int
    """Pixels without, in finished blocks."""
    area_m2: float | None
    """Of the pixels with data."""
    classes: tuple[ClassStatistics, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)


def map_statistics(store: OutputStore, progress: Callable[[int, int], None] | None = None) -> MapStatistics:
    """What the finished blocks of a store of labels hold; StoreError for a store of values.

    Counts come from the blocks' records. Pixels are read only where these do not tell enough: for confidence, and
    for areas where rows differ, in a geographic CRS (`ground.row_areas`), in blocks of more than one class.
    `progress` is called with (pixels read, pixels to read).
    """
    spec = store.spec
    if spec.kind != "labels":
        raise StoreError(f"{store.path} holds values, no classes; `tilepipe status` shows their ranges")
    records = list(store.records())
    counts = np.array([record.counts for record in records], np.int64).reshape(-1, len(spec.classes))
    cells = row_areas(spec)
    even = cells is None or bool((cells == cells[0]).all())
    sums = _Sums(np.zeros(spec.nodata + 1), np.zeros((spec.nodata + 1, 2), np.int64))
    windows = list(_to_read(store, records, even))
    total, read = sum(window.area for window in windows), 0
    for window in windows:
        sums.add(store, window, np.ones(spec.shape[0]) if cells is None else cells)
        read += window.area
        if progress is not None:
            progress(read, total)
    if not even and not spec.confidence and cells is not None:
        _add_even_blocks(store, records, cells, sums)
    pixels = counts.sum(axis=0)
    areas = None
    if cells is not None:
        areas = pixels * cells[0] if even else sums.area[: len(pixels)]
    return _result(store, records, pixels, areas, sums.trust)


@dataclass(frozen=True, slots=True)
class _Sums:
    """Over pixels that were read, by label."""

    area: NDArray[np.float64]
    """(label,)"""
    trust: NDArray[np.int64]
    """(label, 2): the sum of confidences, and of how many pixels."""

    def add(self, store: OutputStore, window: Window, cells: NDArray[np.float64]) -> None:
        """Read a window and add what it holds."""
        rows = slice(window.rows.start, window.rows.stop)
        place = (rows, slice(window.cols.start, window.cols.stop))
        labels = np.asarray(store.array("labels")[place])
        confidence = np.empty((0, 0), np.uint8)
        if store.spec.confidence:
            confidence = np.asarray(store.array("confidence")[place])
        tally(labels, confidence, cells[rows], self.area, self.trust)


def _to_read(store: OutputStore, records: list[Record], even: bool) -> Iterator[Window]:
    """Windows of the finished blocks whose records do not tell enough."""
    spec = store.spec
    rows = max(1, STRIP // spec.shard[1] // spec.chunk[0]) * spec.chunk[0]
    for record in records:
        kinds = np.count_nonzero(record.counts) + (record.nodata > 0)
        if any(record.counts) and (spec.confidence or (not even and kinds > 1)):
            block = store.spec.block_window((record.row, record.col))
            for top in range(block.rows.start, block.rows.stop, rows):
                yield Window.of(top, min(top + rows, block.rows.stop), block.cols.start, block.cols.stop)


def _add_even_blocks(store: OutputStore, records: list[Record], cells: NDArray[np.float64], sums: _Sums) -> None:
    """The areas of the blocks that hold one class alone."""
    for record in records:
        if np.count_nonzero(record.counts) == 1 and not record.nodata:
            window = store.spec.block_window((record.row, record.col))
            rows = cells[window.rows.start : window.rows.stop]
            sums.area[int(np.argmax(record.counts))] += float(rows.sum()) * len(window.cols)


def _result(
    store: OutputStore,
    records: list[Record],
    pixels: NDArray[np.int64],
    areas: NDArray[np.float64] | None,
    trust: NDArray[np.int64],
) -> MapStatistics:
    whole = int(pixels.sum())
    classes = tuple(
        ClassStatistics(
            number,
            label.name,
            int(pixels[number]),
            int(pixels[number]) / whole if whole else None,
            None if areas is None else float(areas[number]),
            float(trust[number, 0] / trust[number, 1] / 254) if trust[number, 1] else None,
        )
        for number, label in enumerate(store.spec.classes)
    )
    area = None if areas is None else float(areas.sum())
    nodata = sum(record.nodata for record in records)
    return MapStatistics(store.blocks, len(records), whole, nodata, area, classes)


@njit(nogil=True, cache=True)
def tally(
    labels: NDArray[Any],
    confidence: NDArray[np.uint8],
    cells: NDArray[np.float64],
    area: NDArray[np.float64],
    trust: NDArray[np.int64],
) -> None:
    """Add to each label's area and confidence what pixels (h, w) hold; `cells` (h,) are the areas of the rows'."""
    counts = np.zeros(area.size, np.int64)
    for row in range(labels.shape[0]):
        for col in range(labels.shape[1]):
            counts[labels[row, col]] += 1
        for label in range(area.size):
            area[label] += counts[label] * cells[row]
            counts[label] = 0
        if confidence.size:
            for col in range(labels.shape[1]):
                if confidence[row, col] != 255:
                    trust[labels[row, col], 0] += confidence[row, col]
                    trust[labels[row, col], 1] += 1
