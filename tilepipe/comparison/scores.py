"""What an evaluation found: the scores of each pair of maps, and of all together."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.metrics import Confusion, mean

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class ImageScore:
    """What one pair of maps gave."""

    prediction: str
    truth: str
    shape: tuple[int, int]
    """(rows, columns) of the pixels that both have."""
    pixels: int
    """Pixels scored."""
    ignored: int
    """Pixels that are void or nodata in the truth."""
    missing: int
    """Pixels that count in the truth and are nodata in the prediction."""
    accuracy: float
    mean_iou: float
    tolerance: float
    """Of the boundaries, in pixels."""
    boundary: Floats
    """(3, classes): boundary precision, recall and F1 of the classes that the truth shows; NaN for the others."""

    @property
    def boundary_f1(self) -> float:
        """The image's boundary F1: the mean over the classes that its truth shows."""
        return mean(self.boundary[2])

    def to_json(self) -> dict[str, Any]:
        """The image's scores as JSON values, null for NaN."""
        facts = {name: getattr(self, name) for name in ("prediction", "truth", "pixels", "ignored", "missing")}
        scores = {name: getattr(self, name) for name in ("accuracy", "mean_iou", "boundary_f1", "tolerance")}
        return {**facts, "shape": list(self.shape), **{name: _number(value) for name, value in scores.items()}}


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """Scores of one or more predictions; pixels of all images are counted together.

    A score that no pixel tells is NaN, null in JSON, and left out of means; see `tilepipe.metrics`.
    """

    classes: tuple[str, ...]
    confusion: Confusion
    images: tuple[ImageScore, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def ignored(self) -> int:
        """Pixels that are void or nodata in the truth."""
        return sum(image.ignored for image in self.images)

    @property
    def missing(self) -> int:
        """Pixels that count in the truth and are nodata in the prediction."""
        return sum(image.missing for image in self.images)

    @property
    def boundary(self) -> Floats:
        """(3, classes): boundary precision, recall, F1, each the mean over the images whose truth shows the class."""
        scores = np.stack([image.boundary for image in self.images])
        return np.array([[mean(scores[:, row, label]) for label in range(scores.shape[2])] for row in range(3)])

    @property
    def boundary_f1(self) -> float:
        """Boundary F1: the mean over images of the mean over the classes that an image's truth shows."""
        return mean(np.array([image.boundary_f1 for image in self.images]))

    def to_json(self) -> dict[str, Any]:
        """All scores as JSON values, null for NaN."""
        confusion = self.confusion
        columns = {
            "pixels": confusion.truth_pixels,
            "found": confusion.found_pixels,
            "accuracy": confusion.recall,
            "iou": confusion.iou,
            "precision": confusion.precision,
            "recall": confusion.recall,
            "f1": confusion.f1,
            **dict(zip(("boundary_precision", "boundary_recall", "boundary_f1"), self.boundary, strict=True)),
        }
        rows = [
            {"name": name, **{what: _number(values[label]) for what, values in columns.items()}}
            for label, name in enumerate(self.classes)
        ]
        means = ("accuracy", "mean_accuracy", "mean_iou", "mean_precision", "mean_f1")
        return {
            "pixels": confusion.pixels,
            "ignored": self.ignored,
            "missing": self.missing,
            **{name: _number(getattr(confusion, name)) for name in means},
            "mean_recall": _number(confusion.mean_accuracy),
            "boundary_f1": _number(self.boundary_f1),
            "classes": rows,
            "confusion": confusion.counts.tolist(),
            "images": [image.to_json() for image in self.images],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def trimmed(self) -> Evaluation:
        """The same without the last classes, those that neither map shows."""
        shown = np.flatnonzero(self.confusion.truth_pixels + self.confusion.found_pixels)
        count = int(shown.max(initial=0)) + 1
        confusion = Confusion(self.confusion.counts[:count, :count])
        images = tuple(replace(image, boundary=image.boundary[:, :count]) for image in self.images)
        return replace(self, classes=self.classes[:count], confusion=confusion, images=images)


def _number(value: Any) -> int | float | None:
    """A number as JSON has it."""
    if isinstance(value, int | np.integer):
        return int(value)
    return None if math.isnan(value) else float(value)
