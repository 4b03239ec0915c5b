"""Networks to geometries: the published facts, brute force, and refusals that name the layer."""

from __future__ import annotations

import copy

import networks
import pytest
import refused
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tilepipe.errors import GeometryError
from tilepipe.geometry.network import fold
from tilepipe.models.layers import check_sides
from tilepipe.trace import activation_bytes, geometry_of, layer_table, trace_network
from tilepipe.tracing.axes import TangledError, reshape
from tilepipe.window import Interval

# ---- published facts ---------------------------------------------------------------------------------------------


def test_the_autoencoder_takes_61_and_16n():
    axis = geometry_of(networks.autoencoder(), 1).rows
    assert str(axis.sizes) == "61 + 16n"
    assert (axis.alignment, axis.scale, axis.trim) == (16, 1, (0, 0))
    assert not any(axis.sizes.legal(n) for n in (45, 60, 62, 64, 76, 78))


def test_segnet_takes_32n_and_its_core_needs_186_pixels():
    geometry = geometry_of(networks.SegNetShape(), 3)
    axis = geometry.rows
    assert str(axis.sizes) == "32n"
    assert (axis.alignment, axis.reach, axis.halo) == (32, (186, 186), (192, 192))
    assert geometry.cols == axis
    assert (geometry.channels_in, geometry.channels_out, geometry.exact) == (3, 3, True)


def test_segnets_worst_single_pixel_reaches_further_than_an_aligned_core():
    trace = trace_network(networks.SegNetShape(), 3, (512, 512))
    needs = [fold(trace, 0, Interval(j, j + 1))[0] for j in range(32)]
    assert max(j - need.start for j, need in enumerate(needs) if need) == 211


def test_segnet_basic_takes_16n():
    axis = geometry_of(networks.SegNetBasicShape(), 3).rows
    assert (str(axis.sizes), axis.alignment) == ("16n", 16)


def test_lenet_takes_28_and_4n_and_answers_for_every_fourth_pixel():
    axis = geometry_of(networks.lenet(), 1).rows
    assert str(axis.sizes) == "28 + 4n"
    assert (axis.scale, axis.offset, axis.reach, axis.trim) == (4, 12, (0, 24), (0, 0))
    assert [axis.output_size(n) for n in (28, 32, 256)] == [1, 2, 58]


def test_an_unpadded_unet_trims_its_input():
    axis = geometry_of(networks.ValidUNet(), 1).rows
    assert (str(axis.sizes), axis.trim, axis.reach, axis.offset) == ("18 + 2n", (8, 8), (0, 16), 8)
    assert axis.output_size(40) == 24


# ---- sizes of the zoo ---------------------------------------------------------------------------------------------

SIZES = {
    "skip": ("4n", "4n"),
    "oblong": ("2n", "3n"),
    "in-place": ("any size from 1", "any size from 1"),
    "gaps": ("3n", "3n"),
    "ceil-mode": ("any size from 1", "any size from 1"),
    "self-padding": ("any size from 1", "any size from 1"),
    "parallel": ("12n", "12n"),
    "aligned-odd": ("1 + 4n", "1 + 4n"),
    "bilinear": ("4n", "4n"),
    "two-outputs": ("any size from 8", "any size from 8"),
}


@pytest.mark.parametrize("name", SIZES)
def test_legal_sizes(name):
    make, channels = networks.EXACT[name]
    geometry = geometry_of(make(), channels)
    assert geometry.obstacle is None
    assert (str(geometry.rows.sizes), str(geometry.cols.sizes)) == SIZES[name]


@pytest.mark.parametrize("name", ["gaps", "ceil-mode", "parallel", "lenet", "skip"])
def test_legal_sizes_are_those_that_run_and_return_the_promised_size(name):
    make, channels = networks.EXACT[name]
    network = networks.seeded(make)
    axis = geometry_of(network, channels).rows
    for n in range(axis.sizes.minimums[0], axis.sizes.minimums[0] + 3 * axis.alignment + 1):
        if axis.sizes.legal(n):
            with torch.no_grad():
                assert network(torch.zeros(1, channels, n, n)).shape[2:] == (axis.output_size(n),) * 2


def test_oblong_networks_get_an_answer_per_axis():
    geometry = geometry_of(networks.SkipNet(kernel=(3, 7)), 2)
    assert (geometry.rows.reach, geometry.cols.reach) == ((7, 7), (21, 21))


