"""Dense classifiers: a strided classifier slid over an image at stride 1, so that every window has its scores.

A classifier such as LeNet sees a window of 28 x 28 pixels and gives one output per 4 pixels of a larger image. Two
ways to have one per pixel, both equal to running it on every window:

    dilated            one pass ("a trous"): strides become 1, and every layer behind a stride of s reads every
                       s-th place (Holschneider et al., 1989; Yu and Koltun, arXiv 1511.07122)
    shift_and_stitch   the network at each of its s x s offsets, results interleaved (Long, Shelhamer and Darrell,
                       arXiv 1411.4038, section 3.2). Layers before the first stride are computed once; behind each
                       strided layer its offsets become images of a batch (the fragments of Giusti et al.,
                       arXiv 1302.1700)

Output (y, x) is the classifier's for the window that begins at input pixel (y, x), so an n pixels wide image gives
n - window + 1 outputs, of one input pixel each. Its centre lies (window - 1) / 2 pixels behind the window's first
pixel: pixel 13.5 for LeNet. On the raster's own grid an even window is half a pixel off at best, and `geometry_of`
puts the surplus pixel behind: trim (13, 14), so that the label of pixel y is that of the window y - 13 to y + 14.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from tilepipe.errors import GeometryError
from tilepipe.variants.chain import Link, Pair, chain_of, window_and_step

torch.fx.wrap("check_window")


def dilated(network: nn.Module) -> Dilated:
    """The network slid at stride 1 by dilation, in one pass: (N, C, H, W) to (N, classes, H', W').

    H' = H - window + 1. A copy, in evaluation mode; `network` stays as it is. Raises ModelError, naming the layer, for
    a network that is no chain of unpadded convolutions, pooling and element-wise layers.
    """
    links, layers, spread = chain_of(network), [], (1, 1)
    for link in links:
        dilation = (link.dilation[0] * spread[0], link.dilation[1] * spread[1])
        layers.append((link.name, unstrided(link, dilation)))
        spread = (spread[0] * link.stride[0], spread[1] * link.stride[1])
    return Dilated(layers, window_and_step(links)[0])


def shift_and_stitch(network: nn.Module) -> Stitched:
    """The network at each of its s x s offsets, interleaved: (N, C, H, W) to (N, classes, H', W').

    H' = H - window + 1. A copy, in evaluation mode; `network` stays as it is. Raises ModelError, naming the layer, for
    a network that is no chain of unpadded convolutions, pooling and element-wise layers.
    """
    links = chain_of(network)
    strides: list[Pair] = []
    layers: list[tuple[str, nn.Module]] = []
    due: Pair = (1, 1)
    for link in [*links, None]:
        # Element-wise layers stay with the layer before them, where batch normalisation can be folded.
        if due != (1, 1) and (link is None or link.slides):
            layers.append((f"offsets{len(strides)}", Offsets(due)))
            strides.append(due)
            due = (1, 1)
        if link is not None:
            layers.append((link.name, unstrided(link, link.dilation)))
            due = link.stride if link.slides else due
    return Stitched(layers, window_and_step(links)[0], strides)


def unstrided(link: Link, dilation: Pair) -> nn.Module:
    """A copy of a layer with stride 1 and this dilation (rows, columns)."""
    module = copy.deepcopy(link.module)
    if isinstance(module, nn.Conv2d):
        module.stride, module.dilation, module.padding, module.padding_mode = (1, 1), dilation, (0, 0), "zeros"
    elif isinstance(module, nn.MaxPool2d):
        return nn.MaxPool2d(link.kernel, 1, 0, dilation).eval()
    elif isinstance(module, nn.AvgPool2d):
        return DilatedAvgPool2d(link.kernel, dilation, module.divisor_override).eval()
    return module


class Dilated(nn.Module):
    """A classifier slid at stride 1 by dilation; `dilated` makes it."""

    def __init__(self, layers: Iterable[tuple[str, nn.Module]], window: Pair) -> None:
        super().__init__()
        self.window = window
        """(rows, columns) that one output reads."""
        self.layers = _sequence(layers)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """The scores of every window."""
        check_window(x.shape, self.window)
        return self.layers(x)


class Stitched(nn.Module):
    """A classifier slid at stride 1 by shift-and-stitch; `shift_and_stitch` makes it."""

    def __init__(self, layers: Iterable[tuple[str, nn.Module]], window: Pair, strides: Sequence[Pair]) -> None:
        super().__init__()
        self.window = window
        """(rows, columns) that one output reads."""
        self.strides = tuple(strides)
        """(rows, columns) of each strided layer, in order."""
        self.step = (1, 1)
        for rows, cols in self.strides:
            self.step = (self.step[0] * rows, self.step[1] * cols)
        self.layers = _sequence(layers)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """The scores of every window."""
        check_window(x.shape, self.window)
        rows, cols = x.shape[2] - self.window[0] + 1, x.shape[3] - self.window[1] + 1
        # All offsets have equally many outputs where these are multiples of the step; what is added is cut off again.
        x = self.layers(F.pad(x, (0, -cols % self.step[1], 0, -rows % self.step[0])))
        return self._stitch(x)[:, :, :rows, :cols]

    def _stitch(self, x: Tensor) -> Tensor:
        """The offsets' maps (N x offsets, C, h, w) interleaved: (N, C, h x step, w x step)."""
        count = len(self.strides)
        x = torch.unflatten(x, 0, (-1, *(offset for stride in self.strides for offset in stride)))
        # (N, row offset 1, column offset 1, row offset 2, ..., C, h, w); the last stride's offsets are the coarsest.
        channels, rows, cols = 2 * count + 1, 2 * count + 2, 2 * count + 3
        x = x.permute(0, channels, rows, *range(2 * count - 1, 0, -2), cols, *range(2 * count, 0, -2))
        return x.flatten(3 + count).flatten(2, 2 + count)


