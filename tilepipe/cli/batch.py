"""`batch`: many rasters, one after another, by one runner or several."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilepipe.cli.arguments import add_defaults, option, spread, typed
from tilepipe.cli.batch_words import batch_text, plans_text, result_text
from tilepipe.cli.failures import BAD_INPUT, ClickError, explain
from tilepipe.cli.jobs import DryRun
from tilepipe.cli.manifest import Legal, Row, named_output, read_defaults, read_rows, refuse_missing, several
from tilepipe.cli.model_options import ModelOptions
from tilepipe.cli.options import OUTPUT, TALK, FileOptions, JobOptions, LabelOptions, LongTalk
from tilepipe.cli.progress import Teller, teller
from tilepipe.errors import UsageError
from tilepipe.progress import Progress
from tilepipe.targets import write_whole

if TYPE_CHECKING:
    from tilepipe.batch import BatchSummary, Scene, SceneResult
    from tilepipe.sharding import Shard

LIST = "The list"
GROUPS = (ModelOptions, LabelOptions, JobOptions)
"""The options that a row of a manifest may have, too."""


def _legal(context: typer.Context) -> Legal:
    names = {name for group in GROUPS for name in group.__dataclass_fields__}
    parameters = context.command.params
    return {str(each.name): bool(getattr(each, "multiple", False)) for each in parameters if each.name in names}


def _read_manifest(context: typer.Context, jobs: list[str]) -> list[str]:
    """The words, after a manifest's [defaults] became the context's; the callback of the argument."""
    if not context.resilient_parsing:
        add_defaults(context, "manifest", read_defaults(jobs, _legal(context)))
    return jobs


Jobs = Annotated[
    list[str],
    typer.Argument(
        metavar="JOBS",
        show_default=False,
        is_eager=True,
        callback=_read_manifest,
        help="A manifest, a folder of rasters, or rasters and patterns, each raster of which is a scene. A .csv has "
        "the columns input, output and any options; a .toml has a table of defaults and a scene table for each scene. "
        "Paths in it count from its folder, and an input there may be a pattern, read as one mosaic.",
    ),
]


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """Which scenes are done, where they go, and what is told of them."""

    output: Annotated[
        str | None,
        option(
            "--output",
            metavar="DIR",
            panel=LIST,
            variable="BATCH_OUTPUT",
            help="Where the map of a scene goes whose row does not say: DIR/NAME.zarr, by the scene's name.",
        ),
    ] = None
    shard: Annotated[
        str | None,
        option(
            "--shard",
            metavar="I/N|auto|auto/N",
            panel=LIST,
            help="Only the I-th of N parts of the list. auto: the part that is this job's in an array job of SLURM, "
            "Grid Engine, LSF, AWS Batch or Google; auto/N where the scheduler does not tell N (Kubernetes, PBS) and "
            "counts from 0.",
        ),
    ] = None
    wait: Annotated[
        bool,
        option(
            "--wait/--no-wait",
            panel=LIST,
            help="Wait at the end for scenes that other runners work at; else they are reported as busy.",
        ),
    ] = False
    overwrite: Annotated[
        bool,
        option(
            "--overwrite/--no-overwrite",
            panel=OUTPUT,
            help="Replace outputs that another job made: other settings, another model, a raster that changed "
            "since. Those of this very job stay.",
        ),
    ] = False
    summary: Annotated[
        str | None,
        option("--summary", metavar="FILE.json", panel=TALK, help="Also write what --json prints to a file."),
    ] = None
    dry_run: DryRun = False


@spread
def batch(
    jobs: Jobs,
    network: ModelOptions,
    labels: LabelOptions,
    job: JobOptions,
    how: BatchOptions,
    talk: LongTalk,
    files: FileOptions,  # noqa: ARG001 - read already
    context: typer.Context,
) -> None:
    """Write the label maps of many rasters.

    The same command does what is not done: finished scenes stay, unfinished ones are resumed, bad ones are reported
    at the end. Several runners may work at one list, on one machine or many. Of an option, what the scene's own row
    says counts first, then the command line, the environment, --config, and the manifest's defaults.
    """
    scenes = make_scenes(read_rows(jobs, _legal(context)), Common(context, network, labels, job, how))
    shard = _shard(how.shard)
    if how.dry_run:
        from tilepipe.batch import plan_batch

        plans = list(plan_batch(scenes, shard))
        print(json.dumps([each.to_json() for each in plans]) if talk.json else plans_text(plans))
        raise typer.Exit(BAD_INPUT if any(each.state == "failed" for each in plans) else 0)
    if how.summary is not None and not os.path.isdir(os.path.dirname(os.path.abspath(how.summary))):
        raise UsageError(f"--summary {how.summary} would be in a folder that is not there; make it first")
    with teller(talk.quiet, talk.log_json) as tell:
        done = _run(scenes, shard, how, tell)
        if done.stopped is not None:
            tell.note("stopped; the same command resumes")
    told = json.dumps(done.to_json())
    print(told if talk.json else batch_text(done))
    if how.summary is not None:
        write_whole(how.summary, f"{told}\n".encode())
    raise typer.Exit(done.exit_code)


@dataclass(frozen=True, slots=True)
class Common:
    """What counts for all scenes, as far as their rows do not say otherwise."""

    context: typer.Context
    """Of the command, which knows the options' types."""
    network: ModelOptions
    labels: LabelOptions
    job: JobOptions
    how: BatchOptions

    def scene(self, row: Row) -> Scene:
        """The scene that a row names; raises TilepipeError, or typer's error, for a value that is not legal."""
        from tilepipe.batch import Scene

        network, labels, job = (
            typed(self.context, group, row.values) for group in (self.network, self.labels, self.job)
        )
        options = job.resolve(**network.resolve(), **labels.resolve())
        if self.how.overwrite:
            options = replace(options, overwrite="changed")
        output = row.output
        if output is None:
            if self.how.output is None:
                raise UsageError("there is no output; give --output DIR, or a manifest with outputs")
            output = named_output(row, self.how.output)
        return Scene(row.inputs, output, network.models(), options, row.place)


