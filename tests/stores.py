"""Output stores for the tests: small specs, random blocks, and what a store's bytes are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from tilepipe.store.output import OutputStore, create_or_resume
from tilepipe.store.spec import LabelClass, StoreSpec

CLASSES = (
    LabelClass("bare soil", (200, 150, 100)),
    LabelClass("water", (0, 0, 255)),
    LabelClass("trees / shrubs", (0, 128, 0)),
)
UTM = CRS.from_epsg(32632).to_wkt()
TRANSFORM = (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0)


STATE = "labels/.tilepipe"
"""Where a store of labels keeps its records, lease and temporary files."""
VALUE_STATE = "values/.tilepipe"
OUTPUTS = ("height above ground", "slope")


class Maps(NamedTuple):
    labels: NDArray[Any] | None = None
    confidence: NDArray[Any] | None = None
    probabilities: NDArray[Any] | None = None
    values: NDArray[Any] | None = None


def value_spec(**changes: Any) -> StoreSpec:
    """A spec of two channels of values on `make_spec`'s grid, with changes."""
    return make_spec(**{"classes": (), "values": "float32", "outputs": OUTPUTS, **changes})


def make_spec(**changes: Any) -> StoreSpec:
    """A spec of labels, of 50 x 70 pixels in 2 x 3 blocks, with changes."""
    settings = {
        "shape": (50, 70),
        "shard": (32, 32),
        "chunk": (16, 8),
        "classes": CLASSES,
        "crs_wkt": UTM,
        "transform": TRANSFORM,
        "fingerprint": {"raster": {"size": 10, "mtime": 5}, "model": "abc"},
        "settings": {"plan": {"tile": [61, 61]}},
    }
    return StoreSpec(**{**settings, **changes})


def expected(spec: StoreSpec, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Whole arrays of random content with holes of nodata, some as large as chunks and blocks."""
    rng = np.random.default_rng(seed)
    hole = np.kron(rng.random((8, 8)) < 0.4, np.ones((-(-spec.shape[0] // 8), -(-spec.shape[1] // 8))))
    hole = hole[: spec.shape[0], : spec.shape[1]].astype(bool)
    found = {}
    for array in spec.arrays():
        if array.dtype.kind == "f":
            values = rng.random(array.shape).astype(array.dtype)
        else:
            top = len(spec.classes) if array.name == "labels" else 255
            values = rng.integers(0, top, array.shape).astype(array.dtype)
        values[..., hole] = array.fill
        found[array.name] = values
    return found


def block_maps(spec: StoreSpec, whole: dict[str, NDArray[Any]], index: tuple[int, int]) -> Maps:
    """One block of whole arrays."""
    window = spec.block_window(index)
    rows, cols = slice(window.rows.start, window.rows.stop), slice(window.cols.start, window.cols.stop)
    return Maps(**{name: values[..., rows, cols] for name, values in whole.items()})


def write_all(store: OutputStore, whole: dict[str, NDArray[Any]], order: list[tuple[int, int]] | None = None) -> None:
    """Write the blocks that are not done, in an order."""
    done = store.done()
    for index in order or list(store.spec.blocks()):
        if index not in done:
            store.write_block(index, block_maps(store.spec, whole, index), {"seconds": {"compute": 0.5}})


def make_store(path: Path, spec: StoreSpec | None = None, seed: int = 0) -> dict[str, NDArray[Any]]:
    """The whole arrays of a finished store, made at `path`."""
    spec = spec or make_spec()
    whole = expected(spec, seed)
    with create_or_resume(path, spec) as store:
        write_all(store, whole)
    return whole


def memory_folder() -> Path | None:
    """Where files are in memory, and flushing costs nothing; None where there is no such place."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else None


def contents(root: Path) -> dict[str, str]:
    """The checksum of each file that is not the store's own book-keeping."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".tilepipe" not in path.parts
    }