class Offsets(nn.Module):
    """A map of stride 1 as those of a larger stride at each of its offsets: (N, C, H, W) to (N x s x s, C, H/s, W/s).

    Offset (i, j) of image n, places (i + s k, j + s l), is image (n x s + i) x s + j of the batch.
    """

    def __init__(self, stride: Pair) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """The offsets' maps; sides have to be multiples of the stride."""
        x = torch.unflatten(torch.unflatten(x, 3, (-1, self.stride[1])), 2, (-1, self.stride[0]))
        return x.permute(0, 3, 5, 1, 2, 4).flatten(0, 2)

    def extra_repr(self) -> str:
        """The stride."""
        return f"stride={self.stride}"


class DilatedAvgPool2d(nn.Module):
    """Average pooling of stride 1 whose kernel reads every d-th place, which torch's own does not offer."""

    def __init__(self, kernel: Pair, dilation: Pair, divisor: int | None = None) -> None:
        super().__init__()
        self.kernel, self.dilation, self.divisor = kernel, dilation, divisor or kernel[0] * kernel[1]

    def forward(self, x: Tensor) -> Tensor:
        """The averages: a convolution of every channel with ones."""
        channels = x.shape[1]
        ones = x.new_ones((channels, 1, *self.kernel))
        return F.conv2d(x, ones, dilation=self.dilation, groups=channels) / self.divisor

    def extra_repr(self) -> str:
        """Kernel, dilation and divisor."""
        return f"kernel={self.kernel}, dilation={self.dilation}, divisor={self.divisor}"


def check_window(shape: Sequence[int], window: Pair) -> None:
    """Nothing; raises GeometryError where an image (N, C, H, W) is smaller than the window (rows, columns)."""
    if shape[-2] < window[0] or shape[-1] < window[1]:
        raise GeometryError(
            f"an image of {shape[-2]} x {shape[-1]} pixels holds no window; "
            f"the classifier needs at least {window[0]} x {window[1]}"
        )


def _sequence(layers: Iterable[tuple[str, nn.Module]]) -> nn.Sequential:
    """The layers under their own names as far as module names may be: "features.3 (Conv2d)" is "1_features_3"."""
    named = ((f"{index}_{name.split(' ')[0].replace('.', '_')}", module) for index, (name, module) in enumerate(layers))
    return nn.Sequential(OrderedDict(named))
