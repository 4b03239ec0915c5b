"""Small rasters for tests, written with rasterio, and the oracle that reads them whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from numpy.typing import NDArray

from tilepipe.raster.info import Pixels

UTM = "EPSG:32632"
GRID = Affine(2.0, 0.0, 500000.0, 0.0, -2.0, 5000000.0)


def write(path: Path, values: NDArray[Any], **options: Any) -> Path:
    """A raster of `values` (bands, rows, columns); options are rasterio's, with mask, colormap, interp beside."""
    mask, colormap, interp = (options.pop(name, None) for name in ("mask", "colormap", "interp"))
    names = options.pop("descriptions", None)
    profile = {"driver": "GTiff", "crs": UTM, "transform": GRID, **options}
    count, height, width = values.shape
    with rasterio.open(path, "w", count=count, height=height, width=width, dtype=values.dtype, **profile) as out:
        if interp is not None:
            out.colorinterp = interp
        out.write(values)
        if mask is not None:
            out.write_mask(mask)
        if colormap is not None:
            out.write_colormap(1, colormap)
        for band, name in enumerate(names or (), 1):
            out.set_band_description(band, name)
    return path


def noise(shape: tuple[int, int, int], dtype: str = "uint8", seed: int = 0) -> NDArray[Any]:
    """Random values over the dtype's range, floats in -1..1."""
    random = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return random.uniform(-1, 1, shape).astype(dtype)
    limits = np.iinfo(dtype)
    return random.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def read_whole(path: Path | str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """(values, valid) by rasterio alone: unmasked in every band and finite."""
    with rasterio.open(path) as dataset:
        values = dataset.read()
        return values, (dataset.read_masks() != 0).all(axis=0) & np.isfinite(values).all(axis=0)


def same_pixels(pixels: Pixels, values: NDArray[Any], valid: NDArray[np.bool_]) -> None:
    """Holds what a reader gave to values and validity."""
    np.testing.assert_array_equal(pixels.values, values)
    assert pixels.values.dtype == values.dtype
    np.testing.assert_array_equal(pixels.validity(), valid)


def real_data(*parts: str) -> Path:
    """A folder of real data, or a skip where it is absent."""
    root = os.environ.get("TILEPIPE_TEST_DATA")
    if not root or not Path(root, *parts).exists():
        pytest.skip(f"set TILEPIPE_TEST_DATA to the folder that holds {'/'.join(parts)}")
    return Path(root, *parts)
