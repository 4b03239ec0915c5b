"""`inspect` and `models`: what a network asks of tiles, and which models there are."""

from __future__ import annotations

import inspect as inspection
import json
import os
import re
import sys
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilepipe.cli import show
from tilepipe.cli.arguments import spread
from tilepipe.cli.derivation import derivation_entries, derivation_table, derive_on_paper, small_size
from tilepipe.cli.options import Talk
from tilepipe.cli.words import network_entries
from tilepipe.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from tilepipe.checkpoint import ModelCard
    from tilepipe.geometry.network import AxisGeometry, Geometry

CORES = (1024, 2048, 4096)
DISPROVED = 3
WIDTH = 96
"""Characters of a line of prose."""
PRESET = (("preset", "about"), ("family", "family"), ("source", "source"))
"""What an architecture's lines are called, and where `about_preset` has them."""

Reference = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A bundled model, a model file, or an architecture's name, which gets random weights.",
    ),
]
Prove = Annotated[
    bool, typer.Option("--proof/--no-proof", help="Check what was derived on the real network, in float64.")
]


@spread
def inspect(model: Reference, talk: Talk, proof: Prove = True) -> None:
    """Show what a model asks of tiles.

    Its card, legal sizes and how they follow on paper, reach, halo, the cost of tiles, whether exact is possible or
    which layer forbids it; and the proof of all that on the real network. Exits with 3 where the proof fails. With -v
    also the arithmetic of each layer that changes the size, and every layer.
    """
    from tilepipe.trace import geometry_of

    network, card, source = load_network(model)
    geometry = geometry_of(network, bands_of(network, card))
    found = {
        "model": source,
        "card": None if card is None else asdict(card),
        "preset": about_preset(model) if card is None else None,
        **describe_network(network, geometry),
        "derivation": derive_on_paper(network, geometry),
    }
    if talk.verbose:
        found["layers"] = layers(network, geometry)
    if proof and geometry.exact:
        found["proof"] = prove_network(network, geometry)
    print(json.dumps(found) if talk.json else network_text(found, talk.verbose))
    if "proof" in found and not found["proof"]["passed"]:
        raise typer.Exit(DISPROVED)


@spread
def models(talk: Talk) -> None:
    """List bundled models and architectures."""
    found = {"bundled": bundled(), "architectures": architectures()}
    print(json.dumps(found) if talk.json else models_text(found))


def load_network(reference: str) -> tuple[nn.Module, ModelCard | None, str]:
    """(network, card, where it comes from): a model by name or file, else an architecture with random weights."""
    from tilepipe.checkpoint import bundled_models, load_model
    from tilepipe.models import MODELS, build

    if reference in MODELS and reference not in bundled_models() and not os.path.exists(reference):
        return build(reference).eval(), None, f"{reference}, random weights"
    if reference not in bundled_models() and not os.path.exists(reference):
        bundled = ", ".join(bundled_models()) or "none"
        legal = f"bundled are {bundled}, architectures are {', '.join(sorted(MODELS))}"
        raise ModelError(f"{reference} is no model file, bundled model or architecture; {legal}")
    model = load_model(reference)
    return model.network, model.card, model.source


def describe_network(network: nn.Module, geometry: Geometry) -> dict[str, Any]:
    """What was derived from a network, as JSON values."""
    from tilepipe.describe import describe_axis

    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "network": {"rows": describe_axis(geometry.rows), "cols": describe_axis(geometry.cols)},
        "channels": [geometry.channels_in, geometry.channels_out],
        "exact": geometry.exact,
        "obstacle": geometry.obstacle,
        "tiles": tile_costs(geometry) if geometry.exact else [],
    }


def layers(network: nn.Module, geometry: Geometry) -> list[dict[str, Any]]:
    """Each layer's name, operator, size, and which of its outputs an aligned core needs, as JSON values."""
    from tilepipe.trace import layer_table

    return [asdict(row) for row in layer_table(network, geometry, small_size(geometry))]


def bands_of(network: nn.Module, card: ModelCard | None) -> int:
    """How many bands a network takes: what its card says, else what its first layer does."""
    if card is not None:
        return len(card.bands)
    return next((int(p.shape[1]) for p in network.parameters() if p.ndim == 4), 3)


