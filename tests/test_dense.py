"""Dense classifiers against the classifier on every window, and what cannot be slid against its refusal."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import seeded
from reference import MEAN, STD, model_of, scene, whole_labels, write_raster
from torch import nn

from tilepipe.errors import GeometryError, ModelError
from tilepipe.models import build
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import segment_raster
from tilepipe.predict.prepare import prepare
from tilepipe.proof import prove
from tilepipe.store.output import open_store
from tilepipe.trace import geometry_of
from tilepipe.variants.chain import chain_of, window_and_step
from tilepipe.variants.dense import Offsets, dilated, shift_and_stitch
from tilepipe.window import Interval

WAYS = {"dilated": dilated, "stitched": shift_and_stitch}


@torch.no_grad()
def every_window(network: nn.Module, image: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """The classifier's scores for every window of an image, each window cut out and passed by itself."""
    windows = image.unfold(2, window[0], 1).unfold(3, window[1], 1)
    count, channels, rows, cols = windows.shape[:4]
    scores = network(windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels, *window))
    assert scores.shape[2:] == (1, 1), "a window gives one output"
    return scores.reshape(count, rows, cols, -1).permute(0, 3, 1, 2)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Functional(nn.Module):
    """A chain of one's own: modules inside modules, functions, methods, numbers, and a look at the size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.1)))
        self.second = nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding="valid", groups=2)
        self.head = nn.Conv2d(6, 3, (2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.first(0.5 - x / 2), 2)
        x = torch.relu(self.second(x)).clamp(max=3.0)
        x = F.avg_pool2d(x, (2, 1), stride=(2, 1), divisor_override=3)
        return F.log_softmax(F.dropout(self.head(x), 0.5, self.training), dim=1)


CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, int], tuple[int, int]]] = {
    "lenet": (networks.lenet, 1, (28, 28), (4, 4)),
    "the preset": (lambda: build("lenet", classes=7, bands=2, width=0.2), 2, (28, 28), (4, 4)),
    "functional": (Functional, 2, (14, 14), (4, 4)),
    "strided convolutions, folded": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True),
            nn.Conv2d(5, 4, 3, stride=3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Dropout(0.4), nn.Conv2d(4, 3, 2),
        ),
        2, (13, 13), (6, 6),
    ),
    "oblong": (
        lambda: nn.Sequential(
            nn.AvgPool2d((1, 2)), nn.Conv2d(1, 3, (3, 5), stride=(3, 1), dilation=(1, 2)), nn.Tanh(),
            nn.MaxPool2d((3, 2), stride=(2, 1), dilation=(2, 1)), nn.Conv2d(3, 2, (1, 2)),
        ),
        1, (15, 22), (6, 2),
    ),
    "gaps between windows": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 2, stride=3), nn.MaxPool2d(1, stride=2), nn.Conv2d(3, 2, 2)),
        1, (8, 8), (6, 6),
    ),
    "no stride": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2, 1), nn.Sigmoid()), 1, (4, 4), (1, 1)),
    "stride last": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AvgPool2d(2)), 1, (4, 4), (2, 2)),
}  # fmt: skip
"""How to make each, its channels, its window and its step."""


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_both_ways_equal_the_classifier_on_every_window(name: str) -> None:
    make, channels, window, step = CLASSIFIERS[name]
    network = seeded(make).double()
    assert window_and_step(chain_of(network)) == (window, step)
    for more in (0, 0), (1, 0), (5, 7), (11, 6):
        image = noise(2, channels, window[0] + more[0], window[1] + more[1])
        expected = every_window(network, image, window)
        assert expected.std() > 1e-3
        for way in WAYS.values():
            found = way(network)(image)
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@st.composite
def chains(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """A random chain of convolutions, pooling and element-wise layers, and its channels."""
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    first = channels = draw(st.integers(1, 3))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["convolution", "max", "average", "norm", "relu"]))
        kernel, stride = draw(pairs), draw(st.tuples(st.integers(1, 3), st.integers(1, 2)))
        if kind == "convolution":
            layers.append(nn.Conv2d(channels, 4, kernel, stride=stride, dilation=draw(pairs)))
            channels = 4
        elif kind == "max":
            layers.append(nn.MaxPool2d(kernel, stride, dilation=draw(pairs)))
        elif kind == "average":
            layers.append(nn.AvgPool2d(kernel, stride))
        else:
            layers.append(nn.BatchNorm2d(channels) if kind == "norm" else nn.ReLU())
    return seeded(lambda: nn.Sequential(nn.Sequential(*layers), nn.Conv2d(channels, 2, 1))), first


@settings(max_examples=40, deadline=None)
@given(chain=chains(), more=st.tuples(st.integers(0, 13), st.integers(0, 9)))
def test_any_chain_equals_the_classifier_on_every_window(chain: tuple[nn.Module, int], more: tuple[int, int]) -> None:
    network, channels = chain
    network = copy.deepcopy(network).double()
    window, _ = window_and_step(chain_of(network))
    image = noise(1, channels, window[0] + more[0], window[1] + more[1])
    expected = every_window(network, image, window)
    for way in WAYS.values():
        torch.testing.assert_close(way(network)(image), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_geometry_is_derived_and_proved(name: str, way: str) -> None:
    make, channels, window, step = CLASSIFIERS[name]
    network = WAYS[way](seeded(make))
    geometry = geometry_of(network, channels)
    for axis, side, s in zip(geometry.axes, window, step, strict=True):
        assert (axis.scale, axis.alignment) == (1, 1 if way == "dilated" else s)
        assert axis.trim == ((side - 1) // 2, side // 2)
        assert axis.reach == (0, side - 1)
        # Where an offset's map is one row or column, the tracer no longer knows which; a step more and it does.
        least = min(axis.sizes.minimums)
        assert str(axis.sizes) == f"any size from {least}"
        assert least == side if way == "dilated" else side <= least <= side + s
    proof = prove(network, geometry)
    assert proof.ok, proof


@pytest.mark.parametrize("way", WAYS)
def test_a_halo_one_pixel_short_is_found_out(way: str) -> None:
    network = WAYS[way](seeded(networks.lenet))
    geometry = geometry_of(network, 1)
    axes = [replace(axis, reach=(0, 26)) for axis in geometry.axes]
    proof = prove(network, replace(geometry, rows=axes[0], cols=axes[1]))
    assert "poison" in {check.test for check in proof.failures}


@pytest.mark.parametrize("way", WAYS)
def test_prepared_dense_networks_are_folded_and_agree_in_float32(way: str) -> None:
    make, channels, window, _ = CLASSIFIERS["strided convolutions, folded"]
    network = seeded(make)
    image = noise(1, channels, 40, 45, dtype=torch.float32)
    expected = every_window(network, image, window)
    prepared = prepare(WAYS[way](network), "float32")
    assert (prepared.folded, prepared.unfolded) == (2, 0)
    assert prepared.channels_last
    torch.testing.assert_close(prepared(image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_classifier_stays_as_it_is(way: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)).train()
    told, state = str(network), copy.deepcopy(network.state_dict())
    dense = WAYS[way](network)
    dense(torch.ones(1, 1, 9, 9))
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert str(network) == told
    assert network.training
    assert not any(module.training for module in dense.modules())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["lenet", "functional"])
def test_dense_networks_can_be_copied_and_sent(way: str, name: str) -> None:
    make, channels, window, _ = CLASSIFIERS[name]
    dense = WAYS[way](seeded(make))
    image = noise(1, channels, window[0] + 6, window[1] + 3)
    expected = copy.deepcopy(dense).double()(image)
    sent = pickle.loads(pickle.dumps(dense))
    assert torch.equal(sent.double()(image), expected)


def test_layers_before_the_first_stride_are_shared() -> None:
    """LeNet's first convolution sees the one image, its second four offsets, its last sixteen."""
    dense = shift_and_stitch(networks.lenet())
    batches = []
    for module in dense.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, given, _r: batches.append(given[0].shape[0]))
    dense(torch.ones(1, 1, 32, 32))
    assert batches == [1, 4, 16, 16]
    assert [module.stride for module in dense.modules() if isinstance(module, Offsets)] == [(2, 2), (2, 2)]


