"""One model's part in a job: its network as the job runs it, what it reads, and how its scores meet the others'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tilepipe.checkpoint import IN_MEMORY, SYNTHETIC, Model, bundled_models
from tilepipe.combine import match_classes
from tilepipe.errors import ModelError, UsageError
from tilepipe.geometry.network import Geometry
from tilepipe.loading.reference import ModelReference
from tilepipe.options import SegmentOptions
from tilepipe.raster.bands import select_bands
from tilepipe.raster.info import BandChoice
from tilepipe.raster.source import RasterInfo, RasterSource
from tilepipe.resolution import mismatch, spelled
from tilepipe.shelf import Shelf
from tilepipe.variants.variation import Variation

Reference = ModelReference | Model
"""What a worker has a model from: how to load it, or, for one that was made in memory, the model itself."""

OneModel = str | Path | Reference
Models = OneModel | Sequence[OneModel] | None
"""How callers name models: one or several, each by name, file, reference or itself; None for a bundled one."""


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One of a job's models."""

    model: Model
    reference: Reference
    variation: Variation
    network: nn.Module
    """As the job runs it."""
    geometry: Geometry
    """Of that network."""
    bands: tuple[int, ...]
    """Where its bands are among those that the job reads, from 0."""
    order: tuple[int, ...]
    """Where it keeps the job's classes: order[n] is its index of class n; empty for values."""


def members_of(
    models: Sequence[tuple[Model, Reference]], whole: RasterSource, options: SegmentOptions, shelf: Shelf | None = None
) -> tuple[tuple[Member, ...], RasterSource]:
    """A job's members, and the raster with the bands that they read."""
    choices = [select_bands(whole.info, model.card.bands, options.bands) for model, _ in models]
    together, places = _union(choices)
    orders: Sequence[tuple[int, ...]] = [()] * len(models)
    if options.values is None:
        orders = match_classes([[item.name for item in model.card.classes] for model, _ in models])
    members = []
    for (model, reference), place, order in zip(models, places, orders, strict=True):
        variation, geometry = (shelf or Shelf()).varied(model, options)
        _check_scores(model, geometry, options)
        network = variation.network(model.network, model.card.task)
        members.append(Member(model, reference, variation, network, geometry, place, order))
    return tuple(members), whole.select(together)


def _check_scores(model: Model, geometry: Geometry, options: SegmentOptions) -> None:
    """Nothing where the network has a score for each class; else ModelError."""
    names = model.card.classes
    if options.values is None and geometry.channels_out != len(names):
        raise ModelError(
            f"the network of {model.source} gives {geometry.channels_out} scores a pixel for {len(names)} classes; "
            "the two have to agree"
        )


def _union(choices: Sequence[BandChoice]) -> tuple[BandChoice, list[tuple[int, ...]]]:
    """All bands that some choice has, and each choice's places among them."""
    parts = [_parts(choice) for choice in choices]
    every = list(dict.fromkeys(part for each in parts for part in each))
    places = [tuple(every.index(part) for part in each) for each in parts]
    if all(each == parts[0] for each in parts):
        return choices[0], [tuple(range(len(parts[0])))] * len(parts)
    if any(choice.palette for choice in choices):
        raise UsageError("models that read different bands of a palette cannot be combined; give the raster as RGB")
    return BandChoice(tuple(band for band, _ in every)), places


def _parts(choice: BandChoice) -> list[tuple[int, int | None]]:
    if choice.palette:
        return [(choice.indices[0], component) for component in choice.palette]
    return [(band, None) for band in choice.indices]


def choose_models(
    given: Models, source: RasterSource, options: SegmentOptions, shelf: Shelf | None = None
) -> tuple[list[tuple[Model, Reference]], list[str]]:
    """The models asked for, or the bundled one that fits the raster's bands best; with what to tell the user."""
    shelf = shelf or Shelf()
    if given is None:
        if options.values is not None:
            raise UsageError("no bundled model predicts values; choose one with --model")
        model, note = _bundled(source, options.bands, shelf)
        return [(model, ModelReference(model.source))], [note]
    several = references_of(given)
    if not several:
        raise UsageError("no model was given; name one, or leave --model out for a bundled one")
    chosen: list[tuple[Model, Reference]] = [
        (each if isinstance(each, Model) else shelf.model(each), each) for each in several
    ]
    for model, _ in chosen:
        _check_task(model, options)
    if options.values is not None and len(chosen) > 1:
        raise UsageError(f"{len(chosen)} models were given; values are predicted by one, classes by several")
    return chosen, []


def references_of(given: Models) -> list[Reference]:
    """The models that a caller names, each as a reference or itself; none for None."""
    if given is None:
        return []
    several = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    return [each if isinstance(each, Reference) else ModelReference.parse(each) for each in several]


def _check_task(model: Model, options: SegmentOptions) -> None:
    if options.values is None and model.card.task == "regression":
        raise UsageError(f"{model.source} gives values, not classes; use `tilepipe predict`")


def _bundled(source: RasterSource, bands: tuple[int, ...] | None, shelf: Shelf) -> tuple[Model, str]:
    """The bundled model that fits the raster best, and what to tell of the choice."""
    found = [shelf.model(ModelReference(name)) for name in bundled_models()]
    fitting = []
    for candidate in found:
        try:
            select_bands(source.info, candidate.card.bands, bands)
        except ValueError:
            continue
        fitting.append(candidate)
    if not fitting:
        known = "; ".join(f"{m.source} wants {', '.join(m.card.bands)}" for m in found)
        raise UsageError(
            f"no bundled model fits a raster of {source.info.bands} bands as it declares them ({known}); "
            "choose bands by --bands, or a model by --model"
        )
    # What knows synthetic scenes alone comes last, whatever its resolution.
    best = min(fitting, key=lambda m: (m.source == SYNTHETIC, mismatch(m.card.resolution, source.info.resolution_m)))
    return best, f"no --model given: using the bundled {best.source}"


def resolution_notes(members: Sequence[Member], info: RasterInfo) -> list[str]:
    """What to tell of models that were trained at another ground resolution."""
    return [
        f"the raster's pixels are {info.resolution_m:.3g} m, {_called(member.model)} was trained at "
        f"{spelled(member.model.card.resolution)}; labels may be poor, --resample reads at the model's resolution"
        for member in members
        if mismatch(member.model.card.resolution, info.resolution_m) > 2
    ]


def _called(model: Model) -> str:
    return "the model" if model.source == IN_MEMORY else model.source
