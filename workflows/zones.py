"""How much of each land cover each zone has, and how green it is: an index, a label map and zones, in one dask graph.

    python workflows/zones.py scene.tif zones.gpkg table.csv --model my.safetensors --red 1 --nir 4

zones.gpkg is anything that geopandas reads, with a polygon for each zone. The table has a line for each zone and
class: pixels, area in square metres, and mean NDVI. Nothing is written in between, and memory is that of the chunks in
flight: index, labels and zones are lazy arrays of the same grid, and what comes together in the end is one small
table for each chunk.
"""

from __future__ import annotations

import argparse
from typing import Any

import dask
import dask.array as da
import geopandas
import numpy as np
import rioxarray
import xarray as xr
from affine import Affine
from numpy.typing import NDArray
from rasterio.features import rasterize

import tilepipe


def ndvi(scene: xr.DataArray, red: int, nir: int) -> xr.DataArray:
    """(y, x) float32, -1 to 1: the normalised difference of two bands, counted from 1; NaN where both are 0."""
    one, other = (scene.sel(band=band).astype("float32") for band in (nir, red))
    total = one + other
    return (one - other) / total.where(total != 0)


def zones_like(grid: xr.DataArray, shapes: list[Any]) -> xr.DataArray:
    """(y, x) int32, lazy: the number of the shape that a pixel's centre lies in, from 0; -1 where it lies in none."""
    place = grid.rio.transform()

    def burn(block_info: Any = None) -> NDArray[np.int32]:
        (top, bottom), (left, right) = block_info[None]["array-location"]
        shape = bottom - top, right - left
        if not shapes or 0 in shape:
            return np.full(shape, -1, np.int32)
        moved = place * Affine.translation(left, top)
        return rasterize(zip(shapes, range(len(shapes)), strict=True), shape, -1, transform=moved, dtype="int32")

    burnt = da.map_blocks(burn, chunks=grid.chunks, dtype=np.int32, meta=np.empty((0, 0), np.int32))
    return grid.copy(data=burnt).rename("zone")


def table(zones: xr.DataArray, labels: xr.DataArray, index: xr.DataArray, zone_count: int) -> xr.Dataset:
    """Pixels and mean index, dimensions (zone, class), once all of it is computed.

    A pixel counts where it lies in a zone, has a label and a finite index. Each chunk gives one row of sums, which is
    all that leaves it: a groupby would move pixels between chunks.
    """
    names = labels.attrs["flag_meanings"].split()
    counted = (zones >= 0) & (labels != labels.rio.nodata) & np.isfinite(index)
    bins = zone_count * len(names)
    # Pixels that do not count go to a bin after the last, which is dropped.
    where = xr.where(counted, zones * len(names) + labels.astype("int32"), bins).data.ravel()
    weights = xr.where(counted, index, 0).data.ravel().rechunk(where.chunks)
    sums = dask.compute(da.bincount(where, minlength=bins + 1), da.bincount(where, weights, minlength=bins + 1))
    pixels, total = (each[:bins].reshape(zone_count, len(names)) for each in sums)
    dims = ("zone", "class")
    with np.errstate(invalid="ignore"):
        mean = total / pixels
    return xr.Dataset({"pixels": (dims, pixels), "ndvi": (dims, mean)}, coords={"class": names})


def main(arguments: list[str] | None = None) -> xr.Dataset:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("scene", help="a raster in a projected CRS, in metres")
    parser.add_argument("zones")
    parser.add_argument("table")
    parser.add_argument("--model", help="a model file; the bundled one that fits, if none is given")
    parser.add_argument("--red", type=int, default=1, help="the red band, counted from 1")
    parser.add_argument("--nir", type=int, default=4, help="the near-infrared band")
    parser.add_argument("--chunk", type=int, default=4096, help="sides of the chunks that the scene is read in")
    options = parser.parse_args(arguments)
    scene = rioxarray.open_rasterio(options.scene, chunks={"x": options.chunk, "y": options.chunk}, lock=False)
    polygons = geopandas.read_file(options.zones).to_crs(scene.rio.crs)

    labels = tilepipe.segment(scene, options.model)
    # All on the chunks of the map, which are the plan's blocks.
    index = ndvi(scene, options.red, options.nir).chunk(dict(zip(labels.dims, labels.chunks, strict=True)))
    zones = zones_like(labels, list(polygons.geometry))
    # With a dask.distributed client in force (`Client("tcp://...")`) this runs on the cluster's workers.
    found = table(zones, labels, index, len(polygons))

    transform = scene.rio.transform()
    found["area_m2"] = found["pixels"] * abs(transform.a * transform.e - transform.b * transform.d)
    found.to_dataframe().to_csv(options.table)
    return found


if __name__ == "__main__":
    print(main().to_dataframe().to_string())
