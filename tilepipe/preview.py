"""A store at a glance: a picture of raster, labels and confidence with legend and scale, or a page with statistics.

    open the store -> read_layers: raster and overviews, in the cells of one view -> a PNG, or an HTML page

However large the map is, little more is read than is shown; a page's statistics come from the blocks' records, and
from pixels where those do not tell enough.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.page import page_of
from tilepipe.pictures.caption import map_name, subtitle
from tilepipe.pictures.colors import colorize, confidence_palette, on_grey, stretched
from tilepipe.pictures.layers import Layers, PreviewOptions, read_layers
from tilepipe.pictures.layout import Panel, Sheet, compose
from tilepipe.pictures.legend import class_entries, confidence_entry, value_entries
from tilepipe.pictures.scale import scale_bar
from tilepipe.store.output import open_store
from tilepipe.store.spec import StoreSpec
from tilepipe.targets import check_target, write_whole

PICTURE, PAGES = ".png", (".html", ".htm")
PICTURE_SIDE, PAGE_SIDE = 900, 1600
"""Pixels of a panel's longer side, and of a page's map, where nobody says."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What was written."""

    file: str
    bytes: int
    window: str
    """What is shown, in pixels of the map."""
    size: tuple[int, int]
    """(rows, columns) of a panel, or of the pictures in a page."""
    layers: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {**asdict(self), "size": list(self.size), "layers": list(self.layers), "notes": list(self.notes)}


def preview(
    store_path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: PreviewOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Preview:
    """What was written to `target`: a picture where it ends in .png, a page where it ends in .html.

    `progress` hears of (pixels read, pixels to read) for a page's statistics. The same store gives the same bytes.
    Raises UsageError for an option that is not legal or a file that is there, StoreError where there is no store,
    InputError where a raster that was named does not fit.
    """
    options, target = options or PreviewOptions(), os.fspath(target)
    ending = check_target(target, (PICTURE, *PAGES), options.overwrite)
    store = open_store(store_path)
    if ending == PICTURE:
        layers = read_layers(store, options, PICTURE_SIDE, options.confidence)
        data, size = picture_of(store.spec, layers, map_name(store.path)), layers.view.size
    else:
        layers = read_layers(store, options, PAGE_SIDE, options.confidence or store.spec.confidence)
        data, size = page_of(store, layers, progress), layers.view.shape
    write_whole(target, data)
    shown = {"image": layers.image, "labels": layers.labels, "confidence": layers.confidence, "values": layers.values}
    names = tuple(name for name, layer in shown.items() if layer is not None)
    return Preview(target, len(data), str(layers.view.window), size, names, layers.notes)


def picture_of(spec: StoreSpec, layers: Layers, title: str) -> bytes:
    """The layers as a PNG: panels under a title, over a legend and a scale bar."""
    panels, legend = [], []
    if layers.image is not None:
        panels.append(Panel(layers.image_name, layers.image))
    if layers.labels is not None:
        panels.append(Panel("labels", colorize(layers.labels, spec.classes)))
        legend += class_entries(spec.classes, layers.labels)
    if layers.values is not None:
        panels.append(Panel("values", on_grey(stretched(layers.values))))
        legend += value_entries(spec, layers.values)
    if layers.confidence is not None:
        panels.append(Panel("confidence", confidence_palette()[layers.confidence]))
        legend.append(confidence_entry())
    enlarged = [Panel(panel.title, _enlarged(panel.pixels, layers.view.enlarged)) for panel in panels]
    bar = scale_bar(spec, layers.view)
    picture = compose(Sheet(enlarged, legend, title, subtitle(spec, layers.view), bar))
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def _enlarged(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
