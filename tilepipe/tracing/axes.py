"""Which dimension of a tensor holds the rows and which the columns, through permutes, views and merges.

Each dimension is a tuple of factors, slowest first, whose sizes multiply to the dimension's size: ("rows", 32) or
("cols", 32) are the map's axes, ("x", 8) anything else. A flattened map's is (("rows", 32), ("cols", 32)).
Splitting rows into (rows, x) is a coarser map with the phases beside the channels (space to depth, windows of
attention); merging them again is a finer one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tilepipe.geometry.steps import Slide, Spread, Step

Factor = tuple[str, int]
Dim = tuple[Factor, ...]
Dims = tuple[Dim, ...]

AXES = ("rows", "cols")


class TangledError(Exception):
    """A view after which rows or columns are no longer an axis of their own; its text ends a sentence."""


@dataclass(frozen=True, slots=True)
class Field:
    """What is known of a tensor that depends on the network's input."""

    node: int
    """The layer that computed it."""
    dims: Dims
    pool: int | None = None
    """The layer that computed it, where it holds the positions that a max-pooling took."""

    def axis_of(self, dim: int) -> str | None:
        """ "rows" or "cols" where the dimension is that axis and nothing else."""
        factors = self.dims[dim]
        return factors[0][0] if len(factors) == 1 and factors[0][0] != "x" else None

    def spatial(self, dim: int) -> bool:
        """Whether rows or columns are in the dimension."""
        return any(kind != "x" for kind, _ in self.dims[dim])


def plain(size: int) -> Dim:
    """A dimension that is neither rows nor columns."""
    return (("x", size),)


def sizes(dims: Dims) -> tuple[int, int]:
    """(rows, columns) of a tensor; 1 for an axis that it lacks."""
    found = {kind: size for dim in dims for kind, size in dim}
    return found.get("rows", 1), found.get("cols", 1)


def resized(dims: Dims, new: Mapping[str, int]) -> Dims:
    """The dimensions with rows and columns of new sizes."""
    return tuple(tuple((kind, new.get(kind, size)) for kind, size in dim) for dim in dims)


def reshape(dims: Dims, shape: Sequence[int]) -> tuple[Dims, list[Mapping[str, Step]]]:
    """(dimensions after a view to `shape`, the steps it takes along rows and columns, in order).

    >>> reshape(((("x", 4),), (("rows", 6),)), (4, 3, 2))[0]
    ((('x', 4),), (('rows', 3),), (('x', 2),))
    """
    pending = _flat(dims)
    splits: dict[str, int] = {}
    result = [_take(pending, size, splits) for size in shape]
    if pending and result:
        result[-1] = (*result[-1], *pending)
    merges: dict[str, int] = {}
    merged = tuple(_absorb(dim, merges) for dim in result)
    steps: list[Mapping[str, Step]] = []
    if splits:
        steps.append({kind: Slide(stride=factor, extent=factor) for kind, factor in splits.items()})
    if any(factor > 1 for factor in merges.values()):
        steps.append({kind: Spread(factor, 0, factor) for kind, factor in merges.items() if factor > 1})
    return merged, steps


def _flat(dims: Dims) -> list[Factor]:
    """All factors, slowest first, with neighbouring plain ones multiplied and those of size 1 left out."""
    flat: list[Factor] = []
    for kind, size in (factor for dim in dims for factor in dim):
        if kind == "x" and size == 1:
            continue
        if kind == "x" and flat and flat[-1][0] == "x":
            flat[-1] = ("x", flat[-1][1] * size)
        else:
            flat.append((kind, size))
    return flat


def _take(pending: list[Factor], size: int, splits: dict[str, int]) -> Dim:
    """The factors of a dimension of `size`, removed from the front of `pending`."""
    taken: list[Factor] = []
    need = size
    while need > 1:
        if not pending:
            raise TangledError("reshapes its input beyond recognition")
        kind, have = pending.pop(0)
        if need % have == 0:
            taken.append((kind, have))
            need //= have
        elif have % need == 0:
            taken.append((kind, need))
            pending.insert(0, ("x", have // need))
            if kind != "x":
                splits[kind] = splits.get(kind, 1) * (have // need)
            need = 1
        else:
            raise TangledError("flattens the map and cuts it elsewhere than at its rows and columns")
    if size == 1 and pending and pending[0][0] != "x" and pending[0][1] == 1:
        taken.append(pending.pop(0))
    return tuple(taken) or plain(1)


def _absorb(dim: Dim, merges: dict[str, int]) -> Dim:
    """A dimension in which plain factors behind rows or columns make these finer; notes by how much."""
    result: list[Factor] = []
    for kind, size in dim:
        if kind == "x" and result and result[-1][0] != "x":
            axis, had = result[-1]
            merges[axis] = merges.get(axis, 1) * size
            result[-1] = (axis, had * size)
        elif kind == "x" and size == 1 and len(dim) > 1:
            continue
        else:
            result.append((kind, size))
    return tuple(result)
