"""What a user can ask of a training run, as one frozen value; and how long each of its stages lasts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from tilepipe.errors import UsageError

Kind = Literal["uniform", "objects", "candidates"]
"""How a stage draws its windows: anywhere, centred on objects, or where they overlap objects enough."""
Decay = Literal["onecycle", "polynomial", "constant"]
Optimiser = Literal["adamw", "sgd"]
Keep = Literal["best", "last"]
Weights = Literal["none", "median-frequency"] | tuple[float, ...]


def _check(name: str, value: float, least: float, most: float = math.inf) -> None:
    if not least <= value <= most:
        upper = "" if most == math.inf else f" to {most:g}"
        raise UsageError(f"{name} is {value:g}; legal: {least:g}{upper or ' or more'}")


@dataclass(frozen=True, slots=True)
class Stage:
    """Some of a run's steps, drawn in one way."""

    kind: Kind
    steps: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(f"stage {self.kind!r} is unknown; legal are {', '.join(get_args(Kind))}")
        _check("steps of a stage", self.steps, 1)


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a network is trained; the defaults suit a SegNet on imagery from above."""

    model: str = "segnet"
    """An architecture, or a factory: `package.module:factory`, `path/file.py:factory`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Its keyword arguments; classes and bands are filled in from the data."""
    start: str | None = None
    """A model file whose weights to start from, a state dictionary, or torchvision's VGG16 weights by name or file."""
    bands: tuple[int, ...] | None = None
    """Numbers, from 1, of the bands to learn from, in the model's order; None for all."""
    input_bands: tuple[str, ...] | None = None
    """What these bands are; None for the usual names of so many."""
    licence: str = "unknown"
    """What the model's card states."""
    stages: tuple[Stage, ...] = (Stage("uniform", 4000),)
    batch: int = 8
    """Windows of a pass."""
    accumulate: int = 1
    """Passes of an optimiser step."""
    crop: tuple[int, int] = (256, 256)
    """(rows, columns) of a window as the network sees it."""
    flips: Literal["none", "horizontal", "d4"] = "d4"
    rotate: float = 0.0
    """Degrees to either side."""
    scales: tuple[float, float] = (1.0, 1.0)
    """The least and largest ground size of a window's pixels, in the raster's."""
    jitter: float = 0.2
    """Strength of changes of brightness, contrast and colour; 0 for none."""
    class_weights: Weights = "median-frequency"
    hints: float = 0.0
    """Weight of the loss of extra classifiers on inner stages, which training alone has."""
    optimiser: Optimiser = "adamw"
    rate: float = 1e-3
    """The highest learning rate."""
    momentum: float = 0.9
    """Of SGD; the first beta of AdamW."""
    weight_decay: float = 1e-2
    decay: Decay = "onecycle"
    power: float = 0.9
    """Of the polynomial decay."""
    warmup: float = 0.1
    """The share of all steps in which the rate rises to its highest."""
    clip: float | None = None
    """The largest norm of the gradient; None for any."""
    average: float = 0.0
    """Decay of a moving average of the weights, which is then what is validated and saved; 0 for none."""
    keep: Keep = "best"
    """Which network is saved: the best by mean IoU of all validations, or the last, for which no image has to be kept
    back for validation."""
    precision: Literal["float32", "bf16", "fp16"] | None = None
    """Of the passes; weights stay float32. None: bf16 on CUDA, float32 on the CPU."""
    device: str | None = None
    workers: int = 2
    """Processes that read and augment windows; 0: the training process does."""
    threads: int | None = None
    """Processor threads of the network's arithmetic; they are part of what makes two runs equal."""
    every: int = 500
    """Steps from one validation, and saved state, to the next."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, legal in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in legal:
                raise UsageError(f"{name} is {value!r}; legal are {', '.join(legal)}")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None:
                _check(name, value, least, most)
        if not self.stages:
            raise UsageError("a run of no stages was asked for; give at least one")
        if min(self.crop) < 1:
            raise UsageError(f"crop is {self.crop[0]} x {self.crop[1]}; both have to be positive")
        least, most = self.scales
        if not 0 < least <= most < math.inf:
            raise UsageError(f"scales {least:g},{most:g} are not legal; give two numbers above 0, the lesser first")
        if isinstance(self.class_weights, str) and self.class_weights not in ("none", "median-frequency"):
            raise UsageError(
                f"class_weights is {self.class_weights!r}; legal are none, median-frequency, or a number for each class"
            )

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return sum(stage.steps for stage in self.stages)

    @property
    def windows(self) -> int:
        """Windows of an optimiser step."""
        return self.batch * self.accumulate

    def segments(self, first: int) -> Iterator[tuple[Kind, int, int]]:
        """(kind, first step, end) of each stage's part from step `first` on."""
        begin = 0
        for stage in self.stages:
            end = begin + stage.steps
            if first < end:
                yield stage.kind, max(first, begin), end
            begin = end

    def meaning(self) -> dict[str, Any]:
        """The options that the weights depend on, as JSON values: what a resumed run must share."""
        told = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _FREE}
        stages = [[stage.kind, stage.steps] for stage in self.stages]
        told = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
        return {**told, "arguments": dict(self.arguments), "stages": stages}


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "flips": ("none", "horizontal", "d4"),
    "optimiser": get_args(Optimiser),
    "decay": get_args(Decay),
    "keep": get_args(Keep),
    "precision": ("float32", "bf16", "fp16"),
}
_RANGES: Mapping[str, tuple[float, float]] = {
    "batch": (1, math.inf),
    "accumulate": (1, math.inf),
    "rotate": (0, 180),
    "jitter": (0, 1),
    "hints": (0, math.inf),
    "rate": (0, math.inf),
    "momentum": (0, 0.9999),
    "weight_decay": (0, math.inf),
    "power": (0, math.inf),
    "warmup": (0, 1),
    "clip": (1e-12, math.inf),
    "average": (0, 0.999999),
    "workers": (0, math.inf),
    "threads": (1, math.inf),
    "every": (1, math.inf),
    "seed": (0, 2**63),
}
_FREE = {"workers", "device"}
"""What may change between a run and its continuation."""
