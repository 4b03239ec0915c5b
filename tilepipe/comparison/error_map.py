"""Where a prediction is wrong, as a GeoTIFF of every pixel or as a picture, written block by block."""

from __future__ import annotations

import os
import uuid
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from PIL import Image
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window as RasterWindow

from tilepipe.comparison.pairs import Pair
from tilepipe.errors import RunError
from tilepipe.raster.dataset import reason
from tilepipe.targets import check_target
from tilepipe.window import Window

CORRECT, WRONG, IGNORED = 0, 1, 255
"""Values of an error map; pixels that are not scored are IGNORED."""

COLORS = {CORRECT: (222, 235, 222), WRONG: (200, 30, 30), IGNORED: (150, 150, 150)}
SIDE = 2048
"""Rows and columns of a picture, at most."""
TILE = 512

Errors = NDArray[np.uint8]


class ErrorMap(Protocol):
    """A file that appears when it is whole, as its context ends without an error."""

    def __enter__(self) -> Self:
        """The map, to be written to."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finishes the file, or leaves none."""

    def write(self, window: Window, errors: Errors) -> None:
        """Take a window's values; windows must not overlap."""


def error_map(path: str, pair: Pair, overwrite: bool = False) -> ErrorMap:
    """A map of the pixels that both maps of a pair have: .tif has every one of them, .png at most SIDE a side.

    UsageError for another ending, and where there is a file that may not be replaced.
    """
    ending = check_target(path, (".tif", ".tiff", ".png"), overwrite)
    return ErrorPicture(path, pair.shape) if ending == ".png" else ErrorRaster(path, pair)


class _File(ABC):
    """A file that is made under another name, and gets its own when it is whole."""

    def __init__(self, path: str) -> None:
        self._target = Path(path)
        self._temporary = self._target.with_name(f".{self._target.stem}.{uuid.uuid4().hex}{self._target.suffix}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close(whole=error is None)
            if error is None:
                os.replace(self._temporary, self._target)
        except OSError as failure:
            raise RunError(f"{self._target}: {failure.strerror}; free some space or choose another path") from failure
        finally:
            self._temporary.unlink(missing_ok=True)

    @abstractmethod
    def _close(self, whole: bool) -> None:
        """Finish what was written, where it is whole; else let go of it."""


class ErrorRaster(_File):
    """A tiled GeoTIFF of one byte a pixel with a colour table, georeferenced as the pair is."""

    def __init__(self, path: str, pair: Pair) -> None:
        super().__init__(path)
        self._tif = self._explained(rasterio.open, self._temporary, "w", **_profile(pair))
        self._tif.write_colormap(1, {value: (*color, 255) for value, color in COLORS.items()})
        self._tif.colorinterp = [ColorInterp.palette]
        self._tif.update_tags(1, CLASS_0="correct", CLASS_1="wrong")
        self._wrong = 0

    def write(self, window: Window, errors: Errors) -> None:
        """Write a window's values."""
        self._wrong += int(np.count_nonzero(errors == WRONG))
        place = RasterWindow(window.cols.start, window.rows.start, window.shape[1], window.shape[0])
        self._explained(self._tif.write, errors, 1, window=place)

    def _close(self, whole: bool) -> None:
        self._explained(self._tif.close)
        if whole and self._explained(self._counted) != self._wrong:
            # GDAL writes late, and says nothing of a disk that is full when it closes the file.
            raise RunError(f"{self._target}: not written whole; free some space and run the same command again")

    def _counted(self) -> int:
        """Wrong pixels that are in the file."""
        with rasterio.open(self._temporary) as tif:
            return sum(int(np.count_nonzero(tif.read(1, window=window) == WRONG)) for _, window in tif.block_windows(1))

    def _explained(self, call: Any, *args: Any, **named: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                return call(*args, **named)
        except (RasterioError, CPLE_BaseError) as error:
            raise RunError(f"{self._target}: {reason(error)}; free some space or choose another path") from error


class ErrorPicture(_File):
    """A PNG in which a cell of n x n pixels is as red as the share of its scored pixels that are wrong."""

    def __init__(self, path: str, shape: tuple[int, int]) -> None:
        super().__init__(path)
        self._step = max(1, -(-max(shape) // SIDE))
        cells = (-(-shape[0] // self._step), -(-shape[1] // self._step))
        self._wrong, self._scored = np.zeros(cells, np.int64), np.zeros(cells, np.int64)

    def write(self, window: Window, errors: Errors) -> None:
        """Count a window's pixels in the cells that they lie in."""
        starts, places = [], []
        for axis in (window.rows, window.cols):
            first, last = axis.start // self._step, (axis.stop - 1) // self._step
            starts.append(np.maximum(np.arange(first, last + 1) * self._step - axis.start, 0))
            places.append(slice(first, last + 1))
        for total, flags in ((self._wrong, errors == WRONG), (self._scored, errors != IGNORED)):
            rows = np.add.reduceat(flags, starts[0], axis=0, dtype=np.int64)
            total[tuple(places)] += np.add.reduceat(rows, starts[1], axis=1)

    def picture(self) -> Image.Image:
        """The picture of what was written."""
        share = (self._wrong / np.maximum(self._scored, 1))[..., None]
        colors = (1 - share) * COLORS[CORRECT] + share * COLORS[WRONG]
        colors[self._scored == 0] = COLORS[IGNORED]
        return Image.fromarray(np.rint(colors).astype(np.uint8))

    def _close(self, whole: bool) -> None:
        if whole:
            self.picture().save(self._temporary, "PNG")


def _profile(pair: Pair) -> dict[str, Any]:
    rows, cols = pair.shape
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "height": rows,
        "width": cols,
        "count": 1,
        "dtype": "uint8",
        "nodata": IGNORED,
        "tiled": True,
        "blockxsize": TILE,
        "blockysize": TILE,
        "compress": "deflate",
        "bigtiff": "IF_SAFER",
    }
    place = pair.overlap
    for info, window in ((pair.prediction.info, place.first), (pair.truth.info, place.second)):
        if info.transform is not None:
            transform = Affine(*info.transform) * Affine.translation(window.cols.start, window.rows.start)
            profile["transform"] = transform
            if info.crs_wkt is not None:
                profile["crs"] = CRS.from_wkt(info.crs_wkt)
            break
    return profile
