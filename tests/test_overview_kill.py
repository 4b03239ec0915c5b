"""Overviews whose making is killed at any instant are, once made again, the bytes of undisturbed ones."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from pyramids import add, most_frequent
from stores import STATE, contents, expected, make_spec, make_store
from test_store_kill import Killer

from tilepipe.errors import StoreError
from tilepipe.store.output import create_or_resume, open_store

# Forked, as the store's own tests of this kind are: kernels are compiled before, and zarr starts its thread anew.
context = multiprocessing.get_context("fork")

SPEC = make_spec(shape=(20, 30), shard=(16, 16), chunk=(8, 8), confidence=True, crs_wkt=None)
CUT = {"smallest": 8, "square": 16, "chunk": 8}
"""Two levels: one of shards, one joined."""


def make(path: Path) -> None:
    add(path, **CUT)


def replace_map(path: Path) -> None:
    create_or_resume(path, SPEC, overwrite=True).close()


def run(job: Callable[[Path], None], path: Path, fatal: int = 0) -> int:
    """Changes to the disk that the job made; 0 where it was killed at one."""
    calls = context.Value("i", 0)

    def work() -> None:
        killer = Killer(fatal)
        job(path)
        calls.value = killer.count

    process = context.Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == (0 if calls.value else -signal.SIGKILL)
    return int(calls.value)


def what_is_said_to_be_there_is_there(path: Path) -> None:
    """A reader that goes by the group's layout finds whole levels, and so does one that goes by the marker."""
    try:
        open_store(path)
    except StoreError:
        return
    layout = zarr.open_group(path, mode="r").attrs["multiscales"]["layout"]  # type: ignore[call-overload,index]
    marked = (path / STATE / "overviews" / "done.json").exists()
    assert len(layout) in ((3,) if marked else (1, 3))
    whole: Any = expected(SPEC)["labels"]
    for level in layout[1:]:
        factor = int(level["transform"]["scale"][0])
        found = zarr.open_array(path, path=f"{level['asset']}/labels", mode="r")[:]
        assert (found == most_frequent(whole, factor, 255)).all()


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_every_instant_of_making_them(memory_path: Path, step: int) -> None:
    make_store(memory_path / "bare", SPEC)
    shutil.copytree(memory_path / "bare", memory_path / "whole")
    make(memory_path / "whole")
    shutil.copytree(memory_path / "bare", memory_path / "counted")
    total = run(make, memory_path / "counted")
    assert total > 50
    for fatal in range(1, total + 1, step):
        path = memory_path / f"o{fatal}"
        shutil.copytree(memory_path / "bare", path)
        # Threads make their changes in another order each time, and may need fewer: then it ended.
        if not run(make, path, fatal):
            what_is_said_to_be_there_is_there(path)
            make(path)
        assert contents(path) == contents(memory_path / "whole")
        assert os.listdir(path / STATE / "overviews") == ["done.json"]
        assert os.listdir(path / STATE / "tmp") == []


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_every_instant_of_replacing_the_map(memory_path: Path, step: int) -> None:
    make_store(memory_path / "old", SPEC)
    make(memory_path / "old")
    shutil.copytree(memory_path / "old", memory_path / "counted")
    total = run(replace_map, memory_path / "counted")
    for fatal in range(1, total + 1, step):
        path = memory_path / f"o{fatal}"
        shutil.copytree(memory_path / "old", path)
        assert run(replace_map, path, fatal) == 0
        what_is_said_to_be_there_is_there(path)
        replace_map(path)
        make_store(path, SPEC)
        make(path)
        assert contents(path) == contents(memory_path / "old")
