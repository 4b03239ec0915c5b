"""Inference on a CUDA device: pixels go up once as stored, maps come back, everything between stays there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

import numpy as np
import torch

from tilepipe.errors import RunError
from tilepipe.predict import blend_cuda as kernels
from tilepipe.predict.cuda_device import CudaDevice, Download
from tilepipe.predict.cuda_graph import Passes
from tilepipe.predict.cuda_input import TileInput
from tilepipe.predict.cuda_labelling import Labelling
from tilepipe.predict.cuda_steps import CudaSteps
from tilepipe.predict.maps import BlockJob, BlockMaps, Wanted, blend_rows
from tilepipe.predict.prepare import Prepared
from tilepipe.predict.scores import Array, label_dtype
from tilepipe.window import Placement, Window

Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Labels, confidence and probabilities; what is not wanted has size 0."""


class CudaEngine:
    """A prepared network on one CUDA device.

    Any number of threads may call `exact` and `blend` at once. A lock covers the queueing of a block's work only,
    so the next block is queued while the device computes this one. Tiles run one by one.
    """

    def __init__(
        self,
        network: Prepared,
        statistics: tuple[Array, Array],
        classes: int,
        tile: tuple[int, int],
        device: CudaDevice,
        steps: CudaSteps,
    ) -> None:
        self.classes, self.tile, self.device = classes, tile, device
        self.input = TileInput(network, statistics, device.device, steps)
        capturing = tile[0] * tile[1] <= steps.graph_pixels
        self.passes = Passes(network, classes, device, capturing)
        self.labelling = None if network.last is None else Labelling(network, device, capturing)
        self._weights: tuple[Array, torch.Tensor] | None = None
        self._lock = Lock()

    def close(self) -> None:
        """Gives cached device memory back."""
        self.device.free()

    def device_bytes(self) -> int:
        """The most device memory that was reserved at once."""
        return self.device.peak_bytes()

    def limit(self, size: int) -> None:
        """Lets the device give no more than `size` bytes."""
        self.device.limit(size)

    def output_shape(self, bands: int) -> tuple[int, int]:
        """The (rows, columns) that the network makes of a tile."""
        zeros = np.zeros((bands, *self.tile), np.uint8)
        whole = Window.whole(self.tile)
        job = BlockJob(zeros, None, None, [], (0, 0), Wanted())
        with self._lock, self.device.computing():
            block = _Block(self, job)
            height, width = block.scores(Placement(whole, whole, whole)).shape[1:]
        return height, width

    def exact(self, job: BlockJob) -> BlockMaps:
        """The block's maps, each output from the one tile whose core it lies in."""
        return self._twice(job, lambda block: block.exact())

    def blend(self, job: BlockJob, weights: Array) -> BlockMaps:
        """The block's maps from its tiles' weighted probabilities, added in the order of placements."""
        return self._twice(job, lambda block: block.blend(weights))

    def weights(self, values: Array) -> torch.Tensor:
        """The tiles' weights on the device, where they stay from one block to the next."""
        if self._weights is None or self._weights[0] is not values:
            self._weights = values, self.device.upload([self.device.stage(values)])[0]
        return self._weights[1]

    def _twice(self, job: BlockJob, queue: Callable[[_Block], Download]) -> BlockMaps:
        staged = [self.device.stage(array) for array in (job.values, job.valid, job.keep) if array is not None]
        for _ in range(2):
            with self.device.room, suppress(torch.OutOfMemoryError):
                with self._lock, self.device.computing():
                    download = queue(_Block(self, job, staged))
                return _gathered(job, self.classes, download.wait())
            # Only now: while the error was handled, its frames held the block's tensors.
            self.device.free()
        raise RunError(
            f"a tile of {self.tile[0]} x {self.tile[1]} does not fit into the memory of {self.device.device}, "
            f"caches freed; choose a smaller --tile, about {self.tile[0] // 2} x {self.tile[1] // 2}"
        )


