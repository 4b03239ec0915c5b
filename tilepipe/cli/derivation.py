"""A network's sizes on paper, as `inspect` prints them: in one line, and as a table of layers."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from tilepipe.cli import show

if TYPE_CHECKING:
    from torch import nn

    from tilepipe.geometry.network import Geometry

WIDTH = 96
SHOWN = 6
"""Joins that the short form names."""


def small_size(geometry: Geometry) -> tuple[int, int]:
    """The smallest legal (rows, columns) of at least one alignment, on which layers are shown."""
    rows, cols = (
        axis.sizes.ceil(axis.alignment) if axis.sizes.step else axis.sizes.minimums[0] for axis in geometry.axes
    )
    return rows, cols


def derive_on_paper(network: nn.Module, geometry: Geometry) -> dict[str, Any]:
    """How the sizes follow, layer by layer, as JSON values; with what that shows for rows and for columns."""
    from tilepipe.geometry.derivation import conclusion, derivation_of
    from tilepipe.trace import trace_network

    found = derivation_of(trace_network(network, geometry.channels_in, small_size(geometry)))
    return {**found.to_json(), "conclusions": [conclusion(found, axis, geometry.axes[axis]) for axis in (0, 1)]}


def derivation_entries(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The derivation in short: a line where rows and columns agree, else a line for each; and what joins where."""
    texts = [_chain(chain, end) for chain, end in zip(found["chains"], found["conclusions"], strict=True)]
    names = ("on paper",) if texts[0] == texts[1] else ("rows on paper", "columns on paper")
    rows = list(zip(names, texts, strict=False))
    joins = [
        f"{_size(layer['size'])} from {_fork(branch)}" for layer in found["layers"] for branch in layer["branches"]
    ]
    if joins:
        more = [f"and {len(joins) - SHOWN} more"] if len(joins) > SHOWN else []
        rows.append(("joins", textwrap.fill(", ".join([*joins[:SHOWN], *more]), WIDTH)))
    return rows


def _chain(chain: str, end: str) -> str:
    """The chain and its end in lines that break between steps, not within a formula."""
    whole = chain.replace(" ", "\xa0").replace("\xa0->\xa0", " -> ")
    return textwrap.fill(f"{whole}: {end}", WIDTH).replace("\xa0", " ")


def derivation_table(layers: list[dict[str, Any]]) -> str:
    """Each layer that changes the size, with its arithmetic; what joins it, and that it has the size it should."""
    rows = [
        (
            layer["name"] if layer["trunk"] else f"  {layer['name']}",
            layer["operator"],
            _formulas(*layer["formulas"]),
            _size(layer["size"]),
            _size([each or "-" for each in layer["stride"]]),
            ", ".join(_join(branch, layer["size"]) for branch in layer["branches"]),
        )
        for layer in layers
    ]
    return show.table(("changes of size", "operator", "arithmetic", "size", "stride", "joins"), rows)


def _size(pair: list[Any]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else show.by(pair)


def _formulas(rows: str, cols: str) -> str:
    return (
        rows
        if rows == cols
        else "; ".join(f"{text} {axis}" for text, axis in ((rows, "rows"), (cols, "columns")) if text)
    )


def _fork(branch: dict[str, Any]) -> str:
    return f"the pool of {branch['fork']}" if branch["positions"] else str(branch["fork"])


def _join(branch: dict[str, Any], size: list[int]) -> str:
    """A branch with its sizes: "a (Conv2d): 64 = 64", or "input: 12 -> 3 -> 12 = 12"."""
    arrived = branch["sizes"][-1]
    agree = "=" if arrived == size else "spread over"
    return f"{_fork(branch)}: {' -> '.join(map(_size, branch['sizes']))} {agree} {_size(size)}"
