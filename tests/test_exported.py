"""Exported programs: equal to their networks, respectful of sizes, and never executed, however hostile."""

from __future__ import annotations

import copy
import json
import pickle
import random
import zipfile

import networks
import pytest
import torch
from archives import CONSTANTS, GRAPH, WEIGHTS, Touch, parts_of, pickled, with_json, write_archive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tilepipe.errors import GeometryError, ModelError
from tilepipe.exported.archive import load_exported, save_exported
from tilepipe.exported.conditions import Extent, evaluate, parsed
from tilepipe.exported.operators import resolve
from tilepipe.loading.reference import ModelReference
from tilepipe.predict.prepare import prepare
from tilepipe.proof import prove
from tilepipe.trace import first_map, geometry_of

ZOO = {
    "skip": (64, 96),
    "segnet-basic": (64, 96),
    "valid-unet": (64, 96),
    "bilinear": (64, 96),
    "in-place": (64, 96),
    "last-dims": (64, 96),
    "two-outputs": (64, 96),
    "reflecting": (64, 96),
    "autoencoder": (77, 93),
    "ceil-mode": (64, 96),
    "gaps": (48, 96),
    "nearest": (48, 96),
    "aligned-odd": (65, 97),
}
FAST = ("skip", "in-place", "two-outputs")


@pytest.fixture(scope="module")
def skip(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "skip.pt2"
    save_exported(path, networks.seeded(networks.SkipNet))
    return path


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in ZOO])
def test_an_archive_runs_as_its_network_does(tmp_path, name):
    make, channels = networks.EXACT[name]
    network = networks.seeded(make).eval()
    save_exported(tmp_path / "n.pt2", network, size=ZOO[name])
    program, card = load_exported(tmp_path / "n.pt2")
    assert card is None
    image = torch.randn(1, channels, *ZOO[name])
    assert torch.equal(program(image), first_map(network(image)))
    for precision in ("float32", "float64", "bf16"):
        ours, its = prepare(program, precision), prepare(network, precision)
        assert (ours.folded, ours.unfolded, ours.channels_last) == (its.folded, its.unfolded, its.channels_last)
        torch.testing.assert_close(ours(image), its(image), rtol=1e-5, atol=1e-5)
    found, original = geometry_of(program, channels), geometry_of(network, channels)
    for ours, its in zip(found.axes, original.axes, strict=True):
        assert (ours.reach, ours.alignment, ours.scale, ours.offset) == (
            its.reach,
            its.alignment,
            its.scale,
            its.offset,
        )
        assert all(its.sizes.legal(n) for n in range(1, 300) if ours.sizes.legal(n))
    assert torch.equal(copy.deepcopy(program)(image), program(image))


@pytest.mark.slow
def test_an_archives_geometry_is_proved(skip):
    program, _ = load_exported(skip)
    assert prove(program, geometry_of(program, 2)).ok


def test_exported_sizes_are_the_legal_ones(tmp_path):
    rows, cols = torch.export.Dim("rows", min=2, max=2000), torch.export.Dim("cols", min=3, max=2000)
    network = networks.SkipNet().eval()
    shapes = ({2: 16 * rows, 3: 8 * cols},)
    program = torch.export.export(network, (torch.randn(1, 2, 64, 96),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "n.pt2")
    found, _ = load_exported(tmp_path / "n.pt2")
    geometry = geometry_of(found, 2)
    assert geometry.cols == geometry.rows  # sought with squares, where all layers treat both axes alike
    assert str(geometry.rows.sizes) == "32 + 16n"
    assert geometry.exact
    assert geometry.rows.reach == geometry_of(network, 2).rows.reach
    with pytest.raises(GeometryError, match="cannot take 40 rows; legal: in steps of 16 from 32"):
        found(torch.zeros(1, 2, 40, 96))
    with pytest.raises(GeometryError, match="cannot take 3 bands"):
        found(torch.zeros(1, 3, 64, 96))


def test_a_program_of_fixed_size_has_one_legal_size(tmp_path):
    torch.export.save(torch.export.export(networks.SkipNet().eval(), (torch.randn(1, 2, 64, 96),)), tmp_path / "n.pt2")
    geometry = geometry_of(load_exported(tmp_path / "n.pt2")[0], 2)
    assert (str(geometry.rows.sizes), str(geometry.cols.sizes)) == ("64 only", "96 only")
    assert not geometry.exact


def test_a_network_that_refuses_sizes_is_exported_with_its_refusals(tmp_path):
    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x):
            if x.shape[2] % 12 or x.shape[3] % 12:
                raise ValueError("no")
            return self.a(x)

    save_exported(tmp_path / "n.pt2", Checked(), size=(48, 96))
    assert str(geometry_of(load_exported(tmp_path / "n.pt2")[0], 1).rows.sizes) in {"12n", "12 + 12n", "24 + 12n"}


def test_layers_keep_their_names(tmp_path):
    class Global(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1))

        def forward(self, x):
            return x + self.body(x).mean(1, keepdim=True)

    save_exported(tmp_path / "n.pt2", Global())
    geometry = geometry_of(load_exported(tmp_path / "n.pt2")[0], 1)
    assert "body/1/adaptive_avg_pool2d" in (geometry.obstacle or "")


