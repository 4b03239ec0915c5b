"""DeconvNet against the paper's table and a network of plain numpy; its options; at full width, tiled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import model_of, scene, whole_labels
from tiling import planned, tiled_labels
from torch import nn
from torch.nn import functional as F

from tilepipe.errors import GeometryError, ModelError
from tilepipe.models import build
from tilepipe.models.layers import UPSAMPLINGS, upsample
from tilepipe.plan import PlanRequest
from tilepipe.predict.prepare import prepare
from tilepipe.proof import prove
from tilepipe.trace import geometry_of

# Table 2 of the paper: what each stage returns for an image of 224 x 224, as (features, side).
TABLE = [
    *[("encoder.0", 64, 224), ("encoder.1", 128, 112), ("encoder.2", 256, 56), ("encoder.3", 512, 28)],
    *[("encoder.4", 512, 14), ("fc6", 4096, 1), ("fc7", 4096, 1), ("fc6_deconv", 512, 7)],
    *[("decoder.0", 512, 14), ("decoder.1", 256, 28), ("decoder.2", 128, 56), ("decoder.3", 64, 112)],
    *[("decoder.4", 64, 224), ("classifier", 21, 224)],
]
PARTS = {
    "encoder": 14_714_688 + 2 * 4_224,
    "fc6": 512 * 49 * 4096 + 4096 + 2 * 4096,
    "fc7": 4096 * 4096 + 4096 + 2 * 4096,
    "fc6_deconv": 4096 * 49 * 512 + 512 + 2 * 512,
    "decoder": 14_749_376 + 2 * 3_776,
    "classifier": 64 * 21 + 21,
}
"""Parameters of convolutions, biases, and two for each normalised feature."""


def small(seed=0, **options):
    """A narrow network in float64 whose batch normalisation is not the identity."""
    torch.manual_seed(seed)
    network = build("deconvnet", **{"classes": 3, "width": 0.03, "fc_width": 128, **options}).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return network.double()


def full():
    with torch.device("meta"):
        return build("deconvnet").eval()


# ---- the published network ---------------------------------------------------------------------------------------


def test_stages_return_what_the_paper_tells():
    network, found = full(), {}
    for name, _, _ in TABLE:
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: found.update({name: tuple(output.shape[1:])})
        )
    network(torch.empty(1, 3, 224, 224, device="meta"))
    assert [(name, *found[name]) for name, _, _ in TABLE] == [(name, n, side, side) for name, n, side in TABLE]


def test_parameters_of_each_part():
    network = full()
    found = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    assert {name: count for name, count in found.items() if count} == PARTS
    assert sum(found.values()) == 251_805_653


def test_normalised_dropped_and_rectified_where_told():
    network = full()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(convolutions) == 13 + 3 + 13 + 1
    for kind in (nn.BatchNorm2d, nn.ReLU):
        assert sum(isinstance(module, kind) for module in network.modules()) == len(convolutions) - 1
    dropping = {name: module.p for name, module in network.named_modules() if isinstance(module, nn.Dropout)}
    assert dropping == {"fc6.3": 0.5, "fc7.3": 0.5}


# ---- what it computes --------------------------------------------------------------------------------------------


def convolve(x, layer):
    """A convolution as a sum over the kernel's places."""
    weight, (pad, _), size = layer.weight.detach().numpy(), layer.padding, layer.kernel_size[0]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    rows, cols = x.shape[1] - size + 1, x.shape[2] - size + 1
    out = sum(np.tensordot(weight[:, :, a, b], x[:, a : a + rows, b : b + cols], 1) for a, b in np.ndindex(size, size))
    return out + layer.bias.detach().numpy()[:, None, None]


def stamp(x, layer):
    """A transposed convolution of stride 1: each value puts its kernel down; the padding is cut off."""
    weight, (pad, _), size = layer.weight.detach().numpy(), layer.padding, layer.kernel_size[0]
    rows, cols = x.shape[1:]
    out = np.zeros((weight.shape[1], rows + size - 1, cols + size - 1))
    for a, b in np.ndindex(size, size):
        out[:, a : a + rows, b : b + cols] += np.tensordot(weight[:, :, a, b].T, x, 1)
    out = out[:, pad : out.shape[1] - pad, pad : out.shape[2] - pad]
    return out + layer.bias.detach().numpy()[:, None, None]


def run(x, stage):
    """A stage of convolutions, normalisations and ReLU."""
    for layer in stage:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            x = (stamp if isinstance(layer, nn.ConvTranspose2d) else convolve)(x, layer)
        elif isinstance(layer, nn.BatchNorm2d):
            mean, var, scale, shift = (
                t.detach().numpy()[:, None, None]
                for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
            )
            x = (x - mean) / np.sqrt(var + layer.eps) * scale + shift
        elif isinstance(layer, nn.ReLU):
            x = np.maximum(x, 0)
    return x


def windows(x):
    """(features, rows / 2, columns / 2, 4): the values of each 2x2 window in row-major order."""
    n, rows, cols = x.shape
    return x.reshape(n, rows // 2, 2, cols // 2, 2).transpose(0, 1, 3, 2, 4).reshape(n, rows // 2, cols // 2, 4)


def reference(network, image):
    """The network's scores for one image, from its weights alone."""
    x, places = image, []
    for stage in network.encoder:
        pooled = windows(run(x, stage))
        places.append(pooled.argmax(3)[..., None] == np.arange(4))
        x = pooled.max(3)
    for stage in (network.fc6, network.fc7, network.fc6_deconv):
        x = run(x, stage)
    for stage, chosen in zip(network.decoder, reversed(places), strict=True):
        n, rows, cols = x.shape
        spread = (x[..., None] * chosen).reshape(n, rows, cols, 2, 2).transpose(0, 1, 3, 2, 4)
        x = run(spread.reshape(n, 2 * rows, 2 * cols), stage)
    return convolve(x, network.classifier)


def test_scores_are_those_of_a_plain_numpy_network():
    network = small()
    image = np.random.default_rng(1).normal(size=(3, 256, 224))
    with torch.inference_mode():
        found = network(torch.from_numpy(image)[None])[0].numpy()
    expected = reference(network, image)
    assert expected.std() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max())


