"""From an exception to one line on stderr, or one JSON object, and an exit code: nothing else reaches the user."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import traceback
from dataclasses import dataclass

import typer

from tilepipe.cli.progress import log_event
from tilepipe.errors import TilepipeError

# typer carries its own click since 0.26 and used the package before: its error types are found through typer.
ClickUsageError: type[Exception] = typer.BadParameter.__bases__[0]
ClickError: type[Exception] = ClickUsageError.__bases__[0]

FAILED, USAGE, BAD_INPUT, CTRL_C = 1, 2, 3, 130

_MAY_PASS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}


@dataclass(slots=True)
class Manner:
    """How the user wants to hear of things."""

    verbose: bool = False
    json: bool = False
    log_json: bool = False
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """What is said of an exception, and what the process exits with."""

    message: str
    exit_code: int
    known: bool = True
    """Whether the exception is one that tilepipe foresaw."""


def explain(error: BaseException) -> Failure:
    """The one line and the exit code for an exception."""
    if isinstance(error, TilepipeError):
        return Failure(one_line(str(error)), error.exit_code)
    if isinstance(error, ClickError):
        return Failure(_click_message(error), getattr(error, "exit_code", USAGE))
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return Failure("interrupted; finished blocks are kept, and the same command resumes", CTRL_C)
    if isinstance(error, MemoryError):
        return Failure("out of memory; lower --memory, --tile or --workers", FAILED)
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return Failure(f"{error.strerror}{place}", FAILED if error.errno in _MAY_PASS else BAD_INPUT)
    return Failure(f"{type(error).__name__}: {one_line(str(error))}", FAILED, known=False)


def report(error: BaseException, manner: Manner) -> int:
    """The exit code, after the exception was told in the manner asked for."""
    if isinstance(error, BrokenPipeError):
        _hush()
        return FAILED
    failure = explain(error)
    hint = "" if failure.known or manner.verbose else " (run with -v for the traceback)"
    if manner.json:
        print(json.dumps({"error": failure.message, "exit_code": failure.exit_code}))
    if manner.log_json:
        log_event("error", "error", message=failure.message, exit_code=failure.exit_code)
    elif not manner.json:
        print(f"tilepipe: {failure.message}{hint}", file=sys.stderr)
    if manner.verbose and not isinstance(error, ClickError):
        traceback.print_exception(error)
    return failure.exit_code


def one_line(text: str) -> str:
    """The text with line breaks and runs of blanks made one blank."""
    return " ".join(text.split())


def _click_message(error: BaseException) -> str:
    """What click says of a usage error, and where to read what is legal."""
    say = getattr(error, "format_message", None)
    message = one_line(say() if say else str(error)).rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path} --help" if context is not None else message


def _hush() -> None:
    """Let nothing more be written to a closed stdout, not even as the interpreter ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
