"""Benchmarks: what follows from figures, and what is measured."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from commands import make_files
from torch.utils.flop_counter import FlopCounterMode

from tilepipe.bench import network, whole
from tilepipe.bench.clock import sustained
from tilepipe.bench.input import block_reads
from tilepipe.bench.input import read as read_figure
from tilepipe.bench.input import stage as stage_figure
from tilepipe.bench.output import patches
from tilepipe.bench.report import (
    Asked,
    BenchReport,
    ForwardFigure,
    best_threads,
    best_tile,
    bound,
    suggestion,
)
from tilepipe.bench.run import BenchOptions, _Bench, bench
from tilepipe.checkpoint import Model, load_model
from tilepipe.errors import UsageError
from tilepipe.job import Job, prepare
from tilepipe.models import build
from tilepipe.options import SegmentOptions
from tilepipe.plan import BlockIndex
from tilepipe.predict.prepare import prepare as prepare_network
from tilepipe.raster.gdal import GdalRecipe
from tilepipe.window import Window

CPU = torch.device("cpu")
SECONDS = 0.05


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels get few scores."""
    monkeypatch.setattr("tilepipe.bench.kernels.SIZE", 1 << 20)


def job_of(files: Path, **options: Any) -> Job:
    chosen = SegmentOptions(**{"device": "cpu", "threads": 2, "block": (96, 96), **options})
    return prepare(files / "image.tif", str(files / "net.safetensors"), chosen)


def figure(tile: int, rate: float, **more: Any) -> ForwardFigure:
    """A made-up figure of a tile of that side and rate."""
    return ForwardFigure(
        **{
            "tile": (tile, tile),
            "core": (tile - 64, tile - 64),
            "block": (2 * (tile - 64), 2 * (tile - 64)),
            "blocks": 9,
            "precision": "float32",
            "threads": 4,
            "batch": 1,
            "seconds": 1.0,
            "network_rate": 2 * rate,
            "rate": rate,
            "tflops": 1.0,
            "share": 0.5,
            **more,
        }
    )


# ---- what follows from figures ----


def test_the_slowest_part_bounds_the_job() -> None:
    rates = {"read": 80.0, "network": 2.0, "label": 400.0, "write": 4.0}
    found = bound(rates, "cuda")
    assert (found.stage, found.rate, found.following, found.following_rate) == ("network", 2.0, "write", 4.0)
    assert found.expected == 2.0
    # On a CPU the parts share the cores: 1/80 + 1/2 + 1/400 + 1/4 seconds a megapixel.
    assert bound(rates, "cpu").expected == pytest.approx(1 / 0.765)
    assert bound({**rates, "write": 1.0}, "cpu").stage == "write"
    assert bound({"network": 3.0}, "cpu").expected == pytest.approx(3.0)


def test_the_fastest_tile_is_suggested_and_of_those_as_fast_the_smallest() -> None:
    figures = [figure(512, 1.0), figure(1024, 1.99), figure(2048, 2.0)]
    found = suggestion(figures, Asked("cpu", "float32"))
    assert (found.tile, found.block, found.threads) == ((1024, 1024), (1920, 1920), 4)
    assert suggestion([*figures, figure(4096, 2.2)], Asked("cpu", "float32")).tile == (4096, 4096)
    assert found.options() == {"tile": [1024, 1024], "block": [1920, 1920], "threads": 4}
    for said in ("1024 x 1024 gave 1.99", "512 x 512 gave 1", "2048 x 2048 gave 2"):
        assert said in found.reasons[0]


def test_batches_other_precisions_and_fewer_threads_do_not_choose_the_tile() -> None:
    figures = [figure(512, 1.0), figure(256, 9.0, batch=4), figure(300, 9.0, precision="bf16")]
    figures += [figure(400, 9.0, threads=2)]
    assert best_tile(figures, "float32").tile == (512, 512)
    assert best_tile(figures, "bf16").tile == (300, 300)


