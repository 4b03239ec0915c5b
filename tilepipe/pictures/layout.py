"""A sheet: panels under their titles, side by side or one above the other, over a legend and a scale bar.

name of the map
what it is
image            labels            confidence
+-------------+  +-------------+   +-------------+
|             |  |             |   |             |
+-------------+  +-------------+   +-------------+
[] field  [] road  [] water                 |____|  200 m
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tilepipe.errors import InputError
from tilepipe.pictures.colors import colorize
from tilepipe.pictures.fonts import Words, shortened
from tilepipe.pictures.legend import Entry, class_entries
from tilepipe.pictures.scale import ScaleBar
from tilepipe.store.spec import ClassLike

PAPER, INK, PALE, EDGE = (255, 255, 255), (34, 38, 43), (104, 111, 119), (176, 181, 186)
PANEL = 900
"""Pixels of a panel's longer side at which text and margins have their own size; they grow with it."""
MARGIN, HEADER, TITLE, LINE, SWATCH, GAP = 28, 78, 38, 34, 20, 28
NARROWEST = 360
WIDE = 2.0
"""Panels this much wider than high are put above each other."""


class Panel(NamedTuple):
    """One of a sheet's pictures and what stands above it."""

    title: str
    pixels: NDArray[np.uint8]
    """(rows, columns, 3); of one size in all panels."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """All that a picture shows."""

    panels: Sequence[Panel]
    legend: Sequence[Entry]
    title: str = ""
    subtitle: str = ""
    bar: ScaleBar | None = None


def compose(sheet: Sheet) -> Image.Image:
    """The sheet, drawn."""
    return _Drawing(sheet).draw()


def side_by_side(
    image: NDArray[Any], labels: NDArray[Any], truth: NDArray[Any] | None, classes: Sequence[ClassLike]
) -> Image.Image:
    """The image, its labels and, where given, the true ones, side by side over a legend of the classes.

    `image` is (bands, rows, columns) uint8, of which the first three bands are shown as red, green and blue;
    `labels` and `truth` are (rows, columns). Panels larger than 900 pixels are reduced: images by averaging,
    labels by taking the middle.
    """
    height, width = labels.shape
    for name, found in (("image", image.shape[1:]), ("truth", labels.shape if truth is None else truth.shape)):
        if found != (height, width):
            raise InputError(f"{name} of {found} does not fit labels of {height} x {width} pixels")
    panels = [
        Panel("image", _fit(_as_rgb(image), Image.Resampling.BOX)),
        Panel("labels", _fit(colorize(labels, classes), Image.Resampling.NEAREST)),
    ]
    if truth is not None:
        panels.append(Panel("truth", _fit(colorize(truth, classes), Image.Resampling.NEAREST)))
    return compose(Sheet(panels, class_entries(classes, labels)))


def _as_rgb(image: NDArray[Any]) -> NDArray[np.uint8]:
    bands = image[:3] if image.shape[0] >= 3 else np.repeat(image[:1], 3, axis=0)
    return np.ascontiguousarray(np.moveaxis(bands, 0, -1)).astype(np.uint8)


def _fit(pixels: NDArray[np.uint8], how: Image.Resampling) -> NDArray[np.uint8]:
    """The pixels as a picture whose longer side is at most PANEL."""
    height, width = pixels.shape[:2]
    factor = min(1.0, PANEL / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return pixels if size == (width, height) else np.asarray(Image.fromarray(pixels).resize(size, how))


class _Drawing:
    """A sheet's measures, and the picture as it is drawn."""

    def __init__(self, sheet: Sheet) -> None:
        self.sheet = sheet
        self.high, self.wide = sheet.panels[0].pixels.shape[:2]
        self.unit = max(1.0, max(self.high, self.wide) / PANEL)
        count = len(sheet.panels)
        self.across = 1 if self.wide >= WIDE * self.high else count
        margin = self.px(MARGIN)
        self.width = max(self.across * (self.wide + margin) + margin, self.px(NARROWEST))
        self.top = self.px(HEADER) if sheet.title else 0
        self.bottom = self.top + count // self.across * (self.px(TITLE) + self.high) + margin // 2
        self.bar = max(2, round(sheet.bar.share * self.wide)) if sheet.bar else 0
        self.places = self._legend_places()
        lines = 1 + max((line for line, _, _ in self.places), default=0)
        height = self.bottom + lines * self.px(LINE) + margin // 2
        self.page = Image.new("RGB", (self.width, height), PAPER)
        self.pen = ImageDraw.Draw(self.page)

    def px(self, length: float) -> int:
        """A length in pixels of this picture."""
        return round(length * self.unit)

    def draw(self) -> Image.Image:
        """The picture."""
        margin, inner = self.px(MARGIN), self.width - 2 * self.px(MARGIN)
        if self.sheet.title:
            self.text(margin, self.px(30), shortened(self.sheet.title, self.px(25), inner), INK)
            self.text(margin, self.px(59), shortened(self.sheet.subtitle, self.px(15), inner), PALE)
        for number, panel in enumerate(self.sheet.panels):
            left = margin + number % self.across * (self.wide + margin)
            top = self.top + self.px(TITLE) + number // self.across * (self.px(TITLE) + self.high)
            self.text(left, top - self.px(TITLE) // 2, shortened(panel.title, self.px(17), self.wide), INK)
            self.page.paste(Image.fromarray(panel.pixels), (left, top))
            self.pen.rectangle((left - 1, top - 1, left + self.wide, top + self.high), outline=EDGE)
        for entry, place in zip(self.sheet.legend, self.places, strict=True):
            self._entry(entry, *place)
        if self.sheet.bar is not None:
            self._bar(self.sheet.bar)
        return self.page

    def text(self, left: float, middle: float, words: Words, color: tuple[int, int, int]) -> None:
        """Draw words whose middle lies `middle` pixels down."""
        self.pen.text((left, middle), words.text, fill=color, font=words.font, anchor="lm")

    def _legend_places(self) -> list[tuple[int, int, Words]]:
        """(line, left, name) of each entry, in lines that leave room for the bar."""
        room = self.width - 2 * self.px(MARGIN)
        if self.sheet.bar is not None:
            room -= self._bar_width(self.sheet.bar) + self.px(GAP)
        places, line, x = [], 0, 0
        for entry in self.sheet.legend:
            name = shortened(entry.name, self.px(17), max(room - self._swatch(entry), self.px(60)))
            wide = self._swatch(entry) + math.ceil(name.width) + self.px(GAP)
            if x and x + wide - self.px(GAP) > room:
                line, x = line + 1, 0
            places.append((line, self.px(MARGIN) + x, name))
            x += wide
        return places

    def _swatch(self, entry: Entry) -> int:
        """The width of an entry's colours and of the space behind them."""
        if entry.colors is None:
            return 0
        return self.px(SWATCH * (1 if len(entry.colors) == 1 else 5) + 8)

    def _entry(self, entry: Entry, line: int, left: int, name: Words) -> None:
        middle = self.bottom + line * self.px(LINE) + self.px(LINE) // 2
        wide = self._swatch(entry)
        if entry.colors is not None:
            width, height = wide - self.px(8), self.px(SWATCH)
            colors = entry.colors[np.arange(width) * len(entry.colors) // width]
            top = middle - height // 2
            self.page.paste(Image.fromarray(np.broadcast_to(colors, (height, width, 3)).copy()), (left, top))
            self.pen.rectangle((left - 1, top - 1, left + width, top + height), outline=EDGE)
        self.text(left + wide, middle, name, INK)

    def _bar_width(self, bar: ScaleBar) -> int:
        return self.bar + self.px(10) + math.ceil(shortened(bar.text, self.px(17), self.width).width)

    def _bar(self, bar: ScaleBar) -> None:
        """The bar in the lower right corner: a line with its ends turned up, and its length beside it."""
        words = shortened(bar.text, self.px(17), self.width)
        middle = self.bottom + self.px(LINE) // 2
        right = self.width - self.px(MARGIN) - math.ceil(words.width) - self.px(10)
        left, thick, up = right - self.bar, max(2, self.px(2)), self.px(7)
        self.pen.rectangle((left, middle, right, middle + thick - 1), fill=INK)
        self.pen.rectangle((left, middle - up, left + thick - 1, middle), fill=INK)
        self.pen.rectangle((right - thick + 1, middle - up, right, middle), fill=INK)
        self.text(right + self.px(10), middle, words, INK)
