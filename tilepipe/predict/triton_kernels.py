"""Triton kernels for channels-last maps: pooling with switches of a byte, unpooling, bias and ReLU, a tile's input.

A map (N, C, H, W) lies in memory as (N, H, W, C). Each program works on a rectangle of pixels x channels; every
output is one thread's, so that results do not depend on the order of execution. Arithmetic is float32 (float64 for
float64 maps), rounded to the map's type after each step, as torch's own operators do: the results have their bits.

A switch says which pixel of its 2x2 square a maximum came from:

    0 1
    2 3
"""

# ruff: noqa: PLR0913, PLR0917, PLR0124 - kernels take every pointer and number by itself
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tilepipe.errors import RunError

CHANNELS = 128
"""The most channels of a program's rectangle."""
ELEMENTS = 2048
"""Elements of a program's rectangle: two loads of 16 bytes for each of 128 threads in bf16."""


@triton.jit
def _activated(loaded, bias, relu: tl.constexpr):
    # In the arithmetic's type, with the bits of the map's: ReLU keeps NaN.
    value = (loaded.to(bias.dtype) + bias).to(loaded.dtype).to(bias.dtype)
    if relu:
        value = tl.where(value < 0, 0.0, value)
    return value


@triton.jit
def _bias_of(bias, channel, inside, has_bias: tl.constexpr, kind: tl.constexpr):
    if has_bias:
        return tl.load(bias + channel, mask=inside, other=0.0).to(kind)
    return tl.zeros(channel.shape, kind)


@triton.jit(do_not_specialize=["pixels"])
def _bias_relu(x, bias, pixels, channels: tl.constexpr, kind: tl.constexpr, rows: tl.constexpr, cols: tl.constexpr):
    pixel = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    channel = tl.program_id(1) * cols + tl.arange(0, cols)[None, :]
    inside = (pixel < pixels) & (channel < channels)
    added = _bias_of(bias, channel, channel < channels, True, kind)
    at = x + pixel * channels + channel
    loaded = tl.load(at, mask=inside, other=0.0)
    tl.store(at, _activated(loaded, added, True).to(loaded.dtype), mask=inside)


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def _pool(
    x,
    bias,
    pooled,
    switches,
    pixels,
    height,
    width,
    channels: tl.constexpr,
    has_bias: tl.constexpr,
    relu: tl.constexpr,
    kind: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
):
    # pixels: of the pooled map; height, width: of x.
    pixel = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    channel = tl.program_id(1) * cols + tl.arange(0, cols)[None, :]
    inside = (pixel < pixels) & (channel < channels)
    line, column = pixel // (width // 2), pixel % (width // 2)
    image, row = line // (height // 2), line % (height // 2)
    corner = x + ((image * height + 2 * row) * width + 2 * column) * channels + channel
    below = corner + width.to(tl.int64) * channels
    added = _bias_of(bias, channel, channel < channels, has_bias, kind)
    first = tl.load(corner, mask=inside, other=0.0)
    best = _activated(first, added, relu)
    switch = tl.zeros(best.shape, tl.int32)
    for n in tl.static_range(1, 4):
        at = (below if n >= 2 else corner) + (n % 2) * channels
        value = _activated(tl.load(at, mask=inside, other=0.0), added, relu)
        better = (value > best) | (value != value)  # the last NaN wins, as in torch
        best = tl.where(better, value, best)
        switch = tl.where(better, n, switch)
    at = pixel * channels + channel
    tl.store(pooled + at, best.to(first.dtype), mask=inside)
    tl.store(switches + at, switch.to(tl.uint8), mask=inside)


