"""Label maps of lazy arrays: a dask graph of one task for each block, which takes the chunks that its halo touches.

Nothing is computed until it is asked for, and of a slice only the blocks that it touches. By default a block is one
tile's core. Blocks share no state, so that any scheduler will do; each process loads the networks once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate, product
from threading import Lock
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from numpy.typing import NDArray

from tilepipe.block import BlockRecipe, BlockRunner
from tilepipe.job import Job, prepare_raster, replanned
from tilepipe.member import Models
from tilepipe.options import SegmentOptions
from tilepipe.raster.arrays import ArrayRecipe, Piece
from tilepipe.raster.info import BandChoice, RasterInfo
from tilepipe.raster.source import RasterSource
from tilepipe.store.spec import ArraySpec
from tilepipe.window import Interval, Window

RUNNERS = 4
"""Networks with their threads that a process keeps ready."""


@dataclass(frozen=True, slots=True, eq=False)
class LazyRecipe:
    """What all blocks of a lazy map have in common."""

    token: str
    block: BlockRecipe
    arrays: tuple[ArraySpec, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where chunks lie in the raster, in the order in which a task gets them; no task of its own for dask."""

    parts: tuple[tuple[range, Window], ...]
    """(band numbers from 1, window) of each."""


def lazy_maps(
    array: da.Array, info: RasterInfo, model: Models, options: SegmentOptions
) -> tuple[Job, dict[str, da.Array]]:
    """The job that labels a lazy array, and by their names the lazy arrays that it gives.

    array: (bands, rows, columns), or (rows, columns) of one band, in any chunks; info: what it shows. The arrays
    are those that a store of this job has, of the same types, (y, x) or (class, y, x).
    """
    source = RasterSource(
        ArrayRecipe(info.name, tokenize(array.name, info)), info, BandChoice(tuple(range(1, info.bands + 1)))
    )
    job = prepare_raster(source, model, options)
    if options.block is None and job.plan.exact:
        # Cores share nothing, so that the smallest blocks cost least where only some are computed.
        job = replanned(job, replace(options, block=job.plan.core))
    spec = job.spec()
    token = tokenize(source.recipe.identity(), job.fingerprint(), [made.to_json() for made in job.plans])
    recipe = LazyRecipe(token, BlockRecipe.of(job, job.source, None), spec.arrays())
    name = f"tilepipe-{token}"
    graph = HighLevelGraph.from_collections(name, dict(_tasks(name, recipe, job, array)), dependencies=[array])
    return job, {each.name: _output(name, graph, job, each) for each in recipe.arrays}


def _tasks(name: str, recipe: LazyRecipe, job: Job, array: da.Array) -> Iterator[tuple[Any, Any]]:
    """(key, task) of the recipe, and of each block."""
    yield f"{name}-recipe", recipe
    grid = _ChunkGrid(array, job.source.choice.indices)
    for index in job.plan.blocks():
        outputs = job.plan.block_window(index)
        hull = reduce(Window.hull, (made.hull(outputs) for made in job.plans))
        keys, places = grid.over(_read(hull, job.source.info.shape))
        yield (name, index.row, index.col), (block_arrays, f"{name}-recipe", outputs, places, keys)


def _read(hull: Window, shape: tuple[int, int]) -> Window:
    """The pixels that the reflected extension of a raster over `hull` comes from."""
    rows, cols = hull.rows.reflect(shape[0]), hull.cols.reflect(shape[1])
    return Window.of(int(rows.min()), int(rows.max()) + 1, int(cols.min()), int(cols.max()) + 1)


class _ChunkGrid:
    """An array's chunks, by place."""

    def __init__(self, array: da.Array, bands: Sequence[int]) -> None:
        self._name, self._layered = array.name, array.ndim == 3
        lengths = array.chunks if self._layered else ((1,), *array.chunks)
        self._edges = [[0, *accumulate(axis)] for axis in lengths]
        self._layers = sorted({bisect_right(self._edges[0], band - 1) - 1 for band in bands})

    def over(self, window: Window) -> tuple[list[Any], Places]:
        """The keys of the chunks that share pixels with a window, and where they lie."""
        rows, cols = self._touched(1, window.rows), self._touched(2, window.cols)
        keys, parts = [], []
        for layer, row, col in product(self._layers, rows, cols):
            keys.append((self._name, layer, row, col) if self._layered else (self._name, row, col))
            first, last = self._edges[0][layer : layer + 2]
            parts.append((range(first + 1, last + 1), Window(self._side(1, row), self._side(2, col))))
        return keys, Places(tuple(parts))

    def _touched(self, axis: int, side: Interval) -> range:
        edges = self._edges[axis]
        return range(bisect_right(edges, side.start) - 1, bisect_right(edges, side.stop - 1))

    def _side(self, axis: int, number: int) -> Interval:
        return Interval(self._edges[axis][number], self._edges[axis][number + 1])


def _output(name: str, graph: HighLevelGraph, job: Job, spec: ArraySpec) -> da.Array:
    """One of the arrays that the blocks give."""
    own, (rows, cols) = f"{name}-{spec.name}", job.plan.grid
    leading = (0,) * (len(spec.shape) - 2)
    layer: dict[Any, Any] = {
        (own, *leading, row, col): (taken, (name, row, col), spec.name) for row in range(rows) for col in range(cols)
    }
    sides = [
        tuple(min(block, length - start) for start in range(0, length, block))
        for length, block in zip(job.plan.shape, job.plan.block, strict=True)
    ]
    chunks = (*((length,) for length in spec.shape[:-2]), *sides)
    layers = HighLevelGraph({**graph.layers, own: layer}, {**graph.dependencies, own: {name}})
    return da.Array(layers, own, chunks, dtype=spec.dtype)


# ---- where it is computed ------------------------------------------------------------------------------------------


def block_arrays(recipe: LazyRecipe, outputs: Window, places: Places, chunks: Sequence[Any]) -> dict[str, Any]:
    """One block's arrays, by name; the chunks lie at `places`."""
    pieces = []
    for (bands, window), chunk in zip(places.parts, chunks, strict=True):
        values = np.asarray(chunk)
        pieces.append(Piece(bands, window, values if values.ndim == 3 else values[None]))
    source = recipe.block.source
    own = replace(source, recipe=ArrayRecipe(source.raw.name, recipe.token, tuple(pieces)))
    maps = _runner(recipe).maps(outputs, own.open())
    return {spec.name: _array(getattr(maps, spec.name, None), spec, outputs) for spec in recipe.arrays}


def _array(found: NDArray[Any] | None, spec: ArraySpec, outputs: Window) -> NDArray[Any]:
    """A block's array; the fill value everywhere where it has no data."""
    if found is None:
        return np.full((*spec.shape[:-2], *outputs.shape), spec.fill, spec.dtype)
    return found.astype(spec.dtype, copy=False)


def taken(arrays: dict[str, Any], name: str) -> Any:
    """One of a block's arrays."""
    return arrays[name]


_runners: OrderedDict[str, BlockRunner] = OrderedDict()
_lock = Lock()


def _runner(recipe: LazyRecipe) -> BlockRunner:
    """This process's loaded networks for a map."""
    with _lock:
        if recipe.token not in _runners:
            _runners[recipe.token] = recipe.block.build()
            while len(_runners) > RUNNERS:
                # Not closed: another thread may be in it. It ends with its last task.
                _runners.popitem(last=False)
        _runners.move_to_end(recipe.token)
        return _runners[recipe.token]