@pytest.mark.parametrize("way", WAYS)
def test_an_image_smaller_than_the_window_is_refused(way: str) -> None:
    with pytest.raises(GeometryError, match="27 x 40 pixels holds no window; the classifier needs at least 28 x 28"):
        WAYS[way](networks.lenet())(torch.ones(1, 1, 27, 40))


# ---- through the pipeline ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_tiles_equal_the_whole_raster_and_lie_where_the_windows_centres_lie(way: str, tmp_path: Path) -> None:
    network = seeded(networks.lenet)
    model = model_of(WAYS[way](network), 10, bands=1)
    geometry = geometry_of(model.network, 1)
    values = scene((103, 118), 1, seed=3)
    raster = write_raster(tmp_path / "in.tif", values)
    options = SegmentOptions(
        precision="float64", stitch="exact", tile=(82, 85), block=(52, 52), device="cpu",
        stride=1, dense="dilate" if way == "dilated" else "stitch",
    )  # fmt: skip
    segment_raster(raster, tmp_path / "out.zarr", model_of(network, 10, bands=1), options)
    store = open_store(tmp_path / "out.zarr")
    labels = store.array()[:]
    assert labels.shape == (103, 118)
    assert store.spec.transform == (0.5, 0.0, 500000, 0.0, -0.5, 5400000), "the raster's own grid"
    assert (labels == whole_labels(model, geometry, values)).all()
    # Pixel (y, x) has the label of the window of rows y - 13 to y + 14 and columns x - 13 to x + 14.
    around = [Interval(-13, length + 14).reflect(length) for length in labels.shape]
    image = (torch.from_numpy(values[:, around[0]][:, :, around[1]].astype(np.float64)) - MEAN) / STD
    expected = every_window(copy.deepcopy(network).double(), image[None], (28, 28))[0].argmax(0).numpy()
    assert (labels == expected).all()
    assert len(np.unique(labels)) > 1


