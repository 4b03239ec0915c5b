"""Fonts of pictures: Pillow's own, and one of the system's for letters that it lacks."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import NamedTuple

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

SYSTEM = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf")
"""Fonts with more letters, of which one is on most machines."""


class Words(NamedTuple):
    """A text that can be drawn, and the font to draw it with."""

    text: str
    font: Font

    @property
    def width(self) -> float:
        """In pixels."""
        return self.font.getlength(self.text)


def words(text: str, size: int) -> Words:
    """The text in a font that has its letters; where none has, accents are left out, and then letters replaced."""
    text = " ".join(text.split())
    own = _own(size)
    if _has(own, text):
        return Words(text, own)
    for name in SYSTEM:
        font = _system(name, size)
        if font is not None and _has(font, text):
            return Words(text, font)
    bare = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return Words("".join(letter if _has(own, letter) else "?" for letter in bare), own)


def shortened(text: str, size: int, width: float) -> Words:
    """The text, its end left out where it would be wider than `width`."""
    found = words(text, size)
    while found.width > width and len(text) > 1:
        text = text[:-1]
        found = words(text.rstrip() + "...", size)
    return found


@lru_cache
def _own(size: int) -> Font:
    return ImageFont.load_default(size)


@lru_cache
def _system(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@lru_cache(maxsize=1024)
def _has(font: Font, text: str) -> bool:
    """Whether no letter of the text is drawn as the box that stands for a missing one."""
    missing = bytes(font.getmask("\uffff"))
    return all(letter.isspace() or bytes(font.getmask(letter)) != missing for letter in set(text))
