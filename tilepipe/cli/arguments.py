"""From a dataclass of annotated fields to a command's options, and from where their values may come.

A command that takes a parameter of such a dataclass takes all its fields as options:

    @spread
    def segment(paths: Paths, job: JobOptions, feedback: Feedback) -> None: ...

A value comes from the command line, else from the environment (TILEPIPE_<OPTION>), else from the file that
`--config` names, else from the one that `--tuned` names, else from the default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import wraps
from typing import Any, get_type_hints

import typer

from tilepipe.errors import UsageError

PREFIX = "TILEPIPE_"
FILES = ("config", "tuned")
"""The options that name files of options, which no such file may hold."""
ORIGINS = ("config", "manifest", "tuned")
"""What sets defaults, whichever is read first: --config counts before a batch's manifest, and that before --tuned."""


def option(
    *names: str,
    help: str,  # noqa: A002
    panel: str,
    metavar: str | None = None,
    variable: str | None = None,
    **more: Any,
) -> Any:
    """A typer option that also listens to the environment: --device-memory to TILEPIPE_DEVICE_MEMORY.

    `variable` stands for that name where another command has an option of the same name and another meaning.
    """
    first = names[0].split("/")[0].lstrip("-")
    variable = PREFIX + (variable or first.upper().replace("-", "_"))
    given = {
        "help": help,
        "metavar": metavar,
        "envvar": variable,
        "show_envvar": False,
        "rich_help_panel": panel,
        # "[default: no-overwrite]" says nothing that the flag does not.
        "show_default": "/" not in names[0],
    }
    make: Callable[..., Any] = typer.Option
    return make(*names, **given, **more)


def spread(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with each parameter of a dataclass type replaced by the dataclass's fields."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters = list(_parameters(function, hints, groups))

    @wraps(function)
    def command(**values: Any) -> Any:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        return function(**values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameters(
    function: Callable[..., Any], hints: dict[str, Any], groups: dict[str, Any]
) -> Iterator[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in groups:
            yield parameter.replace(annotation=hints[name], kind=keyword)
            continue
        types = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            yield inspect.Parameter(field.name, keyword, default=default, annotation=types[field.name])


def read_config(context: typer.Context, path: str | None) -> str | None:
    """`path`, after its values became the context's defaults; the callback of an eager `--config`."""
    if path is not None and not context.resilient_parsing:
        add_defaults(context, "config", _entries(path, "--config", context))
    return path


def read_tuned(context: typer.Context, path: str | None) -> str | None:
    """As `read_config`, for `--tuned`."""
    if path is not None and not context.resilient_parsing:
        add_defaults(context, "tuned", _entries(path, "--tuned", context))
    return path


def add_defaults(context: typer.Context, origin: str, values: Mapping[str, Any]) -> None:
    """Makes values of one of ORIGINS the context's defaults, as far as no origin that counts first has them."""
    found = context.meta.setdefault("tilepipe.defaults", {})
    found[origin] = values
    context.default_map = {name: value for each in reversed(ORIGINS) for name, value in found.get(each, {}).items()}


def _legal_keys(context: typer.Context) -> dict[str, bool]:
    """The options of the command and of `segment`, and which may be repeated: one file serves several commands."""
    everything = getattr(context.find_root().command, "commands", {})
    # What the command itself says of an option comes last, and counts.
    commands = [everything[name] for name in ("segment",) if name in everything] + [context.command]
    return {
        str(parameter.name): bool(getattr(parameter, "multiple", False))
        for command in commands
        for parameter in command.params
        if parameter.param_type_name == "option" and parameter.name not in (None, *FILES, "help")
    }


def _entries(path: str, flag: str, context: typer.Context) -> dict[str, Any]:
    """The value of each parameter that a TOML file names, as a command line would give it."""
    return dict(parsed(path, read_table(path, flag), _legal_keys(context)))


def typed(context: typer.Context, group: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass of options with other values, given as a command line would give them, for those that it has."""
    parameters: dict[str | None, Any] = {parameter.name: parameter for parameter in context.command.params}
    own = [field.name for field in fields(group) if field.name in values]
    return replace(group, **{name: parameters[name].process_value(context, values[name]) for name in own})


def read_table(path: str, flag: str) -> dict[str, Any]:
    """What a TOML file holds; UsageError where it is none or cannot be read."""
    import tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not a TOML file: {error}") from error
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be read: {error.strerror}") from error


def parsed(path: str, table: Mapping[str, Any], legal: Mapping[str, bool]) -> Iterator[tuple[str, Any]]:
    """The name and value of each parameter that the table names, of those that are legal (and may be repeated)."""
    for key, value in table.items():
        name = key.replace("-", "_")
        inverse = name.removeprefix("no_") if name.startswith("no_") else f"no_{name}"
        if legal.get(name):
            each = value if isinstance(value, list) else [value]
            yield name, [_as_text(path, key, one) for one in each]
        elif name in legal:
            yield name, _as_text(path, key, value)
        elif inverse in legal and isinstance(value, bool):
            yield inverse, not value
        else:
            raise UsageError(_unknown(path, key, legal))


def _unknown(path: str, key: str, legal: Iterable[str]) -> str:
    import difflib

    keys = sorted(name.replace("_", "-") for name in legal)
    near = difflib.get_close_matches(key.replace("_", "-"), keys, n=1, cutoff=0.5)
    guess = f"; the nearest is {near[0]!r}" if near else ""
    return f"unknown key {key!r} in {path}{guess}; legal are {', '.join(keys)}"


def _as_text(path: str, key: str, value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, (int, float, str)) for item in value):
        return ",".join(str(item) for item in value)
    raise UsageError(f"{key} in {path} is a {type(value).__name__}; write text, a number, true, false or a list")
