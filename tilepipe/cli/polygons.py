"""The part of `export` that writes polygons."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from tilepipe.cli import show
from tilepipe.cli.arguments import option
from tilepipe.cli.options import LongTalk
from tilepipe.cli.progress import Teller, Work, teller
from tilepipe.errors import UsageError
from tilepipe.progress import Progress

POLYGONS = "Polygons"
ENDINGS = (".gpkg", ".parquet", ".fgb", ".geojson")


@dataclass(frozen=True, slots=True)
class ShapeOptions:
    """Which polygons are written, and how."""

    classes: Annotated[
        str | None,
        option(
            "--classes",
            metavar="NAME,...",
            panel=POLYGONS,
            variable="EXPORT_CLASSES",
            help="Classes to write, by names or numbers; all others count as nodata.",
        ),
    ] = None
    min_area: Annotated[
        str | None,
        option(
            "--min-area",
            metavar="M2|Npx",
            panel=POLYGONS,
            help="Merge smaller regions into their largest neighbours, as gdal_sieve does: square metres (pixels "
            "in a map without CRS), or pixels as 16px.",
        ),
    ] = None
    simplify: Annotated[
        str | None,
        option(
            "--simplify",
            metavar="TOLERANCE|Npx",
            panel=POLYGONS,
            help="Straighten borders, once for both neighbours, so that there are neither gaps nor overlaps: how far "
            "a border may move, in the units of the map's CRS, or in pixels as 1.5px.",
        ),
    ] = None

    def refuse(self, file: str) -> None:
        """UsageError where one is given, since `file` is no file of polygons."""
        for each in fields(self):
            if getattr(self, each.name) is not None:
                flag = "--" + each.name.replace("_", "-")
                raise UsageError(f"{flag} is for polygons; {file} does not end in {', '.join(ENDINGS)}")


def write_polygons(
    store: str, file: str, shapes: ShapeOptions, talk: LongTalk, allow_partial: bool, overwrite: bool
) -> None:
    """Writes a store's polygons and prints what was written."""
    from tilepipe.polygons.export import PolygonOptions, export_polygons

    options = PolygonOptions(
        classes=tuple(word.strip() for word in (shapes.classes or "").split(",") if word.strip()),
        min_area=shapes.min_area,
        simplify=shapes.simplify,
        allow_partial=allow_partial,
        overwrite=overwrite,
    )
    started = time.perf_counter()
    with teller(talk.quiet, talk.log_json, Work("tracing", "Mpx")) as tell:
        path, count = export_polygons(store, file, options, progress=Pixels(tell))
    size, seconds = path.stat().st_size, time.perf_counter() - started
    found = {"file": str(path), "bytes": size, "polygons": count, "seconds": seconds}
    words = f"{path}: {show.count(count, 'polygon')}, {show.size(size)}, in {show.duration(seconds)}"
    print(json.dumps(found) if talk.json else words)


@dataclass(frozen=True, slots=True)
class Pixels:
    """Tells of pixels as a job tells of its blocks."""

    tell: Teller
    started: float = field(default_factory=time.perf_counter)

    def __call__(self, done: int, total: int) -> None:
        """Tells of so many pixels."""
        finished, whole = (-(-pixels // 10**6) for pixels in (done, total))
        self.tell(Progress(finished, whole, 0, done, total, time.perf_counter() - self.started))


def is_vector(file: str) -> bool:
    """Whether a file's name ends as one of polygons."""
    return file.lower().endswith(ENDINGS)


def refuse_raster(file: str, **given: Any) -> None:
    """UsageError where an option of GeoTIFFs is given."""
    for name, value in given.items():
        if value:
            raise UsageError(f"--{name.replace('_', '-')} is for GeoTIFFs; {file} gets the polygons of the labels")
