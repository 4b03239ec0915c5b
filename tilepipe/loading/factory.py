"""Networks that a user's own Python makes: `package.module:factory` and `path/file.py:factory`.

Naming a factory is an explicit choice to run its code, and the only one: no file is imported for its name alone.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tilepipe.checkpoint import one_line
from tilepipe.errors import ModelError

SYNTAX = "package.module:factory or path/file.py:factory"
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True, slots=True)
class Factory:
    """A function, or an nn.Module class, that makes a network from keyword arguments."""

    place: str
    """A module's dotted name, or the absolute path of a Python file."""
    function: str

    @classmethod
    def parse(cls, text: str) -> Factory | None:
        """The factory that `text` names; None where it names none. Files become absolute paths; nothing is run."""
        place, colon, function = text.rpartition(":")
        if not colon or not _MODULE.fullmatch(function) or place.endswith(".toml"):
            return None
        if place.endswith(".py"):
            return cls(str(Path(place).absolute()), function)
        return cls(place, function) if _MODULE.fullmatch(place) else None

    @property
    def is_file(self) -> bool:
        """Whether it lies in a Python file rather than an importable module."""
        return self.place.endswith(".py")

    def __str__(self) -> str:
        return f"{self.place}:{self.function}"

    def make(self, arguments: Mapping[str, Any]) -> nn.Module:
        """The network that the factory returns; runs the user's code.

        Random numbers start from the same seed each time, so that all workers make the same network. Raises
        ModelError, in one line that names the file and line, for whatever the code raises or returns instead.
        """
        with self._found_beside(), torch.random.fork_rng(devices=[]), _told_where(str(self)):
            torch.manual_seed(0)
            made = self._function(self._module())(**arguments)
        if not isinstance(made, nn.Module):
            raise ModelError(f"{self} returned {type(made).__name__}; legal: a torch.nn.Module")
        return made

    def code(self) -> bytes:
        """The bytes of the file that defines the factory, which tell one version of it from another."""
        path = self.place if self.is_file else getattr(sys.modules.get(self.place), "__file__", None)
        try:
            return Path(path).read_bytes() if path else b""
        except OSError:
            return b""

    def _module(self) -> ModuleType:
        if not self.is_file:
            return importlib.import_module(self.place)
        if not Path(self.place).is_file():
            raise ModelError(f"{self.place}: no such Python file")
        name = "tilepipe_factory_" + hashlib.sha256(self.place.encode()).hexdigest()[:12]
        spec = importlib.util.spec_from_file_location(name, self.place)
        if spec is None or spec.loader is None:
            raise ModelError(f"{self.place}: is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    def _function(self, module: ModuleType) -> Any:
        found: Any = module
        for part in self.function.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            what = "is not callable" if found is not None else "is not there"
            raise ModelError(f"{self}: {self.function} {what}; name a function or class that makes the network")
        return found

    @contextmanager
    def _found_beside(self) -> Iterator[None]:
        """Lets a file import what lies beside it, as when Python runs it."""
        folder = str(Path(self.place).parent) if self.is_file else None
        if folder is not None:
            sys.path.insert(0, folder)
        try:
            yield
        finally:
            if folder in sys.path:
                sys.path.remove(str(folder))


@contextmanager
def _told_where(factory: str) -> Iterator[None]:
    """Turns what user code raises into one line with its file and line."""
    try:
        yield
    except ModelError:
        raise
    except SyntaxError as error:
        raise ModelError(f"{factory}: {error.filename}:{error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if _is_users(frame.filename)]
        where = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
        raise ModelError(f"{factory}: {where}{type(error).__name__}: {one_line(error)}") from error


def _is_users(filename: str) -> bool:
    return filename != __file__ and not filename.startswith("<") and "importlib" not in Path(filename).parts
