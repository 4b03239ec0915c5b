"""Overviews of a store: coarser maps for viewers, made at the end of a job or later."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from tilepipe.errors import StoppedError
from tilepipe.progress import Progress
from tilepipe.schedule import Stop
from tilepipe.store.output import OutputStore, create_or_resume, open_store
from tilepipe.store.overviews import write_overviews
from tilepipe.store.pyramid import Pyramid

WORK = "overviews"
"""What progress is told of as."""


def make_overviews(
    path: str | os.PathLike[str],
    overwrite: bool = False,
    *,
    progress: Callable[[Progress], None] | None = None,
    stop: Stop | None = None,
) -> list[int]:
    """The factors of the overviews that the store at a path or URL now has: 2, 4, ... until 512 pixels hold the map.

    Overviews that are there stay, unless `overwrite`; an interrupted call is resumed. Raises StoreError for an
    unfinished store, StoreBusyError where another process writes to it, StoppedError after a request to stop.
    """
    with create_or_resume(path, open_store(path).spec) as store:
        return add_overviews(store, overwrite, progress, stop or Stop())


def add_overviews(
    store: OutputStore, overwrite: bool, progress: Callable[[Progress], None] | None, stop: Stop
) -> list[int]:
    """As `make_overviews`, of a store that this process holds the lease of."""
    pyramid, started = Pyramid.of(store.spec), time.perf_counter()
    whole, resumed = store.spec.shape[0] * store.spec.shape[1], None

    def tell(done: int, total: int, pixels: int) -> None:
        nonlocal resumed
        resumed = done if resumed is None else resumed
        if progress is not None:
            seconds = time.perf_counter() - started
            progress(Progress(done, total, resumed, pixels, whole, seconds, WORK))
        if stop.asked and done < total:
            raise StoppedError(
                f"stopped after {done} of {total} parts of the overviews; the same command resumes {store.path}",
                stop.exit_code,
            )

    write_overviews(store, pyramid, overwrite, tell)
    return [1 << level for level in range(1, pyramid.levels + 1)]
