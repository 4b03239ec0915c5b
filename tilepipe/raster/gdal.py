"""Rasters that GDAL opens: what they are, and reading them from many threads."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Interleaving, MaskFlags, Resampling
from rasterio.env import set_gdal_config
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window as RasterioWindow

from tilepipe.errors import InputError, ReadError
from tilepipe.raster.identity import bucket_options, file_identity
from tilepipe.raster.info import GroundPoint, RasterInfo, Transform, cells
from tilepipe.window import Window

# A raster without georeferencing is legal here; RasterInfo says so. A filter set once, since
# warnings.catch_warnings is not safe among threads.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

CACHE_BYTES = 64 << 20
"""GDAL's block cache for sources read by tiles: a larger one makes a single pass slower."""

BLOCK_LIMIT = 2 << 30
"""Bytes that one block of a file may decode to before the file is refused."""

COMPOSED = ("VRT", "GTI", "STACIT", "STACTA")
"""Drivers of rasters that are put together from other files."""

WARP_BLOCK = 512
"""Rows and columns of the cells that a resampled raster is computed in, whatever the windows that are read: GDAL
rounds differently for different rectangles."""

_GDAL_ERRORS = (RasterioError, CPLE_BaseError, OSError, ValueError)
_OPTIONS = {
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # a truncated JPEG is otherwise filled with grey, silently
    "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE",  # sidecars are asked for by name; a bucket's folder may be endless
    "VRT_NUM_THREADS": "1",  # what fails in GDAL's own threads is not told: the pixels would be 0
    "GDAL_HTTP_MAX_RETRY": 4,
    "GDAL_HTTP_RETRY_DELAY": 1,
}


def _environment() -> rasterio.Env:
    """GDAL's settings while one of its files is open."""
    return rasterio.Env(**_OPTIONS, **bucket_options(os.environ))


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


@dataclass(frozen=True, slots=True)
class GdalRecipe:
    """How to open a raster with GDAL anywhere."""

    name: str
    target: str
    """A path, a /vsi path, or the XML of a VRT."""
    files: tuple[str, ...]
    """What was given: the files whose content is read, without their sidecars."""
    warp: Warp | None = None
    cache_bytes: int = CACHE_BYTES
    """Of GDAL's block cache, which is one for the whole process."""
    one_dataset: bool = False
    """Whether threads take turns at one dataset. Files stored in strips want it: a strip serves many windows, and
    each dataset would decode it and keep it for itself."""
    composed: bool = False
    """Whether GDAL puts it together from other files. It keeps their datasets in a pool of the whole process, and
    tells of one that cannot be opened once: later reads, of any thread, give 0 and no error. So all such rasters
    take turns, and after an error their datasets are closed, which empties the pool."""

    def backend(self) -> GdalBackend:
        """A backend that opens its datasets when they are first read, one per thread."""
        return GdalBackend(self)

    def identity(self) -> list[dict[str, Any]]:
        """Path, size and modification time of every file, sidecar and VRT source; of URLs what they tell."""
        paths = dict.fromkeys(path for file in self.files for path in _listed(file))
        parts = [file_identity(path) for path in paths]
        if self.warp is not None:
            parts.append({"resampled": [*self.warp.transform, *self.warp.shape], "by": self.warp.resampling})
        return parts


_COMPOSED_TURN = threading.RLock()
_COMPOSED: WeakSet[GdalBackend] = WeakSet()
"""Every backend of this process that reads a raster which GDAL puts together."""


class _Slot:
    """Where the one dataset is kept that threads take turns at; a threading.local where each has its own."""


