"""A finished store's labels and confidence as strips of whole rows, from the top."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilepipe.store.output import OutputStore

STRIP = 1 << 25
"""Pixels that are read at once, at most, unless a row has more."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Some rows of a map."""

    row: int
    """The first one."""
    labels: NDArray[np.uint16]
    """(n, width): in one type, so that kernels are compiled once"""
    confidence: NDArray[np.uint8] | None = None
    """(n, width): probability x 254, 255 where there is none; None in a store without confidence."""


def read_strips(store: OutputStore, confidence: bool = True) -> Iterator[Strip]:
    """The map's rows, in strips of a chunk's height or less; nodata where blocks are not done."""
    spec = store.spec
    labels = store.array("labels")
    trust = store.array("confidence") if confidence and spec.confidence else None
    done = store.done()
    missing = [index for index in spec.blocks() if index not in done] if len(done) < store.blocks else []
    rows = max(1, min(spec.chunk[0], STRIP // spec.shape[1]))
    for top in range(0, spec.shape[0], spec.chunk[0]):
        # Strips end where chunks do, so that few chunks are read twice.
        bottom = min(top + spec.chunk[0], spec.shape[0])
        for row in range(top, bottom, rows):
            place = slice(row, min(row + rows, bottom))
            found = np.asarray(labels[place]).astype(np.uint16)
            _blank(store, found, row, missing)
            yield Strip(row, found, None if trust is None else np.asarray(trust[place]))


def _blank(store: OutputStore, labels: NDArray[np.uint16], row: int, missing: list[tuple[int, int]]) -> None:
    """Set to nodata what lies in blocks without a record: their shards prove nothing."""
    for index in missing:
        window = store.spec.block_window(index)
        top, bottom = max(window.rows.start - row, 0), window.rows.stop - row
        if bottom > 0 and top < len(labels):
            labels[top:bottom, window.cols.start : window.cols.stop] = store.spec.nodata
