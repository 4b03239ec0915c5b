"""A torch network to its geometry: what it accepts, how far it looks, and what it holds in memory.

The network runs on meta tensors under a dispatch mode, so no pixel is computed; every operator that moves pixels
becomes a `Layer` record, and `sizes.derive` compares the records of several input sizes. An operator that is not
understood is an error that names it; one that is known to combine all pixels makes the reach unbounded.

A network may return a tensor, a tuple (the first tensor counts) or a dictionary ("out" counts, as torchvision's
segmentation networks return it); that tensor is (batch, classes, rows, columns).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from torch import nn

from tilepipe.geometry.network import Geometry, Trace, fold
from tilepipe.geometry.sizes import derive, first_trace
from tilepipe.geometry.steps import Mixing
from tilepipe.tracing.memory import Memory, activation_bytes
from tilepipe.tracing.run import first_map, on_meta, trace_at
from tilepipe.window import Interval

__all__ = [
    "LayerRow",
    "Memory",
    "activation_bytes",
    "channels_of",
    "first_map",
    "geometry_of",
    "layer_table",
    "trace_network",
]


def geometry_of(network: nn.Module, channels_in: int) -> Geometry:
    """The geometry of a network whose input is (batch, channels_in, rows, columns).

    The network is neither changed nor moved; it is judged in evaluation mode. Raises GeometryError, naming the
    layer, for an operator that is not understood and where no input size passes through without loss.
    """
    meta = on_meta(network)
    return derive(lru_cache(maxsize=8)(lambda rows, cols: trace_at(meta, channels_in, rows, cols)), _example(network))


def _example(network: nn.Module) -> tuple[int, int] | None:
    """The size (rows, columns) that a network says it takes, as exported programs do."""
    return getattr(network, "example_size", None)


def channels_of(network: nn.Module, channels_in: int) -> int:
    """The number of channels that the network returns; raises GeometryError where no input size passes through."""
    meta = on_meta(network)
    trace_of = lru_cache(maxsize=1)(lambda rows, cols: trace_at(meta, channels_in, rows, cols))
    return first_trace(trace_of, _example(network))[1].channels_out


def trace_network(network: nn.Module, channels_in: int, size: tuple[int, int]) -> Trace:
    """The network's layers for an input of `size` (rows, columns)."""
    return trace_at(on_meta(network), channels_in, *size)


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One line of a table of layers."""

    name: str
    operator: str
    size: tuple[int, int]
    """(rows, columns) of its output."""
    need: tuple[Interval | None, Interval | None]
    """The rows and columns of its output that a core of the final output needs; None: none, or without a bound."""


def layer_table(network: nn.Module, geometry: Geometry, size: tuple[int, int]) -> list[LayerRow]:
    """The network's layers for an input of `size`, and what each has to deliver for a core of one alignment."""
    trace = trace_network(network, geometry.channels_in, size)
    return list(_rows(trace, geometry))


def _rows(trace: Trace, geometry: Geometry) -> Iterator[LayerRow]:
    bounded = not any(isinstance(step, Mixing) for layer in trace.layers for step in (layer.rows, layer.cols))
    needs: list[list[Interval | None]] = []
    for axis, each in enumerate(geometry.axes):
        core = Interval(0, int(Fraction(each.alignment, each.scale)))
        needs.append(fold(trace, axis, core) if bounded else [None] * len(trace.layers))
    for layer, rows, cols in zip(trace.layers, *needs, strict=True):
        yield LayerRow(layer.name, layer.operator, layer.size, (rows, cols))
