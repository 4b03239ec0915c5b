"""A finished store as one GeoTIFF: cloud optimized, tiled, compressed, in bounded memory.

    square of the map --levels--> a GeoTIFF of the map, one of each overview --> one file, read back --> its name

The overviews are those that stores have (`store.pyramid`), made anew on the way, so that they fit the pixels that are
written. Labels and confidence are one band, labels with the classes' colours and names. Values are a band of float32
for each channel, under its name, with NaN for nodata.

GeoTIFF has no field for class names. They are written twice: as tags of the band (`CLASS_0=field`), which travel
inside the file, and as GDAL's category names in the sidecar `<name>.aux.xml`, where GDAL and QGIS look for them.
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree
from zlib import crc32

import numpy as np
import rasterio
import zarr
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.transform import Affine
from rasterio.windows import Window as RasterWindow

from tilepipe.cog import level_path, make_cog
from tilepipe.errors import RunError, StoreError, UsageError
from tilepipe.store.durable import explain
from tilepipe.store.output import OutputStore, open_store
from tilepipe.store.overviews import reduce_block
from tilepipe.store.pyramid import Pyramid
from tilepipe.store.spec import ArraySpec, StoreSpec
from tilepipe.window import Interval, Window

TILE = 512
COMPRESSIONS = ("deflate", "zstd", "lzw", "none")
Compression = Literal["deflate", "zstd", "lzw", "none"]
CACHE_BYTES = 64 << 20
"""GDAL's block cache while writing: what is flushed late is counted twice."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What is written, and how."""

    array: Literal["labels", "confidence", "values"] | None = None
    """Which of the store's arrays; None for its labels, or for its values where it holds those."""
    compress: Compression = "deflate"
    cog: bool = True
    """A Cloud Optimized GeoTIFF; overviews of labels by majority, of others by mean; needs twice the space."""
    allow_partial: bool = False
    """Export an unfinished store, too, with nodata where blocks are not done."""
    overwrite: bool = False


