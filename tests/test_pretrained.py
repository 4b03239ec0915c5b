"""Networks started from VGG16 against torchvision's own: feature maps, fully connected layers, bands, bad files."""

from __future__ import annotations

import pickle
import re
import sys
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from tilepipe.errors import ModelError
from tilepipe.models import build
from tilepipe.models.pretrained import Start, for_bands, start_from_vgg16

torchvision = pytest.importorskip("torchvision")

NORMALISED = {False: "vgg16", True: "vgg16_bn"}


def drawn(module, seed):
    """A module of the meta device on the CPU, random but for scale; batch statistics off their defaults."""
    module = module.to_empty(device="cpu").eval()
    random = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            read = part.weight[0].numel()
            part.weight.data.uniform_(-((6 / read) ** 0.5), (6 / read) ** 0.5, generator=random)
            part.bias.data.uniform_(-0.1, 0.1, generator=random)
        elif isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight.data, part.running_var):
                tensor.uniform_(0.5, 1.5, generator=random)
            for tensor in (part.bias.data, part.running_mean):
                tensor.uniform_(-0.2, 0.2, generator=random)
    return module


@pytest.fixture(scope="module")
def features():
    """torchvision's convolutions, random: without and with batch normalisation."""
    with torch.device("meta"):
        made = {normalised: getattr(torchvision.models, name)().features for normalised, name in NORMALISED.items()}
    return {normalised: drawn(module, 1) for normalised, module in made.items()}


@pytest.fixture(scope="module")
def files(features, tmp_path_factory):
    """Their state dictionaries, without the classifier: the plain one as .pth, the other as .safetensors."""
    folder = tmp_path_factory.mktemp("weights")
    state = {key: {f"features.{k}": v for k, v in part.state_dict().items()} for key, part in features.items()}
    torch.save(state[False], folder / "vgg16.pth")
    safetensors.torch.save_file(state[True], folder / "vgg16_bn.safetensors")
    return {False: folder / "vgg16.pth", True: folder / "vgg16_bn.safetensors"}


def narrow(name, **options):
    """A network of full encoder, with as little as can be behind it."""
    more = {} if name.startswith("segnet") else {"fc_width": 8}
    torch.manual_seed(0)
    return build(name, **{"classes": 2, **more, **options}).eval()


def pooled(stages, x):
    """What each pooling of an encoder returns."""
    found = []
    for stage in stages:
        x = F.max_pool2d(stage(x), 2, 2)
        found.append(x)
    return found


def torchvisions(module, x):
    """What each pooling of torchvision's features returns."""
    found = []
    for layer in module:
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d):
            found.append(x)
    return found


def same(found, expected):
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        assert float(other.std()) > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


# ---- feature maps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["segnet", "deconvnet"])
def test_encoders_with_normalisation_give_torchvisions_feature_maps(name, features, files):
    network = narrow(name)
    start = start_from_vgg16(network, files[True])
    image = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        same(pooled(network.encoder, image), torchvisions(features[True], image))
    assert len(start.filled) == 13 * 2 + 13 * 4
    assert not start.adapted
    assert not any(item.startswith("encoder") for item in start.left)


@pytest.mark.parametrize(("name", "normalised"), [("fcn32s", False), ("fcn8s", True)])
def test_encoders_without_normalisation_give_torchvisions_feature_maps(name, normalised, features, files):
    network = narrow(name)
    start = start_from_vgg16(network, files[normalised])
    image = torch.randn(1, 3, 26, 26)
    with torch.inference_mode():
        same(pooled(network.encoder, image), torchvisions(features[normalised], F.pad(image, (99, 99, 99, 99))))
    assert len(start.filled if not normalised else start.adapted) == 13 * 2
    assert any("folded" in note for note in start.notes) == normalised


def test_normalised_encoders_get_convolutions_from_plain_weights(features, files):
    network = narrow("segnet")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    start = start_from_vgg16(network, files[False])
    plain = [layer for layer in features[False] if isinstance(layer, nn.Conv2d)]
    ours = [layer for layer in network.encoder.modules() if isinstance(layer, nn.Conv2d)]
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.bias, other.bias)
    after = network.state_dict()
    assert set(start.filled) | set(start.left) == {name for name in after if "num_batches" not in name}
    assert all(torch.equal(after[name], before[name]) for name in start.left)
    assert not any(torch.equal(after[name], before[name]) for name in start.filled)
    assert sum(name.startswith("encoder") for name in start.left) == 13 * 4
    assert any("batch normalisation" in note for note in start.notes)


def test_extra_stages_stay_as_they_were(files):
    network = narrow("deconvnet", extra_stages=1, size=64)
    start = start_from_vgg16(network, files[True])
    assert {name.split(".")[1] for name in start.filled} == {"0", "1", "2", "3", "4"}
    assert any(name.startswith("encoder.5") for name in start.left)


