"""All that a picture or a page of a store shows, read once: raster, labels or values, confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import InputError, UsageError
from tilepipe.pictures.image import find_image
from tilepipe.pictures.stored import StoredMap
from tilepipe.pictures.view import MOST, View, checked_side, view_of
from tilepipe.store.output import OutputStore

NO_IMAGE = "none"
"""In place of a raster's name: no image is shown."""


@dataclass(frozen=True, slots=True)
class PreviewOptions:
    """What is shown of a store."""

    image: str | None = None
    """The raster to show, or "none"; None for the one that the map was made from, where it is to be found."""
    confidence: bool = False
    """Whether a picture shows confidence, too; a page does wherever the store has it."""
    window: str | None = None
    """The part to show, "row0:row1,col0:col1" in pixels of the map, or "left,bottom,right,top" in its CRS."""
    size: int | None = None
    """Pixels of the longer side of what is shown; a window has all of its own up to 4096."""
    overwrite: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Layers:
    """What is shown of a store, all in the cells of one view."""

    view: View
    image: NDArray[np.uint8] | None
    """(rows, columns, 3)."""
    image_name: str
    labels: NDArray[Any] | None
    """(rows, columns); None in a store of values."""
    confidence: NDArray[np.uint8] | None
    values: NDArray[Any] | None
    """(channels, rows, columns), the first three channels at most; None in a store of labels."""
    notes: tuple[str, ...]
    """What the user should be told."""


def read_layers(store: OutputStore, options: PreviewOptions, side: int, confidence: bool) -> Layers:
    """What the options ask for of a store, `side` pixels a side where they do not say.

    A raster that is not to be found, or does not fit, is left out with a note, unless it was named.
    """
    spec, stored = store.spec, StoredMap(store)
    view, notes = _view(store, options, side)
    if confidence and not spec.confidence:
        raise UsageError(f"{store.path} has no confidence; `tilepipe segment --confidence` writes it")
    image, name = None, ""
    if options.image != NO_IMAGE:
        try:
            layer = find_image(spec, options.image)
            image, name = layer.read(view), layer.name
        except InputError as error:
            if options.image is not None:
                raise
            notes.append(f"without the image: {error}")
    if not stored.whole:
        notes.append(f"{stored.done} of {store.blocks} blocks are done; the others are shown as no data")
    elif stored.sampled(view):
        notes.append(f"every n-th pixel was read; `tilepipe overviews {store.path}` makes this faster, and counts all")
    labelled = spec.kind == "labels"
    return Layers(
        view,
        image,
        name,
        stored.labels(view) if labelled else None,
        stored.confidence(view) if confidence else None,
        None if labelled else stored.values(view),
        tuple(notes),
    )


def _view(store: OutputStore, options: PreviewOptions, side: int) -> tuple[View, list[str]]:
    asked = None if options.size is None else checked_side(options.size)
    view = view_of(store.spec, options.window, asked or (side if options.window is None else MOST), asked or side)
    notes = []
    if options.window is not None and asked is None and max(view.window.shape) > MOST:
        rows, cols = view.window.shape
        notes.append(f"the window has {rows} x {cols} pixels, over {MOST} a side, and is shown reduced")
    return view, notes
