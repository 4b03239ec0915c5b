"""2x2 max-pooling and what undoes it, as modules: a device's own may take their places, in pairs.

Where a maximum was found is between a `Pool` and its `Unpool`: flat indices here, whatever else in a pair that
replaces them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tilepipe.models.layers import upsample
from tilepipe.window import Window


class Pool(nn.Module):
    """The maxima of a map's 2x2 squares, and where they were found: the first of equals in row-major order."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(maxima, where) of a map (N, C, rows, columns); an odd last row or column is dropped."""
        maxima, indices = F.max_pool2d(x, 2, 2, return_indices=True)
        return maxima, indices


class Unpool(nn.Module):
    """Undoes a `Pool` in one of UPSAMPLINGS, of which "unpool" alone reads where the maxima were found."""

    def __init__(self, how: str = "unpool") -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, indices: Tensor, size: tuple[int, ...]) -> Tensor:
        """The map (N, C, *size) from the pooled one; `size` is that of what was pooled."""
        return upsample(x, indices, size, self.how)

    def part(self, x: Tensor, indices: Tensor, size: tuple[int, ...], part: Window) -> Tensor:
        """What unpooling makes of `part` of the pooled map, which is `x`: (N, C, 2 rows, 2 columns)."""
        places, width = indices[..., *_slices(part)], size[1]
        rows, cols = places.div(width, rounding_mode="floor"), places % width
        height, own_width = 2 * part.shape[0], 2 * part.shape[1]
        local = (rows - 2 * part.rows.start) * own_width + (cols - 2 * part.cols.start)
        return F.max_unpool2d(x, local, (2, 2), (2, 2), output_size=(height, own_width))


def pools(stages: int) -> nn.ModuleList:
    """A pooling for each stage of an encoder."""
    return nn.ModuleList(Pool() for _ in range(stages))


def unpools(stages: int, how: str = "unpool") -> nn.ModuleList:
    """What undoes them, for each stage of a decoder."""
    return nn.ModuleList(Unpool(how) for _ in range(stages))


def _slices(window: Window) -> tuple[slice, slice]:
    return slice(window.rows.start, window.rows.stop), slice(window.cols.start, window.cols.stop)
