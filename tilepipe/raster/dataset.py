"""Datasets of GDAL, opened and read through rasterio, and what went wrong with them."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window as RasterioWindow

from tilepipe.raster.identity import bucket_options
from tilepipe.raster.info import Transform
from tilepipe.window import Window

# A raster without georeferencing is legal here; RasterInfo says so. A filter set once, since
# warnings.catch_warnings is not safe among threads.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

COMPOSED = ("VRT", "GTI", "STACIT", "STACTA")
"""Drivers of rasters that are put together from other files."""

COMPOSED_TURN = threading.RLock()
"""Held while GDAL works at a raster that it puts together from other files."""

GDAL_ERRORS = (RasterioError, CPLE_BaseError, OSError, ValueError)
"""What a call of GDAL may raise."""

OPTIONS = {
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # a truncated JPEG is otherwise filled with grey, silently
    "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE",  # sidecars are asked for by name; a bucket's folder may be endless
    "VRT_NUM_THREADS": "1",  # what fails in GDAL's own threads is not told: the pixels would be 0
    "GDAL_HTTP_MAX_RETRY": 4,
    "GDAL_HTTP_RETRY_DELAY": 1,
}


def environment() -> rasterio.Env:
    """GDAL's settings while one of its files is open."""
    return rasterio.Env(**OPTIONS, **bucket_options(os.environ))


@dataclass(frozen=True, slots=True)
class Warp:
    """A grid that a raster is resampled to while it is read."""

    crs_wkt: str | None
    transform: Transform
    shape: tuple[int, int]
    scale: tuple[float, float] | None
    """(columns, rows): target pixels per source pixel; None to let GDAL find it, for a change of CRS."""
    resampling: Literal["bilinear", "nearest"] = "bilinear"
    add_alpha: bool = False
    """Whether an alpha band is added to say where the source gives nothing."""
    nodata: float | None = None
    """Stands for the source's own nodata value."""


def open_dataset(target: str, warp: Warp | None = None) -> Any:
    """A rasterio dataset of this thread's own, resampled where `warp` says so."""
    dataset = rasterio.open(target, sharing=False)
    if warp is None:
        return dataset
    extras = {} if warp.scale is None else {"XSCALE": warp.scale[0], "YSCALE": warp.scale[1]}
    nodata = {} if warp.nodata is None else {"src_nodata": warp.nodata, "nodata": warp.nodata}
    return WarpedVRT(
        dataset,
        crs=None if warp.crs_wkt is None else CRS.from_wkt(warp.crs_wkt),
        transform=Affine(*warp.transform),
        height=warp.shape[0],
        width=warp.shape[1],
        resampling=Resampling[warp.resampling],
        add_alpha=warp.add_alpha,
        tolerance=1e-6,
        **nodata,
        **extras,
    )


def read_window(dataset: Any, bands: Sequence[int], window: Window, out: NDArray[Any]) -> None:
    """Fills `out` (bands, rows, columns) with the 1-based `bands` of `window`, which lies in the dataset."""
    if len({dataset.dtypes[band - 1] for band in bands}) == 1:
        dataset.read(list(bands), window=rasterio_window(window), out=out)
        return
    for band, plane in zip(bands, out, strict=True):
        dataset.read(band, window=rasterio_window(window), out=plane)


def rasterio_window(window: Window) -> RasterioWindow:
    """The same window as rasterio says it."""
    rows, cols = window.shape
    return RasterioWindow(window.cols.start, window.rows.start, cols, rows)


def reason(error: BaseException) -> str:
    """The first cause of a failed GDAL call, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "errmsg", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")


def files_of(file: str) -> list[str]:
    """The file, its sidecars and the sources of a VRT, through VRTs of VRTs."""
    found: list[str] = []
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        try:
            with COMPOSED_TURN, environment(), rasterio.open(path, sharing=False) as dataset:
                names = [str(name) for name in dataset.files if str(name) != path]
        except GDAL_ERRORS:
            continue
        found.extend(name for name in names if not name.lower().endswith(".vrt") and name not in found)
        waiting.extend(name for name in names if name.lower().endswith(".vrt"))
    return found
