"""A job killed at any instant, many times, ends with the bytes of one that was never disturbed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from reference import model_of, scene, settled, write_raster

from tilepipe.checkpoint import save_model
from tilepipe.models import build
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import segment_raster
from tilepipe.store.output import open_store

SIDE = 420
OPTIONS = SegmentOptions(block=(64, 64), device="cpu", confidence=True, threads=2, tile=(192, 192), stitch="blend")


def job(raster: str, model: str, output: str, traces: str | None) -> None:
    """One run in a process of its own; with `traces`, every flush to disk is slow and says when it is under way."""
    if traces is not None:
        flush = os.fsync

        def slow(handle: int) -> None:
            mark = Path(traces) / f"{os.getpid()}-{time.monotonic_ns()}"
            mark.touch()
            time.sleep(0.02)
            flush(handle)
            mark.unlink()

        os.fsync = slow
    segment_raster(raster, output, model, OPTIONS)


def wait_for_write(traces: Path, process: multiprocessing.process.BaseProcess, seconds: float) -> bool:
    """Whether the process came to be inside a write before it ended."""
    end = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < end:
        if any(traces.iterdir()):
            return True
        time.sleep(0.001)
    return False


def kill_many(folder: Path, kills: int, inside: int) -> None:
    network = settled(build("segnet-basic", classes=4, width=0.06))
    card = model_of(network, 4).card
    arguments = {"classes": 4, "width": 0.06}
    from dataclasses import replace

    save_model(folder / "m.safetensors", network, replace(card, architecture="segnet-basic", arguments=arguments))
    raster = write_raster(folder / "in.tif", scene((SIDE, SIDE), seed=1))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tilepipe.pipeline", "test_kill"])
    out, traces, rng = folder / "killed.zarr", folder / "traces", random.Random(0)
    traces.mkdir()
    done, killed, killed_inside = [], 0, 0
    while killed < kills:
        for old in traces.iterdir():
            old.unlink()
        arguments_ = (str(raster), str(folder / "m.safetensors"), str(out), str(traces))
        process = context.Process(target=job, args=arguments_)
        process.start()
        if killed % 2:
            time.sleep(rng.uniform(0.2, 2.0))
        else:
            wait_for_write(traces, process, 30)
            time.sleep(rng.uniform(0, 0.015))
        writing = any(traces.iterdir())
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
        if process.exitcode == 0:
            break
        killed, killed_inside = killed + 1, killed_inside + writing
        if (out / "zarr.json").exists():
            done.append(len(open_store(out).done()))
    assert killed >= min(kills, 5)
    assert killed_inside >= inside
    assert done == sorted(done), "a finished block was lost"
    segment_raster(raster, out, folder / "m.safetensors", OPTIONS)
    segment_raster(raster, folder / "calm.zarr", folder / "m.safetensors", OPTIONS)
    assert content(out) == content(folder / "calm.zarr")
    assert list(open_store(out).verify()) == []


def content(root: Path) -> dict[str, bytes]:
    """Arrays and metadata, without the records and their timings."""
    files = (path for path in root.rglob("*") if path.is_file() and ".tilepipe" not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.mark.timeout(240)
def test_a_job_killed_in_the_middle_of_writes_ends_with_the_same_bytes(tmp_path: Path) -> None:
    kill_many(tmp_path, kills=8, inside=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_killed_fifty_times_ends_with_the_same_bytes(tmp_path: Path) -> None:
    kill_many(tmp_path, kills=50, inside=10)
