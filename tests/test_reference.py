"""Models by name: bundled, described, exported, made by a factory, spelled in TOML; and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import networks
import pytest
import torch
from reference import model_of
from safetensors.torch import save_file
from torch import nn

from tilepipe.checkpoint import ClassInfo, ModelCard, load_model, save_model
from tilepipe.errors import ModelError
from tilepipe.exported.archive import save_exported
from tilepipe.loading.factory import Factory
from tilepipe.loading.reference import ModelReference, band_names, palette
from tilepipe.models import build

STATISTICS = {"mean": (100.0,), "std": (50.0,)}

CODE = """
import torch
from torch import nn

from beside import WIDTH


class Small(nn.Module):
    def __init__(self, classes=3, bands=3, kernel=3):
        super().__init__()
        self.down = nn.Conv2d(bands, WIDTH, kernel, padding=kernel // 2)
        self.up = nn.Conv2d(WIDTH, classes, 1)

    def forward(self, x):
        return self.up(torch.relu(self.down(x)))


def make(**arguments):
    return Small(**arguments)


def nothing():
    return None


def broken():
    raise ValueError("the weights\\nare gone")


not_callable = 7
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "net.py").write_text(CODE)
    (tmp_path / "beside.py").write_text("WIDTH = 4\n")
    return tmp_path / "net.py"


def refused(*args, **told):
    with pytest.raises(ModelError) as caught:
        ModelReference.parse(*args, **told).load()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


# ---- factories ----------------------------------------------------------------------------------------------------


