"""LeNet and the FCN without downsampling, each against the network that it stands for."""

from __future__ import annotations

import numpy as np
import plain
import pytest
import torch
from torch import nn

from tilepipe.models import build
from tilepipe.models.dilated import CONVOLUTIONS, PATCH

# ---- LeNet -------------------------------------------------------------------------------------------------------


def test_lenet_gives_64_outputs_for_280_columns():
    assert build("lenet")(torch.zeros(1, 1, 28, 280)).shape == (1, 10, 1, 64)


def test_lenet_equals_the_classifier_with_linear_layers_on_every_window():
    torch.manual_seed(0)
    network = build("lenet").double().eval()
    assert isinstance(network, nn.Sequential)
    first, _, second, _, third, _, fourth = network
    hidden, last = nn.Linear(800, 500).double(), nn.Linear(500, 10).double()
    hidden.load_state_dict({"weight": third.weight.flatten(1), "bias": third.bias})
    last.load_state_dict({"weight": fourth.weight.flatten(1), "bias": fourth.bias})
    pool = nn.MaxPool2d(2)
    classifier = nn.Sequential(first, pool, second, pool, nn.Flatten(), hidden, nn.ReLU(), last)
    image = torch.rand(1, 1, 36, 44, dtype=torch.float64)
    with torch.inference_mode():
        found = network(image)
        assert found.shape == (1, 10, 3, 5)
        for row, col in np.ndindex(3, 5):
            window = image[..., 4 * row : 4 * row + 28, 4 * col : 4 * col + 28]
            assert torch.allclose(found[..., row, col], classifier(window), atol=1e-12)


# ---- the FCN without downsampling --------------------------------------------------------------------------------


def test_dilation_gives_what_strides_would_at_every_place_they_leave():
    """The same filters undilated, every second row and column left out behind each convolution."""
    network = plain.unsettled(build("dilated-fcn", classes=3, width=0.05))
    image = torch.randn(1, 3, 128, 144, dtype=torch.float64)
    x = image
    with torch.inference_mode():
        for layer in network:
            if isinstance(layer, nn.Conv2d) and layer.kernel_size[0] == 5:
                x = nn.functional.conv2d(x, layer.weight, layer.bias, padding=2)
            elif isinstance(layer, nn.Conv2d):
                x = nn.functional.conv2d(x, layer.weight, layer.bias)
            else:
                x = layer(x)
            if isinstance(layer, nn.ReLU) and x.shape[2] > 128 // 2 ** len(CONVOLUTIONS):
                x = x[..., ::2, ::2]
        found = network(image)
    step = 2 ** len(CONVOLUTIONS)
    centre = step * (PATCH - 1) // 2
    assert x.shape[2:] == (5, 6)
    assert torch.allclose(found[..., centre:-centre:step, centre:-centre:step], x, atol=1e-9)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (7, 3), (40, 41)])
def test_dilated_fcn_keeps_any_size(size: tuple[int, int]):
    assert build("dilated-fcn", width=0.1).eval()(torch.zeros(1, 3, *size)).shape == (1, 6, *size)
