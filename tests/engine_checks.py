"""Checks of the CUDA engine with its Triton steps and graphs, against the CPU's engine and against itself without.

Run by test_triton.py, with numba's kernels in its simulator and Triton's in its interpreter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from cuda_simulator import HostDevice, HostGraph, same_maps
from torch import Tensor, nn

from tilepipe.models import build
from tilepipe.predict.blend import window_weights
from tilepipe.predict.cpu import CpuEngine
from tilepipe.predict.cuda import CudaEngine
from tilepipe.predict.cuda_graph import Passes
from tilepipe.predict.cuda_steps import CudaSteps
from tilepipe.predict.maps import BlockJob, Wanted
from tilepipe.predict.prepare import prepare
from tilepipe.predict.scores import statistics_of
from tilepipe.window import Placement, Window

TILE, CLASSES = 16, 4
PLAIN = CudaSteps(False, False, False, 0)
CAPTURED = CudaSteps(False, False, False)
"""Graphs alone: Triton's interpreter takes long."""
MEAN, STD = (100.0, 90.0, 80.0), (50.0, 60.0, 70.0)


def network() -> nn.Module:
    torch.manual_seed(2)
    return build("segnet-basic", classes=CLASSES, bands=3, width=0.08).eval()


def engine(steps: CudaSteps, device: HostDevice, net: nn.Module | None = None, tile: int = TILE) -> CudaEngine:
    ready = prepare(network() if net is None else net, "float32", "cpu", steps)
    return CudaEngine(ready, statistics_of(MEAN, STD, "float32"), CLASSES, (tile, tile), device, steps)  # type: ignore[arg-type]


def block(dtype: type[np.generic], wanted: Wanted, tile: int = TILE) -> BlockJob:
    """2 x 2 tiles whose cores lie in their corners, so that each computes another part."""
    rng, core_side = np.random.default_rng(4), tile // 2
    size = tile + core_side
    values = rng.integers(0, 250, (3, size, size)).astype(dtype)
    valid = rng.random((size, size)) < 0.9
    valid[:3] = False
    places = []
    for row in (0, core_side):
        for col in (0, core_side):
            core = Window.of(row, row + core_side, col, col + core_side)
            places.append(Placement(Window.of(0, tile, 0, tile).shift(row, col), core, core, core))
    keep = np.ones((tile, tile), bool)
    keep[3:6, 2:9] = False
    return BlockJob(values, valid, keep, places, (tile, tile), wanted)


def check_engine() -> None:
    """Every stored type; exactly and blended; against the CPU, whose convolutions are other kernels."""
    statistics = statistics_of(MEAN, STD, "float32")
    ours = CpuEngine(prepare(network()), statistics, CLASSES, (TILE, TILE), 1)
    theirs = engine(CudaSteps(graph_pixels=0), HostDevice())
    for dtype in (np.uint8, np.uint16):
        job = block(dtype, Wanted(confidence=True))
        a, b = ours.exact(job), theirs.exact(job)
        same_maps(a[:2], b[:2], np.ones(job.shape, bool))
        assert len(np.unique(b.labels)) > 2
    weights = window_weights("hann", (TILE, TILE))
    a, b = ours.blend(job, weights), theirs.blend(job, weights)
    same_maps(a[:2], b[:2], np.ones(job.shape, bool))
    ours.close()


class CountingDevice(HostDevice):
    """Counts what is captured and replayed; `fails` says which capture fails."""

    def __init__(self, fails: int | None = None) -> None:
        super().__init__()
        self.captured = self.replayed = 0
        self.fails = fails

    def capture(self, work: Callable[[], None]) -> HostGraph:
        self.captured += 1
        if self.captured - 1 == self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def replay() -> None:
            self.replayed += 1
            work()

        graph = HostGraph(work)
        graph.replay = replay
        return graph


def check_graphs() -> None:
    """Replayed passes give the bytes of passes that run as they are, whichever part and order."""
    plain, wanted = engine(PLAIN, HostDevice()), Wanted(values="float32")
    device = CountingDevice()
    ours = engine(CAPTURED, device)
    jobs = [block(np.uint8, wanted), block(np.float32, wanted)]
    for job in (*jobs, *jobs):
        np.testing.assert_array_equal(ours.exact(job).values, plain.exact(job).values)
    assert (device.captured, device.replayed) == (4, 4 * 4 - 1), "the very first pass loads what the others use"
    weights = window_weights("hann", (TILE, TILE))
    found = ours.blend(jobs[0], weights), plain.blend(jobs[0], weights)
    np.testing.assert_array_equal(found[0].values, found[1].values)
    large = CountingDevice()
    engine(CudaSteps(False, False, False, TILE * TILE - 1), large).exact(jobs[0])
    assert large.captured == 0


def check_failures() -> None:
    """A pass that cannot be captured runs as it is from then on, and one line says so."""
    said: list[str] = []
    logging.getLogger("tilepipe.predict.cuda_graph").addHandler(handler := logging.Handler())
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    plain, job = engine(PLAIN, HostDevice()), block(np.uint8, Wanted(values="float32"))
    for fails in (0, 2):
        device = CountingDevice(fails)
        ours = engine(CAPTURED, device)
        for _ in range(3):
            np.testing.assert_array_equal(ours.exact(job).values, plain.exact(job).values)
        assert (device.captured, device.freed) == (fails + 1, 1)
        assert "operation not permitted when stream is capturing" in said[-1]
        assert "\n" not in said[-1]
    assert len(said) == 2


def check_many() -> None:
    """Only so many parts are captured; a network without parts has one graph for all."""
    device = CountingDevice()
    ready = prepare(network())
    passes, alone = Passes(ready, CLASSES, device, True), Passes(ready, CLASSES, device, False)
    with torch.inference_mode():
        for n in range(30):
            pixels, core = torch.randn(1, 3, TILE, TILE), Window.of(0, n % 15 + 1, 0, 8 + n // 15)
            ours, theirs = passes(pixels, core), alone(pixels, core)
            assert torch.equal(ours.scores, theirs.scores)
            assert ours.origin == theirs.origin
        assert device.captured == 25
        conv = prepare(nn.Conv2d(3, CLASSES, 3))
        device = CountingDevice()
        passes, alone = Passes(conv, CLASSES, device, True), Passes(conv, CLASSES, device, False)
        for core in (None, Window.of(0, 4, 0, 4), Window.of(4, 8, 0, 4)):
            pixels: Tensor = torch.randn(1, 3, TILE, TILE)
            assert torch.equal(passes(pixels, core).scores, alone(pixels, core).scores)
        assert (device.captured, device.replayed) == (1, 2)


def check_classifier() -> None:
    """Labels without scores, for a network with parts and one without; other maps come as before."""
    segnet = build("segnet", classes=CLASSES, bands=3, width=0.05).eval()
    plain = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, CLASSES, 3, padding=1))
    labels, shares = Wanted(confidence=True), Wanted(probabilities="uint8")
    for net, tile, wanted in ((segnet, 32, labels), (plain, 8, Wanted()), (plain, 8, shares)):
        ours, theirs = (engine(replace(CAPTURED, classifier=on), HostDevice(), net, tile) for on in (True, False))
        assert (ours.labelling is None, theirs.labelling is None) == (False, True)
        job = block(np.uint8, wanted, tile)
        expected = theirs.exact(job)[:3]
        for _ in range(2):
            same_maps(ours.exact(job)[:3], expected, np.ones(job.shape, bool))


CHECKS = (check_engine, check_graphs, check_failures, check_many, check_classifier)
