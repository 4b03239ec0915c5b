"""What the training data's pixels and labels are like: band means and deviations, class pixels, class weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import InputError, UsageError
from tilepipe.raster.source import in_strips
from tilepipe.training.pairs import UNLABELLED, Pair
from tilepipe.window import Window

IGNORE = -100
"""The target of pixels that teach nothing; torch's losses leave it out."""

_OUTSIDE = -1
_BLOCK_AREA = 1 << 20
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of the training samples, over their valid pixels."""

    mean: tuple[float, ...]
    """Of each band, in raw units, rounded to 6 significant digits, so that a model card shows it whole."""
    std: tuple[float, ...]
    """Of each band, in raw units, of the whole population; rounded likewise; positive."""
    pixels: tuple[int, ...]
    """Of each class: valid pixels that bear its label."""
    shown: tuple[int, ...]
    """Of each class: valid pixels, void included, of all images that show it."""
    valid: int
    """Valid pixels, labelled or not."""

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.pixels)

    def to_json(self) -> str:
        """The statistics as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Statistics:
        """What `to_json` wrote; raises InputError for anything else."""
        try:
            told = json.loads(text)
            lists = {name: tuple(told[name]) for name in ("mean", "std", "pixels", "shown")}
            return cls(valid=int(told["valid"]), **lists)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"the stored statistics cannot be read: {' '.join(str(error).split())}") from None


class Moments(NamedTuple):
    """Number of pixels, mean and sum of squared deviations of each band; float64."""

    number: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def of(cls, values: NDArray[Any]) -> Moments:
        """Of values (bands, pixels), in two passes."""
        if values.shape[1] == 0:
            return cls(0, np.zeros(len(values)), np.zeros(len(values)))
        values = values.astype(np.float64)
        mean = values.mean(axis=1)
        return cls(values.shape[1], mean, np.square(values - mean[:, None]).sum(axis=1))

    def merge(self, other: Moments) -> Moments:
        """Of both together (Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983)."""
        number = self.number + other.number
        if number == 0:
            return self
        apart = other.mean - self.mean
        share = other.number / number
        return Moments(
            number, self.mean + apart * share, self.squares + other.squares + np.square(apart) * self.number * share
        )


def target_table(classes: int, void: Sequence[int]) -> NDArray[np.int64]:
    """For each stored label, 0 to 65535, the class that it means; IGNORE for void, -1 for what is legal nowhere."""
    table = np.full(UNLABELLED + 1, _OUTSIDE, np.int64)
    table[:classes] = np.arange(classes)
    table[[value for value in void if 0 <= value <= UNLABELLED]] = IGNORE
    table[UNLABELLED] = IGNORE
    return table


def targets_of(pair: Pair, window: Window, labels: NDArray[np.uint16], table: NDArray[np.int64]) -> NDArray[np.int64]:
    """The classes that the labels of a window mean, IGNORE where none; InputError names a label beyond them.

    table: `target_table`'s.
    """
    targets = table[labels]
    outside = targets == _OUTSIDE
    if outside.any():
        row, col = np.argwhere(outside)[0]
        value, classes = int(labels[row, col]), int(table.max()) + 1
        raise InputError(
            f"{pair.label.info.name} has the label {value} at row {row + window.rows.start}, column "
            f"{col + window.cols.start}, and the classes are 0 to {classes - 1}; "
            f"give --void {value} if it means no class, or name more classes"
        )
    return targets


