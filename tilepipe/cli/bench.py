"""`bench`: what a job's parts do per second on this machine, and which settings suit it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from tilepipe.cli.arguments import option, spread
from tilepipe.cli.bench_words import report_text, tuned_text
from tilepipe.cli.model_options import ModelOptions
from tilepipe.cli.options import OUTPUT, TALK, Config, JobOptions, LabelOptions, LongTalk
from tilepipe.cli.progress import log_event, say
from tilepipe.errors import StoppedError, UsageError

if TYPE_CHECKING:
    from tilepipe.bench.run import Note

Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[INPUT...]",
        show_default=False,
        help="Rasters, read as one mosaic, as `segment` takes them; without one a synthetic scene is made.",
    ),
]


@dataclass(frozen=True, slots=True)
class Measuring:
    """How to measure, and where the suggestion goes."""

    seconds: Annotated[
        float,
        typer.Option("--seconds", metavar="S", rich_help_panel=TALK, help="How long one measurement lasts, about."),
    ] = 3.0
    folder: Annotated[
        str | None,
        typer.Option(
            "--folder",
            metavar="DIR",
            rich_help_panel=OUTPUT,
            help="Measure writing here, and remove what was written; by default the system's temporary folder.",
        ),
    ] = None
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            metavar="TUNED.toml",
            rich_help_panel=OUTPUT,
            help="Write the suggested settings to this file, for `--tuned` of plan, segment and predict.",
        ),
    ] = None
    overwrite: Annotated[
        bool, option("--overwrite/--no-overwrite", panel=OUTPUT, help="Replace TUNED.toml if it is there.")
    ] = False


@spread
def bench(
    network: ModelOptions,
    labels: LabelOptions,
    job: JobOptions,
    talk: LongTalk,
    measuring: Measuring,
    inputs: Inputs = None,
    config: Config = None,  # noqa: ARG001 - its callback has read it
) -> None:
    """Measure this machine.

    Reading, staging, the network per tile, the kernels, writing, and the whole job, in megapixels per second; then
    what bounds the job, and the tile, block and threads that suit it.
    """
    output = measuring.output
    check_target(output, measuring.overwrite)
    options = job.resolve(**network.resolve(), **labels.resolve())
    models = network.models()
    from tilepipe.bench.run import BenchOptions
    from tilepipe.bench.run import bench as measure

    with ended_by_signals():
        report = measure(inputs or (), models, options, BenchOptions(measuring.seconds, measuring.folder), _note(talk))
    if output is not None:
        Path(output).write_text(tuned_text(report))
    print(json.dumps(report.to_json()) if talk.json else report_text(report, output))


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A context that SIGTERM and Ctrl-C end, so that what was written is removed; then StoppedError."""
    heard: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt as error:
        code = 75 if signal.SIGTERM in heard else 130
        raise StoppedError("stopped; what was measured is lost, and what was written is removed", code) from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_target(output: str | None, overwrite: bool) -> None:
    """UsageError where the suggestion could not be written in the end."""
    if output is None:
        return
    if os.path.isdir(output) or not os.path.isdir(os.path.dirname(os.path.abspath(output))):
        raise UsageError(f"--output {output} cannot be a file there; name one in a folder that exists")
    if os.path.exists(output) and not overwrite:
        raise UsageError(f"--output {output} exists; choose another name, or --overwrite")


def _note(talk: LongTalk) -> Note:
    """Where it is told what is measured next."""
    if talk.log_json:
        return lambda what: log_event("measuring", what=what)
    return (lambda _: None) if talk.quiet else (lambda what: say(f"measuring: {what}"))
