"""Models as people and programs read them: cards, and what an architecture's documentation says."""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from dataclasses import asdict
from typing import Any

from tilepipe.cli import show
from tilepipe.resolution import spelled

WIDTH = 96
"""Characters of a line of prose."""
PRESET = (("preset", "about"), ("family", "family"), ("source", "source"))
"""What an architecture's lines are called, and where `about_preset` has them."""


def card_entries(card: dict[str, Any] | None, verbose: bool) -> list[tuple[str, str]]:
    """A model card as lines; all of it where `verbose`."""
    if card is None:
        return []
    rows = [
        ("network", f"{card['architecture']} {_arguments(card['arguments'])}".strip()),
        ("classes", ", ".join(item["name"] for item in card["classes"]) or "none (regression)"),
        ("bands", ", ".join(card["bands"])),
        ("pixels", spelled(card["resolution"])),
        ("licence", card["licence"]),
    ]
    if verbose:
        rows += [(name, ", ".join(f"{value:g}" for value in card[name])) for name in ("mean", "std")]
        rows += [("nodata", card["nodata"])]
    made = [(str(name), _short(value)) for name, value in card["provenance"].items()]
    if made:
        rows.append(("made by", show.entries(made)))
    return rows


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def bundled() -> list[dict[str, Any]]:
    """The bundled models as JSON values: name, bytes, and what their cards say."""
    from importlib import resources

    from tilepipe.checkpoint import bundled_models, load_model

    found = []
    for name in bundled_models():
        card = load_model(name).card
        size = len((resources.files("tilepipe") / "weights" / f"{name}.safetensors").read_bytes())
        found.append({"name": name, "bytes": size, **asdict(card)})
    return found


def architectures() -> list[dict[str, str]]:
    """Each architecture's name, and the first line of what its function says."""
    from tilepipe.models import MODELS

    return [
        {"name": name, "about": (factory.__doc__ or "").strip().partition("\n")[0]}
        for name, factory in sorted(MODELS.items())
    ]


def about_preset(name: str) -> dict[str, str] | None:
    """What an architecture is, from its documentation: the network itself, its family, its source."""
    from tilepipe.models import MODELS

    factory = MODELS.get(name)
    if factory is None:
        return None
    paragraphs = [" ".join(text.split()) for text in (sys.modules[factory.__module__].__doc__ or "").split("\n\n")]
    cited = (re.match(r'.*?"[^"]+" \([^)]*\)', text) for text in paragraphs)  # authors, "title" (where)
    source = next((found[0] for found in cited if found), "")
    about = inspect.getdoc(factory) or ""
    return {"about": " ".join(about.split("\n\n")[0].split()), "family": paragraphs[0], "source": source}


def preset_entries(preset: dict[str, str] | None) -> list[tuple[str, str]]:
    """An architecture's documentation as lines."""
    told = preset or {}
    return [(name, textwrap.fill(told[key], WIDTH)) for name, key in PRESET if told.get(key)]


def models_text(found: dict[str, Any]) -> str:
    """What `models` lists, for people."""
    blocks = []
    for item in found["bundled"]:
        rows = card_entries(item, verbose=False)
        blocks.append(f"{item['name']} ({show.size(item['bytes'])})\n" + _indent(show.entries(rows)))
    if not blocks:
        blocks.append("no model is bundled")
    names = show.entries((item["name"], item["about"]) for item in found["architectures"])
    return "\n\n".join([*blocks, "architectures, for model files and `tilepipe inspect`:\n" + _indent(names)])


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