def statistics_of(pairs: Sequence[Pair], classes: int, void: Sequence[int] = (), threads: int = 2) -> Statistics:
    """The statistics of the pairs' pixels, each read once, by blocks; equal whatever the number of threads.

    InputError, naming the file, for labels beyond the classes, for a label whose nodata value is a class, for a
    sample that has no pixel both valid and labelled, and for a band that is the same everywhere.
    """
    table = target_table(classes, void)
    moments = Moments.of(np.empty((pairs[0].bands, 0)))
    pixels, shown = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    with ThreadPoolExecutor(threads) as pool:
        for pair in pairs:
            _require_free_nodata(pair, table)
            counts, before = np.zeros(classes, np.int64), moments.number
            blocks = list(blocks_of(pair))
            for part, found in pool.map(lambda window, pair=pair: _block(pair, window, table), blocks):
                moments = moments.merge(part)
                counts += found
            if counts.sum() == 0:
                raise InputError(
                    f"{pair.image.info.name} and {pair.label.info.name} share no pixel that is valid and labelled; "
                    "leave the sample out"
                )
            pixels += counts
            shown += np.where(counts > 0, moments.number - before, 0)
    std = np.sqrt(moments.squares / max(1, moments.number))
    for band, value in enumerate(std):
        if _rounded(value) == 0:
            raise InputError(
                f"band {band + 1} of {pairs[0].image.info.name}, and of all others, is {moments.mean[band]:g} "
                "everywhere and tells nothing; leave it out with --bands"
            )
    return Statistics(
        tuple(map(_rounded, moments.mean)),
        tuple(map(_rounded, std)),
        tuple(map(int, pixels)),
        tuple(map(int, shown)),
        moments.number,
    )


def class_weights(
    kind: Literal["none", "median-frequency"] | tuple[float, ...], statistics: Statistics
) -> tuple[float, ...]:
    """The weight of each class in the loss.

    "median-frequency" (Eigen and Fergus, arXiv 1411.4734, section 5.3.2): the median of all classes' frequencies
    over the class's own, a class's frequency being its pixels over all pixels of the images that show it.
    A class that no image shows weighs 1, and does not count in the median. Numbers are taken as they are.
    """
    count = statistics.classes
    if kind == "none":
        return (1.0,) * count
    if kind == "median-frequency":
        frequencies = [
            part / whole if part else 0.0 for part, whole in zip(statistics.pixels, statistics.shown, strict=True)
        ]
        middle = median([value for value in frequencies if value > 0])
        return tuple(middle / value if value else 1.0 for value in frequencies)
    if isinstance(kind, str):
        raise UsageError(f"class weights {kind!r} are unknown; legal are none, median-frequency, or {count} numbers")
    if len(kind) != count or not all(math.isfinite(value) and value >= 0 for value in kind) or max(kind) == 0:
        told = ",".join(f"{value:g}" for value in kind)
        raise UsageError(f"class weights {told} are not legal; give {count} numbers of at least 0, one above it")
    return tuple(map(float, kind))


def blocks_of(pair: Pair) -> Iterator[Window]:
    """Windows that make up the pair's raster, each of about a million pixels; whole rows of what is stored so."""
    rows, cols = pair.shape
    info = pair.image.info
    width = cols if in_strips(info) else min(cols, 1024)
    width = min(width, _BLOCK_AREA)
    height = max(1, min(rows, _BLOCK_AREA // width))
    for row in range(0, rows, height):
        for col in range(0, cols, width):
            yield Window.of(row, row + height, col, col + width).clip(pair.shape)


def _block(pair: Pair, window: Window, table: NDArray[np.int64]) -> tuple[Moments, NDArray[np.int64]]:
    values, valid, labels = pair.read(window)
    targets = targets_of(pair, window, labels, table)
    flat = values.reshape(len(values), -1) if valid.all() else values[:, valid]
    labelled = targets[valid & (targets != IGNORE)]
    return Moments.of(flat), np.bincount(labelled, minlength=int(table.max()) + 1)


def _require_free_nodata(pair: Pair, table: NDArray[np.int64]) -> None:
    """Files of two classes often declare 0 as nodata, and their background would be lost."""
    nodata = pair.label.info.nodata[0]
    if nodata is not None and 0 <= nodata < UNLABELLED and table[int(nodata)] >= 0:
        raise InputError(
            f"{pair.label.info.name} declares {int(nodata)} as nodata, which is a class; if it is one, clear that "
            f"(gdal_edit.py -unsetnodata), if it means no class, give --void {int(nodata)}"
        )


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
