"""`segment` and `plan`: a raster to a label map, and what that would take."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilepipe.cli import show
from tilepipe.cli.arguments import option, spread
from tilepipe.cli.options import TALK, Config, JobOptions, LongTalk, Overwrite, Talk
from tilepipe.cli.progress import teller
from tilepipe.errors import UsageError

if TYPE_CHECKING:
    from tilepipe.job import Job
    from tilepipe.pipeline import Summary

RASTER_ENDINGS = (".tif", ".tiff", ".vrt", ".jp2", ".png", ".jpg", ".jpeg", ".img", ".nc", ".ecw")

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
DryRun = Annotated[
    bool, option("--dry-run/--no-dry-run", panel=TALK, help="Print the plan; compute and write nothing.")
]


@spread
def segment(
    paths: Paths,
    job: JobOptions,
    talk: LongTalk,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    config: Config = None,  # noqa: ARG001 - its callback has read it
) -> None:
    """Write a raster's label map.

    INPUT is read as one mosaic; OUTPUT.zarr gets the labels. The same command resumes one that was stopped.
    """
    inputs, output = split_paths(paths)
    options = job.resolve(overwrite)
    if dry_run:
        from tilepipe.job import prepare

        print_plan(prepare(inputs, job.model, options).describe(), talk.json, talk.verbose)
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

            summary = segment_raster(inputs, output, job.model, options, progress=tell, announce=announce, stop=stop)
        for note in summary.notes:
            if note not in heard:
                tell.note(note)
    print(json.dumps(summary.to_json()) if talk.json else summary_text(summary))


@spread
def plan(
    inputs: Inputs,
    job: JobOptions,
    talk: Talk,
    config: Config = None,  # noqa: ARG001 - its callback has read it
) -> None:
    """Show what segmenting would take.

    Legal sizes, reach, halo, tiles, blocks, overhead, memory; exact or blended, and why. Touches no GPU.
    """
    from tilepipe.job import prepare

    print_plan(prepare(inputs, job.model, job.resolve()).describe(), talk.json, talk.verbose)


def split_paths(paths: list[str]) -> tuple[list[str], str]:
    """(inputs, output): the last path is the output."""
    if len(paths) < 2:
        raise UsageError(f"one path was given ({paths[0]}); write INPUT... OUTPUT.zarr, the output last")
    *inputs, output = paths
    if output.lower().endswith(RASTER_ENDINGS) or os.path.isfile(output):
        raise UsageError(
            f"the output {output} would be a file; name a zarr folder such as labels.zarr as the last path, "
            "and make a GeoTIFF of it with `tilepipe export`"
        )
    return inputs, output


def print_plan(job: dict[str, Any], as_json: bool, verbose: bool) -> None:
    """The plan on stdout."""
    print(json.dumps(job) if as_json else plan_text(job, verbose))


def plan_text(job: dict[str, Any], verbose: bool) -> str:
    """What `Job.describe` says, for people; with the parts of the memory where `verbose`."""
    raster, model, limits = job["raster"], job["model"], job["limits"]
    stitching = f"{job['stitch']}: {job['reason']}"
    if job["window"]:
        stitching += f"; weights {job['window']}"
    rows = [
        (
            "raster",
            f"{raster['name']}: {show.by(raster['shape'])} pixels, {raster['bands']} bands, {raster['dtype']}",
        ),
        ("model", f"{model['source']}: {len(model['classes'])} classes ({', '.join(model['classes'])})"),
        *network_entries(job["network"]),
        ("stitching", stitching),
        ("tiles", _tiles(job)),
        ("blocks", f"{job['blocks']} of {show.by(job['block'])}, chunks {show.by(job['chunk'])}"),
        ("overhead", f"{job['overhead']:.2f} network pixels per raster pixel"),
        ("device", f"{job['device']}, {job['precision']}"),
        ("host", _memory(job["host_bytes"], limits["host_bytes"], job["host_parts"] if verbose else {})),
    ]
    if job["device_bytes"]:
        parts = job["device_parts"] if verbose else {}
        rows.append(("gpu", _memory(job["device_bytes"], limits["device_bytes"], parts)))
    shape = job["shape"]
    pixels = f"{show.by(shape)} = {show.pixels(shape[0] * shape[1])}"
    rows.append(("output", f"{pixels}, {show.size(job['output_bytes'])} before compression"))
    rows += [("note", note) for note in job["notes"]]
    return show.entries(rows)


def network_entries(axes: dict[str, Any]) -> list[tuple[str, str]]:
    """What a network asks of its input: a line where rows and columns agree, else a line for each."""
    if axes["rows"] == axes["cols"]:
        return [("network", axis_text(axes["rows"]))]
    return [("rows", axis_text(axes["rows"])), ("columns", axis_text(axes["cols"]))]


def axis_text(axis: dict[str, Any]) -> str:
    """One axis of a network's geometry in words."""
    words = [f"sizes {axis['sizes']}", f"alignment {axis['alignment']}"]
    if axis["reach"] is None:
        words.append("reach without a bound")
    else:
        words += [f"reach {_pair(axis['reach'])}", f"halo {_pair(axis['halo'])}"]
    if axis["scale"] != 1:
        words.append(f"one output per {axis['scale']} pixels")
    return ", ".join(words)


