"""Peak host memory of `tilepipe segment` on a raster and on one nine times its area, against the plan's projection.

    python tests/benchmarks/memory.py [--small 10000] [--large 30000] [--folder DIR]

The rasters are made for the purpose (RGB, deflate, 512 x 512 blocks) and kept in the folder for the next time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import rasterio
from near_free import near_free_model, timed
from rasterio.transform import from_origin
from rasterio.windows import Window


def make_raster(path: Path, size: int) -> Path:
    """A square raster of slowly varying noise, written in strips of its own blocks."""
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (3, 512, 4096), dtype=np.uint8) // 8 * 8
    part = path.with_suffix(".part.tif")
    with rasterio.open(
        part,
        "w",
        driver="GTiff",
        width=size,
        height=size,
        count=3,
        dtype="uint8",
        tiled=True,
        blockxsize=512,
        blockysize=512,
        compress="deflate",
        interleave="pixel",
        BIGTIFF="IF_SAFER",
        NUM_THREADS="2",
        crs="EPSG:32633",
        transform=from_origin(500000, 5400000, 0.5, 0.5),
    ) as out:
        for row in range(0, size, 512):
            strip = np.roll(texture, row, axis=2)[:, : min(512, size - row)]
            wide = np.tile(strip, (1, 1, -(-size // 4096)))[:, :, :size]
            out.write(wide, window=Window(0, row, size, wide.shape[1]))
    part.rename(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=10000)
    parser.add_argument("--large", type=int, default=30000)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model = near_free_model(args.folder / "linear.safetensors")
    peaks = []
    for size in (args.small, args.large):
        raster, out = make_raster(args.folder / f"noise{size}.tif", size), args.folder / "out.zarr"
        shutil.rmtree(out, ignore_errors=True)
        common = [str(raster), "--model", str(model)]
        told = subprocess.run(
            [sys.executable, "-m", "tilepipe", "plan", *common, "--json"], check=True, capture_output=True
        )
        projected = json.loads(told.stdout)["host_bytes"] / 2**20
        wall, _, peak = timed([sys.executable, "-m", "tilepipe", "segment", common[0], str(out), *common[1:], "-q"])
        shutil.rmtree(out)
        peaks.append(peak)
        print(f"{size:6} x {size:<6} {wall:7.1f} s   peak {peak:6.0f} MiB   projected {projected:6.0f} MiB")
    print(f"large / small: {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
