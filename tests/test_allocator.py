"""An allocator that keeps what is freed: which processes have it, and that the user's own choice stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tilepipe import allocator
from tilepipe.allocator import COMMANDS, KEEPING, VARIABLE, worker_environment
from tilepipe.cli import app
from tilepipe.schedule import Pool, connect

pytestmark = pytest.mark.skipif(not (worker_environment() or VARIABLE in os.environ), reason="not with glibc, or a GPU")

PROBE = """
import os, sys
sys.argv = ["tilepipe", *sys.argv[1:]]
from tilepipe.allocator import keeps_freed_memory, start_keeping
start_keeping()
print(os.getpid(), keeps_freed_memory(), os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:], sep="|")
"""


def started(*words: str, **variables: str) -> list[str]:
    """What a process of these words says of itself after `start_keeping`; its number comes first."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE} | variables
    command = [sys.executable, "-c", PROBE, *words]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        said, _ = process.communicate()
        assert process.returncode == 0
        number, *rest = said.strip().split("|")
        assert int(number) == process.pid, "signals still find it"
        return rest


def test_commands_that_run_networks_start_with_it() -> None:
    assert started("segment", "in put.tif", "--tile", "64") == [
        "True",
        KEEPING,
        "segment",
        "in put.tif",
        "--tile",
        "64",
    ]


def test_others_do_not_and_a_users_choice_stands() -> None:
    assert started("status", "segment") == ["False", "None", "status", "segment"]
    own = "glibc.malloc.mmap_threshold=65536"
    assert started("segment", **{VARIABLE: own}) == ["False", own, "segment"]


def test_all_that_it_names_are_commands() -> None:
    assert {command.callback.__name__ for command in app.registered_commands if command.callback} >= COMMANDS


def test_worker_processes_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with connect(Pool(workers=2, threads=1)) as client:
        said = client.run(os.environ.get, VARIABLE)
    assert list(said.values()) == [KEEPING] * 2


def test_not_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(allocator, "_DEVICES", (str(tmp_path),))
    assert worker_environment() == {}
