"""A decoder that computes a part of its output alone: activations are cropped to what the part still needs.

A tile's halo is there for the deepest layers. Towards the output less and less of it matters, so that each stage of
the decoder can leave off what no wanted output looks at: the interval arithmetic of the network's geometry, backward
through the decoder, a stage at a time. At the borders of a tile nothing is left off, and the layers pad there as they
always do; where a map was cropped they pad too, but what that spoils is left off by the next stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from tilepipe.window import Interval, Window


@runtime_checkable
class Partial(Protocol):
    """A network that can compute a part of its output."""

    def forward_part(self, x: Tensor, part: Window) -> Tensor:
        """What `forward` gives in `part` of its output, in pixels: (N, channels, *part.shape)."""


def reach_of(stage: nn.Module) -> int:
    """How many pixels away the convolutions of a stage look, which have stride 1 and keep the size."""
    return sum(int(layer.kernel_size[0]) // 2 for layer in stage.modules() if isinstance(layer, nn.Conv2d))


def grown(part: Window, reach: int, shape: Sequence[int]) -> Window:
    """The window that an output's part looks at through so much reach, within a map of `shape` (rows, columns)."""
    return Window(part.rows.grow(reach, reach), part.cols.grow(reach, reach)).clip((shape[0], shape[1]))


def pooled(part: Window) -> Window:
    """The 2x2-pooled pixels whose unpooling covers `part`."""
    return Window(*(Interval(side.start // 2, -(-side.stop // 2)) for side in (part.rows, part.cols)))


def cropped(x: Tensor, have: Window, want: Window) -> Tensor:
    """`want` of a map (N, C, rows, columns) of which `x` holds `have`."""
    rows, cols = want.within(have)
    return x[..., rows, cols]


def doubled(part: Window) -> Window:
    """The pixels that the unpooling of `part` covers."""
    return Window(*(Interval(2 * side.start, 2 * side.stop) for side in (part.rows, part.cols)))


class Unpooling(NamedTuple):
    """What a decoder stage needs to undo a 2x2 pooling."""

    indices: Tensor
    """Where each pooled value was found, as the stage's `Unpool` reads it."""
    size: tuple[int, ...]
    """(rows, columns) of what was pooled."""
    added: Tensor | None = None
    """A map of that size that joins the stage's output."""


def decoded_part(
    x: Tensor,
    unpoolings: Sequence[Unpooling],
    stages: Sequence[tuple[Any, nn.Module]],
    classifier: nn.Module,
    part: Window,
) -> Tensor:
    """`part` of what the decoder makes of the innermost map `x`: (N, channels, *part.shape).

    unpoolings, stages: from the innermost to the outermost. A stage is an `Unpool` and convolutions; adding follows.
    """
    need = grown(part, reach_of(classifier), unpoolings[-1].size)
    lows: list[Window] = []
    for (_, stage), unpooling in zip(reversed(stages), reversed(unpoolings), strict=True):
        need = pooled(grown(need, reach_of(stage), unpooling.size))
        lows.insert(0, need)
    have = whole(x)
    for (unpool, stage), (indices, size, added), low in zip(stages, unpoolings, lows, strict=True):
        x = stage(unpool.part(cropped(x, have, low), indices, size, low))
        have = doubled(low)
        x = x if added is None else x + cropped(added, whole(added), have)
    # What is left of `have` around the part's reach is less than copying the map without it would cost.
    return cropped(classifier(x), have, part)


def whole(x: Tensor) -> Window:
    """All of a map (N, C, rows, columns)."""
    return Window.whole((x.shape[-2], x.shape[-1]))
