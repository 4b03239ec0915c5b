"""One run of a network on the meta device under a dispatch mode, to a `Trace`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tilepipe.errors import GeometryError
from tilepipe.geometry.network import Layer, Trace
from tilepipe.geometry.residues import SizeRefusedError
from tilepipe.geometry.steps import Mixing, Same
from tilepipe.tracing.axes import AXES, Field, plain
from tilepipe.tracing.call import Call, Result, UnknownOperatorError
from tilepipe.tracing.recorder import Recorder
from tilepipe.tracing.shapes import shape_only
from tilepipe.tracing.table import ELEMENTWISE, HANDLERS, MIXING, mixing
from tilepipe.tracing.views import join

_LIKE = "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided"
_CONSTANT = frozenset(_LIKE.split())
"""Operators whose result does not depend on their argument's values."""
_UNIFORM = _CONSTANT | {
    "zeros",
    "ones",
    "full",
    "empty",
    "empty_strided",
    "scalar_tensor",
    "fill",
    "fill_",
    "zero_",
}
"""Operators that return one value everywhere; memory that is not yet written counts as such."""
_VIEWS = "alias detach expand lift_fresh permute select slice squeeze t transpose unsqueeze _unsafe_view view"
_KEEPING = frozenset((_VIEWS + " clone repeat reshape _to_copy").split())
"""Operators that return what their argument holds: one value everywhere if that does."""


