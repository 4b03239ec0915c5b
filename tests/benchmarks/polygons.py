"""Peak memory and time of `tilepipe export` to polygons, for a map that looks like land cover and for pure noise.

    python tests/benchmarks/polygons.py [--size 20000] [--noise 4000] [--folder DIR] [OPTION ...]

Maps of 5 classes are made for the purpose and kept in the folder for the next time. Further words are options of
`tilepipe export`, as `--simplify 2px`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import timed
from numba import njit
from pyproj import CRS

from tilepipe.store.output import create_or_resume
from tilepipe.store.spec import LabelClass, StoreSpec

CLASSES = 5
BLOCK = 2048


class Maps(NamedTuple):
    labels: np.ndarray
    confidence: np.ndarray


@njit(nogil=True, cache=True)
def lattice(row: int, col: int, seed: int) -> float:
    """A number between 0 and 1 that belongs to a lattice point."""
    mixed = np.uint64(row * 73856093 ^ col * 19349663 ^ seed * 83492791)
    for _ in range(2):
        mixed = (mixed ^ (mixed >> np.uint64(15))) * np.uint64(0x2C1B3C6D) & np.uint64(0xFFFFFFFF)
    return float(mixed ^ (mixed >> np.uint64(13))) / 2.0**32


@njit(nogil=True, cache=True)
def land_cover(top: int, left: int, shape: tuple[int, int]) -> np.ndarray:
    """Labels of a window: at each pixel the greatest of fields of noise, whose grains are 8 to 512 pixels wide."""
    best = np.full(shape, -1.0, np.float32)
    labels = np.zeros(shape, np.uint8)
    line = np.empty(shape[1], np.float32)
    for row in range(shape[0]):
        for label in range(CLASSES):
            line[:] = 0
            for octave, (grain, weight) in enumerate(((512, 0.45), (128, 0.3), (32, 0.16), (8, 0.09))):
                seed = label * 7 + octave
                i, v = divmod(top + row, grain)
                v /= grain
                j = -1
                west = east = 0.0
                for col in range(shape[1]):
                    k, u = divmod(left + col, grain)
                    if k != j:
                        j = k
                        west = lattice(i, j, seed) * (1 - v) + lattice(i + 1, j, seed) * v
                        east = lattice(i, j + 1, seed) * (1 - v) + lattice(i + 1, j + 1, seed) * v
                    line[col] += weight * (west + (east - west) * u / grain)
            for col in range(shape[1]):
                if line[col] > best[row, col]:
                    best[row, col], labels[row, col] = line[col], label
    return labels


def noise(top: int, left: int, shape: tuple[int, int]) -> np.ndarray:
    """Labels of a window, each on its own."""
    return np.random.default_rng((top, left)).integers(0, CLASSES, shape, dtype=np.uint8)


def make_map(path: Path, size: int, look: Callable[..., np.ndarray]) -> Path:
    """A finished store of labels and confidence, of pixels of 10 m."""
    classes = [LabelClass(f"class {number}", (50 * number, 100, 0)) for number in range(CLASSES)]
    transform = (10.0, 0.0, 300000.0, 0.0, -10.0, 5500000.0)
    wkt = CRS.from_epsg(32632).to_wkt()
    spec = StoreSpec((size, size), (BLOCK, BLOCK), (1024, 1024), classes, wkt, transform, confidence=True)
    with create_or_resume(path, spec) as store:
        done = store.done()
        for index in spec.blocks():
            if index not in done:
                window = spec.block_window(index)
                labels = look(*window.origin, window.shape)
                store.write_block(index, Maps(labels, 100 + 20 * labels), {})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=20000)
    parser.add_argument("--noise", type=int, default=4000)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    parser.add_argument("--format", default="gpkg")
    args, options = parser.parse_known_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    looks: dict[str, Any] = {"land cover": (args.size, land_cover), "noise": (args.noise, noise)}
    for name, (size, look) in looks.items():
        if not size:
            continue
        store = make_map(args.folder / f"{name.replace(' ', '-')}{size}.zarr", size, look)
        out = args.folder / f"polygons.{args.format}"
        command = [sys.executable, "-m", "tilepipe", "export", str(store), str(out), "--overwrite", "-q", *options]
        took = timed(command)
        found = {"map": name, "size": size, "seconds": round(took.wall, 1), "peak_mib": round(took.peak)}
        print(json.dumps({**found, "bytes": out.stat().st_size}), flush=True)
        out.unlink()


if __name__ == "__main__":
    main()
