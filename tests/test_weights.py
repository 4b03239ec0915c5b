"""Weights files: what fits, and hostile and damaged ones that end in one line without running or unfolding."""

from __future__ import annotations

import io
import json
import pickle
import struct
import warnings
import zipfile

import pytest
import torch
from archives import Touch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from tilepipe.errors import ModelError
from tilepipe.loading.reference import ModelReference
from tilepipe.loading.weights import put_weights, read_weights


def a_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def saved(value, **told):
    buffer = io.BytesIO()
    torch.save(value, buffer, **told)
    return buffer.getvalue()


GOOD = {
    "zip": saved(a_network().state_dict()),
    "legacy": saved(a_network().state_dict(), _use_new_zipfile_serialization=False),
    "safetensors": save({name: each.contiguous() for name, each in a_network().state_dict().items()}),
}


def outcome(path):
    """ "" for weights that were read and put, else the one line that refused them."""
    network = a_network()
    try:
        put_weights(network, read_weights(path)[0], str(path))
    except ModelError as error:
        return str(error)
    return ""


def refused(path):
    told = outcome(path)
    assert told.startswith(f"{path}: "), told
    assert "\n" not in told
    assert len(told) < 600
    return told


@pytest.mark.parametrize("kind", GOOD)
def test_each_kind_is_read(tmp_path, kind):
    path = tmp_path / "w"
    path.write_bytes(GOOD[kind])
    state, digest = read_weights(path)
    network = a_network()
    for each in network.parameters():
        nn.init.zeros_(each)
    put_weights(network, state, "w")
    for name, each in a_network().state_dict().items():
        assert torch.equal(network.state_dict()[name], each)
    assert len(digest) == 64


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "nested"])
def test_pickles_that_would_run_code_are_refused_and_do_not_run(tmp_path, form):
    marker, path = tmp_path / "ran", tmp_path / "w.pth"
    hostile = {"state_dict": Touch(marker)} if form == "nested" else Touch(marker)
    data = {
        "zip": lambda: saved(hostile),
        "nested": lambda: saved(hostile),
        "legacy": lambda: saved(hostile, _use_new_zipfile_serialization=False),
        "plain pickle": lambda: pickle.dumps(hostile, protocol=2),
    }[form]()
    path.write_bytes(data)
    assert "system" in refused(path)
    assert not marker.exists()
    if form != "plain pickle":
        torch.load(path, weights_only=False)  # the attack is real
        assert marker.exists()


def test_tensors_that_would_fill_the_memory_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    state = a_network().state_dict()
    path.write_bytes(saved({**state, "0.bias": torch.zeros(1).expand(2**40)}))
    assert "0.bias, told to be [1099511627776]" in refused(path)
    path.write_bytes(saved({**state, "0.bias": torch.zeros(3).to_sparse()}))
    assert "sparse" in refused(path)
    path.write_bytes(saved({**state, "0.bias": torch.zeros(4, device="meta")}))
    assert "without values" in refused(path)


def test_zip_files_that_would_unfold_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(30_000_000))
    assert "compressed" in refused(path)
    path.write_bytes(saved({"a": torch.ones(70_000)}).replace(struct.pack("<i", 70_000), struct.pack("<i", 2**31 - 1)))
    refused(path)


def test_torchscript_is_refused_with_the_remedy(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(a_network().eval(), torch.zeros(1, 3, 8, 8)), str(tmp_path / "w.pt"))
    assert "TorchScript" in refused(tmp_path / "w.pt")
    assert "torch.export.save" in outcome(tmp_path / "w.pt")


def test_headers_of_absurd_sizes_are_refused(tmp_path):
    path = tmp_path / "w"
    for length in (2**63, 2**40, 5 * 2**20):
        path.write_bytes(struct.pack("<Q", length) + b"{" + b" " * 100)
        refused(path)
    header = json.dumps({"0.bias": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert "cut or changed" in refused(path)


def test_missing_and_unreadable_files(tmp_path):
    assert "no such weights file" in refused(tmp_path / "none")
    assert "cannot be read" in refused(tmp_path)
    (tmp_path / "empty").write_bytes(b"")
    refused(tmp_path / "empty")


@pytest.mark.parametrize("kind", GOOD)
def test_files_cut_anywhere_are_refused(tmp_path, kind):
    path = tmp_path / "w"
    for length in range(0, len(GOOD[kind]) - 1, 97):
        path.write_bytes(GOOD[kind][:length])
        refused(path)


@pytest.mark.parametrize("kind", GOOD)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_damage_gives_weights_or_one_line(tmp_path_factory, kind, data):
    damaged = bytearray(GOOD[kind])
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    told = outcome(path)
    assert "\n" not in told
    assert len(told) < 600
    assert not told or told.startswith(str(path))


TOML = b"""model = "net.pt2"
classes = ["a", "b"]
mean = [1, 2.5]
std = [1, 2]
[arguments]
width = 3
"""


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_toml_file_gives_one_line(tmp_path_factory, data):
    damaged = bytearray(TOML)
    for _ in range(data.draw(st.integers(0, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.toml"
    path.write_bytes(damaged)
    with pytest.raises(ModelError) as caught:  # net.pt2 is not there, whatever else is wrong
        ModelReference(str(path)).load()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
