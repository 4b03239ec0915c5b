"""A sequential convolutional classifier as a list of its layers, each with the window that it slides.

Read from the network's torch.fx graph, so that nested nn.Sequential and modules of one's own are both understood, as
long as every layer reads the one before it and nothing else. What could not be slid over a larger image with the
same results is refused, naming the layer and what would do: above all padding, since a window's own padding lies at
the window's border and the image's padding only at the image's.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tilepipe.errors import ModelError

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Link:
    """One layer of a chain; element-wise layers have a kernel of 1 x 1. Pairs are (rows, columns)."""

    name: str
    """As messages call it: "features.3 (MaxPool2d)"."""
    module: nn.Module
    """A copy of the network's own, in evaluation mode."""
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)

    @property
    def slides(self) -> bool:
        """Whether it is a convolution or pooling, and not element-wise."""
        return isinstance(self.module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)


class Apply(nn.Module):
    """A function or method of a tensor and plain values, as a layer: `x.clamp(0, 6)`, `1 - x`."""

    def __init__(self, function: Callable[..., Tensor] | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.function = function
        """What is called; a text names a method of the tensor."""
        self.before, self.after = (), tuple(args)
        if not isinstance(function, str) and INPUT in self.after:
            at = self.after.index(INPUT)
            self.before, self.after = self.after[:at], self.after[at + 1 :]
        self.kwargs = dict(kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """The function's result for this tensor."""
        if isinstance(self.function, str):
            return getattr(x, self.function)(*self.after, **self.kwargs)
        return self.function(*self.before, x, *self.after, **self.kwargs)

    def extra_repr(self) -> str:
        """The function and its other arguments."""
        return f"{_called(self.function)}, {(*self.before, '.', *self.after)}, {self.kwargs}"


INPUT = "<input>"
_KINDS: dict[type, str] = {
    fx.immutable_collections.immutable_dict: "a dictionary",
    fx.immutable_collections.immutable_list: "a list",
}

_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.BatchNorm2d, nn.Softmax2d,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink,
    nn.Tanhshrink, nn.Softplus, nn.Softsign, nn.Threshold,
)  # fmt: skip
"""Modules that treat every place alike and alone, in evaluation mode."""

_POINTWISE = (
    "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu celu gelu silu mish sigmoid sigmoid_ logsigmoid tanh "
    "tanh_ hardtanh hardsigmoid hardswish hardshrink softshrink tanhshrink softplus softsign threshold "
    "abs neg exp log sqrt square pow clamp clamp_ clone contiguous add sub mul div true_divide"
)
_METHODS = frozenset(_POINTWISE.split())
_FUNCTIONS = {
    *(found for name in _METHODS for home in (F, torch) if (found := getattr(home, name, None)) is not None),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow),
}
"""The same, as methods of a tensor and as functions."""
_OVER_CHANNELS = {F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, nn.Softmax, nn.LogSoftmax}
_DROPOUTS = {F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout}
_POOLS: dict[Any, type[nn.Module]] = {
    F.max_pool2d: nn.MaxPool2d,
    torch.max_pool2d: nn.MaxPool2d,
    F.avg_pool2d: nn.AvgPool2d,
}

_PADS = "pads its input, which a window would do at its own border and the image does not; use no padding"
_OWN = "normalises by its own input, not by stored statistics; use batch normalisation in evaluation mode"
_GLOBAL = "pools over the whole map, whose size changes; use average pooling with a kernel of the window's map there"
_UNFIT = {
    _PADS: "pad ZeroPad2d ConstantPad2d ReflectionPad2d ReplicationPad2d CircularPad2d",
    _OWN: "GroupNorm InstanceNorm2d LayerNorm group_norm instance_norm layer_norm",
    _GLOBAL: "mean amax max sum",
    "sees a flattened map; write linear layers as convolutions, the first with a kernel of the whole map": (
        "Linear LazyLinear Flatten Unflatten linear flatten view reshape squeeze"
    ),
    "makes its map larger; a classifier that can be slid has only convolutions and pooling": (
        "ConvTranspose2d conv_transpose2d MaxUnpool2d max_unpool2d PixelShuffle pixel_shuffle "
        "Upsample interpolate UpsamplingNearest2d UpsamplingBilinear2d"
    ),
    "joins several layers; only a chain, where each layer reads the last, can be slid": "cat concat stack",
}
_REASONS = {name: reason for reason, names in _UNFIT.items() for name in names.split()}
"""Why layers that people use cannot be slid, and what would do."""


def chain_of(network: nn.Module) -> list[Link]:
    """The layers of a sequential convolutional classifier, in order; `network` itself is not touched.

    The copies in the links are in evaluation mode and share no weights with the network. Raises ModelError, naming
    the layer, for anything that cannot be slid over a larger image.
    """
    own = copy.deepcopy(network).eval()
    # torch.fx takes torch's own modules as they are, except the outermost.
    single = type(own).__module__.startswith("torch.nn.modules") and not isinstance(own, nn.Sequential)
    root = nn.Sequential(own) if single else own
    try:
        graph = fx.Tracer().trace(root)
    except Exception as error:  # networks run arbitrary code while they are traced, and may raise anything
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"torch.fx cannot follow {type(network).__name__} ({said}); give an nn.Sequential to slide it"
        ) from error
    modules = dict(root.named_modules(remove_duplicate=False))
    return [link for node in _path(graph, modules) if (link := _link(node, modules)) is not None]


