"""`segment`, `predict` and `plan`: a raster to a label map or to values, and what that would take."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilepipe.cli.arguments import option, spread
from tilepipe.cli.manifest import would_be_file
from tilepipe.cli.model_options import ModelOptions
from tilepipe.cli.options import (
    OUTPUT,
    TALK,
    FileOptions,
    JobOptions,
    LabelOptions,
    LongTalk,
    Overwrite,
    Talk,
)
from tilepipe.cli.progress import teller
from tilepipe.cli.words import plan_text, summary_text
from tilepipe.errors import UsageError

if TYPE_CHECKING:
    from tilepipe.job import Job
    from tilepipe.member import Models
    from tilepipe.options import SegmentOptions

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT... OUTPUT.zarr",
        show_default=False,
        help="Rasters or patterns such as 'tiles/*.tif', read as one mosaic, and last the store to write.",
    ),
]
Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        show_default=False,
        help="Rasters or patterns such as 'tiles/*.tif', read as one mosaic: anything GDAL opens, or zarr.",
    ),
]
Dtype = Annotated[
    str, option("--dtype", metavar="float16|float32", panel=OUTPUT, help="The type that values are stored in.")
]
DryRun = Annotated[
    bool, option("--dry-run/--no-dry-run", panel=TALK, help="Print the plan; compute and write nothing.")
]


@spread
def segment(
    paths: Paths,
    network: ModelOptions,
    labels: LabelOptions,
    job: JobOptions,
    talk: LongTalk,
    files: FileOptions,  # noqa: ARG001 - read already
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Write a raster's label map.

    INPUT is read as one mosaic; OUTPUT.zarr gets the labels. The same command resumes one that was stopped.
    """
    options = job.resolve(overwrite, **network.resolve(), **labels.resolve())
    run_job(paths, network.models(), options, talk, dry_run)


@spread
def predict(
    paths: Paths,
    network: ModelOptions,
    job: JobOptions,
    talk: LongTalk,
    files: FileOptions,  # noqa: ARG001 - read already
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Write a network's own output: values, not labels.

    INPUT is read as one mosaic; OUTPUT.zarr gets every channel of the network's output, tiled, exact and resumable
    as labels are. For regression, such as denoising; for a segmentation these are its scores.
    """
    options = job.resolve(overwrite, **network.resolve(), values=dtype)
    run_job(paths, network.models(), options, talk, dry_run)


def run_job(paths: list[str], models: Models, options: SegmentOptions, talk: LongTalk, dry_run: bool) -> None:
    """Runs a job, or tells its plan, and prints the result."""
    inputs, output = split_paths(paths)
    if dry_run:
        from tilepipe.describe import describe
        from tilepipe.job import prepare

        print_plan(describe(prepare(inputs, models, options)), talk.json, talk.verbose)
        return
    with teller(talk.quiet, talk.log_json) as tell:
        from tilepipe.pipeline import segment_raster
        from tilepipe.schedule import stop_on_signals

        with stop_on_signals() as stop:
            heard: list[str] = []

            def announce(prepared: Job) -> None:
                heard.extend(prepared.notes)
                for note in heard:
                    tell.note(note)

            summary = segment_raster(inputs, output, models, options, progress=tell, announce=announce, stop=stop)
        for note in summary.notes:
            if note not in heard:
                tell.note(note)
    print(json.dumps(summary.to_json()) if talk.json else summary_text(summary))


@spread
def plan(
    inputs: Inputs,
    network: ModelOptions,
    labels: LabelOptions,
    job: JobOptions,
    talk: Talk,
    files: FileOptions,  # noqa: ARG001 - read already
) -> None:
    """Show what segmenting would take.

    Legal sizes, reach, halo, tiles, blocks, overhead, memory; exact or blended, and why. Touches no GPU.
    """
    from tilepipe.describe import describe
    from tilepipe.job import prepare

    options = job.resolve(**network.resolve(), **labels.resolve())
    print_plan(describe(prepare(inputs, network.models(), options)), talk.json, talk.verbose)


def split_paths(paths: list[str]) -> tuple[list[str], str]:
    """(inputs, output): the last path is the output."""
    if len(paths) < 2:
        raise UsageError(f"one path was given ({paths[0]}); write INPUT... OUTPUT.zarr, the output last")
    *inputs, output = paths
    if would_be_file(output):
        raise UsageError(
            f"the output {output} would be a file; name a zarr folder such as labels.zarr as the last path, "
            "and make a GeoTIFF of it with `tilepipe export`"
        )
    return inputs, output


def print_plan(job: dict[str, Any], as_json: bool, verbose: bool) -> None:
    """The plan on stdout."""
    print(json.dumps(job) if as_json else plan_text(job, verbose))
