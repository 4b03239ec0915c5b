"""Where do tiles lie along one axis, and which outputs is each responsible for?

Two frames of coordinates: the raster's pixels, and the network's input, which starts `trim[0]` pixels before the
raster (0 unless the network's output is smaller than its input). Outputs are numbered on the network's output
grid; output j reads around input pixel j * scale.

    extended raster  |0 ------------------------------------------------ E|
    cores            |   k=0   |   k=1   |   k=2   |   k=3   |   k=4   |
    tile of core 1     |-halo-|   k=1   |-halo-|
    tile of core 4                                |---- halo ----|  k=4 |   ends where the raster ends
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, lcm

from tilepipe.errors import PlanError
from tilepipe.geometry.network import AxisGeometry
from tilepipe.window import Interval


@dataclass(frozen=True, slots=True)
class TilePart:
    """One tile's part of an interval of outputs, along one axis."""

    source: Interval
    """The tile, in raster pixels; may reach beyond the raster."""
    crop: Interval
    """The outputs that count, in the tile's own output."""
    target: Interval
    """The same, on the output grid."""
    core: Interval
    """All outputs that the tile is responsible for, in the tile's own output."""


@dataclass(frozen=True, slots=True)
class AxisPlan:
    """The tiles of one axis."""

    length: int
    """Raster pixels."""
    extended: int
    """The legal size that the network's input has over the whole raster."""
    tile: int
    """The network's input for one tile, in pixels; legal, and `extended` modulo the alignment."""
    core: int
    """Outputs from one tile to the next: the core when exact, the stride when blended."""
    lead: int
    """Input pixels from an inner tile's start to its core: the halo before it; 0 when blended."""
    scale: int
    """Input pixels per output."""
    trim: tuple[int, int]
    """Input pixels beyond the raster at its start and end that the network consumes."""
    tile_output: int
    """Outputs of one tile."""
    outputs: int
    """Outputs kept over the whole raster."""
    count: int
    """Tiles."""

    def origin(self, k: int) -> int:
        """The first input pixel of tile k, in the network's frame; a multiple of the alignment."""
        return min(max(k * self.core * self.scale - self.lead, 0), self.extended - self.tile)

    def source(self, k: int) -> Interval:
        """Tile k in raster pixels."""
        start = self.origin(k) - self.trim[0]
        return Interval(start, start + self.tile)

    def produced(self, k: int) -> Interval:
        """The kept outputs that tile k computes, halo included."""
        start = self.origin(k) // self.scale
        return Interval(start, start + self.tile_output).clip(self.outputs)

    def responsible(self, k: int, exact: bool) -> Interval:
        """The outputs that tile k is used for: its core when exact, all it computes when blended."""
        if not exact:
            return self.produced(k)
        stop = self.outputs if k == self.count - 1 else (k + 1) * self.core
        return Interval(k * self.core, stop)

    def touching(self, outputs: Interval, exact: bool) -> range:
        """The tiles that are used for any of `outputs`, a non-empty interval of kept outputs."""
        if exact:
            first, last = outputs.start // self.core, (outputs.stop - 1) // self.core
            return range(min(first, self.count - 1), min(last, self.count - 1) + 1)
        # An inner tile k covers [k * core, k * core + tile_output); the last ones are shifted back.
        first = max(0, (outputs.start - self.tile_output) // self.core + 1)
        last = min(self.count - 1, (outputs.stop - 1) // self.core)
        if self.produced(self.count - 1).start < outputs.stop:
            last = self.count - 1
        while first > 0 and self.produced(first - 1).stop > outputs.start:
            first -= 1
        return range(min(first, last), last + 1)

    def part(self, k: int, outputs: Interval, exact: bool) -> TilePart:
        """Tile k's part of `outputs`."""
        core, start = self.responsible(k, exact), self.origin(k) // self.scale
        target = core.intersect(outputs)
        return TilePart(self.source(k), target.shift(-start), target, core.shift(-start))

    def parts(self, outputs: Interval, exact: bool) -> list[TilePart]:
        """Every tile's part of `outputs`, a non-empty interval of kept outputs."""
        return [self.part(k, outputs, exact) for k in self.touching(outputs, exact)]

    def needed(self, outputs: Interval, margin: int) -> Interval:
        """`outputs` and `margin` more at either end, as far as the output grid goes."""
        return outputs.grow(margin, margin).clip(self.outputs)

    def passes(self, region: Interval, block: int, exact: bool, margin: int = 0) -> int:
        """Tiles along this axis over all blocks of a region, one counted anew for each block that needs it.

        Each block also needs `margin` outputs around it.
        """
        blocks = (Interval(i, min(i + block, region.stop)) for i in range(region.start, region.stop, block))
        return sum(len(self.touching(self.needed(each, margin), exact)) for each in blocks)


def extended_size(axis: AxisGeometry, length: int) -> int:
    """The smallest legal size over a raster of `length` pixels and what the network trims."""
    padded = length + sum(axis.trim)
    if axis.sizes.step == 0:
        return max(padded, axis.sizes.minimums[0])
    return axis.sizes.ceil(padded)


def kept_outputs(axis: AxisGeometry, length: int, extended: int) -> int:
    """How many outputs have their cell's centre in a raster of `length` pixels, of those over `extended`."""
    if axis.scale == 1:
        return length
    if axis.offset + axis.scale / 2 < 0:
        raise PlanError(
            f"the network's first output lies {float(-axis.offset)} pixels before the raster; "
            "networks whose coarse outputs start outside the raster are not supported"
        )
    inside = floor((length - axis.offset) / axis.scale + 0.5)
    return max(1, min(inside, axis.output_size(extended)))


def exact_axis(axis: AxisGeometry, length: int, core: int, unit: int = 1) -> AxisPlan:
    """Tiles with full halos around cores of about `core` outputs: a multiple of the alignment, and of `unit`."""
    extended = extended_size(axis, length)
    unit = lcm(unit, axis.alignment // axis.scale)
    core = max(1, round(core / unit)) * unit
    tile = axis.tile(core, extended)
    return _exact(axis, length, extended, min(tile, extended), core)


def exact_axis_for_tile(axis: AxisGeometry, length: int, tile: int) -> AxisPlan:
    """Tiles of the size asked for, with the largest aligned core that their halos leave."""
    extended = extended_size(axis, length)
    unit = axis.alignment // axis.scale
    if tile >= extended:
        return _exact(axis, length, extended, extended, unit)
    before, after = axis.halo[0], (axis.reach or (0, 0))[1]
    smallest = axis.tile(unit, extended)
    if not axis.sizes.legal(tile) or (extended - tile) % axis.sizes.step:
        raise PlanError(f"tile size {tile} is not legal here; {_nearest(axis, tile, extended)}")
    if tile < smallest:
        raise PlanError(
            f"tile size {tile} leaves no core inside halos of {before} and {after} pixels; "
            f"exact stitching needs at least {smallest}, or use --stitch blend"
        )
    core = (tile - before - after) // axis.scale // unit * unit
    return _exact(axis, length, extended, tile, core)


def _exact(axis: AxisGeometry, length: int, extended: int, tile: int, core: int) -> AxisPlan:
    outputs = kept_outputs(axis, length, extended)
    unit = axis.alignment // axis.scale
    if tile == extended:
        core = ceil(outputs / unit) * unit
    # The first tile that ends where the raster ends serves all that remains.
    count = 1 + max(0, ceil((extended - tile + axis.halo[0]) / (core * axis.scale))) if tile < extended else 1
    count = min(count, ceil(outputs / core))
    return AxisPlan(
        length,
        extended,
        tile,
        core,
        axis.halo[0],
        axis.scale,
        axis.trim,
        axis.output_size(tile),
        outputs,
        count,
    )


def blend_axis(axis: AxisGeometry, length: int, tile: int | None, overlap: int | None) -> AxisPlan:
    """Tiles of about `tile` pixels that share `overlap` valid outputs with each neighbour.

    A tile that was asked for must be legal; None chooses one near 512. The overlap is widened to the next
    aligned one; None is a quarter of the tile.
    """
    extended = extended_size(axis, length)
    chosen = _blend_tile(axis, tile, extended)
    produced = axis.output_size(chosen)
    unit = max(1, axis.alignment // axis.scale)
    wanted = produced // 4 if overlap is None else overlap
    stride = (produced - wanted) // unit * unit
    if stride < 1 and chosen < extended:
        raise PlanError(
            f"overlap {wanted} leaves nothing of a tile of {produced} outputs; at most {produced - unit} is legal"
        )
    stride = max(stride, unit)
    if chosen == extended:
        stride = ceil(kept_outputs(axis, length, extended) / unit) * unit
    return AxisPlan(
        length,
        extended,
        chosen,
        stride,
        0,
        axis.scale,
        axis.trim,
        produced,
        kept_outputs(axis, length, extended),
        1 + ceil((extended - chosen) / (axis.scale * stride)),
    )


def _blend_tile(axis: AxisGeometry, tile: int | None, extended: int) -> int:
    if axis.sizes.step == 0:
        only = axis.sizes.minimums[0]
        if tile is not None and tile != only:
            raise PlanError(f"tile size {tile} is not legal; this network takes {only} only")
        return only
    if tile is not None:
        if tile >= extended:
            return extended
        if not axis.sizes.legal(tile) or (extended - tile) % axis.sizes.step:
            raise PlanError(f"tile size {tile} is not legal here; {_nearest(axis, tile, extended)}")
        return tile
    return min(axis.sizes.ceil(512 + sum(axis.trim), extended), extended)


def _nearest(axis: AxisGeometry, tile: int, extended: int) -> str:
    above = axis.sizes.ceil(tile, extended)
    below = above - axis.sizes.step
    near = f"{below} and {above}" if below > 0 and axis.sizes.legal(below) else f"{above}"
    return f"the network takes {axis.sizes}, and the nearest for a raster of this size are {near}"
