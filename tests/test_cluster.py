"""Jobs on dask clusters: the same bytes on any of them, also where a worker dies, joins late or has many threads."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from commands import run
from distributed import Client, LocalCluster
from reference import model_of, scene, settled, write_raster
from runs import saved
from stores import contents

import tilepipe
from tilepipe import schedule
from tilepipe.checkpoint import Model
from tilepipe.models import build
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import segment_raster
from tilepipe.schedule import Bounded, Pool, Stop, connect, map_bounded, resident
from tilepipe.store.output import open_store, stored_spec

CLASSES = 5
PIXELS = da.from_array(scene((330, 420), seed=6), chunks=((2, 1), (7, 233, 90), (419, 1)))
OPTIONS = SegmentOptions(tile=(272, 272), block=(160, 160), device="cpu", confidence=True)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a cluster of two processes."""
    with connect(Pool(workers=2, threads=1)) as client:
        yield client.scheduler.address


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in.tif and model.safetensors."""
    folder = tmp_path_factory.mktemp("cluster")
    arguments = {"classes": CLASSES, "width": 0.1}
    network = settled(build("segnet-basic", **arguments))
    card = replace(model_of(network, CLASSES).card, architecture="segnet-basic", arguments=arguments)
    saved(Model.of(network, card), folder / "model.safetensors")
    write_raster(folder / "in.tif", PIXELS.compute())
    return folder


@pytest.mark.parametrize("stitch", ["exact", pytest.param("blend", marks=pytest.mark.slow)])
def test_same_bytes_whatever_the_workers_threads_and_scheduler(
    tmp_path: Path, folder: Path, stitch: Any, scheduler: str
) -> None:
    outputs = []
    for number, more in enumerate(({"threads": 1}, {"threads": 3}, {"scheduler": scheduler})):
        out = tmp_path / f"out{number}.zarr"
        segment_raster(folder / "in.tif", out, folder / "model.safetensors", replace(OPTIONS, stitch=stitch, **more))
        outputs.append(contents(out))
    assert any(name.startswith("labels/c/") for name in outputs[0])
    assert outputs[1] == outputs[0]
    assert outputs[2] == outputs[0]
    lazy = tilepipe.segment(PIXELS, folder / "model.safetensors", replace(OPTIONS, stitch=stitch, confidence=False))
    part = np.s_[100:277, 3:301]
    with Client(scheduler):
        found = lazy[part].compute()
    np.testing.assert_array_equal(found, open_store(tmp_path / "out0.zarr").array()[part])


# ---- one of two processes is killed ----


def slow_flushes(folder: str) -> int:
    """Makes every flush to disk slow in a worker, and a file tell that it is under way; the worker's process number."""
    flush = os.fsync

    def slow(handle: int) -> None:
        mark = Path(folder, f"{os.getpid()}-{threading.get_ident()}")
        mark.touch()
        time.sleep(0.05)
        flush(handle)
        mark.unlink()

    os.fsync = slow
    return os.getpid()