# ---- bands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bands"), [("segnet", 1), ("segnet", 6), ("fcn8s", 4)])
def test_a_grey_image_gives_the_same_feature_maps_in_any_number_of_bands(name, bands, features, files):
    network = narrow(name, bands=bands)
    normalised = name == "segnet"
    start = start_from_vgg16(network, files[normalised])
    grey = torch.randn(1, 1, 64, 64) if normalised else torch.randn(1, 1, 26, 26)
    padded = grey if normalised else F.pad(grey, (99, 99, 99, 99))
    with torch.inference_mode():
        found = pooled(network.encoder, grey.expand(-1, bands, -1, -1))
        same(found, torchvisions(features[normalised], padded.expand(-1, 3, -1, -1)))
    assert start.adapted == ("encoder.0.0.weight",)
    assert any(f"{bands} bands" in note for note in start.notes)


def test_filters_for_bands():
    weight = torch.rand(5, 3, 3, 3)
    red, green, blue = weight.unbind(1)
    assert torch.equal(for_bands(weight, 3), weight)
    assert torch.equal(for_bands(weight, 1)[:, 0], weight.sum(1))
    torch.testing.assert_close(for_bands(weight, 2), torch.stack([red, green], 1) * 1.5)
    extra = (red + green + blue) / 3
    torch.testing.assert_close(for_bands(weight, 5), torch.stack([red, green, blue, extra, extra], 1) * 0.6)


# ---- fully connected layers --------------------------------------------------------------------------------------


def check_connected(name, normalised, image, padded):
    """fc6's and fc7's convolutions on an image, against torchvision's fully connected layers."""
    with torch.device("meta"):
        whole = getattr(torchvision.models, NORMALISED[normalised])()
        network = build(name, classes=2).eval()
    whole, network = drawn(whole, 2), network.to_empty(device="cpu")
    taken = {}
    given = whole.state_dict()
    start = start_from(network, given)
    for part in ("fc6", "fc7"):
        network.get_submodule(part)[0].register_forward_hook(
            lambda _module, _inputs, output, part=part: taken.update({part: output.clone()})
        )
    with torch.inference_mode():
        x = image
        for stage in network.encoder:
            x = F.max_pool2d(stage(x), 2, 2)
        network.fc6[0](x)
        network.fc7[0](taken["fc6"].relu())
        features = whole.avgpool(whole.features(padded)).flatten(1)
        first = whole.classifier[0](features)
        second = whole.classifier[3](first.relu())
    for found, expected in ((taken["fc6"], first), (taken["fc7"], second)):
        assert found.shape == (1, 4096, 1, 1)
        torch.testing.assert_close(found.flatten(1), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert {"fc6.0.weight", "fc6.0.bias", "fc7.0.weight", "fc7.0.bias"} <= set(start.filled)


def start_from(network, state) -> Start:
    """What `start_from_vgg16` returns for a state dictionary in memory, as torchvision would deliver it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
        return start_from_vgg16(network, "DEFAULT")


def test_fcns_connected_layers_are_torchvisions():
    image = torch.randn(1, 3, 26, 26)
    check_connected("fcn32s", False, image, F.pad(image, (99, 99, 99, 99)))


@pytest.mark.slow
def test_deconvnets_connected_layers_are_torchvisions():
    image = torch.randn(1, 3, 224, 224)
    check_connected("deconvnet", True, image, image)


def meta_state(name):
    """A state dictionary of torchvision's shapes, its convolutions zero and its linear layers one value."""
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    return {
        key: torch.zeros(()).expand(value.shape) if "classifier" in key else torch.zeros(value.shape)
        for key, value in state.items()
    }


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ({"fc_width": 16}, ["fc6 left.* 16 x 512 x 7 x 7, VGG16's 4096 x 512 x 7 x 7", "fc7 left.* 16 x 16 x 1 x 1"]),
        ({"fc_width": 8, "size": 64}, ["fc6 left.* 8 x 512 x 2 x 2", "fc7 left"]),
    ],
)
def test_connected_layers_of_other_shapes_are_left_with_a_note(options, notes):
    network = narrow("deconvnet", **options)
    start = start_from(network, meta_state("vgg16_bn"))
    assert not any(name.startswith("fc") for name in start.filled)
    assert len(start.notes) == len(notes)
    for note, expected in zip(start.notes, notes, strict=True):
        assert re.search(expected, note)
    assert str(start).splitlines()[0].startswith("from DEFAULT: 78 tensors filled, 0 adapted")


def test_connected_layers_that_are_not_finite_are_left_with_a_note():
    state = meta_state("vgg16")
    for number in (0, 3, 6):
        weight = f"classifier.{number}.weight"
        state[weight] = torch.tensor(float("nan")).expand(state[weight].shape)
    start = start_from(narrow("fcn32s"), state)
    assert sum("no usable fully connected" in note for note in start.notes) == 2
    assert len(start.filled) == 26


