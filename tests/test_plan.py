"""Tiles, blocks and chunks against brute force."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilepipe.axis import AxisPlan, blend_axis, exact_axis, exact_axis_for_tile
from tilepipe.errors import PlanError
from tilepipe.geometry.network import AxisGeometry, Geometry, Sizes
from tilepipe.machine import resources_of
from tilepipe.options import SegmentOptions
from tilepipe.plan import PlanRequest, TilePlan
from tilepipe.planner import PlannedNetwork, cost, plan
from tilepipe.projection import RESIDENT, Footprint, PixelLayout, Resources
from tilepipe.window import Interval, Window


def axis_geometry(step: int, minimum: int, reach: tuple[int, int] | None, alignment: int | None = None) -> AxisGeometry:
    return AxisGeometry(
        sizes=Sizes((minimum,), step),
        alignment=alignment or step,
        reach=reach,
        scale=1,
        trim=(0, 0),
        offset=Fraction(0),
    )


SEGNET = axis_geometry(32, 32, (186, 186))
AUTOENCODER = axis_geometry(16, 61, (60, 60))


def geometry(axis: AxisGeometry, obstacle: str | None = None) -> Geometry:
    return Geometry(rows=axis, cols=axis, channels_in=3, channels_out=6, obstacle=obstacle)


@st.composite
def axes(draw: st.DrawFn) -> AxisGeometry:
    alignment = draw(st.sampled_from([1, 2, 4, 8, 32]))
    step = alignment * draw(st.sampled_from([1, 2]))
    reach = (draw(st.integers(0, 70)), draw(st.integers(0, 70)))
    return axis_geometry(step, draw(st.integers(1, 90)), reach, alignment)


def check_tiles(axis: AxisGeometry, made: AxisPlan) -> None:
    assert axis.sizes.legal(made.tile)
    assert axis.sizes.legal(made.extended)
    assert (made.extended - made.tile) % axis.alignment == 0
    for k in range(made.count):
        assert made.origin(k) % axis.alignment == 0
        assert 0 <= made.origin(k) <= made.extended - made.tile


@given(axes(), st.integers(1, 700), st.integers(1, 200))
def test_exact_tiles_hold_all_that_their_cores_need(axis: AxisGeometry, length: int, core: int) -> None:
    made = exact_axis(axis, length, core)
    check_tiles(axis, made)
    covered = [
        i for k in range(made.count) for i in range(made.responsible(k, True).start, made.responsible(k, True).stop)
    ]
    assert covered == list(range(length))
    before, after = axis.reach or (0, 0)
    for k in range(made.count):
        used, start = made.responsible(k, True), made.origin(k)
        aligned_stop = -(-used.stop // axis.alignment) * axis.alignment
        assert start == 0 or start <= used.start - before
        assert start + made.tile == made.extended or start + made.tile >= aligned_stop + after


@given(axes(), st.integers(1, 700), st.integers(0, 60), st.data())
def test_blended_tiles_cover_everything(axis: AxisGeometry, length: int, overlap: int, data: st.DataObject) -> None:
    extended = axis.sizes.ceil(length)
    tile = data.draw(st.sampled_from([None, axis.sizes.ceil(100, extended), axis.sizes.ceil(160, extended)]))
    made = blend_axis(axis, length, tile, overlap)
    check_tiles(axis, made)
    hits = np.zeros(length, int)
    for k in range(made.count):
        hits[made.produced(k).start : made.produced(k).stop] += 1
    assert hits.min() >= 1
    for k in range(made.count - 1):
        assert (
            made.produced(k).stop - made.produced(k + 1).start >= min(overlap, length)
            or made.produced(k).stop == length
        )


@given(axes(), st.integers(1, 700), st.booleans(), st.data())
def test_touching_tiles_are_those_that_a_search_finds(
    axis: AxisGeometry, length: int, exact: bool, data: st.DataObject
) -> None:
    made = (
        exact_axis(axis, length, 64)
        if exact
        else blend_axis(axis, length, axis.sizes.ceil(100, axis.sizes.ceil(length)), 20)
    )
    start = data.draw(st.integers(0, length - 1))
    outputs = Interval(start, data.draw(st.integers(start + 1, length)))
    found = [k for k in range(made.count) if len(made.responsible(k, exact).intersect(outputs))]
    assert list(made.touching(outputs, exact)) == found


def request_plan(axis: AxisGeometry, shape: tuple[int, int], request: PlanRequest, **resources: object) -> TilePlan:
    (made,) = plan([network(axis)], shape, request, Resources(**{"host_bytes": 1 << 40, **resources}))  # type: ignore[arg-type]
    return made


def network(axis: AxisGeometry) -> PlannedNetwork:
    return PlannedNetwork(
        geometry(axis),
        PixelLayout(bands=3, itemsize=1, classes=6),
        lambda tile: Footprint(tile[0] * tile[1] * 600, 0, tile[0] * tile[1] * 64),
    )


@given(
    axes(),
    st.tuples(st.integers(1, 500), st.integers(1, 500)),
    st.sampled_from(["exact", "blend"]),
    st.tuples(st.integers(20, 200), st.integers(20, 200)),
    st.data(),
)
def test_placements_of_all_blocks_reassemble_the_raster(
    axis: AxisGeometry, shape: tuple[int, int], stitch: str, block: tuple[int, int], data: st.DataObject
) -> None:
    top, left = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[1] - 1))
    region = data.draw(st.sampled_from([None, Window.of(top, shape[0], left, shape[1])]))
    made = request_plan(axis, shape, PlanRequest(stitch, block=block, region=region))  # type: ignore[arg-type]
    hits = np.zeros(made.shape, int)
    cores: dict[tuple[int, int], Window] = {}
    for index in made.blocks():
        outputs = made.block_window(index)
        hull, places = made.placements(outputs)
        seen = np.zeros(outputs.shape, int)
        for place in places:
            assert place.source.shape == made.tile
            assert Window.whole(hull.shape).contains(place.source)
            assert Window.whole(made.tile_output).contains(place.crop)
            assert place.crop.shape == place.target.shape
            # An output pixel keeps its place: target + outputs = crop + tile, in raster pixels.
            there = place.crop.rows.start + place.source.rows.start + hull.rows.start
            assert place.target.rows.start + outputs.rows.start == there
            seen[place.target.within(Window.whole(outputs.shape))] += 1
            # The same for a tile wherever it is used, so that its numbers are.
            assert (place.core is None) == (stitch == "blend")
            if place.core is not None:
                assert place.core.contains(place.crop)
                assert Window.whole(made.tile_output).contains(place.core)
                at = place.source.shift(*hull.origin).origin
                assert cores.setdefault(at, place.core) == place.core
        assert seen.min() >= 1
        assert stitch == "blend" or seen.max() == 1
        hits[outputs.shift(-made.region.rows.start, -made.region.cols.start).within(Window.whole(made.shape))] += 1
    assert (hits == 1).all()
    again = TilePlan.from_json(json.loads(json.dumps(made.to_json())))
    assert replace(again, projection=made.projection) == made


@settings(deadline=None)
@given(
    st.lists(axes(), min_size=2, max_size=3),
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.sampled_from([16, 32, 64, 128]),
    st.integers(0, 30),
    st.tuples(st.integers(20, 200), st.integers(20, 200)),
)
def test_several_networks_meet_core_by_core(
    members: list[AxisGeometry], shape: tuple[int, int], core: int, margin: int, block: tuple[int, int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tilepipe.planner.CORES", {"cpu": (core,)})
        request = PlanRequest("exact", block=block, margin=margin)
        plans = plan([network(axis) for axis in members], shape, request, Resources(host_bytes=1 << 40))
    for index in plans[0].blocks():
        outputs = plans[0].block_window(index)
        together = [made.cells(outputs) for made in plans]
        hits = np.zeros(outputs.shape, int)
        for cells in zip(*(cells for _, cells in together), strict=True):
            assert len({(cell.inner, cell.outer) for cell in cells}) == 1
            inner, outer = cells[0].inner, cells[0].outer.shift(*outputs.origin)
            hits[inner.within(Window.whole(outputs.shape))] += 1
            around = inner.shift(*outputs.origin)
            grown = [
                side.grow(margin, margin).clip(n) for side, n in zip((around.rows, around.cols), shape, strict=True)
            ]
            assert outer == Window(*grown)
            for axis, made, (hull, _), cell in zip(members, plans, together, cells, strict=True):
                source, crop = cell.placement.source.shift(*hull.origin), cell.placement.crop
                assert crop.shape == outer.shape
                assert cell.placement.core is not None
                assert cell.placement.core.contains(crop)
                assert Window.whole(made.tile_output).contains(cell.placement.core)
                for way, plan_axis in ((0, made.rows), (1, made.cols)):
                    tile, need = (source.rows, source.cols)[way], (outer.rows, outer.cols)[way]
                    assert tile.start + (crop.rows, crop.cols)[way].start == need.start
                    # The tile ends where the raster does, or holds all that an aligned core around the need wants.
                    before, after = axis.reach or (0, 0)
                    start = need.start // axis.alignment * axis.alignment
                    stop = -(-need.stop // axis.alignment) * axis.alignment
                    assert tile.start == 0 or tile.start <= start - before
                    assert tile.stop == plan_axis.extended or tile.stop >= stop + after
        assert (hits == 1).all()


def test_segnet_costs_what_its_reach_says() -> None:
    for core, tile, ratio in ((1024, 1408, 1.89), (2048, 2432, 1.41), (4096, 4480, 1.20)):
        made = exact_axis(SEGNET, 32 * 1000, core)
        assert made.tile == tile
        assert cost(made, made) == pytest.approx(ratio, abs=0.005)


def test_remainder_of_the_tile_is_extra_halo() -> None:
    made = exact_axis(AUTOENCODER, 5000, 512)
    assert made.tile % 16 == 61 % 16
    assert made.extended == 61 + 16 * -(-(5000 - 61) // 16)
    assert made.tile >= 512 + 64 + 60


def test_raster_smaller_than_a_tile_is_one_tile() -> None:
    made = request_plan(SEGNET, (100, 3000), PlanRequest("exact"))
    assert made.rows.tile == made.rows.extended == 128
    assert made.rows.count == 1
    assert made.block[0] == 100


def test_run_on_a_region_uses_the_tiles_of_the_full_run() -> None:
    whole = request_plan(SEGNET, (4000, 4000), PlanRequest("exact", block=(2048, 2048)))
    part = request_plan(SEGNET, (4000, 4000), PlanRequest("exact", region=Window.of(700, 3000, 1500, 3900)))
    assert part.tile == whole.tile
    assert {part.rows.source(k) for k in part.rows.touching(part.region.rows, True)} <= {
        whole.rows.source(k) for k in range(whole.rows.count)
    }


def test_chunks_divide_blocks_and_blocks_hold_whole_cores() -> None:
    made = request_plan(SEGNET, (50_000, 70_000), PlanRequest())
    assert made.stitch == "exact"
    assert made.block[0] % made.core[0] == made.block[1] % made.core[1] == 0
    assert made.block[0] % made.chunk[0] == made.block[1] % made.chunk[1] == 0
    assert made.tiles * made.core[0] * made.core[1] >= 50_000 * 70_000


def test_little_memory_makes_cores_smaller_and_never_changes_the_stitching() -> None:
    full = request_plan(SEGNET, (20_000, 20_000), PlanRequest(), device="cuda", device_bytes=1 << 40)
    less = request_plan(SEGNET, (20_000, 20_000), PlanRequest(), device="cuda", device_bytes=6 << 30)
    assert full.core > less.core
    assert full.stitch == less.stitch == "exact"
    assert less.projection.device <= 6 << 30
    with pytest.raises(PlanError, match=r"device memory, over the limit of 1\.0 GiB"):
        request_plan(SEGNET, (20_000, 20_000), PlanRequest(), device="cuda", device_bytes=1 << 30)
    with pytest.raises(PlanError, match="raise --memory"):
        request_plan(SEGNET, (20_000, 20_000), PlanRequest(), host_bytes=1 << 30)


def test_exact_stitching_that_costs_too_much_is_blended_and_says_so() -> None:
    wide = axis_geometry(32, 32, (2000, 2000))
    made = request_plan(wide, (50_000, 50_000), PlanRequest())
    assert made.stitch == "blend"
    assert "4 times" in made.reason
    asked = request_plan(wide, (50_000, 50_000), PlanRequest("exact"))
    assert asked.stitch == "exact"
    assert asked.rows.lead >= 2000


def test_blocks_in_flight_take_memory_of_the_host_and_a_few_of_the_device() -> None:
    def made(blocks: int, stitch: Literal["exact", "blend"]) -> TilePlan:
        request = PlanRequest(stitch=stitch, block=(4096, 4096))
        return request_plan(SEGNET, (20_000, 20_000), request, device="cuda", device_bytes=1 << 40, blocks=blocks)

    for stitch in ("exact", "blend"):
        few, many = made(RESIDENT, stitch).projection, made(4 * RESIDENT, stitch).projection
        assert many.device_parts == few.device_parts
        assert many.host_parts["blocks"] == 4 * few.host_parts["blocks"]
        assert made(1, stitch).projection.device < few.device


@pytest.mark.parametrize(("cores", "workers", "blocks"), [(2, 1, 3), (8, 1, 8), (16, 4, 4), (96, 1, 12), (96, 8, 12)])
def test_a_cuda_job_keeps_a_block_in_flight_for_each_core(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int, blocks: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    options = SegmentOptions(gpus=tuple(range(workers)), memory=1 << 36, device_memory=1 << 35)
    assert resources_of(options, "cuda") == Resources(
        "cuda", 1 << 36, 1 << 35, threads=1, blocks=blocks, workers=workers
    )


def test_blended_blocks_are_large_enough_that_few_tiles_straddle() -> None:
    made = request_plan(SEGNET, (60_000, 60_000), PlanRequest("blend"))
    once = made.rows.count * made.cols.count
    assert made.tiles <= 1.2 * once


def test_network_with_an_obstacle_is_blended_and_exact_is_refused_by_name() -> None:
    unbounded = geometry(axis_geometry(32, 32, None), obstacle="layer 'se' pools over all pixels")
    asked = PlannedNetwork(unbounded, PixelLayout(3, 1), lambda _tile: Footprint(1, 1, 1))
    use = Resources(host_bytes=1 << 40)
    assert plan([asked], (999, 999), PlanRequest(), use)[0].stitch == "blend"
    with pytest.raises(PlanError, match="layer 'se' pools over all pixels"):
        plan([asked], (999, 999), PlanRequest("exact"), use)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (PlanRequest("exact", tile=(1000, 1000)), "nearest for a raster of this size are 992 and 1024"),
        (PlanRequest("exact", tile=(384, 384)), "at least 416"),
        (PlanRequest("exact", overlap=10), "--overlap belongs to blended"),
        (PlanRequest("blend", tile=(512, 512), overlap=500), "overlap 500 leaves nothing"),
        (PlanRequest(region=Window.of(0, 9999, 0, 10)), "is not within"),
    ],
)
def test_impossible_requests_say_what_is_legal(request_: PlanRequest, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        request_plan(SEGNET, (3000, 3000), request_)


def test_fixed_input_size_takes_that_size_only() -> None:
    fixed = axis_geometry(0, 224, None, alignment=1)
    made = blend_axis(fixed, 1000, None, 56)
    assert made.tile == 224
    assert made.produced(made.count - 1).stop == 1000
    assert blend_axis(fixed, 100, None, None).extended == 224
    with pytest.raises(PlanError, match="224"):
        blend_axis(fixed, 1000, 256, None)


def test_asked_tile_gets_the_largest_core() -> None:
    made = exact_axis_for_tile(SEGNET, 10_000, 1408)
    assert made.core == 1024
