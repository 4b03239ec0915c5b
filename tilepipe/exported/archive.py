"""Archives that `torch.export.save` writes (`.pt2`): read as data, never unpickled into code.

An archive is a zip file without compression:

    NAME/models/model.json                            the graph, its signature, the input's sizes
    NAME/data/weights/model_weights_config.json       which tensor lies in which file, its type, shape, strides
    NAME/data/weights/weight_0, ...                   the tensors' bytes
    NAME/data/constants/...                           the same for constants
    NAME/data/sample_inputs/model.pt                  a pickle; must hold tensors alone
    NAME/extra/tilepipe                               a model card, where `save_exported` wrote it

`torch.export.load` unpickles sample inputs, constants and custom objects without limits, and evaluates sizes and
conditions as Python. None of that happens here: `program.build_program` runs the graph from its description.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from tilepipe.checkpoint import METADATA_KEY, ModelCard, one_line, parse_json
from tilepipe.errors import ModelError, TilepipeError
from tilepipe.exported.program import DTYPES, Program, build_program
from tilepipe.loading.weights import check_parts, check_state, unpickled

SUFFIX = ".pt2"
SAMPLES = "data/sample_inputs/model.pt"
LARGEST_GRAPH = 256 * 2**20
"""Bytes of a description; a network of a thousand layers needs about one million."""


def load_exported(path: str | Path) -> tuple[Program, ModelCard | None]:
    """The network in an archive, in evaluation mode, float32, on the CPU; and its card where it carries one.

    Nothing in the archive is executed. Raises ModelError, in one line that names the file, where it is missing,
    malformed, or its graph calls anything but torch's own tensor operators.
    """
    try:
        with open(path, "rb") as file:
            return _load(file)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such model file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {one_line(error)}") from None
    except TilepipeError as error:
        raise ModelError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise ModelError(f"{path}: is not a usable exported program: {_what(error)}") from None
    except (zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise ModelError(f"{path}: is not a usable exported program: {_what(error)}") from None


def _what(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def save_exported(
    path: str | Path, network: nn.Module, card: ModelCard | None = None, *, size: tuple[int, int] = (64, 96)
) -> None:
    """Writes a network as an exported program for any number of rows and columns that it takes.

    `size` is an example that passes through the network, rows and columns different and neither 0 nor 1. With a
    card, the archive describes itself and needs no options. Raises ModelError where torch cannot export the network.
    """
    bands = len(card.bands) if card else _first_channels(network)
    free = torch.export.Dim.AUTO
    image = torch.zeros(1, bands, *size)
    extra = {METADATA_KEY: card.to_json()} if card else {}
    try:
        program = torch.export.export(network.float().cpu().eval(), (image,), dynamic_shapes=({2: free, 3: free},))
        torch.export.save(program, str(path), extra_files=extra)
    except Exception as error:  # export runs the network's own code
        raise ModelError(f"{path}: the network cannot be exported: {one_line(error)}") from None


def _first_channels(network: nn.Module) -> int:
    found = next((each.in_channels for each in network.modules() if isinstance(each, nn.Conv2d)), None)
    if found is None:
        raise ModelError("the network has no convolution that tells its number of bands; give a card")
    return found


def _load(file: BinaryIO) -> tuple[Program, ModelCard | None]:
    files = Archive(file)
    told = parse_json(files.read("models/model.json", LARGEST_GRAPH), "graph")
    tensors = files.tensors("weights") | files.tensors("constants")
    if files.has(SAMPLES):  # not needed; but an archive whose pickles hold more than tensors is not to be trusted
        try:
            unpickled(io.BytesIO(files.read(SAMPLES, 2**62)))
        except ModelError as error:
            raise ModelError(f"its sample input {error}") from None
    card = None
    if files.has(f"extra/{METADATA_KEY}"):
        card = ModelCard.from_json(files.read(f"extra/{METADATA_KEY}", LARGEST_GRAPH).decode())
    return build_program(told, tensors), card


class Archive:
    """The files of an archive, each no larger than the archive itself."""

    def __init__(self, file: BinaryIO) -> None:
        if not zipfile.is_zipfile(file):
            raise ModelError("is not an exported program (.pt2), or is cut short")
        self._zip = check_parts(file)
        names = self._zip.namelist()
        if "serialized_exported_program.json" in names:
            raise ModelError("was written by torch 2.7 or older; load it there and save it with a newer torch")
        self._root = names[0].partition("/")[0] if names else ""
        if not self.has("archive_format") or self.read("archive_format", 16) != b"pt2":
            raise ModelError("is a zip file but no exported program")
        if self.read("archive_version", 16) != b"0" or not self.has("models/model.json"):
            raise ModelError("holds no single exported program of a format that is known; use torch.export.save")
        if any("/data/aotinductor/" in name for name in names):
            raise ModelError("holds compiled code, which is not loaded; use torch.export.save")

    def has(self, name: str) -> bool:
        """Whether the archive holds a file."""
        return f"{self._root}/{name}" in self._zip.NameToInfo

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a file; raises ModelError where they are missing or more than `most`."""
        if not self.has(name):
            raise ModelError(f"lacks its part {name}")
        entry = self._zip.getinfo(f"{self._root}/{name}")
        if entry.file_size > most:
            raise ModelError(f"has a part {name} of {entry.file_size} bytes; at most {most} are legal")
        return self._zip.read(entry)

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """The tensors among "weights" or "constants", by name; floating-point parameters as such."""
        config = f"data/{kind}/model_{kind}_config.json"
        if not self.has(config) and self.has(f"data/{kind}/model.pt"):
            return self._pickled(f"data/{kind}/model.pt")
        table = parse_json(self.read(config, LARGEST_GRAPH), f"table of {kind}")["config"]
        buffers: dict[str, bytes] = {}
        return {name: self._tensor(name, f"data/{kind}/", told, buffers) for name, told in table.items()}

    def _tensor(self, name: str, folder: str, told: Mapping[str, Any], buffers: dict[str, bytes]) -> Tensor:
        path = str(told["path_name"])
        if not path.startswith(("weight_", "tensor_")):
            raise ModelError(f"holds an object {name} that is not a tensor; bring the network by its code instead")
        if path not in buffers:
            buffers[path] = self.read(folder + path, 2**62)
        if told["use_pickle"]:
            tensor = unpickled(io.BytesIO(buffers[path]))
            if not isinstance(tensor, Tensor):
                raise ModelError(f"holds an object {name} that is not a tensor; bring the network by its code instead")
            check_state({name: tensor}, len(buffers[path]))
        else:
            tensor = _strided(name, buffers[path], told["tensor_meta"])
        if tensor.is_floating_point():
            tensor = tensor.float()
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"tensor {name} holds values that are not finite")
            return nn.Parameter(tensor, requires_grad=False) if told["is_param"] else tensor
        return tensor

    def _pickled(self, path: str) -> dict[str, Tensor]:
        """The tensors of an archive by torch 2.8, which keeps them together in one pickle."""
        data = self.read(path, 2**62)
        state = unpickled(io.BytesIO(data))
        if not isinstance(state, dict) or not all(isinstance(each, Tensor) for each in state.values()):
            raise ModelError(f"holds objects in {path} that are not tensors; bring the network by its code instead")
        check_state(state, len(data))
        return {name: each.float() if each.is_floating_point() else each for name, each in state.items()}


def _strided(name: str, data: bytes, meta: Mapping[str, Any]) -> Tensor:
    """A tensor in raw bytes; raises ModelError where it reaches beyond them."""
    dtype = DTYPES.get(meta["dtype"])
    if dtype is None:
        raise ModelError(f"tensor {name} has a type that is not known")
    sizes = [int(each["as_int"]) for each in meta["sizes"]]
    strides = [int(each["as_int"]) for each in meta["strides"]]
    offset = int(meta["storage_offset"]["as_int"])
    if min([0, *sizes, *strides, offset]) < 0 or len(sizes) != len(strides):
        raise ModelError(f"tensor {name} has an illegal shape")
    count = math.prod(sizes)
    end = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1 if count else 0
    if max(end, count) * dtype.itemsize > len(data):
        raise ModelError(f"tensor {name} is told to be {sizes} and has only {len(data)} bytes")
    if not count:
        return torch.empty(sizes, dtype=dtype)
    flat = torch.frombuffer(bytearray(data), dtype=dtype, count=len(data) // dtype.itemsize)
    return flat.as_strided(sizes, strides, offset).clone(memory_format=torch.contiguous_format)
