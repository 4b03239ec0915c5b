"""What is done: one small file per finished block, written after all that the block consists of is durable.

    labels/.tilepipe/<row>/<col>.json       (values/.tilepipe in a store of values)

A block is done when its record is there, can be read, and carries the digest of the store's fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tilepipe.store.durable import Files

EMPTY = "empty"
"""Stands for the checksum of a file that is not there, since all of it would be fill."""


@dataclass(frozen=True, slots=True)
class ChannelSummary:
    """What is known of one channel's pixels with data."""

    count: int = 0
    """Pixels with data; where there are none, the other fields are 0."""
    minimum: float = 0.0
    maximum: float = 0.0
    total: float = 0.0
    """The sum of the values, in float64."""

    @property
    def mean(self) -> float | None:
        """The mean value; None without pixels."""
        return self.total / self.count if self.count else None

    def describe(self) -> dict[str, Any]:
        """Its pixels with data and their least, mean and greatest value (None without any), as JSON values."""
        low, high = (self.minimum, self.maximum) if self.count else (None, None)
        return {"pixels": self.count, "min": low, "mean": self.mean, "max": high}

    def merged(self, other: ChannelSummary) -> ChannelSummary:
        """Of the pixels of both.

        >>> ChannelSummary(2, 1.0, 3.0, 4.0).merged(ChannelSummary(1, -1.0, -1.0, -1.0)).mean
        1.0
        """
        if not self.count or not other.count:
            return self if self.count else other
        low, high = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        return ChannelSummary(self.count + other.count, low, high, self.total + other.total)


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one finished block."""

    row: int
    col: int
    digest: str
    """Of the fingerprint and layout under which it was made."""
    files: Mapping[str, str]
    """SHA-256, in hexadecimal, of each file by its key; "empty" where there is none."""
    counts: tuple[int, ...]
    """Pixels of each class, in the classes' order; none in a store of values."""
    nodata: int
    """Pixels without data."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """What the job said about the block: `seconds` by stage, `disagreement` as (differing, compared) pixels ..."""
    channels: tuple[ChannelSummary, ...] = ()
    """Of each channel, in order; none in a store of labels."""

    def to_bytes(self) -> bytes:
        """The record as JSON text; `parse` reads it back."""
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()


def record_key(files: Files, row: int, col: int) -> str:
    """The key of a block's record."""
    return f"{files.state}/{row}/{col}.json"


def parse(data: bytes) -> Record | None:
    """The record that the bytes hold; None where they are torn or not a record."""
    try:
        stored = json.loads(data)
        return Record(
            row=int(stored["row"]),
            col=int(stored["col"]),
            digest=str(stored["digest"]),
            files={str(key): str(value) for key, value in stored["files"].items()},
            counts=tuple(int(n) for n in stored["counts"]),
            nodata=int(stored["nodata"]),
            info=dict(stored["info"]),
            channels=tuple(ChannelSummary(**channel) for channel in stored.get("channels", ())),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def read_records(files: Files, digest: str) -> Iterator[Record]:
    """The records that count: readable, of this digest, under their own block's name."""
    for row in record_rows(files):
        folder = f"{files.state}/{row}"
        for name, data in files.read_folder(folder).items():
            record = parse(data)
            if record is None or record.digest != digest:
                continue
            if record_key(files, record.row, record.col) == f"{folder}/{name}":
                yield record


def record_rows(files: Files) -> list[str]:
    """The folders that hold records, by their block row, in order."""
    return sorted((name for name in files.names(files.state) if name.isdigit()), key=int)
