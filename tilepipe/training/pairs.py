"""An image raster and its labels, read together by window, in any thread or process."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS
from pyproj.exceptions import CRSError

from tilepipe.errors import InputError
from tilepipe.raster.bands import RGB, check_numbers, select_bands
from tilepipe.raster.info import BandChoice, RasterInfo
from tilepipe.raster.source import RasterSource, Reader, open_raster
from tilepipe.training.samples import Sample
from tilepipe.window import Window

UNLABELLED = 65535
"""What stands, in the labels that are read, for pixels masked in the label raster or beyond it."""

OPEN_RASTERS = 128
"""Rasters that a process keeps open; systems allow some 1000 files to one."""

TOLERANCE = 0.1
"""Of image and label: how far, in pixels, their corners may lie apart."""


class PairPixels(NamedTuple):
    """What a pair holds in a window."""

    values: NDArray[Any]
    """(bands, rows, columns), as stored; beyond the raster by reflection."""
    valid: NDArray[np.bool_]
    """(rows, columns): every band unmasked and finite."""
    labels: NDArray[np.uint16]
    """(rows, columns): as stored; UNLABELLED where masked or beyond the raster."""


class Readers:
    """Opened rasters, the latest used of each process; pickles as none at all.

    GDAL's files must not be shared by a process and those that it forks: each opens its own.
    """

    def __init__(self, most: int = OPEN_RASTERS) -> None:
        self._most = most
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._opened: OrderedDict[tuple[str, str], Reader] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Readers, (self._most,)

    def of(self, key: tuple[str, str], source: RasterSource) -> Reader:
        """A reader of the raster that goes by `key`, for any thread of this process."""
        if self._process != os.getpid():
            self._forget()
        with self._lock:
            reader = self._opened.pop(key, None) or source.open()
            self._opened[key] = reader
            if len(self._opened) > self._most:
                # Threads that still read by it keep it; its files close with their last reference.
                self._opened.popitem(last=False)
            return reader


@dataclass(frozen=True, slots=True)
class Pair:
    """A sample's rasters, opened where they are read; picklable."""

    sample: Sample
    image: RasterSource
    """With the bands that the network gets, in its order."""
    label: RasterSource
    _readers: Readers = field(default_factory=Readers, compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of both."""
        return self.image.raw.shape

    @property
    def bands(self) -> int:
        """The number of bands that are read of the image."""
        return self.image.info.bands

    def read(self, window: Window) -> PairPixels:
        """(values, valid, labels) of a window, which may reach beyond the raster.

        Raises ReadError where a file cannot be read, InputError for labels below 0 or above 65534.
        """
        values, valid = self._readers.of(("image", self.sample.image), self.image).read(window)
        valid = np.ones(window.shape, np.bool_) if valid is None else valid
        return PairPixels(values, valid, self.read_labels(window))

    def read_labels(self, window: Window) -> NDArray[np.uint16]:
        """The labels alone, as `read` gives them."""
        labels = np.full(window.shape, UNLABELLED, np.uint16)
        inside = window.clip(self.shape)
        if inside.area:
            stored, valid = self._readers.of(("label", self.sample.label), self.label).read(inside)
            labels[inside.within(window)] = self._numbers(stored[0], valid, inside)
        return labels

    def _numbers(self, stored: NDArray[Any], valid: NDArray[np.bool_] | None, window: Window) -> NDArray[np.uint16]:
        if stored.dtype not in (np.uint8, np.uint16):
            wrong = (stored < 0) | (stored >= UNLABELLED)
            if valid is not None:
                wrong &= valid
            if wrong.any():
                row, col = np.argwhere(wrong)[0]
                raise InputError(
                    f"{self.label.info.name} has the label {stored[row, col]} at row {row + window.rows.start}, column "
                    f"{col + window.cols.start}; labels are 0 to {UNLABELLED - 1}: if it means no label, declare it "
                    f"(gdal_edit.py -a_nodata {stored[row, col]})"
                )
        labels = stored.astype(np.uint16)
        if valid is not None:
            labels[~valid] = UNLABELLED
        return labels


def open_pairs(
    samples: Sequence[Sample], bands: tuple[int, ...] | None = None, names: tuple[str, ...] | None = None
) -> tuple[Pair, ...]:
    """The samples' rasters, whose grids and bands are checked; no pixel is read.

    bands: the images' 1-based band numbers. names: the band names that a network wants, which are found by number,
    colour or name as for a job (`select_bands`). With neither, all bands but alpha; a palette gives its colours.
    Labels are the raster's one band: of a palette, the indices. InputError in one line where an image and its label
    differ in size or place, a label has several bands or is no whole number, or images differ in bands.
    """
    readers = Readers()
    pairs = [
        Pair(sample, _open_image(sample.image, bands, names), _open_label(sample.label), readers) for sample in samples
    ]
    for pair in pairs:
        _require_one_grid(pair.image.info, pair.label.info)
        if pair.bands != pairs[0].bands:
            raise InputError(
                f"{pair.image.info.name} has {pair.bands} bands and {pairs[0].image.info.name} has "
                f"{pairs[0].bands}; choose the same of all with --bands"
            )
    return tuple(pairs)


def band_names(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """A name for each band that the pairs' images share: their declared colours or names, else band1, band2, ...

    Three bands that declare nothing are red, green and blue.
    """
    info = pairs[0].image.info
    told = []
    for text, colour in zip(info.descriptions, info.color_interp, strict=True):
        # A first band is gray by default, whatever it holds.
        plain = colour in ("undefined", "palette", "gray")
        told.append((text or "").strip().lower() or ("gray" if colour == "gray" else "") if plain else colour)
    if all(told) and len(set(told)) == len(told):
        return tuple(told)
    return RGB if len(told) == len(RGB) else tuple(f"band{number}" for number in range(1, len(told) + 1))


def _open_image(path: str, bands: tuple[int, ...] | None, names: tuple[str, ...] | None) -> RasterSource:
    source = open_raster(path)
    info = source.raw
    if names is not None:
        return source.select(select_bands(info, names, bands))
    if bands is not None:
        return source.select(BandChoice(check_numbers(info, bands)))
    plain = _without_alpha(info)
    if info.colormap is not None and len(plain) == 1:
        return source.select(select_bands(info, RGB))
    return source.select(BandChoice(plain))


def _open_label(path: str) -> RasterSource:
    source = open_raster(path)
    plain = _without_alpha(source.raw)
    if len(plain) != 1:
        raise InputError(
            f"{source.raw.name} has {len(plain)} bands and cannot be a label, which is one band of class numbers; "
            "colours are to be turned into numbers first"
        )
    label = source.select(BandChoice(plain))
    if np.dtype(label.info.dtype).kind not in "iu":
        raise InputError(
            f"{source.raw.name} holds {label.info.dtype} values and cannot be a label, which is whole class numbers; "
            "convert it (gdal_translate -ot Byte)"
        )
    return label


def _without_alpha(info: RasterInfo) -> tuple[int, ...]:
    bands = range(1, info.bands + 1)
    return tuple(band for band in bands if info.color_interp[band - 1] != "alpha") or tuple(bands)


def _require_one_grid(image: RasterInfo, label: RasterInfo) -> None:
    if image.shape != label.shape:
        raise InputError(
            f"{image.name} has {image.shape[0]} x {image.shape[1]} pixels and its label {label.name} "
            f"{label.shape[0]} x {label.shape[1]}; they are to be alike"
        )
    if image.crs_wkt and label.crs_wkt and not _same_crs(image.crs_wkt, label.crs_wkt):
        raise InputError(f"{image.name} and its label {label.name} differ in CRS; reproject one (gdalwarp)")
    if image.transform is None or label.transform is None:
        return
    apart = _apart(Affine(*image.transform), Affine(*label.transform), image.shape)
    if apart > TOLERANCE:
        raise InputError(
            f"{image.name} and its label {label.name} lie up to {apart:.3g} pixels apart by their georeference; "
            "give the label the image's (gdal_edit.py -a_ullr), or resample it (gdalwarp)"
        )


def _apart(image: Affine, label: Affine, shape: tuple[int, int]) -> float:
    """The largest distance of corresponding corners, in the image's pixels, along either axis."""
    to_image = ~image * label
    corners = [(float(col), float(row)) for row in (0, shape[0]) for col in (0, shape[1])]
    return max(abs(there - here) for corner in corners for there, here in zip(to_image * corner, corner, strict=True))


def _same_crs(one: str, other: str) -> bool:
    try:
        return one == other or CRS.from_wkt(one).equals(CRS.from_wkt(other), ignore_axis_order=True)
    except CRSError:
        return False