def test_a_factory_in_a_file_is_found_from_any_folder(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference = ModelReference.parse("net.py:make", arguments=["classes=2", "bands=4"], **STATISTICS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = pickle.loads(pickle.dumps(reference)).load()
    assert [each.name for each in model.card.classes] == ["class0", "class1"]
    assert model.card.bands == ("red", "green", "blue", "nir")
    assert model.card.mean == (100.0,) * 4
    assert model.source == f"{code}:make"
    assert model.card.provenance["arguments"] == {"classes": 2, "bands": 4}
    assert not model.network.training
    assert str(tmp_path) not in sys.path


def test_equal_references_give_equal_models_and_any_difference_another_digest(code, tmp_path):
    def digest(**told):
        return ModelReference.parse(f"{code}:make", **{**STATISTICS, **told}).load().digest

    first = digest()
    torch.manual_seed(99)
    assert digest() == first  # without weights, factories draw the same ones everywhere
    torch.save(Factory(str(code), "make").make({}).state_dict(), tmp_path / "w.pt")
    others = [
        digest(mean="99"),
        digest(classes="a,b,c"),
        digest(arguments={"kernel": 5}),
        digest(resolution="0.5"),
    ]
    code.write_text(CODE.replace("torch.relu", "torch.tanh"))
    others.append(digest())
    assert len({first, *others}) == 6


def test_a_class_in_a_module_is_a_factory():
    reference = ModelReference.parse(
        "torch.nn:Conv2d", arguments={"in_channels": 3, "out_channels": 5, "kernel_size": 3}, **STATISTICS
    )
    model = reference.load()
    assert len(model.card.classes) == 5
    assert model.card.architecture == "torch.nn:Conv2d"


@pytest.mark.parametrize(
    ("factory", "told", "words"),
    [
        ("nothing", {}, "returned NoneType"),
        ("broken", {}, "net.py:27: ValueError: the weights are gone"),
        ("absent", {}, "absent is not there"),
        ("not_callable", {}, "not_callable is not callable"),
        ("make", {"arguments": "depth=3"}, "TypeError"),
        ("make", {"classes": "a,b"}, "gives 3 scores a pixel for 2 classes"),
        ("make", {"bands": "red,green"}, "given 2 bands"),
        ("make", {"mean": "1,2"}, "mean has 2 numbers and the network takes 3 bands"),
        ("make", {"std": "0"}, "each must be above 0"),
        ("make", {"task": "regression", "classes": "a"}, "has no classes"),
        ("make", {"colors": "#ff0000"}, "1 colours are told for 3 classes"),
    ],
)
def test_what_a_factory_gets_wrong_is_told_in_one_line(code, factory, told, words):
    assert words in refused(f"{code}:{factory}", **{**STATISTICS, **told})


def test_code_that_does_not_load_is_told_with_its_line(code):
    code.write_text("import torch\n\ndef make(:\n")
    assert f"{code}:3: " in refused(f"{code}:make", **STATISTICS)
    code.write_text("import torch\nimport no_such_package_at_all\n")
    assert f"{code}:2: ModuleNotFoundError" in refused(f"{code}:make", **STATISTICS)
    code.write_text("raise SystemExit(3)\n")
    assert "SystemExit" in refused(f"{code}:make", **STATISTICS)
    assert "no such Python file" in refused(f"{code}x.py:make", **STATISTICS)
    assert "No module named" in refused("no_such_package_at_all.x:make", **STATISTICS)


def test_files_are_not_run_for_their_name_alone(tmp_path):
    code = tmp_path / "net.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert f"{code}:FACTORY" in refused(code)
    (tmp_path / "model.toml").write_text('model = "net.py:make"\nmean = 1\nstd = 1\n')
    assert "model.toml:make" in refused(tmp_path / "model.toml")
    (tmp_path / "model.toml").write_text(f'model = "os:system"\n[arguments]\ncommand = "touch {tmp_path}/ran"\n')
    assert "names code to run, os:system" in refused(tmp_path / "model.toml")
    assert "os:system" in refused(f"{tmp_path}/model.toml:make")
    assert not (tmp_path / "ran").exists()


def test_statistics_have_no_default(code):
    message = refused(f"{code}:make")
    assert "123.675,116.28,103.53" in message
    assert "58.395,57.12,57.375" in message
    assert "std" in refused(f"{code}:make", mean="1")


def test_a_network_can_be_looked_at_without_statistics(code, tmp_path):
    save_exported(tmp_path / "n.pt2", nn.Conv2d(4, 2, 3))
    (tmp_path / "model.toml").write_text('model = "net.py:make"\n[arguments]\nbands = 7\n')
    found = [
        ModelReference.parse(name, **told).look()
        for name, told in (
            (f"{code}:make", {}),
            (tmp_path / "n.pt2", {}),
            (f"{tmp_path}/model.toml:make", {}),
            ("segnet-basic", {"arguments": {"width": 0.05}, "bands": 5}),
            ("synthetic-landcover", {}),
        )
    ]
    assert [bands for _, bands, _ in found] == [3, 4, 7, 5, 3]
    assert [card is not None for _, _, card in found] == [False] * 4 + [True]
    assert not any(network.training for network, _, _ in found)


def test_a_regression_has_no_classes(code):
    model = ModelReference.parse(f"{code}:make", task="regression", **STATISTICS).load()
    assert (model.card.task, model.card.classes) == ("regression", ())


# ---- TOML and texts -----------------------------------------------------------------------------------------------

TOML = """
model = "net.py:make"
weights = "w.pt"
classes = ["land", "water"]
colors = ["#0a141e", [1, 2, 3]]
bands = ["nir", "red"]
mean = [10, 20.5]
std = [1, 2]
resolution = 0.3
[arguments]
classes = 2
bands = 2
"""


def test_a_toml_file_spells_it_all(code, tmp_path, monkeypatch):
    (tmp_path / "model.toml").write_text(TOML)
    network = Factory(str(code), "make").make({"classes": 2, "bands": 2})
    with torch.no_grad():
        network.up.bias.fill_(0.625)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    reference = ModelReference("model.toml:make")
    monkeypatch.chdir("/")
    model = reference.load()
    assert model.card.classes == (ClassInfo("land", (10, 20, 30)), ClassInfo("water", (1, 2, 3)))
    assert (model.card.bands, model.card.mean, model.card.std) == (("nir", "red"), (10.0, 20.5), (1.0, 2.0))
    assert model.card.resolution == 0.3
    assert model.network.up.bias.tolist() == [0.625, 0.625]
    over = ModelReference.parse(tmp_path / "model.toml:make", classes="a,b").load()
    assert [each.name for each in over.card.classes] == ["a", "b"]
    texts = ModelReference.parse(
        "net.py:make" if Path.cwd() == tmp_path else f"{code}:make",
        weights=str(tmp_path / "w.pt"),
        classes="land, water",
        colors="#0a141e,#010203",
        bands="nir,red",
        mean="10,20.5",
        std="1,2",
        resolution="0.3",
        arguments=["classes=2", "bands=2"],
    )
    assert texts.load().digest == model.digest
    assert ModelReference.parse(str(tmp_path / "model.toml:make")) == texts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model = 3",
        "model = ",
        'model = "a.toml"',
        'model = "segnet"\nhook = "x"',
        'model = "segnet"\nclasses = true',
        'model = "segnet"\nclasses = -4',
        'model = "segnet"\nclasses = [1, 2]',
        'model = "segnet"\nmean = "a,b"',
        'model = "segnet"\nmean = [nan]',
        'model = "segnet"\ncolors = [[1, 2]]',
        'model = "segnet"\ncolors = "red"',
        'model = "segnet"\ntask = "detection"',
        'model = "segnet"\nweights = 5',
        'model = "segnet"\nweights = "none.pt"',
        'model = "segnet"\narguments = 5',
        'model = "segnet"\nresolution = [2, 1]',
        'model = "segnet"\nresolution = [1, 2, 3]',
        "model = " + "[" * 5000,
        "\xff\x00",
        "#" * 2**21,
    ],
)
def test_broken_toml_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "model.toml"
    path.write_bytes(text.encode("latin-1"))
    assert str(path) in refused(path) or "none.pt" in text


