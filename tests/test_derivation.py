"""Sizes on paper: published chains, every formula worked out, every size against the network's own run."""

from __future__ import annotations

import json
import math
import re
import sys
from fractions import Fraction

import pytest
import torch
from commands import run
from networks import EXACT, Oblong, SegNetShape, SkipNet, autoencoder, lenet, seeded
from torch import nn
from torch.nn import functional as F

from tilepipe.cli.derivation import derivation_entries, derive_on_paper, small_size
from tilepipe.cli.networks import about_preset
from tilepipe.geometry.derivation import Derivation, conclusion, derivation_of, formula_of
from tilepipe.geometry.steps import Mixing, Resample, Slide, Spread
from tilepipe.models import MODELS
from tilepipe.trace import geometry_of, trace_network

PAPER = {
    "autoencoder": (
        lambda: autoencoder(2),
        1,
        "61 -> (61 - 5)/2 + 1 = 29 -> 13 -> 5 -> 1 -> 2(1 - 1) + 5 = 5 -> 13 -> 29 -> 61",
        "length 1 at the narrowest point, back to 61; the product of strides is 16, so 61 + 16n",
    ),
    "segnet": (
        lambda: SegNetShape(1),
        3,
        "32 -> (32 - 2)/2 + 1 = 16 -> 8 -> 4 -> 2 -> 1 -> 2(1 - 1) + 2 = 2 -> 4 -> 8 -> 16 -> 32",
        "length 1 at the narrowest point, back to 32; the product of strides is 32, so 32n",
    ),
    "lenet": (
        lambda: lenet(2),
        1,
        "28 -> 28 - 5 + 1 = 24 -> (24 - 2)/2 + 1 = 12 -> 12 - 5 + 1 = 8 -> (8 - 2)/2 + 1 = 4 -> 4 - 4 + 1 = 1",
        "from 28 to 1, one output per 4 pixels; the product of strides is 4, so 28 + 4n",
    ),
    "u-net": (
        lambda: SkipNet(2),
        2,
        "4 -> (4 - 2)/2 + 1 = 2 -> 1 -> 2(1 - 1) + 2 = 2 -> 4",
        "length 1 at the narrowest point, back to 4; the product of strides is 4, so 4n",
    ),
}


class PaddedFCN(nn.Module):
    """The published FCN-32s at a width of 1: a pad of 100, five pools in ceil mode, a crop of 19 at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=100 if stage == 0 else 1) for stage in range(5))
        self.fc6 = nn.Conv2d(1, 1, 7)
        self.up = nn.ConvTranspose2d(1, 2, 64, stride=32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for conv in self.convs:
            y = F.max_pool2d(F.relu(conv(y)), 2, ceil_mode=True)
        return self.up(self.fc6(y))[:, :, 19 : 19 + x.shape[2], 19 : 19 + x.shape[3]]


class Gated(nn.Module):
    """A branch that pools over the whole map, so that the reach has no bound."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.gate = nn.Conv2d(3, 4, 4, stride=4), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(x)
        y = y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        return F.interpolate(y, scale_factor=4, mode="bilinear")


def derived(network: nn.Module, channels: int) -> Derivation:
    geometry = geometry_of(network, channels)
    return derivation_of(trace_network(network, channels, small_size(geometry)))


def worked_out(formula: str) -> int:
    """The right-hand side of "3/2*4 - 1", as Python works it out in whole fractions."""
    code = re.sub(r"\b(\d+(?:/\d+)?) ?\(", r"\1*(", formula)
    code = re.sub(r"\d+", lambda number: f"F({number[0]})", code)
    return eval(code, {"F": Fraction, "floor": math.floor, "ceil": math.ceil, "__builtins__": {}})


@pytest.mark.parametrize("name", sorted(PAPER))
def test_published_networks_as_on_paper(name: str) -> None:
    make, channels, chain, end = PAPER[name]
    network = make()
    geometry = geometry_of(network, channels)
    found = derivation_of(trace_network(network, channels, small_size(geometry)))
    assert found.chains == (chain, chain)
    assert conclusion(found, 0, geometry.rows) == end


