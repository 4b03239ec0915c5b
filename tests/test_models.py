import numpy as np
import pytest
import torch
import torch.fx
from scipy import signal
from torch import nn

from tilepipe.errors import GeometryError, ModelError
from tilepipe.models import MODELS, build

STEPS = {"segnet": 32, "segnet-basic": 16}

# (in, out) of every convolution of the published definitions, top to bottom.
SEGNET_TABLE = [
    *[(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256)],
    *[(256, 512), (512, 512), (512, 512), (512, 512), (512, 512), (512, 512)],
    *[(512, 512), (512, 512), (512, 512), (512, 512), (512, 512), (512, 256)],
    *[(256, 256), (256, 256), (256, 128), (128, 128), (128, 64), (64, 64), (64, 11)],
]
BASIC_TABLE = [(3, 64), *[(64, 64)] * 7, (64, 11)]


def convolutions(network):
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def small(name, width=0.06, classes=5, seed=0):
    """A small network whose batch normalisation is not the identity."""
    torch.manual_seed(seed)
    network = build(name, classes=classes, bands=3, width=width).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return network.double()


@pytest.mark.parametrize(("name", "count"), [("segnet", 29_449_355), ("segnet-basic", 1_416_587)])
def test_parameters_are_as_many_as_published(name, count):
    with torch.device("meta"):
        network = build(name, classes=11)
    # Weights and biases of the convolutions, scale and shift of the normalisations; no difference remains.
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize(
    ("name", "table", "kernel", "last"), [("segnet", SEGNET_TABLE, 3, 3), ("segnet-basic", BASIC_TABLE, 7, 1)]
)
def test_layers_are_the_published_ones(name, table, kernel, last):
    with torch.device("meta"):
        found = convolutions(build(name, classes=11))
    assert [(layer.in_channels, layer.out_channels) for layer in found] == table
    assert [layer.kernel_size[0] for layer in found] == [kernel] * (len(table) - 1) + [last]
    assert all(2 * layer.padding[0] + 1 == layer.kernel_size[0] for layer in found)


def test_segnet_encodes_as_vgg16():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        vgg = convolutions(torchvision.models.vgg16_bn().features)
        ours = convolutions(build("segnet").encoder)
    assert [layer.weight.shape for layer in ours] == [layer.weight.shape for layer in vgg]
    assert len(ours) == 13


def reference(network, image, relu_in_decoder, steps):
    """The network's scores for one image, from its weights alone: numpy and scipy, loops over pooling windows."""
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]

    def convolve(x, layer):
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        pad = layer.padding[0]
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
        return np.stack([signal.correlate(x, w, "valid")[0] + b for w, b in zip(weight, bias, strict=True)])

    def normalise(x, layer):
        mean, var, scale, shift = (
            t.detach().numpy()[:, None, None] for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        )
        return (x - mean) / np.sqrt(var + layer.eps) * scale + shift

    def stage(x, count, relu):
        for _ in range(count):
            x = normalise(convolve(x, layers.pop(0)), layers.pop(0))
            x = np.maximum(x, 0) if relu else x
        return x

    def pool(x):
        out, where = np.empty((x.shape[0], x.shape[1] // 2, x.shape[2] // 2)), {}
        for c, i, j in np.ndindex(out.shape):
            window = x[c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            row, col = np.unravel_index(window.argmax(), (2, 2))
            out[c, i, j], where[c, i, j] = window[row, col], (c, 2 * i + row, 2 * j + col)
        return out, where

    x, places = image, []
    for count in steps:
        x, where = pool(stage(x, count, True))
        places.append(where)
    for count, where in zip((*reversed(steps[1:]), steps[0] - relu_in_decoder), reversed(places), strict=True):
        spread = np.zeros((x.shape[0], 2 * x.shape[1], 2 * x.shape[2]))
        for source, target in where.items():
            spread[target] = x[source]
        x = stage(spread, count, relu_in_decoder)
    scores = convolve(x, layers.pop(0))
    assert not layers
    return scores


@pytest.mark.parametrize(
    ("name", "relu", "steps"), [("segnet", True, (2, 2, 3, 3, 3)), ("segnet-basic", False, (1, 1, 1, 1))]
)
def test_scores_are_those_of_a_plain_numpy_network(name, relu, steps):
    network = small(name)
    image = np.random.default_rng(1).normal(size=(3, 32, 64))
    with torch.inference_mode():
        found = network(torch.from_numpy(image)[None])[0].numpy()
    np.testing.assert_allclose(found, reference(network, image, relu, steps), atol=1e-9)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("size", [(1, 2), (3, 1)])
def test_scores_have_the_image_size(name, size):
    rows, cols = (n * STEPS[name] for n in size)
    network = small(name).to("meta")
    assert network(torch.empty(2, 3, rows, cols, device="meta").double()).shape == (2, 5, rows, cols)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("excess", [1, -1, 5])
def test_illegal_sizes_are_refused_with_the_nearest_legal_ones(name, excess):
    step = STEPS[name]
    side = 2 * step + excess
    below = side // step * step
    with pytest.raises(GeometryError, match=f"{side} columns.* {below} and {below + step}"):
        small(name)(torch.zeros(1, 3, step, side).double())
    with pytest.raises(GeometryError, match=f"0 rows.* nearest {step}$"):
        small(name)(torch.zeros(1, 3, 0, step).double())


@pytest.mark.parametrize("name", STEPS)
def test_networks_can_be_traced_and_take_any_memory_layout(name):
    network, image = small(name), torch.rand(1, 3, 64, 96).double()
    with torch.inference_mode():
        expected = network(image)
        assert torch.equal(torch.fx.symbolic_trace(network)(image), expected)
        assert torch.allclose(network(image.contiguous(memory_format=torch.channels_last)), expected, atol=1e-9)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("width", [0.01, 0.125, 0.5])
def test_width_scales_every_layer(name, width):
    with torch.device("meta"):
        inner = convolutions(build(name, classes=7, bands=4, width=width))
        full = convolutions(build(name, classes=7, bands=4))
    assert inner[0].in_channels == 4
    assert inner[-1].out_channels == 7
    for narrow, wide in zip(inner[:-1], full[:-1], strict=True):
        assert narrow.out_channels == max(1, round(wide.out_channels * width))


def test_mistakes_are_named():
    with pytest.raises(ModelError, match=r"unknown architecture 'unet'.*segnet, segnet-basic"):
        build("unet")
    with pytest.raises(ModelError, match=r"no argument 'depth'.*classes, bands, width"):
        build("segnet", depth=3)
    for wrong in ({"width": 0}, {"width": float("nan")}, {"classes": 0}, {"bands": -1}):
        with pytest.raises(ModelError, match=r"legal|cannot"):
            build("segnet", **wrong)


def test_the_table_builds_every_name():
    with torch.device("meta"):
        for name in MODELS:
            assert isinstance(build(name, classes=2), nn.Module)
