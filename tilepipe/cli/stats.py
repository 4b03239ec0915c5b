"""`stats`: what a label map holds, class by class."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tilepipe.cli import show
from tilepipe.cli.arguments import spread
from tilepipe.cli.options import LongTalk
from tilepipe.cli.polygons import Pixels
from tilepipe.cli.progress import Work, teller
from tilepipe.cli.stores import StorePath

if TYPE_CHECKING:
    from tilepipe.stats import MapStatistics


@spread
def stats(store: StorePath, talk: LongTalk) -> None:
    """Show how much of a label map each class takes.

    Pixels, share, area on the ground and mean confidence of each class, over the finished blocks. Areas are those on
    the map where its CRS is projected, and those on the ellipsoid, row by row, where it is geographic or Mercator's.
    """
    from tilepipe.stats import map_statistics
    from tilepipe.store.output import open_store

    opened = open_store(store)
    with teller(talk.quiet, talk.log_json, Work("reading", "Mpx")) as tell:
        found = map_statistics(opened, progress=Pixels(tell))
    print(json.dumps({"store": opened.path, **found.to_json()}) if talk.json else statistics_text(found))


def statistics_text(found: MapStatistics) -> str:
    """What the map holds, for people: a table with a line for each class."""
    head = ["class", "pixels", "share"]
    rows = [[c.name, f"{c.pixels:,}", "-" if c.share is None else show.share(c.share, 1)] for c in found.classes]
    ends = [["all", f"{found.pixels:,}", ""], ["nodata", f"{found.nodata:,}", ""]]
    if found.area_m2 is not None:
        head.append("area")
        for row, each in zip(rows, found.classes, strict=True):
            row.append(show.area(each.area_m2 or 0.0))
        ends[0].append(show.area(found.area_m2))
        ends[1].append("")
    if any(each.confidence is not None for each in found.classes):
        head.append("confidence")
        for row, each in zip(rows, found.classes, strict=True):
            row.append("-" if each.confidence is None else f"{each.confidence:.3f}")
        ends = [[*end, ""] for end in ends]
    text = show.table(head, [*rows, *ends], right=range(1, len(head)))
    if found.done < found.blocks:
        text += f"\n\n{found.done} of {found.blocks} blocks are done; the figures are theirs"
    return text
