"""From GeoTIFFs of a map and of its overviews to one Cloud Optimized GeoTIFF.

GDAL's COG driver puts headers first, smallest overview before the larger ones. It would make overviews of its own,
each from the one before; here a virtual raster hands it those that were counted from all pixels.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import rasterio
import rasterio.shutil


def level_path(path: Path, level: int) -> Path:
    """Where the overview of a level lies while a file is made; the file itself at level 0."""
    return path.with_name(f"{path.name}.{1 << level}x.tif") if level else path


def make_cog(path: Path, levels: int, tile: int, creation: dict[str, Any]) -> None:
    """Replace the GeoTIFF at `path` by a Cloud Optimized one with the overviews that lie beside it (`level_path`).

    `creation` are the driver's own options, such as COMPRESS. Takes the map's space on disk a second time.
    """
    joined, finished = path.with_name(f"{path.name}.vrt"), path.with_name(f"{path.name}.cog.tif")
    rasterio.shutil.copy(path, joined, driver="VRT")
    _add_overviews(joined, [level_path(path, level) for level in range(1, levels + 1)])
    rasterio.shutil.copy(
        joined,
        finished,
        driver="COG",
        BLOCKSIZE=tile,
        BIGTIFF="IF_SAFER",
        NUM_THREADS="ALL_CPUS",
        SPARSE_OK="YES",
        OVERVIEWS="FORCE_USE_EXISTING" if levels else "NONE",
        **creation,
    )
    os.replace(finished, path)


def _add_overviews(vrt: Path, files: list[Path]) -> None:
    """Tell each band of a virtual raster of its overviews."""
    tree = ElementTree.parse(vrt)
    for band in tree.iter("VRTRasterBand"):
        for file in files:
            overview = ElementTree.SubElement(band, "Overview")
            ElementTree.SubElement(overview, "SourceFilename", relativeToVRT="1").text = file.name
            ElementTree.SubElement(overview, "SourceBand").text = band.get("band")
    tree.write(vrt)
