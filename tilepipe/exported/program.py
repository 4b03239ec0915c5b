"""A module that runs an exported graph, operator by operator, from the archive's own description of it.

Convolutions and batch normalisations become torch's modules, so that they fold, take another precision and another
memory layout as those of any network do. Everything else is called as it is named, if it may be called
(`operators.resolve`). Tensors are dropped behind their last use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from tilepipe.errors import ModelError
from tilepipe.exported.conditions import Conditions
from tilepipe.exported.operators import ASSERTIONS, resolve, takes_device

DTYPES: Mapping[int, torch.dtype] = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""Types by the numbers that archives (schema 8) use for them."""

LAYOUTS: Mapping[int, torch.memory_format] = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    4: torch.preserve_format,
}
STRIDED = 7
"""The number of the plain layout."""
DTYPE, DEVICE = "the input's type", "the input's device"
"""Names under which the input's own type and device are kept; no graph's value is called so."""


@dataclass(frozen=True, slots=True)
class Name:
    """Stands for a value of the graph among a call's arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the graph."""

    module: str
    """The child of the program that makes it."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: Any
    """A name, or a nested list of names, as the call returns values; None for a value that is not kept."""
    last: tuple[str, ...]
    """Names that no later call reads."""


class Operator(nn.Module):
    """A function of the graph as a module, so that messages can name it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        return self.function(*args, **kwargs)


def check_shape(conditions: Conditions, image: Tensor) -> None:
    """Nothing; raises GeometryError for an image of a shape that the program was not exported for."""
    conditions.check(image.shape)


torch.fx.wrap("check_shape")


class Program(nn.Module):
    """An exported network: images (N, bands, H, W) to the tensor that counts as its output."""

    def __init__(self, conditions: Conditions, image: str, bands: int) -> None:
        super().__init__()
        self.example_size = conditions.example[2:]
        """(rows, columns) that it was exported with."""
        self.conditions = conditions
        self.image = image
        self.bands = bands
        self.calls: list[Call] = []
        self.output = image
        self.tensors: dict[str, str] = {}
        """Values of the graph that are parameters or buffers of this module, by the value's name."""

    def forward(self, image: Tensor) -> Tensor:
        """The output; raises GeometryError for a size that the program was not exported for."""
        check_shape(self.conditions, image)
        values: dict[str, Any] = {name: getattr(self, kept) for name, kept in self.tensors.items()}
        values |= {self.image: image, DTYPE: image.dtype, DEVICE: image.device}
        for call in self.calls:
            args, kwargs = filled(call.args, values), filled(call.kwargs, values)
            keep(call.results, self._modules[call.module](*args, **kwargs), values)  # type: ignore[misc]
            for name in call.last:
                values.pop(name, None)
        return values[self.output]


def filled(value: Any, values: Mapping[str, Any]) -> Any:
    """Arguments with the graph's values in place of their names."""
    if isinstance(value, Name):
        return values[value.name]
    if isinstance(value, tuple | list):
        return [filled(each, values) for each in value]
    if isinstance(value, Mapping):
        return {key: filled(each, values) for key, each in value.items()}
    return value


def keep(names: Any, results: Any, values: dict[str, Any]) -> None:
    """Puts what a call returned under its names."""
    if isinstance(names, str):
        values[names] = results
    elif names is not None:
        for position, name in enumerate(names):
            keep(name, results[position], values)


