"""Weights to start from: the encoders of SegNet, DeconvNet and FCN filled from torchvision's VGG16 or VGG16-BN.

What is taken, where `features.i` and `classifier.i` are torchvision's layers:

    features, convolutions      the encoder's first 13 convolutions
    features, normalisations    the encoder's first 13 normalisations; where the network has none, they are folded into
                                the convolutions (w' = w g / s, b' = (b - m) g / s + h with s = sqrt(v + eps): Jacob et
                                al., arXiv 1712.05877, section 3.2)
    classifier.0                4096 x 25088, as a convolution of 4096 x 512 x 7 x 7: fc6
    classifier.3                4096 x 4096, as one of 4096 x 4096 x 1 x 1: fc7

The first convolution reads red, green and blue. For another number of bands the first ones take those filters in this
order, all further ones their mean, and all are scaled by 3 / bands, so that activations keep their scale; a single
band takes the sum of the three.

torchvision's networks were trained on images in [0, 1] less a mean, divided by a deviation: about what a model card's
statistics make of pixels. VGG16_Weights.IMAGENET1K_FEATURES is the exception: deviations of 1/255, and no classifier.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tilepipe.errors import ModelError
from tilepipe.models.vgg import FC_SIZE, FC_WIDTH, VGG16_STAGES

CONVOLUTIONS = sum(map(len, VGG16_STAGES))
COLOURS = 3
NORM_EPS = 1e-5  # torchvision's
LEGAL = "SegNet, DeconvNet and FCN at width 1"
UNREADABLE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError),
    *(AttributeError, IndexError, KeyError, TypeError, MemoryError),
)
"""What a damaged or hostile file makes torch's reader raise."""

Parameters = Mapping[str, Tensor]
"""A layer's tensors: weight, bias, and for a normalisation running_mean and running_var."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a network took from VGG16, as names of its own tensors."""

    source: str
    """The weights' name or file."""
    filled: tuple[str, ...]
    """Tensors that are VGG16's, at most in another shape."""
    adapted: tuple[str, ...]
    """Tensors computed from VGG16's: another number of bands, folded normalisation."""
    left: tuple[str, ...]
    """Tensors that stay as they were, running statistics included."""
    notes: tuple[str, ...]
    """What was adapted or left though VGG16 has such a layer, and why: a sentence each."""

    def __str__(self) -> str:
        counts = f"{len(self.filled)} tensors filled, {len(self.adapted)} adapted, {len(self.left)} left"
        return "\n".join((f"from {self.source}: {counts}", *self.notes))


def start_from_vgg16(network: nn.Module, weights: str | Path) -> Start:
    """What was filled, in place, of a SegNet, DeconvNet or FCN of width 1 from weights of VGG16 or VGG16-BN.

    `weights`: a file with torchvision's state dictionary (.pth, read without executing code, or .safetensors), or the
    name of torchvision's weights: "VGG16_BN_Weights.IMAGENET1K_V1", or "DEFAULT" for those that match the network's
    normalisation, which torchvision downloads or finds in its cache. Dtype and device of the network stay. Raises
    ModelError where the network has no such encoder, the weights cannot be had, or are not VGG16's; the network is
    then as it was.
    """
    layers = encoder_layers(network)
    source = vgg16_of(read_weights(weights, any(norm is not None for _, _, norm in layers)), str(weights))
    filling = _Filling()
    with torch.no_grad():
        _fill_encoder(filling, layers, source)
        _fill_connected(filling, network, source)
        filling.apply()
    taken = {*filling.filled, *filling.adapted}
    left = tuple(name for name in network.state_dict() if name not in taken and not name.endswith("batches_tracked"))
    return Start(str(weights), tuple(filling.filled), tuple(filling.adapted), left, tuple(filling.notes))


# ---- the weights --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VGG16:
    """The layers of torchvision's VGG16 or VGG16-BN."""

    convolutions: tuple[Parameters, ...]
    normalisations: tuple[Parameters, ...]
    """Empty for VGG16 without batch normalisation."""
    connected: tuple[Parameters, ...]
    """The first two fully connected layers; empty where the file holds none that can be used."""


def read_weights(weights: str | Path, normalised: bool) -> dict[str, Tensor]:
    """A state dictionary, from a file or through torchvision; `normalised` decides what "DEFAULT" means."""
    path = Path(weights)
    if path.is_file():
        state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pth(path)
    elif path.suffix in {".pth", ".pt", ".safetensors"} or path.exists():
        raise ModelError(f"{weights}: no such file of weights; give a .pth or .safetensors file")
    else:
        state = _from_torchvision(str(weights), normalised)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ModelError(f"{weights}: holds no state dictionary; save torchvision's network.state_dict()")
    return state


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: is not a usable safetensors file: {_one_line(error)}") from None


