"""Folding against the unfolded network, and what else a prepared network is."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoder import CLASSES, Encoder, block, fitted
from torch import nn

from tilepipe.predict.folding import fold_batch_norms
from tilepipe.predict.prepare import prepare, use_one_thread


class Residual(nn.Module):
    """A foldable pair, a convolution that a sum reads too, a normalisation before its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 6, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d(6)
        self.second, self.second_norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.before, self.third = nn.BatchNorm2d(6), nn.Conv2d(6, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first_norm(self.first(x)))
        y = self.second(x)
        return self.third(self.before(self.second_norm(y) + y))


class Shared(nn.Module):
    """A pair used twice, and a convolution that feeds two normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.split, self.one, self.two = nn.Conv2d(3, CLASSES, 1), nn.BatchNorm2d(CLASSES), nn.BatchNorm2d(CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = self.norm(self.conv(x)).relu()
        return self.one(self.split(x)) + self.two(self.split(x + 1))


class Branching(nn.Module):
    """What torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.body = block(3, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) if x.sum() > 0 else self.body(-x)


def up(groups: int) -> nn.Sequential:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups)
    return nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.BatchNorm2d(6, affine=False), nn.Conv2d(6, CLASSES, 1))


def networks() -> Iterator[Any]:
    yield pytest.param(Encoder, 4, 0, id="segnet")
    yield pytest.param(Residual, 1, 2, id="residual")
    yield pytest.param(Shared, 1, 2, id="shared")
    yield pytest.param(Branching, 0, 1, id="branching")
    yield pytest.param(lambda: up(1), 1, 0, id="transposed")
    yield pytest.param(lambda: up(2), 1, 0, id="transposed in groups")


@pytest.mark.parametrize(("build", "folded", "unfolded"), list(networks()))
def test_folded_networks_give_the_same_scores(build: Any, folded: int, unfolded: int) -> None:
    network = fitted(build()).double().eval()
    entered = torch.randn(2, 3, 24, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    prepared = prepare(network, "float64")
    with torch.inference_mode():
        np.testing.assert_allclose(prepared(entered), network(entered), rtol=1e-10, atol=1e-10)
    assert (prepared.folded, prepared.unfolded) == (folded, unfolded)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_prepared_networks_are_at_rest() -> None:
    network = nn.Sequential(block(3, 8), nn.Dropout(0.5), nn.Conv2d(8, CLASSES, 1)).train()
    prepared = prepare(network, "bf16")
    assert network.training
    assert not any(module.training for module in prepared.modules())
    assert all(not p.requires_grad and p.dtype == torch.bfloat16 for p in prepared.parameters())
    assert prepared.channels_last
    assert not prepare(network, "float64").channels_last
    assert not prepare(nn.Conv2d(3, CLASSES, 1)).channels_last


def test_modules_with_hooks_are_not_folded() -> None:
    network = block(3, CLASSES).eval()
    network[0].register_forward_hook(lambda module, given, result: result * 2)
    assert fold_batch_norms(network) == 0


def test_a_threads_number_of_threads_stays_one() -> None:
    """Whatever another thread sets before torch first asks for it."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1, initializer=use_one_thread) as pool:
            pool.submit(int).result()
            torch.set_num_threads(before + 2)
            assert pool.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)
