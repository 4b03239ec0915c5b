"""A raster of labels as scores need it: which of its pixels count, and of which class they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
import rasterio
from numpy.typing import NDArray

from tilepipe.errors import InputError, StoreError, UsageError
from tilepipe.raster.dataset import open_dataset
from tilepipe.raster.gdal import GdalRecipe
from tilepipe.raster.info import RasterInfo
from tilepipe.raster.source import Nodata, RasterSource, open_raster
from tilepipe.raster.zarr import is_zarr
from tilepipe.store.creation import is_ours
from tilepipe.store.objects import files_at
from tilepipe.store.output import open_store
from tilepipe.window import Window

NONE = 65535
"""Stands for the class of a pixel that does not count."""


@dataclass(frozen=True, slots=True)
class LabelMap:
    """A raster of one band of whole numbers, each the number of a class."""

    name: str
    """What messages call it."""
    source: RasterSource
    classes: tuple[str, ...] | None = None
    """Names of the values 0, 1, ..., where the raster tells them."""

    @property
    def info(self) -> RasterInfo:
        """Its grid and band."""
        return self.source.info

    @property
    def nodata(self) -> int | None:
        """The value that it declares to be nodata."""
        value = self.info.nodata[0]
        return None if value is None or not float(value).is_integer() else int(value)

    def open(self, classes: int, void: Sequence[int], remedy: str) -> LabelReader:
        """A reader, for any number of threads, that takes `classes` and ignores the values `void`.

        `remedy` ends the message that refuses any other value, and may have {value} in it.
        """
        return LabelReader(self, classes, tuple(void), remedy)


class LabelReader:
    """Reads windows of a label map."""

    def __init__(self, labels: LabelMap, classes: int, void: tuple[int, ...], remedy: str) -> None:
        self._labels, self._classes, self._remedy = labels, classes, remedy
        self._reader = labels.source.open()
        limits = np.iinfo(labels.info.dtype)
        self._void = [value for value in void if limits.min <= value <= limits.max]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    def read(self, window: Window) -> NDArray[np.uint16]:
        """(rows, columns) of a window in the raster: each pixel's class, or NONE where void or nodata.

        InputError, naming file, value and place, where a pixel is of no class.
        """
        pixels = self._reader.read(window)
        values, counted = pixels.values[0], pixels.validity()
        for value in self._void:
            counted = counted & (values != value)
        wrong = counted & ((values < 0) | (values >= self._classes))
        if wrong.any():
            self._refuse(values, wrong, window)
        labels = values.astype(np.uint16)
        labels[~counted] = NONE
        return labels

    def _refuse(self, values: NDArray[np.integer], wrong: NDArray[np.bool_], window: Window) -> None:
        row, col = np.argwhere(wrong)[0].tolist()
        value = int(values[row, col])
        raise InputError(
            f"{self._labels.name} has label {value} at row {window.rows.start + row}, column "
            f"{window.cols.start + col}; legal are 0 to {self._classes - 1}: {self._remedy.format(value=value)}"
        )


def open_labels(path: str, nodata: Nodata = None) -> LabelMap:
    """The label map at a path or URL: a finished tilepipe store, or a raster of one band of whole numbers.

    An alpha band beside it says which pixels count; a colour table is looked past. `nodata` stands for the raster's
    own nodata value. Class names come from a store, or from the tags CLASS_0, CLASS_1, ... of a GeoTIFF's band, as
    `tilepipe export` writes them. InputError or StoreError for anything else.
    """
    if is_zarr(path) and is_ours(files_at(path)):
        return _open_output(path, nodata)
    source = open_raster(path, nodata=nodata)
    bands = [band for band, kind in enumerate(source.raw.color_interp, 1) if kind != "alpha"]
    if len(bands) != 1:
        raise InputError(
            f"{path} has {source.raw.bands} bands; a label map has one, whose values are the numbers of the classes"
        )
    labels = open_raster(path, nodata=nodata, bands=bands)
    if np.dtype(labels.info.dtype).kind not in "iu":
        raise InputError(f"{path} holds {labels.info.dtype} values; labels are whole numbers (gdal_translate -ot Byte)")
    return LabelMap(path, labels, _tagged_classes(labels))


def _open_output(path: str, nodata: Nodata) -> LabelMap:
    store = open_store(path)
    if store.spec.kind != "labels":
        raise StoreError(f"{path} holds a network's values, not labels; give a store that `tilepipe segment` made")
    done = len(store.done())
    if done < store.blocks:
        raise StoreError(f"{path} has {done} of {store.blocks} blocks; run its command again to finish it")
    array = open_raster(f"{path.rstrip('/')}/labels", nodata=store.spec.nodata if nodata is None else nodata)
    source = replace(array, raw=replace(array.raw, name=path))
    return LabelMap(path, source, tuple(item.name for item in store.spec.classes))


def _tagged_classes(source: RasterSource) -> tuple[str, ...] | None:
    if not isinstance(source.recipe, GdalRecipe):
        return None
    with rasterio.Env(), open_dataset(source.recipe.target) as dataset:
        tags = dataset.tags(source.choice.indices[0])
    names = {int(found[1]): name for tag, name in tags.items() if (found := re.fullmatch(r"CLASS_(\d+)", tag))}
    return tuple(names[i] for i in range(len(names))) if names and set(names) == set(range(len(names))) else None


def parse_classes(text: str) -> tuple[str, ...]:
    """Class names from "land,sea,road", or from their number: "3" gives those named "0", "1", "2".

    >>> parse_classes("land, sea"), parse_classes("2")
    (('land', 'sea'), ('0', '1'))
    """
    if text.strip().isdigit():
        return tuple(map(str, range(int(text))))
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise UsageError(f"classes {text!r} has a name missing; write names such as land,sea,road, or their number")
    return names
