"""Several files as one raster: a VRT, kept in memory as XML, with the first file on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import numpy as np
import pyproj
from affine import Affine
from rasterio.crs import CRS

from tilepipe.errors import InputError
from tilepipe.raster.info import RasterInfo
from tilepipe.raster.parts import DTYPES
from tilepipe.window import Window

TOLERANCE = 0.01
"""Pixels by which a file's grid may miss the first file's."""

_GDAL_TYPES = {name: theirs for theirs, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """One file of a mosaic."""

    target: str
    """The path GDAL opens."""
    info: RasterInfo


def mosaic_xml(pieces: Sequence[Piece]) -> str:
    """The XML of a VRT that shows `pieces` as one raster, the first on top; nowhere covered is not valid.

    All must share CRS, pixel size, pixel grid, band count, dtypes, colours and nodata values; an InputError names
    the file that differs, and how. Where a piece is masked, pieces below it show.
    """
    for piece in pieces[1:]:
        _require_alike(pieces[0].info, piece.info)
    places = _places(pieces)
    first = pieces[0].info
    base = first.transform
    if base is None:
        raise InputError(f"{first.name} has no affine transform; a mosaic needs georeferenced files")
    hull = places[0]
    for place in places[1:]:
        hull = hull.hull(place)
    moved = [place.shift(-hull.rows.start, -hull.cols.start) for place in places]
    root = Element("VRTDataset", rasterXSize=str(hull.shape[1]), rasterYSize=str(hull.shape[0]))
    if first.crs_wkt:
        # Axis order as GeoTransform has it: x before y whatever the CRS says.
        SubElement(
            root, "SRS", dataAxisToSRSAxisMapping="2,1" if _latitude_first(first.crs_wkt) else "1,2"
        ).text = first.crs_wkt
    a, b, c, d, e, f = (Affine(*base) * Affine.translation(hull.cols.start, hull.rows.start))[:6]
    SubElement(root, "GeoTransform").text = ", ".join(repr(float(x)) for x in (c, a, b, f, d, e))
    masked = any(piece.info.stored_mask != "none" for piece in pieces)
    for band in range(1, first.bands + 1):
        _add_band(root, band, pieces, moved, masked)
    holes = first.alpha is None and all(value is None for value in first.nodata) and _has_holes(moved, hull.shape)
    if masked or holes:
        _add_mask(root, pieces, moved)
    return ElementTree.tostring(root, encoding="unicode")


def _require_alike(first: RasterInfo, other: RasterInfo) -> None:
    facts = [
        ("band count", first.bands, other.bands),
        ("dtype", first.dtypes, other.dtypes),
        ("colour interpretation", first.color_interp, other.color_interp),
        ("nodata", tuple(map(repr, first.nodata)), tuple(map(repr, other.nodata))),
        ("colour table", first.colormap, other.colormap),
    ]
    for what, expected, found in facts:
        if expected != found:
            shown = "another" if what == "colour table" else f"{_plain(found)}, not {_plain(expected)}"
            remedy = "; --nodata sets one for all" if what == "nodata" else ""
            raise InputError(f"{other.name} does not fit the mosaic: its {what} is {shown} as in {first.name}{remedy}")
    if (first.crs_wkt is None) != (other.crs_wkt is None) or (
        first.crs_wkt and other.crs_wkt and CRS.from_wkt(first.crs_wkt) != CRS.from_wkt(other.crs_wkt)
    ):
        raise InputError(
            f"{other.name} does not fit the mosaic: its CRS is {_crs_name(other)}, not {_crs_name(first)} "
            f"as in {first.name}; reproject it first (gdalwarp)"
        )


def _places(pieces: Sequence[Piece]) -> list[Window]:
    """Where each piece lies, in pixels of the first one's grid."""
    places = []
    base = pieces[0].info
    for piece in pieces:
        info = piece.info
        if info.transform is None or base.transform is None:
            raise InputError(f"{info.name} has no affine transform; a mosaic needs georeferenced files")
        rows, cols = info.shape
        to_base = ~Affine(*base.transform) * Affine(*info.transform)
        col, row = to_base * (0.0, 0.0)
        end_col, end_row = to_base * (float(cols), float(rows))
        skew = max(abs(to_base.b) * rows, abs(to_base.d) * cols)
        if max(abs(end_col - col - cols), abs(end_row - row - rows), skew) > TOLERANCE:
            raise InputError(
                f"{info.name} does not fit the mosaic: its pixels are {to_base.a:.6g} x {to_base.e:.6g} times "
                f"those of {base.name}; resample it first (gdalwarp -tr)"
            )
        if max(abs(col - round(col)), abs(row - round(row))) > TOLERANCE:
            raise InputError(
                f"{info.name} does not fit the mosaic: its grid is {col - round(col):+.2f} columns and "
                f"{row - round(row):+.2f} rows off that of {base.name}; resample it first (gdalwarp -tap)"
            )
        places.append(Window.of(round(row), round(row) + rows, round(col), round(col) + cols))
    return places


