"""Checks of the Triton kernels against torch's own operators, bit for bit, on any device.

Run by test_triton.py on the CPU, in Triton's interpreter, and by test_gpu.py on a CUDA device.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilepipe.errors import RunError
from tilepipe.predict import triton_classify as classifying
from tilepipe.predict import triton_kernels as kernels

SHAPES = [(1, 64, 6, 10), (2, 5, 7, 9), (1, 130, 4, 3), (1, 1, 5, 8), (3, 12, 1, 6)]
ACTIVATIONS = [(False, False), (False, True), (True, True)]
"""Whether there is a ReLU, and a bias."""
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a kernel stores it in `dtype`: Triton's interpreter cuts float32 to bf16, where a device rounds."""
    if dtype != torch.bfloat16 or x.is_cuda:
        return x.to(dtype)
    return (x.float().view(torch.int32) & -65536).view(torch.float32).to(dtype)


def activated(x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """What torch's operators make of it, one after the other; plainly laid out."""
    if bias is not None:
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = stored(x.to(kind) + bias.to(kind).view(-1, 1, 1), x.dtype)
    return (F.relu(x) if relu else x).contiguous()


def same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def a_map(shape: tuple[int, ...], dtype: torch.dtype, device: str, broken: bool = False) -> Tensor:
    """Small whole numbers, so that many are equal, some of them finely apart; some NaN and infinities if `broken`."""
    x = torch.randint(-3, 4, shape).to(torch.float64) + torch.randint(0, 2, shape) * 0.0078125
    if broken:
        for value in (float("nan"), float("inf"), -float("inf")):
            x[torch.rand(shape) < 0.15] = value
    return x.to(dtype).to(device).contiguous(memory_format=torch.channels_last)


def cases(device: str) -> itertools.product[tuple[tuple[int, ...], torch.dtype]]:
    torch.manual_seed(1)
    return itertools.product(SHAPES, DTYPES)


def check_bias_relu(device: str) -> None:
    for shape, dtype in cases(device):
        x, bias = a_map(shape, dtype, device, True), torch.randn(shape[1]).to(dtype).to(device)
        expected = activated(x, bias, True)
        same(kernels.bias_relu_(x.clone(memory_format=torch.contiguous_format), bias), expected)
        found = kernels.bias_relu_(x, bias)
        same(found, expected)
        assert found.data_ptr() == x.data_ptr()


def switches_of(indices: Tensor, width: int) -> Tensor:
    return (indices // width % 2 * 2 + indices % width % 2).to(torch.uint8)


def check_pool(device: str) -> None:
    for (shape, dtype), (relu, biased) in itertools.product(list(cases(device)), ACTIVATIONS):
        x = a_map(shape, dtype, device, True)
        bias = torch.randn(shape[1]).to(dtype).to(device) if biased else None
        if min(shape[2:]) < 2:
            assert kernels.pool(x, bias, relu)[0].numel() == 0
            continue
        maxima, indices = F.max_pool2d(activated(x, bias, relu), 2, 2, return_indices=True)
        pooled, switches = kernels.pool(x, bias, relu)
        same(pooled, maxima)
        same(switches, switches_of(indices, shape[3]))
        assert pooled.is_contiguous(memory_format=torch.channels_last)


def check_unpool(device: str) -> None:
    for (shape, dtype), (relu, biased) in itertools.product(list(cases(device)), ACTIVATIONS):
        images, channels, height, width = shape
        if min(height, width) < 2:
            continue
        x = a_map(shape, dtype, device)
        _, indices = F.max_pool2d(x, 2, 2, return_indices=True)
        _, switches = kernels.pool(x, None, False)
        small = a_map((images, channels, height // 2, width // 2), dtype, device)
        bias = torch.randn(channels).to(dtype).to(device) if biased else None
        given = activated(small, bias, relu)
        expected = F.max_unpool2d(given, indices.contiguous(), 2, 2, output_size=(height, width))
        same(kernels.unpool(small, bias, relu, switches, (height, width)), expected)
        wide = F.pad(small, (1, 2, 1, 1)).contiguous(memory_format=torch.channels_last)
        inner = wide[..., 1:-1, 1:-2]
        same(kernels.unpool(inner, bias, relu, switches.contiguous(), (height, width)), expected)


def check_normalise(device: str) -> None:
    torch.manual_seed(2)
    kinds = [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.float32, torch.float64]
    for kind, (dtype, bands, channels) in itertools.product(
        kinds, [(torch.bfloat16, 3, 3), (torch.bfloat16, 3, 8), (torch.float32, 5, 5)]
    ):
        values = (torch.rand(bands, 20, 37) * 250).to(kind).to(device)
        mean, std = (torch.rand(bands) * 100).to(device), (torch.rand(bands) * 50 + 3).to(device)
        mask = (torch.rand(20, 37) < 0.8).to(device)
        for valid in (None, mask):
            rows, cols = slice(3, 19), slice(5, 36)
            expected = (values[:, rows, cols].to(torch.float32) - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
            if valid is not None:
                expected.masked_fill_(~valid[rows, cols], 0)
            expected = stored(F.pad(expected, (0, 0, 0, 0, 0, channels - bands)), dtype)[None]
            out = torch.full_like(expected, 7.0, memory_format=torch.channels_last)
            kernels.normalise(values, valid, (3, 5), mean, std, out)
            same(out, expected)


def check_classify(device: str) -> None:
    """Whole numbers, which every order of summation adds alike: scores, ties, masks and borders are exact."""
    torch.manual_seed(4)
    for channels, classes, side, dtype in [(5, 3, 3, torch.float32), (70, 17, 1, torch.float32)] + (
        [(64, 12, 3, torch.bfloat16)] if device != "cpu" else []
    ):
        conv = torch.nn.Conv2d(channels, classes, side, padding=side // 2).to(device, dtype)
        with torch.no_grad():
            for values in (conv.weight, conv.bias):
                values.copy_(torch.randint(-1, 2, values.shape))
        wide = torch.randint(-2, 3, (1, channels, 13, 30)).to(device, dtype)
        features = wide.contiguous(memory_format=torch.channels_last)[:, :, 1:-1, 2:-3]
        features[0, :, 3, 4], features[0, 0, 5, 6] = float("nan"), float("inf")
        with torch.no_grad():
            scores = conv(features.float() if dtype == torch.float32 else features)[0].float()
        row, col, rows, cols = 1, 2, 9, 20
        scores = scores[:, row : row + rows, col : col + cols]
        keep = torch.rand(12, 40).to(device) < 0.7
        broken = ~torch.isfinite(scores).all(0)
        labels = torch.full((12, 40), 99, dtype=torch.uint8, device=device)
        confidence, undefined = torch.full_like(labels, 99), torch.zeros(1, dtype=torch.int32, device=device)
        target = classifying.Target(labels, confidence, keep, undefined)
        classifying.classify(features, classifying.Classifier.of(conv), (row, col, rows, cols), (2, 7), target)
        place = (slice(2, 2 + rows), slice(7, 7 + cols))
        assert int(undefined) == int((broken & keep[place]).sum()) > 0
        defined = ~broken
        same(labels[place][defined], scores.argmax(0).to(torch.uint8)[defined])
        share = (scores.softmax(0).amax(0) * 254 + 0.5).to(torch.uint8)
        assert (confidence[place][defined].int() - share[defined].int()).abs().max() <= 1
        outside = torch.ones_like(keep)
        outside[place] = False
        assert (labels[outside] == 99).all()
        assert (confidence[outside] == 99).all()


def check_check(device: str) -> None:
    """A machine on which Triton cannot work is told in one line."""
    kernels.check(torch.device(device))
    working = kernels._bias_relu
    try:
        kernels._bias_relu = {}
        with pytest.raises(RunError, match=r"^Triton cannot build kernels for \w+.*; install a C compiler, or [^\n]+$"):
            kernels.check(torch.device(device))
    finally:
        kernels._bias_relu = working


CHECKS = (check_bias_relu, check_pool, check_unpool, check_normalise, check_classify, check_check)