class _Block:
    """One block's tensors on the device, while its work is queued."""

    def __init__(self, engine: CudaEngine, job: BlockJob, staged: Sequence[torch.Tensor] | None = None) -> None:
        self.engine, self.job, self.device = engine, job, engine.device
        if staged is None:
            staged = [self.device.stage(job.values)]
        tensors = iter(self.device.upload(staged))
        self.values = next(tensors)
        self.valid = None if job.valid is None else next(tensors)
        self.keep = self._nothing(torch.bool) if job.keep is None else next(tensors)
        self.undefined = torch.zeros(1, dtype=torch.int32, device=self.device.device)
        self.values_kind = torch.float64 if job.wanted.values == "float64" else torch.float32

    def _nothing(self, dtype: torch.dtype, dims: int = 2) -> torch.Tensor:
        return torch.empty((0,) * dims, dtype=dtype, device=self.device.device)

    def _maps(self) -> Maps:
        job, place = self.job, self.device.device
        classes, wanted = self.engine.classes, job.wanted
        # torch has no arithmetic for uint16, but keeps it; zeros are what skipped tiles leave.
        labels = torch.zeros(job.shape, dtype=getattr(torch, label_dtype(classes).name), device=place)
        confidence = self._nothing(torch.uint8)
        if wanted.confidence:
            confidence = torch.zeros(job.shape, dtype=torch.uint8, device=place)
        kind = torch.uint8 if wanted.probabilities == "uint8" else torch.float32
        probabilities = self._nothing(kind, 3)
        if wanted.probabilities is not None:
            probabilities = torch.zeros((classes, *job.shape), dtype=kind, device=place)
        return labels, confidence, probabilities

    def scores(self, tile: Placement) -> torch.Tensor:
        """The scores of a tile's crop, (classes, h, w), float32 or float64."""
        with self._ready(tile) as pixels:
            scores, (row, col) = self.engine.passes(pixels, tile.core)
        crop = scores[0][:, *_slices(tile.crop.shift(-row, -col))]
        return crop if crop.dtype in (torch.float32, torch.float64) else crop.float()

    @contextmanager
    def _ready(self, tile: Placement) -> Iterator[torch.Tensor]:
        """A tile's input, in a context in which networks compute."""
        engine = self.engine
        assert tile.source.shape == engine.tile, f"a tile of {tile.source.shape} where {engine.tile} is planned"
        pixels = engine.input.cut(self.values, self.valid, tile.source)
        # Chosen by rule, not by timing, and never in TF32: every worker computes the same bytes.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield pixels

    def exact(self) -> Download:
        wanted, labelling = self.job.wanted, self.engine.labelling
        if wanted.values is not None:
            return self._exact_values()
        maps = self._maps()
        for tile in self.job.kept_placements():
            if labelling is not None and wanted.probabilities is None:
                with self._ready(tile) as pixels:
                    labelling.label(pixels, tile, *maps[:2], self.keep, self.undefined)
                continue
            self._run(
                kernels.score_maps,
                tile.crop.shape,
                (self.scores(tile), tile.target.origin, self.keep, *maps, self.job.wanted.scale, self.undefined),
            )
        return self._download(maps, torch.zeros(3, dtype=torch.int64, device=self.device.device))

    def _exact_values(self) -> Download:
        job = self.job
        values = torch.zeros((self.engine.classes, *job.shape), dtype=self.values_kind, device=self.device.device)
        for tile in job.kept_placements():
            scores = self.scores(tile)
            self._count_undefined(scores, None if job.keep is None else self.keep[_slices(tile.target)])
            values[:, *_slices(tile.target)] = scores
        return self._download((values,), torch.zeros(3, dtype=torch.int64, device=self.device.device))

    def _blend_values(self, weights: Array) -> Download:
        # Sums in float32, tile after tile, as for probabilities; no two operations touch a pixel at once.
        job, place, channels = self.job, self.device.device, self.engine.classes
        values = torch.zeros((channels, *job.shape), dtype=self.values_kind, device=place)
        sums = torch.zeros((channels + 1, *job.shape), dtype=torch.float32, device=place)
        seen = torch.zeros(job.shape, dtype=torch.int32, device=place)
        window = self.engine.weights(weights)
        for tile in job.kept_placements():
            scores, weight, to = self.scores(tile), window[_slices(tile.crop)], _slices(tile.target)
            self._count_undefined(scores, None if job.keep is None else self.keep[to])
            sums[:channels, *to] += weight * scores
            sums[channels, *to] += weight
            seen[to] = (seen[to] + 1).clamp_(max=2)
        values.copy_(sums[:channels] / sums[channels].clamp_min(torch.finfo(torch.float32).tiny))
        counts = _count(seen, self.keep if job.keep is not None else None)
        return self._download((values,), counts)

    def _count_undefined(self, scores: torch.Tensor, keep: torch.Tensor | None) -> None:
        broken = ~torch.isfinite(scores).all(0)
        self.undefined += (broken if keep is None else broken & keep).sum().to(torch.int32)

    def blend(self, weights: Array) -> Download:
        if self.job.wanted.values is not None:
            return self._blend_values(weights)
        job, place, classes = self.job, self.device.device, self.engine.classes
        maps = self._maps()
        rows, groups = blend_rows(job.kept_placements())
        sums = torch.zeros((classes + 1, rows, job.shape[1]), dtype=torch.float32, device=place)
        state = torch.zeros((rows, job.shape[1]), dtype=torch.int32, device=place)
        window = self.engine.weights(weights)
        counts = torch.zeros(3, dtype=torch.int64, device=place)
        starts = [start for start, _ in groups] + [job.shape[0]]
        for (start, tiles), end in zip(groups, starts[1:], strict=True):
            keep = self.keep[start:] if job.keep is not None else self.keep
            for tile in tiles:
                to = tile.target.rows.start - start, tile.target.cols.start
                weight = window[_slices(tile.crop)]
                arguments = self.scores(tile), to, keep, weight, sums, state, self.undefined
                self._run(kernels.accumulate, tile.crop.shape, arguments)
            done = min(end, start + rows)
            span = done - start, job.shape[1]
            self._run(kernels.finish, span, (sums, (start, done), *maps, job.wanted.scale))
            counts += _count(state[: done - start], self.keep[start:done] if job.keep is not None else None)
            _advance(sums, end - start)
            _advance(state, end - start)
        return self._download(maps, counts)

    def _run(self, kernel: Any, shape: tuple[int, int], arguments: tuple[Any, ...]) -> None:
        self.device.run(kernel, kernels.blocks_for(shape), kernels.THREADS, arguments)

    def _download(self, maps: Sequence[torch.Tensor], counts: torch.Tensor) -> Download:
        return self.device.download([*maps, counts, self.undefined])