def make_scenes(rows: list[Row], common: Common) -> list[Scene]:
    """The rows' scenes, once nothing is wrong with them that can be known before they run; else TilepipeError."""
    from tilepipe.batch import check_outputs

    if common.how.output is not None and os.path.isfile(common.how.output):
        raise UsageError(f"--output {common.how.output} is a file; name a folder")
    # What is wrong for all is said once, without a row.
    common.job.resolve(**common.network.resolve(), **common.labels.resolve())
    scenes, problems = [], []
    for row in rows:
        try:
            scenes.append(common.scene(row))
        except (ValueError, ClickError) as error:
            message = explain(error).message
            if not row.place:
                raise
            problems.append(f"{row.place}: {message}")
    if problems:
        raise UsageError(several(problems))
    check_outputs(scenes)
    refuse_missing(rows)
    return scenes


def _shard(text: str | None) -> Shard | None:
    from tilepipe.sharding import parse_shard

    return None if text is None else parse_shard(text, os.environ)


def _run(scenes: list[Scene], shard: Shard | None, how: BatchOptions, tell: Teller) -> BatchSummary:
    """Runs the scenes, telling of each."""
    from tilepipe.batch import Watch, segment_batch
    from tilepipe.schedule import stop_on_signals
    from tilepipe.sharding import array_job

    if shard is None and (found := array_job(os.environ)) is not None:
        tell.note(f"{found.index} is set: with --shard auto each job of the array would do its own part of the list")

    class Telling(Watch):
        """Tells of each scene, and of each note once."""

        def __init__(self) -> None:
            self.heard: set[str] = set()

        def begin(self, scene: Scene, number: int, total: int) -> None:
            tell.scene(scene.name, number, total)

        def announce(self, job: Any) -> None:
            self._note(job.notes)

        def progress(self, state: Progress) -> None:
            tell(state)

        def end(self, result: SceneResult) -> None:
            self._note(result.notes)
            tell.result(result_text(result), result.exit_code != 0, **result.to_json())

        def _note(self, notes: tuple[str, ...]) -> None:
            for note in notes:
                if note not in self.heard:
                    self.heard.add(note)
                    tell.note(note)

    with stop_on_signals() as stop:
        return segment_batch(scenes, shard=shard, wait=how.wait, watch=Telling(), stop=stop)
