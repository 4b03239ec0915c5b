"""Telling of a job as it runs, on stderr: a bar on a terminal, a line now and then elsewhere, or JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tilepipe.cli.show import duration
from tilepipe.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

EVERY = 10.0
"""Seconds between two plain lines."""
JSON_EVERY = 1.0


@dataclass(frozen=True, slots=True)
class Work:
    """What a job is called while it runs."""

    verb: str = "segmenting"
    unit: str = "blocks"


class Teller(Protocol):
    """Where a running job's progress and notes go."""

    def __call__(self, state: Progress) -> None:
        """Tells how far the job is."""

    def note(self, message: str) -> None:
        """Tells something the user should know."""

    def scene(self, name: str, number: int, total: int) -> None:
        """What is told from now on is of this raster of several."""

    def result(self, message: str, failed: bool, **fields: Any) -> None:
        """Tells what became of it: the message, or the fields in a log."""


class Silent:
    """Tells nothing."""

    def __call__(self, state: Progress) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Nothing."""

    def scene(self, name: str, number: int, total: int) -> None:
        """Nothing."""

    def result(self, message: str, failed: bool, **fields: Any) -> None:
        """Nothing."""


class Lines:
    """A plain line every ten seconds and at the end: for logs and pipes."""

    def __init__(self, work: Work) -> None:
        self._work, self._last = work, time.monotonic()
        self._scene = ""

    def __call__(self, state: Progress) -> None:
        """A line, where the last one is long enough ago."""
        now = time.monotonic()
        # Of one of several rasters the result is told at once.
        if now - self._last >= EVERY or (state.done == state.total and not self._scene):
            self._last = now
            say(self._scene + sentence(state, self._work.unit))

    def note(self, message: str) -> None:
        """A line of its own."""
        say(f"note: {message}")

    def scene(self, name: str, number: int, total: int) -> None:
        """Lines begin with it from now on."""
        self._scene = f"{_which(name, number, total)}: "

    def result(self, message: str, failed: bool, **fields: Any) -> None:
        """A line of its own."""
        say(self._scene + message)


class JsonLines:
    """One JSON object per event and line, at most one of progress per second: for machines."""

    def __init__(self) -> None:
        self._last = float("-inf")
        self._scene: dict[str, Any] = {}

    def __call__(self, state: Progress) -> None:
        """A progress event, where the last one is long enough ago."""
        now = time.monotonic()
        if now - self._last >= JSON_EVERY or state.done == state.total:
            self._last = now
            fields = {name: getattr(state, name) for name in Progress._fields}
            log_event("progress", **self._scene, **fields, rate=rate(state), seconds_left=seconds_left(state))

    def note(self, message: str) -> None:
        """A note event."""
        log_event("note", **self._scene, message=message)

    def scene(self, name: str, number: int, total: int) -> None:
        """A begin event; those that follow name the scene."""
        self._scene, self._last = {"scene": name}, float("-inf")
        log_event("begin", **self._scene, number=number, scenes=total)

    def result(self, message: str, failed: bool, **fields: Any) -> None:
        """An end event."""
        log_event("end", "error" if failed else "info", **{**self._scene, **fields, "message": message})


class Terminal:
    """A bar of blocks with megapixels per second and the time left."""

    def __init__(self, work: Work, bar: Bar) -> None:
        self._work, self._bar = work, bar
        self._scene = ""
        self._task = bar.add_task("starting", total=None, unit=work.unit, speed="", left="", resumed="")

    def __call__(self, state: Progress) -> None:
        """Moves the bar."""
        left = seconds_left(state)
        self._bar.update(
            self._task,
            description=self._scene + (state.work or self._work.verb),
            unit="parts" if state.work else self._work.unit,
            completed=state.done,
            total=state.total,
            speed=f"{rate(state):.2f} Mpx/s" if state.pixels else "",
            left="" if left is None else f"{duration(left)} left",
            resumed=f"{state.resumed} resumed" if state.resumed else "",
        )

    def note(self, message: str) -> None:
        """A line above the bar."""
        self._say(f"note: {message}")

    def scene(self, name: str, number: int, total: int) -> None:
        """Names it beside the bar, which begins anew."""
        self._scene = f"{_which(name, number, total)}: "
        fields: dict[str, Any] = {"unit": self._work.unit, "speed": "", "left": "", "resumed": ""}
        self._bar.reset(self._task, description=self._scene + "starting", **fields)

    def result(self, message: str, failed: bool, **fields: Any) -> None:
        """A line above the bar."""
        self._say(self._scene + message)

    def _say(self, message: str) -> None:
        self._bar.console.print(f"tilepipe: {message}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def teller(quiet: bool, log_json: bool, work: Work | None = None) -> Iterator[Teller]:
    """The way of telling that the options and stderr call for."""
    work = work or Work()
    if log_json:
        yield JsonLines()
    elif quiet:
        yield Silent()
    elif sys.stderr.isatty():
        with _bar() as bar:
            yield Terminal(work, bar)
    else:
        yield Lines(work)


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[resumed]}"),
    )
    return RichProgress(*columns, console=Console(stderr=True))


def rate(state: Progress) -> float:
    """Megapixels per second of this run."""
    return state.pixels / 1e6 / state.seconds if state.seconds > 0 else 0.0


def seconds_left(state: Progress) -> float | None:
    """Seconds until the end at this run's pace; None before there is one."""
    if not state.pixels or not state.seconds:
        return None
    return (state.total_pixels - state.pixels) * state.seconds / state.pixels


def sentence(state: Progress, unit: str) -> str:
    """How far a job is, in words."""
    words = [
        f"{state.work}: {state.done} of {state.total} parts" if state.work else f"{state.done} of {state.total} {unit}"
    ]
    if state.resumed:
        words.append(f"{state.resumed} from earlier runs")
    left = seconds_left(state)
    if left is not None:
        words.append(f"{rate(state):.2f} Mpx/s")
        if state.done < state.total:
            words.append(f"{duration(left)} left")
    return ", ".join(words)


def say(message: str) -> None:
    """A line on stderr, under the program's name."""
    print(f"tilepipe: {message}", file=sys.stderr, flush=True)


def _which(name: str, number: int, total: int) -> str:
    """A raster of several, in words."""
    return f"[{number}/{total}] {name}"


def log_event(event: str, level: str = "info", **fields: Any) -> None:
    """One JSON object on a line of stderr."""
    values = {"time": time.time(), "level": level, "event": event, **fields}
    short = {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}
    print(json.dumps(short), file=sys.stderr, flush=True)
