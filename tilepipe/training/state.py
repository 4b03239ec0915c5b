"""A run's folder: settings, the state from which it resumes, its history, and the best model."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tilepipe.checkpoint import one_line
from tilepipe.errors import InputError, RunError, UsageError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

SETTINGS, STATISTICS, STATE, BEST = "settings.json", "statistics.json", "state.pt", "model.safetensors"

PATIENCE = 15.0
"""Seconds to wait for another process's hold: a killed run's reading processes outlive it by some."""


@dataclass(slots=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimiser steps that are done."""
    best: float = -1.0
    """The mean IoU of the network that is saved; negative where it has none."""
    best_step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    """A row each time the network was, or could have been, validated."""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; `Progress(**values)` gives it back."""
        return {"step": self.step, "best": self.best, "best_step": self.best_step, "history": self.history}


class RunFolder:
    """The files of one run. Each is there whole or not at all, at whatever instant the process is killed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def model(self) -> Path:
        """The model that is saved, or, for a network of a user's own, its weights."""
        return self.path / BEST

    @contextlib.contextmanager
    def held(self, overwrite: bool) -> Iterator[None]:
        """The folder, made where it is missing, for this process alone; the hold ends with the process at the latest.

        Raises UsageError where it holds something other than a run, RunError where another process has it.
        """
        if not overwrite and self._is_something_else():
            raise UsageError(f"{self.path} is no folder of a training run; name a new one")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDONLY) if fcntl is not None else None
        except OSError as error:
            raise UsageError(f"{self.path} cannot be used ({one_line(error)}); name a folder to write to") from None
        try:
            if handle is not None and not _locked(handle):
                raise RunError(f"another process trains in {self.path}; wait for it, or name another folder")
            yield
        finally:
            if handle is not None:
                os.close(handle)

    @property
    def has_state(self) -> bool:
        """Whether a run can go on from here."""
        return (self.path / STATE).exists()

    def begin(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Makes the folder one of a run with these settings; UsageError where it holds the state of another one."""
        if overwrite:
            for name in (SETTINGS, STATISTICS, STATE, BEST):
                (self.path / name).unlink(missing_ok=True)
        stored, plain = self._stored_settings(), json.loads(json.dumps(settings))
        if stored is not None and self.has_state:
            self._require_same(stored, plain)
        elif stored != plain:
            (self.path / STATISTICS).unlink(missing_ok=True)
            text = json.dumps(plain, indent=2, sort_keys=True)
            self.write(SETTINGS, lambda file: _write(file, text.encode()))

    def _is_something_else(self) -> bool:
        if not self.path.exists() or (self.path / SETTINGS).exists():
            return False
        return not self.path.is_dir() or any(self.path.iterdir())

    def _require_same(self, stored: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
        differing = sorted(name for name in stored.keys() | plain.keys() if stored.get(name) != plain.get(name))
        if differing:
            told = ", ".join(f"{name} was {stored.get(name)!r}, is {plain.get(name)!r}" for name in differing[:2])
            raise UsageError(
                f"{self.path} holds a run with other settings ({_shortened(told)}); repeat those to continue it, "
                "name another folder, or start anew with --overwrite"
            )

    def save(self, progress: Progress, tensors: Mapping[str, Any]) -> None:
        """Keeps the state, in place of the last one."""
        state = {"progress": json.dumps(progress.to_json()), **tensors}
        self.write(STATE, lambda file: torch.save(state, file))

    def load(self, device: torch.device) -> tuple[Progress, dict[str, Any]]:
        """(progress, tensors) that were kept last; nothing in the file is executed."""
        path = self.path / STATE
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            return Progress(**json.loads(state.pop("progress"))), state
        except Exception as error:
            raise InputError(
                f"{path} cannot be resumed from ({one_line(error)}); start anew with --overwrite"
            ) from None

    def write(self, name: str, fill: Callable[[BinaryIO], None]) -> None:
        """A file of that name with what `fill` puts into it, durable before it takes the name."""
        target, temporary = self.path / name, self.path / f".{name}.tmp"
        try:
            with temporary.open("wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise RunError(
                f"{target} cannot be written: {one_line(error)}; make room and run the command again"
            ) from None

    def _stored_settings(self) -> dict[str, Any] | None:
        path = self.path / SETTINGS
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {one_line(error)}; start anew with --overwrite") from None
        return stored if isinstance(stored, dict) else {}


def _locked(handle: int) -> bool:
    """Whether the lock of a folder could be had within PATIENCE."""
    last = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= last:
                return False
            time.sleep(0.2)
        except OSError:  # file systems without locks
            return True
        else:
            return True


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _shortened(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
