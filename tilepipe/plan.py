"""Which tiles, blocks and chunks does a job consist of, and where does each of its pixels come from and go to?

A `TilePlan` answers that for one network; `planner.py` makes them. Several networks of one job have a plan each,
with the same blocks and, when exact, the same cores, so that they meet per core pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Literal, NamedTuple

from tilepipe.axis import AxisPlan
from tilepipe.projection import BlockDemand, Projection, Resources
from tilepipe.window import Interval, Placement, Window

Stitch = Literal["auto", "exact", "blend"]


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the user asked for; None means that the plan decides."""

    stitch: Stitch = "auto"
    tile: tuple[int, int] | None = None
    """The network's input, (rows, columns)."""
    overlap: int | None = None
    """Valid outputs that neighbouring tiles share; blended only."""
    window: str = "hann"
    """The blending window's name; blended only."""
    block: tuple[int, int] | None = None
    """Outputs per dask task, (rows, columns)."""
    region: Window | None = None
    """The part of the output grid to compute; None is all of it."""
    margin: int = 0
    """Outputs around a pixel that its refinement looks at."""
    combining: int = 0
    """Bytes per output while several networks' scores are combined and refined."""


class Cell(NamedTuple):
    """One core's part in a block, and what has to be known around it to refine it."""

    inner: Window
    """The outputs that it labels, in pixels of the block's output."""
    outer: Window
    """These and the margin around them, as far as the output grid goes; likewise."""
    placement: Placement
    """The tile that gives the outer outputs."""


class BlockIndex(NamedTuple):
    """A block's place in the grid of blocks, counted from the output's origin."""

    row: int
    col: int


