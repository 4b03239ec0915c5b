"""What a run leaves: a model file, or, of a caller's own network, its weights and a file that names its code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import nn

from tilepipe.checkpoint import ClassInfo, ModelCard, save_model
from tilepipe.loading.factory import Factory
from tilepipe.loading.reference import NODATA
from tilepipe.models import MODELS
from tilepipe.resolution import Resolution
from tilepipe.training.options import TrainOptions
from tilepipe.training.pairs import Pair, band_names
from tilepipe.training.samples import DataSet
from tilepipe.training.state import Progress, RunFolder
from tilepipe.training.statistics import Statistics

TOML = "model.toml"


def card_of(
    data: DataSet, options: TrainOptions, arguments: Mapping[str, Any], pairs: Sequence[Pair], statistics: Statistics
) -> ModelCard:
    """The card of the model that is being trained, before there are scores."""
    preset = options.model in MODELS
    return ModelCard(
        architecture=options.model,
        arguments=dict(arguments) if preset else {},
        classes=data.classes or (),
        bands=options.input_bands or band_names(pairs),
        mean=statistics.mean,
        std=statistics.std,
        nodata=NODATA,
        resolution=_resolution(pairs, options.scales),
        licence=options.licence,
        provenance={
            "data": f"{len(data.of('train'))} images for training, {len(data.of('validation'))} for validation",
            "windows": f"{options.crop[0]} x {options.crop[1]}, {options.windows} a step",
            "torch": torch.__version__,
        },
    )


def _resolution(pairs: Sequence[Pair], scales: tuple[float, float]) -> Resolution | None:
    """The ground sizes that windows' pixels have, to four digits; None where a raster's are unknown."""
    sizes = [size for pair in pairs if (size := pair.image.info.resolution_m) is not None]
    if len(sizes) < len(pairs):
        return None
    least, greatest = (float(f"{size:.4g}") for size in (min(sizes) * scales[0], max(sizes) * scales[1]))
    return least if least == greatest else (least, greatest)


def scores_of(progress: Progress, classes: Sequence[ClassInfo]) -> dict[str, Any]:
    """What a card says of the network as it is now."""
    row = progress.history[-1]
    if row["mean_iou"] is None:
        return {"steps": row["step"]}
    iou = {
        each.name: value if value is None else round(value, 4) for each, value in zip(classes, row["iou"], strict=True)
    }
    return {"steps": row["step"], "mean_iou": round(row["mean_iou"], 4), "iou": iou}


def write_model(files: RunFolder, network: nn.Module, card: ModelCard, options: TrainOptions) -> None:
    """The model file; for a network of the caller's own its weights, and a model.toml that names its code."""
    if card.architecture in MODELS:
        save_model(files.model, network, card)
        return
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    files.write(files.model.name, lambda file: _put(file, safetensors.torch.save(state)))
    text = toml_of(card, options, files.model.name)
    files.write(TOML, lambda file: _put(file, text.encode()))


def model_path(files: RunFolder, options: TrainOptions) -> str:
    """What `--model` takes to load what was trained."""
    made = Factory.parse(options.model)
    return str(files.model) if made is None else f"{files.path / TOML}:{made.function}"


def toml_of(card: ModelCard, options: TrainOptions, weights: str) -> str:
    """The model.toml of a network that a factory makes."""
    told: dict[str, Any] = {
        "model": options.model,
        "weights": weights,
        "classes": [each.name for each in card.classes],
        "colors": [f"#{bytes(each.color).hex()}" for each in card.classes],
        "bands": list(card.bands),
        "mean": list(card.mean),
        "std": list(card.std),
    }
    if card.resolution is not None:
        told["resolution"] = card.resolution
    # JSON's numbers, strings and lists are TOML's, too.
    lines = [f"{name} = {json.dumps(value)}" for name, value in told.items()]
    own = [f"{name} = {json.dumps('none' if value is None else value)}" for name, value in options.arguments.items()]
    return "\n".join([*lines, *(["", "[arguments]", *own] if own else [])]) + "\n"


def _put(file: BinaryIO, data: bytes) -> None:
    file.write(data)