def export_geotiff(
    store_path: str | os.PathLike[str],
    tif_path: str | os.PathLike[str],
    options: ExportOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The path of the GeoTIFF that now holds the store's labels or values: it appears when it is whole.

    `progress` is called with (pixels written, pixels in all) after each window. Raises UsageError for an output
    that exists or an unknown option, StoreError for an unfinished store, RunError for a full disk.
    """
    options = options or ExportOptions()
    target = Path(tif_path)
    if options.compress not in COMPRESSIONS:
        raise UsageError(f"compression {options.compress!r}; use one of {', '.join(COMPRESSIONS)}")
    if target.exists() and (target.is_dir() or not options.overwrite):
        raise UsageError(f"{target} exists; choose another path or use --overwrite")
    store = open_store(store_path)
    _refuse_unfinished(store, options.allow_partial)
    array = _array(store, options.array)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tif")
    try:
        with _explained(target), rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES, GDAL_PAM_ENABLED="NO"):
            pyramid = Pyramid.of(store.spec)
            pyramid = pyramid if options.cog else replace(pyramid, levels=0)
            checksums = _write(store, array, pyramid, temporary, options, progress)
            if options.cog:
                make_cog(temporary, pyramid.levels, TILE, _cog_creation(array, options.compress))
            # GDAL writes late, and says nothing of a disk that is full when it closes the file.
            if _checksums(temporary, pyramid) != checksums:
                raise RunError(f"{target}: not written whole; free some space and run the same command again")
        _publish(temporary, target, _category_xml(store.spec) if array.name == "labels" else None)
    finally:
        for path in target.parent.glob(f"{glob.escape(temporary.name)}*"):
            path.unlink(missing_ok=True)
    return target


def _refuse_unfinished(store: OutputStore, allow_partial: bool) -> None:
    done = len(store.done())
    if done < store.blocks and not allow_partial:
        raise StoreError(
            f"{store.path} has {done} of {store.blocks} blocks; run its command again to finish it, "
            "or allow a partial export"
        )


def _array(store: OutputStore, name: str | None) -> ArraySpec:
    found = {array.name: array for array in store.spec.arrays() if array.name != "probabilities"}
    name = name or store.spec.kind
    if name not in found:
        raise UsageError(f"{store.path} has no array {name!r} to export; it has {', '.join(found)}")
    return found[name]


def _write(
    store: OutputStore,
    array: ArraySpec,
    pyramid: Pyramid,
    path: Path,
    options: ExportOptions,
    progress: Callable[[int, int], None] | None,
) -> list[int]:
    """The checksums of what was written of each level, as `_checksums` reads them back."""
    values, spec = store.array(array.name), store.spec
    written, checksums = 0, [0] * (pyramid.levels + 1)
    done = store.done() if options.allow_partial else None
    with ExitStack() as stack:
        tifs = [
            stack.enter_context(
                rasterio.open(level_path(path, level), "w", **_profile(pyramid.level(level), array, options))
            )
            for level in range(pyramid.levels + 1)
        ]
        _describe(tifs[0], spec, array)
        for square in pyramid.squares():
            window = pyramid.window(square)
            for band in tifs[0].indexes:
                block = _band(values, band, window)
                if done is not None:
                    _blank_unfinished(block, window, spec, done, array.fill)
                for level, part in enumerate([block, *reduce_block(spec, array, block, pyramid.levels)]):
                    tifs[level].write(part, band, window=_raster_window(pyramid.window(square, level)))
                    checksums[level] = crc32(np.ascontiguousarray(part).data, checksums[level])
            written += window.area
            if progress is not None:
                progress(written, spec.shape[0] * spec.shape[1])
    return checksums


def _band(values: zarr.Array[Any], band: int, window: Window) -> NDArray[Any]:
    """A window of one band, as GeoTIFF keeps it: GDAL reads a 16-bit float in few versions."""
    place = (slice(window.rows.start, window.rows.stop), slice(window.cols.start, window.cols.stop))
    block = np.asarray(values[place if values.ndim == 2 else (band - 1, *place)])
    if block.dtype.kind == "f":
        block = block.astype(np.float32)
        # GDAL leaves out tiles without data, and gives back its own NaN for them.
        block[np.isnan(block)] = np.nan
    return block


def _checksums(path: Path, pyramid: Pyramid) -> list[int]:
    return [_checksum(path, pyramid, level) for level in range(pyramid.levels + 1)]


def _checksum(path: Path, pyramid: Pyramid, level: int) -> int:
    checksum, chosen = 0, {"overview_level": level - 1} if level else {}
    with rasterio.open(path, num_threads="ALL_CPUS", **chosen) as tif:
        for square in pyramid.squares():
            for band in tif.indexes:
                window = _raster_window(pyramid.window(square, level))
                checksum = crc32(tif.read(band, window=window), checksum)
    return checksum


def _raster_window(window: Window) -> RasterWindow:
    return RasterWindow(window.cols.start, window.rows.start, len(window.cols), len(window.rows))


def _profile(spec: StoreSpec, array: ArraySpec, options: ExportOptions) -> dict[str, Any]:
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "height": spec.shape[0],
        "width": spec.shape[1],
        "count": math.prod(array.shape[:-2]),
        "dtype": _dtype(array),
        "nodata": array.fill,
        "tiled": True,
        "blockxsize": TILE,
        "blockysize": TILE,
        **_compression(array, options),
        "bigtiff": "IF_SAFER",
        "num_threads": "ALL_CPUS",
        "sparse_ok": True,
    }
    if len(array.shape) > 2:
        # GDAL lays an uncompressed COG's bands out as its source's, and by bands it is none.
        profile["interleave"] = "pixel" if options.cog and options.compress == "none" else "band"
    if spec.crs_wkt is not None:
        profile["crs"] = CRS.from_wkt(spec.crs_wkt)
    if spec.transform is not None:
        profile["transform"] = Affine(*spec.transform)
    elif spec.gcps:
        profile["gcps"] = [GroundControlPoint(p.row, p.col, p.x, p.y, p.z) for p in spec.gcps]
    return profile


def _compression(array: ArraySpec, options: ExportOptions) -> dict[str, Any]:
    # What a cloud optimized file is made from is read once and removed.
    found: dict[str, Any] = {"compress": "deflate", "zlevel": 1} if options.cog else {"compress": options.compress}
    if found["compress"] == "zstd":
        found["zstd_level"] = 9
    if array.dtype.kind == "f" and found["compress"] != "none":
        found["predictor"] = 3  # TIFF's for floating point
    return found


def _dtype(array: ArraySpec) -> str:
    return "float32" if array.dtype.kind == "f" else array.dtype.name


def _describe(tif: Any, spec: StoreSpec, array: ArraySpec) -> None:
    for band, name in enumerate(spec.outputs or [array.name], 1):
        tif.set_band_description(band, name)
    if array.name != "labels":
        return
    tif.update_tags(1, **{f"CLASS_{value}": label.name for value, label in enumerate(spec.classes)})
    # TIFF's palettes belong to bytes; a 16-bit palette is beyond most readers.
    if array.dtype.itemsize == 1:
        palette = {value: (*label.color, 255) for value, label in enumerate(spec.classes)}
        tif.write_colormap(1, {**palette, spec.nodata: (0, 0, 0, 0)})
        tif.colorinterp = [ColorInterp.palette]


def _blank_unfinished(
    block: Any, window: Window, spec: StoreSpec, done: set[tuple[int, int]], fill: int | float
) -> None:
    """Set to nodata what lies in blocks without a record: their shards prove nothing."""
    (height, width), (rows, cols) = spec.shard, (window.rows, window.cols)
    for row in range(rows.start // height, -(-rows.stop // height)):
        for col in range(cols.start // width, -(-cols.stop // width)):
            if (row, col) not in done:
                part = Window(Interval(row * height, (row + 1) * height), Interval(col * width, (col + 1) * width))
                block[part.intersect(window).within(window)] = fill


def _cog_creation(array: ArraySpec, compress: Compression) -> dict[str, Any]:
    return {"COMPRESS": compress.upper(), "PREDICTOR": "YES" if array.dtype.kind == "f" else "NO"}


def _category_xml(spec: StoreSpec) -> bytes:
    """GDAL's sidecar with the names of the values 0, 1, ... of band 1."""
    root = ElementTree.Element("PAMDataset")
    band = ElementTree.SubElement(root, "PAMRasterBand", band="1")
    names = ElementTree.SubElement(band, "CategoryNames")
    for label in spec.classes:
        ElementTree.SubElement(names, "Category").text = label.name
    ElementTree.indent(root)
    return ElementTree.tostring(root) + b"\n"


def _publish(temporary: Path, target: Path, sidecar: bytes | None) -> None:
    """Give the finished files their names, the GeoTIFF last."""
    beside = target.with_name(f"{target.name}.aux.xml")
    try:
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if sidecar is None:
            beside.unlink(missing_ok=True)
        else:
            hidden = temporary.with_name(f"{temporary.name}.aux.xml")
            hidden.write_bytes(sidecar)
            os.replace(hidden, beside)
        os.replace(temporary, target)
    except OSError as error:
        raise explain(error, target) from error


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # A map without georeference is what its raster was; that was said when it was made.
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            yield
    except OSError as error:
        if error.errno is not None:
            raise explain(error, target) from error
        raise RunError(f"{target}: {_line(error)}; free some space or choose another path") from error
    except (RasterioError, CPLE_BaseError) as error:
        raise RunError(f"{target}: {_line(error)}; free some space or choose another path") from error


def _line(error: BaseException) -> str:
    # rasterio's own message refers to GDAL's.
    error = error.__cause__ or error
    return (str(error).splitlines() or [type(error).__name__])[0]
