"""Which tiles, blocks and chunks does a job consist of, what does it cost, and is it exact?

`plan` is a pure function from a network's geometry, a raster's size and the user's wishes to a frozen `TilePlan`:

1. extend the raster to a legal size of the network, and lay tiles along each axis (`axis.py`): exact, with full
   halos around cores, or blended, with an overlap;
2. group cores into blocks (a dask task, a shard) and split blocks into chunks;
3. project host and device memory (`projection.py`), and take the largest core and block that fit, or refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import ceil, log, prod
from typing import Any, Literal, NamedTuple

from tilepipe.axis import AxisPlan, blend_axis, exact_axis, exact_axis_for_tile
from tilepipe.errors import PlanError
from tilepipe.geometry.network import AxisGeometry, Geometry
from tilepipe.projection import BlockDemand, Footprint, PixelLayout, Projection, Resources, project
from tilepipe.window import Interval, Placement, Window

Stitch = Literal["auto", "exact", "blend"]

CORES = {"cpu": (1024, 2048, 4096, 512), "cuda": (4096, 2048, 1024, 512)}
"""Cores to try, the preferred first. All are there for every device, so that whether exact stitching is worth
its cost never depends on the device or its memory."""
BLOCK = {"cpu": 2048, "cuda": 8192}
CHUNK = 1024
MAX_COST = 4.0
"""Network pixels per core pixel beyond which `auto` blends."""
MAX_STRADDLE = 1.2
"""Tiles computed twice by neighbouring blocks while blending, as a factor, that `auto` keeps under."""
MAX_ELEMENTS = 2**31


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
            )
            for row in rows
            for col in cols
        ]
        return hull, places

    @property
    def tiles(self) -> int:
        """Passes through the network over the whole job; a tile counts once for each block that needs it."""
        rows = self.rows.passes(self.region.rows, self.block[0], self.exact)
        return rows * self.cols.passes(self.region.cols, self.block[1], self.exact)

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

    def projected(self, pixel: PixelLayout, footprint: Footprint, resources: Resources) -> TilePlan:
        """The same plan with the memory that it takes on these resources."""
        return replace(self, projection=project(_demand(self), pixel, footprint, resources))

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


def plan(
    geometry: Geometry,
    shape: tuple[int, int],
    pixel: PixelLayout,
    request: PlanRequest,
    resources: Resources,
    footprint: Callable[[tuple[int, int]], Footprint],
) -> TilePlan:
    """The tiles, blocks and memory of one job.

    `shape` is the raster's (rows, columns); `footprint` gives the memory of a tile of a legal (rows, columns).
    Raises PlanError where the request contradicts the network, or where nothing fits the memory limits.
    """
    planner = _Planner(geometry, shape, pixel, request, resources, cache(footprint))
    if request.stitch == "blend":
        return planner.fitting(planner.blended(), "blend", "it was asked for")
    if geometry.obstacle is not None:
        if request.stitch == "exact":
            raise PlanError(f"exact stitching is not possible: {geometry.obstacle}; use --stitch blend")
        return planner.fitting(planner.blended(), "blend", geometry.obstacle)
    if request.overlap is not None:
        raise PlanError("--overlap belongs to blended stitching; drop it, or use --stitch blend")
    axes = planner.exact()
    if request.stitch == "auto" and request.tile is None:
        axes = [pair for pair in axes if cost(*pair) <= MAX_COST and planner.elements(pair) < MAX_ELEMENTS]
        if not axes:
            return planner.fitting(
                planner.blended(),
                "blend",
                f"exact stitching would cost over {MAX_COST:g} times the raster's pixels",
            )
    return planner.fitting(axes, "exact", "the network's reach is finite and known")


def cost(rows: AxisPlan, cols: AxisPlan) -> float:
    """Network pixels per core pixel of an inner tile; an axis of a single tile counts as 1."""
    ratios = (1.0 if axis.count == 1 else axis.tile / (axis.core * axis.scale) for axis in (rows, cols))
    return prod(ratios)


AxisPair = tuple[AxisPlan, AxisPlan]


@dataclass(frozen=True, slots=True)
class _Planner:
    """The search for the first core and the largest block that fit, for one request."""

    geometry: Geometry
    shape: tuple[int, int]
    pixel: PixelLayout
    request: PlanRequest
    resources: Resources
    footprint: Callable[[tuple[int, int]], Footprint]

    def exact(self) -> list[AxisPair]:
        """Pairs of axes to try, the preferred first."""
        (rows, cols), (height, width) = (self.geometry.rows, self.geometry.cols), self.shape
        if self.request.tile is not None:
            tile = self.request.tile
            return [(exact_axis_for_tile(rows, height, tile[0]), exact_axis_for_tile(cols, width, tile[1]))]
        return [
            (_exact_near(rows, height, core, single), _exact_near(cols, width, core, single))
            for core in CORES[self.resources.device]
            for single in (True, False)
        ]

    def blended(self) -> list[AxisPair]:
        """The one pair of axes that the request allows."""
        tile = self.request.tile or (None, None)
        rows = blend_axis(self.geometry.rows, self.shape[0], tile[0], self.request.overlap)
        return [(rows, blend_axis(self.geometry.cols, self.shape[1], tile[1], self.request.overlap))]

    def elements(self, pair: AxisPair) -> int:
        """Elements of the largest activation."""
        return self.footprint((pair[0].tile, pair[1].tile)).largest

    def fitting(self, pairs: list[AxisPair], stitch: Literal["exact", "blend"], reason: str) -> TilePlan:
        """The plan of the first pair, largest block first, that the limits allow."""
        refusal = ""
        for rows, cols in pairs:
            if self.elements((rows, cols)) >= MAX_ELEMENTS:
                refusal = (
                    f"a tile of {rows.tile} x {cols.tile} has an activation of {self.elements((rows, cols))} elements, "
                    f"legal are fewer than {MAX_ELEMENTS}; choose a smaller --tile"
                )
                continue
            foot = self.footprint((rows.tile, cols.tile))
            bare = TilePlan(
                stitch,
                reason,
                rows,
                cols,
                self._region(rows, cols),
                (1, 1),
                (1, 1),
                self.request.window if stitch == "blend" else None,
                Projection(0, 0, 0),
            )
            for block in self._blocks(bare):
                made = replace(bare, block=block, chunk=(_chunk_of(block[0]), _chunk_of(block[1])))
                made = made.projected(self.pixel, foot, self.resources)
                refusal = made.excess(self.resources)
                if not refusal:
                    return made
        raise PlanError(refusal)

    def _blocks(self, bare: TilePlan) -> list[tuple[int, int]]:
        """Block sizes to try, the largest first."""
        if self.request.block is not None:
            return [self.request.block]
        wanted = BLOCK[self.resources.device]
        if not bare.exact:
            tile = max(axis.tile_output for axis in (bare.rows, bare.cols))
            wanted = max(wanted, ceil(tile / (MAX_STRADDLE**0.5 - 1)))
        height, width = bare.shape
        sizes = []
        while wanted >= 256:
            sizes.append(
                (
                    _block_of(bare.rows, height, wanted, bare.exact),
                    _block_of(bare.cols, width, wanted, bare.exact),
                )
            )
            wanted //= 2
        return list(dict.fromkeys(sizes))

    def _region(self, rows: AxisPlan, cols: AxisPlan) -> Window:
        whole = Window.whole((rows.outputs, cols.outputs))
        region = self.request.region
        if region is None:
            return whole
        if region.area == 0 or not whole.contains(region):
            raise PlanError(f"region {region} is not within the output's {whole}")
        return region


def _exact_near(axis: AxisGeometry, length: int, core: int, single: bool) -> AxisPlan:
    """Tiles around `core`; one tile over the whole axis where that is little larger and `single` allows it."""
    made = exact_axis(axis, length, core)
    if single and made.count > 1 and made.extended <= 1.25 * made.tile:
        return exact_axis(axis, length, made.outputs)
    return made


def _block_of(axis: AxisPlan, region: int, wanted: int, exact: bool) -> int:
    """Outputs of a block along one axis: whole cores (blended: whole chunks) near `wanted` raster pixels."""
    unit = axis.core if exact else CHUNK
    block = max(1, round(wanted / (axis.scale * unit))) * unit
    if block >= region:
        return region if region <= CHUNK else _round_up(region, 64)
    return block


def _chunk_of(block: int) -> int:
    """The divisor of `block` nearest to 1024, by ratio."""
    if block <= CHUNK:
        return block
    divisors = {d for k in range(1, int(block**0.5) + 1) if block % k == 0 for d in (k, block // k)}
    return min(divisors, key=lambda d: abs(log(d / CHUNK)))


def _demand(made: TilePlan) -> BlockDemand:
    """The sizes of the largest block."""
    read = [
        _largest_read(axis, interval, block, made.exact)
        for axis, interval, block in (
            (made.rows, made.region.rows, made.block[0]),
            (made.cols, made.region.cols, made.block[1]),
        )
    ]
    height, width = min(made.block[0], made.shape[0]), min(made.block[1], made.shape[1])
    tile = made.tile_output
    used = (min(made.core[0], tile[0]), min(made.core[1], tile[1])) if made.exact else tile
    return BlockDemand(
        block_outputs=height * width,
        block_inputs=read[0] * read[1],
        tile_inputs=made.tile[0] * made.tile[1],
        tile_outputs=used[0] * used[1],
        strip_outputs=0 if made.exact else tile[0] * width,
    )


def _largest_read(axis: AxisPlan, region: Interval, block: int, exact: bool) -> int:
    """Raster pixels that a block reads along one axis, at most; seen on the first blocks and the last."""
    starts = range(region.start, region.stop, block)
    reads = []
    for start in {*starts[:8], starts[-1]}:
        parts = axis.parts(Interval(start, min(start + block, region.stop)), exact)
        reads.append(parts[-1].source.stop - parts[0].source.start)
    return max(reads)


def _round_up(value: int, unit: int) -> int:
    return ceil(value / unit) * unit


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