def test_fewer_threads_are_suggested_where_they_are_as_fast() -> None:
    all_threads = figure(512, 1.0)
    assert best_threads([all_threads, figure(512, 0.99, threads=2)], all_threads).threads == 2
    assert best_threads([all_threads, figure(512, 0.6, threads=2)], all_threads).threads == 4
    assert best_threads([all_threads, figure(256, 5.0, threads=2)], all_threads).threads == 4
    found = suggestion([all_threads, figure(512, 1.4, threads=2)], Asked("cpu", "float32"))
    assert found.threads == 2
    assert "4 gave 1, 2 gave 1.4" in found.reasons[-1]


def test_a_precision_is_suggested_only_where_the_more_exact_one_is_as_fast() -> None:
    half = figure(1024, 2.0, precision="bf16", threads=1)
    asked = Asked("cuda", "bf16")
    slower = [half, figure(1024, 0.5, threads=1)]
    assert (suggestion(slower, asked).precision, suggestion(slower, asked).tile) == (None, (1024, 1024))
    faster = suggestion([half, figure(512, 2.5, threads=1)], asked)
    assert (faster.precision, faster.tile, faster.threads) == ("float32", (512, 512), None)
    assert suggestion([figure(512, 1.0), figure(512, 9.0, precision="bf16")], Asked("cpu", "float32")).precision is None


def test_a_suggestion_leaves_out_what_says_nothing_of_other_jobs() -> None:
    assert suggestion([figure(512, 1.0, blocks=1)], Asked("cpu", "float32")).block is None
    found = suggestion([figure(512, 1.0)], Asked("cpu", "float32", models=2, workers=3, stitch="blend"))
    assert found.options() == {"block": [896, 896], "threads": 4, "workers": 3, "stitch": "blend"}


# ---- measuring ----


def test_the_rate_is_that_of_all_threads_without_their_first_call() -> None:
    calls: list[list[float]] = [[], []]

    def work(number: int) -> float:
        calls[number].append(time.perf_counter())
        assert torch.get_num_threads() == 1
        time.sleep(0.01 if len(calls[number]) > 1 else 0.1)
        return 3.0

    found = sustained(work, 0.1, threads=2)
    assert min(map(len, calls)) >= 2
    # Sleeping lasts at least as long as it is told to, and the first call is not counted.
    assert found.seconds >= 0.01
    assert found.amount == pytest.approx(2 * 3.0 / found.seconds, rel=0.5)
    assert found.amount <= 2 * 3.0 / 0.01


def test_a_first_call_that_lasts_long_enough_is_the_measurement() -> None:
    calls = []

    def work(number: int) -> float:
        calls.append(number)
        time.sleep(0.02)
        return 1.0

    settled = []
    assert sustained(work, 0.01, settle=lambda: settled.append(1), enough=0.02).seconds >= 0.02
    assert (calls, len(settled)) == ([0], 1)


def test_an_error_in_a_thread_is_raised() -> None:
    def work(number: int) -> float:
        raise UsageError("broken")

    with pytest.raises(UsageError, match="broken"):
        sustained(work, 0.01, threads=2)


def test_operations_are_those_that_torch_counts(files: Path) -> None:
    made = job_of(files, tile=(96, 112), stitch="blend")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made.members[0].network(torch.zeros(1, 3, 96, 112))
    assert network.flops(made) == counter.get_total_flops()


def test_operations_of_a_core_alone_are_fewer(files: Path) -> None:
    """Of a network whose decoder computes no more than the core needs."""
    made = job_of(files, tile=(240, 240), stitch="exact")
    core, pixels = made.plan.inner_core, torch.zeros(1, 3, *made.plan.tile)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made.members[0].network.forward_part(pixels, core)
    assert network.flops(made) == counter.get_total_flops() < network.flops(made, whole=True)


