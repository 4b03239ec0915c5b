"""Weights files put into a network that is there already: safetensors, and torch's state dictionaries.

Pickles are read by torch's restricted reader, which makes tensors and plain containers and calls nothing.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tilepipe.checkpoint import COUNTERS, check_extent, header_length, one_line
from tilepipe.errors import ModelError, TilepipeError

NESTS = ("state_dict", "model_state_dict", "model", "net", "network", "ema", "state_dict_ema")
"""Entries under which training programs keep the weights beside optimiser and epoch."""
PREFIXES = ("module.", "model.", "net.", "network.", "_orig_mod.", "backbone.")
"""What wrappers (data parallelism, Lightning, torch.compile) put before every name."""
_SHOWN = 3


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """(tensors by name, SHA-256 of the file's bytes); nothing in the file is executed.

    Reads safetensors and pickled state dictionaries (.pt, .pth, .ckpt, .bin), nested ones too. Raises ModelError,
    in one line that names the file, for anything else.
    """
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            start = file.read(9)
            file.seek(0)
            tensors = _safetensors(file.read()) if start[8:] == b"{" else _pickled(file)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such weights file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {one_line(error)}") from None
    except TilepipeError as error:
        raise ModelError(f"{path}: {error}") from None
    return tensors, digest


def _safetensors(data: bytes) -> dict[str, Tensor]:
    check_extent(data[: 8 + header_length(data[:8], len(data))], len(data))
    try:
        return dict(safetensors.torch.load(data))
    except (SafetensorError, TypeError, KeyError, ValueError, RuntimeError, RecursionError) as error:
        raise ModelError(f"is not a usable safetensors file: {one_line(error)}") from None


def _pickled(file: BinaryIO) -> dict[str, Tensor]:
    if zipfile.is_zipfile(file):
        check_parts(file)
    file.seek(0)
    try:
        return check_state(state_in(unpickled(file)), os.fstat(file.fileno()).st_size)
    except ModelError as error:
        raise ModelError(f"{error}; save weights with torch.save(network.state_dict(), FILE)") from None


def check_parts(file: BinaryIO) -> zipfile.ZipFile:
    """The zip file, whose parts together are no larger than it is; raises ModelError for one that would unfold."""
    size = file.seek(0, io.SEEK_END)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ModelError(f"is a broken zip file: {one_line(error)}") from None
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        raise ModelError(
            "is TorchScript, whose code can write files and cannot be traced; "
            "export the network with tilepipe's save_exported or torch.export.save"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise ModelError("holds compressed or encrypted parts, which torch does not write")
    if sum(entry.file_size for entry in entries) > size:
        raise ModelError(f"claims parts of more than its own {size} bytes")
    if len(set(names)) != len(names):
        raise ModelError("holds the same part twice")
    return archive


def unpickled(file: BinaryIO) -> Any:
    """What torch's restricted reader makes of a pickle: tensors and plain values, nothing that could run.

    Raises ModelError, which says what was met, where the pickle would call anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch speaks of old pickles in several lines
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted reader raises whatever the pickle leads it to
        raise ModelError(f"is no pickle of tensors alone, and nothing else is loaded: {_first(error)}") from None


def _first(error: Exception) -> str:
    """The sentence that says what was met; torch puts advice to load it nevertheless before and behind."""
    before, marked, behind = str(error).partition("WeightsUnpickler error:")
    lines = [line.strip() for line in (behind if marked else before).splitlines() if line.strip()]
    advised = len(lines) > 1 and lines[0].startswith("Weights only load failed")
    met = lines[1] if advised else "".join(lines[:1])
    return met.split(". ")[0][:160] or type(error).__name__


def state_in(told: Any) -> dict[str, Tensor]:
    """The state dictionary in what a training program saved; raises ModelError where there is none."""
    for key in NESTS:
        if isinstance(told, Mapping) and isinstance(told.get(key), Mapping):
            return state_in(told[key])
    if isinstance(told, Mapping):
        state = {str(name): value for name, value in told.items() if isinstance(value, Tensor)}
        if state:
            return state
    raise ModelError(f"holds {type(told).__name__} without tensors; legal: a state dictionary")


def check_state(state: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The state; raises ModelError for a tensor that is not plain, or told to be larger than its file of `size` bytes.

    A few bytes can stand for any number of equal values, which would fill the memory once they are looked at.
    """
    for name, each in state.items():
        if each.layout != torch.strided or each.is_quantized or each.device.type != "cpu":
            raise ModelError(f"holds tensor {name}, which is sparse, quantised or without values; save it as plain")
        if each.numel() * each.element_size() > size:
            raise ModelError(f"holds tensor {name}, told to be {list(each.shape)} in a file of {size} bytes")
    return state


def put_weights(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Nothing; puts tensors into a network, a prefix common to all names taken away where that makes them match.

    Raises ModelError that names tensors which are missing, unexpected, of another shape, or not finite.
    """
    wanted = {name: each for name, each in network.state_dict().items() if not name.endswith(COUNTERS)}
    found = _renamed({name: each for name, each in state.items() if not name.endswith(COUNTERS)}, frozenset(wanted))
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unexpected:
        parts = [f"lacks {_listed(missing)}"] * bool(missing) + [f"has {_listed(unexpected)} too many"] * bool(
            unexpected
        )
        raise ModelError(f"{source}: does not fit the network: it {' and '.join(parts)}")
    for name, each in found.items():
        if each.shape != wanted[name].shape:
            raise ModelError(
                f"{source}: tensor {name} has shape {list(each.shape)}, the network needs {list(wanted[name].shape)}"
            )
        if each.is_floating_point() and not bool(torch.isfinite(each).all()):
            raise ModelError(f"{source}: tensor {name} holds values that are not finite")
        if each.is_floating_point() != wanted[name].is_floating_point() or each.is_complex():
            raise ModelError(f"{source}: tensor {name} has type {each.dtype}, the network needs {wanted[name].dtype}")
    network.load_state_dict({**network.state_dict(), **found})


def _renamed(state: dict[str, Tensor], wanted: frozenset[str]) -> dict[str, Tensor]:
    """The tensors under the network's names: as they are, without prefixes, or with one more."""
    current = state
    for _ in range(3):
        if current.keys() == wanted:
            return current
        prefix = next((each for each in PREFIXES if all(name.startswith(each) for name in current)), None)
        if prefix is None:
            break
        current = {name.removeprefix(prefix): each for name, each in current.items()}
    if current.keys() == wanted:
        return current
    for prefix in PREFIXES:
        added = {prefix + name: each for name, each in state.items()}
        if added.keys() == wanted:
            return added
    return state


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"tensor{'s' * (len(names) > 1)} {', '.join(names[:_SHOWN])}{more}"