def _add_band(root: Element, band: int, pieces: Sequence[Piece], places: Sequence[Window], masked: bool) -> None:
    first = pieces[0].info
    nodata = first.nodata[band - 1]
    element = SubElement(root, "VRTRasterBand", dataType=_GDAL_TYPES[first.dtypes[band - 1]], band=str(band))
    description = first.descriptions[band - 1]
    if description:
        SubElement(element, "Description").text = description
    if nodata is not None:
        SubElement(element, "NoDataValue").text = repr(nodata)
    if first.color_interp[band - 1] != "undefined":
        SubElement(element, "ColorInterp").text = first.color_interp[band - 1]
    if first.colormap is not None and band == 1:
        table = SubElement(element, "ColorTable")
        for entry in first.colormap:
            SubElement(table, "Entry", {f"c{i}": str(value) for i, value in enumerate(entry, 1)})
    if first.scales and first.scales[band - 1] != 1:
        SubElement(element, "Scale").text = repr(first.scales[band - 1])
    if first.offsets and first.offsets[band - 1] != 0:
        SubElement(element, "Offset").text = repr(first.offsets[band - 1])
    through_mask = masked or first.alpha is not None
    for piece, place in reversed(list(zip(pieces, places, strict=True))):
        kind = "ComplexSource" if through_mask or nodata is not None else "SimpleSource"
        source = _add_source(element, kind, piece, place, str(band))
        if nodata is not None:
            SubElement(source, "NODATA").text = repr(nodata)
        if through_mask:
            SubElement(source, "UseMaskBand").text = "true"


def _add_mask(root: Element, pieces: Sequence[Piece], places: Sequence[Window]) -> None:
    band = SubElement(SubElement(root, "MaskBand"), "VRTRasterBand", dataType="Byte")
    for piece, place in reversed(list(zip(pieces, places, strict=True))):
        source = _add_source(band, "ComplexSource", piece, place, "mask,1")
        # A masked pixel of a file above must not hide a valid one below.
        SubElement(source, "NODATA").text = "0"


def _add_source(parent: Element, kind: str, piece: Piece, place: Window, band: str) -> Element:
    rows, cols = piece.info.shape
    source = SubElement(parent, kind)
    SubElement(source, "SourceFilename", relativeToVRT="0", shared="0").text = piece.target
    SubElement(source, "SourceBand").text = band
    block_rows, block_cols = piece.info.block_shape
    # With these GDAL opens a file only when a read touches it.
    SubElement(
        source,
        "SourceProperties",
        RasterXSize=str(cols),
        RasterYSize=str(rows),
        DataType="Byte" if band.startswith("mask") else _GDAL_TYPES[piece.info.dtypes[int(band) - 1]],
        BlockXSize=str(block_cols),
        BlockYSize=str(block_rows),
    )
    SubElement(source, "SrcRect", xOff="0", yOff="0", xSize=str(cols), ySize=str(rows))
    target = {"xOff": place.cols.start, "yOff": place.rows.start, "xSize": cols, "ySize": rows}
    SubElement(source, "DstRect", {name: str(value) for name, value in target.items()})
    return source


def _has_holes(places: Sequence[Window], shape: tuple[int, int], most_cells: int = 1 << 24) -> bool:
    """Whether the pieces leave some of the mosaic uncovered; True also where that is too long to find out."""
    row_edges = sorted({edge for place in places for edge in (place.rows.start, place.rows.stop)} | {0, shape[0]})
    col_edges = sorted({edge for place in places for edge in (place.cols.start, place.cols.stop)} | {0, shape[1]})
    if len(row_edges) * len(col_edges) > most_cells:
        return True
    row_of, col_of = ({edge: i for i, edge in enumerate(edges)} for edges in (row_edges, col_edges))
    covered = np.zeros((len(row_edges) - 1, len(col_edges) - 1), dtype=bool)
    for place in places:
        rows = slice(row_of[place.rows.start], row_of[place.rows.stop])
        covered[rows, col_of[place.cols.start] : col_of[place.cols.stop]] = True
    return not covered.all()


def _latitude_first(wkt: str) -> bool:
    axes = pyproj.CRS.from_wkt(wkt).axis_info
    return bool(axes) and axes[0].direction in ("north", "south")


def _plain(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return str(value[0]) if len(set(value)) == 1 else ", ".join(map(str, value))


def _crs_name(info: RasterInfo) -> str:
    return "missing" if info.crs_wkt is None else str(CRS.from_wkt(info.crs_wkt).to_string())[:80]
