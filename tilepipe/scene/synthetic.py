"""Synthetic aerial scenes with their true labels: any size, from a seed alone.

A scene is a pure function of (seed, row, column), so a window of a large scene can be made by itself and a large
scene holds every smaller one as its corner. The plane is built from the outside in:

1. blocks: a jittered Voronoi diagram in gently warped coordinates; most of its edges carry a road;
2. cover: what a block is (village, works, farmland, forest, lake), its parcels, a winding river with bridges;
3. objects: houses, halls and single trees on jittered grids, each kept off roads and water;
4. light: cast shadows, a slow change of brightness, and the sensor's noise.

Colours are shared on purpose (roofs and asphalt, tilled soil and roofs, water and shadow, woods and dark crops):
only texture, shape and surroundings tell the classes apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.transform import from_origin

from tilepipe.errors import UsageError
from tilepipe.scene.paint import render
from tilepipe.scene.terrain import plan_window
from tilepipe.window import Window

CLASSES: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("field", (222, 200, 120)),
    ("grass", (150, 200, 110)),
    ("woods", (40, 110, 60)),
    ("water", (60, 120, 200)),
    ("road", (110, 110, 120)),
    ("building", (200, 70, 60)),
)
"""Name and display colour of each class, in the order of the label values."""

PIXEL_SIZE = 0.3
"""Ground size of a pixel, in metres."""


@dataclass(frozen=True, slots=True)
class Scene:
    """An aerial image and what it shows."""

    image: NDArray[np.uint8]
    """(3, rows, columns): red, green, blue."""
    labels: NDArray[np.uint8]
    """(rows, columns): indices into CLASSES."""


def synthetic_scene(shape: tuple[int, int], seed: int, origin: tuple[int, int] = (0, 0)) -> Scene:
    """The part of scene `seed` that begins at `origin` (row, column) and has `shape` (rows, columns).

    The same pixels come back however a scene is cut into windows; coordinates may be negative.

    >>> scene = synthetic_scene((40, 50), seed=7)
    >>> scene.image.shape, scene.labels.shape
    ((3, 40, 50), (40, 50))
    """
    if min(shape) < 1:
        raise UsageError(f"a scene of {shape[0]} x {shape[1]} pixels cannot be made; each side needs at least 1")
    if not 0 <= seed < 2**31:
        raise UsageError(f"scene seed {seed} is not legal; choose 0 to 2147483647")
    image = np.empty((3, *shape), np.uint8)
    labels = np.empty(shape, np.uint8)
    plane = plan_window(seed, (float(origin[0]), float(origin[1]), float(shape[0]), float(shape[1])))
    render(seed, origin[0], origin[1], plane, image, labels)
    return Scene(image, labels)


def write_scene(
    directory: str | Path, shape: tuple[int, int], seed: int, tile: int = 1024, threads: int = 2
) -> tuple[Path, Path]:
    """The paths of image.tif (3 bands) and truth.tif (class indices), written for scene `seed`.

    Both are tiled, deflated GeoTIFFs in UTM zone 33N with pixels of 0.3 m; truth.tif carries the classes' colours.
    Memory holds a few tiles of `tile` x `tile` pixels, whatever the shape.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "image.tif", folder / "truth.tif"
    profile = {
        "driver": "GTiff",
        "height": shape[0],
        "width": shape[1],
        "dtype": "uint8",
        "crs": "EPSG:32633",
        "transform": from_origin(500_000.0, 5_800_000.0, PIXEL_SIZE, PIXEL_SIZE),
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
        "compress": "deflate",
        "bigtiff": "if_safer",
    }
    with (
        rasterio.open(paths[0], "w", count=3, photometric="rgb", interleave="pixel", **profile) as image,
        rasterio.open(paths[1], "w", count=1, **profile) as truth,
        ThreadPoolExecutor(threads) as pool,
    ):
        truth.write_colormap(1, {i: (*colour, 255) for i, (_, colour) in enumerate(CLASSES)})
        truth.update_tags(1, classes=",".join(name for name, _ in CLASSES))
        windows = list(_tiles(shape, tile))
        for start in range(0, len(windows), 2 * threads):
            group = windows[start : start + 2 * threads]
            for window, scene in zip(
                group, pool.map(lambda w: synthetic_scene(w.shape, seed, w.origin), group), strict=True
            ):
                place = rasterio.windows.Window(window.origin[1], window.origin[0], *window.shape[::-1])
                image.write(scene.image, window=place)
                truth.write(scene.labels, 1, window=place)
    return paths


def _tiles(shape: tuple[int, int], tile: int) -> Iterator[Window]:
    for row in range(0, shape[0], tile):
        for col in range(0, shape[1], tile):
            yield Window.of(row, min(row + tile, shape[0]), col, min(col + tile, shape[1]))
