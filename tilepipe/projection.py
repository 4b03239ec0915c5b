"""How much memory does a plan need, on the host and on the device?

Everything here depends on the block, the tile and the number of threads and blocks in flight, never on the
raster's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

PROCESS_BYTES = 900 << 20
"""A worker process before its first block: interpreter, torch, dask, GDAL, compiled kernels."""
CONTEXT_BYTES = 700 << 20
"""A CUDA context with its libraries' handles."""
FLOAT_BYTES = 4
RESIDENT = 3
"""The most blocks of a worker on a device at once: one is computed, one waits for it, one's maps are on their way back.
The others in flight are read and written meanwhile."""


class Footprint(NamedTuple):
    """What one tile needs while it passes through the network."""

    peak: int
    """Bytes of activations alive at once, at most."""
    workspace: int
    """Bytes of scratch of the largest convolution."""
    largest: int
    """Elements of the largest activation."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.peak + self.workspace


@dataclass(frozen=True, slots=True)
class Resources:
    """What the job may use on one machine."""

    device: Literal["cpu", "cuda"] = "cpu"
    host_bytes: int = 8 << 30
    """Bytes for all workers of a host."""
    device_bytes: int | None = None
    """Bytes of one device; None on a CPU."""
    threads: int = 1
    """Tiles in flight in a worker: threads of a CPU, 1 on a CUDA device."""
    blocks: int = 2
    """Blocks in flight in a worker: read, computed or written. Of these a device holds RESIDENT at most."""
    workers: int = 1
    """Worker processes on one host."""


@dataclass(frozen=True, slots=True)
class PixelLayout:
    """What one pixel costs to hold, on the way in and out."""

    bands: int
    itemsize: int
    """Bytes per value as stored in the raster."""
    output_bytes: int = 1
    """Bytes per output over labels, confidence and probabilities."""
    classes: int = 1
    """Classes of the network's scores, held in float32 while blending."""
    weights: int = 0
    """Bytes of the network's parameters."""
    cache: int = 64 << 20
    """Bytes of the reader's block cache."""


@dataclass(frozen=True, slots=True)
class Projection:
    """Bytes at the peak: of one worker process, of all of a host's, and of a device."""

    host: int
    host_total: int
    device: int
    host_parts: Mapping[str, int] = field(default_factory=dict)
    device_parts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BlockDemand:
    """The sizes that memory depends on, in pixels."""

    block_outputs: int
    """Outputs of one block."""
    block_inputs: int
    """Raster pixels that one block reads."""
    tile_inputs: int
    tile_outputs: int
    strip_outputs: int = 0
    """Outputs whose scores are held at once while blending; 0 when exact."""
    cell_outputs: int = 0
    """Outputs that are combined and refined at once: a core with its margin when exact, else a block with it."""


class NetworkDemand(NamedTuple):
    """What one of a job's networks asks for."""

    block: BlockDemand
    pixel: PixelLayout
    footprint: Footprint

    @property
    def staged(self) -> int:
        """Bytes of a block's pixels as stored, and of their validity."""
        return self.block.block_inputs * (self.pixel.bands * self.pixel.itemsize + 1)

    @property
    def strips(self) -> int:
        """Bytes of the scores that a block holds while blending."""
        return self.block.strip_outputs * (self.pixel.classes + 2) * FLOAT_BYTES

    @property
    def tile(self) -> int:
        """Bytes of one tile on its way through the network."""
        scores = self.block.tile_outputs * self.pixel.classes * FLOAT_BYTES
        inputs = self.block.tile_inputs * self.pixel.bands * FLOAT_BYTES
        return self.footprint.total + inputs + scores * (2 if self.block.strip_outputs else 1)


def project(networks: Sequence[NetworkDemand], use: Resources, combining: int = 0) -> Projection:
    """The memory that a job holds at its peak, by part.

    `combining`: bytes per output while several networks' scores are combined and refined; 0 where none are.
    """
    first = networks[0].block
    staged = sum(network.staged for network in networks)
    strips = sum(network.strips for network in networks)
    # Exact, a core's tiles pass through one network after the other; blended, blocks may be in different networks.
    tiles = [network.tile for network in networks]
    tile = sum(tiles) if strips else max(tiles)
    weights = sum(network.pixel.weights for network in networks)
    # Labels and what else is written, and what is compressed of it.
    maps = first.block_outputs * networks[0].pixel.output_bytes * 3
    host = {
        "process": PROCESS_BYTES,
        "network": weights * (1 if use.device == "cuda" else 2),
        "read cache": networks[0].pixel.cache,
        # On their way to a device they lie in memory that torch allots by powers of two.
        "blocks": use.blocks * (staged + (_power_of_two(staged) if use.device == "cuda" else staged) + maps),
    }
    if combining:
        host["combining"] = (use.blocks if strips else use.threads) * first.cell_outputs * combining
    device: dict[str, int] = {}
    if use.device == "cuda":
        resident = min(use.blocks, RESIDENT)
        device = {
            "context": CONTEXT_BYTES,
            "network": weights,
            "blocks": resident * (staged + maps),
            "tiles": tile,
            "scores": strips,
            "combining": (resident if strips else use.threads) * first.cell_outputs * combining,
        }
        device["reserve"] = sum(device.values()) // 10
    else:
        host["tiles"] = use.threads * tile
        host["scores"] = use.blocks * strips
        host["reserve"] = (host["tiles"] + host["scores"]) // 10
    total = sum(host.values())
    return Projection(total, total * use.workers, sum(device.values()), host, device)


def _power_of_two(size: int) -> int:
    """The least one that is not below `size`."""
    return 1 << (size - 1).bit_length() if size else 0
