"""Checks of networks whose modules are replaced by ours for CUDA, against the same networks in torch, on any device.

Run as triton_checks.py is. In float64, where no near-tie between pooled pixels falls the other way because a
convolution's bias was added elsewhere.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tilepipe.models import build
from tilepipe.models.layers import conv_stage
from tilepipe.models.pooling import Pool, Unpool
from tilepipe.predict.cuda_network import BiasRelu, PaddedConv2d, SwitchPool, SwitchUnpool, adapt
from tilepipe.predict.cuda_steps import CudaSteps
from tilepipe.predict.prepare import Prepared, prepare
from tilepipe.window import Window

NETWORKS = {"segnet": 32, "segnet-basic": 16, "segnet-basic-encoder-addition": 16, "deconvnet": 32}
"""Legal sizes' step."""


def folded(network: nn.Module, device: str) -> Prepared:
    torch.manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias)
    return prepare(network.eval(), "float64", device)


def adapted(ready: Prepared, **steps: bool | int) -> Prepared:
    other = copy.deepcopy(ready)
    adapt(other.network, CudaSteps(**{"pooling": False, "fused": False, **steps}))  # type: ignore[arg-type]
    return other


def count(network: nn.Module, kind: type[nn.Module], biased: bool | None = None) -> int:
    found = [module for module in network.modules() if type(module) is kind]
    return sum(biased is None or (getattr(module, "bias", None) is not None) == biased for module in found)


def compare(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def small(name: str) -> nn.Module:
    more = {"fc_width": 8, "size": 32} if name == "deconvnet" else {}
    torch.manual_seed(0)
    return build(name, classes=4, bands=3, width=0.08, **more)


def noise(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device)


@torch.inference_mode()
def check_modules(device: str) -> None:
    """Pooling alone, and bias with ReLU alone, each leaves the scores as they are."""
    for name, step in list(NETWORKS.items())[:2]:
        ready, pixels = folded(small(name), device), noise(device, 2, 3, step, step * 2)
        for steps in ({"pooling": True}, {"fused": True}):
            ours = adapted(ready, **steps)
            compare(ours(pixels), ready(pixels))
            replaced = count(ours, SwitchPool, False), count(ours, Pool)
            pools = count(ready, Pool)
            assert replaced == ((pools, 0) if "pooling" in steps else (0, pools)), name


@torch.inference_mode()
def check_fused(device: str) -> None:
    """Both together: which modules took over which biases, and the scores."""
    expected = {  # pools, unpools with a bias; biases and ReLUs by themselves; convolutions that keep their bias
        "segnet": (5, 4, 25 - 5 - 4, 1),
        "segnet-basic": (4, 3, 0, 2),
        "segnet-basic-encoder-addition": (0, 0, 4, 5),
        "deconvnet": (5, 5, 29 - 5 - 5, 1),
    }
    for name, step in NETWORKS.items():
        ready, pixels = folded(small(name), device), noise(device, 1, 3, step * 2, step)
        ours = adapted(ready, pooling=True, fused=True)
        compare(ours(pixels), ready(pixels))
        convs = [m for m in ours.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        found = (
            count(ours, SwitchPool, True),
            count(ours, SwitchUnpool, True),
            count(ours, BiasRelu),
            sum(m.bias is not None for m in convs),
        )
        assert found == expected[name], (name, found)
        assert count(ours, Pool) == count(ours, Unpool) == 0


@torch.inference_mode()
def check_parts(device: str) -> None:
    """Parts of a decoder's output, whose maps are cut out of larger ones."""
    for name in ("segnet", "segnet-basic-encoder-addition"):
        ready = folded(small(name), device)
        ours, pixels = adapted(ready, pooling=True, fused=True), noise(device, 1, 3, 64, 96)
        whole = ready(pixels)
        for part in (Window.of(37, 41, 50, 55), Window.of(0, 33, 80, 96)):
            found = ours.forward_part(pixels, part)
            compare(found, whole[..., part.rows.start : part.rows.stop, part.cols.start : part.cols.stop])


class Shared(nn.Module):
    """A ReLU used twice, a convolution read twice, and one that is read by name."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.own = nn.ReLU(), nn.ReLU()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.pool, self.unpool = Pool(), Unpool()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.b(self.relu(self.a(x))))
        y = self.c(x)
        x, where = self.pool(self.own(y) + y)
        return self.d(self.unpool(x, where, y.shape[-2:])) + self.d.bias.view(-1, 1, 1)


@torch.inference_mode()
def check_others(device: str) -> None:
    """What cannot be shown to have one reader keeps its bias; interpolating decoders and odd sizes stay right."""
    ready, pixels = folded(Shared(), device), noise(device, 1, 3, 11, 14)
    ours = adapted(ready, pooling=True, fused=True)
    compare(ours(pixels), ready(pixels))
    assert (count(ours, BiasRelu), count(ours, SwitchPool, False), count(ours, SwitchUnpool, False)) == (0, 1, 1)
    torch.manual_seed(0)
    nearest = folded(build("segnet", classes=4, bands=3, width=0.08, upsample="nearest"), device)
    ours, pixels = adapted(nearest, pooling=True, fused=True), noise(device, 1, 3, 32, 64)
    compare(ours(pixels), nearest(pixels))
    assert (count(ours, Pool), count(ours, SwitchPool), count(ours, BiasRelu)) == (5, 0, 25)


@torch.inference_mode()
def check_padded(device: str) -> None:
    """More input channels, whether the caller gives them or not."""
    torch.manual_seed(0)
    for network in (small("segnet"), nn.Sequential(*conv_stage([3, 4]), nn.Conv2d(4, 4, 1))):
        ready, pixels = folded(network, device), noise(device, 1, 3, 32, 32)
        ours = adapted(ready, bands=8, fused=True)
        assert count(ours, PaddedConv2d) == 1
        more = torch.cat([pixels, torch.zeros_like(pixels), torch.zeros_like(pixels)[:, :2]], 1)
        for given in (pixels, more):
            compare(ours(given), ready(pixels))


CHECKS = (check_modules, check_fused, check_parts, check_others, check_padded)