def _pair(values: list[int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]} before and {values[1]} after"


def _tiles(job: dict[str, Any]) -> str:
    text = f"{job['tiles']} of {show.by(job['tile'])}, "
    if job["stitch"] == "blend":
        return text + f"overlap {show.by([sum(halo) for halo in job['halo']])}"
    return text + f"core {show.by(job['core'])}, {_halo(*job['halo'])}"


def _halo(rows: list[int], cols: list[int]) -> str:
    if not any(rows + cols):
        return "no halo"
    return f"halo {_pair(rows)}" if rows == cols else f"halo {_pair(rows)} (rows), {_pair(cols)} (columns)"


def _memory(needed: int, limit: int | None, parts: dict[str, int]) -> str:
    text = f"{show.size(needed)} at the peak"
    if limit is not None:
        text += f", limit {show.size(limit)}"
    inner = [(name, show.size(count)) for name, count in parts.items()]
    return text + ("\n" + show.entries(inner) if inner else "")


def summary_text(done: Summary) -> str:
    """What a finished job did, for people."""
    total = sum(done.classes.values()) + done.nodata
    if done.computed == 0:
        first = f"{done.output}: already done, {show.pixels(total)} in {show.count(done.blocks, 'block')}"
    else:
        first = (
            f"{done.output}: {show.pixels(done.pixels)} in {show.duration(done.seconds)} ({done.rate:.2f} Mpx/s) "
            f"after {show.duration(done.start_seconds)} of preparation, {show.count(done.blocks, 'block')}"
        )
        if done.resumed:
            first += f", {done.resumed} of them done before"
    lines = [first, class_table(done.classes, done.nodata)]
    if done.stitch == "blend":
        lines.append(disagreement(done.disagreed, done.overlapped))
    return "\n".join(lines)


def class_table(classes: dict[str, int], nodata: int, pixel_area: float | None = None) -> str:
    """Pixels of each class and their share of the labelled ones; and areas where a pixel's is known (m2)."""
    labelled = sum(classes.values())
    rows = [(name, f"{count:,}", show.share(count, labelled), count) for name, count in classes.items()]
    if nodata:
        rows.append(("nodata", f"{nodata:,}", "", nodata))
    if pixel_area is None:
        return show.table(("class", "pixels", "share"), [row[:3] for row in rows], right=(1, 2))
    areas = [(*row[:3], show.area(row[3] * pixel_area)) for row in rows]
    return show.table(("class", "pixels", "share", "area"), areas, right=(1, 2, 3))


def disagreement(differing: int, compared: int) -> str:
    """How often overlapping tiles disagreed, in a sentence."""
    if not compared:
        return "no tiles overlapped"
    often = show.share(differing, compared)
    return f"overlapping tiles disagreed on {often} of the {show.pixels(compared)} they share"