def test_it_can_be_traced_and_folds_every_normalisation():
    network = small()
    prepared = prepare(network, "float64")
    assert (prepared.folded, prepared.unfolded) == (29, 0)
    image = torch.randn(1, 3, 224, 256, dtype=torch.float64)
    with torch.inference_mode():
        expected = network(image)
        assert torch.equal(torch.fx.symbolic_trace(network)(image), expected)
        torch.testing.assert_close(prepared(image), expected, rtol=1e-9, atol=1e-9)


# ---- options ------------------------------------------------------------------------------------------------------


def test_unpooling_is_the_gradient_of_pooling_and_repetition_repeats():
    x = torch.rand(2, 3, 8, 6, dtype=torch.float64, requires_grad=True)
    pooled, indices = F.max_pool2d(x, 2, 2, return_indices=True)
    given = torch.rand_like(pooled)
    (gradient,) = torch.autograd.grad(pooled, x, given)
    assert torch.equal(upsample(given, indices, (8, 6), "unpool"), gradient)
    repeated = given.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(upsample(given, indices, (8, 6), "nearest"), repeated)
    ramp = torch.arange(4.0).expand(1, 1, 3, 4)
    found = upsample(ramp, indices, (6, 8), "bilinear")[0, 0, 2]
    torch.testing.assert_close(found, torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))


@pytest.mark.parametrize(("how", "reach"), [("nearest", 186), ("bilinear", 218)])
def test_upsampling_without_switches_is_exact_too(how, reach):
    network = small(upsample=how, size=32, width=0.02)
    geometry = geometry_of(network, 3)
    for axis in geometry.axes:
        assert (str(axis.sizes), axis.reach, axis.alignment) == ("32n", (reach,) * 2, 32)
    proof = prove(network, geometry)
    assert proof.ok, proof


def test_ways_of_upsampling_differ():
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        one, two, three = (small(upsample=how, size=64)(image) for how in UPSAMPLINGS)
    assert not any(torch.allclose(a, b) for a, b in ((one, two), (one, three), (two, three)))


@pytest.mark.parametrize(
    ("options", "sizes", "kernel", "reach", "halo"),
    [
        ({"extra_stages": 2, "size": 512}, "512 + 128n", 4, 1146, 1152),
        ({"extra_stages": 1}, "448 + 64n", 7, 762, 768),
        ({"extra_stages": 1, "size": 64}, "64n", 1, 378, 384),
        ({"size": 256}, "256 + 32n", 8, 410, 416),
    ],
)
def test_extra_stages_leave_the_kernel_what_remains(options, sizes, kernel, reach, halo):
    with torch.device("meta"):
        network = build("deconvnet", classes=2, width=0.02, fc_width=64, **options).eval()
    count = 5 + options.get("extra_stages", 0)
    assert (len(network.encoder), len(network.decoder)) == (count, count)
    assert network.fc6[0].kernel_size == network.fc6_deconv[0].kernel_size == (kernel, kernel)
    axis = geometry_of(network, 3).rows
    assert (str(axis.sizes), axis.reach, axis.halo, axis.alignment) == (sizes, (reach,) * 2, (halo,) * 2, 2**count)
    least = axis.sizes.minimums[0]
    found = network(torch.empty(1, 3, least, least + 2**count, device="meta"))
    assert found.shape == (1, 2, least, least + 2**count)
    with pytest.raises(GeometryError, match=rf"{least - 1} columns.*nearest {least}$"):
        network(torch.empty(1, 3, least, least - 1, device="meta"))


@pytest.mark.slow
def test_extra_stages_are_exact():
    network = small(extra_stages=1, size=128)
    proof = prove(network, geometry_of(network, 3))
    assert proof.ok, proof


def test_connected_layers_can_be_narrow():
    with torch.device("meta"):
        network = build("deconvnet", fc_width=1024)
    assert network.fc6[0].weight.shape == (1024, 512, 7, 7)
    assert network.fc7[0].weight.shape == (1024, 1024, 1, 1)
    assert network.fc6_deconv[0].weight.shape == (1024, 512, 7, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 500, "extra_stages": 2}, r"size 500 with 2 extra stages.*multiple of 128, such as 384 or 512"),
        ({"size": 16}, r"size 16 with 0 .*multiple of 32, such as 32 or 64"),
        ({"extra_stages": -1}, r"-1 extra stages.*0 to 5"),
        ({"upsample": "shuffle"}, r"'shuffle' is not known; use one of unpool, nearest, bilinear"),
        ({"fc_width": 0}, "fc_width 0 cannot be"),
        ({"width": 0.0}, r"width 0.0 is not legal"),
        ({"classes": 0}, "classes 0 cannot be"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ModelError, match=message):
        build("deconvnet", **options)


# ---- once at full width ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_published_network_tiles_exactly():
    torch.manual_seed(0)
    model = model_of(build("deconvnet").eval(), 21)
    geometry = geometry_of(model.network, 3)
    values = scene((224, 1056), seed=4)
    cut = planned(geometry, (224, 1056), PlanRequest("exact", tile=(224, 992), block=(224, 1056)))
    assert cut.cols.count > 1
    found = tiled_labels(model, cut, values, None, "float64")
    assert (found == whole_labels(model, geometry, values)).all()
    assert len(np.unique(found)) > 1
