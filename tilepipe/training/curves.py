"""A run's history as a table and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from tilepipe.training.state import RunFolder

TABLE, PICTURE, BOARD = "curves.csv", "curves.png", "tensorboard"


def write_curves(folder: RunFolder, history: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> None:
    """Writes curves.csv, a row of the history each, and, where matplotlib is installed, curves.png."""
    text = _table(history, classes)
    folder.write(TABLE, lambda file: _put(file, text.encode()))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in history]
    left.plot(steps, [row["loss"] for row in history], marker=".")
    left.set(xlabel="step", ylabel="training loss")
    for number, name in enumerate(classes):
        right.plot(steps, [row["iou"][number] for row in history], label=name, linewidth=0.8)
    right.plot(steps, [row["mean_iou"] for row in history], label="mean", color="black", marker=".")
    right.set(xlabel="step", ylabel="validation IoU", ylim=(0, 1))
    right.legend(fontsize="small", ncols=2)
    folder.write(PICTURE, lambda file: figure.savefig(file, format="png", dpi=120))


class Board:
    """Writes each validation for TensorBoard, where that is installed, into the run's folder `tensorboard`."""

    def __init__(self, folder: RunFolder, classes: Sequence[str]) -> None:
        self._folder, self._classes = folder, classes
        self._writer: Any = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes a row of the history; what an earlier process wrote of its step or later ones is void."""
        if self._writer is None:
            try:
                from torch.utils.tensorboard.writer import SummaryWriter
            except ImportError:
                return
            self._writer = SummaryWriter(str(self._folder.path / BOARD), purge_step=row["step"])
        scores = {name: row[name] for name in ("loss", "rate", "mean_iou", "accuracy")}
        scores |= {f"iou/{name}": value for name, value in zip(self._classes, row["iou"], strict=True)}
        for name, value in scores.items():
            if value is not None:
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()


def _table(history: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    scores = ("step", "rate", "loss", "mean_iou", "accuracy")
    rows.writerow([*scores, *(f"iou {name}" for name in classes)])
    for row in history:
        values = [*(row[name] for name in scores), *row["iou"]]
        rows.writerow(["" if value is None else value for value in values])
    return text.getvalue()


def _put(file: BinaryIO, data: bytes) -> None:
    file.write(data)
