"""A job killed at any instant ends, once resumed, with the bytes of one that was never killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stores import STATE, VALUE_STATE, contents, expected, make_spec, make_store, memory_folder, value_spec, write_all

from tilepipe.errors import StoreError
from tilepipe.store.output import create_or_resume, open_store
from tilepipe.store.spec import StoreSpec

# Children are forked, since starting hundreds of them anew would take minutes; they use no library with threads.
context = multiprocessing.get_context("fork")

CALLS = ("write", "fsync", "replace", "link", "mkdir", "unlink", "rmdir")
SPEC = make_spec(shape=(32, 64), confidence=True, crs_wkt=None)
OTHER = make_spec(shape=(40, 30), crs_wkt=None, transform=None)
VALUES = value_spec(shape=(40, 30), crs_wkt=None, transform=None)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=memory_folder()) as found:
        yield Path(found)


class Killer:
    """Patches `os` so that the process dies at its n-th change to the disk; before it, or amid a write."""

    def __init__(self, fatal: int) -> None:
        self.count, self.fatal = 0, fatal
        for name in CALLS:
            setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            if self.count == self.fatal:
                if name == "write":
                    function(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call


def job(path: Path, spec: StoreSpec, overwrite: bool, fatal: int, calls: Any) -> None:
    killer = Killer(fatal)
    with create_or_resume(path, spec, overwrite) as store:
        write_all(store, expected(spec))
    calls.value = killer.count


def run_job(path: Path, spec: StoreSpec, overwrite: bool, fatal: int = 0) -> int:
    """Calls that the job made; 0 where it was killed."""
    calls = context.Value("i", 0)
    process = context.Process(target=job, args=(path, spec, overwrite, fatal, calls))
    process.start()
    process.join(60)
    assert process.exitcode == (0 if calls.value else -signal.SIGKILL)
    return int(calls.value)


def finished_blocks_are_whole(path: Path) -> None:
    try:
        store = open_store(path)
    except StoreError:
        return
    assert list(store.verify()) == []


@pytest.mark.parametrize(
    ("spec", "state", "step"),
    [
        (SPEC, STATE, 2),
        (VALUES, VALUE_STATE, 4),
        pytest.param(SPEC, STATE, 1, marks=pytest.mark.slow),
        pytest.param(VALUES, VALUE_STATE, 1, marks=pytest.mark.slow),
    ],
)
def test_every_instant_of_a_job(folder: Path, spec: StoreSpec, state: str, step: int) -> None:
    make_store(folder / "whole", spec)
    whole = contents(folder / "whole")
    total = run_job(folder / "counted", spec, False)
    assert total > 50
    for fatal in range(1, total + 1, step):
        path = folder / f"o{fatal}"
        assert run_job(path, spec, False, fatal) == 0
        finished_blocks_are_whole(path)
        make_store(path, spec)
        assert contents(path) == whole
        assert os.listdir(path / state / "tmp") == []


def test_a_job_that_is_killed_again_and_again(folder: Path) -> None:
    make_store(folder / "whole", SPEC)
    for growth in (2, 3):
        path, kills = folder / f"o{growth}", 0
        while not run_job(path, SPEC, False, fatal=20 + growth * kills):
            finished_blocks_are_whole(path)
            kills += 1
        assert kills > 2
        assert contents(path) == contents(folder / "whole")


@pytest.mark.parametrize(
    ("old", "new"),
    [(SPEC, OTHER), *(pytest.param(*kinds, marks=pytest.mark.slow) for kinds in ((SPEC, VALUES), (VALUES, OTHER)))],
)
def test_every_fifth_instant_of_an_overwriting_job(folder: Path, old: StoreSpec, new: StoreSpec) -> None:
    make_store(folder / "whole", new)
    whole = contents(folder / "whole")
    make_store(folder / "counted", old)
    total = run_job(folder / "counted", new, True)
    for fatal in range(1, total + 1, 5):
        path = folder / f"o{fatal}"
        make_store(path, old)
        assert run_job(path, new, True, fatal) == 0
        finished_blocks_are_whole(path)
        with create_or_resume(path, new, overwrite=True) as store:
            write_all(store, expected(new))
        assert contents(path) == whole
        assert sorted(os.listdir(path)) == sorted(os.listdir(folder / "whole"))


def slow_job(path: Path) -> None:
    fsync = os.fsync

    def slow(handle: int) -> None:
        time.sleep(0.002)
        fsync(handle)

    os.fsync = slow
    make_store(path, SPEC)


@pytest.mark.slow
def test_random_instants(folder: Path) -> None:
    make_store(folder / "whole", SPEC)
    chance = random.Random(7)
    for attempt in range(60):
        path = folder / f"o{attempt}"
        while True:
            process = context.Process(target=slow_job, args=(path,))
            process.start()
            process.join(chance.uniform(0.02, 0.5))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            finished_blocks_are_whole(path)
        assert process.exitcode == 0
        assert contents(path) == contents(folder / "whole")
