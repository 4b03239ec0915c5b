"""Small regions merged into their largest neighbours, as `gdal_sieve` does, in three passes over a map's rows.

The first pass numbers the regions and counts their pixels, the second finds the largest neighbour of each small one,
the third gives it that neighbour's label; where the neighbour is small itself, its own largest neighbour decides, and
so on, by the sizes of before. A small region that nowhere finds a large one stays. Pixels without data are neither
merged nor merged into.

Held are 14 bytes for each number given, of which a region may have several: one for each top of its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilepipe.polygons.strips import Strip
from tilepipe.polygons.sweep import NONE, compiled

LARGEST = np.iinfo(np.int32).max
"""Regions of more pixels count as of so many."""


class Rows(NamedTuple):
    """The last row of a pass."""

    labels: NDArray[np.uint16]
    """(width,)"""
    numbers: NDArray[np.int32]
    """(width,): the numbers of its pixels; none for nodata."""


class Table(NamedTuple):
    """What is known of each number; arrays have room for more."""

    parents: NDArray[np.int32]
    sizes: NDArray[np.int32]
    """Pixels, of the numbers that stand for whole regions."""
    labels: NDArray[np.uint16]


class Sieve:
    """What becomes of each region of a map; `apply` gives the map's rows without the small ones."""

    def __init__(self, width: int, nodata: int, labels: NDArray[np.uint16]) -> None:
        self._width, self._nodata, self._labels = width, nodata, labels

    @classmethod
    def of(cls, strips: Callable[[], Iterable[Strip]], width: int, threshold: int, nodata: int) -> Sieve:
        """The sieve of a map that `strips` gives anew at each call; regions of fewer than `threshold` pixels go."""
        table, count = _numbered(strips(), width, nodata)
        largest = np.full(count, NONE, np.int32)
        rows, used = _start(width, nodata), 0
        for strip in strips():
            used = find_neighbours(rows, table, largest, strip.labels, used, threshold, nodata)
        return cls(width, nodata, decide(table, largest, count, threshold))

    def apply(self, strips: Iterable[Strip]) -> Iterator[Strip]:
        """The map's strips, in order, with the labels of merged regions."""
        rows, used = _start(self._width, self._nodata), 0
        for strip in strips:
            labels = np.empty_like(strip.labels)
            used = relabel(rows, self._labels, strip.labels, labels, used, self._nodata)
            yield Strip(strip.row, labels, strip.confidence)


def _start(width: int, nodata: int) -> Rows:
    return Rows(np.full(width, nodata, np.uint16), np.full(width, NONE, np.int32))