@torch.inference_mode(mode=False)
def on_meta(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the network in evaluation mode on the meta device, floating-point weights in `dtype` if given.

    Weights are not copied, and the network itself is not touched.
    """
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, device="meta", dtype=kind)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(getattr(network, "_orig_mod", network), memo).eval()


def first_map(output: Any) -> torch.Tensor:
    """The tensor that counts as the network's output: "out" of a dictionary, else the first tensor found.

    torchvision's segmentation networks return a dictionary with "out" and "aux"; others a tuple or a list.
    """
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        items = [output["out"]] if "out" in output else list(output.values())
    else:
        items = list(output) if isinstance(output, list | tuple) else []
    for item in items:
        if isinstance(item, torch.Tensor | Mapping | list | tuple):
            return first_map(item)
    raise GeometryError(f"the network returns {type(output).__name__}; legal: a tensor, a tuple, a dict with 'out'")


@torch.inference_mode(mode=False)  # inside it operators would reach us whole, not as the plain ones they consist of
def trace_at(network: nn.Module, channels: int, rows: int, cols: int) -> Trace:
    """The trace of a network that `on_meta` made, for one input of (1, channels, rows, cols).

    Raises SizeRefusedError where the network raises, and GeometryError for what no size would mend.
    """
    recorder = Recorder()
    image = torch.empty((1, channels, rows, cols), device="meta", dtype=_dtype(network))
    dims = (plain(1), plain(channels), (("rows", rows),), (("cols", cols),))
    recorder.layers.append(Layer("input", "input", (), Same(), Same(), (rows, cols)))
    recorder.track(image, Field(0, dims))
    with torch.no_grad(), module_names(network, recorder.modules), _Recording(recorder):
        try:
            output = network(image)
        except UnknownOperatorError:
            raise
        except Exception as error:  # networks that check their input's sides raise GeometryError themselves
            raise _refused(error, recorder) from error
    return _finish(recorder, first_map(output), channels)


def _dtype(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def _refused(error: Exception, recorder: Recorder) -> Exception:
    first = (str(error).strip().splitlines() or [""])[0]
    where = recorder.layer_name
    if "meta tensor" in first or isinstance(error, NotImplementedError):
        return GeometryError(f"{where} reads pixel values to decide what to do, so its geometry is unknown: {first}")
    return SizeRefusedError(f"{where}: {type(error).__name__}: {first}")


def _finish(recorder: Recorder, output: torch.Tensor, channels: int) -> Trace:
    """The layers that the output depends on, renumbered."""
    field = recorder.field(output)
    if field is None:
        raise GeometryError("the network's output does not depend on its input")
    shape = tuple(output.shape)
    needed = {field.node}
    for index in range(field.node, 0, -1):
        if index in needed:
            needed.update(recorder.layers[index].inputs)
    order = sorted(needed)
    # Behind a layer that mixes all places the axes may be lost; then only the output's size still matters.
    unbounded = any(isinstance(recorder.layers[index].rows, Mixing) for index in order)
    axes = (field.axis_of(2), field.axis_of(3)) if len(shape) == 4 else None
    if axes is None or any(
        axis != name and not (unbounded and axis is None) for axis, name in zip(axes, AXES, strict=True)
    ):
        raise GeometryError(f"the network returns a tensor of {shape}; legal: (batch, classes, rows, columns)")
    for index in order:
        if min(recorder.layers[index].size) < 1:
            raise SizeRefusedError(f"{recorder.layers[index].name}: its output is empty")
    number = {old: new for new, old in enumerate(order)}
    layers = [
        replace(recorder.layers[old], inputs=tuple(number[source] for source in recorder.layers[old].inputs))
        for old in order
    ]
    layers[-1] = replace(layers[-1], size=(shape[2], shape[3]))
    return Trace(tuple(layers), channels, shape[1])


@contextmanager
def module_names(network: nn.Module, names: list[str]) -> Iterator[None]:
    """Keeps in `names` the modules that are running, outermost first: "decoder.3 (MaxUnpool2d)"."""

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: names.append(name)

    def leave(*_: Any) -> None:
        names.pop()

    hooks = []
    for path, module in network.named_modules():
        name = f"{path} ({type(module).__name__})" if path else type(module).__name__
        hooks.append(module.register_forward_pre_hook(enter(name)))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Recording(TorchDispatchMode):
    """Records every operator that touches a tensor which depends on the network's input."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder
        self._moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: guarding against torch.compile would import its two seconds' worth of modules."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        devices = {each.device.type for each in _tensors((*args, *kwargs.values()))}
        if "meta" in devices and len(devices) > 1:
            args, kwargs = tree_map_only(torch.Tensor, self._to_meta, (args, kwargs))
        result = shape_only(func, args) if "meta" in devices else None
        if result is None:
            result = func(*args, **kwargs)
        outputs = tuple(_tensors(result if isinstance(result, list | tuple) else (result,)))
        name = func.overloadpacket.__name__
        call = Call(self.recorder, name, _bind(func, args, kwargs), outputs)
        self.recorder.operator = name
        self._record(func, call)
        return result

    def _to_meta(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "meta":
            return tensor
        if id(tensor) not in self._moved:
            moved = torch.empty_like(tensor, device="meta")
            self._moved[id(tensor)] = tensor, moved
            self.recorder.keep(moved, self.recorder.uniform(tensor))
        return self._moved[id(tensor)][1]

    def _record(self, func: Any, call: Call) -> None:
        recorder, name = self.recorder, call.name
        written = _written(func, call.arguments)
        results: list[Result] | None = None
        if call.fields and name not in _CONSTANT and name not in {"fill_", "zero_"}:
            handler = _handler(func, name)
            if handler is None:
                raise call.unknown()
            results = list(handler(call))
        uniform = results is None and _uniform(name, func, call)
        for position, tensor in enumerate(written or call.outputs):
            result = results[position] if results else None
            if written:
                recorder.write(tensor, result)
            elif result is not None:
                recorder.track(tensor, result)
            else:
                recorder.keep(tensor, uniform)


def understood(func: Any, name: str) -> bool:
    """Whether a trace knows what an operator does to rows and columns; `name` is without overload."""
    return _handler(func, name) is not None or name in _UNIFORM


def _handler(func: Any, name: str) -> Callable[[Call], Any] | None:
    plain_name = name.removesuffix("_")
    if name in HANDLERS or plain_name in HANDLERS:
        return HANDLERS.get(name) or HANDLERS[plain_name]
    if plain_name in ELEMENTWISE or _pointwise(func) or _pointwise(getattr(torch.ops.aten, plain_name, None)):
        return join
    return mixing if name in MIXING else None


def _pointwise(operator: Any) -> bool:
    """Whether torch tags an overload, or any overload of a name, as element-wise."""
    overloads = getattr(operator, "overloads", None)
    each = [getattr(operator, name) for name in overloads()] if overloads else [operator]
    return any(torch.Tag.pointwise in getattr(one, "tags", ()) for one in each)


def _uniform(name: str, func: Any, call: Call) -> bool:
    """Whether an operator without tracked arguments returns tensors that hold one value everywhere."""
    if name in _UNIFORM:
        return True
    tensors = call.tensors
    spreads = torch.Tag.pointwise in func.tags or name in _KEEPING
    return spreads and bool(tensors) and all(each.numel() == 1 or call.recorder.uniform(each) for each in tensors)


def _written(func: Any, arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    return [
        arguments[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None
        and argument.alias_info.is_write
        and isinstance(arguments.get(argument.name), torch.Tensor)
    ]


def _bind(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, defaults included."""
    bound: dict[str, Any] = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