@dataclass(frozen=True, slots=True)
class TilePlan:
    """All that decides where a job's pixels come from and go to.

    Windows of outputs are on the network's output grid over the whole raster; for a network at full resolution
    that is the raster's own grid. The grid of blocks starts at the region's origin, the grid of cores at the
    raster's: a run on a region is a crop of the full run.
    """

    stitch: Literal["exact", "blend"]
    reason: str
    """Why this stitching, in words."""
    rows: AxisPlan
    cols: AxisPlan
    region: Window
    block: tuple[int, int]
    chunk: tuple[int, int]
    window: str | None
    """The blending window's name; None when exact."""
    projection: Projection
    """Of the whole job, whose other networks have plans of their own."""
    margin: int = 0
    """Outputs around a pixel that its refinement looks at; part of the halo when exact."""

    @property
    def exact(self) -> bool:
        """Whether the labels are those of one pass over the whole raster."""
        return self.stitch == "exact"

    @property
    def tile(self) -> tuple[int, int]:
        """The network's input for one tile, (rows, columns)."""
        return self.rows.tile, self.cols.tile

    @property
    def core(self) -> tuple[int, int]:
        """Outputs from one tile to the next, (rows, columns)."""
        return self.rows.core, self.cols.core

    @property
    def tile_output(self) -> tuple[int, int]:
        """The network's output for one tile, (rows, columns)."""
        return self.rows.tile_output, self.cols.tile_output

    @property
    def scale(self) -> tuple[int, int]:
        """Raster pixels per output, (rows, columns)."""
        return self.rows.scale, self.cols.scale

    @property
    def shape(self) -> tuple[int, int]:
        """The output's (rows, columns)."""
        return self.region.shape

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along (rows, columns)."""
        height, width = self.region.shape
        return ceil(height / self.block[0]), ceil(width / self.block[1])

    @property
    def block_count(self) -> int:
        """Blocks in all."""
        return self.grid[0] * self.grid[1]

    def blocks(self) -> Iterator[BlockIndex]:
        """Every block, row by row."""
        rows, cols = self.grid
        return (BlockIndex(row, col) for row in range(rows) for col in range(cols))

    def block_window(self, index: BlockIndex) -> Window:
        """The outputs of one block, on the output grid of the whole raster."""
        row = self.region.rows.start + index.row * self.block[0]
        col = self.region.cols.start + index.col * self.block[1]
        return Window.of(row, row + self.block[0], col, col + self.block[1]).intersect(self.region)

    def placements(self, outputs: Window) -> tuple[Window, list[Placement]]:
        """The raster pixels that `outputs` need, and each tile's place in them, in row-major order.

        The window of raster pixels may reach beyond the raster, where it is extended by reflection. Exact: the
        targets partition `outputs`; blended: they are all the parts that tiles have in it.
        """
        rows = self.rows.parts(outputs.rows, self.exact)
        cols = self.cols.parts(outputs.cols, self.exact)
        hull = Window(rows[0].source.hull(rows[-1].source), cols[0].source.hull(cols[-1].source))
        up, left = hull.origin
        top, start = outputs.origin
        places = [
            Placement(
                Window(row.source.shift(-up), col.source.shift(-left)),
                Window(row.crop, col.crop),
                Window(row.target.shift(-top), col.target.shift(-start)),
                Window(row.core, col.core) if self.exact else None,
            )
            for row in rows
            for col in cols
        ]
        return hull, places

    @property
    def inner_core(self) -> Window | None:
        """The core of a tile that is not the first, in its own output; None where tiles are blended."""
        if not self.exact:
            return None
        rows, cols = (axis.part(k, axis.responsible(k, True), True).core for axis, k in self._inner)
        return Window(rows, cols)

    @property
    def _inner(self) -> tuple[tuple[AxisPlan, int], tuple[AxisPlan, int]]:
        """Each axis with its second tile, or its only one."""
        return (self.rows, min(1, self.rows.count - 1)), (self.cols, min(1, self.cols.count - 1))

    def hull(self, outputs: Window) -> Window:
        """The raster pixels that `outputs` and their margin need; may reach beyond the raster."""
        return self.placements(outputs if self.exact else self.needed(outputs))[0]

    def cells(self, outputs: Window) -> tuple[Window, list[Cell]]:
        """As `placements`, exact only: the parts of cores that make up `outputs`, each with its margin."""
        hull, places = self.placements(outputs)
        top, left = outputs.origin
        cells = []
        for place in places:
            target = place.target.shift(top, left)
            grown = self.needed(target)
            row, col = grown.rows.start - target.rows.start, grown.cols.start - target.cols.start
            crop = Window.of(
                start := place.crop.rows.start + row,
                start + len(grown.rows),
                first := place.crop.cols.start + col,
                first + len(grown.cols),
            )
            outer = grown.shift(-top, -left)
            own = place.crop.rows.start - target.rows.start, place.crop.cols.start - target.cols.start
            assert place.core is not None, "cores are refined"
            core = self.needed(place.core.shift(-own[0], -own[1])).shift(*own)
            cells.append(Cell(place.target, outer, Placement(place.source, crop, outer, core)))
        return hull, cells

    def needed(self, outputs: Window) -> Window:
        """`outputs` and the margin around them, as far as the output grid goes."""
        return Window(self.rows.needed(outputs.rows, self.margin), self.cols.needed(outputs.cols, self.margin))

    @property
    def tiles(self) -> int:
        """Passes through the network over the whole job; a tile counts once for each block that needs it."""
        rows = self.rows.passes(self.region.rows, self.block[0], self.exact, self.block_margin)
        return rows * self.cols.passes(self.region.cols, self.block[1], self.exact, self.block_margin)

    @property
    def block_margin(self) -> int:
        """Outputs around a block that are computed with it; 0 when exact, where each tile brings its own."""
        return 0 if self.exact else self.margin

    @property
    def overhead(self) -> float:
        """Pixels through the network per raster pixel of the output's extent."""
        pixels = self.region.area * self.rows.scale * self.cols.scale
        return self.tiles * self.rows.tile * self.cols.tile / pixels

    def to_json(self) -> dict[str, Any]:
        """All that decides the map, as JSON values: everything but the projection, which depends on the machine."""
        stored = asdict(self)
        del stored["projection"]
        return stored

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> TilePlan:
        """The plan that `to_json` stored, its memory not yet projected."""
        fields = dict(stored)
        for name in ("rows", "cols"):
            axis = dict(fields[name])
            fields[name] = AxisPlan(**{**axis, "trim": tuple(axis["trim"])})
        region = fields["region"]
        fields["region"] = Window.of(
            region["rows"]["start"], region["rows"]["stop"], region["cols"]["start"], region["cols"]["stop"]
        )
        fields["block"], fields["chunk"] = tuple(fields["block"]), tuple(fields["chunk"])
        return cls(**fields, projection=Projection(0, 0, 0))

    @property
    def demand(self) -> BlockDemand:
        """The sizes of the largest block."""
        axes = ((self.rows, self.region.rows, self.block[0]), (self.cols, self.region.cols, self.block[1]))
        read = [self._largest_read(*axis) for axis in axes]
        height, width = (min(b, n) for b, n in zip(self.block, self.shape, strict=True))
        tile = self.tile_output
        wide = 2 * self.block_margin
        cell = [min(core + 2 * self.margin, out) for core, out in zip(self.core, tile, strict=True)]
        used = cell if self.exact else tile
        return BlockDemand(
            block_outputs=height * width,
            block_inputs=read[0] * read[1],
            tile_inputs=self.tile[0] * self.tile[1],
            tile_outputs=used[0] * used[1],
            strip_outputs=0 if self.exact else tile[0] * (width + wide),
            cell_outputs=cell[0] * cell[1] if self.exact else (height + wide) * (width + wide),
        )

    def _largest_read(self, axis: AxisPlan, region: Interval, block: int) -> int:
        """Raster pixels that a block reads along one axis, at most; seen on the first blocks and the last."""
        starts = range(region.start, region.stop, block)
        reads = []
        for start in {*starts[:8], starts[-1]}:
            outputs = axis.needed(Interval(start, min(start + block, region.stop)), self.block_margin)
            parts = axis.parts(outputs, self.exact)
            reads.append(parts[-1].source.stop - parts[0].source.start)
        return max(reads)

    def excess(self, limits: Resources) -> str:
        """What of the projected memory is over the limits, and the remedy; empty where all fits."""
        host, device = self.projection.host_total, self.projection.device
        what = f"tiles of {self.tile[0]} x {self.tile[1]} in blocks of {self.block[0]} x {self.block[1]}"
        if host > limits.host_bytes:
            return (
                f"{what} need {_gib(host)} of host memory, over the limit of {_gib(limits.host_bytes)}; "
                "raise --memory, or lower --tile, --threads or --workers"
            )
        if limits.device_bytes is not None and device > limits.device_bytes:
            return (
                f"{what} need {_gib(device)} of device memory, over the limit of {_gib(limits.device_bytes)}; "
                "raise --device-memory or lower --tile"
            )
        return ""


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