def _read_pth(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ModelError(f"{path}: is not a usable file of weights: {_one_line(error)}") from None


def _from_torchvision(name: str, normalised: bool) -> Any:
    try:
        from torchvision.models import VGG16_BN_Weights, VGG16_Weights
    except ImportError:
        raise ModelError(
            f"weights {name!r} come from torchvision, which is not installed; install it, or give a file"
        ) from None
    families = {"VGG16_Weights": VGG16_Weights, "VGG16_BN_Weights": VGG16_BN_Weights}
    family, _, member = name.rpartition(".")
    family = family or ("VGG16_BN_Weights" if normalised else "VGG16_Weights")
    known = families[family].__members__ if family in families else {}
    if member not in known:
        legal = ", ".join(f"{each}.{one}" for each, kind in families.items() for one in kind.__members__)
        raise ModelError(f"weights {name!r} are no file and not known to torchvision; legal are {legal}")
    try:
        return known[member].get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (HTTPException, *UNREADABLE) as error:
        raise ModelError(
            f"weights {name} cannot be downloaded: {_one_line(error)}; download {known[member].url} elsewhere "
            "and give the file"
        ) from None


def vgg16_of(state: Mapping[str, Tensor], source: str) -> VGG16:
    """The layers in a state dictionary of torchvision's VGG16; raises ModelError, naming `source`, for another's."""
    layers: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        number, _, kind = rest.partition(".")
        if part in {"features", "classifier"} and number.isdecimal():
            layers.setdefault((part, int(number)), {})[kind] = tensor
    features = [layers[key] for key in sorted(layers) if key[0] == "features" and "weight" in layers[key]]
    convolutions = [layer for layer in features if layer["weight"].dim() == 4]
    normalisations = [layer for layer in features if "running_mean" in layer]
    wanted = [(outgoing, incoming, 3, 3) for incoming, outgoing in _channels()]
    found = [tuple(layer["weight"].shape) for layer in convolutions]
    if found != wanted or len(normalisations) not in {0, CONVOLUTIONS}:
        raise ModelError(f"{source}: is not VGG16: {len(found)} convolutions of other shapes than its {CONVOLUTIONS}")
    for layer, (_, outgoing) in zip((*convolutions, *normalisations), _channels() * 2, strict=False):
        _check_vectors(layer, outgoing, source)
    connected = [layers.get(("classifier", number), {}) for number in (0, 3)]
    return VGG16(tuple(convolutions), tuple(normalisations), tuple(connected) if _usable(connected) else ())


def _channels(bands: int = COLOURS) -> list[tuple[int, int]]:
    """(incoming, outgoing) of VGG16's convolutions."""
    return list(pairwise([bands, *(features for stage in VGG16_STAGES for features in stage)]))


def _check_vectors(layer: Parameters, features: int, source: str) -> None:
    needed = ("weight", "bias", "running_mean", "running_var") if "running_mean" in layer else ("bias",)
    for kind in needed:
        if kind not in layer or tuple(layer[kind].shape) != (features,):
            raise ModelError(f"{source}: is not VGG16: a layer of {features} features lacks its {kind}")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in layer.values()):
        raise ModelError(f"{source}: holds values that are not finite")


def _usable(connected: list[dict[str, Tensor]]) -> bool:
    """Whether both layers have VGG16's shapes and finite values; some of torchvision's weights hold NaN here."""
    read = VGG16_STAGES[-1][-1] * FC_SIZE**2
    shapes = [(FC_WIDTH, read), (FC_WIDTH, FC_WIDTH)]
    return all(
        layer.keys() >= {"weight", "bias"}
        and tuple(layer["weight"].shape) == shape
        and tuple(layer["bias"].shape) == shape[:1]
        and all(bool(torch.isfinite(tensor).all()) for tensor in layer.values())
        for layer, shape in zip(connected, shapes, strict=True)
    )


# ---- the network --------------------------------------------------------------------------------------------------

EncoderLayer = tuple[str, nn.Conv2d, tuple[str, nn.BatchNorm2d] | None]
"""A convolution's name, the convolution, and the name and module of its batch normalisation if it has one."""


