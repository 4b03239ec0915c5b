"""Telling of a training run, on stderr: a bar on a terminal, a line now and then elsewhere, or JSON lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from tilepipe.cli.progress import EVERY, JSON_EVERY, log_event, say
from tilepipe.cli.show import duration

if TYPE_CHECKING:
    from tilepipe.training.loop import Told


class TrainingTeller(Protocol):
    """Where a run's progress and notes go."""

    def __call__(self, told: Told) -> None:
        """Tells how far the run is."""

    def note(self, message: str) -> None:
        """Tells something the user should know."""


class _Lines:
    """A line, or an event, each so many seconds and at the end."""

    def __init__(self, pause: float, show: Callable[[Told], None], note: Callable[[str], None]) -> None:
        self._pause, self._show, self._note, self._last = pause, show, note, float("-inf")

    def __call__(self, told: Told) -> None:
        now = time.monotonic()
        if now - self._last >= self._pause or told.step == told.steps:
            self._last = now
            self._show(told)

    def note(self, message: str) -> None:
        self._note(message)


@contextmanager
def training_teller(quiet: bool, log_json: bool) -> Iterator[TrainingTeller]:
    """The way of telling that the options and stderr call for."""
    if log_json:
        yield _Lines(JSON_EVERY, _event, lambda message: log_event("note", message=message))
    elif quiet:
        yield _Lines(float("inf"), lambda _: None, lambda _: None)
    elif sys.stderr.isatty():
        with _bar() as teller:
            yield teller
    else:
        yield _Lines(EVERY, lambda told: say(sentence(told)), lambda message: say(f"note: {message}"))


@contextmanager
def _bar() -> Iterator[TrainingTeller]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)

        def show(told: Told) -> None:
            bar.update(task, completed=told.step, total=told.steps, description=", ".join(_words(told)))

        def note(message: str) -> None:
            bar.console.print(f"tilepipe: note: {message}", markup=False, highlight=False, soft_wrap=True)

        yield _Lines(0.0, show, note)


def sentence(told: Told) -> str:
    """How far a run is, in words."""
    return ", ".join([f"step {told.step} of {told.steps}", *_words(told)])


def _words(told: Told) -> list[str]:
    words = [f"loss {told.loss:.4f}"]
    if told.best >= 0:
        words.append(f"mean IoU {told.best:.4f}")
    if told.seconds > 0:
        words.append(f"{told.windows / told.seconds:.1f} windows/s")
    left = seconds_left(told)
    if left is not None and told.step < told.steps:
        words.append(f"{duration(left)} left")
    return words


def seconds_left(told: Told) -> float | None:
    """Seconds until the end at this run's pace, validations included; None before there is one."""
    if not told.done or not told.seconds:
        return None
    return (told.steps - told.step) * told.seconds / told.done


def _event(told: Told) -> None:
    log_event("training", **told._asdict(), seconds_left=seconds_left(told))
