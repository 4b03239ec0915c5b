"""The denoising autoencoder against the same network in numpy, and against what its table says."""

from __future__ import annotations

import math

import numpy as np
import plain
import pytest
import torch
from torch import nn

from tilepipe.errors import ModelError
from tilepipe.models import build


@pytest.mark.parametrize("bands", [1, 3])
def test_autoencoder_is_the_plain_network(bands: int):
    network = plain.unsettled(build("autoencoder", bands=bands, width=0.1))
    nn.init.uniform_(network.power.weight, 0.2, 1.5)
    image = np.random.default_rng(0).uniform(-0.2, 1.2, (bands, 61, 77))
    fine = plain.run(image, network.fine)
    coarse = plain.run(fine, network.coarse)
    risen = plain.run(coarse, network.rise) + fine
    y = np.clip(plain.run(risen, network.finish) + image, np.finfo(np.float64).eps, 1)
    expected = np.exp(plain.convolve(np.log(y), network.power))
    with torch.inference_mode():
        found = network(torch.from_numpy(image)[None])[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert ((expected > 0.01) & (expected < 0.99)).mean() > 0.2  # the clip does not decide all


def test_autoencoder_narrows_61_to_1_and_widens_it_again():
    network = build("autoencoder").eval()
    sides: list[int] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module is not network.power:
            module.register_forward_hook(lambda _module, _input, output: sides.append(output.shape[-1]))
    network(torch.zeros(1, 1, 61, 61))
    assert sides == [29, 13, 5, 1, 5, 13, 29, 61]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autoencoder_that_removes_nothing_is_the_identity_around_the_clip(dtype: torch.dtype):
    network = build("autoencoder", width=0.1).eval().to(dtype)
    nn.init.zeros_(network.finish[-3].weight)
    nn.init.zeros_(network.finish[-3].bias)
    image = torch.linspace(-0.5, 1.5, 61 * 61).reshape(1, 1, 61, 61).to(dtype)
    epsilon = torch.finfo(dtype).eps
    rounding = 2 * abs(math.log(epsilon)) * epsilon  # of the logarithm, which the exponential scales up
    with torch.inference_mode():
        found = network(image)
        assert torch.allclose(found, image.clamp(epsilon, 1), rtol=rounding, atol=0)
        network.power.weight.fill_(0.5)
        assert torch.allclose(network(image), image.clamp(epsilon, 1).sqrt(), rtol=rounding, atol=0)


def test_autoencoder_drops_out_between_the_convolutions_of_every_half_but_the_last():
    network = build("autoencoder", dropout=0.3)
    halves = (network.fine, network.coarse, network.rise, network.finish)
    for half in halves:
        kinds = [type(layer) for layer in half]
        first, second = (i for i, kind in enumerate(kinds) if kind in (nn.Conv2d, nn.ConvTranspose2d))
        assert (nn.Dropout in kinds[first:second]) == (half is not network.finish)
        assert kinds.count(nn.Dropout) == (half is not network.finish)
        assert kinds[-1] is (nn.ReLU if half in halves[:2] else nn.Softsign)
    with pytest.raises(ModelError, match=r"dropout 1.0 is not legal"):
        build("autoencoder", dropout=1.0)


def test_autoencoder_learns_every_parameter():
    network = build("autoencoder", width=0.2).train()
    torch.manual_seed(0)
    image = torch.rand(2, 1, 77, 61) * 0.3 + 0.2
    nn.functional.mse_loss(network(image), image).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in network.parameters())
    assert bool(network.power.weight.grad.abs().sum() > 0)