# ---- hostile archives ---------------------------------------------------------------------------------------------


def _sample_inputs(parts, marker):
    return {**parts, "data/sample_inputs/model.pt": pickled(((Touch(marker),), {}))}


def _pickled_weight(parts, marker):
    changed = with_json(parts, WEIGHTS, lambda told: told["config"]["a.weight"].update(use_pickle=True))
    return {**changed, "data/weights/weight_0": pickled(Touch(marker))}


def _custom_object(parts, marker):
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    changed = with_json(parts, CONSTANTS, lambda told: told["config"].update(thing=entry))
    return {**changed, "data/constants/opaque_obj_0": pickle.dumps(Touch(marker))}


def _size_expression(parts, marker):
    code = f"__import__('os').system('touch {marker}')"

    def change(told):
        told["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][2]["as_expr"]["expr_str"] = code

    return with_json(parts, GRAPH, change)


def _guard(parts, marker):
    code = f"__import__('os').system('touch {marker}') == 0"
    return with_json(parts, GRAPH, lambda told: told.update(guards_code=[code]))


HOSTILE = {
    "sample inputs": _sample_inputs,
    "a pickled weight": _pickled_weight,
    "a custom object": _custom_object,
    "a size that is code": _size_expression,
    "a condition that is code": _guard,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_run_in_torch_and_not_here(tmp_path, skip, name):
    marker, path = tmp_path / "ran", tmp_path / "skip.pt2"
    write_archive(path, HOSTILE[name](parts_of(skip), marker))
    refuse(path)
    assert not marker.exists()
    try:  # the attack is real: torch's own loader runs it
        torch.export.load(path).module()(torch.zeros(1, 2, 64, 96))
    except Exception as error:
        print(f"torch went on to raise {error}")
    assert marker.exists()


def refuse(path):
    with pytest.raises(ModelError) as caught:
        ModelReference.parse(path, mean="1", std="1").load()
    message = str(caught.value)
    assert message.startswith(str(path)), message
    assert "\n" not in message
    assert len(message) < 600
    return message


def _call(target, **arguments):
    """A change of the graph: its first call becomes another."""

    def change(told):
        node = told["graph_module"]["graph"]["nodes"][0]
        node["target"] = target
        node["inputs"] = [{"name": name, "arg": arg, "kind": 1} for name, arg in arguments.items()]

    return lambda parts: with_json(parts, GRAPH, change)


TEXT, NUMBER = {"as_string": "/tmp/x"}, {"as_int": 10}
MALFORMED = {
    "a file mapped": (_call("torch.ops.aten.from_file.default", filename=TEXT, size=NUMBER), "may not call"),
    "a module's function": (_call("torch.hub.load", repo=TEXT, model=TEXT), "not a tensor operator"),
    "a shell": (_call("os.system", command=TEXT), "not a tensor operator"),
    "a python builtin": (_call("_operator.methodcaller", name=TEXT), "not a tensor operator"),
    "a custom operator": (_call("torch.ops.mylib.thing.default", self=TEXT), "not a tensor operator"),
    "an attribute walk": (_call("torch.ops.aten.__class__.default", self=TEXT), "not a tensor operator"),
    "random numbers": (_call("torch.ops.aten.rand.default", size={"as_ints": [2]}), "may not call"),
    "an unknown value": (_call("torch.ops.aten.relu.default", self={"as_tensor": {"name": "y"}}), "nothing computes"),
    "a graph as argument": (_call("torch.ops.aten.relu.default", self={"as_graph": {}}), "not known"),
    "a script's object": (_call("torch.ops.aten.relu.default", self={"as_custom_obj": {}}), "not known"),
    "no graph": (lambda parts: {k: v for k, v in parts.items() if k != GRAPH}, "torch.export.save"),
    "a graph that is no JSON": (lambda parts: {**parts, GRAPH: b"[" * 100_000}, "JSON"),
    "a graph of nothing": (lambda parts: {**parts, GRAPH: b"{}"}, "KeyError"),
    "a missing weight": (lambda parts: {k: v for k, v in parts.items() if not k.endswith("weight_3")}, "weight_3"),
    "a short weight": (lambda parts: {**parts, "data/weights/weight_2": b"1234"}, "has only 4 bytes"),
    "compiled code": (lambda parts: {**parts, "data/aotinductor/model/x.so": b"ELF"}, "compiled code"),
    "another format": (lambda parts: {**parts, "archive_format": b"pt3"}, "no exported program"),
    "another version": (lambda parts: {**parts, "archive_version": b"9"}, "format that is known"),
    "a huge tensor": (
        lambda parts: with_json(
            parts, WEIGHTS, lambda t: t["config"]["a.weight"]["tensor_meta"]["sizes"][0].update(as_int=2**60)
        ),
        "bytes",
    ),
    "a negative stride": (
        lambda parts: with_json(
            parts, WEIGHTS, lambda t: t["config"]["a.weight"]["tensor_meta"]["strides"][0].update(as_int=-1)
        ),
        "illegal shape",
    ),
    "NaN weights": (lambda parts: {**parts, "data/weights/weight_0": b"\xff" * 288}, "not finite"),
    "a broken card": (lambda parts: {**parts, "extra/tilepipe": b"{}"}, "model format"),
    "a card that is no text": (lambda parts: {**parts, "extra/tilepipe": b"\xff\xfe"}, "UnicodeDecodeError"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_archives_are_refused_in_one_line(tmp_path, skip, name):
    change, words = MALFORMED[name]
    assert words in refuse(write_archive(tmp_path / "skip.pt2", change(parts_of(skip))))


def test_archives_that_would_unfold_are_refused(tmp_path, skip):
    bomb = {**parts_of(skip), "data/weights/weight_0": bytes(50_000_000)}
    assert "compressed" in refuse(write_archive(tmp_path / "bomb.pt2", bomb, zipfile.ZIP_DEFLATED))
    data = bytearray(write_archive(tmp_path / "claim.pt2", parts_of(skip)).read_bytes())
    entry = data.rfind(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = b"\xf0\xff\xff\x7f" * 2
    (tmp_path / "claim.pt2").write_bytes(data)
    assert "claims parts of more than" in refuse(tmp_path / "claim.pt2")
    (tmp_path / "old.pt2").write_bytes(b"PK\x03\x04 no zip")
    assert "cut short" in refuse(tmp_path / "old.pt2")
    assert "no such model file" in refuse(tmp_path / "none.pt2")


def judge(path):
    """What loading and running came to; fails on anything but a model or one line."""
    told = ""
    try:
        ModelReference.parse(path, mean="1", std="1").load()
    except ModelError as error:
        told = str(error)
    assert "\n" not in told
    assert len(told) < 700
    return "refused" if told else "loaded"


def test_archives_cut_anywhere_are_refused(tmp_path, skip):
    data = skip.read_bytes()
    path = tmp_path / "cut.pt2"
    for length in [*range(0, 64, 7), *range(64, len(data) - 1, 1999), len(data) - 1]:
        path.write_bytes(data[:length])
        assert judge(path) == "refused", length


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_to_an_archive_gives_a_model_or_one_line(skip, data):
    damaged = bytearray(skip.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = skip.with_name("damaged.pt2")
    path.write_bytes(damaged)
    judge(path)


STRANGE = [None, True, -1, 0, 7, 2**70, 1.5, "", "x", "torch.ops.aten.relu.default", [], [1], {}, {"as_int": 3}, [[]]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([GRAPH, WEIGHTS]))
def test_any_change_of_its_description_gives_a_model_or_one_line(skip, seed, name):
    choose = random.Random(seed)

    def change(told):
        place, keys = told, list(told)
        while True:
            key = choose.choice(keys)
            inner = place[key]
            keys = (
                list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
            )
            if not keys or choose.random() < 0.1:
                break
            place = inner
        place[key] = choose.choice(STRANGE)

    path = skip.with_name("changed.pt2")
    judge(write_archive(path, with_json(parts_of(skip), name, change)))


# ---- conditions and operators -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["4*s0", "Mul(Integer(4), Symbol('s0', positive=True, integer=True))", "s0 + 3*s0"])
def test_sizes_in_either_spelling(text):
    extent = Extent.of({"as_expr": {"expr_str": text}}, {"s0": {"min_val": 2, "max_val": 9}})
    assert [n for n in range(60) if extent.admits(n)] == list(range(8, 37, 4))


@pytest.mark.parametrize(
    "text", ["().__class__", "s0.real", "[1][0]", "lambda: 1", "s0 ** 99", "f(s0)", "1 if s0 else 2", "'a' * 9", "s1"]
)
def test_nothing_but_arithmetic_is_evaluated(text):
    with pytest.raises(ModelError, match="not understood"):
        evaluate(parsed(text), {"s0": 3})


@given(st.integers(1, 500), st.integers(1, 500))
def test_conditions_say_what_python_says(rows, cols):
    text = "2*(L['x'].size()[2] // 4) == L['x'].size()[3] // 2 or not (1 + L['x'].size()[2]) % 3 < 2"
    wanted = 2 * (rows // 4) == cols // 2 or not (1 + rows) % 3 < 2
    assert evaluate(parsed(text), {}, (1, 2, rows, cols)) == wanted


def test_only_tensor_operators_are_resolved():
    assert resolve("torch.ops.aten.conv2d.default") is torch.ops.aten.conv2d.default
    for name in ("torch.load", "torch.ops.aten.conv2d", "torch.ops.aten.conv2d.__init__", "math.gcd", "eval", ""):
        with pytest.raises(ModelError):
            resolve(name)


def test_a_network_that_cannot_be_exported_is_told(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.a(x) if float(x.sum()) > 0 else x

    with pytest.raises(ModelError, match="cannot be exported"):
        save_exported(tmp_path / "n.pt2", Odd())
    assert json.dumps([each.name for each in tmp_path.iterdir()]) == "[]"
