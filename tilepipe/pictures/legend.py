"""What the colours of a picture stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilepipe.pictures.colors import NODATA_COLOR, limits, ramp, shown_channels
from tilepipe.store.spec import ClassLike, StoreSpec

ENTRIES = 24
"""Classes in a legend, at most."""


class Entry(NamedTuple):
    """A line of the legend."""

    name: str
    colors: NDArray[np.uint8] | None
    """(steps, 3): one colour, or a ramp of them; None for text alone."""


def class_entries(classes: Sequence[ClassLike], labels: NDArray[Any]) -> list[Entry]:
    """The legend of `labels`: all classes, or where they are many the most frequent; and no data, if there is."""
    counts = np.bincount(labels.reshape(-1), minlength=len(classes) + 1)
    numbers = list(range(len(classes)))
    if len(classes) > ENTRIES:
        numbers = [n for n in sorted(numbers, key=lambda n: -counts[n]) if counts[n]][: ENTRIES - 1]
    found = [Entry(classes[n].name, np.array([classes[n].color], np.uint8)) for n in numbers]
    if len(numbers) < len(classes):
        found.append(Entry(f"and {len(classes) - len(numbers)} more", None))
    if counts[len(classes) :].any():
        found.append(Entry("no data", np.array([NODATA_COLOR], np.uint8)))
    return found


def confidence_entry() -> Entry:
    """The legend of confidence."""
    return Entry("confidence 0 to 1", ramp(255))


def value_entries(spec: StoreSpec, values: NDArray[Any]) -> list[Entry]:
    """The legend of (channels, rows, columns) of values: from which to which percentile each one's colours run."""
    count = shown_channels(len(spec.outputs))
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    found = []
    for number, (low, high) in enumerate(limits(values)):
        colors = greys if count == 1 else greys * np.eye(3, dtype=np.uint8)[number]
        found.append(Entry(f"{spec.outputs[number]}: {low:.4g} to {high:.4g}", colors))
    if len(spec.outputs) > count:
        found.append(Entry(f"and {len(spec.outputs) - count} more", None))
    return found
