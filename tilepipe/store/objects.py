# ruff: noqa: D102 - the methods are documented once, on Files
"""A store's files on an object store (S3 and whatever else fsspec knows): one PUT each, nothing to flush."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import fsspec

from tilepipe.errors import RunError, StoreError, TilepipeError
from tilepipe.store.durable import Files, LocalFiles, state_folder, temporary_folder


def files_at(path: str | os.PathLike[str], kind: str = "labels") -> Files:
    """The files below a folder, or below a URL that fsspec knows, such as s3://bucket/out.zarr.

    `kind` is the store's (`StoreSpec.kind`): it says where records, lease and temporary files are.
    """
    text = os.fspath(path)
    if text.startswith("file://"):
        return LocalFiles(text.removeprefix("file://"), kind)
    return ObjectFiles(text, kind) if is_url(text) else LocalFiles(text, kind)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an fsspec URL.

    >>> is_url("s3://bucket/out.zarr"), is_url("simplecache::s3://bucket/o"), is_url("C:/out.zarr"), is_url("out.zarr")
    (True, True, False, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)", os.fspath(path)) is not None


_EXTRAS = {"s3": "tilepipe[s3]", "s3a": "tilepipe[s3]", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
"""What to install for a URL's scheme."""
_SETTINGS = {errno.EINVAL, errno.EPERM, errno.ENOSYS, getattr(errno, "EREMCHG", errno.ENOENT)}
"""Refusals that stay as long as settings do: a wrong region or endpoint, an unknown request."""


class ObjectFiles:
    """Objects below an fsspec URL, each written by one PUT.

    Exclusive creation is the driver's conditional PUT (`mode="create"`: S3, memory ...). Drivers and servers without
    one look first and then write: of several that do so within a round trip the last one has the file.
    """

    def __init__(self, root: str, kind: str = "labels") -> None:
        self.root = self.location = root
        self.state = state_folder(kind)
        self._kind = kind
        self._opened: tuple[Any, str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A driver's connections stay in the process that made them.
        return ObjectFiles, (self.root, self._kind)

    @property
    def _fs(self) -> Any:
        return self._driver()[0]

    def _path(self, key: str) -> str:
        base = self._driver()[1].rstrip("/")
        return f"{base}/{key}" if key else base

    def _driver(self) -> tuple[Any, str]:
        if self._opened is None:
            try:
                self._opened = fsspec.core.url_to_fs(self.root, use_listings_cache=False)
            except ImportError as error:
                extra = _EXTRAS.get(self.root.partition(":")[0].lower())
                remedy = "install the driver" if extra is None else f"pip install '{extra}'"
                raise StoreError(f"{self.root}: {_reason(error)}; {remedy}, or write to a folder") from error
            except ValueError as error:
                raise StoreError(f"{self.root}: {_reason(error)}; use s3://bucket/out.zarr, or a folder") from error
        return self._opened

    @contextlib.contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except TilepipeError:
            raise
        except Exception as error:  # each driver has error types of its own
            raise _explain(error, f"{self.root}/{key}") from error

    def read(self, key: str) -> bytes | None:
        with self._explained(key):
            try:
                return bytes(self._fs.cat_file(self._path(key)))
            except (FileNotFoundError, IsADirectoryError):
                return None

    def read_folder(self, folder: str) -> dict[str, bytes]:
        names = self.names(folder)
        if not names:
            return {}
        read = {}
        with self._explained(folder):
            # One call, so that drivers fetch many at once, and by range, which takes S3 one request each.
            found = self._fs.cat_ranges([f"{self._path(folder)}/{name}" for name in names], 0, None, on_error="return")
            for name, data in zip(names, found, strict=True):
                if isinstance(data, bytes):
                    read[name] = data
                elif not isinstance(data, (FileNotFoundError, IsADirectoryError)):
                    raise data
        return read

    def names(self, folder: str) -> list[str]:
        with self._explained(folder):
            try:
                entries = self._fs.ls(self._path(folder), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted({str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries})

    def checksum(self, key: str) -> str | None:
        with self._explained(key):
            try:
                with self._fs.open(self._path(key), "rb") as file:
                    digest = hashlib.sha256()
                    while data := file.read(1 << 22):
                        digest.update(data)
            except FileNotFoundError:
                return None
        return digest.hexdigest()

    def write(self, key: str, data: bytes) -> None:
        with self._explained(key):
            self._fs.pipe_file(self._path(key), data)

    def settle(self, keys: Iterable[str]) -> None:
        """Nothing: a PUT lasts when it returns."""

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with self._explained(key):
            if self._fs.exists(path):
                return False
            try:
                self._fs.pipe_file(path, data, mode="create")
            except (NotImplementedError, TypeError, ValueError):
                self._fs.pipe_file(path, data)
            except OSError as error:
                if error.errno == errno.ENOSYS:
                    self._fs.pipe_file(path, data)
                elif not isinstance(error, FileExistsError) and self.read(key) is None:
                    raise
        # What is there tells more than the answer: of a PUT that was sent again, or whose condition was ignored.
        return self.read(key) == data

    def delete(self, key: str) -> None:
        with self._explained(key), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(key), recursive=True)

    def touch(self, key: str, data: bytes) -> None:
        self.write(key, data)

    def age(self, key: str) -> float | None:
        try:
            then = self._fs.modified(self._path(key))
        except (OSError, NotImplementedError):
            return None
        probe = f"{temporary_folder(self)}/{uuid.uuid4().hex}"
        try:
            self.write(probe, b"-")
            now = self._fs.modified(self._path(probe))
        except TilepipeError:  # readers need not be allowed to write
            now = datetime.now(UTC)
        finally:
            with contextlib.suppress(TilepipeError):
                self.delete(probe)
        return float((now - then).total_seconds())

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        yield

    def clean(self) -> int:
        folder = temporary_folder(self)
        left = self.names(folder)
        for name in left:
            self.delete(f"{folder}/{name}")
        return len(left)


def _reason(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _explain(error: Exception, place: str) -> TilepipeError:
    """The error to raise for a driver's: RunError where a retry may help, else StoreError."""
    name, reason = type(error).__name__, _reason(error)
    if isinstance(error, FileNotFoundError):
        return StoreError(f"{place}: {reason}; make the bucket, or correct the URL")
    if isinstance(error, PermissionError):
        return StoreError(f"{place}: {reason}; the credentials must allow it")
    if "Credential" in name or "Credential" in reason or "ProfileNotFound" in name:
        return StoreError(f"{place}: {reason}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    if "Region" in name or (isinstance(error, OSError) and error.errno in _SETTINGS):
        return StoreError(f"{place}: {reason}; check AWS_DEFAULT_REGION and AWS_ENDPOINT_URL")
    return RunError(f"{place}: {name}: {reason}; run the same command again to resume")
