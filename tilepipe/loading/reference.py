"""How a model is named: a value that says how to load it anywhere.

    synthetic-landcover            a model that comes with the package
    model.safetensors              a file that describes itself
    network.pt2                    an exported program, with its card inside or described here
    package.module:factory         a user's own code, which is run
    path/file.py:factory           the same, in a file
    segnet                         an architecture of `tilepipe.models`, with weights
    model.toml                     a file that spells one of these and all below
    model.toml:factory             the same, where it names code: the factory's name says that it may be run

Files that describe themselves need nothing more. Other networks lack a card, so the reference tells what it would
say: classes, bands, mean and standard deviation of each band.
"""

from __future__ import annotations

import colorsys
import hashlib
import inspect
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilepipe.checkpoint import (
    TASKS,
    ClassInfo,
    Model,
    ModelCard,
    Task,
    bundled_models,
    is_number,
    load_model,
    one_line,
)
from tilepipe.errors import ModelError
from tilepipe.exported.archive import SUFFIX, load_exported
from tilepipe.exported.program import Program
from tilepipe.loading.factory import SYNTAX, Factory
from tilepipe.loading.spelling import PARSERS
from tilepipe.loading.weights import check_parts, put_weights, read_weights
from tilepipe.models import MODELS, build
from tilepipe.resolution import Resolution, is_resolution
from tilepipe.trace import channels_of

Names = tuple[str, ...] | int | None
Numbers = tuple[float, ...] | None
Colors = tuple[tuple[int, int, int], ...] | None

WEIGHTS_ALONE = (".pt", ".pth", ".ckpt", ".bin", ".ts")
LARGEST_TOML = 2**20
NODATA = "masked pixels become 0 after normalisation"
BAND_NAMES = ("red", "green", "blue", "nir")
IMAGENET = "for ImageNet's on 8-bit red, green, blue: --mean 123.675,116.28,103.53 --std 58.395,57.12,57.375"


