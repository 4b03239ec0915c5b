"""CPU kernels for a network's own output, as numbers: copied from tiles with halos, averaged over overlapping tiles.

Scores, patches and undefined pixels are those of `tilepipe.predict.scores`, save that here a pixel is undefined as
soon as one of its numbers is not finite.
"""

from __future__ import annotations

from numba import njit

from tilepipe.predict.blend import Strip
from tilepipe.predict.scores import Array, Patch


@njit(nogil=True, cache=True)
def _channel(scores: Array, last: bool, c: int, row: int, cols: tuple[int, int]) -> Array:
    return scores[row, cols[0] : cols[1], c] if last else scores[c, row, cols[0] : cols[1]]


@njit(nogil=True, cache=True)
def _undefined(scores: Array, last: bool, row: int, cols: tuple[int, int], valid: Array | None) -> int:
    """How many valid pixels of a tile's row, columns cols[0] to cols[1], have a number that is not finite."""
    width = cols[1] - cols[0]
    count = 0
    for x in range(width):
        pixel = scores[row, cols[0] + x] if last else scores[:, row, cols[0] + x]
        broken = False
        for c in range(pixel.size):
            broken |= pixel[c] - pixel[c] != 0
        count += broken and (valid is None or valid[x])
    return count


@njit(nogil=True, cache=True)
def copy_values(scores: Array, last: bool, patch: Patch, valid: Array | None, values: Array) -> int:
    """Write a patch's numbers into `values` (channels, rows, columns) of the block; the undefined pixels' number."""
    undefined = 0
    for y in range(patch.height):
        top, row = patch.to_row + y, patch.row + y
        cols = (patch.col, patch.col + patch.width)
        doubt = False
        for c in range(values.shape[0]):
            line = _channel(scores, last, c, row, cols)
            out = values[c, top, patch.to_col : patch.to_col + patch.width]
            total = line[0] - line[0]
            for x in range(patch.width):
                out[x] = line[x]
                total += line[x] - line[x]
            doubt |= total != 0
        if doubt:
            seen = None if valid is None else valid[top, patch.to_col : patch.to_col + patch.width]
            undefined += _undefined(scores, last, row, cols, seen)
    return undefined


@njit(nogil=True, cache=True)
def accumulate_values(
    scores: Array, last: bool, patch: Patch, valid: Array | None, weights: Array, strip: Strip
) -> int:
    """Add a patch's numbers, times `weights`, to the strip; the number of undefined pixels.

    weights: float32 of the tile's output, (h, w); patch.to_row, valid: in rows of the strip. Pixels are summed one
    tile after the other: call it for the tiles in row-major order.
    """
    undefined = 0
    for y in range(patch.height):
        top, row = patch.to_row + y, patch.row + y
        cols = (patch.col, patch.col + patch.width)
        goal = slice(patch.to_col, patch.to_col + patch.width)
        weight = weights[row, cols[0] : cols[1]]
        seen, total = strip.seen[top, goal], strip.weights[top, goal]
        undefined += _undefined(scores, last, row, cols, None if valid is None else valid[top, goal])
        for x in range(patch.width):
            total[x] += weight[x]
            seen[x] = 1 if seen[x] == 0 else 2
        for c in range(strip.sums.shape[1]):
            line, out = _channel(scores, last, c, row, cols), strip.sums[top, c, goal]
            for x in range(patch.width):
                out[x] += weight[x] * line[x]
    return undefined


@njit(nogil=True, cache=True)
def finish_values(strip: Strip, rows: tuple[int, int], valid: Array | None, values: Array) -> tuple[int, int, int]:
    """Turn the strip's first rows into rows[0]..rows[1]-1 of the block's values: the weighted means.

    Returns how many valid pixels several tiles saw, 0 (numbers have no labels that could disagree), and how many no
    tile saw. valid: (rows, columns) of the block.
    """
    channels, width = values.shape[0], strip.seen.shape[1]
    overlapped = missed = 0
    for y in range(rows[1] - rows[0]):
        top = rows[0] + y
        weights, seen = strip.weights[y], strip.seen[y]
        for x in range(width):
            if valid is None or valid[top, x]:
                overlapped += seen[x] == 2
                missed += seen[x] == 0
        for c in range(channels):
            for x in range(width):
                values[c, top, x] = strip.sums[y, c, x] / weights[x] if weights[x] > 0 else 0
    return overlapped, 0, missed
