"""Layers written out in numpy and scipy, one image (channels, rows, columns) at a time: the presets' oracles."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import signal
from torch import Tensor, nn

Array = NDArray[np.float64]
Places = dict[tuple[int, int, int], tuple[int, int, int]]


def unsettled(network: nn.Module) -> nn.Module:
    """The network in float64, in evaluation mode, its batch normalisations off their defaults."""
    torch.manual_seed(4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return network.double().eval()


def values(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def convolve(x: Array, layer: nn.Conv2d) -> Array:
    """A convolution with padding, stride and groups."""
    weight, bias = values(layer.weight), layer.bias
    pad, step = int(layer.padding[0]), layer.stride[0]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    read = weight.shape[1]
    made = len(weight) // layer.groups
    maps = [
        signal.correlate(x[number // made * read : (number // made + 1) * read], kernel, "valid")[0]
        for number, kernel in enumerate(weight)
    ]
    found = np.stack(maps)[:, ::step, ::step]
    return found if bias is None else found + values(bias)[:, None, None]


def deconvolve(x: Array, layer: nn.ConvTranspose2d) -> Array:
    """A transposed convolution: every input pixel adds its multiple of the kernel."""
    weight, step, pad = values(layer.weight), layer.stride[0], int(layer.padding[0])
    size, rows, cols = weight.shape[2], x.shape[1], x.shape[2]
    found = np.zeros((weight.shape[1], step * (rows - 1) + size, step * (cols - 1) + size))
    for row, col in np.ndindex(rows, cols):
        found[:, step * row : step * row + size, step * col : step * col + size] += np.tensordot(
            x[:, row, col], weight, 1
        )
    found = found[:, pad : found.shape[1] - pad, pad : found.shape[2] - pad]
    return found if layer.bias is None else found + values(layer.bias)[:, None, None]


def normalise(x: Array, layer: nn.BatchNorm2d) -> Array:
    """Batch normalisation by stored statistics."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, var, scale, shift = (
        values(t)[:, None, None] for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x - mean) / np.sqrt(var + layer.eps) * scale + shift


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def pool(x: Array) -> tuple[Array, Places]:
    """The maxima of 2x2 windows, and for each the place where it was found."""
    found: Array = np.empty((x.shape[0], x.shape[1] // 2, x.shape[2] // 2))
    where: Places = {}
    for c, i, j in np.ndindex(*found.shape):
        window = x[c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        row, col = divmod(int(window.argmax()), 2)
        found[c, i, j], where[c, i, j] = window[row, col], (c, 2 * i + row, 2 * j + col)
    return found, where


def unpool(x: Array, where: Places) -> Array:
    """Each value where its maximum was found, in a map of twice the size."""
    found = np.zeros((x.shape[0], 2 * x.shape[1], 2 * x.shape[2]))
    for source, target in where.items():
        found[target] = x[source]
    return found


def repeat(x: Array) -> Array:
    """Each value four times, in a map of twice the size."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def interpolate(x: Array) -> Array:
    """Twice the size by bilinear interpolation between pixels' centres; beyond the outermost, their value."""
    for axis in (1, 2):
        size = x.shape[axis]
        places = np.clip((np.arange(2 * size) + 0.5) / 2 - 0.5, 0, size - 1)
        first = np.minimum(places.astype(int), max(size - 2, 0))
        second = np.minimum(first + 1, size - 1)
        share = np.expand_dims(places - first, tuple(other for other in range(3) if other != axis))
        x = x.take(first, axis) * (1 - share) + x.take(second, axis) * share
    return x


def apply(x: Array, layer: nn.Module) -> Array:
    """One of the layers above, by its class; evaluation leaves dropout out."""
    kinds: dict[type, Any] = {
        nn.Conv2d: convolve,
        nn.ConvTranspose2d: deconvolve,
        nn.BatchNorm2d: normalise,
        nn.ReLU: lambda x, _: relu(x),
        nn.Dropout: lambda x, _: x,
        nn.Identity: lambda x, _: x,
        nn.Softsign: lambda x, _: x / (1 + np.abs(x)),
        nn.MaxPool2d: lambda x, _: pool(x)[0],
        nn.Upsample: lambda x, _: interpolate(x),
    }
    return kinds[type(layer)](x, layer)


def run(x: Array, layers: nn.Module) -> Array:
    """A module's layers one after another."""
    for layer in layers.children():
        x = apply(x, layer)
    return x
