"""Checks of the CUDA kernels and engine, run by test_blend.py in numba's simulator: NUMBA_ENABLE_CUDASIM=1.

Prints one word for each check that held. The simulator has neither streams of other libraries nor shared arrays,
so `HostDevice` stands in for `tilepipe.predict.cuda_device.CudaDevice`, and kernels get host arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import BoundedSemaphore, Event, Lock
from typing import Any

import numpy as np
import pytest
import torch
from numba import cuda
from torch import nn

from tilepipe.errors import RunError
from tilepipe.predict import blend_cuda as kernels
from tilepipe.predict.blend import Strip, accumulate, finish, window_weights
from tilepipe.predict.cpu import CpuEngine
from tilepipe.predict.cuda import CudaEngine
from tilepipe.predict.cuda_device import check_kernels
from tilepipe.predict.cuda_steps import CudaSteps
from tilepipe.predict.maps import BlockJob, BlockMaps, Wanted
from tilepipe.predict.prepare import prepare
from tilepipe.predict.scores import Array, Patch, score_maps, statistics_of
from tilepipe.projection import RESIDENT
from tilepipe.window import Placement, Window

RNG = np.random.default_rng(5)
MEAN, STD = (100.0, 90.0, 80.0), (50.0, 60.0, 70.0)


class HostDevice:
    """What CudaDevice does, on the CPU and at once; `failures` calls of `computing` run out of memory."""

    def __init__(self, failures: int = 0) -> None:
        self.device, self.failures, self.freed = torch.device("cpu"), failures, 0
        self.launched: list[Any] = []
        self.room = BoundedSemaphore(RESIDENT)

    def stage(self, values: Array) -> torch.Tensor:
        return torch.from_numpy(values.copy())

    def upload(self, staged: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in staged]

    @contextmanager
    def computing(self) -> Iterator[None]:
        with torch.inference_mode():
            if self.failures:
                self.failures -= 1
                raise torch.OutOfMemoryError("out of memory")
            yield

    def run(self, kernel: Any, grid: tuple[int, int], threads: tuple[int, int], arguments: Sequence[Any]) -> None:
        self.launched.append(kernel)
        tensors = {n: a.numpy() for n, a in enumerate(arguments) if isinstance(a, torch.Tensor)}
        given = list(arguments)
        for n, array in tensors.items():  # the simulator takes contiguous arrays only
            given[n] = cuda.to_device(np.ascontiguousarray(array))
        kernel[grid, threads](*given)
        for n, array in tensors.items():
            array[...] = given[n].copy_to_host()

    def download(self, tensors: Sequence[torch.Tensor]) -> HostDownload:
        return HostDownload(tensors)

    def capture(self, work: Callable[[], None]) -> HostGraph:
        return HostGraph(work)

    def free(self) -> None:
        self.freed += 1


class HostGraph:
    """Runs what it captured again; captured, it has run on whatever its input held."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.replay = work
        work()


class HostDownload:
    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tensors

    def wait(self) -> list[Array]:
        return [tensor.numpy() for tensor in self.tensors]


def launch(kernel: Any, shape: tuple[int, int], *arguments: Any) -> list[Any]:
    """The arguments after one launch over `shape`; arrays go to the device and come back."""
    given = [cuda.to_device(a) if isinstance(a, np.ndarray) else a for a in arguments]
    kernel[kernels.blocks_for(shape), kernels.THREADS](*given)
    return [a.copy_to_host() if isinstance(b, np.ndarray) else a for a, b in zip(given, arguments, strict=True)]


def check_maps() -> None:
    scores = RNG.integers(-4, 5, (5, 7, 35)).astype(np.float32) + RNG.integers(0, 2, (1, 7, 35)).astype(np.float32)
    scores[1, 2, 3], scores[:, 4, 5], scores[2, 6, 6] = np.nan, -np.inf, -np.inf
    keep = np.ones((9, 37), bool)
    keep[5, 7] = False  # where scores[:, 4, 5] go
    patch = Patch(0, 0, 1, 2, 7, 35)
    defined = np.ones((9, 37), bool)
    defined[3, 5] = defined[5, 7] = False

    ours = np.zeros((9, 37), np.uint8), np.zeros((9, 37), np.uint8), np.zeros((5, 9, 37), np.uint8)
    count = score_maps(scores, False, patch, keep, *ours, (254.0, 0.5))
    empty = [np.zeros_like(a) for a in ours]
    out = launch(kernels.score_maps, (7, 35), scores, (1, 2), keep, *empty, (254.0, 0.5), np.zeros(1, np.int32))
    assert count == out[-1][0] == 1
    same_maps(ours, out[3:6], defined)

    weights = window_weights("gaussian", (7, 35))
    strip = Strip.empty(5, 9, 37)
    sums, state = np.zeros((6, 9, 37), np.float32), np.zeros((9, 37), np.int32)
    for other in (scores, scores[::-1].copy(), np.roll(scores, 1, 0)):
        accumulate(other, False, patch, keep, weights, strip)
        _, _, _, _, sums, state, _ = launch(
            kernels.accumulate, (7, 35), other, (1, 2), keep, weights, sums, state, np.zeros(1, np.int32)
        )
    planes = np.ascontiguousarray(strip.sums[..., :37].transpose(1, 0, 2))
    np.testing.assert_allclose(sums[:5][:, defined], planes[:, defined], atol=1e-6)
    np.testing.assert_array_equal(sums[5][defined], strip.weights[defined])
    np.testing.assert_array_equal((state & 3)[defined], strip.seen[defined])
    np.testing.assert_array_equal((state >> 2)[defined], strip.first[defined])
    finish(strip, (0, 9), keep, *ours, (254.0, 0.5))
    both = np.concatenate([planes, strip.weights[None]])
    both[:, ~defined] = 0
    out = launch(kernels.finish, (9, 37), both, (0, 9), *empty, (254.0, 0.5))
    same_maps(ours, out[2:5], defined & (strip.weights > 0))