def test_the_network_gets_the_jobs_tiles(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()
    made = job_of(files, tile=(96, 112), stitch="blend")
    prepared = [prepare_network(made.members[0].network)]
    prepared[0].register_forward_hook(lambda module, given, scores: seen.add(tuple(given[0].shape)))
    found = network.forward(made, prepared, CPU, SECONDS, network.Pass(2, products=0.5))
    assert seen == {(1, 3, 96, 112)}
    assert found.network_rate / found.rate == pytest.approx(made.plan.overhead)
    assert found.share == pytest.approx(2 * found.tflops)
    assert found.tflops * 1e12 == pytest.approx(found.network_rate * 1e6 * network.flops(made) / (96 * 112))
    network.forward(made, prepared, CPU, SECONDS, network.Pass(1, products=0.5, batch=2))
    assert seen == {(1, 3, 96, 112), (2, 3, 96, 112)}


def test_candidates_are_legal_tiles_of_the_same_stitching(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "CORES", (16, 32, 64, 4096))
    exact = network.candidates(job_of(files, stitch="exact", block=None))
    assert [made.plan.stitch for made in exact] == ["exact"] * len(exact)
    # segnet-basic of 16n with a halo of 96 needs 112 + 96 pixels and more: one tile of the whole raster is left.
    assert {made.plan.tile for made in exact} == {(160, 176)}
    blended = network.candidates(job_of(files, stitch="blend", block=None))
    # A quarter of 16 pixels is no aligned overlap.
    assert {made.plan.tile for made in blended} == {(32, 32), (64, 64), (160, 176)}
    assert all(made.plan.stitch == "blend" for made in blended)
    asked = job_of(files, stitch="blend", tile=(96, 96))
    assert network.candidates(asked) == [asked]


def test_candidates_that_do_not_fit_the_memory_are_left_out(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "CORES", (32, 64, 4096))
    least = job_of(files, stitch="blend", tile=(64, 64)).plan.projection.host_total
    made = job_of(files, stitch="blend", tile=(32, 32))
    limited = replace(made, options=replace(made.options, tile=None))
    limited = replace(limited, machine=replace(made.machine, resources=replace(made.resources, host_bytes=least)))
    assert [each.plan.tile for each in network.candidates(limited)] == [(32, 32), (64, 64)]


def test_blocks_in_flight_hold_a_tile_for_each_thread(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "wide.tif"
    profile = {"driver": "GTiff", "height": 2600, "width": 2600, "count": 3, "dtype": "uint8", "photometric": "rgb"}
    with rasterio.open(path, "w", sparse_ok=True, **profile):
        pass
    card = load_model(files / "net.safetensors").card
    model = Model.of(build("linear", classes=3, bands=3), replace(card, architecture="linear", arguments={}))
    options = SegmentOptions(device="cpu", stitch="exact")
    few, many, asked = (
        prepare(path, model, replace(options, threads=threads, block=block))
        for threads, block in ((2, None), (8, None), (8, (2048, 2048)))
    )
    assert [blocks_of_large_tiles(each) for each in (few, many, asked)] == [(2048, 2048), (4096, 4096), (2048, 2048)]


def blocks_of_large_tiles(made: Job) -> tuple[int, int]:
    """The block that a candidate has whose core, and tile, are 2048 pixels."""
    (found,) = (each for each in network.candidates(made) if each.plan.core == (2048, 2048))
    return found.plan.block


def test_windows_of_all_blocks_are_read(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job_of(files, block=(64, 64), tile=(64, 64), stitch="blend")
    assert made.plan.block_count == 9
    expected = {block_reads(made, index) for index in made.plan.blocks()}
    assert block_reads(made, BlockIndex(0, 0)).origin == (0, 0)
    seen: set[Window] = set()
    real = type(made.source.open()).read

    def reading(self: Any, window: Window, out: Any = None) -> Any:
        seen.add(window)
        return real(self, window, out)

    monkeypatch.setattr("tilepipe.raster.reader.Reader.read", reading)
    found = read_figure(made, 0.5)  # time for all nine on a busy machine
    assert seen == expected
    assert found.threads == made.resources.blocks
    centre = block_reads(made, BlockIndex(1, 1))
    assert found.window == centre.shape
    assert found.factor == pytest.approx(centre.area / 64**2)


def test_a_single_block_is_read_in_strips(files: Path) -> None:
    made = job_of(files, block=None)
    assert made.plan.block_count == 1
    assert read_figure(made, SECONDS).together > 0


class SlowBackend:
    """A backend whose windows take a while; it notes whether it was closed while one was read."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.reading, self.lock = backend, 0, threading.Lock()
        self.closed_early = False

    def fetch(self, bands: Any, window: Window, out: Any) -> None:
        with self.lock:
            self.reading += 1
        time.sleep(0.002 if window.rows.start == window.cols.start == 0 else 0.05)
        self.backend.fetch(bands, window, out)
        with self.lock:
            self.reading -= 1

    def fetch_mask(self, bands: Any, window: Window) -> Any:
        return self.backend.fetch_mask(bands, window)

    def close(self) -> None:
        self.closed_early |= self.reading > 0
        self.backend.close()


def test_staging_that_is_stopped_ends_before_its_files_close(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiled.tif"
    profile = {"driver": "GTiff", "height": 256, "width": 256, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", tiled=True, blockxsize=16, blockysize=16, photometric="rgb", **profile) as tif:
        tif.write(np.random.default_rng(0).integers(0, 255, (3, 256, 256), dtype=np.uint8))
    monkeypatch.setattr("tilepipe.raster.ingest._layout", small_shards())
    made: list[SlowBackend] = []
    real = GdalRecipe.backend

    def slow(recipe: GdalRecipe) -> SlowBackend:
        made.append(SlowBackend(real(recipe)))
        return made[-1]

    monkeypatch.setattr(GdalRecipe, "backend", slow)
    job = prepare(path, str(files / "net.safetensors"), SegmentOptions(device="cpu"))
    found = stage_figure(job, tmp_path, 0.001)
    assert (found.complete, found.needed) == (False, None)
    assert found.rate > 0
    assert made
    assert not any(backend.closed_early for backend in made)
    assert [each.name for each in tmp_path.iterdir()] == ["tiled.tif"]


def small_shards() -> Any:
    """`ingest._layout` with shards of 16 x 16 pixels."""
    from tilepipe.raster import ingest

    real = ingest._layout
    return lambda raw, chunk, memory, workers: real(raw, 16, 2 * 2 * 16 * 16 * 3 * workers, workers)


def test_blocks_of_the_run_are_whole_and_in_the_middle(files: Path) -> None:
    plan = job_of(files, block=(32, 32), tile=(64, 64), stitch="blend").plan  # 5 x 6 blocks
    assert whole.middle(plan, 1) == Window.of(64, 96, 64, 96)
    assert whole.middle(plan, 3 * 32 * 32) == Window.of(64, 96, 32, 128)
    assert whole.middle(plan, 13 * 32 * 32) == Window.of(32, 96, 0, 170)
    assert whole.middle(plan, 1e9) == plan.region
    part = job_of(files, block=(32, 32), tile=(64, 64), stitch="blend", region="10:100,20:150").plan
    assert whole.middle(part, 1e9) == Window.of(10, 100, 20, 150)
    assert whole.middle(part, 1) == Window.of(42, 74, 84, 116)


def test_the_region_is_that_of_the_outputs(files: Path) -> None:
    made = job_of(files)
    outputs = Window.of(32, 96, 0, 170)
    text = whole.region_text(made.grid, outputs)
    assert job_of(files, region=text).plan.region == outputs


def test_peak_memory_sees_what_was_held_meanwhile() -> None:
    with whole.peak_memory() as before:
        time.sleep(0.05)
    with whole.peak_memory() as during:
        held = np.ones(32 << 20, np.uint8)
        time.sleep(0.2)
        del held
    assert during.size - before.size > 24 << 20


def test_blocks_that_are_written_are_piecewise_constant(files: Path) -> None:
    made = job_of(files, confidence=True, probabilities="float16")
    maps = patches(made.spec(), (96, 80))
    assert maps.labels is not None
    assert set(np.unique(maps.labels)) <= {0, 1, 2}
    assert (maps.labels[:, 1:] == maps.labels[:, :-1]).mean() > 0.8
    assert maps.confidence is not None
    assert (maps.confidence.shape, maps.confidence.dtype) == ((96, 80), np.uint8)
    assert maps.probabilities is not None
    assert (maps.probabilities.shape, maps.probabilities.dtype) == ((3, 96, 80), np.float16)


# ---- the whole ----


def test_bench_measures_every_part(files: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    options = SegmentOptions(device="cpu", block=(96, 96), threads=2, confidence=True)
    how = BenchOptions(SECONDS, str(tmp_path))
    report = bench([files / "image.tif"], str(files / "net.safetensors"), options, how, heard.append)
    assert list(tmp_path.iterdir()) == [], "what was written is removed"
    assert len(heard) == 7
    assert_positive(report)
    assert set(report.rates) == {"read", "network", "label", "write"}
    assert report.bound.rate == min(report.rates.values())
    assert [kernel.used for kernel in report.kernels] == [True, False, False]
    assert report.whole.blocks == 4
    assert report.suggestion.options() == {"tile": [160, 176], "block": [96, 96], "threads": 2}


def test_fewer_threads_are_tried_and_all_get_a_second_chance(
    files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, threads = job_of(files, threads=None), []
    made = replace(made, machine=replace(made.machine, resources=replace(made.resources, threads=4)))

    def measured(job: Job, networks: Any, device: Any, seconds: float, how: network.Pass) -> ForwardFigure:
        threads.append(how.threads)
        # All threads are slow when they are measured first, and fast when they are measured again.
        return replace(figure(160, 1.0 if len(threads) == 1 else 3.0, threads=how.threads), tile=job.plan.tile)

    monkeypatch.setattr(network, "forward", measured)
    bench = _Bench(["image.tif"], made, BenchOptions(SECONDS), tmp_path, lambda _: None, None)
    figures = bench._forward({})
    assert threads == [4, 2, 4]
    assert [(each.threads, each.rate) for each in figures] == [(4, 3.0), (2, 3.0)]


@pytest.mark.slow
def test_bench_of_several_models_leaves_tiles_to_the_plan(files: Path, tmp_path: Path) -> None:
    models = [str(files / "net.safetensors")] * 2
    options = SegmentOptions(device="cpu", block=(96, 96), threads=1)
    report = bench([files / "image.tif"], models, options, BenchOptions(SECONDS, str(tmp_path)))
    assert_positive(report)
    assert "tile" not in report.suggestion.options()
    assert len(report.forward) == 1
    assert any("several models" in note for note in report.notes)


def test_bench_of_blending_counts_overlaps(files: Path, tmp_path: Path) -> None:
    options = SegmentOptions(device="cpu", stitch="blend", tile=(64, 64), block=(96, 96), threads=1)
    report = bench([files / "image.tif"], str(files / "net.safetensors"), options, BenchOptions(SECONDS, str(tmp_path)))
    assert_positive(report)
    assert set(report.rates) == {"read", "network", "blend", "write"}
    accumulated = {kernel.name: kernel.rate for kernel in report.kernels}["accumulate"]
    assert report.rates["blend"] < accumulated


def assert_positive(report: BenchReport) -> None:
    """Every figure is positive and finite, and the report is JSON."""
    found = report.to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    for name in ("read", "forward", "kernels", "write", "whole", "products", "rates", "bound", "copy", "seconds"):
        for value in numbers(found[name]):
            assert math.isfinite(value), name
            assert value >= 0, name
    zero = {"nodata", "device_bytes", "projected_device_bytes"}
    for name, value in found["whole"].items():
        assert name in zero or isinstance(value, str) or value > 0, name
    for group in (found["forward"], found["kernels"]):
        for each in group:
            assert all(value > 0 for value in numbers(each)), each
    assert report.whole.busy > 0
    if len(report.subject.models) == 1:
        # The tiles' bare time over the run's: how long both took is the machine's business, the share follows.
        whole = report.whole
        pixels = [whole.tiles * each.tile[0] * each.tile[1] / 1e6 for each in report.forward]
        shares = [each / whole.network_rate / whole.seconds for each in pixels]
        assert any(math.isclose(share, whole.busy) for share in shares), (whole.busy, shares)


def numbers(value: Any) -> list[float]:
    """All numbers in JSON values, flags left out."""
    if isinstance(value, dict):
        return [number for each in value.values() for number in numbers(each)]
    if isinstance(value, list | tuple):
        return [number for each in value for number in numbers(each)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []
