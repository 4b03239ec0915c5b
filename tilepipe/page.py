"""A store as one HTML file: the map with its layers, and what it holds, class by class.

The file needs nothing beside it: pictures, style and script are inside, and its policy forbids to load anything.
Without scripts the layers can be switched and the table be read; with them the map zooms and moves. Every name that
comes from a file is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tilepipe.ground import pixel_width
from tilepipe.pictures.caption import map_name, metadata, subtitle
from tilepipe.pictures.colors import NO_CONFIDENCE, confidence_palette, shown_channels, stretched, web_color
from tilepipe.pictures.layers import Layers
from tilepipe.pictures.legend import ENTRIES, Entry, confidence_entry, value_entries
from tilepipe.pictures.scale import scale_bar
from tilepipe.pictures.tables import channel_table, class_table
from tilepipe.stats import map_statistics
from tilepipe.store.output import OutputStore
from tilepipe.store.spec import StoreSpec

OPACITY = 0.6
"""Of labels and other layers over the image."""
QUALITY = 88
"""Of the image, as JPEG counts it."""


def page_of(store: OutputStore, layers: Layers, progress: Callable[[int, int], None] | None = None) -> bytes:
    """The page, in UTF-8; `progress` hears of (pixels read, pixels to read) for the statistics."""
    spec, title = store.spec, escape(map_name(store.path))
    if spec.kind == "labels":
        table = class_table(spec, map_statistics(store, progress))
    else:
        table = channel_table(spec, store.status())
    script = _part("page.js")
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
    page = Template(_part("page.html")).substitute(
        title=title,
        subtitle=escape(subtitle(spec, layers.view)),
        notes="\n".join(f'<p class="note">{escape(_sentence(note))}</p>' for note in _page_notes(layers)),
        viewer=_viewer(spec, layers),
        table=table,
        metadata="\n".join(
            f"<dt>{escape(what)}</dt><dd>{escape(value)}</dd>"
            for what, value in metadata(spec, layers.view, layers.image_name)
        ),
        style=_part("page.css"),
        script=script,
        script_hash=f"sha256-{digest}",
    )
    return page.encode()


def _part(name: str) -> str:
    return (files("tilepipe.pictures") / name).read_text(encoding="utf-8").strip()


class _Overlay(NamedTuple):
    """One of the layers over the image."""

    name: str
    """In the page's identifiers: labels, confidence or values."""
    images: str
    """Its HTML."""
    keys: str
    """What its colours mean, as HTML."""


def _overlays(spec: StoreSpec, layers: Layers) -> Iterator[_Overlay]:
    if layers.labels is not None:
        yield _labels(spec, layers.labels)
    if layers.values is not None:
        picture = _data("png", _encoded(Image.fromarray(stretched(layers.values))))
        names = ", ".join(spec.outputs[: shown_channels(len(spec.outputs))])
        yield _Overlay("values", _image(picture, f"Values: {names}"), _ramps(value_entries(spec, layers.values)))
    if layers.confidence is not None:
        picture = _data("png", _palette_png(layers.confidence, confidence_palette(), NO_CONFIDENCE))
        keys = _ramps([confidence_entry()])
        yield _Overlay("confidence", _image(picture, "Confidence: the probability of the label"), keys)


def _labels(spec: StoreSpec, labels: NDArray[Any]) -> _Overlay:
    """A picture for each class, so that each can be hidden; one for all where they are many."""
    present = [int(label) for label in np.unique(labels) if label != spec.nodata]
    apart = len(present) <= ENTRIES
    if apart:
        images = [
            _image(_data("png", _mask(labels == n, spec.classes[n].color)), f"Where {spec.classes[n].name} is", n)
            for n in present
        ]
    else:
        colors = np.zeros((*labels.shape, 4), np.uint8)
        known = labels != spec.nodata
        colors[known, :3] = np.array([item.color for item in spec.classes], np.uint8)[labels[known]]
        colors[known, 3] = 255
        images = [_image(_data("png", _encoded(Image.fromarray(colors))), "Labels")]
    listed = range(len(spec.classes)) if len(spec.classes) <= ENTRIES else present[:ENTRIES]
    keys = [_key(spec, n, apart and n in present) for n in listed]
    return _Overlay("labels", "\n".join(images), "\n".join(keys))


def _key(spec: StoreSpec, number: int, live: bool) -> str:
    """A class in the legend; `live`: with a box that hides it."""
    name, color = escape(spec.classes[number].name), web_color(spec.classes[number].color)
    box = f'<input type="checkbox" value="{number}" checked data-live hidden>' if live else ""
    return f'<li><label>{box}<span class="swatch" style="--color: {color}"></span>{name}</label></li>'


def _ramps(entries: Sequence[Entry]) -> str:
    """Entries whose colours are ramps, in the legend."""
    found = []
    for entry in entries:
        span = ""
        if entry.colors is not None:
            stops = ", ".join(web_color(color) for color in entry.colors[:: max(1, len(entry.colors) // 8)])
            span = f'<span class="ramp" style="background: linear-gradient(to right, {stops})"></span> '
        found.append(f"<li>{span}{escape(entry.name)}</li>")
    return "\n".join(found)


def _viewer(spec: StoreSpec, layers: Layers) -> str:
    rows, cols = layers.view.shape
    overlays = list(_overlays(spec, layers))
    base = ""
    if layers.image is not None:
        data = io.BytesIO()
        Image.fromarray(layers.image).save(data, "JPEG", quality=QUALITY)
        base = _image(_data("jpeg", data.getvalue()), f"The raster {layers.image_name}")
    opacity = OPACITY if layers.image is not None else 1.0
    shown = "\n".join(f'<div class="overlay {each.name}">\n{each.images}\n</div>' for each in overlays)
    keys = "\n".join(
        f'<ul class="keys {each.name}" aria-label="Colours of {each.name}">\n{each.keys}\n</ul>'
        for each in overlays
        if each.keys
    )
    return f"""<section class="viewer" aria-label="Map">
<div class="tools">
{_switch([each.name for each in overlays], layers.image is not None)}
{_slider(opacity) if layers.image is not None else ""}
<span class="zoom" data-live hidden><button type="button" id="closer" aria-label="Zoom in">+</button>
<button type="button" id="further" aria-label="Zoom out">&minus;</button>
<button type="button" id="all">All</button></span>
</div>
<div class="map" role="group" aria-label="Map of {escape(", ".join(each.name for each in overlays))}"
 style="--aspect: {cols / rows:.6g}" data-columns="{cols}">
<div class="layers" style="--opacity: {opacity:g}">
{base}
{shown}
</div>
{_scale(spec, layers)}
</div>
{keys}
<p class="hint" data-live hidden>Drag to move. Zoom with the buttons, a double click, or Ctrl and the wheel; by keyboard
with + and &minus;, the arrows and 0.</p>
</section>"""


def _switch(names: Sequence[str], image: bool) -> str:
    """Radio buttons: the image alone, or one of the layers over it."""
    choices = [*(["image"] if image else []), *names]
    chosen = names[0]
    buttons = "\n".join(
        f'<label><input type="radio" name="layer" id="show-{name}"{" checked" if name == chosen else ""}>'
        f"{name.capitalize()}</label>"
        for name in choices
    )
    return f'<fieldset class="switch"><legend>Show</legend>\n{buttons}\n</fieldset>'


def _slider(opacity: float) -> str:
    return (
        '<label class="slider" data-live hidden>Opacity '
        f'<input type="range" id="opacity" min="0" max="100" value="{round(100 * opacity)}"></label>'
    )


def _scale(spec: StoreSpec, layers: Layers) -> str:
    bar, window = scale_bar(spec, layers.view), layers.view.window
    middle = (window.rows.start + window.rows.stop) / 2, (window.cols.start + window.cols.stop) / 2
    width = pixel_width(spec, *middle)
    across = len(window.cols) * (1.0 if width is None else width)
    unit = "px" if width is None else "m"
    return (
        f'<div class="scale" data-across="{across!r}" data-unit="{unit}" style="--share: {bar.share:.6f}">'
        f"{escape(bar.text)}<span></span></div>"
    )


def _image(source: str, alt: str, number: int | None = None) -> str:
    of_class = "" if number is None else f' data-class="{number}"'
    return f'<img src="{source}" alt="{escape(alt)}"{of_class} draggable="false">'


def _data(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _mask(where: NDArray[np.bool_], color: tuple[int, int, int]) -> bytes:
    """A PNG of one bit a pixel: the colour, or nothing."""
    return _palette_png(where.astype(np.uint8), np.array([(0, 0, 0), color], np.uint8), 0, bits=1)


def _palette_png(values: NDArray[np.uint8], palette: NDArray[np.uint8], transparent: int, bits: int = 8) -> bytes:
    picture = Image.fromarray(values).convert("P")
    picture.putpalette(palette.tobytes())
    return _encoded(picture, transparency=transparent, bits=bits)


def _encoded(picture: Image.Image, **how: Any) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True, **how)
    return data.getvalue()


def _page_notes(layers: Layers) -> list[str]:
    """Those notes that tell of the map; what tells of this machine's files stays out of the page."""
    return [note for note in layers.notes if note.partition(" ")[0].isdigit() or note.startswith("the window")]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