@dataclass(frozen=True, slots=True)
class ModelReference:
    """How to load a model; relative paths are made absolute when it is made, so that it means the same anywhere.

    Fields other than `name` describe what a model without a card lacks; None where it is to be found out. Raises
    ModelError for values that cannot be.
    """

    name: str
    """A bundled name, a file, a factory or an architecture; see the module's table."""
    weights: str | None = None
    """A safetensors file or state dictionary for a factory or an architecture."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments for the factory or architecture: numbers, texts, truth values."""
    classes: Names = None
    """Class names in the order of the label values, or how many there are."""
    colors: Colors = None
    """(red, green, blue) of each class."""
    bands: Names = None
    """Band names in the network's order (red, green, blue, nir, ...), or how many there are."""
    mean: Numbers = None
    """Of each band in raw units, or one number for all."""
    std: Numbers = None
    """Of each band in raw units, or one number for all."""
    resolution: Resolution | None = None
    """Ground size of the training pixels in metres, or the least and the greatest."""
    task: Task | None = None
    """"segmentation" or "regression"; None: the card's, else segmentation."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _absolute_name(str(self.name)))
        if self.weights is not None:
            object.__setattr__(self, "weights", str(Path(self.weights).absolute()))
        if self.task is not None and self.task not in TASKS:
            raise ModelError(f"task {self.task!r} is unknown; legal are {', '.join(TASKS)}")
        for name in ("classes", "bands"):
            value = getattr(self, name)
            if isinstance(value, int) and (isinstance(value, bool) or not 1 <= value <= 65535):
                raise ModelError(f"{name} {value!r} is not legal; give names, or how many")
        if self.resolution is not None and not is_resolution(self.resolution):
            raise ModelError(f"resolution {self.resolution!r} is not legal; give metres, or the least and the greatest")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if numbers is not None and not all(is_number(each) for each in numbers):
                raise ModelError(f"{name} {list(numbers)!r} is not legal; give a number for each band")

    @classmethod
    def parse(cls, name: str | Path, **told: Any) -> ModelReference:
        """The reference that command-line texts or TOML values make; None counts as not told.

        Lists may be texts with commas ("red,green,blue"), counts plain numbers ("4"), colours "#rrggbb",
        arguments a table or texts "key=value". A model.toml is read here, and what is told beside it wins.
        """
        given = {key: value for key, value in told.items() if value is not None and value != ()}
        legal = {each.name for each in fields(cls)} - {"name"}
        for key in given:
            if key not in legal:
                raise ModelError(f"a model is not told {key!r}; legal are {', '.join(sorted(legal))}")
        values = {key: PARSERS[key](value) for key, value in given.items()}
        file, factory = _toml_of(str(name))
        return replace(_read_toml(file, factory), **values) if file else cls(str(name), **values)

    def load(self) -> Model:
        """The model; raises ModelError, in one line, for whatever cannot be loaded or does not fit together."""
        if _toml_of(self.name)[0]:
            return self._spelled_out().load()
        made = Factory.parse(self.name)
        if made is not None:
            return self._foreign(self._with_weights(made.make(self.arguments)), made.code())
        if self.name in MODELS:
            return self._preset()
        if self.name.endswith(SUFFIX):
            return self._exported()
        self._refuse_files_that_are_no_models()
        return self._described(load_model(self.name))

    def look(self) -> tuple[nn.Module, int, ModelCard | None]:
        """(the network, how many bands it takes, its card where it has one), to look at and not to run.

        An architecture needs no weights for it, and no network statistics. Raises ModelError as `load` does.
        """
        if _toml_of(self.name)[0]:
            return self._spelled_out().look()
        made = Factory.parse(self.name)
        known: int | None = None
        if made is not None:
            network = self._with_weights(made.make(self.arguments))
        elif self.name in MODELS:
            network = self._with_weights(self._built()[0])
        elif self.name.endswith(SUFFIX) and (found := self._archive())[1] is None:
            network, known = found[0], found[0].bands
        else:
            model = self.load()
            return model.network, len(model.card.bands), model.card
        return network.eval(), self._band_count(network, known), None

    # ---- kinds -----------------------------------------------------------------------------------------------

    def _spelled_out(self) -> ModelReference:
        """What a model.toml says, with what is told beside it."""
        file, factory = _toml_of(self.name)
        own = {each.name: getattr(self, each.name) for each in fields(self)[1:]}
        told = {key: value for key, value in own.items() if value is not None and value != {}}
        return replace(_read_toml(str(file), factory), **told)

    def _preset(self) -> Model:
        if self.weights is None:
            raise ModelError(f"{self.name} is an architecture without weights; give them with --weights FILE")
        network, arguments = self._built()
        made = replace(self, arguments=arguments)
        return made._foreign(made._with_weights(network), b"")

    def _built(self) -> tuple[nn.Module, dict[str, Any]]:
        """A new network of the named architecture, and all arguments that it was made from."""
        arguments = dict(self.arguments)
        taken = inspect.signature(MODELS[self.name]).parameters
        for key, told in (("classes", self.classes), ("bands", self.bands)):
            if told is not None and key in taken:
                arguments.setdefault(key, told if isinstance(told, int) else len(told))
        try:
            with torch.random.fork_rng(devices=[]):
                return build(self.name, **arguments), arguments
        except (TypeError, RuntimeError, OverflowError, MemoryError) as error:
            raise ModelError(f"arguments {arguments!r} of {self.name}: {one_line(error)}") from None

    def _exported(self) -> Model:
        network, card = self._archive()
        with open(self.name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if card is not None:
            self._check_channels(network, card, len(card.bands))
            return self._described(Model(network, card, self.name, digest))
        return self._foreign(network, digest.encode(), network.bands)

    def _archive(self) -> tuple[Program, ModelCard | None]:
        if self.weights is not None or self.arguments:
            raise ModelError(f"{self.name} holds its weights and takes no arguments; drop --weights and --arg")
        return load_exported(self.name)

    def _described(self, model: Model) -> Model:
        """The model, once nothing that is told contradicts its card."""
        card = model.card
        names = tuple(each.name for each in card.classes)
        beside = {
            "weights": (self.weights, None),
            "arguments": (dict(self.arguments) or None, None),
            "classes": (self.classes, len(names) if isinstance(self.classes, int) else names),
            "colors": (self.colors, tuple(each.color for each in card.classes)),
            "bands": (self.bands, len(card.bands) if isinstance(self.bands, int) else card.bands),
            "mean": (self.mean, card.mean),
            "std": (self.std, card.std),
            "resolution": (self.resolution, card.resolution),
            "task": (self.task, card.task),
        }
        for key, (told, own) in beside.items():
            if told is not None and told != own:
                says = f", whose {key} are {own!r}" if own is not None else ""
                raise ModelError(f"{self.name} describes itself{says}; drop the option for its {key}")
        return model

    def _refuse_files_that_are_no_models(self) -> None:
        path = Path(self.name)
        if self.name not in bundled_models() and not path.exists():
            bundled = ", ".join(bundled_models()) or "none"
            raise ModelError(
                f"{path}: no such model file; bundled are {bundled}, architectures, which want --weights, are "
                f"{', '.join(sorted(MODELS))}"
            )
        if path.suffix == ".py":
            raise ModelError(f"{path} is Python code, which runs only where a factory is named: {path}:FACTORY")
        if path.suffix in WEIGHTS_ALONE and path.is_file():
            with path.open("rb") as file:
                if file.read(2) == b"PK":
                    try:
                        check_parts(file)
                    except ModelError as error:
                        raise ModelError(f"{path}: {error}") from None
            raise ModelError(
                f"{path} holds weights at most; name their network, --model {SYNTAX}, with --weights {path.name}"
            )

    # ---- networks without a card -----------------------------------------------------------------------------

    def _with_weights(self, network: nn.Module) -> nn.Module:
        if self.weights is not None:
            put_weights(network, read_weights(self.weights)[0], self.weights)
        return network

    def _foreign(self, network: nn.Module, code: bytes, bands: int | None = None) -> Model:
        """The model of a network and what is told of it; `code` tells versions of its forward pass apart."""
        count = self._band_count(network, bands)
        card = self._card(count, self._class_infos(network, count))
        model = Model.of(network, card)
        digest = hashlib.sha256(model.digest.encode() + code).hexdigest()
        return Model(model.network, card, self.name, digest)

    def _band_count(self, network: nn.Module, known: int | None) -> int:
        """The number of bands: what is told, else what the network or its first convolution takes."""
        told = self.bands if isinstance(self.bands, int) or self.bands is None else len(self.bands)
        if known is not None and told not in {None, known}:
            raise ModelError(f"{self.name} takes {known} bands and {told} are named; the two have to agree")
        first = next((each for each in network.modules() if isinstance(each, nn.Conv2d)), None)
        count = told or known or (first.in_channels if first is not None else None)
        if count is None:
            raise ModelError(f"{self.name} does not tell how many bands it takes; give their names: --input-bands")
        return count

    def _class_infos(self, network: nn.Module, bands: int) -> tuple[ClassInfo, ...]:
        if self.task == "regression":
            if self.classes is not None:
                raise ModelError(f"{self.name} is told to be a regression, which has no classes; drop one of the two")
            return ()
        found = self._channels(network, bands)
        told = found if self.classes is None else self.classes
        names = tuple(f"class{n}" for n in range(told)) if isinstance(told, int) else told
        if len(names) != found:
            raise ModelError(
                f"{self.name} gives {found} scores a pixel for {len(names)} classes; the two have to agree"
            )
        colors = self.colors or palette(len(names))
        if len(colors) != len(names):
            raise ModelError(f"{len(colors)} colours are told for {len(names)} classes; give one for each")
        return tuple(ClassInfo(name, color) for name, color in zip(names, colors, strict=True))

    def _channels(self, network: nn.Module, bands: int) -> int:
        try:
            return channels_of(network, bands)
        except ModelError as error:
            raise ModelError(f"{self.name}, given {bands} bands: {error}") from None

    def _check_channels(self, network: nn.Module, card: ModelCard, bands: int) -> None:
        found = self._channels(network, bands)
        if card.task == "segmentation" and found != len(card.classes):
            raise ModelError(f"{self.name} gives {found} scores a pixel and its card names {len(card.classes)} classes")

    def _card(self, bands: int, classes: tuple[ClassInfo, ...]) -> ModelCard:
        preset = self.name in MODELS
        made_by = {"model": Path(self.name).name, "arguments": {} if preset else dict(self.arguments)}
        return ModelCard(
            architecture=Path(self.name).name,
            arguments=dict(self.arguments) if preset else {},
            classes=classes,
            bands=self.bands if isinstance(self.bands, tuple) else band_names(bands),
            mean=self._numbers("mean", bands),
            std=self._numbers("std", bands),
            nodata=NODATA,
            resolution=self.resolution,
            licence="unknown",
            provenance={**made_by, "weights": Path(self.weights).name if self.weights else None},
            task=self.task or "segmentation",
        )

    def _numbers(self, key: str, bands: int) -> tuple[float, ...]:
        told: Numbers = getattr(self, key)
        if told is None:
            raise ModelError(
                f"{self.name} does not tell the {key} of its bands, and no value is safe; give --mean and --std as it "
                f"was trained, in the raster's units, {IMAGENET}"
            )
        if len(told) not in {1, bands}:
            raise ModelError(f"{key} has {len(told)} numbers and the network takes {bands} bands; give one for each")
        return tuple(float(each) for each in (told * bands if len(told) == 1 else told))


def band_names(count: int) -> tuple[str, ...]:
    """The usual names of so many bands, as a raster's bands are selected by: red, green, blue, nir, band5, ...

    >>> band_names(5)
    ('red', 'green', 'blue', 'nir', 'band5')
    """
    if count < 3:
        return ("gray",) if count == 1 else ("band1", "band2")
    return tuple(BAND_NAMES[n] if n < len(BAND_NAMES) else f"band{n + 1}" for n in range(count))


def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colours that are told apart: hues a golden angle away from each other, in three tones.

    >>> palette(2)
    ((217, 76, 76), (71, 109, 201))
    """
    tones = ((0.65, 0.85), (0.65, 0.79), (0.45, 0.65))
    colors = (colorsys.hsv_to_rgb(n * 0.618034, *tones[n % 3]) for n in range(count))
    return tuple((round(r * 255), round(g * 255), round(b * 255)) for r, g, b in colors)


