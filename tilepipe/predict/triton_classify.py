"""A network's last convolution, the best class and its probability in one Triton kernel: scores are never stored.

    scores[p, k] = bias[k] + sum over taps t and channels c of features[p + t, c] * weights[t, c, k]

is a product of matrices for a rectangle of pixels p at a time, for which the taps' features are gathered from the
channels-last map: an implicit GEMM. Products are of the map's type, sums are float32 and are not rounded before the
best class is taken, so that labels may differ from those of rounded scores where two classes are nearly equal.
"""

# ruff: noqa: PLR0913, PLR0917, PLR0124 - kernels take every pointer and number by itself
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

ROWS, COLS = 8, 16
"""Pixels of a program: nearly square, since neighbours read the same features."""
CHANNELS = 64
"""The most channels that are multiplied at once."""


class Classifier(NamedTuple):
    """A convolution's weights as the kernel reads them."""

    weights: torch.Tensor
    """(kernel x kernel, channels, classes), the classes filled up with 0 to a power of 2."""
    bias: torch.Tensor
    """Of these classes, float32; -inf for those that are none."""
    side: int
    """Rows and columns of the kernel."""

    @classmethod
    def of(cls, conv: torch.nn.Conv2d) -> Classifier:
        """That of a convolution of stride 1 that keeps the size."""
        classes, channels, side, _ = conv.weight.shape
        wide = max(16, triton.next_power_of_2(classes))
        weights = conv.weight.new_zeros((side * side, channels, wide))
        weights[..., :classes] = conv.weight.permute(2, 3, 1, 0).reshape(side * side, channels, classes)
        bias = torch.full((wide,), -torch.inf, device=weights.device)
        bias[:classes] = 0 if conv.bias is None else conv.bias.float()
        return cls(weights, bias, side)


class Target(NamedTuple):
    """Where a crop's labels go."""

    labels: torch.Tensor
    """The block's (rows, columns), uint8 or uint16."""
    confidence: torch.Tensor
    """Likewise, uint8: round(probability * 254); empty where it is not wanted."""
    keep: torch.Tensor
    """Likewise, bool: outputs that get a label; empty for all."""
    undefined: torch.Tensor
    """int32 (1,): counts kept pixels without a best class."""


@triton.jit(
    do_not_specialize=[
        "height", "width", "x_row", "x_column", "first_row", "first_col", "rows", "cols", "to_row", "to_col", "stride"
    ]
)  # fmt: skip
def _classify(
    x,
    weights,
    bias,
    labels,
    confidence,
    keep,
    undefined,
    height,
    width,
    x_row,
    x_column,
    first_row,
    first_col,
    rows,
    cols,
    to_row,
    to_col,
    stride,
    channels: tl.constexpr,
    chunk: tl.constexpr,
    classes: tl.constexpr,
    side: tl.constexpr,
    has_confidence: tl.constexpr,
    has_keep: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_cols: tl.constexpr,
):
    # height, width: of x, beyond which there is 0; x_row, x_column: its steps in pixels; stride: of the block's rows.
    pixel = tl.arange(0, tile_rows * tile_cols)
    row = tl.program_id(1) * tile_rows + pixel // tile_cols
    col = tl.program_id(0) * tile_cols + pixel % tile_cols
    inside = (row < rows) & (col < cols)
    part = tl.arange(0, chunk)
    label_of = tl.arange(0, classes)
    scores = tl.zeros((tile_rows * tile_cols, classes), tl.float32)
    for tap in tl.static_range(side * side):
        y = first_row + row + tap // side - side // 2
        across = first_col + col + tap % side - side // 2
        known = inside & (y >= 0) & (y < height) & (across >= 0) & (across < width)
        at = x + (y.to(tl.int64) * x_row + across * x_column) * channels
        for start in tl.static_range(0, channels, chunk):
            channel = start + part
            mask = known[:, None] & (channel < channels)[None, :]
            features = tl.load(at[:, None] + channel[None, :], mask=mask, other=0.0)
            factors = tl.load(
                weights + (tap * channels + channel)[:, None] * classes + label_of[None, :],
                mask=(channel < channels)[:, None],
                other=0.0,
            )
            scores = tl.dot(features, factors, scores, input_precision="ieee")
    scores += tl.load(bias + label_of)[None, :]
    undefined_scores = scores != scores
    scores = tl.where(undefined_scores, float("-inf"), scores)
    best = tl.max(scores, 1)
    label = tl.argmax(scores, 1, tie_break_left=True)
    broken = (tl.sum(undefined_scores.to(tl.int32), 1) > 0) | (tl.abs(best) == float("inf"))
    to = (to_row + row).to(tl.int64) * stride + to_col + col
    tl.store(labels + to, label.to(labels.dtype.element_ty), mask=inside)
    counted = inside & broken
    if has_keep:
        counted = counted & (tl.load(keep + to, mask=inside, other=0) != 0)
    count = tl.sum(counted.to(tl.int32), 0)
    tl.atomic_add(undefined, count, mask=count > 0)
    if has_confidence:
        share = 1.0 / tl.sum(tl.exp(scores - best[:, None]), 1)
        share = tl.where(broken, 0.0, share)
        tl.store(confidence + to, (share * 254.0 + 0.5).to(tl.uint8), mask=inside)


def classify(
    features: torch.Tensor, classifier: Classifier, crop: tuple[int, int, int, int], to: tuple[int, int], target: Target
) -> None:
    """Writes the labels of a crop of a tile into a block's maps.

    features: (1, channels, H, W), channels last or a cut-out of such a map; beyond it there is 0, as the convolution
    pads. crop: (row, column, rows, columns) in it; to: its (row, column) in the block.
    """
    channels, height, width = features.shape[1:]
    _, channel, x_row, x_column = features.stride()
    if channel != 1 or x_row % channels or x_column % channels:
        features = features.contiguous(memory_format=torch.channels_last)
        x_row, x_column = width * channels, channels
    labels, confidence, keep, undefined = target
    first_row, first_col, rows, cols = crop
    chunk = max(16, min(CHANNELS, triton.next_power_of_2(channels)))
    grid = triton.cdiv(cols, COLS), triton.cdiv(rows, ROWS)
    _classify[grid](
        features, classifier.weights, classifier.bias, labels,
        confidence if confidence.numel() else labels, keep.view(torch.uint8) if keep.numel() else labels, undefined,
        height, width, x_row // channels, x_column // channels, first_row, first_col, rows, cols, *to,
        labels.stride(0), channels, chunk, len(classifier.bias), classifier.side,
        confidence.numel() > 0, keep.numel() > 0, ROWS, COLS,
    )  # fmt: skip