# ---- torchvision's names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "name", "url"),
    [
        ("segnet", "DEFAULT", "vgg16_bn-"),
        ("fcn32s", "DEFAULT", "vgg16-"),
        ("fcn32s", "VGG16_BN_Weights.IMAGENET1K_V1", "vgg16_bn-"),
        ("segnet", "VGG16_Weights.IMAGENET1K_FEATURES", "vgg16_features-"),
        ("segnet", "IMAGENET1K_V1", "vgg16_bn-"),
    ],
)
def test_names_stand_for_torchvisions_files(network, name, url, monkeypatch):
    asked = []

    def fetch(address, **_):
        asked.append(address)
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with pytest.raises(ModelError, match=r"^weights \S+ cannot be downloaded: .*no route.* give the file$"):
        start_from_vgg16(narrow(network), name)
    assert len(asked) == 1
    assert url in asked[0]


def test_a_missing_torchvision_is_told(monkeypatch, files):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ModelError, match="torchvision, which is not installed; install it, or give a file"):
        start_from_vgg16(narrow("fcn8s"), "DEFAULT")
    start_from_vgg16(narrow("fcn8s"), files[False])


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("segnet", {"width": 0.5}, "SegNet's encoder is not VGG16 of width 1; legal are SegNet, DeconvNet and FCN"),
        ("segnet-basic", {}, "SegNetBasic's encoder is not VGG16"),
        ("linear", {}, "Linear has no VGG16 encoder"),
    ],
)
def test_networks_without_that_encoder_are_refused(name, options, message, files):
    with pytest.raises(ModelError, match=message):
        start_from_vgg16(build(name, classes=2, **options), files[True])


class Hostile:
    """A pickle that would run code when it is read."""

    def __reduce__(self):
        return (print, ("code was run",))


@pytest.fixture(scope="module")
def bad(files, tmp_path_factory):
    """Files that hold no weights of VGG16, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("bad")
    state = torch.load(files[False], weights_only=True)

    def saved(name, content):
        torch.save(content, folder / name)
        return folder / name

    def written(name, content):
        (folder / name).write_bytes(content)
        return folder / name

    first = "features.0.weight"
    return {
        "hostile": saved("hostile.pth", {"a": Hostile()}),
        "hostile legacy": written("legacy.pth", pickle.dumps(Hostile(), 2)),
        "cut": written("cut.pth", files[False].read_bytes()[:5000]),
        "cut safetensors": written("cut.safetensors", files[True].read_bytes()[:5000]),
        "huge header": written("huge.safetensors", (2**60).to_bytes(8, "little") + b"{}"),
        "empty": written("empty.pth", b""),
        "empty safetensors": written("empty.safetensors", b""),
        "text": written("text.pth", b"no weights at all\n"),
        "list": saved("list.pth", [torch.zeros(1)]),
        "nested": saved("nested.pth", {"state_dict": {"features.0.weight": torch.zeros(1)}}),
        "other network": saved("other.pth", {"conv1.weight": torch.zeros(64, 3, 7, 7)}),
        "wrong shape": saved("shape.pth", {**state, first: torch.zeros(64, 4, 3, 3)}),
        "no bias": saved("bias.pth", {k: v for k, v in state.items() if k != "features.2.bias"}),
        "not finite": saved("nan.pth", {**state, first: torch.full((64, 3, 3, 3), torch.nan)}),
        "missing": folder / "missing.pth",
        "folder": folder,
        "unknown name": "RESNET_Weights.DEFAULT",
    }


@pytest.fixture(scope="module")
def untouched():
    """A network, and its tensors as they were."""
    network = narrow("fcn32s")
    return network, {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        *[(what, "is not a usable file of weights") for what in ("hostile", "hostile legacy", "cut", "empty", "text")],
        *[(f"{what} safetensors", "is not a usable safetensors file") for what in ("cut", "empty")],
        ("huge header", "is not a usable safetensors file"),
        *[(what, "holds no state dictionary") for what in ("list", "nested")],
        *[(what, "is not VGG16") for what in ("other network", "wrong shape", "no bias")],
        ("not finite", "not finite"),
        *[(what, "no such file") for what in ("missing", "folder")],
        ("unknown name", "legal are VGG16_Weights.IMAGENET1K_V1, .*VGG16_BN_Weights"),
    ],
)
def test_bad_weights_end_in_one_line_and_change_nothing(what, message, bad, untouched, capfd):
    network, before = untouched
    with pytest.raises(ModelError, match=message) as caught:
        start_from_vgg16(network, bad[what])
    assert "\n" not in str(caught.value)
    assert "code was run" not in capfd.readouterr().out
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
