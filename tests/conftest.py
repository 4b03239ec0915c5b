"""What all tests share: one torch thread a process, since several run side by side; an environment without options."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from stores import memory_folder

settings.register_profile("tilepipe", deadline=None, derandomize=True)
settings.load_profile("tilepipe")


@pytest.fixture(autouse=True)
def _no_options_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TILEPIPE_") and name != "TILEPIPE_TEST_DATA":
            monkeypatch.delenv(name)


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """An empty folder where flushing many small files costs nothing, if there is such a place."""
    with tempfile.TemporaryDirectory(dir=memory_folder()) as found:
        yield Path(found)