def test_fcn_with_its_pad_of_100() -> None:
    network = PaddedFCN()
    found = derivation_of(trace_network(network, 1, (500, 224)))
    assert found.chains[0] == (
        "500 -> 500 + 2*100 - 3 + 1 = 698 -> (698 - 2)/2 + 1 = 349 -> 175 -> 88 -> 44 -> 22"
        " -> 22 - 7 + 1 = 16 -> 32(16 - 1) + 64 = 544 -> 544 - 19 - 25 = 500"
    )
    assert found.chains[1].startswith("224 -> 224 + 2*100 - 3 + 1 = 422 -> (422 - 2)/2 + 1 = 211 -> 106 -> 53 -> 27")
    halved = [row for row in found.rows if "pool" in row.operator]
    assert halved[1].formulas == ("ceil((349 - 2)/2) + 1 = 175", "ceil((211 - 2)/2) + 1 = 106")
    assert found.out == tuple(network(torch.zeros(1, 1, 500, 224)).shape[2:])


@pytest.mark.parametrize("name", sorted(EXACT))
def test_every_formula_gives_its_size(name: str) -> None:
    make, channels = EXACT[name]
    network = make()
    geometry = geometry_of(network, channels)
    for steps in ((0, 0), (3, 1)):
        shape = tuple(
            size + more * axis.sizes.step
            for size, more, axis in zip(small_size(geometry), steps, geometry.axes, strict=True)
        )
        found = derivation_of(trace_network(network, channels, shape))
        formulas = [(text, row.size[axis]) for row in found.rows for axis, text in enumerate(row.formulas) if text]
        for text, size in formulas:
            left, _, right = text.rpartition(" = ")
            assert worked_out(left) == int(right) == size, text
        for axis in (0, 1):
            numbers = [int(part.split(" = ")[-1]) for part in found.chains[axis].split(" -> ")]
            assert (numbers[0], numbers[-1]) == (shape[axis], found.out[axis])
            assert min(numbers) == found.narrowest[axis]


@pytest.mark.parametrize("name", sorted(EXACT))
def test_sizes_are_those_of_a_real_pass(name: str) -> None:
    make, channels = EXACT[name]
    network = seeded(make)
    size = small_size(geometry_of(network, channels))
    seen: dict[str, set[tuple[int, ...]]] = {}
    for path, module in network.named_modules():
        if not list(module.children()) and not isinstance(module, nn.Linear) and path:
            key = f"{path} ({type(module).__name__})"
            module.register_forward_hook(
                lambda _module, _inputs, out, key=key: seen.setdefault(key, set()).add(
                    tuple((out[0] if isinstance(out, tuple) else out).shape[2:])
                )
            )
    rows = derived(network, channels).rows
    seen.clear()
    with torch.no_grad():
        network(torch.randn(1, channels, *size))
    named = [row for row in rows if row.name in seen and row.operator != "slice" and "pad" not in row.operator]
    assert all(row.size in seen[row.name] for row in named)


def test_skips_join_at_the_size_of_the_trunk() -> None:
    joins = [row for row in derived(SkipNet(2), 2).rows if row.branches]
    assert [(row.operator, row.size) for row in joins] == [("cat", (2, 2)), ("cat", (4, 4))]
    assert all(branch.sizes[-1] == row.size for row in joins for branch in row.branches)
    assert all(row.trunk for row in joins)
    # Both maps were left by the same module, so that the operator is named, too.
    assert [branch.fork for row in joins for branch in row.branches] == ["SkipNet relu"] * 2


def test_parallel_branches_are_told_apart_and_their_strides_meet() -> None:
    make, channels = EXACT["parallel"]
    network = make()
    geometry = geometry_of(network, channels)
    found = derivation_of(trace_network(network, channels, (24, 24)))
    assert [row.trunk for row in found.rows] == [False, False, True, True, True]
    assert found.rows[-1].branches[0].sizes == ((24, 24), (6, 6), (24, 24))
    assert "those of all paths agree every 12 pixels; legal: 12n" in conclusion(found, 0, geometry.rows)


def test_unpooling_names_the_pool_whose_size_it_restores() -> None:
    unpools = [row for row in derived(SegNetShape(1), 3).rows if row.operator == "max_unpool2d"]
    assert len(unpools) == 5
    for row in unpools:
        (branch,) = row.branches
        assert branch.positions
        assert branch.sizes == (row.size,)
    assert unpools[0].branches[0].fork == "encoder.4.8 (ReLU)"


