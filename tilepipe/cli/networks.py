"""`inspect` and `models`: what a network asks of tiles, and which models there are."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilepipe.cli import show
from tilepipe.cli.arguments import spread
from tilepipe.cli.cards import about_preset, architectures, bundled, card_entries, models_text, preset_entries
from tilepipe.cli.derivation import derivation_entries, derivation_table, derive_on_paper, small_size
from tilepipe.cli.model_options import NetworkOptions
from tilepipe.cli.options import Talk
from tilepipe.cli.words import network_entries

if TYPE_CHECKING:
    from torch import nn

    from tilepipe.checkpoint import ModelCard
    from tilepipe.geometry.network import AxisGeometry, Geometry

CORES = (1024, 2048, 4096)
DISPROVED = 3

Reference = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE|MODULE:FACTORY",
        show_default=False,
        help="A bundled model, a model file, an exported program (.pt2), a factory, or an architecture's name, "
        "which without --weights gets random ones.",
    ),
]
Prove = Annotated[
    bool, typer.Option("--proof/--no-proof", help="Check what was derived on the real network, in float64.")
]


@spread
def inspect(model: Reference, made: NetworkOptions, talk: Talk, proof: Prove = True) -> None:
    """Show what a model asks of tiles.

    Its card, legal sizes and how they follow on paper, reach, halo, the cost of tiles, whether exact is possible or
    which layer forbids it; and the proof of all that on the real network. Exits with 3 where the proof fails. With -v
    also the arithmetic of each layer that changes the size, and every layer.
    """
    subject = look(model, made)
    network, geometry = subject.network, subject.geometry
    found = {
        "model": subject.source,
        "card": None if subject.card is None else asdict(subject.card),
        "preset": about_preset(model) if subject.card is None else None,
        **describe_network(network, geometry),
        "derivation": derive_on_paper(subject.unaugmented, geometry),
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


@dataclass(frozen=True, slots=True)
class Subject:
    """A network that is inspected."""

    network: nn.Module
    """As a job would run it."""
    unaugmented: nn.Module
    """Without test-time augmentation, which changes no sizes."""
    geometry: Geometry
    card: ModelCard | None
    source: str


def look(name: str, made: NetworkOptions) -> Subject:
    """The network of that name and its geometry, made as the options say."""
    from tilepipe.models import MODELS
    from tilepipe.variants.variation import Variation

    reference = made.reference(name)
    plain, bands, card = reference.look()
    variation = Variation.asked(made.resolve(), plain, bands)
    task = "segmentation" if card is None else card.task
    without = Variation(variation.dense).network(plain, task)
    source = name
    if made.weights is not None:
        source = f"{name}, weights of {made.weights}"
    elif card is None and reference.name in MODELS:
        source = f"{name}, random weights"
    return Subject(variation.network(plain, task), without, variation.geometry(plain, bands), card, source)


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
