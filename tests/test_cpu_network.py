"""The CPU's own poolings against torch's, by themselves and inside of networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tilepipe.models import build
from tilepipe.models.pooling import Pool, Unpool
from tilepipe.predict.cpu_network import OneKernelConv2d, SwitchPool, SwitchUnpool
from tilepipe.predict.prepare import prepare
from tilepipe.window import Window


def maps(shape: tuple[int, ...], kind: str) -> torch.Tensor:
    """Values (N, C, rows, columns): few different ones, so that many are equal; with NaN and infinities, or not."""
    x = torch.randint(-2, 3, shape).float()
    if kind == "wild":
        x[torch.rand(shape) < 0.05] = float("nan")
        x[torch.rand(shape) < 0.05] = float("inf")
        x[torch.rand(shape) < 0.05] = float("-inf")
    return x


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    images=st.integers(1, 2),
    channels=st.integers(1, 19),
    rows=st.integers(2, 21),
    cols=st.integers(2, 21),
    relu=st.booleans(),
    kind=st.sampled_from(["tame", "wild"]),
    last=st.booleans(),
)
def test_pooling_and_unpooling_are_torchs(
    seed: int, images: int, channels: int, rows: int, cols: int, relu: bool, kind: str, last: bool
) -> None:
    torch.manual_seed(seed)
    x = maps((images, channels, rows, cols), kind)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    given_map = x.clone(memory_format=torch.preserve_format)
    maxima, indices = F.max_pool2d(torch.relu(x) if relu else x, 2, 2, return_indices=True)
    found, switches = SwitchPool(relu)(x)
    assert torch.equal(x.nan_to_num(9.5), given_map.nan_to_num(9.5)), "the map itself stays as it is"
    torch.testing.assert_close(found, maxima, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(switches.long(), indices // cols % 2 * 2 + indices % cols % 2)
    values = maps(tuple(found.shape), kind)
    wanted = F.max_unpool2d(values, indices, 2, 2, output_size=(rows, cols))
    torch.testing.assert_close(SwitchUnpool()(values, switches, (rows, cols)), wanted, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_part_is_unpooled_as_torch_does(data: st.DataObject) -> None:
    rows, cols = (2 * data.draw(st.integers(1, 9)) for _ in range(2))
    ends = [
        sorted(data.draw(st.lists(st.integers(0, n // 2), min_size=2, max_size=2, unique=True))) for n in (rows, cols)
    ]
    part = Window.of(*ends[0], *ends[1])
    x = maps((1, 3, rows, cols), "tame")
    (_, indices), (_, switches) = Pool()(x), SwitchPool()(x)
    values = torch.randn(1, 3, *part.shape)
    wanted = Unpool().part(values, indices, (rows, cols), part)
    assert torch.equal(SwitchUnpool().part(values, switches, (rows, cols), part), wanted)


class Twice(nn.Module):
    """A ReLU of which a sum reads the result, too: it cannot become part of the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool, self.unpool = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), Pool(), Unpool()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.conv(x))
        pooled, where = self.pool(x)
        return self.unpool(pooled, where, x.shape[-2:]) + x


def pooling(network: nn.Module) -> list[bool]:
    """Of each of its poolings whether it takes the ReLU, too."""
    return [module.relu for module in network.modules() if isinstance(module, SwitchPool)]


@pytest.mark.parametrize(
    ("name", "taken"),
    [("segnet", [True] * 5), ("segnet-basic", [True] * 4), ("segnet-basic-encoder-addition", [False] * 4)],
)
def test_presets_get_the_same_scores_from_them(name: str, taken: list[bool]) -> None:
    torch.manual_seed(0)
    network = build(name, classes=5, bands=3, width=0.1).eval()
    ready, plain = prepare(network), prepare(network)
    for module in list(plain.modules()):
        for child, inner in module.named_children():
            if isinstance(inner, SwitchPool):
                setattr(module, child, nn.Sequential(nn.ReLU(), Pool()) if inner.relu else Pool())
            elif isinstance(inner, SwitchUnpool):
                setattr(module, child, Unpool())
    assert pooling(ready) == taken
    assert pooling(plain) == []
    with torch.inference_mode():
        for shape in ((2, 3, 64, 96), (1, 3, 96, 32)):
            pixels = torch.randn(shape)
            assert torch.equal(ready(pixels), plain(pixels))


def test_a_relu_that_others_read_stays() -> None:
    torch.manual_seed(0)
    network = Twice().eval()
    ready, pixels = prepare(network), torch.randn(1, 3, 8, 10)
    assert pooling(ready) == [False]
    torch.testing.assert_close(ready(pixels), network(pixels))


def test_float64_and_interpolating_decoders_keep_torchs() -> None:
    network = build("segnet", classes=5, bands=3, width=0.1).eval()
    assert pooling(prepare(network, "float64")) == []
    assert not any(isinstance(module, OneKernelConv2d) for module in prepare(network, "float64").modules())
    assert pooling(prepare(build("segnet", classes=5, bands=3, width=0.1, upsample="nearest").eval())) == []
