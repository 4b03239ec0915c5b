"""One self-describing model file: weights and a card that says what they are.

The file is plain safetensors. Its header holds, beside the tensors' table, one metadata entry `tilepipe` with the
card as JSON, so that any safetensors reader can open the weights and nothing in the file is ever executed:

    8 bytes        length of the header
    header         {"__metadata__": {"tilepipe": "{card}"}, name: {dtype, shape, data_offsets}, ...}
    data           the tensors, float32 or float16

Reading checks the header, the card and every tensor's shape before any weight is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tilepipe.errors import ModelError, TilepipeError
from tilepipe.models import build
from tilepipe.resolution import Resolution, is_resolution

FORMAT_VERSION = 1
METADATA_KEY = "tilepipe"
LARGEST_HEADER = 4 * 2**20
"""Bytes; a network of ten thousand tensors needs about one million."""
IN_MEMORY = "(memory)"
"""The source of a model that was made in this process."""
SYNTHETIC = "synthetic-landcover"
"""The bundled model that knows synthetic scenes alone."""
Task = Literal["segmentation", "regression"]
TASKS: tuple[Task, ...] = get_args(Task)
COUNTERS = "num_batches_tracked"  # batch normalisation's, which evaluation does not use


@dataclass(frozen=True, slots=True)
class ClassInfo:
    """A class that a model tells apart."""

    name: str
    color: tuple[int, int, int]
    """Red, green and blue for display, 0 to 255."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ModelError(f"class name {self.name!r} is not legal; give a text")
        if len(self.color) != 3 or not all(type(part) is int and 0 <= part <= 255 for part in self.color):
            raise ModelError(f"colour {self.color!r} of class {self.name} is not legal; give three numbers 0 to 255")


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a model is, what it expects, what its outputs mean, and where it comes from."""

    architecture: str
    """A name in `tilepipe.models.MODELS`."""
    arguments: Mapping[str, Any]
    """The architecture's arguments."""
    classes: tuple[ClassInfo, ...]
    """In the order of the label values; empty for a regression."""
    bands: tuple[str, ...]
    """Names of the input bands in order: red, green, blue, nir, ..."""
    mean: tuple[float, ...]
    """Of each band, in raw units."""
    std: tuple[float, ...]
    """Of each band, in raw units; positive."""
    nodata: str
    """What becomes of pixels that are masked or not finite, in words."""
    resolution: Resolution | None
    """Ground size of the pixels it was trained on, in metres, or their range; None where it does not matter."""
    licence: str
    provenance: Mapping[str, Any]
    """How it was made: data, command, score."""
    task: Task = "segmentation"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ModelError(f"model format {self.format_version!r} is unknown; this version reads {FORMAT_VERSION}")
        if self.task not in TASKS:
            raise ModelError(f"task {self.task!r} is unknown; legal are {', '.join(TASKS)}")
        for name in ("architecture", "nodata", "licence"):
            if not isinstance(getattr(self, name), str):
                raise ModelError(f"{name} {getattr(self, name)!r} is not a text")
        for name in ("arguments", "provenance"):
            if not isinstance(getattr(self, name), Mapping):
                raise ModelError(f"{name} {getattr(self, name)!r} is not a table")
        self._check_classes()
        self._check_bands()

    def _check_classes(self) -> None:
        names = [item.name for item in self.classes]
        if len(set(names)) != len(names):
            raise ModelError(f"class names {', '.join(names)} repeat; each class needs its own")
        if self.task == "segmentation" and not 1 <= len(names) <= 65535:
            raise ModelError(f"{len(names)} classes cannot be labelled; a segmentation needs 1 to 65535")
        if self.task == "regression" and names:
            raise ModelError(f"a regression has no classes, and the card names {', '.join(names)}")
        told = self.arguments.get("classes", len(names))
        if self.task == "segmentation" and told != len(names):
            raise ModelError(f"the network gives {told!r} scores but the card names {len(names)} classes")

    def _check_bands(self) -> None:
        if not self.bands or not all(isinstance(band, str) and band for band in self.bands):
            raise ModelError(f"bands {self.bands!r} are not legal; name each input band")
        if len(set(self.bands)) != len(self.bands):
            raise ModelError(f"band names {', '.join(self.bands)} repeat; each band needs its own")
        if self.arguments.get("bands", len(self.bands)) != len(self.bands):
            raise ModelError(
                f"the network takes {self.arguments['bands']!r} bands but the card names {len(self.bands)}"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != len(self.bands) or not all(is_number(value) for value in values):
                raise ModelError(f"{name} {list(values)!r} is not legal; give a finite number for each band")
        if min(self.std) <= 0:
            raise ModelError(f"std {list(self.std)!r} is not legal; each must be above 0")
        if self.resolution is not None and not is_resolution(self.resolution):
            raise ModelError(
                f"resolution {self.resolution!r} is not legal; give metres above 0, the least and the greatest, or null"
            )

    def to_json(self) -> str:
        """The card as one line of JSON, keys sorted."""
        try:
            return json.dumps(asdict(self), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ModelError(f"the model card cannot be written as JSON: {one_line(error)}") from None

    @classmethod
    def from_json(cls, text: str) -> ModelCard:
        """The card that `to_json` wrote; raises ModelError for anything else."""
        told = parse_json(text, "model card")
        version = told.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise ModelError(f"model format {version!r} is unknown; this version reads {FORMAT_VERSION}")
        legal = {field.name for field in fields(cls)}
        if told.keys() != legal:
            wrong = ", ".join(sorted(told.keys() ^ legal))
            raise ModelError(f"the model card lacks or does not know: {wrong}")
        try:
            classes = tuple(ClassInfo(item["name"], tuple(item["color"])) for item in told["classes"])
            lists = {name: tuple(told[name]) for name in ("bands", "mean", "std")}
            if isinstance(told["resolution"], list):
                lists["resolution"] = tuple(told["resolution"])
            return cls(**{**told, **lists, "classes": classes})
        except (TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"the model card is malformed: {one_line(error)}") from None


@dataclass(frozen=True, slots=True)
class Model:
    """A network ready to be used, and what is known about it."""

    network: nn.Module
    """In evaluation mode, float32, on the CPU."""
    card: ModelCard
    source: str
    """The file or bundled name it was read from, or IN_MEMORY."""
    digest: str
    """SHA-256 of the file's bytes, or, in memory, of card, structure and weights."""

    @classmethod
    def of(cls, network: nn.Module, card: ModelCard) -> Model:
        """The model of any network in memory, which is put into evaluation mode; its architecture needs no name."""
        network = network.float().eval()
        digest = hashlib.sha256(f"{card.to_json()}\n{network}".encode())
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return cls(network, card, IN_MEMORY, digest.hexdigest())


def bundled_models() -> tuple[str, ...]:
    """Names of the models that come with the package, sorted."""
    folder = resources.files("tilepipe") / "weights"
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
    return tuple(sorted(Path(name).stem for name in names if name.endswith(".safetensors")))


def save_model(path: str | Path, network: nn.Module, card: ModelCard, half: bool = False) -> None:
    """Writes a network and its card as one file, whole or not at all; equal weights give equal bytes.

    `half` stores float16, half the size; loading gives float32 again. Raises ModelError where the tensors are not
    those of the card's architecture, or the file cannot be written.
    """
    data = encode(network, card, half)
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {one_line(error)}") from None


def load_model(reference: str | Path) -> Model:
    """The model in a file, or the bundled model of that name.

    Nothing in the file is executed. Raises ModelError, in one line that names the file, where it is missing,
    malformed, of another format version, or its tensors are not those of its architecture.
    """
    name = str(reference)
    if name in bundled_models():
        return decode((resources.files("tilepipe") / "weights" / f"{name}.safetensors").read_bytes(), name)
    path = Path(reference)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            check_extent(start + file.read(header_length(start, size)), size)
            file.seek(0)
            data = file.read(size)
    except FileNotFoundError:
        known = ", ".join(bundled_models()) or "none"
        raise ModelError(f"{name}: no such model file; bundled models: {known}") from None
    except OSError as error:
        raise ModelError(f"{name}: cannot be read: {one_line(error)}") from None
    except TilepipeError as error:
        raise ModelError(f"{name}: {error}") from None
    return decode(data, name)


def encode(network: nn.Module, card: ModelCard, half: bool = False) -> bytes:
    """The bytes of a model file."""
    tensors = {}
    for name, tensor in network.state_dict().items():
        if name.endswith(COUNTERS):
            continue
        stored = tensor.detach().cpu()
        if stored.is_floating_point():
            stored = stored.to(torch.float16 if half else torch.float32)
            if not bool(torch.isfinite(stored).all()):
                raise ModelError(f"tensor {name} holds values that are not finite, or too large for float16")
        tensors[name] = stored.clone(memory_format=torch.contiguous_format)
    check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, card)
    return safetensors.torch.save(tensors, {METADATA_KEY: card.to_json()})


def decode(data: bytes, source: str) -> Model:
    """The model in the bytes of a file; errors name `source`."""
    try:
        header = check_extent(data[: 8 + header_length(data[:8], len(data))], len(data))
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or not isinstance(metadata.get(METADATA_KEY), str):
            raise ModelError(
                f"has no model card (metadata entry {METADATA_KEY!r}): it is weights alone, which --weights takes"
            )
        card = ModelCard.from_json(metadata[METADATA_KEY])
        check_tensors({name: tuple(entry["shape"]) for name, entry in header.items()}, card)
        network = filled(card, safetensors.torch.load(data))
    except TilepipeError as error:
        raise ModelError(f"{source}: {error}") from None
    except (SafetensorError, TypeError, KeyError, RuntimeError, RecursionError) as error:
        raise ModelError(f"{source}: is not a usable model file: {one_line(error)}") from None
    return Model(network, card, source, hashlib.sha256(data).hexdigest())


def header_length(start: bytes, size: int) -> int:
    """The header's length, from a file's first eight bytes and its size."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length < 2 or length > size - 8:
        raise ModelError("is not a safetensors file, or is cut short")
    if length > LARGEST_HEADER:
        raise ModelError(f"has a header of {length} bytes; at most {LARGEST_HEADER} are legal")
    return length


def check_extent(head: bytes, size: int) -> dict[str, Any]:
    """The parsed header; raises ModelError where its tensors do not fill the file exactly."""
    header = parse_json(head[8:], "header")
    try:
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        raise ModelError("has a malformed table of tensors") from None
    expected = len(head) + max(ends, default=0)
    if expected != size:
        raise ModelError(f"is {size} bytes long where its header tells {expected}; it was cut or changed")
    return header


def check_tensors(found: Mapping[str, tuple[int, ...]], card: ModelCard) -> None:
    """Nothing; raises ModelError where names or shapes are not those of the card's architecture."""
    try:
        with torch.device("meta"):
            state = build(card.architecture, **card.arguments).state_dict()
    except TilepipeError:
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise ModelError(f"arguments {dict(card.arguments)!r} of {card.architecture}: {one_line(error)}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.endswith(COUNTERS)}
    for name, shape in wanted.items():
        if name not in found:
            raise ModelError(f"lacks tensor {name} of {card.architecture}")
        if found[name] != shape:
            raise ModelError(f"tensor {name} has shape {list(found[name])}, {card.architecture} needs {list(shape)}")
    for name in found:
        if name not in wanted:
            raise ModelError(f"holds tensor {name}, which {card.architecture} does not have")


def filled(card: ModelCard, tensors: dict[str, Tensor]) -> nn.Module:
    """The card's network with these weights, float32, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):  # building draws weights; the caller's random numbers stay untouched
        network = build(card.architecture, **card.arguments)
    state = network.state_dict()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != state[name].is_floating_point():
            raise ModelError(f"tensor {name} has type {tensor.dtype}, {card.architecture} needs {state[name].dtype}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise ModelError(f"tensor {name} holds values that are not finite")
        state[name] = tensor.to(state[name].dtype)
    network.load_state_dict(state)
    return network.float().eval()


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """The JSON object in `text`; raises ModelError for anything else, NaN and infinity included."""
    try:
        told = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the {what} is not legal JSON: {one_line(error)}") from None
    if not isinstance(told, dict):
        raise ModelError(f"the {what} is not a JSON object")
    return told


def refuse_constant(name: str) -> None:
    """Never returns: JSON has no such number."""
    raise ValueError(f"{name} is not a number")


def is_number(value: object) -> bool:
    """Whether `value` is a finite number, and not a truth value."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def one_line(error: BaseException) -> str:
    """The error's message without line breaks, at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
