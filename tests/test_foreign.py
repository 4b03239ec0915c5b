"""Other libraries' networks: what is derived of them stands in docs/networks.md, and what is derived holds."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from networks_table import DOCUMENT, FOREIGN, HEADER, MODELS, foreign_line, preset_line, written
from reference import model_of, scene, settled, whole_labels
from tiling import planned, some_tile, tiled_labels
from torch import nn

from tilepipe.loading.reference import ModelReference
from tilepipe.plan import PlanRequest
from tilepipe.proof import prove
from tilepipe.trace import first_map, geometry_of

FAST = ("smp.Unet resnet18", "smp.FPN resnet18", "smp.DeepLabV3Plus resnet18", "smp.PSPNet resnet18")
SLOW_PRESETS = ("fcn8s", "fcn16s", "fcn32s")
EXACT = ("smp.Unet resnet18", "smp.Unet tu-convnext_atto", "smp.Linknet mobilenet_v2", "torchvision fcn_resnet50")
REWRITE = "python tests/networks_table.py --write"


def some(names, fast):
    return [pytest.param(name, marks=() if fast(name) else pytest.mark.slow) for name in names]


def library(name):
    pytest.importorskip("segmentation_models_pytorch" if name.startswith("smp") else "torchvision")


def made(name):
    library(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return FOREIGN[name]()


# ---- the document -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some(sorted(MODELS), lambda name: name not in SLOW_PRESETS))
def test_the_document_says_what_is_derived_of_a_preset(name):
    assert preset_line(name) in written("presets"), f"{DOCUMENT} is out of date: {REWRITE}"


@pytest.mark.parametrize("name", some(FOREIGN, FAST.__contains__))
def test_the_document_says_what_is_derived_of_another_librarys_network(name):
    library(name)
    assert foreign_line(name) in written("foreign"), f"{DOCUMENT} is out of date: {REWRITE}"


def test_the_document_has_all_networks_and_no_others():
    for mark, names in (("presets", sorted(MODELS)), ("foreign", list(FOREIGN))):
        lines = written(mark)
        assert tuple(lines[:2]) == HEADER
        assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == names, REWRITE


# ---- what is derived holds ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_the_derived_geometry_is_proved(name):
    network = made(name).eval()
    geometry = geometry_of(network, 3)
    proof = prove(network, geometry)
    assert proof.ok, str(proof)


def small_unet():
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    return smp.Unet("resnet18", encoder_depth=3, encoder_weights=None, decoder_channels=(12, 8, 8), classes=4)


def compare(network, shape, precision="float64"):
    """Labels of tiles and of one pass over the whole."""
    model = model_of(settled(network), 4)
    geometry = geometry_of(model.network, 3)
    values = scene(shape, seed=1)
    cut = planned(geometry, shape, PlanRequest("exact", tile=some_tile(geometry, shape), block=(100, 100)))
    assert cut.tiles > 1
    expected = whole_labels(model, geometry, values)
    assert len(np.unique(expected)) > 2
    return tiled_labels(model, cut, values, None, precision), expected


def test_tiles_of_a_unet_equal_the_whole_image():
    found, expected = compare(small_unet(), (170, 190))
    assert (found == expected).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_tiles_of_full_networks_equal_the_whole_image(name):
    found, expected = compare(made(name), (900, 160))
    assert (found == expected).all()


def balanced(network):
    """The network, its last classifier's bias such that no class wins everywhere, as random weights may let one."""
    with torch.no_grad():
        scores = first_map(network.eval()(torch.randn(1, 3, 128, 128)))
        last = [each for each in network.modules() if isinstance(each, nn.Conv2d) and each.out_channels == 4][-1]
        last.bias -= scores.mean((0, 2, 3))
    return network


def blended(network, shape=(140, 150)):
    model = model_of(balanced(settled(network)), 4)
    geometry = geometry_of(model.network, 3)
    assert not geometry.exact
    cut = planned(geometry, shape, PlanRequest("blend", tile=(128, 128), overlap=48, block=(100, 100)))
    return tiled_labels(model, cut, scene(shape, seed=2), None, "float32")


@pytest.mark.parametrize(
    "name",
    some(
        ("smp.DeepLabV3Plus resnet18", "smp.FPN mobilenet_v2", "torchvision lraspp_mobilenet_v3_large"),
        "smp.DeepLabV3Plus resnet18".__eq__,
    ),
)
def test_networks_without_a_bound_are_blended(name):
    labels = blended(made(name))
    assert labels.shape == (140, 150)
    assert labels.max() < 4, "every pixel has a class"
    assert len(np.unique(labels)) > 1


# ---- by reference -------------------------------------------------------------------------------------------------


def test_a_librarys_network_comes_by_its_name_and_weights(tmp_path):
    network = small_unet().eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "unet.ckpt")
    (tmp_path / "model.toml").write_text("""
model = "segmentation_models_pytorch:Unet"
weights = "unet.ckpt"
classes = ["a", "b", "c", "d"]
mean = [123.675, 116.28, 103.53]
std = [58.395, 57.12, 57.375]
[arguments]
encoder_name = "resnet18"
encoder_depth = 3
decoder_channels = [12, 8, 8]
classes = 4
encoder_weights = "none"
""")
    model = ModelReference(f"{tmp_path}/model.toml:Unet").load()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.network(image), network(image))
    assert [each.name for each in model.card.classes] == ["a", "b", "c", "d"]