def same_maps(ours: Sequence[Array | None], theirs: Sequence[Array | None], where: Array) -> None:
    np.testing.assert_array_equal(ours[0][where], theirs[0][where])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        if a is not None and b is not None:
            np.testing.assert_allclose(a[..., where].astype(int), b[..., where].astype(int), atol=1)


def engines(tile: int, device: HostDevice) -> tuple[CpuEngine, CudaEngine]:
    torch.manual_seed(0)
    network = prepare(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    statistics = statistics_of(MEAN, STD, "float32")
    return (
        CpuEngine(network, statistics, 4, (tile, tile), 1),
        CudaEngine(network, statistics, 4, (tile, tile), device, CudaSteps(False, False, False)),  # type: ignore[arg-type]
    )


def block(tile: int, step: int, count: int, wanted: Wanted) -> BlockJob:
    """A block of count x count tiles, `step` apart, with a masked corner."""
    size = tile + step * (count - 1)
    values = RNG.integers(0, 256, (3, size, size)).astype(np.uint8)
    valid = np.ones((size, size), bool)
    valid[: size // 2, : size // 3] = False
    starts = [step * n for n in range(count)]
    whole = Window.whole((tile, tile))
    places = [Placement(w := whole.shift(r, c), whole, w) for r in starts for c in starts]
    return BlockJob(values, valid, valid, places, (size, size), wanted)


def check_engine(name: str) -> None:
    wanted = Wanted(confidence=True, probabilities="uint8")
    job = block(14, 14 if name == "exact" else 9, 2, wanted)
    device = HostDevice()
    ours, theirs = engines(14, device)
    results: list[BlockMaps] = []
    for engine in (ours, theirs):
        results.append(engine.exact(job) if name == "exact" else engine.blend(job, window_weights("hann", (14, 14))))
    same_maps(results[0][:3], results[1][:3], np.ones(job.shape, bool))
    assert results[0][4:] == results[1][4:]
    assert (results[0].overlapped > 0) == (name == "blend")
    if name == "blend":
        assert device.launched.count(kernels.accumulate) == len(job.placements)
        assert device.launched.count(kernels.finish) == 2, "one for each row of tiles"
    assert theirs.output_shape(3) == ours.output_shape(3) == (14, 14)
    ours.close()


def check_values(name: str) -> None:
    """A network's own output from both engines."""
    for kind in ("float32", "float16"):
        job = block(14, 14 if name == "exact" else 9, 2, Wanted(values=kind))
        weights = window_weights("hann", (14, 14))
        ours, theirs = (
            engine.exact(job) if name == "exact" else engine.blend(job, weights) for engine in engines(14, HostDevice())
        )
        assert ours.values.dtype == theirs.values.dtype == np.dtype(kind)
        np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-5 if kind == "float32" else 1e-2, atol=1e-5)
        assert np.isnan(theirs.values).any(), "the masked corner"
        assert ours[4:] == theirs[4:]


def check_memory() -> None:
    job = block(8, 8, 1, Wanted())
    once, twice = HostDevice(failures=1), HostDevice(failures=2)
    engines(8, once)[1].exact(job)
    assert once.freed == 1
    with pytest.raises(RunError, match="smaller --tile, about 4 x 4"):
        engines(8, twice)[1].exact(job)


def check_check() -> None:
    """A machine on which numba cannot work is told in one line."""
    device: Any = HostDevice()
    check_kernels(device)

    def run(*_: Any) -> None:
        raise OSError("libnvvm.so is nowhere\nmuch more")

    device.run = run
    with pytest.raises(RunError, match=r"^numba cannot build kernels for cpu: libnvvm.so is nowhere; install [^\n]+$"):
        check_kernels(device)


def check_room() -> None:
    """However many threads have a block under way, the device never holds more than the plan has memory for."""
    device, holding, most = HostDevice(), 0, 0
    lock, full = Lock(), Event()

    def upload(staged: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        nonlocal holding, most
        with lock:
            holding += 1
            most = max(most, holding)
            if holding >= RESIDENT:
                full.set()
        return HostDevice.upload(device, staged)

    class Slow(HostDownload):
        def wait(self) -> list[Array]:
            nonlocal holding
            assert full.wait(60)
            with lock:
                holding -= 1
            return super().wait()

    device.upload, device.download = upload, Slow  # type: ignore[method-assign, assignment]
    (cpu, cuda_engine), job = engines(8, device), block(8, 8, 1, Wanted())
    with ThreadPoolExecutor(3 * RESIDENT) as threads:
        for maps in threads.map(lambda _: cuda_engine.exact(job), range(6 * RESIDENT)):
            np.testing.assert_array_equal(maps.labels, cpu.exact(job).labels)
    assert most == RESIDENT
    cpu.close()


if __name__ == "__main__":
    check_maps()
    print("maps")
    for mode in ("exact", "blend"):
        check_engine(mode)
        check_values(mode)
        print(mode)
    check_memory()
    print("memory")
    check_check()
    print("check")
    check_room()
    print("room")
