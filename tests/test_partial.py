"""Parts of a decoder's output, computed alone: what the whole pass gives there, for less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tilepipe.models import build
from tilepipe.models.partial import Partial
from tilepipe.predict.prepare import prepare
from tilepipe.window import Window

STEPS = [
    ("segnet", 32),
    ("segnet-basic", 16),
    ("segnet-basic-encoder-addition", 16),
    ("segnet-basic-single-channel-decoder", 16),
]


def network(name: str, *upsample: str) -> torch.nn.Module:
    """A small network whose batch normalisations do something."""
    torch.manual_seed(0)
    made = build(name, classes=5, bands=3, width=0.1, **({"upsample": upsample[0]} if upsample else {})).eval()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return made


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize(("name", "step"), STEPS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_part_is_what_the_whole_pass_gives_there(name: str, step: int, precision: str, data: st.DataObject) -> None:
    ready = prepare(network(name), precision)
    assert ready.folded > 0
    assert ready.is_partial
    shape = [step * data.draw(st.integers(1, 6)) for _ in range(2)]
    rows, cols = (sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in shape)
    part = Window.of(*rows, *cols)
    pixels = torch.randn(1, 3, *shape, dtype=ready.dtype)
    with torch.inference_mode():
        whole, found = ready(pixels), ready.forward_part(pixels, part)
    assert found.shape[2:] == part.shape
    torch.testing.assert_close(found, whole[..., rows[0] : rows[1], cols[0] : cols[1]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
def test_interpolating_decoders_are_cropped_at_the_end(upsample: str) -> None:
    made = network("segnet", upsample)
    pixels, part = torch.randn(1, 3, 64, 96), Window.of(5, 40, 17, 96)
    with torch.inference_mode():
        torch.testing.assert_close(made.forward_part(pixels, part), made(pixels)[..., 5:40, 17:96])


def test_other_networks_are_not_partial() -> None:
    for name in ("fcn8s", "deconvnet", "autoencoder", "lenet"):
        with torch.device("meta"):
            made = build(name)
        assert not isinstance(made, Partial)


@pytest.mark.parametrize(("core", "tile", "whole", "part"), [(1024, 1408, 1.89, 1.50), (2048, 2432, 1.41, 1.23)])
def test_what_the_cropped_decoder_saves(core: int, tile: int, whole: float, part: float) -> None:
    """SegNet's arithmetic for an inner tile over that of its core alone, counted by torch on meta tensors."""
    with torch.device("meta"):
        segnet = build("segnet", classes=12).eval()

    def cost(side: int, window: Window | None) -> int:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            pixels = torch.empty(1, 3, side, side, device="meta")
            segnet(pixels) if window is None else segnet.forward_part(pixels, window)
        return counter.get_total_flops()

    halo = (tile - core) // 2
    inner = Window.of(halo, halo + core, halo, halo + core)
    assert cost(tile, None) / cost(core, None) == pytest.approx(whole, abs=0.01)
    assert cost(tile, inner) / cost(core, None) == pytest.approx(part, abs=0.01)
