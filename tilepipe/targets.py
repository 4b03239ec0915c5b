"""Files that a command writes: which may be written, and how one appears when it is whole."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from tilepipe.errors import RunError, UsageError


def check_target(path: str, endings: tuple[str, ...], overwrite: bool) -> str:
    """The ending of a path that may be written to; UsageError where it has another, is taken, or has no folder."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in endings:
        raise UsageError(f"{path} would be written; give a name that ends in {' or '.join(endings)}")
    if os.path.isdir(path) or (os.path.exists(path) and not overwrite):
        raise UsageError(f"{path} exists; choose another path or use --overwrite")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UsageError(f"{path} would lie in a folder that does not exist; make it, or choose another path")
    return ending


def write_whole(path: str, data: bytes) -> None:
    """Replace the file at `path`, or leave it as it is; RunError where it cannot be written."""
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex}{target.suffix}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; free some space or choose another path") from error
    finally:
        temporary.unlink(missing_ok=True)
