"""One operator call under the recorder: its arguments by name, its outputs, and what handlers need of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilepipe.errors import GeometryError
from tilepipe.geometry.steps import Step
from tilepipe.tracing.axes import Dim, Dims, Field, plain, resized
from tilepipe.tracing.recorder import Recorder


class UnknownOperatorError(GeometryError):
    """A network that uses an operator whose reach is not known; no other input size would mend that."""


Result = Field | None
"""What an output tensor holds; None: nothing that depends on the input."""


@dataclass(frozen=True, slots=True)
class Call:
    """An operator call of which at least one argument depends on the network's input."""

    recorder: Recorder
    name: str
    """The operator without overload and namespace: "max_pool2d_with_indices"."""
    arguments: Mapping[str, Any]
    """All arguments by their names in the operator's schema, defaults included."""
    outputs: tuple[torch.Tensor, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensor arguments, those in lists included."""
        found: list[torch.Tensor] = []
        for value in self.arguments.values():
            items = value if isinstance(value, list | tuple) else (value,)
            found.extend(item for item in items if isinstance(item, torch.Tensor))
        return found

    @property
    def fields(self) -> list[Field]:
        """What the tensor arguments hold, where it depends on the input."""
        return [field for tensor in self.tensors if (field := self.recorder.field(tensor)) is not None]

    @property
    def first(self) -> Field:
        """What the first argument that depends on the input holds."""
        return self.fields[0]

    def field(self, *names: str) -> Field | None:
        """What the argument of the first of these names that exists holds."""
        return next((self.recorder.field(self.arguments[name]) for name in names if name in self.arguments), None)

    def get(self, *names: str, default: Any = None) -> Any:
        """The value of the first of these arguments that exists."""
        return next((self.arguments[name] for name in names if name in self.arguments), default)

    def move(self, field: Field, steps: Mapping[str, Step], dims: Dims | None = None) -> Field:
        """What the first output holds after steps along rows and columns; sizes come from the output's shape."""
        shaped = dims if dims is not None else self.shaped(field.dims)
        return Field(self.recorder.add([field], steps, shaped), shaped)

    def mix(self, reason: str, dims: Dims | None = None) -> Field:
        """What the first output holds after mixing all places; `reason` ends a sentence."""
        shaped = dims if dims is not None else self.shaped(self.first.dims)
        return self.recorder.mix(self.fields, reason, shaped)

    def shaped(self, dims: Dims, output: int = 0) -> Dims:
        """The dimensions of an output: those of an input of as many dimensions, with the output's sizes."""
        shape = self.outputs[output].shape
        if len(shape) != len(dims):
            return guessed(shape, dims)
        new = {dim[0][0]: size for dim, size in zip(dims, shape, strict=True) if len(dim) == 1 and dim[0][0] != "x"}
        return tuple(
            resized((dim,), new)[0] if any(kind != "x" for kind, _ in dim) else plain(size)
            for dim, size in zip(dims, shape, strict=True)
        )

    def unknown(self) -> UnknownOperatorError:
        """The error for an operator that is not understood."""
        return UnknownOperatorError(
            f"{self.recorder.layer_name} uses the operator {self.name}, whose reach is not known; "
            "replace it by convolutions, pooling, resizing or element-wise operators"
        )


def guessed(shape: Sequence[int], dims: Dims) -> Dims:
    """Dimensions for a shape of another length: axes are kept where their sizes appear, from the end.

    Used behind layers whose reach has no bound, where only the output's size still matters.
    """
    axes = [factor for dim in dims for factor in dim if factor[0] != "x"]
    result: list[Dim] = []
    for size in reversed(shape):
        if axes and axes[-1][1] == size:
            result.append((axes.pop(),))
        else:
            result.append(plain(size))
    return tuple(reversed(result))
