"""The command group: every way out of a command is `Group.main`, which turns errors into exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from tilepipe.cli.failures import Manner, report
from tilepipe.errors import StoppedError


class Group(TyperGroup):
    """A typer group whose help is plain, and so prints fast, and whose errors are one line and an exit code."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**{**attributes, "rich_markup_mode": None})

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command line and exits with its code; returns or raises where not in `standalone_mode`."""
        words = sys.argv[1:] if args is None else list(args)
        manner = _manner_of(words)
        extra = {"obj": manner, **extra}
        run = super().main
        if not standalone_mode:
            return run(words, prog_name, complete_var, False, windows_expand_args, **extra)
        with warnings.catch_warnings():
            if not manner.verbose:
                # Libraries' remarks to programmers; what users should hear comes as notes.
                warnings.simplefilter("ignore")
            try:
                code = run(words, prog_name, complete_var, False, windows_expand_args, **extra)
                sys.stdout.flush()
            except (Exception, KeyboardInterrupt) as error:
                code = report(error, manner)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """What the command returns; StoppedError where Ctrl-C ended it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise StoppedError("interrupted; finished blocks are kept, and the same command resumes", 130) from error


def _manner_of(words: Sequence[str]) -> Manner:
    """How to tell of errors that come before the options are understood."""
    before = list(words[: words.index("--")] if "--" in words else words)

    def asked(name: str, *flags: str) -> bool:
        return any(flag in before for flag in flags) or os.environ.get(f"TILEPIPE_{name}") in ("1", "true")

    return Manner(
        verbose=asked("VERBOSE", "-v", "--verbose"),
        json=asked("JSON", "--json"),
        log_json=asked("LOG_JSON", "--log-json"),
        quiet=asked("QUIET", "-q", "--quiet"),
    )


def remember(context: typer.Context, parameter: typer.CallbackParam, value: bool) -> bool:
    """`value`, noted for the telling of errors; the callback of the options that a Manner is made of."""
    manner = context.find_root().obj
    if isinstance(manner, Manner) and parameter.name is not None:
        setattr(manner, parameter.name, value)
    return value
