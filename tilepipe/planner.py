"""Which plan does a job get: the largest core and block that fit, exact or blended, and why?

`plan` is a pure function from networks' geometries, a raster's size and the user's wishes to frozen `TilePlan`s:

1. extend the raster to a legal size of each network, and lay tiles along each axis (`axis.py`): exact, with full
   halos around cores, or blended, with an overlap;
2. group cores into blocks (a dask task, a shard) and split blocks into chunks;
3. project host and device memory (`projection.py`), and take the largest core and block that fit, or refuse.

Several networks share cores and blocks, and each has its own tiles around them: 61 + 16n and 32n share no size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, lcm, log, prod
from typing import Literal

from tilepipe.axis import AxisPlan, blend_axis, exact_axis, exact_axis_for_tile
from tilepipe.errors import PlanError
from tilepipe.geometry.network import AxisGeometry, Geometry, round_up
from tilepipe.plan import PlanRequest, TilePlan
from tilepipe.projection import Footprint, NetworkDemand, PixelLayout, Projection, Resources, project
from tilepipe.window import Window

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

AxisPair = tuple[AxisPlan, AxisPlan]
"""One network's tiles along rows and columns."""


@dataclass(frozen=True, slots=True)
class PlannedNetwork:
    """What the plan has to know of one network."""

    geometry: Geometry
    pixel: PixelLayout
    footprint: Callable[[tuple[int, int]], Footprint]
    """The memory of a tile of a legal (rows, columns)."""


def plan(
    networks: Sequence[PlannedNetwork], shape: tuple[int, int], request: PlanRequest, resources: Resources
) -> tuple[TilePlan, ...]:
    """The tiles, blocks and memory of one job, a plan for each network; `shape` is the raster's (rows, columns).

    Raises PlanError where the request contradicts a network, where the networks' outputs do not lie on one grid, or
    where nothing fits the memory limits.
    """
    # The same tile is asked about for every block size.
    networks = [replace(each, footprint=cache(each.footprint)) for each in networks]
    planner = _Planner(networks, shape, request, resources)
    planner.check()
    if request.stitch == "blend":
        return planner.fitting(planner.blended(), "blend", "it was asked for")
    obstacle = next((each.geometry.obstacle for each in networks if each.geometry.obstacle is not None), None)
    if obstacle is not None:
        if request.stitch == "exact":
            raise PlanError(f"exact stitching is not possible: {obstacle}; use --stitch blend")
        return planner.fitting(planner.blended(), "blend", obstacle)
    if request.overlap is not None:
        raise PlanError("--overlap belongs to blended stitching; drop it, or use --stitch blend")
    choices = planner.exact()
    if request.stitch == "auto" and request.tile is None:
        choices = [pairs for pairs in choices if planner.is_worth_it(pairs)]
        if not choices:
            reason = f"exact stitching would cost over {MAX_COST:g} times the raster's pixels"
            return planner.fitting(planner.blended(), "blend", reason)
    return planner.fitting(choices, "exact", "the network's reach is finite and known")


def cost(rows: AxisPlan, cols: AxisPlan) -> float:
    """Network pixels per core pixel of an inner tile; an axis of a single tile counts as 1."""
    ratios = (1.0 if axis.count == 1 else axis.tile / (axis.core * axis.scale) for axis in (rows, cols))
    return prod(ratios)


def projected(
    plans: Sequence[TilePlan], networks: Sequence[PlannedNetwork], resources: Resources, combining: int = 0
) -> tuple[TilePlan, ...]:
    """The same plans with the memory that their job takes on these resources."""
    demands = [
        NetworkDemand(made.demand, network.pixel, network.footprint(made.tile))
        for made, network in zip(plans, networks, strict=True)
    ]
    total = project(demands, resources, combining)
    return tuple(replace(made, projection=total) for made in plans)


