"""The network that is trained: made anew, with weights to start from; and the model file it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tilepipe.checkpoint import Model, bundled_models, load_model, one_line
from tilepipe.errors import ModelError, TilepipeError
from tilepipe.geometry.network import Geometry
from tilepipe.loading.factory import Factory
from tilepipe.loading.weights import put_weights, read_weights
from tilepipe.models import MODELS, build
from tilepipe.models.pretrained import start_from_vgg16
from tilepipe.trace import geometry_of
from tilepipe.training.options import TrainOptions

FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""How files of weights end."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A network to train."""

    network: nn.Module
    arguments: Mapping[str, Any]
    """All that it was made from."""
    geometry: Geometry
    notes: tuple[str, ...]
    """What the user should hear of the weights it starts from."""
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None
    """(mean, std) of the model that it starts from, which its first layer is used to; None for others."""


def make_network(options: TrainOptions, classes: int, bands: int) -> Subject:
    """The network that the options ask for, for so many classes and bands; raises ModelError where it cannot be.

    Equal options give equal weights.
    """
    notes: tuple[str, ...] = ()
    statistics = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network, arguments = _made(options, {"classes": classes, "bands": bands})
        if options.start is not None:
            notes, statistics = _start(network, options.start, bands)
    geometry = geometry_of(network, bands)
    if geometry.channels_out != classes:
        raise ModelError(f"{options.model} gives {geometry.channels_out} scores a pixel for {classes} classes")
    if geometry.scale != (1, 1):
        raise ModelError(f"{options.model} gives one output per {geometry.scale[0]} pixels; train one that labels each")
    return Subject(network, arguments, geometry, notes, statistics)


def require_legal_crop(geometry: Geometry, crop: tuple[int, int]) -> None:
    """Nothing; raises ModelError where the network takes no windows of that size."""
    for name, axis, asked in zip(("rows", "columns"), geometry.axes, crop, strict=True):
        legal = axis.sizes.ceil(asked)
        if legal != asked:
            raise ModelError(f"a crop of {asked} {name} is no legal size of the network ({axis.sizes}); take {legal}")


def _made(options: TrainOptions, counts: dict[str, int]) -> tuple[nn.Module, dict[str, Any]]:
    given = dict(options.arguments)
    made = Factory.parse(options.model)
    if made is not None:
        return made.make(given), given
    if options.model not in MODELS:
        raise ModelError(
            f"{options.model} is no architecture; legal are {', '.join(sorted(MODELS))}, or a factory "
            "(module:factory); to go on from a model file, name it with --start"
        )
    arguments = {**counts, **given}
    for name, count in counts.items():
        if arguments[name] != count:
            raise ModelError(f"{name}={arguments[name]!r} was asked for, and the data have {count}; leave it out")
    try:
        return build(options.model, **arguments), arguments
    except (TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise ModelError(f"arguments {arguments!r} of {options.model}: {one_line(error)}") from None


def _start(
    network: nn.Module, start: str, bands: int
) -> tuple[tuple[str, ...], tuple[tuple[float, ...], tuple[float, ...]] | None]:
    """What became of the weights to start from, and the statistics that go with them."""
    kind, model = _kind_of(start)
    if model is not None:
        notes = _take_over(network, model)
        same = len(model.card.bands) == bands
        return notes, (model.card.mean, model.card.std) if same else None
    if kind == "vgg16":
        return tuple(str(start_from_vgg16(network, start)).splitlines()), None
    put_weights(network, read_weights(start)[0], start)
    return (f"weights from {start}",), None


def _kind_of(start: str) -> tuple[Literal["model", "vgg16", "weights"], Model | None]:
    """What a start is, and the model where it is one."""
    if start in bundled_models():
        return "model", load_model(start)
    if not Path(start).exists():
        if Path(start).suffix in FILES:
            raise ModelError(f"{start}: no such file of weights to start from")
        return "vgg16", None  # a name of torchvision's, which says what is legal where it is none
    try:
        return "model", load_model(start)
    except TilepipeError:
        state = read_weights(start)[0]
        return ("vgg16" if any(name.startswith("features.") for name in state) else "weights"), None


def _take_over(network: nn.Module, model: Model) -> tuple[str, ...]:
    """Copies all tensors that both have in one shape; says which the network keeps."""
    own, found = network.state_dict(), model.network.state_dict()
    fitting: dict[str, Tensor] = {
        name: tensor for name, tensor in found.items() if name in own and own[name].shape == tensor.shape
    }
    if not fitting:
        raise ModelError(f"{model.source} ({model.card.architecture}) shares no tensor with the network; drop --start")
    network.load_state_dict({**own, **fitting})
    left = [name for name in own if name not in fitting]
    more = f"; new are {', '.join(left[:4])}{' ...' if len(left) > 4 else ''}" if left else ""
    return (f"from {model.source}: {len(fitting)} of {len(own)} tensors{more}",)
