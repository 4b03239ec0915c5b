"""`status`, `export`, `overviews` and `ingest`: what becomes of an output, and an input made ready."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilepipe.cli import show
from tilepipe.cli.arguments import spread
from tilepipe.cli.channels import channel_table
from tilepipe.cli.jobs import Paths, split_paths
from tilepipe.cli.options import LongTalk, Overwrite, Talk
from tilepipe.cli.polygons import Pixels, ShapeOptions, is_vector, refuse_raster, write_polygons
from tilepipe.cli.progress import Work, teller
from tilepipe.cli.words import class_table, disagreement

if TYPE_CHECKING:
    from tilepipe.store.output import OutputStore

StorePath = Annotated[
    str, typer.Argument(metavar="OUT.zarr", show_default=False, help="A store that `segment` or `predict` wrote.")
]
FilePath = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        show_default=False,
        help="The GeoTIFF (.tif) or polygons (.gpkg, .parquet, .fgb, .geojson) to write; it appears when whole.",
    ),
]
ArrayName = Annotated[
    str | None,
    typer.Option(
        "--array", metavar="labels|confidence|values", help="Which map; labels, or values where it holds those."
    ),
]
Compress = Annotated[str, typer.Option("--compress", metavar="deflate|zstd|lzw|none", help="How to compress it.")]
Cog = Annotated[
    bool,
    typer.Option(
        "--cog/--no-cog", help="A Cloud Optimized GeoTIFF with overviews, which takes the space twice meanwhile."
    ),
]
Partial = Annotated[bool, typer.Option("--partial", help="Also an unfinished store, with nodata where blocks lack.")]

NoData = Annotated[
    str | None, typer.Option("--nodata", metavar="VALUE|none", help="The pixel value that means no data.")
]


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """From what and over what an export may be written."""

    partial: Partial = False
    overwrite: Overwrite = False


@spread
def status(store: StorePath, talk: Talk) -> None:
    """Show how far an output is.

    Blocks, classes with shares and areas or channels with their ranges, disagreement of tiles, who writes to it, the
    settings.
    """
    from tilepipe.store.output import open_store

    found = describe_store(open_store(store))
    print(json.dumps(found) if talk.json else status_text(found, talk.verbose))


@spread
def export(
    store: StorePath,
    file: FilePath,
    talk: LongTalk,
    target: TargetOptions,
    shapes: ShapeOptions,
    array: ArrayName = None,
    compress: Compress = "deflate",
    cog: Cog = True,
) -> None:
    """Write an output as a Cloud Optimized GeoTIFF or as polygons.

    A GeoTIFF: a label map with the classes' names and colours; a network's own output as float32, a band for each
    channel. Polygons: a region of connected pixels of a class each, joined over all blocks, with area and mean
    confidence.
    """
    if is_vector(file):
        refuse_raster(file, array=array, compress=compress != "deflate", no_cog=not cog)
        write_polygons(store, file, shapes, talk, target.partial, target.overwrite)
        return
    shapes.refuse(file)
    from tilepipe.export import ExportOptions, export_geotiff

    choices: dict[str, Any] = {"array": array, "compress": compress}
    options = ExportOptions(**choices, cog=cog, allow_partial=target.partial, overwrite=target.overwrite)
    path = export_geotiff(store, file, options)
    size = path.stat().st_size
    print(json.dumps({"file": str(path), "bytes": size}) if talk.json else f"{path}: {show.size(size)}")


@spread
def overviews(store: StorePath, talk: LongTalk, overwrite: Overwrite = False) -> None:
    """Add coarser maps to an output, for viewers.

    Labels by majority of all pixels, confidence and values by mean, at 2, 4, 8 ... times the pixels' side. `segment`
    and `predict` do this at their end; those that are there stay, unless --overwrite.
    """
    from tilepipe.overviews import make_overviews
    from tilepipe.schedule import stop_on_signals

    started = time.perf_counter()
    with teller(talk.quiet, talk.log_json, Work("overviews", "parts")) as tell, stop_on_signals() as stop:
        factors = make_overviews(store, overwrite, progress=tell, stop=stop)
    seconds = time.perf_counter() - started
    found = {"store": store, "overviews": factors, "seconds": seconds}
    told = ", ".join(f"{factor}x" for factor in factors) or "none, since the map is small"
    print(json.dumps(found) if talk.json else f"{store}: overviews {told}, in {show.duration(seconds)}")


@spread
def ingest(paths: Paths, talk: LongTalk, nodata: NoData = None, overwrite: Overwrite = False) -> None:
    """Copy rasters into zarr chunks.

    INPUT, read as one mosaic, becomes OUTPUT.zarr, whose windows read fast: for sources that are slow to read in
    windows or far away, and are segmented more than once.
    """
    from tilepipe.options import parse_nodata
    from tilepipe.raster.ingest import ingest as copy
    from tilepipe.raster.source import open_raster

    inputs, output = split_paths(paths)
    source = open_raster(inputs, nodata=None if nodata is None else parse_nodata(nodata))
    started = time.perf_counter()
    with teller(talk.quiet, talk.log_json, Work("staging", "Mpx")) as tell:
        staged = copy(source, output, progress=Pixels(tell), overwrite=overwrite)
    info, seconds = staged.info, time.perf_counter() - started
    found = {
        "output": output,
        "shape": list(info.shape),
        "bands": info.bands,
        "dtype": info.dtype,
        "chunk": list(info.block_shape),
        "seconds": seconds,
    }
    words = f"{show.by(info.shape)} pixels, {info.bands} bands, {info.dtype}, chunks {show.by(info.block_shape)}"
    print(json.dumps(found) if talk.json else f"{output}: {words}, in {show.duration(seconds)}")


def describe_store(store: OutputStore) -> dict[str, Any]:
    """What `status` shows, as JSON values."""
    spec, state = store.spec, store.status()
    return {
        "store": store.path,
        "shape": list(spec.shape),
        "blocks": state.blocks,
        "done": state.done,
        "classes": dict(zip((c.name for c in spec.classes), state.counts, strict=True)),
        "channels": {name: channel.describe() for name, channel in zip(spec.outputs, state.channels, strict=True)},
        "nodata": state.nodata,
        "pixel_area": pixel_area(store),
        "overlapped": state.compared,
        "disagreed": state.differing,
        "seconds": dict(state.seconds),
        "writer": writer(store),
        "settings": dict(spec.settings),
    }


def pixel_area(store: OutputStore) -> float | None:
    """Square metres of a pixel in the map's middle row; None without CRS and transform."""
    from tilepipe.ground import row_areas

    areas = row_areas(store.spec)
    return None if areas is None else float(areas[len(areas) // 2])


def writer(store: OutputStore) -> dict[str, Any] | None:
    """Who holds the store's lease, and why it no longer counts where it does not; None where nobody does."""
    from tilepipe.store.lease import Owner, lease_key, stale_reason

    data = store.files.read(lease_key(store.files))
    if data is None:
        return None
    try:
        owner = str(Owner(**json.loads(data)))
    except (ValueError, TypeError):
        owner = "an unknown process"
    return {"owner": owner, "stale": stale_reason(store.files, data)}


def status_text(found: dict[str, Any], verbose: bool) -> str:
    """What `describe_store` says, for people."""
    settings = found["settings"]
    rows = [
        ("store", f"{found['store']}: {show.by(found['shape'])} pixels"),
        ("blocks", f"{found['done']} of {found['blocks']} done{_remark(found)}"),
        ("writer", _writer_text(found["writer"])),
        ("made from", f"{settings.get('raster', 'unknown')}"),
        ("by", _settings_text(settings)),
    ]
    if found["seconds"]:
        spent = (f"{name} {show.duration(seconds)}" for name, seconds in sorted(found["seconds"].items()))
        rows.append(("spent", ", ".join(spent)))
    if found["overlapped"]:
        rows.append(("blending", disagreement(found["disagreed"], found["overlapped"])))
    lines = [show.entries(rows)]
    if found["channels"] and found["done"]:
        lines.append(channel_table(found["channels"], found["nodata"]))
    elif found["done"]:
        lines.append(class_table(found["classes"], found["nodata"], found["pixel_area"]))
    if verbose:
        lines.append(json.dumps(settings, indent=2))
    return "\n\n".join(lines)


def _remark(found: dict[str, Any]) -> str:
    if found["done"] == found["blocks"]:
        return ""
    command = "predict" if found["channels"] else "segment"
    return f"; the `tilepipe {command}` command that made it finishes it"


def _writer_text(found: dict[str, Any] | None) -> str:
    if found is None:
        return "nobody"
    return found["owner"] if found["stale"] is None else f"nobody; left by {found['owner']}, {found['stale']}"


def _settings_text(settings: dict[str, Any]) -> str:
    """Each model with its plan in a line, and what they share in the last."""
    lines = []
    for model, plan in zip(settings.get("models", []), settings.get("plans", []), strict=False):
        words = [f"model {model['source']}"]
        words.append(f"{plan['stitch']} stitching, tiles of {plan['rows']['tile']} x {plan['cols']['tile']}")
        lines.append(", ".join(words))
    shared = [str(settings[name]) for name in ("precision", "device") if name in settings]
    if settings.get("refinement"):
        shared.append("refined by a CRF")
    return "\n".join(lines + ([", ".join(shared)] if shared else []))
