"""The proof holds for what the geometry derives, and fails for what it does not."""

from __future__ import annotations

from dataclasses import replace

import networks
import pytest
import refused
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tilepipe.errors import GeometryError
from tilepipe.geometry.network import AxisGeometry, Geometry, Sizes
from tilepipe.models import build
from tilepipe.proof import prove
from tilepipe.trace import geometry_of


def falsified(geometry: Geometry, **changes: object) -> Geometry:
    """The geometry with another claim for both axes, and no obstacle."""
    axes = [replace(axis, **changes) for axis in geometry.axes]
    return replace(geometry, rows=axes[0], cols=axes[1], obstacle=None)


def failing_tests(network: nn.Module, geometry: Geometry) -> set[str]:
    proof = prove(network, geometry)
    assert proof.ok == (not proof.failures)
    assert str(proof).startswith("proved" if proof.ok else "not proved")
    return {check.test for check in proof.failures}


@pytest.mark.parametrize("name", networks.EXACT)
def test_derived_geometries_hold(name):
    make, channels = networks.EXACT[name]
    network = networks.seeded(make)
    proof = prove(network, geometry_of(network, channels))
    assert proof.ok, proof
    assert {check.test for check in proof.checks} == {"poison", "congruence"}


def test_segnets_geometry_holds():
    network = networks.seeded(lambda: networks.SegNetShape(width=1))
    proof = prove(network, geometry_of(network, 3))
    assert proof.ok, proof


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segnet", "segnet-basic"])
def test_the_presets_geometries_hold(name):
    network = build(name, classes=11).eval()
    geometry = geometry_of(network, 3)
    assert str(geometry.rows.sizes) == {"segnet": "32n", "segnet-basic": "16n"}[name]
    proof = prove(network, geometry)
    assert proof.ok, proof


def test_a_preset_of_little_width_has_the_published_geometry():
    axis = geometry_of(build("segnet", classes=3, width=2), 3).rows
    assert (str(axis.sizes), axis.reach, axis.halo) == ("32n", (186, 186), (192, 192))


# ---- what is false is found -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dilated", "skip", "segnet-basic", "autoencoder", "bilinear"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_reach_one_pixel_short_fails_the_poison_test(name, side):
    make, channels = networks.EXACT[name]
    network = networks.seeded(make)
    geometry = geometry_of(network, channels)
    reach = geometry.rows.reach
    assert reach is not None
    short = (reach[0] - (side == 0), reach[1] - (side == 1))
    assert "poison" in failing_tests(network, falsified(geometry, reach=short))


def test_parallel_strides_at_origins_of_one_of_them_pass_poison_and_fail_congruence():
    network = networks.seeded(networks.Parallel)
    geometry = geometry_of(network, 1)
    for stride in 4, 6:
        claimed = falsified(geometry, alignment=stride, reach=(12, 12))
        assert failing_tests(network, claimed) == {"congruence"}


def test_aligned_corners_pass_poison_and_fail_congruence():
    network = networks.seeded(refused.Aligned)
    claimed = falsified(geometry_of(network, 1), reach=(32, 32))
    assert failing_tests(network, claimed) == {"congruence"}


def test_misplaced_pooling_windows_pass_poison_and_fail_congruence():
    network = networks.seeded(networks.CeilMode)
    claimed = falsified(geometry_of(network, 1), alignment=1, reach=(8, 8), sizes=Sizes((1,), 1))
    assert failing_tests(network, claimed) == {"congruence"}


@pytest.mark.parametrize("name", ["circular", "coordinates"])
def test_places_that_are_not_alike_pass_poison_and_fail_congruence(name):
    make, channels, *_ = refused.BLENDED[name]
    network = networks.seeded(make)
    claimed = falsified(geometry_of(network, channels), reach=(8, 8), sizes=Sizes((8,), 1))
    assert failing_tests(network, claimed) == {"congruence"}


