"""Whole runs in tests: a network of single pixels, the labels it must give, and what it was shown."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from reference import MEAN, STD, model_of

from tilepipe.block import BlockRunner
from tilepipe.checkpoint import Model, save_model
from tilepipe.models import build
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import Summary, segment_raster
from tilepipe.predict.predictor import Predictor
from tilepipe.resolution import Resolution
from tilepipe.store.output import open_store
from tilepipe.window import Window

CLASSES = 5


def pixel_model(bands: int = 3, names: tuple[str, ...] | None = None, resolution: Resolution | None = None) -> Model:
    """A network that labels each pixel by itself, so that any pixel read wrong is a label that may be wrong."""
    torch.manual_seed(bands)
    network = build("linear", classes=CLASSES, bands=bands).eval()
    torch.nn.init.normal_(network.scores.weight)
    card = model_of(network, CLASSES, bands).card
    names = names or card.bands
    arguments = {"classes": CLASSES, "bands": bands}
    return Model.of(
        network, replace(card, architecture="linear", arguments=arguments, bands=names, resolution=resolution)
    )


def pixel_labels(model: Model, values: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """The labels (rows, columns) that `pixel_model` gives, by numpy alone: 255 where not valid."""
    weight = model.network.scores.weight.detach().numpy()[:, :, 0, 0].astype(np.float64)
    bias = model.network.scores.bias.detach().numpy().astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        scores = np.tensordot(weight, (values.astype(np.float64) - MEAN) / STD, 1) + bias[:, None, None]
    labels = scores.argmax(0).astype(np.uint8)
    if valid is not None:
        labels[~valid] = 255
    return labels


def saved(model: Model, path: Path) -> Path:
    """The model as a file."""
    save_model(path, model.network, model.card)
    return path


OPTIONS = SegmentOptions(device="cpu", precision="float64", threads=1, tile=(64, 64), block=(64, 64))


def segment(inputs: Any, output: Path, model: Model | Path, **options: Any) -> tuple[NDArray[Any], Summary]:
    """The whole path: the labels that are in the store after a run, and the run's summary."""
    summary = segment_raster(inputs, output, model, replace(OPTIONS, **options))
    return open_store(output).array()[:], summary


SMALL = ("--tile", "64", "--block", "64")


def words(*paths: Path | str, model: Path | str) -> tuple[str | Path, ...]:
    """The command that segments as `segment` does."""
    return ("segment", *paths, "--model", model, "--device", "cpu", "--precision", "float64", *SMALL, "-q")


class Seen:
    """What a network of reach 0 was shown over a whole job."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], bands: int) -> None:
        self.values: NDArray[Any] | None = None
        self.valid = np.zeros(shape, bool)
        self.shown = np.zeros(shape, bool)
        """Which pixels the network was shown."""
        self.calls = 0
        self._shape, self._bands = shape, bands
        self._block, self._lock = threading.local(), threading.Lock()
        maps, exact = BlockRunner.maps, Predictor.exact

        def outer(runner: BlockRunner, outputs: Window) -> Any:
            self._block.outputs = outputs
            return maps(runner, outputs)

        def inner(
            predictor: Predictor, values: Any, valid: Any, placements: Any, shape: Any, *more: Any, **named: Any
        ) -> Any:
            with self._lock:  # blocks run side by side
                self._note(values, valid, placements)
            return exact(predictor, values, valid, placements, shape, *more, **named)

        monkeypatch.setattr(BlockRunner, "maps", outer)
        monkeypatch.setattr(Predictor, "exact", inner)

    def _note(self, values: NDArray[Any], valid: NDArray[np.bool_] | None, placements: Any) -> None:
        self.calls += 1
        if self.values is None:
            self.values = np.zeros((self._bands, *self._shape), values.dtype)
        assert values.dtype == self.values.dtype
        flags = np.ones(values.shape[1:], bool) if valid is None else valid
        top, left = self._block.outputs.origin
        for place in placements:
            rows, cols = place.source.within(Window.whole(values.shape[1:]))
            inner = place.crop.within(Window.whole(place.source.shape))
            there = place.target.shift(top, left).within(Window.whole(self._shape))
            self.values[(slice(None), *there)] = values[:, rows, cols][(slice(None), *inner)]
            self.valid[there] = flags[rows, cols][inner]
            self.shown[there] = True
