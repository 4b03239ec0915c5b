"""A network made ready to run: evaluation mode, batch normalisation folded, precision, memory layout.

`prepare` is part of the promise: the reference result is that of the prepared network, in one pass over the whole
raster. Tests, proofs and jobs call this one function.
"""

from __future__ import annotations

import copy
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tilepipe.allocator import keeps_freed_memory
from tilepipe.errors import ModelError, RunError, UsageError
from tilepipe.models.partial import Partial
from tilepipe.predict import cpu_network
from tilepipe.predict.cuda_steps import NONE, CudaSteps
from tilepipe.predict.folding import fold_batch_norms
from tilepipe.window import Window

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16}
"""The precisions, by name."""


class Prepared(nn.Module):
    """A network ready to run: normalised pixels (N, bands, H, W) in, scores (N, classes, h, w) out."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, channels_last: bool, folded: int, unfolded: int) -> None:
        super().__init__()
        self.training = False
        self.network = network
        self.dtype = dtype
        self.channels_last = channels_last
        """Whether activations lie in memory as (H, W, channels)."""
        self.folded = folded
        """Batch normalisations that became part of a convolution."""
        self.unfolded = unfolded
        """Batch normalisations that run as they are."""
        self.channels = 0
        """Input channels that the network wants, where these are more than its bands: the others are 0."""
        self.last: Any = None
        """The last convolution, where a kernel can take its place (`cuda_network.LastConvolution`)."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The scores, of the first tensor where the network gives several."""
        return _scores(self.network(self._laid_out(pixels)))

    def forward_part(self, pixels: torch.Tensor, part: Window) -> torch.Tensor:
        """The scores in `part` of the output, where the network `is_partial`."""
        assert isinstance(self.network, Partial), "asked of networks that can do it"
        return _scores(self.network.forward_part(self._laid_out(pixels), part))

    @property
    def is_partial(self) -> bool:
        """Whether the network can compute a part of its output alone."""
        return isinstance(self.network, Partial)

    def _laid_out(self, pixels: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return pixels.to(self.dtype).contiguous(memory_format=layout)


def prepare(
    network: nn.Module,
    precision: str = "float32",
    device: torch.device | str = "cpu",
    steps: CudaSteps = NONE,
) -> Prepared:
    """A copy of `network` in evaluation mode, without gradients, folded, in `precision` on `device`.

    precision: a name of DTYPES; parameters that are not floating point stay as they are. Activations are channels
    last where that is faster: not in float64, and not where every convolution looks at one pixel. Where they are,
    `steps` replace modules by kernels for CUDA.
    """
    if precision not in DTYPES:
        raise UsageError(f"precision {precision!r} is not known; use one of {', '.join(DTYPES)}")
    dtype = DTYPES[precision]
    own = copy.deepcopy(network)
    with suppress(NotImplementedError):  # exported programs refuse it: they are as they were exported
        own.eval()
    own.requires_grad_(False)
    folded = fold_batch_norms(own)
    unfolded = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in own.modules())
    channels_last = dtype != torch.float64 and any(_looks_around(module) for module in own.modules())
    own.to(device=device, dtype=dtype)
    if channels_last:
        own.to(memory_format=torch.channels_last)
    if channels_last and dtype == torch.float32 and torch.device(device).type == "cpu" and not steps.replace:
        cpu_network.adapt(own)
    ready = Prepared(own, dtype, channels_last, folded, unfolded)
    if channels_last and steps.replace:
        from tilepipe.predict.cuda_network import adapt
        from tilepipe.predict.triton_kernels import check

        check(torch.device(device))
        ready.channels, ready.last = adapt(own, steps)
    return ready


def _looks_around(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 4 and max(weight.shape[2:]) > 1


def _scores(output: Any) -> torch.Tensor:
    if isinstance(output, dict):
        output = output["out"] if "out" in output else next(iter(output.values()), None)
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, torch.Tensor) or output.dim() != 4:
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ModelError(f"the network returns {shape}; a tensor (N, classes, rows, columns) is needed")
    return output


class TileScores(NamedTuple):
    """What a network gave for a tile."""

    scores: torch.Tensor
    """(1, classes, h, w)."""
    origin: tuple[int, int]
    """Where the first of them lies in the tile's whole output, (row, column)."""


def scores_of(network: Prepared, pixels: torch.Tensor, classes: int, core: Window | None = None) -> TileScores:
    """One tile's scores for its normalised pixels (1, bands, rows, columns): those of `core` at least.

    Raises ModelError where the network fails or gives another number of classes, RunError where the host's memory
    does not suffice; CUDA's own error for its memory passes.
    """
    part = core if network.is_partial else None
    try:
        scores: torch.Tensor = network(pixels) if part is None else network.forward_part(pixels, part)
    except torch.OutOfMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        tile = f"a tile of {pixels.shape[2]} x {pixels.shape[3]}"
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "not enough memory" in str(error):
            raise RunError(f"{tile} does not fit into memory; choose a smaller --tile or fewer --threads") from error
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"the network fails on {tile}: {said}") from error
    if scores.shape[:2] != (1, classes):
        raise ModelError(
            f"the network gives scores of shape {tuple(scores.shape)}; "
            f"{classes} classes need (1, {classes}, rows, columns)"
        )
    return TileScores(scores, (0, 0) if part is None else part.origin)


# --- the process ----------------------------------------------------------------------------------------------


def use_one_thread() -> None:
    """Gives the calling thread one torch thread, for good; the initializer of pools whose threads work side by side.

    A thread takes over what was last set anywhere when torch first asks for its number, which may be after it was
    set here. That moment has to come first: results of some kernels depend on the number in the last bit.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)


def use_large_pages() -> bool:
    """Whether torch will ask the kernel for large pages in this process; call it before the first tensor is made.

    Big activations are mapped anew at every forward pass; with pages of 4 KiB, faulting them in takes longer than
    a cheap network. Large pages cost a tenth of that. False where memory is kept anyway, where the kernel offers none,
    and where the environment already says no.
    """
    if keeps_freed_memory():
        return False
    try:
        offered = "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False
    return offered and os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1") == "1"