def test_residue_classes_share_one_alignment():
    axis = geometry_of(networks.CeilMode(), 1).rows
    assert (axis.alignment, axis.sizes.step) == (2, 2)
    assert axis.tile(8, residue_of=101) % 2 == 1


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", refused.BLENDED)
def test_what_cannot_be_tiled_is_refused_and_the_layer_named(name):
    make, channels, layer, reason = refused.BLENDED[name]
    geometry = geometry_of(make(), channels)
    assert not geometry.exact
    assert geometry.rows.reach is None
    assert layer in (geometry.obstacle or "")
    assert reason in (geometry.obstacle or "")
    assert "\n" not in (geometry.obstacle or "")


def test_a_network_of_one_size_has_step_0():
    axis = geometry_of(refused.FixedSize(32), 1).rows
    assert str(axis.sizes) == "32 only"
    assert not axis.sizes.legal(64)


def test_an_unknown_operator_is_an_error_that_names_it_and_its_layer():
    with pytest.raises(GeometryError, match="Unknown uses the operator bucketize"):
        geometry_of(refused.Unknown(), 1)


def test_a_network_that_looks_at_values_is_refused():
    with pytest.raises(GeometryError, match="Deciding reads pixel values"):
        geometry_of(refused.Deciding(), 1)


class Wrong(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a = nn.Conv2d(1, 2, 3, padding=1)
        self.up = nn.ConvTranspose2d(1, 2, 2, 2)

    def forward(self, x):
        results = {
            "larger": lambda: self.up(x),
            "constant": lambda: torch.zeros(1, 2, *x.shape[2:]),
            "flat": lambda: self.a(x).argmax(1),
            "last": lambda: self.a(x).permute(0, 2, 3, 1),
            "nothing": lambda: None,
            "padded": lambda: nn.functional.pad(self.a(x), (2, 2, 2, 2)),
        }
        return results[self.kind]()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("larger", "2 pixels per input pixel"),
        ("constant", "does not depend on its input"),
        ("flat", "legal: .batch, classes, rows, columns."),
        ("last", "legal: .batch, classes, rows, columns."),
        ("nothing", "returns NoneType"),
        ("padded", "larger than its input"),
    ],
)
def test_outputs_that_are_no_map(kind, reason):
    with pytest.raises(GeometryError, match=reason):
        geometry_of(Wrong(kind), 1)


def test_inference_mode_makes_no_difference():
    make, channels = networks.EXACT["skip"]
    network, shape = networks.seeded(make), (1, channels, 64, 64)
    outside, cost = geometry_of(network, channels), activation_bytes(network, shape, torch.float32)
    with torch.inference_mode():
        assert geometry_of(network, channels) == outside
        assert activation_bytes(network, shape, torch.float32) == cost


def test_the_network_is_left_alone():
    network = networks.SkipNet().train()
    before = copy.deepcopy(network.state_dict())
    geometry_of(network, 2)
    activation_bytes(network, (1, 2, 32, 32), torch.float64)
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())


# ---- operators one by one ----------------------------------------------------------------------------------------


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x):
        return self.function(self.a(x))