def test_a_network_without_a_bound_still_shows_its_sizes() -> None:
    network = Gated()
    assert geometry_of(network, 3).rows.reach is None
    found = derivation_of(trace_network(network, 3, (8, 8)))
    assert found.chains[0] == "8 -> (8 - 4)/4 + 1 = 2 -> 4*2 = 8"
    pooled = next(row for row in found.rows if row.stride == (None, None))
    assert (pooled.size, pooled.trunk, pooled.formulas[0]) == ((1, 1), False, "2 to 1")


def test_rows_and_columns_that_differ_have_a_line_each() -> None:
    network = Oblong()
    told = dict(derivation_entries(derive_on_paper(network, geometry_of(network, 2))))
    assert told["rows on paper"].startswith("2 -> floor((2 + 2*1 - 3)/2) + 1 = 1 -> 2(1 - 1) + 2 = 2")
    assert told["columns on paper"].startswith("3 -> (3 + 2*2 - 7)/3 + 1 = 1 -> 3(1 - 1) + 3 = 3")


@pytest.mark.parametrize(
    ("step", "size_in", "size", "text"),
    [
        (Spread(2, 1, 3), 16, 32, "2(16 - 1) + 3 - 2*1 + 1"),
        (Spread(2, 0, 2), 17, 33, "2(17 - 1) + 2 - 1"),  # unpooling to the size that a pool in ceil mode took
        (Slide(1, -4, 1, -4), 14, 6, "14 - 4 - 4"),
        (Slide(1, 0, 1, 3), 33, 36, "33 + 3"),
        (Resample(Fraction(2, 3), "linear"), 4, 6, "3/2*4"),
        (Resample(Fraction(2), "linear"), 8, 4, "8/2"),
        (Resample(Fraction(7, 15), "linear", aligned=True), 8, 16, "15/7 (8 - 1) + 1"),
        (Mixing("pools over the whole map"), 8, 1, ""),
    ],
)
def test_formulas_with_numbers(step, size_in: int, size: int, text: str) -> None:
    assert formula_of(step, size_in, size) == text
    if text:
        assert worked_out(text) == size


def test_inspect_shows_the_derivation_and_what_a_preset_is() -> None:
    short = run("inspect", "segnet", "--no-proof")
    assert short.exit_code == 0, short.output
    for said in ("(32 - 2)/2 + 1 = 16 -> 8 -> 4 -> 2 -> 1", "so 32n", "arXiv 1511.00561", "29,449,355"):
        assert said in short.output
    assert "arithmetic" not in short.output
    table = run("inspect", "segnet", "--no-proof", "-v").output
    for said in ("arithmetic", "(16 - 2)/2 + 1 = 8", "2(8 - 1) + 2 = 16", "the pool of encoder.1.5 (ReLU): 16 = 16"):
        assert said in table
    found = json.loads(run("inspect", "segnet", "--no-proof", "--json").stdout)
    assert found["derivation"]["chains"][0].endswith("-> 16 -> 32")
    assert found["derivation"]["layers"][0]["formulas"] == ["(32 - 2)/2 + 1 = 16"] * 2
    assert "SegNet" in found["preset"]["about"]
    assert found["preset"]["source"].endswith("(arXiv 1511.00561)")


def test_inspect_derives_61_and_16n() -> None:
    said = " ".join(run("inspect", "autoencoder", "--no-proof").output.split())
    chain, end = PAPER["autoencoder"][2:]
    assert f"{chain}: {end}" in said
    assert "joins 13 from fine.6 (ReLU), 61 from input" in said


def test_a_model_file_has_a_card_and_no_preset() -> None:
    found = json.loads(run("inspect", "synthetic-landcover", "--no-proof", "--json").stdout)
    assert found["preset"] is None
    assert found["card"]["architecture"] == "segnet"
    assert found["derivation"]["size"] == [32, 32]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_preset_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    preset = about_preset(name)
    assert preset["about"]
    assert preset["family"].endswith(".")
    cites = '" (' in " ".join(sys.modules[MODELS[name].__module__].__doc__.split())
    assert preset["source"].endswith(")") == cites
