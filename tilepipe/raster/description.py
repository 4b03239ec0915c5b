"""What a raster is that GDAL opens: its bands, grid, colours, masks, and how it is stored."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from affine import Affine
from rasterio.enums import ColorInterp, Interleaving, MaskFlags

from tilepipe.errors import InputError
from tilepipe.raster.dataset import COMPOSED_TURN, GDAL_ERRORS, Warp, environment, open_dataset, reason
from tilepipe.raster.info import GroundPoint, RasterInfo, Transform

BLOCK_LIMIT = 2 << 30
"""Bytes that one block of a file may decode to before the file is refused."""


def describe(name: str, target: str, warp: Warp | None = None, block_limit: int = BLOCK_LIMIT) -> RasterInfo:
    """What the raster at `target` is; an InputError in one line where it cannot be opened or used."""
    try:
        with COMPOSED_TURN, environment(), open_dataset(target, warp) as dataset:
            info = _describe(name, dataset)
    except GDAL_ERRORS as error:
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