def _numbered(strips: Iterable[Strip], width: int, nodata: int) -> tuple[Table, int]:
    """The regions' sizes and labels, and how many numbers were given."""
    rows, used = _start(width, nodata), 0
    table = Table(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.uint16))
    for strip in strips:
        # A run of pixels may be a region of its own.
        step = max(1, (1 << 22) // width)
        for start in range(0, len(strip.labels), step):
            part = strip.labels[start : start + step]
            if used + part.size > len(table.parents):
                table = _resized(table, used, used + used // 2 + part.size)
            used = count_rows(rows, table, part, used, nodata)
    return _resized(table, used, used), used


def _resized(table: Table, used: int, size: int) -> Table:
    parents, sizes, labels = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.uint16)
    parents[:used], sizes[:used], labels[:used] = table.parents[:used], table.sizes[:used], table.labels[:used]
    return Table(parents, sizes, labels)


@compiled
def _number_row(rows: Rows, labels: NDArray[np.uint16], numbers: NDArray[np.int32], used: int, nodata: int) -> int:
    """Number a row's runs: as the first of those above that they touch, else anew; returns how many there are then."""
    number = NONE
    start = 0
    while start < labels.size:
        label, stop, number = labels[start], start + 1, NONE
        while stop < labels.size and labels[stop] == label:
            stop += 1
        if label != nodata:
            for col in range(start, stop):
                if rows.labels[col] == label:
                    number = rows.numbers[col]
                    break
            if number == NONE:
                number = used
                used += 1
        for col in range(start, stop):
            numbers[col] = number
        start = stop
    return used


@compiled
def _keep_row(rows: Rows, labels: NDArray[np.uint16], numbers: NDArray[np.int32]) -> None:
    for col in range(labels.size):
        rows.labels[col], rows.numbers[col] = labels[col], numbers[col]


@compiled
def count_rows(rows: Rows, table: Table, labels: NDArray[np.uint16], used: int, nodata: int) -> int:
    """Count rows of pixels under their numbers, and join numbers that are one region."""
    numbers = np.empty(labels.shape[1], np.int32)
    for i in range(labels.shape[0]):
        before = used
        used = _number_row(rows, labels[i], numbers, used, nodata)
        for number in range(before, used):
            table.parents[number] = number
            table.sizes[number] = 0
        for col in range(labels.shape[1]):
            if numbers[col] == NONE:
                continue
            table.labels[numbers[col]] = labels[i, col]
            root = find(table.parents, numbers[col])
            if rows.labels[col] == labels[i, col]:
                other = find(table.parents, rows.numbers[col])
                if other != root:
                    table.parents[root] = other
                    table.sizes[other] = min(LARGEST, int(table.sizes[other]) + int(table.sizes[root]))
                    root = other
            table.sizes[root] = min(LARGEST, int(table.sizes[root]) + 1)
        _keep_row(rows, labels[i], numbers)
    return used


@compiled
def find(parents: NDArray[np.int32], number: int) -> int:
    """The number that stands for the region."""
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number


@compiled
def find_neighbours(
    rows: Rows,
    table: Table,
    largest: NDArray[np.int32],
    labels: NDArray[np.uint16],
    used: int,
    threshold: int,
    nodata: int,
) -> int:
    """Note the largest neighbour of each small region that these rows show."""
    numbers = np.empty(labels.shape[1], np.int32)
    for i in range(labels.shape[0]):
        used = _number_row(rows, labels[i], numbers, used, nodata)
        for col in range(labels.shape[1]):
            if rows.labels[col] != labels[i, col]:
                _compare(table, largest, numbers[col], rows.numbers[col], threshold)
            if col > 0 and labels[i, col - 1] != labels[i, col]:
                _compare(table, largest, numbers[col], numbers[col - 1], threshold)
        _keep_row(rows, labels[i], numbers)
    return used


@compiled
def _compare(table: Table, largest: NDArray[np.int32], one: int, other: int, threshold: int) -> None:
    if min(one, other) == NONE:
        return
    one, other = find(table.parents, one), find(table.parents, other)
    sizes = table.sizes
    if sizes[one] < threshold and (largest[one] == NONE or sizes[largest[one]] < sizes[other]):
        largest[one] = other
    if sizes[other] < threshold and (largest[other] == NONE or sizes[largest[other]] < sizes[one]):
        largest[other] = one


@compiled
def decide(table: Table, largest: NDArray[np.int32], count: int, threshold: int) -> NDArray[np.uint16]:
    """The label that each number's pixels get."""
    labels = np.empty_like(table.labels)
    seen = np.full(count, NONE, np.int32)
    for number in range(count):
        root = find(table.parents, number)
        found = root
        while table.sizes[found] < threshold:
            seen[found] = number
            found = largest[found]
            if found == NONE or seen[found] == number:
                found = root
                break
        labels[number] = table.labels[found]
    return labels


@compiled
def relabel(
    rows: Rows, decided: NDArray[np.uint16], labels: NDArray[np.uint16], out: NDArray[np.uint16], used: int, nodata: int
) -> int:
    """Fill `out` with the labels that were decided for the numbers of these rows' pixels."""
    numbers = np.empty(labels.shape[1], np.int32)
    for i in range(labels.shape[0]):
        used = _number_row(rows, labels[i], numbers, used, nodata)
        for col in range(labels.shape[1]):
            out[i, col] = labels[i, col] if numbers[col] == NONE else decided[numbers[col]]
        _keep_row(rows, labels[i], numbers)
    return used
