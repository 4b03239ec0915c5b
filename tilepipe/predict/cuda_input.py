"""A tile's input on a CUDA device: from pixels as stored to normalised ones as the network takes them."""

from __future__ import annotations

import torch

from tilepipe.predict.cuda_steps import CudaSteps
from tilepipe.predict.prepare import Prepared
from tilepipe.predict.scores import Array
from tilepipe.window import Window


class TileInput:
    """Cuts tiles out of a block's pixels and normalises them, in one pass where `steps` say so."""

    def __init__(
        self, network: Prepared, statistics: tuple[Array, Array], device: torch.device, steps: CudaSteps
    ) -> None:
        self.mean, self.std = (torch.from_numpy(values).to(device) for values in statistics)
        self._dtype, self._channels = network.dtype, max(network.channels, len(self.mean))
        self._one_pass = steps.upload and network.channels_last and self.mean.dtype == torch.float32

    def cut(self, values: torch.Tensor, valid: torch.Tensor | None, window: Window) -> torch.Tensor:
        """The input (1, channels, *window.shape) for a window of a block.

        values: (bands, H, W) as stored, C-contiguous; valid: (H, W) bool, None for all; the others become 0.
        """
        if self._one_pass:
            from tilepipe.predict import triton_kernels as kernels

            shape = 1, self._channels, *window.shape
            out = torch.empty(shape, dtype=self._dtype, device=values.device, memory_format=torch.channels_last)
            kernels.normalise(values, valid, window.origin, self.mean, self.std, out)
            return out
        rows, cols = slice(window.rows.start, window.rows.stop), slice(window.cols.start, window.cols.stop)
        # torch has no arithmetic for some stored types, but converts them all.
        pixels = values[:, rows, cols].to(self.mean.dtype, copy=True)
        pixels.sub_(self.mean.view(-1, 1, 1)).div_(self.std.view(-1, 1, 1))
        if valid is not None:
            pixels.masked_fill_(~valid[rows, cols], 0)
        return pixels[None]