def test_names_and_colours_by_default():
    assert band_names(1) == ("gray",)
    assert band_names(3) == ("red", "green", "blue")
    assert len(set(palette(40))) == 40


# ---- presets and files that describe themselves -------------------------------------------------------------------


def a_card():
    return ModelCard(
        "segnet-basic",
        {"classes": 2, "bands": 3, "width": 0.05},
        (ClassInfo("land", (1, 2, 3)), ClassInfo("sea", (4, 5, 6))),
        ("red", "green", "blue"),
        (1.0, 2.0, 3.0),
        (1.0, 1.0, 1.0),
        "0",
        None,
        "MIT",
        {},
    )


def test_an_architecture_takes_weights_and_says_what_it_is(tmp_path):
    network = build("segnet-basic", classes=2, bands=4, width=0.05)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    told = {"weights": str(tmp_path / "w.safetensors"), "arguments": {"width": 0.05}, "bands": 4, "classes": "a,b"}
    model = ModelReference.parse("segnet-basic", **told, **STATISTICS).load()
    assert model.card.arguments == {"width": 0.05, "classes": 2, "bands": 4}
    assert torch.equal(model.network.classifier.weight, network.classifier.weight)
    save_model(tmp_path / "m.safetensors", model.network, model.card)
    assert load_model(tmp_path / "m.safetensors").card == model.card
    assert "without weights" in refused("segnet-basic", **STATISTICS)
    assert "width" in refused("segnet-basic", **{**told, "arguments": {"width": "wide"}}, **STATISTICS)
    assert "takes no argument 'depth'" in refused("segnet-basic", **{**told, "arguments": {"depth": 1}}, **STATISTICS)


def test_files_that_describe_themselves_refuse_contradictions(tmp_path):
    path, exported = tmp_path / "m.safetensors", tmp_path / "m.pt2"
    save_model(path, build("segnet-basic", classes=2, bands=3, width=0.05), a_card())
    save_exported(exported, nn.Conv2d(3, 2, 3, padding=1), a_card())
    assert ModelReference.parse("synthetic-landcover").load().card.bands == ("red", "green", "blue")
    for file in (path, exported):
        same = ModelReference.parse(file, classes="land,sea", bands=3, mean="1,2,3", task="segmentation").load()
        assert same.card == a_card()
        for told in ({"classes": "a,b"}, {"bands": 4}, {"std": "2"}, {"task": "regression"}, {"resolution": 1}):
            (key,) = told
            assert f"drop the option for its {key}" in refused(file, **told)
        assert "weights" in refused(file, weights="w.pt")
    assert ModelReference.parse(path).load().digest == load_model(path).digest