# ---- refusals ----------------------------------------------------------------------------------------------------


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), *layers)


class Traced(nn.Module):
    """A network whose forward is given."""

    def __init__(self, run: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.run = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), run
        self.register_buffer("mean", torch.ones(1))

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


REFUSED: list[tuple[nn.Module, Sequence[str]]] = [
    (chain(nn.AdaptiveAvgPool2d(1)), ["1 (AdaptiveAvgPool2d) pools over the whole map", "use average pooling"]),
    (chain(nn.Flatten(), nn.Linear(4, 3)), ["1 (Flatten) sees a flattened map", "write linear layers as convolutions"]),
    (chain(nn.Conv2d(4, 4, 3, padding=1)), ["1 (Conv2d) pads its input", "use no padding"]),
    (chain(nn.Conv2d(4, 4, 3, padding="same")), ["1 (Conv2d) pads"]),
    (chain(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), ["1 (Conv2d) pads"]),
    (chain(nn.MaxPool2d(3, 2, padding=1)), ["1 (MaxPool2d) pads"]),
    (chain(nn.ZeroPad2d(1)), ["1 (ZeroPad2d) pads"]),
    (chain(nn.MaxPool2d(2, ceil_mode=True)), ["1 (MaxPool2d) has ceil_mode=True", "use ceil_mode=False"]),
    (chain(nn.MaxPool2d(2, return_indices=True)), ["1 (MaxPool2d) returns where it found its maxima"]),
    (chain(nn.ConvTranspose2d(4, 4, 2, 2)), ["1 (ConvTranspose2d) makes its map larger"]),
    (chain(nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=2))), ["1.1 (Upsample) makes its map larger"]),
    (chain(nn.InstanceNorm2d(4)), ["1 (InstanceNorm2d) normalises by its own input"]),
    (chain(nn.BatchNorm2d(4, track_running_stats=False)), ["1 (BatchNorm2d) normalises by its own input"]),
    (chain(nn.Softmax(dim=3)), ["1 (Softmax) is none of the layers that can be slid"]),
    (chain(nn.LPPool2d(2, 2)), ["1 (LPPool2d) is none of the layers", "max or average pooling"]),
    (networks.SkipNet(), ["up_b (ConvTranspose2d) makes its map larger"]),
    (networks.Parallel(), ["four.2 (ConvTranspose2d)"]),
    (Traced(lambda n, x: torch.cat([n.a(x), n.a(x)], 1)), ["cat (cat) joins several layers"]),
    (Traced(lambda n, x: n.a(x) + n.b(n.a(x))[:, :, :1]), ["add (add) reads several layers"]),
    (Traced(lambda n, x: n.a(x).mean((2, 3))), ["mean (mean) pools over the whole map"]),
    (Traced(lambda n, x: F.max_pool2d(n.a(x), 2, padding=1)), ["(MaxPool2d) pads its input"]),
    (Traced(lambda n, x: F.pad(n.a(x), (1, 1))), ["pad (pad) pads its input"]),
    (Traced(lambda n, x: n.a(x).flatten(1)), ["flatten (flatten) sees a flattened map"]),
    (Traced(lambda n, x: n.a(x)[:, :, 1:]), ["(getitem) is none of the layers"]),
    (Traced(lambda n, x: n.a(x) - n.mean), ["sub (sub) reads several layers"]),
    (Traced(lambda n, x: {"out": n.a(x)}), ["returns a dictionary", "return the scores alone"]),
    (Traced(lambda n, x: n.a(x) if x.sum() > 0 else x), ["torch.fx cannot follow Traced", "nn.Sequential"]),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_slid_is_refused_by_name(case: int, way: str) -> None:
    network, told = REFUSED[case]
    with pytest.raises(ModelError) as caught:
        WAYS[way](network)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in told), message


def test_a_layer_with_hooks_is_refused() -> None:
    network = chain(nn.ReLU())
    network[1].register_forward_hook(lambda module, given, result: result * 2)
    with pytest.raises(ModelError, match=r"1 \(ReLU\) has hooks"):
        dilated(network)
