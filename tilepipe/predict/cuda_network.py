"""A folded network's modules replaced by ours for CUDA: poolings, unpoolings, and the bias and ReLU before them.

    convolution, bias, ReLU, pool      ->  convolution bare; pool adds the bias and takes the ReLU as it reads
    convolution, bias, ReLU, unpool    ->  the same with unpool
    convolution, bias, ReLU            ->  convolution bare; bias and ReLU in place, in one pass

torch runs each of these as a pass of its own over a map of several gigabytes. The results have the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from tilepipe.models.pooling import Pool, Unpool
from tilepipe.predict import triton_kernels as kernels
from tilepipe.predict.cuda_steps import CudaSteps
from tilepipe.predict.graphs import (
    Joins,
    calls_of,
    has_hooks,
    modules_read,
    pairs_pools,
    readers,
    replace_module,
    traced,
)
from tilepipe.window import Window

MOST_CLASSES = 128
"""Of a convolution whose best class is taken as it is computed: its sums stay in registers."""


class Activation(nn.Module):
    """What comes between a bare convolution and the next module: its bias, and a ReLU where there is one."""

    bias: torch.Tensor | None

    def __init__(self, bias: torch.Tensor | None = None, relu: bool = False) -> None:
        super().__init__()
        self.register_buffer("bias", bias)
        self.relu = relu

    def extra_repr(self) -> str:
        """What it takes over."""
        return f"bias={self.bias is not None}, relu={self.relu}"


class BiasRelu(Activation):
    """relu(x + bias), in x's own memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map."""
        assert self.bias is not None
        return kernels.bias_relu_(x, self.bias)


class SwitchPool(Activation):
    """`Pool` of relu(x + bias), with switches of a byte."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(maxima, switches)."""
        return kernels.pool(x, self.bias, self.relu)


class SwitchUnpool(Activation):
    """`Unpool` of relu(x + bias) by such switches."""

    def forward(self, x: torch.Tensor, switches: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The map (N, C, *size)."""
        return kernels.unpool(x, self.bias, self.relu, switches, (size[0], size[1]))

    def part(self, x: torch.Tensor, switches: torch.Tensor, size: tuple[int, int], part: Window) -> torch.Tensor:
        """As `Unpool.part`."""
        rows, cols = part.rows, part.cols
        own = switches[..., rows.start : rows.stop, cols.start : cols.stop]
        return kernels.unpool(x, self.bias, self.relu, own, (2 * part.shape[0], 2 * part.shape[1]))


class PaddedConv2d(nn.Module):
    """A network's first convolution with more input channels, which are 0 and have weights of 0."""

    def __init__(self, conv: nn.Conv2d, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = conv
        more = channels - conv.in_channels
        weight = F.pad(conv.weight, (0, 0, 0, 0, 0, more)).contiguous(memory_format=torch.channels_last)
        conv.weight, conv.in_channels = nn.Parameter(weight, requires_grad=False), channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution of x, whose channels may be the bands alone."""
        if x.shape[1] < self.channels:
            x = F.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[1])).contiguous(memory_format=torch.channels_last)
        return self.conv(x)


class LastConvolution(nn.Module):
    """A network's last convolution, which can be held back: the network then gives what it would have read."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.held = conv, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The scores, or their features."""
        return x if self.held else self.conv(x)

    @property
    def reach(self) -> int:
        """How many pixels away it looks."""
        return int(self.conv.kernel_size[0]) // 2


class Adapted(NamedTuple):
    """What became of a network beyond its own modules."""

    channels: int
    """Input channels that it wants; 0 for its bands."""
    last: LastConvolution | None
    """Its last convolution, where that can be held back."""


def adapt(network: nn.Module, steps: CudaSteps) -> Adapted:
    """What comes of replacing a folded network's modules by those that `steps` name.

    Poolings and unpoolings are those of `tilepipe.models.pooling`, and are replaced together. What the traced graph
    does not show to be a convolution's only reader is left; a network that torch.fx cannot trace keeps its
    biases and ReLUs.
    """
    graph = traced(network, _is_pooling)
    pooling = steps.pooling and pairs_pools(network)
    if graph is not None and steps.fused:
        _fuse(network, graph, pooling)
    if pooling:
        for module in list(network.modules()):
            if isinstance(module, Pool):
                replace_module(network, module, SwitchPool())
            elif isinstance(module, Unpool):
                replace_module(network, module, SwitchUnpool())
    if graph is None:
        return Adapted(0, None)
    channels = _pad_first(network, graph, steps.bands) if steps.bands else 0
    return Adapted(channels, _hold_last(network, graph) if steps.classifier else None)


def _is_pooling(module: nn.Module) -> bool:
    return isinstance(module, Pool | Unpool)


def _fuse(network: nn.Module, graph: fx.Graph, pooling: bool) -> None:
    modules = dict(network.named_modules(remove_duplicate=False))
    calls, read = calls_of(graph, modules), modules_read(graph, modules)
    joins = Joins(modules, calls)
    for conv in [module for module in calls if _is_bare_able(module) and module not in read]:
        relu = joins.follower(conv)
        has_relu = type(relu) is nn.ReLU and not has_hooks(relu)
        after = joins.follower(relu) if has_relu and relu is not None else relu
        if pooling and isinstance(after, Pool | Unpool):
            kind = SwitchPool if isinstance(after, Pool) else SwitchUnpool
            replace_module(network, after, kind(_taken_bias(conv), has_relu))
            if has_relu and relu is not None:
                replace_module(network, relu, nn.Identity())
        elif has_relu and relu is not None:
            replace_module(network, relu, BiasRelu(_taken_bias(conv)))


def _is_bare_able(module: nn.Module) -> bool:
    return type(module) in (nn.Conv2d, nn.ConvTranspose2d) and module.bias is not None and not has_hooks(module)


def _taken_bias(conv: Any) -> torch.Tensor:
    bias, conv.bias = conv.bias.detach(), None
    return bias


def _pad_first(network: nn.Module, graph: fx.Graph, least: int) -> int:
    """The input channels wanted once the convolution that alone reads the input has `least`; 0 where it cannot."""
    modules = dict(network.named_modules(remove_duplicate=False))
    entered, *others = [node for node in graph.nodes if node.op == "placeholder"]
    found = readers(entered)
    if others or len(found) != 1 or found[0].op != "call_module":
        return 0
    conv, calls = modules[str(found[0].target)], calls_of(graph, modules)
    if type(conv) is not nn.Conv2d or conv.groups != 1 or len(calls[conv]) != 1 or conv.in_channels >= least:
        return 0
    replace_module(network, conv, PaddedConv2d(conv, least))
    return least


def _hold_last(network: nn.Module, graph: fx.Graph) -> LastConvolution | None:
    """The convolution that gives the network's result, where it keeps the size and gives labels of a byte."""
    modules = dict(network.named_modules(remove_duplicate=False))
    (result,) = next(node for node in graph.nodes if node.op == "output").args
    if not isinstance(result, fx.Node) or result.op != "call_module" or len(result.users) != 1:
        return None
    conv: Any = modules[str(result.target)]
    if type(conv) is not nn.Conv2d or len(calls_of(graph, modules)[conv]) != 1 or conv.out_channels > MOST_CLASSES:
        return None
    side = conv.kernel_size[0]
    plain = conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    if not plain or side % 2 == 0 or conv.kernel_size != (side, side) or conv.padding != (side // 2,) * 2:
        return None
    last = LastConvolution(conv)
    replace_module(network, conv, last)
    return last