@pytest.mark.parametrize("name", ["squeeze", "instance-norm", "group-norm", "batch-norm", "attention"])
def test_mixing_networks_fail_both(name):
    make, channels, *_ = refused.BLENDED[name]
    network = networks.seeded(make)
    claimed = falsified(geometry_of(network, channels), reach=(8, 8), sizes=Sizes((16,), 8), alignment=8)
    assert failing_tests(network, claimed) == {"poison", "congruence"}


def test_sizes_that_the_network_refuses_are_a_failure():
    network = networks.seeded(networks.SkipNet)
    claimed = falsified(geometry_of(network, 2), sizes=Sizes((9,), 4))
    proof = prove(network, claimed)
    assert not proof.ok
    assert "raised on a legal input" in str(proof)


def test_outputs_of_another_size_are_a_failure():
    network = networks.seeded(networks.lenet)
    claimed = falsified(geometry_of(network, 1), shortfall=20)
    assert "not (" in str(prove(network, claimed))


def test_there_is_nothing_to_prove_of_a_network_that_is_not_exact():
    network = networks.seeded(refused.Squeeze)
    with pytest.raises(GeometryError, match="AdaptiveAvgPool2d"):
        prove(network, geometry_of(network, 1))


def test_the_network_and_the_seed():
    network = networks.seeded(networks.SkipNet).train()
    geometry = geometry_of(network, 2)
    one, again = prove(network, geometry, seed=3), prove(network, geometry, seed=3)
    assert one == again
    assert network.training
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_weights_that_ignore_the_input_do_not_hide_a_false_claim():
    network = networks.seeded(networks.Parallel)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data *= 1e-6
    claimed = falsified(geometry_of(network, 1), alignment=4, reach=(12, 12))
    assert failing_tests(network, claimed) == {"congruence"}


# ---- random networks ----------------------------------------------------------------------------------------------

Spec = tuple[str, int, int, int]


def layer(spec: Spec) -> nn.Module:
    """A layer of a random network, with two channels throughout."""
    kind, kernel, stride, other = spec
    if kind == "conv":
        return nn.Conv2d(2, 2, (kernel, 3), stride, padding=(min(other, kernel), 1))
    if kind == "dilated":
        return nn.Conv2d(2, 2, kernel, padding=other, dilation=stride)
    if kind == "up":
        return nn.ConvTranspose2d(2, 2, kernel + stride - 1, stride, padding=min(other, kernel - 1))
    if kind == "pool":
        return nn.MaxPool2d(stride + 1, stride, ceil_mode=other % 2 == 1)
    if kind == "mean":
        return nn.AvgPool2d(stride, ceil_mode=other % 2 == 1)
    return nn.Upsample(scale_factor=stride, mode=("nearest", "bilinear", "bicubic")[other % 3])


specs = st.lists(
    st.tuples(
        st.sampled_from(["conv", "conv", "dilated", "up", "pool", "mean", "resize"]),
        st.integers(1, 4),
        st.integers(1, 3),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=6,
)


class Branches(nn.Module):
    """Two random chains, cropped to a common size at their first rows and columns and added."""

    def __init__(self, one: list[Spec], other: list[Spec]) -> None:
        super().__init__()
        self.one = nn.Sequential(*(layer(spec) for spec in one))
        self.other = nn.Sequential(*(layer(spec) for spec in other))
        self.head = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.one(x), self.other(x)
        rows, cols = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
        return self.head(a[:, :, :rows, :cols] + b[:, :, :rows, :cols])


def affordable(axis: AxisGeometry) -> bool:
    return axis.alignment <= 36 and axis.reach is not None and max(axis.reach) <= 150


@settings(deadline=None, max_examples=14, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(specs, specs | st.none(), st.integers(0, 100))
def test_whatever_is_called_exact_is_proved(one, other, seed):
    network = networks.seeded(
        lambda: Branches(one, other) if other else nn.Sequential(*(layer(spec) for spec in one)), seed
    )
    try:
        geometry = geometry_of(network, 2)
    except GeometryError:
        assume(False)
    assume(geometry.exact and affordable(geometry.rows) and affordable(geometry.cols))
    proof = prove(network, geometry, seed=seed)
    assert proof.ok, proof