@dataclass(frozen=True, slots=True)
class _Planner:
    """The search for the first core and the largest block that fit, for one request."""

    networks: Sequence[PlannedNetwork]
    shape: tuple[int, int]
    request: PlanRequest
    resources: Resources

    def check(self) -> None:
        """Raises PlanError where several networks cannot serve one job."""
        if len(self.networks) == 1:
            return
        if self.request.tile is not None:
            sizes = " and ".join(str(each.geometry.rows.sizes) for each in self.networks)
            raise PlanError(f"--tile cannot serve several models, which take {sizes}; leave it out")
        scales = {each.geometry.scale for each in self.networks}
        if len(scales) > 1:
            found = " and ".join(f"{rows} x {cols}" for rows, cols in sorted(scales))
            raise PlanError(f"the models give one output for {found} pixels; --stride 1 gives one for each pixel")

    def exact(self) -> list[tuple[AxisPair, ...]]:
        """Every network's axes to try, the preferred first."""
        if self.request.tile is not None:
            tile, (height, width) = self.request.tile, self.shape
            rows, cols = (self._grown(axis) for axis in self.networks[0].geometry.axes)
            return [((exact_axis_for_tile(rows, height, tile[0]), exact_axis_for_tile(cols, width, tile[1])),)]
        return [
            tuple(zip(*(self._together(axis, core, single) for axis in (0, 1)), strict=True))
            for core in CORES[self.resources.device]
            for single in (True, False)
        ]

    def _grown(self, axis: AxisGeometry) -> AxisGeometry:
        """The axis of a network whose outputs are refined from what lies within the margin."""
        # The reach is that of an aligned core: the margin counts by what it adds to one.
        more = round_up(self.request.margin * axis.scale, axis.alignment)
        return axis if axis.reach is None else replace(axis, reach=(axis.reach[0] + more, axis.reach[1] + more))

    def _together(self, axis: int, core: int, single: bool) -> tuple[AxisPlan, ...]:
        """The networks' tiles along one axis, around the same cores."""
        geometries = [self._grown(each.geometry.axes[axis]) for each in self.networks]
        length = self.shape[axis]
        unit = lcm(*(each.alignment // each.scale for each in geometries))
        made = [exact_axis(each, length, core, unit) for each in geometries]
        if single and max(each.extended / each.tile for each in made) <= 1.25:
            made = [_whole(each, length) for each in geometries]
        # A tile that is as long as the raster has no cores that others could share.
        if any(each.count == 1 for each in made):
            made = [_whole(each, length) for each in geometries]
        if len({each.outputs for each in made}) > 1:
            sizes = " and ".join(str(each.outputs) for each in made)
            raise PlanError(f"the models give {sizes} outputs for {length} pixels; they need the same grid")
        # Where the last tile serves several cores, a network with a smaller halo needs a tile for each of them.
        return tuple(replace(each, count=max(other.count for other in made)) for each in made)

    def blended(self) -> list[tuple[AxisPair, ...]]:
        """The one choice of axes that the request allows."""
        tile, overlap = self.request.tile or (None, None), self.request.overlap
        axes = [each.geometry.axes for each in self.networks]
        return [
            tuple(
                (blend_axis(rows, self.shape[0], tile[0], overlap), blend_axis(cols, self.shape[1], tile[1], overlap))
                for rows, cols in axes
            )
        ]

    def is_worth_it(self, pairs: Sequence[AxisPair]) -> bool:
        """Whether exact stitching with these tiles is neither dear nor too large to compute."""
        return all(cost(*pair) <= MAX_COST for pair in pairs) and self._elements(pairs) < MAX_ELEMENTS

    def _elements(self, pairs: Sequence[AxisPair]) -> int:
        """Elements of the largest activation."""
        return max(
            each.footprint((rows.tile, cols.tile)).largest
            for each, (rows, cols) in zip(self.networks, pairs, strict=True)
        )

    def fitting(
        self, choices: list[tuple[AxisPair, ...]], stitch: Literal["exact", "blend"], reason: str
    ) -> tuple[TilePlan, ...]:
        """The plans of the first choice, largest block first, that the limits allow."""
        refusal = ""
        for pairs in choices:
            if self._elements(pairs) >= MAX_ELEMENTS:
                rows, cols = pairs[0]
                refusal = (
                    f"a tile of {rows.tile} x {cols.tile} has an activation of {self._elements(pairs)} elements, "
                    f"legal are fewer than {MAX_ELEMENTS}; choose a smaller --tile"
                )
                continue
            for block in self._blocks(pairs, exact=stitch == "exact"):
                made = self._made(pairs, block, stitch, reason)
                refusal = made[0].excess(self.resources)
                if not refusal:
                    return made
        raise PlanError(refusal)

    def _made(
        self, pairs: Sequence[AxisPair], block: tuple[int, int], stitch: Literal["exact", "blend"], reason: str
    ) -> tuple[TilePlan, ...]:
        plans = [
            TilePlan(
                stitch=stitch,
                reason=reason,
                rows=rows,
                cols=cols,
                region=self._region(rows, cols),
                block=block,
                chunk=(_chunk_of(block[0]), _chunk_of(block[1])),
                window=self.request.window if stitch == "blend" else None,
                projection=Projection(0, 0, 0),
                margin=self.request.margin,
            )
            for rows, cols in pairs
        ]
        return projected(plans, self.networks, self.resources, self.request.combining)

    def _blocks(self, pairs: Sequence[AxisPair], exact: bool) -> list[tuple[int, int]]:
        """Block sizes to try, the largest first."""
        if self.request.block is not None:
            return [self.request.block]
        wanted = BLOCK[self.resources.device]
        rows, cols = pairs[0]
        if not exact:
            tile = max(axis.tile_output for pair in pairs for axis in pair)
            wanted = max(wanted, ceil(tile / (MAX_STRADDLE**0.5 - 1)))
        height, width = self._region(rows, cols).shape
        sizes = []
        while wanted >= 256:
            sizes.append((_block_of(rows, height, wanted, exact), _block_of(cols, width, wanted, exact)))
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


def _whole(axis: AxisGeometry, length: int) -> AxisPlan:
    """One tile over the whole axis."""
    outputs = exact_axis(axis, length, length).outputs
    unit = axis.alignment // axis.scale
    return exact_axis(axis, length, ceil(outputs / unit) * unit)


def _block_of(axis: AxisPlan, region: int, wanted: int, exact: bool) -> int:
    """Outputs of a block along one axis: whole cores (blended: whole chunks) near `wanted` raster pixels."""
    unit = axis.core if exact else CHUNK
    block = max(1, round(wanted / (axis.scale * unit))) * unit
    if block >= region:
        return region if region <= CHUNK else ceil(region / 64) * 64
    return block


def _chunk_of(block: int) -> int:
    """The divisor of `block` nearest to 1024, by ratio."""
    if block <= CHUNK:
        return block
    divisors = {d for k in range(1, int(block**0.5) + 1) if block % k == 0 for d in (k, block // k)}
    return min(divisors, key=lambda d: abs(log(d / CHUNK)))