# ---- names -----------------------------------------------------------------------------------------------------


def _absolute_name(name: str) -> str:
    made = Factory.parse(name)
    if made is not None:
        return str(made)
    file, factory = _toml_of(name)
    if file:
        return str(Path(file).absolute()) + (f":{factory}" if factory else "")
    if name in bundled_models() or (name in MODELS and not Path(name).exists()):
        return name
    return str(Path(name).absolute())


def _toml_of(name: str) -> tuple[str | None, str | None]:
    """(the TOML file, the factory that may be run) that a name says; (None, None) for another name."""
    if name.endswith(".toml"):
        return name, None
    file, _, factory = name.rpartition(":")
    return (file, factory) if file.endswith(".toml") else (None, None)


def _read_toml(path: str, factory: str | None) -> ModelReference:
    """The reference in a model.toml; its relative paths are beside it."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_TOML + 1)
        if len(data) > LARGEST_TOML:
            raise ModelError(f"is longer than {LARGEST_TOML} bytes")
        table = tomllib.loads(data.decode())
        return _from_table(table, Path(path).absolute(), factory)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such model file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {one_line(error)}") from None
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not legal TOML: {one_line(error)}") from None


def _from_table(table: dict[str, Any], path: Path, factory: str | None) -> ModelReference:
    folder = path.parent
    name = table.pop("model", None)
    if not isinstance(name, str) or _toml_of(name)[0]:
        raise ModelError(f"model {name!r} is not legal; name a file, an architecture, or {SYNTAX}")
    made = Factory.parse(name)
    if made is not None and made.function != factory:
        raise ModelError(f"names code to run, {name}; say that it may be run: {path}:{made.function}")
    if made is None and factory is not None:
        raise ModelError(f"names {name} and no factory {factory}; open it without ':{factory}'")
    if made is not None and made.is_file:
        place = name.rpartition(":")[0]
        name = f"{folder / place}:{made.function}"
    elif made is None and name not in MODELS and name not in bundled_models():
        name = str(folder / name)
    if isinstance(table.get("weights"), str):
        table["weights"] = str(folder / table["weights"])
    return ModelReference.parse(name, **table)