@triton.jit(
    do_not_specialize=[
        "pixels", "height", "width", "x_image", "x_row", "x_column", "switch_image", "switch_row", "switch_column"
    ]
)  # fmt: skip
def _unpool(
    x,
    bias,
    switches,
    out,
    pixels,
    height,
    width,
    x_image,
    x_row,
    x_column,
    switch_image,
    switch_row,
    switch_column,
    channels: tl.constexpr,
    has_bias: tl.constexpr,
    relu: tl.constexpr,
    kind: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
):
    # pixels: squares of the output, whose height and width may be odd; steps in x and switches are in pixels.
    pixel = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    channel = tl.program_id(1) * cols + tl.arange(0, cols)[None, :]
    inside = (pixel < pixels) & (channel < channels)
    line, column = pixel // ((width + 1) // 2), pixel % ((width + 1) // 2)
    image, row = line // ((height + 1) // 2), line % ((height + 1) // 2)
    known = inside & (row < height // 2) & (column < width // 2)
    added = _bias_of(bias, channel, channel < channels, has_bias, kind)
    loaded = tl.load(
        x + (image * x_image + row * x_row + column * x_column) * channels + channel, mask=known, other=0.0
    )
    value = _activated(loaded, added, relu).to(loaded.dtype)
    at = (image * switch_image + row * switch_row + column * switch_column) * channels + channel
    switch = tl.load(switches + at, mask=known, other=255)
    for n in tl.static_range(4):
        y, x_to = 2 * row + n // 2, 2 * column + n % 2
        to = ((image * height + y) * width + x_to) * channels + channel
        tl.store(
            out + to, tl.where(switch == n, value, 0.0).to(loaded.dtype), mask=inside & (y < height) & (x_to < width)
        )


@triton.jit(do_not_specialize=["row", "col", "block_width", "plane", "width", "pixels"])
def _normalise(
    values,
    valid,
    mean,
    std,
    out,
    row,
    col,
    block_width,
    plane,
    width,
    pixels,
    bands: tl.constexpr,
    channels: tl.constexpr,
    has_valid: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
):
    # plane: pixels of a band of the block; width, pixels: of the tile; channels: of the output, 0 from `bands` on.
    pixel = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    channel = tl.arange(0, cols)[None, :]
    source = (row + pixel // width) * block_width + col + pixel % width
    known = (pixel < pixels) & (channel < bands)
    middle = tl.load(mean + channel, mask=channel < bands, other=0.0)
    spread = tl.load(std + channel, mask=channel < bands, other=1.0)
    value = tl.load(values + channel.to(tl.int64) * plane + source, mask=known, other=0).to(tl.float32)
    value = tl.div_rn(value - middle, tl.broadcast_to(spread, value.shape))
    if has_valid:
        known = known & (tl.load(valid + source, mask=pixel < pixels, other=0) != 0)
    value = tl.where(known, value, 0.0).to(out.dtype.element_ty)
    tl.store(out + pixel * channels + channel, value, mask=(pixel < pixels) & (channel < channels))


# --- their launches -------------------------------------------------------------------------------------------


def check(device: torch.device) -> None:
    """Nothing; raises RunError where Triton cannot build or run a kernel on a device."""
    try:
        tried = bias_relu_(torch.ones(1, 1, 1, 1, device=device), torch.ones(1, device=device))
        assert float(tried) == 2
    except Exception as error:  # a missing compiler, folder, driver: whatever the machine lacks
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(
            f"Triton cannot build kernels for {device}: {said}; install a C compiler, or uninstall triton to do without"
        ) from error


def bias_relu_(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """relu(x + bias) for a map (N, C, H, W), in its own memory where it is channels last."""
    x = x.contiguous(memory_format=torch.channels_last)
    pixels, channels = x.numel() // x.shape[1], x.shape[1]
    rows, cols = rectangle(channels)
    if pixels:
        _bias_relu[_grid(pixels, channels)](x, bias, pixels, channels, _kind(x), rows, cols, enable_fp_fusion=False)
    return x


def pool(x: torch.Tensor, bias: torch.Tensor | None, relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(maxima, switches) of the 2x2 squares of relu(x + bias): (N, C, H // 2, W // 2) in x's type and uint8."""
    x = x.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = x.shape
    shape = images, channels, height // 2, width // 2
    pooled, switches = _empty(shape, x), _empty(shape, x, torch.uint8)
    pixels, (rows, cols) = pooled.numel() // channels, rectangle(channels)
    if pixels:
        _pool[_grid(pixels, channels)](
            x, x if bias is None else bias, pooled, switches, pixels, height, width,
            channels, bias is not None, relu, _kind(x), rows, cols, enable_fp_fusion=False,
        )  # fmt: skip
    return pooled, switches


def unpool(
    x: torch.Tensor, bias: torch.Tensor | None, relu: bool, switches: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """The map (N, C, *size) that has relu(x + bias) where the switches say, and 0 elsewhere; both may be cut-outs."""
    (x, x_steps), (switches, switch_steps) = _in_pixels(x), _in_pixels(switches)
    images, channels = x.shape[:2]
    out = _empty((images, channels, *size), x)
    pixels, (rows, cols) = images * -(-size[0] // 2) * -(-size[1] // 2), rectangle(channels)
    if pixels:
        _unpool[_grid(pixels, channels)](
            x, x if bias is None else bias, switches, out, pixels, *size, *x_steps, *switch_steps,
            channels, bias is not None, relu, _kind(x), rows, cols, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def normalise(
    values: torch.Tensor,
    valid: torch.Tensor | None,
    origin: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Fills `out` (1, C, h, w), channels last, with (values - mean) / std in float32, and 0 where not valid.

    values: (bands, H, W), C-contiguous, as stored; valid: (H, W) bool; origin: (row, column) of out's first pixel in
    them; mean, std: float32, one per band. Channels from `bands` on become 0.
    """
    bands, height, width = values.shape
    channels, pixels = out.shape[1], out.shape[2] * out.shape[3]
    cols = triton.next_power_of_2(channels)
    rows = max(1, ELEMENTS // cols)
    _normalise[(triton.cdiv(pixels, rows),)](
        values, values if valid is None else valid.view(torch.uint8), mean, std, out,
        *origin, width, height * width, out.shape[3], pixels,
        bands, channels, valid is not None, rows, cols, enable_fp_fusion=False,
    )  # fmt: skip


def _empty(shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def rectangle(channels: int) -> tuple[int, int]:
    """(pixels, channels) of a program."""
    cols = min(triton.next_power_of_2(channels), CHANNELS)
    return ELEMENTS // cols, cols


def _grid(pixels: int, channels: int) -> tuple[int, int]:
    rows, cols = rectangle(channels)
    return triton.cdiv(pixels, rows), triton.cdiv(channels, cols)


def _kind(x: torch.Tensor) -> Any:
    """The type of the arithmetic for a map."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _in_pixels(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """A map whose channels lie together, and its steps to the next (image, row, column) in pixels."""
    channels = x.shape[1]
    image, channel, row, column = x.stride()
    if channel != 1 or image % channels or row % channels or column % channels:
        x = x.contiguous(memory_format=torch.channels_last)
        image, _, row, column = x.stride()
        if channels == 1:  # torch calls such a map contiguous whatever its steps
            image, row, column = x.shape[2] * x.shape[3], x.shape[3], 1
    return x, (image // channels, row // channels, column // channels)
