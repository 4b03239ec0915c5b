"""Small networks that can be tiled exactly and exercise every rule of the geometry, for several tests.

Each class says in one line what is particular about it. Weights are random; call `seeded` to fix them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network whose weights follow from the seed, in evaluation mode, with batch statistics off their defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make().eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return network


def autoencoder(width: int = 3, depth: int = 4) -> nn.Module:
    """The published denoiser: unpadded 5x5 convolutions of stride 2, mirrored; 61 + 16n."""
    down = [nn.Conv2d(1 if i == 0 else width, width, 5, 2) for i in range(depth)]
    up = [nn.ConvTranspose2d(width, 1 if i == depth - 1 else width, 5, 2) for i in range(depth)]
    layers: list[nn.Module] = []
    for layer in (*down, *up):
        layers += [layer, nn.Sigmoid()]
    return nn.Sequential(*layers)


class SegNetShape(nn.Module):
    """VGG16's thirteen convolutions, pooling positions, and a mirrored decoder, at a fraction of the width; 32n."""

    def __init__(self, width: int = 4, classes: int = 3, ceil_mode: bool = False) -> None:
        super().__init__()
        channels = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        counts = [2, 2, 3, 3, 3]
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        inside = 3
        for outside, count in zip(channels, counts, strict=True):
            self.encoder.append(_block(inside, outside, count))
            inside = outside
        for index in reversed(range(5)):
            outside = channels[index - 1] if index else width
            self.decoder.append(_block(channels[index], outside, counts[index] - (index == 0)))
        self.pool = nn.MaxPool2d(2, return_indices=True, ceil_mode=ceil_mode)
        self.unpool = nn.MaxUnpool2d(2)
        self.classifier = nn.Conv2d(width, classes, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = []
        for stage in self.encoder:
            x = stage(x)
            size = x.shape[2:]
            x, positions = self.pool(x)
            pooled.append((positions, size))
        for stage in self.decoder:
            positions, size = pooled.pop()
            x = stage(self.unpool(x, positions, output_size=size))
        return self.classifier(x)


def _block(inside: int, outside: int, count: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]
        inside = outside
    return nn.Sequential(*layers)


class SegNetBasicShape(nn.Module):
    """Four stages of one 7x7 convolution and pooling with positions, mirrored without non-linearities; 16n."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(width if i else 3, width, 7, padding=3) for i in range(4))
        self.up = nn.ModuleList(nn.Conv2d(width, width, 7, padding=3) for _ in range(4))
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = []
        for layer in self.down:
            x, indices = F.max_pool2d(F.relu(layer(x)), 2, 2, return_indices=True)
            positions.append(indices)
        for layer in self.up:
            x = layer(F.max_unpool2d(x, positions.pop(), 2))
        return self.classifier(x)


def lenet(width: int = 4) -> nn.Module:
    """A sliding digit classifier: one output for each 4 pixels of 28 + 4n."""
    return nn.Sequential(
        nn.Conv2d(1, width, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(width, width, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 4),
        nn.ReLU(),
        nn.Conv2d(2 * width, 10, 1),
    )


class SkipNet(nn.Module):
    """A padded U-Net of two levels: concatenated skips, transposed convolutions; 4n."""

    def __init__(self, width: int = 4, kernel: tuple[int, int] = (3, 3)) -> None:
        super().__init__()
        pad = (kernel[0] // 2, kernel[1] // 2)
        self.a = nn.Conv2d(2, width, kernel, padding=pad)
        self.b = nn.Conv2d(width, width, kernel, padding=pad)
        self.c = nn.Conv2d(width, width, kernel, padding=pad)
        self.up_b = nn.ConvTranspose2d(width, width, 2, 2)
        self.up_a = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.head = nn.Conv2d(2 * width, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(F.max_pool2d(a, 2)))
        c = F.relu(self.c(F.max_pool2d(b, 2)))
        b = torch.cat([b, self.up_b(c)], 1)
        return self.head(torch.cat([a, self.up_a(b)], 1))


class ValidUNet(nn.Module):
    """A U-Net without padding: skips are cropped at the centre, and the output is smaller than the input."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(width, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU())
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.head = nn.Sequential(nn.Conv2d(2 * width, width, 3), nn.ReLU(), nn.Conv2d(width, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        up = self.up(self.b(F.max_pool2d(a, 2)))
        top, left = (a.shape[2] - up.shape[2]) // 2, (a.shape[3] - up.shape[3]) // 2
        return self.head(torch.cat([a[:, :, top : top + up.shape[2], left : left + up.shape[3]], up], 1))


class Oblong(nn.Module):
    """Kernels and strides that differ between rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 4, (3, 7), stride=(2, 3), padding=(1, 2))
        self.up = nn.ConvTranspose2d(4, 3, (2, 3), stride=(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(F.relu(self.down(x)))


class InPlace(nn.Module):
    """Functional and in-place operators, a view written through, and channels assigned into a prepared tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y.view(y.shape[0], 2, 2, *y.shape[2:])[:, 0].relu_()
        z = torch.zeros_like(y)
        z[:, :2] = self.b(y)[:, 1:3]
        z += y
        return z.mul_(2).add_(x[:, :1])


class Gaps(nn.Module):
    """Strides larger than kernels, so that some inputs are never read."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 2, 2, stride=3)
        self.b = nn.ConvTranspose2d(2, 2, 2, stride=3, output_padding=1)
        self.c = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


class CeilMode(nn.Module):
    """Pooling whose last window may hang over the end; unpooling to the size it came from: any size."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 3, 3, padding=1)
        self.b = nn.Conv2d(3, 3, 3, padding=1)
        self.c = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        pooled, positions = F.max_pool2d(a, 2, ceil_mode=True, return_indices=True)
        return self.c(F.max_unpool2d(self.b(pooled), positions, 2, output_size=list(a.shape[2:])))


class SelfPadding(nn.Module):
    """Pads any input to a multiple of 4 and crops the result back: any size."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 3, 4, stride=4)
        self.up = nn.ConvTranspose2d(3, 2, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, cols = x.shape[2:]
        y = self.up(torch.tanh(self.down(F.pad(x, (0, -cols % 4, 0, -rows % 4)))))
        return y[:, :, :rows, :cols]


class Parallel(nn.Module):
    """Branches of strides 4 and 6: tiles may begin only at multiples of 12."""

    def __init__(self) -> None:
        super().__init__()
        self.four = nn.Sequential(nn.Conv2d(1, 2, 4, stride=4), nn.ReLU(), nn.ConvTranspose2d(2, 2, 4, stride=4))
        self.six = nn.Sequential(nn.Conv2d(1, 2, 6, stride=6), nn.ReLU(), nn.ConvTranspose2d(2, 2, 6, stride=6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.four(x) + self.six(x)


class Shuffle(nn.Module):
    """Space to depth and back, once by the operator and once by views and permutes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(2, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, rows, cols = x.shape
        y = x.view(n, c, rows // 2, 2, cols // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, rows // 2, cols // 2)
        return F.pixel_shuffle(self.a(y), 2) + F.pixel_shuffle(F.pixel_unshuffle(self.b(x)[:, :2], 2), 2)


class Reflecting(nn.Module):
    """Reflection and replication instead of zeros around the map."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 3, 5, padding=2, padding_mode="reflect")
        self.b = nn.Conv2d(3, 2, (3, 5), padding=(1, 2), padding_mode="replicate")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(F.pad(x, (3, 0, 3, 0), mode="reflect")[:, :, 3:, 3:])))


class Resizing(nn.Module):
    """Down by strides, up by interpolation to the size of the skip."""

    def __init__(self, mode: str = "bilinear", factor: int = 4, aligned: bool | None = None) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 3, 2 * factor - 1, stride=factor, padding=factor - 1)
        self.mode, self.aligned = mode, aligned
        self.head = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = F.interpolate(self.down(x), size=x.shape[2:], mode=self.mode, align_corners=self.aligned)
        return self.head(torch.cat([x, up], 1))


class LastDims(nn.Module):
    """Channels last inside, as ConvNeXt: layer normalisation and linear layers over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.depth = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.wide, self.narrow = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Conv2d(8, 32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        x = x + self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        return F.pixel_shuffle(self.head(x), 4)


class WindowAttention(nn.Module):
    """Attention within windows of 4x4 pixels: bounded, though it compares all places of a window."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(3, 6), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, rows, cols = x.shape
        w = x.view(n, c, rows // 4, 4, cols // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        q = self.query(w)
        w = F.softmax(q @ q.transpose(1, 2), -1) @ self.value(w)
        w = w.view(n, rows // 4, cols // 4, 4, 4, 4).permute(0, 5, 1, 3, 2, 4)
        return w.reshape(n, 4, rows, cols)


class TwoOutputs(nn.Module):
    """A dictionary with "out" and an auxiliary map of another size, as torchvision's networks return."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 2, 8, stride=8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"aux": self.side(x), "out": self.main(x)}


def dilated(width: int = 3) -> nn.Module:
    """A chain of dilated convolutions: any size."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=4, dilation=4), nn.ReLU(),
        nn.Conv2d(width, 2, (5, 3), padding=(4, 2), dilation=2),
    )  # fmt: skip


EXACT: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "autoencoder": (autoencoder, 1),
    "segnet-basic": (SegNetBasicShape, 3),
    "lenet": (lenet, 1),
    "skip": (SkipNet, 2),
    "skip-oblong": (lambda: SkipNet(kernel=(3, 7)), 2),
    "valid-unet": (ValidUNet, 1),
    "oblong": (Oblong, 2),
    "in-place": (InPlace, 2),
    "gaps": (Gaps, 1),
    "ceil-mode": (CeilMode, 1),
    "self-padding": (SelfPadding, 1),
    "parallel": (Parallel, 1),
    "shuffle": (Shuffle, 2),
    "reflecting": (Reflecting, 1),
    "bilinear": (Resizing, 1),
    "bicubic": (lambda: Resizing("bicubic", 2), 1),
    "nearest": (lambda: Resizing("nearest", 3), 1),
    "nearest-exact": (lambda: Resizing("nearest-exact", 2), 1),
    "aligned-odd": (lambda: Resizing("bilinear", 4, aligned=True), 1),
    "last-dims": (LastDims, 3),
    "window-attention": (WindowAttention, 3),
    "two-outputs": (TwoOutputs, 1),
    "dilated": (dilated, 1),
}
"""Networks that tile exactly: how to make each, and its input channels."""