def test_files_that_are_no_models_say_what_they_need(tmp_path):
    network = nn.Conv2d(3, 2, 1)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    assert "--weights w.pth" in refused(tmp_path / "w.pth")
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    assert "--weights" in refused(tmp_path / "w.safetensors")
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 8, 8)), str(tmp_path / "s.pt"))
    assert "TorchScript" in refused(tmp_path / "s.pt")
    (tmp_path / "s.pt").rename(tmp_path / "s.pt2")
    assert "torch.export.save" in refused(tmp_path / "s.pt2")
    assert "no such model file" in refused(tmp_path / "none")


def test_an_exported_program_is_described_by_options(tmp_path):
    torch.manual_seed(0)
    network = networks.SkipNet()
    save_exported(tmp_path / "n.pt2", network)
    model = ModelReference.parse(tmp_path / "n.pt2", classes="a,b,c", **STATISTICS).load()
    assert [each.name for each in model.card.classes] == ["a", "b", "c"]
    image = torch.randn(1, 2, 32, 48)
    assert torch.equal(model.network(image), network.eval()(image))
    assert "takes 2 bands and 3 are named" in refused(tmp_path / "n.pt2", bands=3, **STATISTICS)
    assert "drop --weights" in refused(tmp_path / "n.pt2", weights="x", **STATISTICS)


# ---- weights ------------------------------------------------------------------------------------------------------


def test_nested_and_prefixed_state_dictionaries_fit(code, tmp_path):
    network = Factory(str(code), "make").make({})
    state = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    shapes = [
        state,
        {"state_dict": state, "epoch": 3},
        {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "optimizer": {"lr": 0.1}},
        {"state_dict": {f"model.module.{name}": tensor for name, tensor in state.items()}},
    ]
    found = []
    for number, each in enumerate(shapes):
        path = tmp_path / f"{number}.pth"
        torch.save(each, path)
        found.append(ModelReference.parse(f"{code}:make", weights=path, **STATISTICS).load().network.state_dict())
    for each in found:
        assert all(torch.equal(each[name], state[name]) for name in state)


def test_weights_that_do_not_fit_are_named(code, tmp_path):
    state = Factory(str(code), "make").make({}).state_dict()
    path = tmp_path / "w.pth"

    def message(changed):
        torch.save(changed, path)
        return refused(f"{code}:make", weights=path, **STATISTICS)

    assert "lacks tensor up.bias" in message({name: each for name, each in state.items() if name != "up.bias"})
    assert "has tensor more too many" in message({**state, "more": torch.zeros(1)})
    assert "up.bias has shape [9], the network needs [3]" in message({**state, "up.bias": torch.zeros(9)})
    assert "up.bias holds values that are not finite" in message({**state, "up.bias": torch.full((3,), torch.nan)})
    assert "up.bias has type torch.int64" in message({**state, "up.bias": torch.zeros(3, dtype=torch.int64)})
    assert "without tensors" in message({"epoch": 3})
    assert "without tensors" in message([1, 2])


def test_a_reference_loads_in_another_process(code, tmp_path):
    reference = ModelReference.parse(f"{code}:make", **STATISTICS)
    (tmp_path / "r.pickle").write_bytes(pickle.dumps(reference))
    program = (
        "import json, pickle, sys; m = pickle.load(open(sys.argv[1], 'rb')).load(); "
        "print(json.dumps([m.digest, m.source]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "r.pickle")],
        capture_output=True, text=True, check=True, cwd="/", env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    model = reference.load()
    assert json.loads(run.stdout) == [model.digest, model.source]


def test_models_in_memory_need_no_reference():
    assert model_of(nn.Conv2d(3, 2, 1), 2).card.task == "segmentation"
