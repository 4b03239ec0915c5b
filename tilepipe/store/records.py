"""What is done: one small file per finished block, written after all that the block consists of is durable.

    labels/.tilepipe/<row>/<col>.json

A block is done when its record is there, can be read, and carries the digest of the store's fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tilepipe.store.durable import STATE, Files

EMPTY = "empty"
"""Stands for the checksum of a file that is not there, since all of it would be fill."""


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
    """Pixels of each class, in the classes' order."""
    nodata: int
    """Pixels without data."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """What the job said about the block: `seconds` by stage, `disagreement` as (differing, compared) pixels ..."""

    @property
    def key(self) -> str:
        """Where it is kept."""
        return record_key(self.row, self.col)

    def to_bytes(self) -> bytes:
        """The record as JSON text; `parse` reads it back."""
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()


def record_key(row: int, col: int) -> str:
    """The key of a block's record."""
    return f"{STATE}/{row}/{col}.json"


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
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def read_records(files: Files, digest: str) -> Iterator[Record]:
    """The records that count: readable, of this digest, under their own block's name."""
    for row in record_rows(files):
        for name, data in files.read_folder(f"{STATE}/{row}").items():
            record = parse(data)
            if record is not None and record.digest == digest and record.key == f"{STATE}/{row}/{name}":
                yield record


def record_rows(files: Files) -> list[str]:
    """The folders that hold records, by their block row, in order."""
    return sorted((name for name in files.names(STATE) if name.isdigit()), key=int)