def tile_costs(geometry: Geometry) -> list[dict[str, Any]]:
    """For some cores: the tile that carries it, and the network's pixels per pixel of the core."""
    found = []
    for wanted in CORES:
        cores = [max(1, round(wanted / axis.alignment)) * axis.alignment for axis in geometry.axes]
        tiles = [_tile(axis, core) for axis, core in zip(geometry.axes, cores, strict=True)]
        cost = tiles[0] * tiles[1] / (cores[0] * cores[1])
        found.append({"core": cores, "tile": tiles, "cost": round(cost, 4)})
    return found


def _tile(axis: AxisGeometry, core: int) -> int:
    return axis.tile(core // axis.scale)


def prove_network(network: nn.Module, geometry: Geometry) -> dict[str, Any]:
    """What checking the geometry on the real network gave, as JSON values."""
    from tilepipe.proof import prove

    done = prove(network, geometry)
    return {"passed": done.ok, **asdict(done)}


def network_text(found: dict[str, Any], verbose: bool) -> str:
    """What `describe_network` says, for people."""
    rows = [("model", found["model"]), *card_entries(found["card"], verbose), *preset_entries(found["preset"])]
    bands, scores = found["channels"]
    rows.append(
        (
            "size",
            f"{found['parameters']:,} parameters, {show.count(bands, 'band')} to {show.count(scores, 'score')} a pixel",
        )
    )
    rows += network_entries(found["network"])
    rows += derivation_entries(found["derivation"])
    rows.append(("exact", "yes" if found["exact"] else f"no: {found['obstacle']}"))
    if "proof" in found:
        rows.append(("proof", proof_text(found["proof"], verbose)))
    lines = [show.entries(rows)]
    if found["tiles"]:
        costs = [(show.by(t["core"]), show.by(t["tile"]), f"{t['cost']:.2f}") for t in found["tiles"]]
        lines.append(show.table(("core", "tile", "cost"), costs, right=(2,)))
    if verbose and found["derivation"]["layers"]:
        lines.append(derivation_table(found["derivation"]["layers"]))
    if "layers" in found:
        lines.append(layer_text(found["layers"]))
    return "\n\n".join(lines)


def proof_text(proof: dict[str, Any], verbose: bool) -> str:
    """Whether the proof held; the comparisons that failed, or all where `verbose`."""
    checks = proof["checks"]
    failed = [check for check in checks if not check["ok"]]
    kinds = " and ".join(sorted({check["test"] for check in checks}))
    if proof["passed"]:
        verdict = f"passed: {len(checks)} {kinds} tests on the real network, in float64"
    else:
        verdict = f"FAILED: {len(failed)} of {len(checks)} {kinds} tests; use --stitch blend with this network"
    told = [(f"{check['test']}{'' if check['ok'] else ' FAILED'}", check["detail"]) for check in checks]
    kept = told if verbose else [line for line, check in zip(told, checks, strict=True) if not check["ok"]]
    return verdict + ("\n" + show.entries(kept) if kept else "")


def layer_text(rows: list[dict[str, Any]]) -> str:
    """The layers, and which of their rows and columns an aligned core needs."""
    words = [
        (row["name"], row["operator"], show.by(row["size"]), *(_interval(need) for need in row["need"])) for row in rows
    ]
    return show.table(("layer", "operator", "size", "rows needed", "columns needed"), words)


def _interval(need: dict[str, int] | None) -> str:
    return "-" if need is None else f"{need['start']}:{need['stop']}"


def card_entries(card: dict[str, Any] | None, verbose: bool) -> list[tuple[str, str]]:
    """A model card as lines; all of it where `verbose`."""
    if card is None:
        return []
    rows = [
        ("network", f"{card['architecture']} {_arguments(card['arguments'])}".strip()),
        ("classes", ", ".join(item["name"] for item in card["classes"]) or "none (regression)"),
        ("bands", ", ".join(card["bands"])),
        ("pixels", "any size" if card["resolution"] is None else f"{card['resolution']:g} m"),
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
    about = inspection.getdoc(factory) or ""
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
