"""`preview`: a store as a picture, or as a page with statistics."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import Annotated

import typer

from tilepipe.cli import show
from tilepipe.cli.arguments import option, spread
from tilepipe.cli.options import LongTalk, Overwrite
from tilepipe.cli.polygons import Pixels
from tilepipe.cli.progress import Work, teller
from tilepipe.cli.stores import StorePath

SHOWN = "What is shown"

Target = Annotated[
    str | None,
    typer.Argument(
        metavar="PICTURE.png|PAGE.html",
        show_default=False,
        help="The picture or page to write; the store's name with .png where it is left out.",
    ),
]


@dataclass(frozen=True, slots=True)
class ShownOptions:
    """What of a store is shown."""

    image: Annotated[
        str | None,
        option(
            "--image",
            metavar="FILE|none",
            panel=SHOWN,
            variable="PREVIEW_IMAGE",
            help="The raster to show, where it is another than the one that the map was made from, or that one was "
            "moved; none shows no raster.",
        ),
    ] = None
    confidence: Annotated[
        bool,
        option(
            "--confidence/--no-confidence",
            panel=SHOWN,
            variable="PREVIEW_CONFIDENCE",
            help="Also the confidence, in a picture; a page shows it wherever the store has it.",
        ),
    ] = False
    window: Annotated[
        str | None,
        option(
            "--window",
            metavar="ROWS,COLS",
            panel=SHOWN,
            variable="PREVIEW_WINDOW",
            help="A part, pixel by pixel up to 4096 a side: as --region of segment, row0:row1,col0:col1 in pixels of "
            "the map, or left,bottom,right,top in its CRS.",
        ),
    ] = None
    size: Annotated[
        int | None,
        option(
            "--size",
            metavar="PIXELS",
            panel=SHOWN,
            variable="PREVIEW_SIZE",
            help="The longer side of a picture's panels (900) or of a page's map (1600).",
        ),
    ] = None


@spread
def preview(
    store: StorePath, talk: LongTalk, shown: ShownOptions, target: Target = None, overwrite: Overwrite = False
) -> None:
    """Show an output as a picture, or as a page for browsers.

    A PNG of the raster, the labels or values, and the confidence, with legend and scale bar; or one HTML file in which
    the layers can be switched and zoomed, with each class's pixels, share, area and mean confidence. Read from
    overviews, so that it takes seconds whatever the map's size.
    """
    from tilepipe.pictures.layers import PreviewOptions
    from tilepipe.preview import preview as draw

    options = PreviewOptions(shown.image, shown.confidence, shown.window, shown.size, overwrite)
    started = time.perf_counter()
    with teller(talk.quiet, talk.log_json, Work("reading", "Mpx")) as tell:
        done = draw(store, target or default_target(store), options, progress=Pixels(tell))
        for note in done.notes:
            tell.note(note)
    seconds = time.perf_counter() - started
    words = f"{done.file}: {', '.join(done.layers)} in {show.by(done.size)} pixels, {show.size(done.bytes)}"
    text = f"{words}, in {show.duration(seconds)}"
    print(json.dumps({"store": store, **done.to_json(), "seconds": seconds}) if talk.json else text)


def default_target(store: str) -> str:
    """Where a picture goes that was given no name: beside a store in a folder, here for one at a URL.

    >>> default_target("maps/south.zarr/"), default_target("s3://bucket/south.zarr")
    ('maps/south.png', 'south.png')
    """
    path = store.rstrip("/")
    path = os.path.basename(path) if "://" in path else path
    return f"{path.removesuffix('.zarr')}.png"