def _path(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """The nodes from the input to the output, both left out; ModelError where they are no chain."""
    for each in graph.nodes:
        if each.op in ("call_module", "call_function", "call_method"):
            _refuse_known(each, modules)
    path: list[fx.Node] = []
    node = next(node for node in graph.nodes if node.op == "output").args[0]
    while isinstance(node, fx.Node) and node.op not in ("placeholder", "get_attr"):
        path.insert(0, node)
        if len(node.all_input_nodes) != 1:
            raise _refusal(
                node, modules, "reads several layers; only a chain, where each layer reads the last, will do"
            )
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node):
        raise ModelError(
            f"the network returns {_KINDS.get(type(node), 'no tensor')}; to slide it, let it return the scores alone"
        )
    if node.op == "get_attr":
        raise ModelError(f"the network's output does not depend on its input but on {node.target}")
    known = {*path, node}
    for other in graph.nodes:
        if other.op not in ("placeholder", "output", "get_attr") and other not in known and not _looks_only(other):
            raise _refusal(other, modules, "is not on the way from input to output; only a chain can be slid")
    return path


def _looks_only(node: fx.Node) -> bool:
    """Whether a node asks for its input's shape, or checks it."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    name = _called(node.target)
    return node.op == "call_function" and (name in ("getattr", "getitem") or name.startswith("check_"))


def _called(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _name(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"{node.target} ({type(modules[str(node.target)]).__name__})"
    if node.target in _POOLS:  # torch dispatches these by an argument, and calls all of them "fn"
        return f"{node.name} ({_POOLS[node.target].__name__})"
    return f"{node.name} ({_called(node.target)})"


def _refusal(node: fx.Node, modules: Mapping[str, nn.Module], reason: str) -> ModelError:
    return ModelError(f"{_name(node, modules)} {reason}")


def _refuse_known(node: fx.Node, modules: Mapping[str, nn.Module]) -> None:
    """Nothing; raises ModelError for a layer that no chain may have."""
    name = type(modules[str(node.target)]).__name__ if node.op == "call_module" else _called(node.target)
    if "adaptive" in name.lower():
        raise _refusal(node, modules, _GLOBAL)
    if name in _REASONS:
        raise _refusal(node, modules, _REASONS[name])


def _link(node: fx.Node, modules: Mapping[str, nn.Module]) -> Link | None:
    """The layer that a node is; None for dropout by a function, which evaluation leaves out."""
    name, target = _name(node, modules), node.target
    args = fx.map_arg(node.args, lambda _: INPUT)
    if node.op == "call_module":
        return _of_module(name, copy.deepcopy(modules[str(target)]), node, modules)
    if target in _POOLS:
        try:
            return _sliding(name, _POOLS[target](*args[1:], **_without_input(node.kwargs)))
        except TypeError:
            raise _refusal(node, modules, "is called with arguments that are not a pooling's") from None
    if target in _DROPOUTS:
        return None
    function = str(target) if node.op == "call_method" else target
    listed = function in (_METHODS if node.op == "call_method" else _FUNCTIONS)
    if listed or (target in _OVER_CHANNELS and _over_channels(node.kwargs.get("dim", (*args, None)[1]))):
        positional = args[1:] if isinstance(function, str) else args
        return Link(name, Apply(function, positional, _without_input(node.kwargs)))
    raise _unknown(node, modules)


def _without_input(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if not isinstance(value, fx.Node)}


def _over_channels(dim: object) -> bool:
    return dim in (1, -3)


def _unknown(node: fx.Node, modules: Mapping[str, nn.Module]) -> ModelError:
    return _refusal(
        node,
        modules,
        "is none of the layers that can be slid: convolution, max or average pooling, batch normalisation, dropout, "
        "element-wise functions",
    )


def _of_module(name: str, module: nn.Module, node: fx.Node, modules: Mapping[str, nn.Module]) -> Link:
    if module._forward_hooks or module._forward_pre_hooks:
        raise ModelError(f"{name} has hooks, which may do anything; remove them to slide the network")
    if isinstance(module, nn.BatchNorm2d) and module.running_mean is None:
        raise ModelError(f"{name} {_OWN}")
    if type(module) in (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d):
        return _sliding(name, module)
    if type(module) in _MODULES or (type(module) in _OVER_CHANNELS and _over_channels(getattr(module, "dim", None))):
        return Link(name, module)
    raise _unknown(node, modules)


def _sliding(name: str, module: nn.Module) -> Link:
    """A convolution or pooling as a link; ModelError where it pads or does more than slide."""
    kernel, stride = pair(module.kernel_size), pair(module.stride)  # type: ignore[arg-type]
    dilation, padding = pair(getattr(module, "dilation", 1)), module.padding
    fits = padding == "valid" or (kernel == (1, 1) if padding == "same" else pair(padding) == (0, 0))  # type: ignore[arg-type]
    if not fits:
        raise ModelError(f"{name} {_PADS}")
    if getattr(module, "ceil_mode", False):
        raise ModelError(f"{name} has ceil_mode=True, whose last windows hang over the end; use ceil_mode=False")
    if getattr(module, "return_indices", False):
        raise ModelError(f"{name} returns where it found its maxima; use return_indices=False")
    return Link(name, module.eval(), kernel, stride, dilation)


def pair(value: int | Sequence[int]) -> Pair:
    """(rows, columns) of a layer's setting, which torch lets be one number for both."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def window_and_step(links: Sequence[Link]) -> tuple[Pair, Pair]:
    """(window, step), each (rows, columns): the input that one output reads, and from one output's to the next's.

    The window grows by (kernel - 1) x dilation x the strides before it (Araujo, Norris and Sim, Distill, 2019).
    """
    window, step = [1, 1], [1, 1]
    for link in links:
        for axis in range(2):
            window[axis] += (link.kernel[axis] - 1) * link.dilation[axis] * step[axis]
            step[axis] *= link.stride[axis]
    return (window[0], window[1]), (step[0], step[1])