class Killer(threading.Thread):
    """Kills a process while it writes, once a block is done; knows how many were."""

    def __init__(self, process: int, marks: Path, store: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.marks, self.store = process, marks, store
        self.done: int | None = None

    def run(self) -> None:
        end = time.monotonic() + 120
        while self.done is None and time.monotonic() < end:
            time.sleep(0.005)
            done = 0 if stored_spec(self.store) is None else len(open_store(self.store).done())
            if done and any(self.marks.glob(f"{self.process}-*")):
                os.kill(self.process, signal.SIGKILL)
                self.done = done


def test_a_worker_killed_in_the_middle_leaves_the_same_bytes(tmp_path: Path, folder: Path, scheduler: str) -> None:
    """The command on a cluster of two processes that talk over TCP."""
    assert scheduler.startswith("tcp://")
    small = replace(OPTIONS, block=(80, 80), region="0:240,0:320", threads=1)
    segment_raster(folder / "in.tif", tmp_path / "calm.zarr", folder / "model.safetensors", small)
    marks = tmp_path / "marks"
    marks.mkdir()
    with Client(scheduler, set_as_default=False) as client:
        processes = client.run(slow_flushes, str(marks))
        killer = Killer(next(iter(processes.values())), marks, tmp_path / "out.zarr")
        killer.start()
        command = ("segment", folder / "in.tif", tmp_path / "out.zarr", "--model", folder / "model.safetensors")
        sizes = ("--tile", "272", "--block", "80", "--region", "0:240,0:320", "--device", "cpu", "--threads", "1")
        result = run(*command, *sizes, "--confidence", "--scheduler", scheduler)
        assert result.exit_code == 0, result.output
        killer.join(10)
        assert killer.done is not None
        blocks = open_store(tmp_path / "out.zarr").blocks
        assert 0 < killer.done < blocks
        assert killer.process not in client.run(os.getpid).values()
    assert contents(tmp_path / "out.zarr") == contents(tmp_path / "calm.zarr")
    assert list(open_store(tmp_path / "out.zarr").verify()) == []


# ---- workers that others start ----


class Recipe:
    """What the workers hold: how many items use it at a time, now and at most."""

    def build(self, former: Recipe | None = None) -> Recipe:
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        self.met = threading.Event()
        return self


def meet(held: Recipe, wanted: int) -> int:
    """How many items there were at most, once there are as many as wanted, or after a moment."""
    with held.lock:
        held.now += 1
        held.most = max(held.most, held.now)
        if held.now >= wanted:
            held.met.set()
    held.met.wait(0.3)
    with held.lock:
        held.now -= 1
        return held.most


@pytest.fixture
def threads() -> Iterator[LocalCluster]:
    """A cluster without workers, whose workers have four threads."""
    with LocalCluster(n_workers=0, threads_per_worker=4, processes=False, dashboard_address=None) as cluster:
        yield cluster


def test_a_cluster_that_grows_gets_more_to_do(threads: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LOOK_SECONDS", 0.05)
    grow = threading.Timer(0.3, threads.scale, [1])
    grow.start()
    with Client(threads, set_as_default=False) as client, resident(client, "four", Recipe()) as name:
        assert max(map_bounded(client, name, meet, [4] * 8, Bounded(1, each_thread=1))) == 4
    grow.join()


def test_no_more_at_once_than_the_plan_has_memory_for(threads: LocalCluster) -> None:
    threads.scale(1)
    with Client(threads, set_as_default=False) as client, resident(client, "two", Recipe(), at_once=2) as name:
        assert max(map_bounded(client, name, meet, [4] * 6, Bounded(8))) == 2


@dataclass(frozen=True)
class Begun:
    """Builds a list of the items that were begun."""

    def build(self) -> list[int]:
        return []


def begin(begun: list[int], number: int) -> list[int]:
    begun.append(number)
    time.sleep(0.3)
    return begun


def test_after_a_request_to_stop_nothing_is_begun() -> None:
    stop, found = Stop(), []
    with connect(Pool(threads=1)) as client, resident(client, "begun", Begun()) as name:
        for begun in map_bounded(client, name, begin, range(20), Bounded(8, stop=stop)):
            found, stop.asked = begun, True
        results = len(found)
    assert 1 <= results <= 3, "what ran when stop was asked, and what began while that was heard"


def test_workers_that_do_not_answer_do_not_keep_a_stop_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent() -> list[str]:
        await asyncio.sleep(600)
        return []

    monkeypatch.setattr(schedule, "_begun", silent)
    monkeypatch.setattr(schedule, "ANSWER_SECONDS", 0.1)
    stop = Stop()
    with connect(Pool(threads=1)) as client, resident(client, "begun", Begun()) as name:
        for begun in map_bounded(client, name, begin, range(6), Bounded(4, stop=stop, grace=60)):
            found, stop.asked = begun, True
    assert 4 <= len(found) < 6, "all that was submitted ran, and no more was"
