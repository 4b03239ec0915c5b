"""A plan and a finished job in words, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilepipe.cli import show
from tilepipe.cli.channels import channel_table

if TYPE_CHECKING:
    from tilepipe.pipeline import Summary


def plan_text(job: dict[str, Any], verbose: bool) -> str:
    """What `Job.describe` says, for people; with the parts of the memory where `verbose`."""
    raster, limits = job["raster"], job["limits"]
    stitching = f"{job['stitch']}: {job['reason']}"
    if job["window"]:
        stitching += f"; weights {job['window']}"
    rows = [
        (
            "raster",
            f"{raster['name']}: {show.by(raster['shape'])} pixels, {raster['bands']} bands, {raster['dtype']}",
        ),
        *(line for model in job["models"] for line in _model_entries(model, job["stitch"])),
        *_result_entries(job),
        ("stitching", stitching),
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


def _model_entries(model: dict[str, Any], stitch: str) -> list[tuple[str, str]]:
    """One model, what its network asks of tiles, and the tiles that it gets."""
    words = [model["source"]]
    if model["dense"]:
        words.append(f"slid at stride 1 by {'dilation' if model['dense'] == 'dilate' else 'shift and stitch'}")
    if model["tta"]:
        words.append("averaged over " + {"flips": "flips", "d4": "flips and quarter turns"}[model["tta"]])
    return [("model", ", ".join(words)), *network_entries(model["network"]), ("tiles", _tiles(model, stitch))]


def _result_entries(job: dict[str, Any]) -> list[tuple[str, str]]:
    """What the models' scores become."""
    rows = []
    if job["combine"]:
        how = {"mean": "mean", "max": "largest"}[job["combine"]]
        rows.append(("combined", f"by the {how} probability of each class"))
    if job["refinement"]:
        rows.append(("refined", job["refinement"]))
    names = job["classes"] or job["outputs"]
    what = "classes" if job["classes"] else "values"
    rows.append((what, f"{len(names)}: {', '.join(names)}"))
    return rows


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


def _tiles(model: dict[str, Any], stitch: str) -> str:
    text = f"{model['tiles']} of {show.by(model['tile'])}, "
    if stitch == "blend":
        return text + f"overlap {show.by([sum(halo) for halo in model['halo']])}"
    return text + f"core {show.by(model['core'])}, {_halo(*model['halo'])}"


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
    total = done.nodata + (sum(done.classes.values()) or max((c["pixels"] for c in done.channels.values()), default=0))
    if done.computed == 0:
        first = f"{done.output}: already done, {show.pixels(total)} in {show.count(done.blocks, 'block')}"
    else:
        first = (
            f"{done.output}: {show.pixels(done.pixels)} in {show.duration(done.seconds)} ({done.rate:.2f} Mpx/s) "
            f"after {show.duration(done.start_seconds)} of preparation, {show.count(done.blocks, 'block')}"
        )
        if done.resumed:
            first += f", {done.resumed} of them done before"
        if done.overviews:
            first += f"; {show.count(len(done.overviews), 'overview')} in {show.duration(done.overview_seconds)}"
    lines = [
        first,
        class_table(done.classes, done.nodata) if done.classes else channel_table(done.channels, done.nodata),
    ]
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
