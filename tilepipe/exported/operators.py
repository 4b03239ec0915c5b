"""Which functions an exported graph may call: torch's own tensor operators, and arithmetic of sizes.

An archive names its functions by text, and torch's loader resolves any text below `torch`, `math` and `operator`.
Here a name is looked up in two closed tables. An operator of `aten` is legal when geometry can be derived through
it, when it is composed of others that are judged where they run, or when it makes a constant; and never when it
takes a text that is not one of the modes below (`from_file` takes a file's name).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tilepipe.errors import ModelError
from tilepipe.tracing.run import understood

ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in [
            "add",
            "sub",
            "mul",
            "floordiv",
            "truediv",
            "mod",
            "neg",
            "pow",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "and_",
            "or_",
            "not_",
            "getitem",
        ]
    },
    **{f"math.{name}": getattr(math, name) for name in ["ceil", "floor", "trunc", "sqrt"]},
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_int": int,
    "torch.sym_float": float,
    "torch.sym_not": operator.not_,
    "torch.ops.aten.sym_size.int": lambda self, dim: self.shape[dim],
    "torch.ops.aten.sym_numel.default": lambda self: math.prod(self.shape),
}
"""Functions of sizes, which are plain integers here."""

ASSERTIONS = frozenset(
    [
        "torch.ops.aten._assert_tensor_metadata.default",
        "torch.ops.aten._assert_scalar.default",
        "torch.ops.aten.sym_constrain_range.default",
        "torch.ops.aten.sym_constrain_range_for_size.default",
    ]
)
"""Calls that compute nothing. What they say of sizes is in the program's conditions."""

CONSTANTS = frozenset(["arange", "empty", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros"])
"""Operators that take no tensor."""

TEXTS = frozenset(["approximate", "equation", "indexing", "mode", "padding", "reduction", "rounding_mode", "value"])
"""Arguments that may be text: modes, and einsum's equation."""

_OPERATOR = re.compile(r"torch\.ops\.aten\.([a-zA-Z0-9_]+)\.([a-zA-Z0-9_]+)")


def resolve(target: str) -> Callable[..., Any]:
    """The function that a graph names; raises ModelError for one that it may not call."""
    if target in ARITHMETIC:
        return ARITHMETIC[target]
    match = _OPERATOR.fullmatch(target)
    packet: Any = getattr(torch.ops.aten, match[1], None) if match else None
    known = isinstance(packet, torch._ops.OpOverloadPacket)
    if match is None or not known or match[2] not in packet.overloads():
        raise ModelError(
            f"calls {target[:80]!r}, which is not a tensor operator of torch; bring the network by its code "
            "instead, as package.module:factory"
        )
    found = getattr(packet, match[2])
    if not _legal(match[1], found):
        raise ModelError(f"calls the operator {match[1]!r}, which files may not call")
    return found


def takes_device(function: Callable[..., Any]) -> bool:
    """Whether a function makes a constant on a device of its own choice."""
    schema = getattr(function, "_schema", None)
    return schema is not None and schema.name.removeprefix("aten::") in CONSTANTS


def _legal(name: str, found: Any) -> bool:
    arguments = found._schema.arguments
    if any("str" in str(each.type) and each.name not in TEXTS for each in arguments):
        return False
    if not any("Tensor" in str(each.type) for each in arguments):
        return name in CONSTANTS
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(found.name(), "CompositeImplicitAutograd")
    return composite or name == "lift_fresh_copy" or understood(found, name)
