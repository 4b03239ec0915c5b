"""Time and peak host memory of `tilepipe overviews` and of `tilepipe export` on a large label map.

    python tests/benchmarks/overviews.py [--size 20000] [--classes 6] [--confidence] [--folder DIR]

The map, of patches with ragged borders, is made for the purpose and kept in the folder for the next time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import timed
from numpy.typing import NDArray

from tilepipe.store.output import create_or_resume
from tilepipe.store.spec import LabelClass, StoreSpec


class Maps(NamedTuple):
    """A block as a store takes it."""

    labels: NDArray[np.uint8]
    confidence: NDArray[np.uint8] | None
    probabilities: None = None
    values: None = None


def make_map(path: Path, size: int, classes: int, confidence: bool) -> None:
    """Make a finished store of a square map in blocks of 2048; one that is there is kept."""
    spec = StoreSpec(
        (size, size),
        (2048, 2048),
        (1024, 1024),
        [LabelClass(f"class {n}", (n, 90, 200 - n % 200)) for n in range(classes)],
        confidence=confidence,
        fingerprint={"made": [size, classes]},
    )
    rng = np.random.default_rng(0)
    rough = rng.integers(0, classes, (137, 137), dtype=np.uint8)
    rows, cols = (np.arange(2048) + rng.integers(-3, 4, (2048, 2048)) for _ in range(2))
    patches = rough[(rows.T // 15).clip(0, 136), (cols // 15).clip(0, 136)]
    sure = np.full((2048, 2048), 200, np.uint8) + (patches * 7) % 50
    with create_or_resume(path, spec) as store:
        done = store.done()
        for index in spec.blocks():
            if index not in done:
                height, width = spec.block_window(index).shape
                labels = np.ascontiguousarray(np.roll(patches, index, (0, 1))[:height, :width])
                store.write_block(index, Maps(labels, sure[:height, :width] if confidence else None), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=20000)
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--confidence", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    name = f"map{args.size}-{args.classes}{'-confidence' if args.confidence else ''}"
    store = args.folder / f"{name}.zarr"
    # In a process of its own, since the peak of one that is started counts its parent's memory, too.
    making = multiprocessing.get_context("spawn").Process(
        target=make_map, args=(store, args.size, args.classes, args.confidence)
    )
    making.start()
    making.join()
    pixels = args.size**2 / 1e6
    for command in (["overviews", str(store)], ["export", str(store), str(args.folder / f"{name}.tif")]):
        words = [sys.executable, "-m", "tilepipe", *command, "--overwrite"]
        wall, processor, peak, _ = timed([*words, "-q"] if command[0] == "overviews" else words)
        print(
            f"{command[0]:10} {wall:6.1f} s ({pixels / wall:.0f} Mpx/s)   {processor:6.1f} s of processors   "
            f"peak {peak:5.0f} MiB"
        )


if __name__ == "__main__":
    main()