def build_program(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Program:
    """The module that runs the graph in an archive's parsed `model.json`, with its parameters and buffers.

    Raises ModelError where the graph calls what it may not, or takes more than one image.
    """
    module = told["graph_module"]
    graph, signature = module["graph"], module["signature"]
    values = dict(_tensors_of(signature["input_specs"], tensors))
    image = _image_of(signature["input_specs"])
    meta = graph["tensor_values"][image]
    conditions = Conditions.of(meta["sizes"], told["range_constraints"], told.get("guards_code") or ())
    if conditions.extents[1].factor:
        raise ModelError("takes any number of bands; export it with a fixed one")
    if conditions.extents[0].factor == 0 and conditions.extents[0].offset != 1:
        raise ModelError(f"takes {conditions.extents[0].offset} images at once; export it with one, or with a Dim")
    program = Program(conditions, image, conditions.extents[1].offset)
    builder = _Builder(program, values, int(meta["dtype"]))
    for node in graph["nodes"]:
        builder.add(node)
    program.output = _output_of(module)
    builder.finish()
    return program


def _tensors_of(specs: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(the graph's name, the tensor) of each parameter, buffer and constant."""
    fields = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
    for spec in specs:
        for kind, field in fields.items():
            if kind in spec:
                name = spec[kind][field]
                if name not in tensors:
                    raise ModelError(f"lacks the tensor {name}")
                yield spec[kind]["arg"]["name"], tensors[name]


def _image_of(specs: Sequence[Mapping[str, Any]]) -> str:
    given = [spec["user_input"]["arg"] for spec in specs if "user_input" in spec]
    images = [arg["as_tensor"]["name"] for arg in given if "as_tensor" in arg]
    if len(images) != 1:
        raise ModelError(f"takes {len(images)} tensors; legal: one image")
    return str(images[0])


def _output_of(module: Mapping[str, Any]) -> str:
    """The name of the tensor that counts as the output: "out" of a dictionary, else the first tensor."""
    outputs = [spec["user_output"]["arg"] for spec in module["signature"]["output_specs"] if "user_output" in spec]
    entry = next((each for each in module["module_call_graph"] if each["fqn"] == ""), None)
    keys = _keys(entry["signature"]["out_spec"]) if entry and entry.get("signature") else []
    if len(keys) == len(outputs) and "out" in keys:
        outputs = [outputs[keys.index("out")]]
    found = next((arg["as_tensor"]["name"] for arg in outputs if "as_tensor" in arg), None)
    if found is None:
        raise ModelError("returns no tensor")
    return str(found)


def _keys(spec: str) -> list[str]:
    """The keys of a flat dictionary that a network returns; none where it returns something else."""
    from tilepipe.checkpoint import parse_json

    tree = parse_json('{"spec": ' + spec + "}", "output's structure")["spec"][1]
    if tree["type"] not in {"builtins.dict", "collections.OrderedDict"} or any(
        child["children_spec"] or child["type"] for child in tree["children_spec"]
    ):
        return []
    context = parse_json('{"keys": ' + tree["context"] + "}", "output's structure")["keys"]
    return [str(key) for key in context]


class _Builder:
    """Adds an archive's nodes to a program, one by one."""

    def __init__(self, program: Program, tensors: Mapping[str, Tensor], working: int) -> None:
        self.program = program
        self.tensors = tensors
        self.working = working
        """The archive's number of the input's type: where the graph says it, the input's own is meant."""
        self.known = {program.image, *tensors}

    def add(self, node: Mapping[str, Any]) -> None:
        """One call, and the module that makes it."""
        target = str(node["target"])
        if target in ASSERTIONS:
            return
        function = resolve(target)
        given = {str(each["name"]): self._argument(each["arg"]) for each in node["inputs"]}
        results = [self._result(each) for each in node["outputs"]]
        name = f"{_path(node)}/{node.get('name') or len(self.program.calls)}"
        made = self._convolution(target, given) or self._batch_norm(target, given)
        if made is not None:
            module, given = made[0], {"input": made[1]}
        else:
            module = Operator(function)
        if name in self.program._modules:
            name = f"{name}.{len(self.program.calls)}".replace(".", "_")
        self.program.add_module(name, module)
        # An operator's own "self" cannot be given by name; it comes first in every schema.
        args = (given.pop("self"),) if "self" in given else ()
        if target.startswith(("_operator.", "math.", "torch.sym_")):
            args, given = (*args, *given.values()), {}
        elif takes_device(function):
            given.setdefault("device", Name(DEVICE))
        whole = results[0] if len(results) == 1 else results
        self.program.calls.append(Call(name, args, given, whole, ()))

    def finish(self) -> None:
        """Keeps the tensors that calls read, and lets each value go behind its last use."""
        program = self.program
        last = {name: index for index, call in enumerate(program.calls) for name in _names((call.args, call.kwargs))}
        if program.output not in self.known:
            raise ModelError(f"returns {program.output}, which nothing computes")
        ends: dict[int, list[str]] = {}
        for name, index in last.items():
            if name != program.output:
                ends.setdefault(index, []).append(name)
        program.calls = [
            Call(call.module, call.args, call.kwargs, call.results, tuple(ends.get(index, ())))
            for index, call in enumerate(program.calls)
        ]
        for number, name in enumerate(sorted(last.keys() & self.tensors.keys())):
            program.tensors[name] = f"tensor_{number}"
            tensor = self.tensors[name]
            if isinstance(tensor, nn.Parameter):
                program.register_parameter(f"tensor_{number}", tensor)
            else:
                program.register_buffer(f"tensor_{number}", tensor)

    # ---- arguments and results -------------------------------------------------------------------------------

    def _argument(self, told: Mapping[str, Any]) -> Any:
        ((kind, value),) = told.items()
        match kind:
            case "as_none":
                found: Any = None
            case "as_tensor":
                found = self._name(value["name"])
            case "as_tensors":
                found = [self._name(each["name"]) for each in value]
            case "as_optional_tensor" | "as_sym_int" | "as_sym_bool" | "as_sym_float":
                found = self._choice(value)
            case "as_optional_tensors" | "as_sym_ints" | "as_sym_bools" | "as_sym_floats":
                found = [self._choice(each) for each in value]
            case "as_int" | "as_bool" | "as_float" | "as_string" | "as_ints" | "as_bools" | "as_floats":
                found = value
            case "as_scalar_type":
                found = Name(DTYPE) if value == self.working else DTYPES[value]
            case "as_memory_format":
                found = LAYOUTS[value]
            case "as_layout" if value == STRIDED:
                found = torch.strided
            case "as_device":
                found = Name(DEVICE)
            case _:
                raise ModelError(f"gives an operator an argument of kind {kind!r}, which is not known; export it again")
        return found

    def _choice(self, told: Mapping[str, Any]) -> Any:
        ((kind, value),) = told.items()
        if kind == "as_name":
            return self._name(value)
        return self._name(value["name"]) if kind == "as_tensor" else None if kind == "as_none" else value

    def _name(self, name: str) -> Name:
        if name not in self.known:
            raise ModelError(f"reads {name!r}, which nothing computes")
        return Name(name)

    def _result(self, told: Mapping[str, Any]) -> Any:
        ((kind, value),) = told.items()
        match kind:
            case "as_tensor":
                names: Any = str(value["name"])
            case "as_tensors":
                names = [str(each["name"]) for each in value]
            case "as_sym_int" | "as_sym_bool" | "as_sym_float":
                names = value.get("as_name")
            case _:
                return None
        self.known.update([names] if isinstance(names, str) else names or ())
        return names

    # ---- modules ---------------------------------------------------------------------------------------------

    def _weight(self, given: Mapping[str, Any], name: str) -> Tensor | None:
        value = given.get(name)
        return self.tensors.get(value.name) if isinstance(value, Name) else None

    def _convolution(self, target: str, given: Mapping[str, Any]) -> tuple[nn.Module, Name] | None:
        """The module of a plain two-dimensional convolution, and its input; None for any other call."""
        weight, bias = self._weight(given, "weight"), self._weight(given, "bias")
        plain = target in {"torch.ops.aten.conv2d.default", "torch.ops.aten.conv2d.padding"}
        if not plain or weight is None or weight.dim() != 4 or (bias is None) != (given.get("bias") is None):
            return None
        stride, padding, dilation = (given.get(name) for name in ("stride", "padding", "dilation"))
        groups = given.get("groups", 1)
        rows, cols = weight.shape[2:]
        module = nn.Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            (int(rows), int(cols)),
            tuple(stride or (1, 1)),
            padding if isinstance(padding, str) else tuple(padding or (0, 0)),
            tuple(dilation or (1, 1)),
            groups,
            bias is not None,
            device="meta",
        )
        return _with(module, weight=weight, bias=bias), given["input"]

    def _batch_norm(self, target: str, given: Mapping[str, Any]) -> tuple[nn.Module, Name] | None:
        """The module of a batch normalisation by stored statistics, and its input; None for any other call."""
        mean, variance = self._weight(given, "running_mean"), self._weight(given, "running_var")
        weight, bias = self._weight(given, "weight"), self._weight(given, "bias")
        plain = target == "torch.ops.aten.batch_norm.default" and not given.get("training")
        if not plain or mean is None or variance is None or (weight is None) != (bias is None):
            return None
        module = nn.BatchNorm2d(len(mean), given["eps"], affine=weight is not None, device="meta")
        module.num_batches_tracked = None
        return _with(module, running_mean=mean, running_var=variance, weight=weight, bias=bias), given["input"]


def _with(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    for name, tensor in tensors.items():
        parameter = name in module._parameters and tensor is not None
        setattr(module, name, nn.Parameter(tensor, requires_grad=False) if parameter else tensor)  # type: ignore[arg-type]
    return module.eval()


def _path(node: Mapping[str, Any]) -> str:
    """The module that ran a node when it was exported, its parts joined by slashes; "graph" where none is told."""
    stack = str((node.get("metadata") or {}).get("nn_module_stack", ""))
    path = stack.rpartition(";")[2].split(",")
    inside = len(path) > 1 and path[1] and "_empty_nn_module_stack" not in path[1]
    return path[1].replace(".", "/")[:200] if inside else "graph"


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, Name):
        yield value.name
    elif isinstance(value, Mapping):
        yield from _names(list(value.values()))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _names(each)
