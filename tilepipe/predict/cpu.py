"""Inference on the CPU: one tile per thread, one torch thread each, no lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from threading import BoundedSemaphore, local
from typing import NamedTuple

import numpy as np
import torch

from tilepipe.errors import UsageError
from tilepipe.predict.blend import Strip, accumulate, finish
from tilepipe.predict.maps import BlockJob, BlockMaps, Wanted, blend_rows
from tilepipe.predict.prepare import Prepared, scores_of, use_one_thread
from tilepipe.predict.scores import (
    Array,
    Patch,
    label_pixels,
    normalise,
    normalise_last,
    normalised,
    score_maps,
)
from tilepipe.predict.values import accumulate_values, copy_values, finish_values
from tilepipe.window import Placement, Window


class Scores(NamedTuple):
    """A tile's scores as the kernels take them."""

    array: Array
    """C-contiguous: (classes, h, w), or (h, w, classes) where `last`."""
    last: bool
    origin: tuple[int, int]
    """Where the first of them lies in the tile's output, (row, column)."""


class CpuEngine:
    """A prepared network on the CPU, with its threads.

    Any number of threads may call `exact` and `blend` at once: they share the engine's own `threads` threads, so
    that at most so many tiles are in the network, and at most twice as many tiles' scores exist while blending.
    """

    def __init__(
        self,
        network: Prepared,
        statistics: tuple[Array, Array],
        classes: int,
        tile: tuple[int, int],
        threads: int | None,
    ) -> None:
        self.network, self.classes, self.tile = network, classes, tile
        self.mean, self.std = statistics
        self.threads = len(os.sched_getaffinity(0)) if threads is None else threads
        if self.threads < 1:
            raise UsageError(f"threads {self.threads} is not legal; at least 1 is needed")
        # torch counts threads per Python thread: the caller's own setting stays as it is.
        self._pool = ThreadPoolExecutor(self.threads, "tilepipe-tile", initializer=use_one_thread)
        self._slots = BoundedSemaphore(2 * self.threads)
        self._scratch = local()
        # numba sets itself up with the first kernel that runs, for most of a second: not in the first block's time.
        normalised(np.zeros((1, 1, 1), np.uint8), None, (0.0,), (1.0,), "float32")

    def close(self) -> None:
        """Ends the threads; tiles that have not begun are dropped."""
        self._pool.shutdown(cancel_futures=True)

    def output_shape(self, bands: int) -> tuple[int, int]:
        """The (rows, columns) that the network makes of a tile."""
        whole = Window.whole(self.tile)
        zeros = np.zeros((bands, *self.tile), np.uint8)
        job = BlockJob(zeros, None, None, [], (0, 0), Wanted())
        array, last, _ = self._pool.submit(self.scores, job, Placement(whole, whole, whole)).result()
        return (array.shape[0], array.shape[1]) if last else (array.shape[1], array.shape[2])

    def device_bytes(self) -> int:
        """0: the CPU has no memory of its own."""
        return 0

    def limit(self, size: int) -> None:
        """Nothing: the host's memory is bounded by the plan."""

    def exact(self, job: BlockJob) -> BlockMaps:
        """The block's maps, each output from the one tile whose core it lies in."""
        maps = BlockMaps.unfilled(job.shape, self.classes, job.wanted)
        futures = [self._pool.submit(self._label, job, tile, maps) for tile in job.kept_placements()]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
        return maps.finished(job.keep, self.classes, job.wanted)

    def blend(self, job: BlockJob, weights: Array) -> BlockMaps:
        """The block's maps from its tiles' weighted probabilities or values, added in the order of placements."""
        maps = BlockMaps.unfilled(job.shape, self.classes, job.wanted)
        rows, groups = blend_rows(job.kept_placements())
        strip = Strip.empty(self.classes, rows, job.shape[1])
        counts = np.zeros(3, np.int64)
        starts = [start for start, _ in groups] + [job.shape[0]]
        with closing(self._in_order(job, [tile for _, tiles in groups for tile in tiles])) as scored:
            for (start, tiles), end in zip(groups, starts[1:], strict=True):
                for tile, scores in islice(scored, len(tiles)):
                    self._add(job, tile, scores, weights, strip, start)
                done = min(end, start + rows)
                if maps.values is None:
                    counts += finish(strip, (start, done), job.keep, *maps[:3], job.wanted.scale)
                else:
                    counts += finish_values(strip, (start, done), job.keep, maps.values)
                strip.advance(end - start)
        overlapped, disagreed, missed = (int(n) for n in counts)
        assert missed == 0, f"{missed} outputs are in no tile"
        return maps.finished(job.keep, self.classes, job.wanted)._replace(overlapped=overlapped, disagreed=disagreed)

    def scores(self, job: BlockJob, tile: Placement) -> Scores:
        """One tile's scores, of its core at least, in the calling thread."""
        pixels = self._normalised(job, tile)
        with torch.inference_mode():
            scores, origin = scores_of(self.network, pixels, self.classes, tile.core)
            if scores.dtype not in (torch.float32, torch.float64):
                scores = scores.float()
            if scores.untyped_storage().data_ptr() == pixels.untyped_storage().data_ptr():
                scores = scores.clone()  # the pixels' memory is the next tile's
        if not scores.is_contiguous() and scores.stride(1) == 1:
            return _channels_last(scores, origin)
        return Scores(scores[0].contiguous().numpy(), False, origin)

    def _normalised(self, job: BlockJob, tile: Placement) -> torch.Tensor:
        """The tile as the network takes it, in memory that this thread uses again for its next tile."""
        assert tile.source.shape == self.tile, f"a tile of {tile.source.shape} where {self.tile} is planned"
        last, bands = self.network.channels_last, job.values.shape[0]
        if not hasattr(self._scratch, "pixels"):
            shape = (*self.tile, bands) if last else (bands, *self.tile)
            self._scratch.pixels = np.empty(shape, self.mean.dtype)
        pixels: Array = self._scratch.pixels
        fill = normalise_last if last else normalise
        fill(job.values, job.valid, tile.source.origin, self.mean, self.std, pixels)
        tensor = torch.from_numpy(pixels)
        return (tensor.permute(2, 0, 1) if last else tensor)[None]

    def _label(self, job: BlockJob, tile: Placement, maps: BlockMaps) -> None:
        scores = self.scores(job, tile)
        patch = Patch.of(tile, scores.origin)
        labels, confidence, probabilities, values, *_ = maps
        if values is not None:
            undefined = copy_values(scores.array, scores.last, patch, job.keep, values)
        elif confidence is None and probabilities is None:
            undefined = label_pixels(scores.array, scores.last, patch, job.keep, labels)
        else:
            given = scores.array, scores.last, patch, job.keep
            undefined = score_maps(*given, labels, confidence, probabilities, job.wanted.scale)
        job.refuse_undefined(undefined, [tile])

    def _add(
        self, job: BlockJob, tile: Placement, scores: Scores, weights: Array, strip: Strip, first_row: int
    ) -> None:
        patch = Patch.of(tile, scores.origin)
        keep = None if job.keep is None else job.keep[first_row:]
        add = accumulate if job.wanted.values is None else accumulate_values
        own = patch._replace(to_row=patch.to_row - first_row)
        undefined = add(scores.array, scores.last, own, keep, weights, strip)
        job.refuse_undefined(undefined, [tile])

    def _in_order(self, job: BlockJob, tiles: list[Placement]) -> Generator[tuple[Placement, Scores]]:
        """Each tile with its scores, in order, while later tiles are already in the network."""
        waiting: deque[tuple[Placement, Future[Scores]]] = deque()
        ahead = iter(tiles)
        upcoming = next(ahead, None)
        try:
            while upcoming is not None or waiting:
                # A caller waits for a slot only while it holds none, so that all callers go on.
                while upcoming is not None and self._slots.acquire(blocking=not waiting):
                    waiting.append((upcoming, self._pool.submit(self.scores, job, upcoming)))
                    upcoming = next(ahead, None)
                tile, future = waiting.popleft()
                try:
                    yield tile, future.result()
                finally:
                    self._slots.release()
        finally:
            for _, future in waiting:
                future.cancel()
                self._slots.release()


def _channels_last(scores: torch.Tensor, origin: tuple[int, int]) -> Scores:
    """Scores (1, classes, h, w) that lie so: not copied where they are a part of a larger map, which is given whole."""
    classes, (row, col), size = scores.shape[1], scores.stride()[2:], scores.untyped_storage().nbytes()
    height, width = size // (scores.itemsize * row), row // classes
    above, left = divmod(int(scores.storage_offset()), row)
    inside = above + scores.shape[2] <= height and left // classes + scores.shape[3] <= width
    if col != classes or row % classes or left % classes or not inside:
        scores = scores.contiguous(memory_format=torch.channels_last)
        return Scores(scores[0].permute(1, 2, 0).numpy(), True, origin)
    whole = scores.as_strided((height, width, classes), (row, classes, 1), 0)
    return Scores(whole.numpy(), True, (origin[0] - above, origin[1] - left // classes))
