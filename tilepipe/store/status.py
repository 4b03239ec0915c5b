"""What a block holds, counted as it is written, and what a job found so far, summed over its blocks' records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import StoreError
from tilepipe.store.records import ChannelSummary, Record
from tilepipe.store.spec import StoreSpec

STRIP = 1 << 19
"""Pixels that are counted at once, so that they stay in cache."""


@dataclass(frozen=True, slots=True)
class Status:
    """How far a job is, and what it found, over the finished blocks."""

    blocks: int
    """Blocks in all."""
    done: int
    """Blocks finished."""
    counts: tuple[int, ...]
    """Pixels of each class; none in a store of values."""
    nodata: int
    """Pixels without data."""
    differing: int
    """Pixels, counted once per pair of overlapping tiles, whose two labels differ."""
    compared: int
    """Pixels that were compared so."""
    seconds: Mapping[str, float]
    """Seconds spent, by stage, summed over blocks."""
    channels: tuple[ChannelSummary, ...] = ()
    """What each channel holds; none in a store of labels."""


def status_of(spec: StoreSpec, records: Iterable[Record]) -> Status:
    """How far the job is, and what it found, by its finished blocks' records."""
    content = Content.empty(spec, 0)
    done = differing = compared = 0
    seconds: dict[str, float] = {}
    for record in records:
        done += 1
        content = content.merged(Content(record.counts, record.channels, record.nodata))
        pair = record.info.get("disagreement") or (0, 0)
        differing, compared = differing + int(pair[0]), compared + int(pair[1])
        for stage, spent in (record.info.get("seconds") or {}).items():
            seconds[stage] = seconds.get(stage, 0.0) + float(spent)
    blocks = spec.grid[0] * spec.grid[1]
    return Status(blocks, done, content.counts, content.nodata, differing, compared, seconds, content.channels)


class Content(NamedTuple):
    """What some of a store's pixels hold."""

    counts: tuple[int, ...]
    """Pixels of each class; none in a store of values."""
    channels: tuple[ChannelSummary, ...]
    """Of each channel; none in a store of labels."""
    nodata: int
    """Pixels without data."""

    @classmethod
    def empty(cls, spec: StoreSpec, pixels: int) -> Content:
        """Of so many pixels that hold no data."""
        return cls((0,) * len(spec.classes), (ChannelSummary(),) * len(spec.outputs), pixels)

    def merged(self, other: Content) -> Content:
        """Of the pixels of both."""
        return Content(
            tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            tuple(a.merged(b) for a, b in zip(self.channels, other.channels, strict=True)),
            self.nodata + other.nodata,
        )


def label_content(spec: StoreSpec, index: tuple[int, int], labels: NDArray[Any]) -> Content:
    """What a block's (h, w) labels hold; StoreError where one is neither a class nor nodata."""
    found = label_counts(labels)
    counts = found[: len(spec.classes)]
    if sum(counts) + found[spec.nodata] != labels.size:
        raise StoreError(
            f"block {tuple(index)} has labels beyond its {len(counts)} classes; legal are 0 to "
            f"{len(counts) - 1} and {spec.nodata} (nodata)"
        )
    return Content(counts, (), found[spec.nodata])


def label_counts(labels: NDArray[Any]) -> tuple[int, ...]:
    """How many pixels of a uint8 or uint16 array have each value that its dtype has.

    Bytes are counted in pairs, half as many look-ups, over strips that stay in cache.
    """
    total = np.zeros(1 << 16, dtype=np.int64)
    flat = np.ascontiguousarray(labels).reshape(-1)
    pairs = flat[: flat.size // 2 * 2].view(np.uint16) if flat.dtype == np.uint8 else flat
    for start in range(0, pairs.size, 1 << 19):
        total += np.bincount(pairs[start : start + (1 << 19)], minlength=1 << 16)
    if flat.dtype == np.uint8:
        table = total.reshape(256, 256)
        total = table.sum(axis=0) + table.sum(axis=1)
        if flat.size % 2:
            total[flat[-1]] += 1
    return tuple(total.tolist())


def value_content(spec: StoreSpec, index: tuple[int, int], values: NDArray[Any]) -> Content:
    """What a block's (channel, h, w) values hold; StoreError where one is infinite, or NaN in some channels only."""
    gone = np.isnan(values[0])
    channels = []
    for name, channel in zip(spec.outputs, values, strict=True):
        if not np.array_equal(np.isnan(channel), gone):
            raise StoreError(
                f"block {tuple(index)} has pixels that are NaN in some channels only, as {name!r} shows; "
                "the network has to give finite values wherever there are data"
            )
        found = _channel_summary(channel)
        if not np.isfinite((found.minimum, found.maximum)).all():
            raise StoreError(
                f"block {tuple(index)} has infinite values in channel {name!r}; "
                "check the network, or use float32, since float16 ends at 65504"
            )
        channels.append(found)
    return Content((), tuple(channels), int(np.count_nonzero(gone)))


def _channel_summary(channel: NDArray[Any]) -> ChannelSummary:
    found = ChannelSummary()
    rows = max(1, STRIP // channel.shape[1])
    for start in range(0, channel.shape[0], rows):
        strip = channel[start : start + rows]
        strip = strip[~np.isnan(strip)]
        if strip.size:
            low, high = float(strip.min()), float(strip.max())
            with np.errstate(invalid="ignore"):  # infinities of both signs, which are refused by minimum and maximum
                total = float(strip.sum(dtype=np.float64))
            found = found.merged(ChannelSummary(strip.size, low, high, total))
    return found
