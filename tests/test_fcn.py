"""FCNs against the published sizes, ramps that show where every crop lies, any raster size; at full width, tiled."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from reference import model_of, scene, whole_labels
from tiling import planned, tiled_labels
from torch import nn

from tilepipe.axis import extended_size
from tilepipe.errors import GeometryError, ModelError
from tilepipe.geometry.network import Sizes
from tilepipe.models import build
from tilepipe.models.fcn import bilinear_upsampling
from tilepipe.plan import PlanRequest
from tilepipe.predict.prepare import prepare
from tilepipe.proof import prove
from tilepipe.trace import geometry_of

STRIDES = {"fcn32s": 32, "fcn16s": 16, "fcn8s": 8}
EVERY = pytest.mark.parametrize("name", STRIDES)
BIAS = {5: 15.5, 4: 7.5, 3: 3.5}
"""Input pixels from a pooled pixel's centre to its largest value, on an image that rises."""


def small(name, seed=0, **options):
    """A narrow network in float64."""
    torch.manual_seed(seed)
    return build(name, **{"classes": 3, "width": 0.03, **options}).eval().double()


def centred(network):
    """The network with every convolution passing on its centre, so that only poolings and crops move anything."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
            module.weight.data[:, 0, module.kernel_size[0] // 2, module.kernel_size[1] // 2] = 1
    return network


# ---- parameters --------------------------------------------------------------------------------------------------

VGG_AND_CONNECTED = 14_714_688 + (512 * 49 * 4096 + 4096) + (4096 * 4096 + 4096)
SCORES = {"fcn32s": [4096], "fcn16s": [4096, 512], "fcn8s": [4096, 512, 256]}
DOUBLING = 21 * 21 * 4 * 4


@EVERY
def test_parameters_follow_from_the_table(name):
    stride, fixed = STRIDES[name], VGG_AND_CONNECTED + sum(21 * n + 21 for n in SCORES[name])
    doublings = DOUBLING * (len(SCORES[name]) - 1)
    last = (2 * stride) ** 2
    with torch.device("meta"):
        published, learnt, frozen = (build(name, upsampling=how) for how in ("published", "learnt", "frozen"))

    def count(network, trained):
        return sum(p.numel() for p in network.parameters() if p.requires_grad or not trained)

    assert (count(published, False), count(published, True)) == (fixed + doublings + 21 * last, fixed + doublings)
    assert (count(learnt, False), count(learnt, True)) == (fixed + doublings + 441 * last,) * 2
    assert count(frozen, True) == fixed
    assert round(count(published, True) / 1e6) == 134  # table 1 of the paper


# ---- sizes -------------------------------------------------------------------------------------------------------


@EVERY
def test_every_size_gives_scores_of_its_size(name):
    network = small(name).to("meta")
    for side in [*range(1, 70), 133, 500]:
        found = network(torch.empty(1, 3, side, 501 - side, device="meta", dtype=torch.float64))
        assert found.shape == (1, 3, side, 501 - side)
    with pytest.raises(GeometryError, match="0 rows"):
        network(torch.empty(1, 3, 0, 5, device="meta"))


@pytest.mark.parametrize("side", [1, 26, 27, 58, 59, 223, 224, 500])
def test_poolings_round_up_as_published(side):
    network, found = small("fcn8s").to("meta"), {}
    for name in ("fc6", "score", *(f"encoder.{n}" for n in range(5)), "doublings.0", "doublings.1", "upsampling"):
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: found.update({name: output.shape[-1]})
        )
    network(torch.empty(1, 3, side, side, device="meta", dtype=torch.float64))
    expected = side + 198
    for stage in range(5):
        assert found[f"encoder.{stage}"] == expected
        expected = math.ceil(expected / 2)
    assert found["fc6"] == found["score"] == expected - 6
    # The published definition's deconvolutions: stride x (n - 1) + kernel.
    assert found["doublings.0"] == 2 * (expected - 7) + 4
    assert found["doublings.1"] == 2 * (found["doublings.0"] - 1) + 4
    assert found["upsampling"] == 8 * (found["doublings.1"] - 1) + 16


# ---- places ------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("side", [512, 541])
@pytest.mark.parametrize("axis", [2, 3])
def test_scores_lie_where_their_pixels_are(name, side, axis):
    network = centred(small(name, classes=2, width=1 / 512))
    shape = [1, 1, 260, 260]
    shape[axis] = side
    ramp = torch.arange(side, dtype=torch.float64).view([-1 if n == axis else 1 for n in range(4)])
    with torch.inference_mode():
        found = network(ramp.expand(1, 3, *shape[2:])).movedim(axis, 3)[0, 0, 130]
    poolings = [5, 4, 3][: len(SCORES[name])]
    expected = sum(ramp.flatten() + BIAS[number] for number in poolings)
    inner = slice(200, side - 200)
    torch.testing.assert_close(found[inner], expected[inner], rtol=0, atol=1e-9)


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("stride", [2, 8, 16, 32])
def test_upsampling_starts_bilinear_and_keeps_classes_apart(stride, learnt):
    layer = bilinear_upsampling(3, stride, learnt).double()
    assert layer.weight.requires_grad == learnt
    rows, cols = torch.meshgrid(*(torch.arange(5.0, dtype=torch.float64),) * 2, indexing="ij")
    maps = torch.stack([rows, cols, torch.full_like(rows, 7.0)])
    with torch.no_grad():
        found = layer(maps[None])[0]
    # Pixel p of the result lies at (p - stride / 2 + 0.5) / stride - 0.5 of the map.
    places = (torch.arange(6 * stride, dtype=torch.float64) - stride / 2 + 0.5) / stride - 0.5
    inner = (places >= 0) & (places <= 4)
    for plane, expected in zip(found, (places[:, None], places[None], torch.tensor([[7.0]])), strict=True):
        kept = plane[inner][:, inner]
        wanted = expected.expand(len(places), len(places))[inner][:, inner].double()
        torch.testing.assert_close(kept, wanted, rtol=0, atol=1e-6)


# ---- options -----------------------------------------------------------------------------------------------------


@EVERY
def test_ways_of_upsampling_start_alike(name):
    image = torch.randn(1, 3, 40, 33, dtype=torch.float64)
    with torch.inference_mode():
        one, *others = (small(name, upsampling=how)(image) for how in ("published", "frozen", "learnt"))
        assert one.std() > 0
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["fcn16s", "fcn8s"])
def test_networks_trained_at_once_scale_their_pools(name):
    plain, at_once = small(name), small(name, at_once=True)
    image = torch.randn(1, 3, 30, 50, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.allclose(plain(image), at_once(image))
        for score, factor in zip(plain.scores, (0.01, 0.0001), strict=False):
            score.weight *= factor
        torch.testing.assert_close(plain(image), at_once(image), rtol=1e-9, atol=1e-12)


@EVERY
def test_it_can_be_traced_and_prepared(name):
    network = small(name)
    image = torch.randn(1, 3, 31, 45, dtype=torch.float64)
    with torch.inference_mode():
        expected = network(image)
        assert torch.equal(torch.fx.symbolic_trace(network)(image), expected)
        assert torch.equal(prepare(network, "float64")(image), expected)


def test_mistakes_are_named():
    with pytest.raises(ModelError, match="'linear' is not known; use one of published, frozen, learnt"):
        build("fcn8s", upsampling="linear")
    with pytest.raises(ModelError, match="FCN-16s: width 17"):
        build("fcn16s", width=17)
    with pytest.raises(ModelError, match="no argument 'at_once'"):
        build("fcn32s", at_once=True)


@cache
def geometry_of_any(name):
    return geometry_of(small(name, width=0.01), 3)


# ---- tiles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "residue"),
    [*(pytest.param(*each, marks=pytest.mark.slow) for each in (("fcn16s", 7), ("fcn8s", 26))), ("fcn8s", 32)],
)
def test_each_class_of_sizes_is_proved_by_itself(name, residue):
    network = small(name, width=0.01)
    geometry = geometry_of_any(name)
    axes = [replace(axis, sizes=Sizes((residue,), 32)) for axis in geometry.axes]
    proof = prove(network, replace(geometry, rows=axes[0], cols=axes[1]))
    assert proof.ok, proof


@pytest.mark.parametrize(("name", "length"), [("fcn16s", 573), ("fcn8s", 601), ("fcn8s", 608)])
def test_rasters_of_any_size_are_tiled_exactly(name, length):
    geometry = geometry_of_any(name)
    model = model_of(small(name), 3)
    values = scene((37, length), seed=length)
    extended = extended_size(geometry.cols, length)
    assert extended == length
    tile = geometry.cols.tile(64, extended)
    cut = planned(geometry, values.shape[1:], PlanRequest("exact", tile=(37, tile), block=(37, 320)))
    found = tiled_labels(model, cut, values, None, "float64")
    assert (found == whole_labels(model, geometry, values)).all()
    assert len(np.unique(found)) > 1


@pytest.mark.slow
def test_the_published_network_tiles_exactly():
    torch.manual_seed(0)
    model = model_of(build("fcn8s").eval(), 21)
    geometry = geometry_of(model.network, 3)
    values = scene((40, 761), seed=4)
    tile = geometry.cols.tile(256, 761)
    cut = planned(geometry, (40, 761), PlanRequest("exact", tile=(40, tile), block=(40, 761)))
    assert cut.cols.count > 1
    found = tiled_labels(model, cut, values, None, "float64")
    assert (found == whole_labels(model, geometry, values)).all()
    assert len(np.unique(found)) > 1
