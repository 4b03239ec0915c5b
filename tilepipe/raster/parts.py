"""The files behind a VRT, where each pixel is simply a pixel of one of them: what a reader needs to do without the VRT.

GDAL reads a VRT in one thread at a time (`tilepipe.raster.gdal` says why), which is too slow for a device; its files
can be read by many. Formats: https://gdal.org/en/stable/drivers/raster/vrt.html.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from tilepipe.window import Window

LARGEST = 64 << 20
"""Bytes of a VRT that is looked into; larger ones are left to GDAL."""

DTYPES = {
    "Byte": "uint8",
    "Int8": "int8",
    "UInt16": "uint16",
    "Int16": "int16",
    "UInt32": "uint32",
    "Int32": "int32",
    "UInt64": "uint64",
    "Int64": "int64",
    "Float16": "float16",
    "Float32": "float32",
    "Float64": "float64",
}
"""numpy's names of GDAL's types of real numbers."""

_DATASET = {"SRS", "GeoTransform", "GCPList", "Metadata", "VRTRasterBand", "MaskBand", "OverviewList"}
_BAND = {
    *("Description", "NoDataValue", "ColorInterp", "ColorTable", "CategoryNames", "Scale", "Offset", "UnitType"),
    *("Metadata", "Histograms", "SimpleSource", "ComplexSource"),
}
_SOURCE = {"SourceFilename", "SourceBand", "SourceProperties", "SrcRect", "DstRect", "NODATA"}
"""What is known to leave pixels as they are, or is looked at here. Anything else is left to GDAL."""


class Part(NamedTuple):
    """One file's rectangle in a raster."""

    target: str
    """What GDAL opens."""
    place: Window
    """In the raster."""
    origin: tuple[int, int]
    """(row, column) of the file at which the rectangle begins."""
    holes: tuple[float | None, ...]
    """For each band, the value that lets files below show; None for no such value."""

    def within(self, window: Window) -> tuple[Window, Window]:
        """What it gives of a window of the raster: in the raster, and in the file."""
        seen = self.place.intersect(window)
        row, col = self.origin[0] - self.place.rows.start, self.origin[1] - self.place.cols.start
        return seen, seen.shift(row, col)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A raster as rectangles of files, the last on top."""

    parts: tuple[Part, ...]
    dtypes: tuple[str, ...]
    """Of each band."""
    background: tuple[float, ...]
    """For each band, what no file gives a value for."""
    _edges: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        places = [part.place for part in self.parts]
        edges = [(place.rows.start, place.rows.stop, place.cols.start, place.cols.stop) for place in places]
        object.__setattr__(self, "_edges", np.array(edges, np.int64).reshape(-1, 4))

    def touching(self, window: Window) -> list[Part]:
        """The parts that have pixels in a window, the last on top."""
        top, bottom, left, right = self._edges.T
        rows = (top < window.rows.stop) & (bottom > window.rows.start)
        cols = (left < window.cols.stop) & (right > window.cols.start)
        return [self.parts[n] for n in np.flatnonzero(rows & cols)]


def parts_of(target: str) -> Parts | None:
    """The files behind a VRT, given as its path or its XML; None where it does more than show their pixels."""
    folder, text = "", target.encode()
    if not target.lstrip().startswith("<VRTDataset"):
        if not os.path.isfile(target) or os.path.getsize(target) > LARGEST:
            return None
        folder = os.path.dirname(target)
        text = Path(target).read_bytes()
    try:
        return _parts(ElementTree.fromstring(text), folder)
    except (ElementTree.ParseError, ValueError, _OtherwiseError):
        return None


class _OtherwiseError(Exception):
    """A VRT that is not plain."""


def _parts(root: Element, folder: str) -> Parts:
    _require(root.tag == "VRTDataset" and "subClass" not in root.attrib and {child.tag for child in root} <= _DATASET)
    bands = root.findall("VRTRasterBand")
    _require(bool(bands))
    dtypes, background = [], []
    stacks: list[list[Part]] = []
    for number, band in enumerate(bands, 1):
        _require("subClass" not in band.attrib and {child.tag for child in band} <= _BAND)
        dtype = DTYPES.get(band.get("dataType", "Byte"))
        _require(dtype is not None and band.get("band", str(number)) == str(number))
        dtypes.append(str(dtype))
        background.append(_background(band, np.dtype(dtype)))
        sources = [child for child in band if child.tag in ("SimpleSource", "ComplexSource")]
        stacks.append([_part(source, number, folder, np.dtype(dtype), background[-1]) for source in sources])
    places = [[part[:3] for part in stack] for stack in stacks]
    _require(all(each == places[0] for each in places))
    joined = (part._replace(holes=tuple(stack[n].holes[0] for stack in stacks)) for n, part in enumerate(stacks[0]))
    return Parts(tuple(joined), tuple(dtypes), tuple(background))


def _background(band: Element, dtype: np.dtype[Any]) -> float:
    text = band.findtext("NoDataValue")
    if text is None:
        return 0.0
    value = float(text)
    _require(_representable(value, dtype))
    return value


def _part(source: Element, band: int, folder: str, dtype: np.dtype[Any], background: float) -> Part:
    _require({child.tag for child in source} <= _SOURCE)
    _require((source.findtext("SourceBand") or "1").strip() == str(band))
    name = source.find("SourceFilename")
    _require(name is not None and bool(name.text))
    assert name is not None
    path = str(name.text)
    if name.get("relativeToVRT") == "1":
        path = os.path.join(folder, path)
    there, here = _rectangle(source.find("SrcRect")), _rectangle(source.find("DstRect"))
    # Of another size it is resampled.
    _require(there.shape == here.shape)
    hole = _hole(source, dtype, background)
    return Part(path, here, there.origin, (hole,))


def _hole(source: Element, dtype: np.dtype[Any], background: float) -> float | None:
    text = source.findtext("NODATA")
    if text is None:
        return None
    _require(source.tag == "ComplexSource")
    value = float(text)
    if dtype.kind in "iu":
        # What it makes of another is GDAL's affair: it takes 2.5 for 2.
        _require(_representable(value, dtype))
    else:
        # GDAL compares floats with a tolerance of its own: only where the result is the same either way.
        _require(value == background or (math.isnan(value) and math.isnan(background)))
    return value


def _representable(value: float, dtype: np.dtype[Any]) -> bool:
    if dtype.kind == "f":
        return not math.isfinite(value) or abs(value) <= float(np.finfo(dtype).max)
    # Larger ones may have been rounded when they were written as text.
    limits = np.iinfo(dtype)
    return value.is_integer() and max(limits.min, -(2**53)) <= value <= min(limits.max, 2**53)


def _rectangle(element: Element | None) -> Window:
    _require(element is not None)
    assert element is not None
    col, row, width, height = (_whole(element.get(name)) for name in ("xOff", "yOff", "xSize", "ySize"))
    _require(width > 0 and height > 0 and row >= 0 and col >= 0)
    return Window.of(row, row + height, col, col + width)


def _whole(text: str | None) -> int:
    value = float(text or "nan")
    _require(value.is_integer())
    return int(value)


def _require(held: bool) -> None:
    if not held:
        raise _OtherwiseError


def disjoint(parts: Sequence[Part]) -> bool:
    """Whether no two of the parts overlap."""
    rest = sorted(parts, key=lambda part: part.place.rows.start)
    for n, part in enumerate(rest):
        for other in rest[n + 1 :]:
            if other.place.rows.start >= part.place.rows.stop:
                break
            if part.place.cols.start < other.place.cols.stop and other.place.cols.start < part.place.cols.stop:
                return False
    return True
