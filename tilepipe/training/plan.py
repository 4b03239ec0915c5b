"""What a run is made from, put together and checked before its first step; and described for whoever asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilepipe.checkpoint import ClassInfo
from tilepipe.errors import UsageError
from tilepipe.machine import device_of
from tilepipe.options import SegmentOptions
from tilepipe.training.losses import inner_stages
from tilepipe.training.network import Subject, make_network, require_legal_crop
from tilepipe.training.objects import find_objects
from tilepipe.training.options import TrainOptions
from tilepipe.training.pairs import Pair, band_names, open_pairs
from tilepipe.training.samples import DataSet
from tilepipe.training.statistics import Statistics, class_weights, statistics_of


@dataclass(frozen=True, slots=True, eq=False)
class RunPlan:
    """Data, network and machine of a run that fit together."""

    data: DataSet
    options: TrainOptions
    classes: tuple[ClassInfo, ...]
    training: tuple[Pair, ...]
    judging: tuple[Pair, ...]
    """For validation."""
    subject: Subject
    statistics: Statistics
    """Of the training images; mean and deviation are those of the model that the run starts from, if there is one."""
    weights: tuple[float, ...]
    """Of the classes in the loss."""
    device: torch.device
    precision: str
    """Of the passes."""

    def describe(self) -> dict[str, Any]:
        """All that is going to be learnt, as JSON values; reads the labels again where a stage is drawn by objects."""
        options, geometry = self.options, self.subject.geometry
        crop_area = options.crop[0] * options.crop[1]
        pixels = sum(rows * cols for rows, cols in (pair.shape for pair in self.training))
        splits = [_images("train", self.training)]
        if self.judging:
            splits.append(_images("validation", self.judging))
        by_objects = any(stage.kind != "uniform" for stage in options.stages)
        return {
            "samples": splits,
            "bands": _bands(options.input_bands or band_names(self.training), self.statistics),
            "classes": _classes(self.classes, self.statistics, self.weights),
            "unlabelled": self.statistics.valid - sum(self.statistics.pixels),
            "network": {
                "model": options.model,
                "arguments": dict(self.subject.arguments),
                "parameters": sum(each.numel() for each in self.subject.network.parameters()),
                "rows": str(geometry.rows.sizes),
                "columns": str(geometry.cols.sizes),
            },
            "crop": list(options.crop),
            "batch": options.batch,
            "accumulate": options.accumulate,
            "stages": [{"kind": stage.kind, "steps": stage.steps} for stage in options.stages],
            "steps": options.steps,
            "passes": options.steps * options.windows * crop_area / pixels,
            "objects": len(find_objects(self.training, len(self.classes), self.data.void)) if by_objects else None,
            "device": str(self.device),
            "precision": self.precision,
            "notes": list(self.subject.notes),
        }


def named_classes(data: DataSet) -> tuple[ClassInfo, ...]:
    """The data's classes; raises UsageError where nobody named them."""
    if not data.classes:
        raise UsageError("the data do not name their classes; name them with --classes, in the order of their values")
    return data.classes


def plan_run(
    data: DataSet, options: TrainOptions, statistics: Callable[[Sequence[Pair]], Statistics] | None = None
) -> RunPlan:
    """What a run of these data and options is made from; TilepipeError where anything does not fit together.

    `statistics` gives those of the training samples, by default by reading all of their pixels, which comes last.
    """
    classes = named_classes(data)
    device = _device(options)
    if options.keep == "best" and not data.of("validation"):
        raise UsageError(
            "no sample is for validation; give some the split 'validation', or keep the last network (--keep last)"
        )
    training = open_pairs(data.of("train"), options.bands, options.input_bands)
    judging = open_pairs(data.of("validation"), options.bands, options.input_bands)
    subject = make_network(options, len(classes), training[0].bands)
    require_legal_crop(subject.geometry, options.crop)
    if options.hints:
        inner_stages(subject.network)
    found = statistics(training) if statistics else statistics_of(training, len(classes), data.void)
    weights = class_weights(options.class_weights, found)
    if subject.statistics is not None:
        mean, std = subject.statistics
        found = replace(found, mean=mean, std=std)
    precision = options.precision or ("bf16" if device.type == "cuda" else "float32")
    return RunPlan(data, options, classes, training, judging, subject, found, weights, device, precision)


def _device(options: TrainOptions) -> torch.device:
    """The device that the options ask for; UsageError where there is none."""
    kind = device_of(SegmentOptions(device=options.device))
    name = options.device or kind
    index = name.partition(":")[2]
    if index and not (index.isdigit() and int(index) < torch.cuda.device_count()):
        raise UsageError(f"device {name} is not there; torch sees {torch.cuda.device_count()} CUDA devices here")
    return torch.device(name)


def _images(split: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    """How many images a split has, and of which sizes."""
    shapes = sorted({pair.shape for pair in pairs}, key=lambda shape: (shape[0] * shape[1], shape))
    pixels = sum(pair.shape[0] * pair.shape[1] for pair in pairs)
    told = {"smallest": list(shapes[0]), "largest": list(shapes[-1])}
    return {"split": split, "images": len(pairs), "pixels": pixels, **told}


def _bands(names: Sequence[str], statistics: Statistics) -> list[dict[str, Any]]:
    rows = zip(names, statistics.mean, statistics.std, strict=True)
    return [{"name": name, "mean": mean, "std": std} for name, mean, std in rows]


def _classes(classes: Sequence[ClassInfo], statistics: Statistics, weights: Sequence[float]) -> list[dict[str, Any]]:
    labelled = sum(statistics.pixels)
    rows = zip(classes, statistics.pixels, weights, strict=True)
    return [
        {"name": each.name, "pixels": pixels, "share": pixels / labelled, "weight": weight}
        for each, pixels, weight in rows
    ]
