"""The record of a network's run: its layers, which tensors hold their outputs, and what writing in place does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from tilepipe.geometry.network import Layer
from tilepipe.geometry.steps import Mixing, Same, Step
from tilepipe.tracing.axes import AXES, Dims, Field, plain, sizes

_SAME: Mapping[str, Step] = {}


class Recorder:
    """Collects layers while a network runs; one per run.

    Tensors are known by identity and kept alive until the run ends; on the meta device they hold no data.
    """

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.modules: list[str] = []
        """The modules that are running, outermost first."""
        self.operator = ""
        """The operator that is being recorded."""
        self._fields: dict[int, Field] = {}
        self._uniform: set[int] = set()
        self._kept: dict[int, torch.Tensor] = {}
        self._by_storage: dict[int, list[torch.Tensor]] = {}

    @property
    def layer_name(self) -> str:
        """The deepest module that is running, and its class."""
        return self.modules[-1] if self.modules else "network"

    # ---- tensors ----

    def field(self, tensor: Any) -> Field | None:
        """What is known of a tensor; None where it does not depend on the input, or is no tensor."""
        return self._fields.get(id(tensor))

    def uniform(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor that does not depend on the input is known to hold one value everywhere."""
        return id(tensor) in self._uniform

    def keep(self, tensor: torch.Tensor, uniform: bool = False) -> None:
        """Remembers a tensor, so that a later write to its storage is noticed."""
        if id(tensor) not in self._kept:
            self._kept[id(tensor)] = tensor
            self._by_storage.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        if uniform:
            self._uniform.add(id(tensor))

    def track(self, tensor: torch.Tensor, field: Field) -> None:
        """Remembers what a tensor holds."""
        self.keep(tensor)
        self._fields[id(tensor)] = field
        self._uniform.discard(id(tensor))

    def forget(self, tensor: torch.Tensor) -> None:
        """Notes that a tensor no longer depends on the input."""
        self._fields.pop(id(tensor), None)

    # ---- layers ----

    def add(
        self,
        inputs: Iterable[Field | int],
        steps: Mapping[str, Step],
        dims: Dims,
        expected: tuple[int, int] | None = None,
        detail: str = "",
    ) -> int:
        """The index of a new layer; `steps` may lack rows or columns, which then stay as they are."""
        nodes = dict.fromkeys(source.node if isinstance(source, Field) else source for source in inputs)
        rows, cols = (steps.get(axis, Same()) for axis in AXES)
        name, operator = self.layer_name, self.operator + detail
        self.layers.append(Layer(name, operator, tuple(nodes), rows, cols, sizes(dims), expected))
        return len(self.layers) - 1

    def join(self, inputs: Sequence[Field], dims: Dims, detail: str = "") -> Field:
        """What an element-wise combination of maps holds."""
        return Field(self.add(inputs, _SAME, dims, detail=detail), dims)

    def mix(self, inputs: Sequence[Field], reason: str, dims: Dims) -> Field:
        """What a layer without a bounded reach delivers; `reason` ends a sentence that begins with its name."""
        step = Mixing(reason)
        return Field(self.add(inputs, {"rows": step, "cols": step}, dims), dims)

    # ---- writing in place ----

    def write(self, target: torch.Tensor, value: Field | None) -> None:
        """Notes that `target` now holds `value` (None: a constant), as do tensors that share its memory."""
        before = self.field(target)
        siblings = [each for each in self._by_storage.get(target.untyped_storage()._cdata, []) if each is not target]
        for other in siblings:
            self._overlay(other, target, before, value)
        if value is None:
            self.forget(target)
            self.keep(target)
        else:
            self.track(target, value)

    def _overlay(self, other: torch.Tensor, target: torch.Tensor, before: Field | None, value: Field | None) -> None:
        """Updates a tensor that shares memory with the one just written."""
        known, written = self.field(other), value or before
        if written is None:
            self._uniform.discard(id(other))
            return
        whole = _covers(target, other)
        if value is None and whole:
            self.forget(other)
            self._uniform.add(id(other))
            return
        dims = known.dims if known else _aligned(other, target, written.dims)
        fits = sizes(dims) == sizes(written.dims) and (known is not None or _same_extent(other, target, dims))
        sources = [field for field in (known, value) if field is not None]
        if not fits:
            reason = "writes into a part of a map, by slice assignment or circular padding"
            self.track(other, self.mix(sources, reason, dims))
        elif whole and value is not None:
            self.track(other, Field(value.node, dims))
        elif value is not None:
            self.track(other, self.join(sources, dims, detail=" in place"))


def _covers(target: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether everything in `other` was overwritten when `target` was."""
    storage = target.untyped_storage().nbytes()
    same = target.numel() == other.numel() and target.storage_offset() == other.storage_offset()
    return bool(same) or target.numel() * target.element_size() == storage


def _aligned(other: torch.Tensor, target: torch.Tensor, dims: Dims) -> Dims:
    """The written tensor's dimensions carried over to a base of other sizes, matched from the last dimension."""
    result = []
    for index, size in enumerate(other.shape):
        position = index - other.dim() + target.dim()
        factors = dims[position] if 0 <= position < len(dims) else plain(size)
        alone = len(factors) == 1 and factors[0][0] != "x"
        result.append(((factors[0][0], size),) if alone else plain(size))
    return tuple(result)


def _same_extent(other: torch.Tensor, target: torch.Tensor, dims: Dims) -> bool:
    """Whether base and written part are alike in rows and columns."""
    offset = other.dim() - target.dim()
    return all(
        dim[0][0] == "x" or (index >= offset and other.shape[index] == target.shape[index - offset])
        for index, dim in enumerate(dims)
    )