def encoder_layers(network: nn.Module) -> list[EncoderLayer]:
    """The 13 convolutions of a network's VGG16 encoder; raises ModelError where it has none, or of another width."""
    name, encoder = type(network).__name__, getattr(network, "encoder", None)
    if not isinstance(encoder, nn.ModuleList):
        raise ModelError(f"{name} has no VGG16 encoder; legal are {LEGAL}")
    modules = list(encoder.named_modules(prefix="encoder"))
    layers: list[EncoderLayer] = []
    for (path, module), (after, follower) in pairwise([*modules, ("", nn.Identity())]):
        if isinstance(module, nn.Conv2d):
            layers.append((path, module, (after, follower) if isinstance(follower, nn.BatchNorm2d) else None))
    layers = layers[:CONVOLUTIONS]
    bands = layers[0][1].in_channels if layers else 0
    found = [tuple(conv.weight.shape) for _, conv, _ in layers]
    if found != [(outgoing, incoming, 3, 3) for incoming, outgoing in _channels(bands)]:
        raise ModelError(f"{name}'s encoder is not VGG16 of width 1; legal are {LEGAL}")
    return layers


@dataclass(frozen=True, slots=True)
class _Filling:
    """What will be copied, and what is to be said of it."""

    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fill(self, name: str, module: nn.Module, given: Parameters, adapted: bool = False) -> None:
        """Takes a layer's tensors for a module's of the same names."""
        for kind, tensor in given.items():
            own = getattr(module, kind, None)
            if isinstance(own, Tensor) and kind != "num_batches_tracked":
                self.copies.append((own, tensor.reshape(own.shape)))
                (self.adapted if adapted else self.filled).append(f"{name}.{kind}")

    def apply(self) -> None:
        """Copies all."""
        for own, tensor in self.copies:
            own.copy_(tensor)


def _fill_encoder(filling: _Filling, layers: list[EncoderLayer], source: VGG16) -> None:
    normalised = all(norm is not None for _, _, norm in layers)
    fold = bool(source.normalisations) and not normalised
    for number, (name, conv, norm) in enumerate(layers):
        given = source.convolutions[number]
        if fold:
            given = _folded(given, source.normalisations[number])
        bands = conv.in_channels if number == 0 else COLOURS
        if bands != COLOURS:
            weight = for_bands(given["weight"], bands)
            filling.fill(name, conv, {"weight": weight}, adapted=True)
            filling.fill(name, conv, {"bias": given["bias"]}, adapted=fold)
            filling.notes.append(f"{name} reads {bands} bands: filters of red, green, blue adapted")
        else:
            filling.fill(name, conv, given, adapted=fold)
        if norm is not None and source.normalisations:
            filling.fill(*norm, source.normalisations[number])
    if fold:
        filling.notes.append("batch normalisation of VGG16-BN folded into the encoder's convolutions")
    if normalised and not source.normalisations:
        filling.notes.append("these weights have no batch normalisation: the encoder's is left as it was")


def for_bands(weight: Tensor, bands: int) -> Tensor:
    """A first convolution's weights (features, bands, 3, 3) from those for red, green and blue.

    The first three bands take red's, green's and blue's, further ones their mean, all times 3 / bands; one band takes
    the sum.
    """
    if bands == 1:
        return weight.sum(1, keepdim=True)
    mean = weight.mean(1, keepdim=True).expand(-1, max(0, bands - COLOURS), -1, -1)
    return torch.cat([weight[:, :bands], mean], 1) * (COLOURS / bands)


def _folded(conv: Parameters, norm: Parameters) -> Parameters:
    scale = norm["weight"].double() / (norm["running_var"].double() + NORM_EPS).sqrt()
    weight = conv["weight"].double() * scale[:, None, None, None]
    return {"weight": weight, "bias": (conv["bias"].double() - norm["running_mean"].double()) * scale + norm["bias"]}


def _fill_connected(filling: _Filling, network: nn.Module, source: VGG16) -> None:
    """Fills fc6 and fc7, where the network has them, in as far as they are VGG16's."""
    for number, (name, kernel, incoming) in enumerate((("fc6", FC_SIZE, VGG16_STAGES[-1][-1]), ("fc7", 1, FC_WIDTH))):
        stage = getattr(network, name, None)
        conv = stage[0] if isinstance(stage, nn.Sequential) else None
        if not isinstance(conv, nn.Conv2d):
            continue
        wanted = (FC_WIDTH, incoming, kernel, kernel)
        if not source.connected:
            filling.notes.append(f"{name} left as it was: these weights have no usable fully connected layers")
        elif tuple(conv.weight.shape) != wanted:
            found, needed = (" x ".join(map(str, shape)) for shape in (conv.weight.shape, wanted))
            filling.notes.append(f"{name} left as it was: its weights are {found}, VGG16's {needed}")
        elif len(network.encoder) != len(VGG16_STAGES):  # type: ignore[arg-type]
            filling.notes.append(f"{name} left as it was: it does not follow VGG16's fifth stage")
        else:
            filling.fill(f"{name}.0", conv, source.connected[number])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
