"""Values that a command line tells as text and a TOML file as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tilepipe.errors import ModelError


def names_of(value: Any) -> tuple[str, ...] | int:
    """Names, or how many: "red,green", ["red", "green"], "2" or 2."""
    if isinstance(value, int):
        return value
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(value, str) and value.strip().isdigit():
        return int(value)
    if not isinstance(parts, Sequence) or not all(isinstance(each, str) and each.strip() for each in parts):
        raise ModelError(f"names {value!r} are not legal; give them with commas between, or how many")
    return tuple(each.strip() for each in parts)


def numbers_of(value: Any) -> tuple[float, ...]:
    """Numbers: "1,2.5", [1, 2.5] or a single one."""
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int | float) else value
    try:
        numbers = tuple(float(each) for each in parts)
    except (TypeError, ValueError):
        raise ModelError(f"numbers {value!r} are not legal; give them with commas between") from None
    return numbers


def colors_of(value: Any) -> tuple[tuple[int, int, int], ...]:
    """Colours: "#ff0000,#00ff00", or lists of three numbers."""
    try:
        parts = value.split(",") if isinstance(value, str) else list(value)
        colors = (
            tuple(bytes.fromhex(each.strip().removeprefix("#")) if isinstance(each, str) else each) for each in parts
        )
        return tuple((red, green, blue) for red, green, blue in colors)
    except (TypeError, ValueError):
        raise ModelError(f"colours {value!r} are not legal; give #rrggbb for each class") from None


def arguments_of(value: Any) -> dict[str, Any]:
    """Keyword arguments: a table, or texts "name=value"; the text "none" stands for None, which TOML lacks."""
    if isinstance(value, Mapping):
        return {str(key): None if each == "none" else each for key, each in value.items()}
    pairs = [value] if isinstance(value, str) else value
    if not isinstance(pairs, Sequence):
        raise ModelError(f"arguments {value!r} are not legal; give name=value for each")
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = str(pair).partition("=")
        if not equals or not key.strip().isidentifier():
            raise ModelError(f"argument {pair!r} is not legal; give name=value")
        found[key.strip()] = _plain(text.strip())
    return found


def _plain(text: str) -> Any:
    """A number, truth value or None as TOML and Python spell them; any other text as it is."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def resolution_of(value: Any) -> float | tuple[float, ...]:
    """One number, or several."""
    numbers = numbers_of(value)
    return numbers[0] if len(numbers) == 1 else numbers


def text_of(value: Any) -> str:
    """A text or path."""
    if not isinstance(value, str | Path):
        raise ModelError(f"{value!r} is not legal; give a text")
    return str(value)


PARSERS: Mapping[str, Any] = {
    "weights": text_of,
    "arguments": arguments_of,
    "classes": names_of,
    "colors": colors_of,
    "bands": names_of,
    "mean": numbers_of,
    "std": numbers_of,
    "resolution": resolution_of,
    "task": text_of,
}
