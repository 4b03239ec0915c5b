"""SegNet and SegNet-Basic, in all their forms, against the same networks in numpy; the table of names."""

from __future__ import annotations

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from presets import PRESETS, layers_of
from torch import nn

from tilepipe.errors import GeometryError, ModelError
from tilepipe.models import MODELS, build
from tilepipe.models.layers import UPSAMPLINGS, check_sides
from tilepipe.models.segnet_basic import deconvolution, start_bilinear

BASICS = sorted(name for name in MODELS if "basic" in name or name == "bilinear-interpolation")


def small(name: str, **arguments: object) -> nn.Module:
    """A small network in float64 whose batch normalisation is not the identity."""
    return plain.unsettled(build(name, **{"classes": 5, "width": 0.06, **arguments}))


def an_image(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape)


def scores(network: nn.Module, image: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return network(torch.from_numpy(image)[None])[0].numpy()


# ---- against numpy -----------------------------------------------------------------------------------------------


def plain_segnet(network, x: np.ndarray, how: str, addition: bool = False) -> np.ndarray:
    """The scores of a SegNet or SegNet-Basic, from its layers alone."""
    up = {
        "unpool": plain.unpool,
        "nearest": lambda x, _: plain.repeat(x),
        "bilinear": lambda x, _: plain.interpolate(x),
    }
    places, added = [], []
    for stage in network.encoder:
        x = plain.run(x, stage)
        added.append(x)
        x, where = plain.pool(x)
        places.append(where)
    for stage in network.decoder:
        x = plain.run(up[how](x, places.pop()), stage)
        x = x + added.pop() if addition else x
    return plain.convolve(x, network.classifier)


@pytest.mark.parametrize("how", UPSAMPLINGS)
def test_segnet_is_the_plain_network(how: str):
    network, image = small("segnet", upsample=how), an_image(3, 32, 64)
    np.testing.assert_allclose(scores(network, image), plain_segnet(network, image, how), atol=1e-9)


@pytest.mark.parametrize("name", [name for name in BASICS if name.startswith("segnet")])
def test_segnet_basic_is_the_plain_network(name: str):
    network, image = small(name), an_image(3, 32, 48)
    expected = plain_segnet(network, image, "unpool", addition="addition" in name)
    np.testing.assert_allclose(scores(network, image), expected, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in BASICS if not name.startswith("segnet")])
def test_fcn_basic_is_the_plain_network(name: str):
    """The compressed last pooling, four times doubled, plus the compressed pooling of the same size where it adds."""
    network, image = small(name), an_image(3, 32, 48)
    for layer in network.decoder.parameters():
        layer.data += 0.05 * torch.randn_like(layer)
    maps, x = [], image
    for stage in network.encoder:
        x = plain.pool(plain.run(x, stage))[0]
        maps.append(x)
    adds = name in ("fcn-basic", "fcn-basic-nodimreduction")
    maps = [plain.apply(x, layer) for x, layer in zip(maps if adds else maps[-1:], network.compress, strict=True)]
    x = maps.pop()
    for layer in network.decoder:
        x = plain.apply(x, layer)
        x = x + maps.pop() if maps else x
    expected = plain.apply(x, network.classifier)
    np.testing.assert_allclose(scores(network, image), expected, atol=1e-9)


def test_deconvolutions_start_as_bilinear_interpolation():
    layer = deconvolution(3).double()
    nn.init.zeros_(layer.bias)
    start_bilinear(layer)
    x = torch.randn(1, 3, 9, 11, dtype=torch.float64)
    with torch.inference_mode():
        found, expected = layer(x), F.interpolate(x, scale_factor=2, mode="bilinear")
    assert torch.allclose(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-12)
    bilinear, learnt = (
        build(name, classes=3, width=0.1) for name in ("bilinear-interpolation", "fcn-basic-noaddition")
    )
    learnt.load_state_dict(bilinear.state_dict(), strict=False)
    assert not list(bilinear.decoder.parameters())
    assert learnt.decoder[0].weight.count_nonzero() == 3 * 4 * 4


def test_switches_and_repetition_share_their_weights_and_differ_in_scores():
    networks = {how: small("segnet", upsample=how) for how in UPSAMPLINGS}
    image = an_image(3, 32, 64)
    for network in networks.values():
        network.load_state_dict(networks["unpool"].state_dict())
    found = [scores(network, image) for network in networks.values()]
    assert not np.allclose(found[0], found[1])
    assert not np.allclose(found[1], found[2])
    with pytest.raises(ModelError, match=r"'cubic'.*unpool, nearest, bilinear"):
        build("segnet", upsample="cubic")


# ---- what all share ----------------------------------------------------------------------------------------------


def test_segnet_encodes_as_vgg16():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        assert layers_of(torchvision.models.vgg16_bn().features) == layers_of(build("segnet").encoder)


@pytest.mark.parametrize("name", sorted({*BASICS, "segnet", "lenet", "dilated-fcn"}))
@pytest.mark.parametrize("width", [0.01, 0.125, 0.5])
def test_width_scales_every_layer(name: str, width: float):
    with torch.device("meta"):
        narrow, full = (build(name, classes=7, bands=4, width=chosen).parameters() for chosen in (width, 1.0))
    for one, other in zip(narrow, full, strict=True):
        for found, published in zip(one.shape[:2], other.shape[:2], strict=True):
            assert found in (published, max(1, round(published * width)))
    assert layers_of(build(name, classes=7, bands=4, width=0.01))[0].split()[-1] == "4>1"


def test_sides_of_nothing_are_refused():
    with pytest.raises(GeometryError, match=r"no name cannot take 0 rows; legal are multiples of 16, nearest 16$"):
        check_sides((1, 3, 0, 16), "no name", 16)
    with pytest.raises(GeometryError, match=r"12 columns; legal are 61 \+ 16n, nearest 61$"):
        check_sides((1, 3, 61, 12), "no name", 16, 61)


def test_mistakes_are_named():
    with pytest.raises(ModelError, match=r"unknown architecture 'unet'.*segnet, segnet-basic"):
        build("unet")
    with pytest.raises(ModelError, match=r"no argument 'depth'.*classes, bands, width"):
        build("segnet", depth=3)


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"linear"}))
def test_numbers_that_no_network_can_have_are_refused(name: str):
    wrong = [{"width": 0}, {"width": float("nan")}, {"width": 17}, {"bands": -1}]
    wrong += [] if name == "autoencoder" else [{"classes": 0}]
    for arguments in wrong:
        with pytest.raises(ModelError, match=r"legal|cannot"), torch.device("meta"):
            build(name, **arguments)