class GdalBackend:
    """Reads through one dataset per thread, or one at a time: GDAL's datasets are not safe among threads."""

    def __init__(self, recipe: GdalRecipe) -> None:
        self._recipe = recipe
        self._local: Any = _Slot() if recipe.one_dataset or recipe.composed else threading.local()
        self._turn: AbstractContextManager[Any] = threading.Lock() if recipe.one_dataset else nullcontext()
        if recipe.composed:
            self._turn = _COMPOSED_TURN
            _COMPOSED.add(self)
        self._opened: list[Any] = []
        self._generation = 0
        self._lock = threading.Lock()

    def fetch(self, bands: Sequence[int], window: Window, out: NDArray[Any]) -> None:
        """Fill `out` (bands, rows, columns) with the 1-based `bands` of `window`, which lies in the raster."""
        if self._recipe.warp is None:
            with self._reading(window) as dataset:
                _read(dataset, bands, window, out)
            return
        for cell in cells(window, WARP_BLOCK, self._recipe.warp.shape):
            values = np.empty((len(bands), *cell.shape), out.dtype)
            with self._reading(cell) as dataset:
                _read(dataset, bands, cell, values)
            part = cell.intersect(window)
            out[(slice(None), *part.within(window))] = values[(slice(None), *part.within(cell))]

    def fetch_mask(self, bands: Sequence[int], window: Window) -> NDArray[np.bool_]:
        """(rows, columns): where the mask of every one of `bands` is not 0."""
        with self._reading(window) as dataset:
            shared = MaskFlags.per_dataset in dataset.mask_flag_enums[bands[0] - 1]
            parts = [
                dataset.read_masks(band, window=_rasterio_window(window)) != 0
                for band in (bands[:1] if shared else bands)
            ]
        return np.logical_and.reduce(parts)

    def reduced(
        self, bands: Sequence[int], place: RasterioWindow, shape: tuple[int, int], nearest: bool
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """(bands, rows, columns) of `shape` and which are valid: `place`, between pixels too, from its overviews.

        By mean over the pixels or, `nearest`, one of them.
        """
        how = Resampling.nearest if nearest or self._recipe.composed else Resampling.average
        with self._reading(_hull(place)) as dataset:
            values = dataset.read(list(bands), window=place, out_shape=(len(bands), *shape), resampling=how)
            masks = dataset.read_masks(list(bands), window=place, out_shape=(len(bands), *shape))
        return values, (masks != 0).all(axis=0)

    def has_overviews(self) -> bool:
        """Whether the file, or the first of those that it is put together from, has overviews."""
        with self._reading(Window.of(0, 1, 0, 1)) as dataset:
            if dataset.overviews(1) or not self._recipe.composed:
                return bool(dataset.overviews(1))
            # The first of its files is the VRT itself, if it is one.
            parts = [path for path in dataset.files if not path.lower().endswith(".vrt")]
        try:
            with rasterio.Env(**_OPTIONS), rasterio.open(parts[0], sharing=False) as first:
                return bool(first.overviews(1))
        except (IndexError, *_GDAL_ERRORS):
            return False

    def close(self) -> None:
        """Close every thread's dataset."""
        with self._turn:
            self._drop()

    @contextmanager
    def _reading(self, window: Window) -> Iterator[Any]:
        try:
            with self._turn, _environment():
                try:
                    yield self._dataset()
                except _GDAL_ERRORS:
                    if self._recipe.composed:
                        for backend in list(_COMPOSED):
                            backend._drop()
                    raise
        except _GDAL_ERRORS as error:
            raise ReadError(f"{self._recipe.name}: cannot read {window}: {reason(error)}") from error

    def _drop(self) -> None:
        """Close what is open; whoever has no turn to take must not be reading."""
        with self._lock:
            self._generation += 1
            for dataset in self._opened:
                dataset.close()
                if isinstance(dataset, WarpedVRT):
                    dataset.src_dataset.close()
            self._opened.clear()

    def _dataset(self) -> Any:
        dataset, generation = getattr(self._local, "dataset", None), getattr(self._local, "generation", -1)
        if dataset is None or generation != self._generation:
            set_gdal_config("GDAL_CACHEMAX", int(self._recipe.cache_bytes))
            dataset = open_dataset(self._recipe.target, self._recipe.warp)
            with self._lock:
                self._opened.append(dataset)
                self._local.dataset, self._local.generation = dataset, self._generation
        return dataset


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


def describe(name: str, target: str, warp: Warp | None = None, block_limit: int = BLOCK_LIMIT) -> RasterInfo:
    """What the raster at `target` is; an InputError in one line where it cannot be opened or used."""
    try:
        with _COMPOSED_TURN, _environment(), open_dataset(target, warp) as dataset:
            info = _describe(name, dataset)
    except _GDAL_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot open {name}: {reason(error)}") from error
    _refuse_large_blocks(info, block_limit)
    return info


def _describe(name: str, dataset: Any) -> RasterInfo:
    if dataset.count == 0:
        inside = list(dataset.subdatasets)
        hint = f"; name one of its subdatasets: {', '.join(inside[:6])}" if inside else ""
        raise InputError(f"{name} holds no raster band{hint}")
    odd = next((dtype for dtype in dataset.dtypes if "complex" in dtype), None)
    if odd is not None:
        raise InputError(f"{name} holds {odd} pixels; convert them to real numbers first, e.g. their magnitude")
    alpha = next((band for band, kind in enumerate(dataset.colorinterp, 1) if kind == ColorInterp.alpha), None)
    transform: Transform | None = tuple(dataset.transform)[:6]
    if dataset.crs is None and dataset.transform == Affine.identity():
        transform = None
    gcps, gcps_crs = dataset.gcps
    if gcps and dataset.transform == Affine.identity():
        transform = None
    return RasterInfo(
        name=name,
        shape=(dataset.height, dataset.width),
        dtypes=tuple(np.dtype(dtype).name for dtype in dataset.dtypes),
        nodata=_nodata(dataset),
        color_interp=tuple(kind.name for kind in dataset.colorinterp),
        descriptions=tuple(dataset.descriptions),
        crs_wkt=dataset.crs.to_wkt() if dataset.crs else None,
        transform=transform,
        gcps=tuple(GroundPoint(p.row, p.col, p.x, p.y, p.z or 0.0) for p in gcps),
        gcps_crs_wkt=gcps_crs.to_wkt() if gcps_crs else None,
        colormap=_colormap(dataset),
        scales=tuple(dataset.scales),
        offsets=tuple(dataset.offsets),
        block_shape=dataset.block_shapes[0],
        interleaved=dataset.interleaving == Interleaving.pixel and dataset.count > 1,
        driver=dataset.driver,
        compression=None if dataset.compression is None else dataset.compression.name,
        alpha=alpha,
        stored_mask=_stored_mask(dataset),
    )


def _nodata(dataset: Any) -> tuple[float | int | None, ...]:
    """The nodata values that GDAL's masks follow: a mask stored beside the pixels comes before them."""
    return tuple(
        value if flags == [MaskFlags.nodata] else None
        for value, flags in zip(dataset.nodatavals, dataset.mask_flag_enums, strict=True)
    )


def _stored_mask(dataset: Any) -> Literal["none", "dataset", "bands"]:
    kinds = set()
    for flags in dataset.mask_flag_enums:
        if MaskFlags.all_valid in flags or MaskFlags.alpha in flags or flags == [MaskFlags.nodata]:
            continue
        kinds.add("dataset" if MaskFlags.per_dataset in flags else "bands")
    return "bands" if "bands" in kinds else "dataset" if kinds else "none"


def _colormap(dataset: Any) -> tuple[tuple[int, int, int, int], ...] | None:
    if dataset.colorinterp[0] != ColorInterp.palette:
        return None
    try:
        table = dataset.colormap(1)
    except ValueError:
        return None
    return tuple(tuple(table[value]) for value in range(len(table)))


def _refuse_large_blocks(info: RasterInfo, limit: int) -> None:
    rows, cols = info.block_shape
    needed = rows * cols * (info.pixel_bytes if info.interleaved else np.dtype(info.dtype).itemsize)
    if needed > limit:
        raise InputError(
            f"{info.name} is stored in blocks of {rows} x {cols} pixels, {needed / 2**30:.1f} GiB each in memory, "
            f"over the limit of {limit / 2**30:.1f} GiB: rewrite it in tiles (gdal_translate -co TILED=YES)"
        )


def reason(error: BaseException) -> str:
    """The first cause of a failed GDAL call, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "errmsg", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")


def _listed(file: str) -> list[str]:
    """The file, its sidecars and the sources of a VRT, through VRTs of VRTs."""
    found: list[str] = []
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        try:
            with _COMPOSED_TURN, _environment(), rasterio.open(path, sharing=False) as dataset:
                names = [str(name) for name in dataset.files if str(name) != path]
        except _GDAL_ERRORS:
            continue
        found.extend(name for name in names if not name.lower().endswith(".vrt") and name not in found)
        waiting.extend(name for name in names if name.lower().endswith(".vrt"))
    return found


def warped_to_pixel_size(info: RasterInfo, factor: tuple[float, float]) -> Warp:
    """The raster's own grid with `factor` (columns, rows) times as many pixels, its corner kept.

    The last pixel's centre stays in the raster; with a stored mask, alpha says where it gives nothing.
    """
    if info.transform is None:
        raise InputError(f"{info.name} has no affine transform; it cannot be resampled to a pixel size")
    fx, fy = factor
    shape = max(1, round(info.shape[0] * fy)), max(1, round(info.shape[1] * fx))
    transform = Affine(*info.transform) * Affine.scale(1 / fx, 1 / fy)
    declared = next((value for value in info.nodata if value is not None), None)
    return Warp(
        info.crs_wkt,
        tuple(transform)[:6],
        shape,
        (fx, fy),
        add_alpha=info.alpha is None and info.stored_mask != "none",
        nodata=declared,
    )


def _read(dataset: Any, bands: Sequence[int], window: Window, out: NDArray[Any]) -> None:
    if len({dataset.dtypes[band - 1] for band in bands}) == 1:
        dataset.read(list(bands), window=_rasterio_window(window), out=out)
        return
    for band, plane in zip(bands, out, strict=True):
        dataset.read(band, window=_rasterio_window(window), out=plane)


def _hull(place: RasterioWindow) -> Window:
    """The pixels that a place between pixels touches."""
    bottom, right = place.row_off + place.height, place.col_off + place.width
    return Window.of(math.floor(place.row_off), math.ceil(bottom), math.floor(place.col_off), math.ceil(right))


def _rasterio_window(window: Window) -> RasterioWindow:
    rows, cols = window.shape
    return RasterioWindow(window.cols.start, window.rows.start, cols, rows)
