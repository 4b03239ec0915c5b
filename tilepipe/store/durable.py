# ruff: noqa: D102 - the methods are documented once, on Files
"""Small and large files that are there whole or not at all, in a folder or under an object store's URL.

In a folder a file is written to a temporary name, flushed to the device, renamed, and its folder flushed: a
process killed at any instant, or a machine that loses power, leaves the old file or the new one. Temporary
names live in one folder, so that what killed jobs left behind is found without searching. On an object store
one PUT does all of this.

Keys are paths below the root, with "/" between the parts.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from tilepipe.errors import RunError, StoreError, TilepipeError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

STATE = ".tilepipe"
"""The folder of a store's records, lease and temporary files, in its first array's: xarray warns of one beside."""

_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT, errno.ESTALE}


class Files(Protocol):
    """The files of one store. Methods raise StoreError or RunError, naming the file, in one line."""

    root: str
    """As messages name it."""
    location: str
    """As zarr opens it, wherever the process stands."""
    state: str
    """The folder of records, lease and temporary files: `state_folder` of the store's kind."""

    def read(self, key: str) -> bytes | None:
        """The file's bytes; None where there is no such file."""

    def read_folder(self, folder: str) -> dict[str, bytes]:
        """Each file directly in `folder`, by its name."""

    def names(self, folder: str) -> list[str]:
        """The names of files and folders directly in `folder`, sorted; none where it does not exist."""

    def checksum(self, key: str) -> str | None:
        """The SHA-256 of the file's bytes, in hexadecimal, in bounded memory; None where there is no such file."""

    def write(self, key: str, data: bytes) -> None:
        """Replace the file; its folder entry lasts once `settle` has returned."""

    def settle(self, keys: Iterable[str]) -> None:
        """Make earlier writes and deletions of `keys` outlast a loss of power; folders need not be there."""

    def create(self, key: str, data: bytes) -> bool:
        """Whether the file was made: False where there is one already."""

    def delete(self, key: str) -> None:
        """Delete the file or the folder with all in it; nothing where there is none."""

    def touch(self, key: str, data: bytes) -> None:
        """Renew the modification time of a file that holds `data`."""

    def age(self, key: str) -> float | None:
        """Seconds since the file was modified, by the file system's own clock; None where it cannot be told."""

    def locked(self, key: str) -> contextlib.AbstractContextManager[None]:
        """A lock among processes, freed when its holder dies; where there is none to be had, no lock."""

    def clean(self) -> int:
        """Delete temporary files; returns how many there were."""


def state_folder(kind: str) -> str:
    """Where a store whose first array is `kind` keeps its records, lease and temporary files."""
    return f"{kind}/{STATE}"


def temporary_folder(files: Files) -> str:
    """Where files lie until they are whole and get their names."""
    return f"{files.state}/tmp"


def explain(error: OSError, path: object) -> TilepipeError:
    """The error to raise for `error`: RunError where a retry may help (disk full), else StoreError."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"{path}: {reason}; free some space and run the same command again, finished blocks are kept")
    if error.errno in _PASSING:
        return RunError(f"{path}: {reason}; run the same command again to resume, finished blocks are kept")
    return StoreError(f"{path}: {reason}; the output must be a folder that can be written to")


@contextlib.contextmanager
def _explained(path: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explain(error, path) from error


class LocalFiles:
    """Files below a folder."""

    def __init__(self, root: str, kind: str = "labels") -> None:
        self.root = root
        self.state = state_folder(kind)
        # Where it lies must not change with the working directory, nor in a worker that starts elsewhere.
        self._root = Path(root).absolute()
        self.location = str(self._root)

    def _path(self, key: str) -> Path:
        return self._root / key if key else self._root

    def read(self, key: str) -> bytes | None:
        with _explained(self._path(key)):
            try:
                return self._path(key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read_folder(self, folder: str) -> dict[str, bytes]:
        found = {}
        for name in self.names(folder):
            data = self.read(f"{folder}/{name}")
            if data is not None:
                found[name] = data
        return found

    def names(self, folder: str) -> list[str]:
        with _explained(self._path(folder)):
            try:
                return sorted(os.listdir(self._path(folder)))
            except FileNotFoundError:
                return []

    def checksum(self, key: str) -> str | None:
        with _explained(self._path(key)):
            try:
                with self._path(key).open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, key: str, data: bytes) -> None:
        target = self._path(key)
        with _explained(target):
            temporary = self._temporary(data)
            try:
                self._folder(target.parent)
                os.replace(temporary, target)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise

    def settle(self, keys: Iterable[str]) -> None:
        # With the folders above: another thread may have made one of them and not have flushed its entry yet.
        parts = [key.split("/")[:-1] for key in keys]
        for folder in {"/".join(part[:depth]) for part in parts for depth in range(len(part) + 1)}:
            with _explained(self._path(folder)), contextlib.suppress(FileNotFoundError):
                _flush_folder(self._path(folder))

    def create(self, key: str, data: bytes) -> bool:
        target = self._path(key)
        with _explained(target):
            temporary = self._temporary(data)
            try:
                self._folder(target.parent)
                return _link(temporary, target, data)
            finally:
                temporary.unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        target = self._path(key)
        with _explained(target):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    target.unlink()

    def touch(self, key: str, data: bytes) -> None:
        with _explained(self._path(key)):
            os.utime(self._path(key))

    def age(self, key: str) -> float | None:
        # A file made now carries the clock of the file's server, which may not be this machine's.
        try:
            then = self._path(key).stat().st_mtime
        except OSError:
            return None
        try:
            probe = self._temporary(b"")
        except OSError:  # readers need not be allowed to write
            return time.time() - then
        try:
            return probe.stat().st_mtime - then
        finally:
            probe.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        path = self._path(key)
        with _explained(path):
            self._folder(path.parent)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            # File systems without locks (some of Lustre's mounts) still have the exclusive creation that follows.
            with contextlib.suppress(OSError):
                if fcntl is not None:
                    fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def clean(self) -> int:
        folder = temporary_folder(self)
        left = self.names(folder)
        for name in left:
            self.delete(f"{folder}/{name}")
        return len(left)

    def _temporary(self, data: bytes) -> Path:
        folder = self._root / temporary_folder(self)
        path = folder / uuid.uuid4().hex
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except FileNotFoundError:
            self._folder(folder)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(handle, left) :]
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path

    def _folder(self, folder: Path) -> None:
        """Make the folder and those above it, each entry flushed."""
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                path.mkdir()
            _flush_folder(path.parent)


def _link(temporary: Path, target: Path, data: bytes) -> bool:
    """Whether `target` could be made, whole at once where the file system has hard links."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        try:
            with target.open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
    return True


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems refuse to flush folders, whose entries they write through.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)
