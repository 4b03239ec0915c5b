"""What a training run is going to learn, and how it ended, in words, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilepipe.cli import show

if TYPE_CHECKING:
    from tilepipe.training.train import Outcome


def run_text(told: dict[str, Any]) -> str:
    """What `RunPlan.describe` says."""
    rows = [
        (
            row["name"],
            f"{row['pixels']:,}",
            f"{100 * row['share']:.2f} %",
            f"{row['weight']:.3g}",
        )
        for row in told["classes"]
    ]
    return show.entries(_entries(told)) + "\n\n" + show.table(("class", "pixels", "share", "weight"), rows, (1, 2, 3))


def _entries(told: dict[str, Any]) -> Iterator[tuple[str, str]]:
    network = told["network"]
    for each in told["samples"]:
        yield each["split"], _images(each)
    yield "bands", ", ".join(f"{band['name']} {band['mean']:g} ± {band['std']:g}" for band in told["bands"])
    if told["unlabelled"]:
        yield "unlabelled", f"{told['unlabelled']:,} pixels for training are void or nodata"
    arguments = ", ".join(f"{name}={value}" for name, value in network["arguments"].items())
    yield "network", f"{network['model']} ({arguments}), {network['parameters']:,} parameters"
    sizes = f"rows {network['rows']}, columns {network['columns']}"
    yield "windows", f"{show.by(told['crop'])} pixels, {_step(told)}; legal are {sizes}"
    stages = ", then ".join(f"{stage['steps']} of {_KINDS[stage['kind']]}" for stage in told["stages"])
    yield "steps", f"{stages}; they show {told['passes']:.3g} times the pixels there are"
    if told["objects"] is not None:
        yield "objects", f"{told['objects']:,}"
    yield "device", f"{told['device']}, {told['precision']}"
    for note in told["notes"]:
        yield "note", note


_KINDS = {
    "uniform": "windows anywhere",
    "objects": "windows around objects",
    "candidates": "windows that overlap objects",
}


def _images(told: dict[str, Any]) -> str:
    smallest, largest = show.by(told["smallest"]), show.by(told["largest"])
    sizes = smallest if smallest == largest else f"{smallest} to {largest}"
    return f"{show.count(told['images'], 'image')} of {sizes}, {show.pixels(told['pixels'])}"


def _step(told: dict[str, Any]) -> str:
    passes = "" if told["accumulate"] == 1 else f" in {told['accumulate']} passes"
    return f"{told['batch'] * told['accumulate']} a step{passes}"


def outcome_text(outcome: Outcome) -> str:
    """How a run ended."""
    reached = "none, no image is for validation"
    if outcome.mean_iou is not None:
        reached = f"{outcome.mean_iou:.4f} at step {outcome.best_step} of {outcome.steps}, on the validation images"
    rows = [(name, "-" if value is None else f"{value:.4f}") for name, value in outcome.iou.items()]
    began = f", from step {outcome.resumed_from} on" if outcome.resumed_from else ""
    lines = [
        ("model", outcome.model),
        ("mean IoU", reached),
        ("time", show.duration(outcome.seconds) + began),
    ]
    table = "\n\n" + show.table(("class", "IoU"), rows, right=(1,))
    return show.entries(lines) + ("" if outcome.mean_iou is None else table)