BOUNDED = {
    "softmax over channels": lambda x: x.softmax(1),
    "mean over channels": lambda x: x - x.mean(1, keepdim=True),
    "normalised": lambda x: nn.functional.normalize(x, dim=1),
    "flattened product": lambda x: (torch.ones(3, 4) @ x.flatten(2)).unflatten(2, x.shape[2:]),
    "einsum": lambda x: torch.einsum("bchw,cd->bdhw", x, torch.ones(4, 5)),
    "stacked": lambda x: torch.stack([x, 2 * x]).amax(0),
    "chunks": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "group norm by hand over channels": lambda x: (x - x.mean(1, True)) / x.var(1, keepdim=True).add(1).sqrt(),
    "glu": lambda x: nn.functional.glu(x, 1),
    "local response": lambda x: nn.functional.local_response_norm(x, 3),
    "channel choice": lambda x: x[:, [3, 1]],
    "transposed twice": lambda x: x.transpose(2, 3).contiguous().relu_().transpose(2, 3),
    "masked": lambda x: x.masked_fill(x > 0, 0.5),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "uniform map added": lambda x: x + torch.full((1, 4, *x.shape[2:]), 0.5),
    "nearest by repeat": lambda x: x[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3),
    "unfold": lambda x: nn.functional.unfold(x, 3, padding=1).unflatten(2, x.shape[2:]),
    "prepared tensor": lambda x: x.new_zeros(x.shape).copy_(x),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_operators_whose_reach_is_bounded(name):
    geometry = geometry_of(Lambda(BOUNDED[name]), 2)
    assert geometry.exact, geometry.obstacle
    assert max(geometry.rows.reach or (9, 9)) <= 3


def _convolved(x):
    return nn.functional.conv2d(x, torch.ones(x.shape[1], x.shape[1], 1, 1))


def _zero_border(x):
    x[:, :, 0] = 0
    return x


UNBOUNDED = {
    "softmax over rows": lambda x: x.softmax(2),
    "mean over the map": lambda x: x - x.mean((2, 3), keepdim=True),
    "norm over the map": lambda x: x / x.norm(),
    "rolled": lambda x: x.roll(1, 2),
    "flipped": lambda x: x.flip(3),
    "summed along": lambda x: x.cumsum(2),
    "sorted": lambda x: x.sort(3)[0],
    "first row": lambda x: x + x[:, :, :1],
    "slice assigned": lambda x: x.index_fill(2, torch.tensor([0]), 0.0),
    "border zeroed": _zero_border,
    "fixed noise": lambda x: x + torch.rand(1, 1, *x.shape[2:]),
    "random": lambda x: x + torch.rand_like(x),
    "rows as channels": lambda x: _convolved(x.transpose(1, 2)).transpose(1, 2),
    "sampled": lambda x: nn.functional.grid_sample(x, torch.zeros(1, *x.shape[2:], 2), align_corners=False),
    "transformed": lambda x: torch.fft.fft2(x).real,
    "positions as numbers": lambda x: nn.functional.max_pool2d(x, 1, return_indices=True)[1].float() + x,
    "size as a number": lambda x: x / x.shape[2],
    "fixed crop": lambda x: nn.functional.pad(x[:, :, :64], (0, 0, 0, x.shape[2] - 64)),
    "halves swapped": lambda x: torch.cat(x.chunk(2, 2)[::-1], 2),
    "linear over columns": lambda x: x @ torch.ones(x.shape[3], x.shape[3]),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_operators_that_depend_on_the_place_or_on_all_places(name):
    geometry = geometry_of(Lambda(UNBOUNDED[name]), 2)
    assert not geometry.exact
    assert "Lambda" in (geometry.obstacle or "")


def test_views_split_and_merge_axes():
    dims = ((("x", 1),), (("x", 8),), (("rows", 12),), (("cols", 20),))
    flat, steps = reshape(dims, (1, 8, 240))
    assert flat[2] == (("rows", 12), ("cols", 20))
    assert steps == []
    split, steps = reshape(flat, (1, 8, 3, 4, 20))
    assert split[2:] == ((("rows", 3),), (("x", 4),), (("cols", 20),))
    assert len(steps) == 1
    merged, _ = reshape(split, (8, 12, 20))
    assert merged[1:] == ((("rows", 12),), (("cols", 20),))
    with pytest.raises(TangledError):
        reshape(flat, (1, 8, 16, 15))


# ---- brute force --------------------------------------------------------------------------------------------------


def dependence(network: nn.Module, channels: int, size: int, core: Interval) -> Interval:
    """The input rows that the core's rows of output depend on, by gradient."""
    x = torch.rand(1, channels, size, 8, dtype=torch.float64, requires_grad=True)
    out = network.double()(x)
    (gradient,) = torch.autograd.grad(out[:, :, core.start : core.stop].sum(), x)
    rows = torch.nonzero(gradient.abs().sum((0, 1, 3))).flatten()
    return Interval(int(rows[0]), int(rows[-1]) + 1)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4)),
        min_size=1,
        max_size=4,
    )
)
def test_the_reach_of_plain_chains_is_what_the_gradient_says(specs):
    layers: list[nn.Module] = []
    for kernel, dilation, padding in specs:
        pad = min(padding, (kernel - 1) * dilation // 2)
        layers += [nn.Conv2d(1, 1, (kernel, 1), padding=(pad, 0), dilation=(dilation, 1)), nn.Tanh()]
    network = nn.Sequential(*layers)
    for parameter in network.parameters():
        nn.init.uniform_(parameter, 0.1, 0.3)
    axis = geometry_of(network, 1).rows
    size, begin = 120, 60
    needed = dependence(network, 1, size, Interval(begin, begin + 1))
    assert axis.reach is not None
    assert needed.start == begin - axis.reach[0] or (axis.reach[0] == 0 and needed.start >= begin)
    assert needed.stop == begin + 1 + axis.reach[1] or (axis.reach[1] == 0 and needed.stop <= begin + 1)


@pytest.mark.parametrize("name", ["skip", "in-place", "valid-unet", "bilinear", "reflecting", "dilated", "last-dims"])
def test_the_reach_covers_what_the_gradient_finds(name):
    make, channels = networks.EXACT[name]
    network = networks.seeded(make)
    axis = geometry_of(network, channels).rows
    assert axis.reach is not None
    size, begin = axis.sizes.ceil(96), 48 // axis.alignment * axis.alignment
    x = torch.rand(1, channels, size, size, dtype=torch.float64, requires_grad=True)
    out = network.double()(x)
    (gradient,) = torch.autograd.grad(out[:, :, begin : begin + axis.alignment].sum(), x)
    rows = torch.nonzero(gradient.abs().sum((0, 1, 3))).flatten()
    assert begin - axis.reach[0] <= int(rows[0])
    assert int(rows[-1]) < begin + axis.alignment + axis.reach[1]


# ---- tables and memory --------------------------------------------------------------------------------------------


def test_layer_table_names_layers_and_what_a_core_needs_of_them():
    network = networks.SkipNet()
    rows = layer_table(network, geometry_of(network, 2), (32, 32))
    named = {row.name: row for row in rows if row.operator == "convolution"}
    assert named["c (Conv2d)"].size == (8, 8)
    assert named["c (Conv2d)"].need[0] == Interval(0, 1)
    assert rows[0].need[0] == Interval(-7, 11)


def test_memory_counts_what_is_alive_together():
    chain = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    pixels = 16 * 16
    memory = activation_bytes(chain, (1, 1, 16, 16), torch.float32)
    assert memory.peak == 4 * pixels * (1 + 4 + 2)
    assert memory.workspace == 4 * pixels * (4 + 2)
    assert memory.weights == 4 * (36 + 4 + 8 + 2)
    assert memory.largest == 4 * pixels
    assert memory.flops == 2 * pixels * (4 * 9 + 2 * 4)
    halved = activation_bytes(chain, (1, 1, 16, 16), torch.bfloat16)
    assert halved.peak == memory.peak // 2


def test_memory_keeps_skips_and_pooling_positions():
    class Pooling(nn.Module):
        def forward(self, x):
            pooled, positions = nn.functional.max_pool2d(x, 2, return_indices=True)
            return nn.functional.max_unpool2d(pooled, positions, 2)

    memory = activation_bytes(Pooling(), (1, 1, 16, 16), torch.float32)
    assert memory.peak == 256 * 4 + 64 * (4 + 8) + 256 * 4
    assert memory.weights == 0


# ---- networks from elsewhere ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "exact"), [("fcn_resnet50", "8n", True), ("deeplabv3_resnet50", "16 + 8n", False)]
)
def test_torchvisions_networks(name, sizes, exact):
    models = pytest.importorskip("torchvision.models.segmentation")
    network = getattr(models, name)(weights=None, weights_backbone=None)
    geometry = geometry_of(network, 3)
    assert (str(geometry.rows.sizes), geometry.exact, geometry.channels_out) == (sizes, exact, 21)
    assert exact or "AdaptiveAvgPool2d" in (geometry.obstacle or "")


@pytest.mark.slow
def test_an_exported_program_has_the_geometry_of_its_network():
    rows, cols = torch.export.Dim("rows", min=2, max=999), torch.export.Dim("cols", min=2, max=999)
    network, image = networks.SkipNet().eval(), torch.randn(1, 2, 64, 96)
    program = torch.export.export(network, (image,), dynamic_shapes=({2: 4 * rows, 3: 4 * cols},))
    axis, original = geometry_of(program.module(), 2).rows, geometry_of(network, 2).rows
    assert (axis.reach, axis.alignment) == (original.reach, original.alignment)


def test_a_network_may_refuse_sizes_itself():
    class Refusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = networks.autoencoder()

        def forward(self, x):
            check_sides(x.shape, "Refusing", 32, 61)
            return self.network(x)

    axis = geometry_of(Refusing(), 1).rows
    assert str(axis.sizes) == "61 + 32n"