def _slices(window: Window) -> tuple[slice, slice]:
    return slice(window.rows.start, window.rows.stop), slice(window.cols.start, window.cols.stop)


def _count(state: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """(several tiles, tiles of different labels, no tile): the numbers of kept pixels."""
    seen = state & 3
    which = torch.stack([seen >= 2, seen == 3, seen == 0])
    return (which if keep is None else which & keep).sum(dim=(1, 2))


def _advance(strip: torch.Tensor, by: int) -> None:
    """Drop a strip's first rows, move the others up, and clear what is freed."""
    kept = max(strip.shape[-2] - by, 0)
    strip[..., :kept, :] = strip[..., by : by + kept, :].clone()
    strip[..., kept:, :] = 0


def _gathered(job: BlockJob, classes: int, arrays: Sequence[Array]) -> BlockMaps:
    """The maps that came back, checked."""
    *arrays, counts, undefined = arrays
    job.refuse_undefined(int(undefined[0]), job.kept_placements())
    overlapped, disagreed, missed = (int(n) for n in counts)
    assert missed == 0, f"{missed} outputs are in no tile"
    wanted = job.wanted
    if wanted.values is not None:
        maps = BlockMaps(values=arrays[0], overlapped=overlapped)
    else:
        labels, confidence, probabilities = arrays
        maps = BlockMaps(
            labels,
            confidence if wanted.confidence else None,
            probabilities if wanted.probabilities is not None else None,
            overlapped=overlapped,
            disagreed=disagreed,
        )
    return maps.finished(job.keep, classes, wanted)
