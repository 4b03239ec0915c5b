"""A padded network against the reference result, for every network of the zoo at random sizes."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import networks
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import seeded
from reference import MEAN, STD, model_of, scene, whole_scores
from refused import FixedSize
from torch import nn

from tilepipe.axis import extended_size, kept_outputs
from tilepipe.errors import GeometryError, ModelError
from tilepipe.models import build
from tilepipe.variants.padded import Padded


@cache
def padded(name: str) -> Padded:
    make, channels = networks.EXACT[name]
    return Padded(seeded(make).double(), channels)


def image_of(values: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(values.astype(np.float64)) - MEAN)[None] / STD


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(networks.EXACT)), rows=st.integers(1, 130), cols=st.integers(1, 130))
def test_padded_networks_give_the_reference_result(name: str, rows: int, cols: int) -> None:
    network, channels = padded(name), networks.EXACT[name][1]
    values = scene((rows, cols), channels, seed=rows + cols)
    model = model_of(copy.deepcopy(network.network), 2, channels)
    expected = whole_scores(model, network.geometry, values, None, "float64")
    axes = zip(network.geometry.axes, (rows, cols), strict=True)
    kept = [kept_outputs(axis, length, extended_size(axis, length)) for axis, length in axes]
    with torch.no_grad():
        found = network(image_of(values))[0].numpy()
    assert found.shape[1:] == tuple(kept)
    if network.geometry.scale == (1, 1):
        assert kept == [rows, cols]
    np.testing.assert_allclose(found, expected[:, : kept[0], : kept[1]], rtol=1e-9, atol=1e-9)


def test_every_network_of_the_zoo_takes_one_pixel_and_a_prime() -> None:
    for name, (_, channels) in networks.EXACT.items():
        network = padded(name)
        for shape in (1, 1), (1, 47), (101, 2):
            found = network(torch.zeros(2, channels, *shape, dtype=torch.float64))
            assert found.shape[0] == 2
            if network.geometry.scale == (1, 1):
                assert tuple(found.shape[2:]) == shape


def test_the_surplus_is_reflected_as_numpy_reflects() -> None:
    """The identity of alignment 8 that returns all it was given, the extension too."""
    seen = []

    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.PixelUnshuffle(8), nn.PixelShuffle(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return self.up(self.down(x))

    network = Padded(Seeing(), channels=1)
    image = torch.arange(15.0).reshape(1, 1, 3, 5)
    assert torch.equal(network(image), image)
    assert np.array_equal(seen[-1][0, 0].numpy(), np.pad(image[0, 0].numpy(), ((0, 5), (0, 3)), mode="reflect"))


def test_lenet_gives_the_outputs_whose_centre_lies_in_the_image() -> None:
    """Window k reads pixels 4k to 4k + 27, so that its cell is 4k + 12 to 4k + 16."""
    network = padded("lenet")
    for length, outputs in (28, 1), (29, 2), (32, 2), (33, 3), (10, 1), (280, 64):
        image = torch.zeros(1, 1, length, 280, dtype=torch.float64)
        assert network(image).shape == (1, 10, outputs, 64)


def test_gradients_pass_and_copies_work() -> None:
    network = padded("valid-unet")
    image = torch.randn(1, 1, 9, 13, dtype=torch.float64, requires_grad=True)
    network(image).sum().backward()
    assert image.grad is not None
    assert float(image.grad.abs().min()) > 0
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(image), network(image))


def test_presets_take_any_size() -> None:
    network = Padded(build("segnet-basic", classes=3, bands=4, width=0.1).eval())
    assert network.geometry.channels_in == 4
    assert network(torch.zeros(1, 4, 5, 50)).shape == (1, 3, 5, 50)
    assert "rows 16n, columns 16n" in repr(network)


def test_networks_that_return_several_maps_give_the_first() -> None:
    assert padded("two-outputs")(torch.zeros(1, 1, 11, 17, dtype=torch.float64)).shape == (1, 2, 11, 17)


@pytest.mark.parametrize("shape", [(1, 5, 5), (1, 3, 5, 5), (1, 1, 0, 5)])
def test_inputs_that_are_no_images_of_the_networks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(GeometryError, match=r"legal: \(N, 1, rows, columns\)"):
        padded("lenet")(torch.zeros(shape))


def test_channels_have_to_be_known() -> None:
    with pytest.raises(ModelError, match="ReLU has no convolution that tells its input channels; give channels="):
        Padded(nn.ReLU())


def test_a_network_of_fixed_size_takes_smaller_images_only() -> None:
    network = Padded(FixedSize().eval(), channels=1)
    size = network.geometry.rows.sizes.minimums[0]
    assert network(torch.zeros(1, 1, size - 3, 1)).shape[2:] == (size - 3, 1)
    with pytest.raises(GeometryError, match="do not pass through the network"):
        network(torch.zeros(1, 1, size + 1, 1))
