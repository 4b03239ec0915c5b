"""A network on a device: one block's pixels and tiles in, its label map out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from tilepipe.errors import ModelError, RunError, UsageError
from tilepipe.predict.cpu import CpuEngine
from tilepipe.predict.cuda_steps import CudaSteps
from tilepipe.predict.maps import BlockJob, BlockMaps, Wanted
from tilepipe.predict.prepare import prepare
from tilepipe.predict.scores import Array, label_dtype, statistics_of
from tilepipe.window import Placement, Window

__all__ = ["BlockMaps", "Predictor", "Wanted", "WarmUp"]


class Engine(Protocol):
    """What runs a prepared network on one kind of device; its methods may be called from several threads."""

    def exact(self, job: BlockJob) -> BlockMaps:
        """The block's maps, each output from one tile."""
        ...

    def blend(self, job: BlockJob, weights: Array) -> BlockMaps:
        """The block's maps from overlapping tiles."""
        ...

    def output_shape(self, bands: int) -> tuple[int, int]:
        """The (rows, columns) that the network makes of a tile."""
        ...

    def device_bytes(self) -> int:
        """Memory of a device of its own at its peak; 0 on the CPU."""
        ...

    def limit(self, size: int) -> None:
        """Lets a device of its own give no more than `size` bytes."""

    def close(self) -> None:
        """Gives back threads and memory."""


class WarmUp(NamedTuple):
    """What a first tile took."""

    output: tuple[int, int]
    """The (rows, columns) of the network's output for one tile."""
    seconds: float
    """The second pass's time, when everything is compiled and loaded."""
    device_bytes: int
    """CUDA memory at its peak; 0 on the CPU."""


class Predictor:
    """A network ready to label blocks on a device; share one among all threads of a process.

    network: gives scores (N, classes, h, w), or a dict whose "out", or a tuple whose first element, are scores; it
    is copied, and prepared by `prepare.prepare`. mean, std: one per band, in raster units. device: "cpu",
    "cuda" or "cuda:N". precision: "float32", "float64" or "bf16". tile: the network's (rows, columns). threads:
    tiles at once on the CPU; None is one per hardware thread. Pixels enter as (value - mean) / std in float32
    (float64 for that precision), and as 0 in all bands where they are not valid.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        classes: int,
        tile: tuple[int, int],
        device: str = "cpu",
        precision: str = "float32",
        threads: int | None = None,
    ) -> None:
        label_dtype(classes)
        self.classes, self.tile, self.bands = classes, tile, len(mean)
        target = _device(device)
        steps = CudaSteps.on(target.type)
        self.network = prepare(network, precision, target, steps)
        statistics = statistics_of(mean, std, precision)
        self._engine: Engine
        if target.type == "cuda":
            from tilepipe.predict.cuda import CudaEngine
            from tilepipe.predict.cuda_device import CudaDevice

            self._engine = CudaEngine(self.network, statistics, classes, tile, CudaDevice(target), steps)
        else:
            self._engine = CpuEngine(self.network, statistics, classes, tile, threads)

    def exact(
        self,
        values: Array,
        valid: Array | None,
        placements: Sequence[Placement],
        shape: tuple[int, int],
        wanted: Wanted | None = None,
        keep: Array | None = None,
    ) -> BlockMaps:
        """The maps of one block, whose outputs the placements' targets partition.

        values: (bands, H, W) as stored; valid: (H, W) bool, None for all; shape: the output's (rows, columns);
        keep: (rows, columns) bool, outputs that get a label, None for all. Tiles without such an output do not
        run. Raises ModelError for scores that are not finite, RunError when memory does not suffice.
        """
        job = self._job(values, valid, placements, shape, wanted, keep)
        assert sum(p.target.area for p in placements) == shape[0] * shape[1], "cores do not partition the block"
        return self._engine.exact(job)

    def blend(
        self,
        values: Array,
        valid: Array | None,
        placements: Sequence[Placement],
        shape: tuple[int, int],
        weights: Array,
        wanted: Wanted | None = None,
        keep: Array | None = None,
    ) -> BlockMaps:
        """The maps of one block from the weighted mean of its tiles' class probabilities.

        placements: all tiles that touch the block, in row-major order of the whole raster's tiles, in which each
        pixel's float32 sum is formed. weights: float32 (rows, columns) of a tile's output, positive. The other
        parameters and the errors are those of `exact`.
        """
        job = self._job(values, valid, placements, shape, wanted, keep)
        return self._engine.blend(job, np.ascontiguousarray(weights, np.float32))

    def warm_up(self) -> WarmUp:
        """What one tile of zeros takes once everything is compiled; raises what a block would raise."""
        rows, cols = self._engine.output_shape(self.bands)
        whole = Placement(Window.whole(self.tile), *[Window.whole((rows, cols))] * 2)
        zeros = np.zeros((self.bands, *self.tile), np.uint8)
        started = 0.0
        for _ in range(2):
            started = time.perf_counter()
            self.exact(zeros, None, [whole], (rows, cols))
        return WarmUp((rows, cols), time.perf_counter() - started, self._engine.device_bytes())

    def settle(self, device_bytes: int) -> WarmUp:
        """What a first tile took, on a device that from now on gives no more than `device_bytes`.

        Raises RunError where the tile needs more than that. On the CPU nothing is limited.
        """
        self._engine.limit(device_bytes)
        warm = self.warm_up()
        if warm.device_bytes > device_bytes:
            raise RunError(
                f"one tile of {self.tile[0]} x {self.tile[1]} took {warm.device_bytes / 2**30:.1f} GiB of device "
                f"memory, over the {device_bytes / 2**30:.1f} GiB planned; choose a smaller --tile"
            )
        return warm

    def close(self) -> None:
        """Gives back threads and device memory."""
        self._engine.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _job(
        self,
        values: Array,
        valid: Array | None,
        placements: Sequence[Placement],
        shape: tuple[int, int],
        wanted: Wanted | None,
        keep: Array | None,
    ) -> BlockJob:
        if values.ndim != 3 or len(values) != self.bands:
            raise ModelError(
                f"a block of shape {values.shape} for a network of {self.bands} bands; choose the bands, for "
                f"({self.bands}, rows, columns)"
            )
        assert valid is None or valid.shape == values.shape[1:], "one validity per pixel"
        assert keep is None or keep.shape == shape, "one flag per output"
        # Kernels know the machine's own byte order, and no half precision.
        stored = np.float32 if values.dtype == np.float16 else values.dtype.newbyteorder("=")
        return BlockJob(
            np.ascontiguousarray(values, stored),
            None if valid is None else np.ascontiguousarray(valid, np.bool_),
            None if keep is None else np.ascontiguousarray(keep, np.bool_),
            placements,
            shape,
            wanted or Wanted(),
        )


def _device(name: str) -> torch.device:
    """The device of that name; UsageError where it is not here."""
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
        raise UsageError(f"device {name!r} is not known; use cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise UsageError(f"device {name} was asked for, but torch sees no CUDA device; use --device cpu")
    index = int(number or 0)
    if index >= count:
        raise UsageError(f"device {name} was asked for, but torch sees {count}: use cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)
