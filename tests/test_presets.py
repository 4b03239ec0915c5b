"""Every preset against its row of the table: shapes, refusals, geometry, parameters, exactness, and a minimal halo."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache

import numpy as np
import pytest
import torch
from commands import run
from presets import PRESETS, VARIANTS, layers_of
from reference import model_of, scene, settled, whole_scores
from tiling import planned, some_tile, tiled_labels
from torch import nn

from tilepipe.checkpoint import Model
from tilepipe.errors import GeometryError
from tilepipe.geometry.network import AxisGeometry, Geometry
from tilepipe.models import MODELS, build
from tilepipe.plan import PlanRequest
from tilepipe.predict.prepare import prepare
from tilepipe.proof import prove
from tilepipe.trace import geometry_of
from tilepipe.window import Interval

ROWS = PRESETS | VARIANTS
EVERY = pytest.mark.parametrize("name", sorted(ROWS))
AMPLITUDES = (1e8, 0.1)
FAMILIES = ("autoencoder", "dilated-fcn", "fcn8s", "lenet", "segnet", "segnet-basic")
"""One of each family; deconvnet has fast tests of its own."""


def families_first(names: Iterable[str]) -> pytest.MarkDecorator:
    """A test of each name, slow where another of its family is not."""
    given = [pytest.param(name, marks=[] if name in FAMILIES else [pytest.mark.slow]) for name in sorted(names)]
    return pytest.mark.parametrize("name", given)


def test_the_table_has_every_architecture():
    assert set(PRESETS) == set(MODELS)


@cache
def geometry(name: str, full: bool = False) -> Geometry:
    """What is derived from the small network, or from the published one."""
    network = ROWS[name].make(name, full)
    return geometry_of(network, next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)))


def some_sizes(axis: AxisGeometry, count: int = 3) -> list[int]:
    """The smallest legal sizes of an axis."""
    sizes = [axis.sizes.minimums[0]]
    while len(sizes) < count:
        sizes.append(axis.sizes.ceil(sizes[-1] + 1))
    return sizes


# ---- what it accepts and gives ----------------------------------------------------------------------------------


@EVERY
def test_outputs_have_the_derived_sizes(name: str):
    preset, made = ROWS[name], geometry(name)
    network = preset.make(name)
    rows, cols = (some_sizes(axis) for axis in made.axes)
    for height, width in zip(rows, reversed(cols), strict=True):
        with torch.inference_mode():
            found = network(torch.zeros(1, preset.bands, height, width)).shape
        assert found == (1, preset.outputs, made.rows.output_size(height), made.cols.output_size(width))


@EVERY
def test_illegal_sizes_are_refused_with_the_nearest_legal_ones(name: str):
    preset, axis = ROWS[name], geometry(name).cols
    network = preset.make(name)
    second, third = some_sizes(axis)[1:]
    legal = axis.sizes.minimums[0]
    illegal = [n for n in (second + 1, third - 1, legal - 1) if n > 0 and not axis.sizes.legal(n)]
    assert bool(illegal) != preset.sizes.startswith("any size")
    for side in illegal:
        nearest = " and ".join(str(size) for size in axis.sizes.nearest(side))
        for shape, of in (((legal, side), "columns"), ((side, legal), "rows")):
            with pytest.raises(GeometryError, match=rf"{side} {of}.* nearest {nearest}$"):
                network(torch.zeros(1, preset.bands, *shape))


@EVERY
def test_geometry_is_the_stated_one(name: str):
    preset = ROWS[name]
    for axis in geometry(name).axes:
        found = (str(axis.sizes), axis.alignment, axis.reach, axis.halo, axis.scale)
        assert found == (preset.sizes, preset.alignment, preset.reach, preset.halo, preset.scale)


# ---- what it is made of ------------------------------------------------------------------------------------------


@EVERY
def test_parameters_and_layers_are_the_published_ones(name: str):
    preset = ROWS[name]
    with torch.device("meta"):
        network = build(name.split(maxsplit=1)[0], **preset.full)
    assert sum(parameter.numel() for parameter in network.parameters()) == preset.parameters
    assert not preset.layers or layers_of(network) == preset.layers


@families_first(ROWS)
def test_the_network_can_be_prepared(name: str):
    """torch.fx follows it, all batch normalisation folds, and any memory layout gives the same scores."""
    preset = ROWS[name]
    network = copy.deepcopy(fitted(name).network).double()
    side = some_sizes(geometry(name).rows)[0] + (0 if geometry(name).rows.sizes.step > 1 else 40)
    image = torch.randn(1, preset.bands, side, side, dtype=torch.float64)
    prepared = prepare(network, "float64")
    assert prepared.unfolded == 0
    with torch.inference_mode():
        expected = network(image)
        for found in (prepared(image), prepared.network(image.contiguous(memory_format=torch.channels_last))):
            assert torch.allclose(found, expected, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.slow
@EVERY
def test_the_published_network_has_the_stated_geometry_and_runs(name: str):
    preset = ROWS[name]
    network = build(name.split(maxsplit=1)[0], **preset.full).eval()
    bands = next(module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d))
    made = geometry_of(network, bands)
    for axis in made.axes:
        found = (str(axis.sizes), axis.alignment, axis.reach, axis.halo, axis.scale)
        assert found == (preset.sizes, preset.alignment, preset.reach, preset.halo, preset.scale)
    side = some_sizes(made.rows)[1]
    with torch.inference_mode():
        scores = network(torch.rand(1, made.channels_in, side, side))
    assert scores.shape == (1, made.channels_out, made.rows.output_size(side), made.cols.output_size(side))
    assert bool(torch.isfinite(scores).all())


# ---- tiles -------------------------------------------------------------------------------------------------------


@cache
def fitted(name: str, full: bool = False) -> Model:
    """The small or the published network, its batch normalisation fitted to noise, as a model."""
    made = geometry(name, full)
    network = settled(ROWS[name].make(name, full), made.channels_in, made.rows.sizes.ceil(96))
    return model_of(network, made.channels_out, made.channels_in)


def check_random_cut(name: str, seed: int, both: bool = False, full: bool = False) -> None:
    """Tiles of a random size, in random blocks of a random raster, against one pass over the raster.

    Several tiles along one axis, which the seed decides, and one along the other; or several along both.
    """
    made, model = geometry(name, full), fitted(name, full)
    random = np.random.default_rng(seed)
    least = some_tile(made, (1, 1), (1, 1))
    longer = [int(n) + random.integers(1, 150) for n in least]
    shorter = [int(n) for n in random.integers(1, 100, 2)]
    shape = tuple(int(longer[axis] if both or axis == seed % 2 else shorter[axis]) for axis in (0, 1))
    tile = some_tile(made, shape, tuple(random.integers(1, 4, 2)))
    block = tuple(int(n) for n in random.integers(120, 300, 2))
    values = scene(shape, made.channels_in, seed)
    cut = planned(made, shape, PlanRequest("exact", tile=tile, block=block))
    assert cut.tiles > 1
    expected = whole_scores(model, made, values, None, "float64").argmax(0)[: cut.shape[0], : cut.shape[1]]
    found = tiled_labels(model, cut, values, None, "float64")
    assert (found == expected).all(), f"{shape}, {tile}, {block}: {(found != expected).sum()} labels differ"
    assert len(np.unique(expected)) > 1 or made.channels_out == 1


@EVERY
def test_tiles_give_the_labels_of_the_whole_image(name: str):
    check_random_cut(name, seed=len(name))


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("seed", range(2))
def test_tiles_along_both_axes_give_the_labels_of_the_whole_image(name: str, seed: int):
    check_random_cut(name, seed, both=True)


@pytest.mark.slow
@EVERY
def test_tiles_of_the_published_network_give_the_labels_of_the_whole_image(name: str):
    check_random_cut(name, seed=len(name), full=True)


@families_first(ROWS)
def test_the_derivation_is_proved(name: str):
    proof = prove(fitted(name).network, geometry(name))
    assert proof.ok, proof


# ---- the halo is minimal -----------------------------------------------------------------------------------------


def far_seeing(network: nn.Module) -> nn.Module:
    """The network in float64 with positive weights that preserve the mean, so that nothing cancels."""
    network = copy.deepcopy(network).double().eval()
    torch.manual_seed(2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.reset_parameters()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            rows, cols = module.weight.shape[2:]
            read = module.in_channels // module.groups * rows * cols
            if isinstance(module, nn.ConvTranspose2d):
                read //= module.stride[0] * module.stride[1]
            nn.init.uniform_(module.weight, 0.5 / read, 1.5 / read)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def core_of(axis: AxisGeometry) -> tuple[Interval, Interval]:
    """The outputs of one alignment step, and the inputs at the same place."""
    start = axis.halo[0] + axis.alignment
    inputs = Interval(start, start + axis.alignment)
    return Interval(inputs.start // axis.scale, inputs.stop // axis.scale), inputs


def answers(network: nn.Module, made: Geometry, along: int, reach: tuple[int, int]) -> bool:
    """Whether the core of an axis answers to changes further away than `reach`.

    The image rises towards the core, so that every pooling window has its maximum at the side of the core; what is
    added outside is strong enough to move that maximum away, with which max-unpooling leaves a zero at the place
    that the core can see. Networks without unpooling answer to what the outside adds to sums and maxima. A weak
    addition serves those that saturate.
    """
    axis, across = made.axes[along], made.axes[1 - along]
    core, inputs = core_of(axis)
    length = axis.sizes.ceil(inputs.stop + axis.halo[1] + axis.alignment)
    place = torch.arange(length, dtype=torch.float64)
    far = (place - (inputs.start + inputs.stop - 1) / 2).abs() / length
    outside = (place < inputs.start - reach[0]) | (place >= inputs.stop + reach[1])

    def core_outputs(profile: torch.Tensor) -> torch.Tensor:
        image = profile[:, None].expand(length, across.sizes.ceil(50))
        image = image.T if along else image
        with torch.inference_mode():
            scores = network(image.expand(1, made.channels_in, *image.shape).contiguous())
        return scores.narrow(2 + along, core.start, len(core))

    base = 0.2 - 0.1 * far
    expected = core_outputs(base)
    return any(not torch.equal(core_outputs(base + amplitude * outside), expected) for amplitude in AMPLITUDES)


@families_first(ROWS)
@pytest.mark.parametrize("along", [0, 1])
def test_the_halo_is_minimal(name: str, along: int):
    preset, made = ROWS[name], geometry(name)
    network = far_seeing(preset.make(name))
    before, after = preset.reach
    assert not answers(network, made, along, (before, after))
    for side, reach in enumerate(preset.reach):
        if reach:
            pixel = (before - 1, after) if side == 0 else (before, after - 1)
            assert answers(network, made, along, pixel)
            less = preset.halo[side] - preset.alignment
            step = (less, after) if side == 0 else (before, less)
            assert answers(network, made, along, step)


@pytest.mark.slow
@EVERY
def test_the_halo_of_the_published_network_is_minimal(name: str):
    preset, made = ROWS[name], geometry(name, full=True)
    network = far_seeing(preset.make(name, full=True))
    assert not answers(network, made, 0, preset.reach)
    less = [halo - preset.alignment for halo in preset.halo]
    if preset.halo[0]:
        assert answers(network, made, 0, (less[0], preset.reach[1]))
    if preset.halo[1]:
        assert answers(network, made, 0, (preset.reach[0], less[1]))


# ---- the command line --------------------------------------------------------------------------------------------


@families_first(PRESETS)
def test_inspect_prints_its_card(name: str, monkeypatch: pytest.MonkeyPatch):
    """At the published width; its weights, which need not be there without the proof, have no memory."""

    def build_without_memory(*words: object, **arguments: object) -> nn.Module:
        with torch.device("meta"):
            return build(*words, **arguments)

    monkeypatch.setattr("tilepipe.models.build", build_without_memory)
    preset = PRESETS[name]
    result = run("inspect", name, "--no-proof")
    assert result.exit_code == 0, result.output
    parameters = sum(p.numel() for p in build_without_memory(name).parameters())
    about = (MODELS[name].__doc__ or "").split("\n")[0].split()[:5]
    for said in (preset.sizes, f"halo {preset.halo[0]}", f"{parameters:,} parameters", " ".join(about)):
        assert said in result.output
