"""SegNet's forward pass on a device, step after step, and our kernels beside torch's; parts of gpu.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gpu import Clock, Report, Scale, computing
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tilepipe.models import build
from tilepipe.predict import triton_kernels
from tilepipe.predict.cuda_steps import CudaSteps
from tilepipe.predict.prepare import Prepared, prepare
from tilepipe.window import Window

CLASSES = 12
COPY = 4300.0
"""GB/s of copies, bytes read and written, where that part was left out: seen on an H200."""
PRODUCT = 780.0
"""TFLOP/s of bf16 matrix products, likewise."""
COMPILING = 170
"""Seconds that torch.compile may take."""


@dataclass(frozen=True, slots=True)
class Step:
    """One more way to be faster than the line before it."""

    name: str
    make: Callable[[], Callable[[Tensor], Tensor]]
    saves: float | None = None
    """Bytes of device memory per pixel of the tile that it is predicted to save, at width 1; see GPU_NOTES.md."""
    part: bool = False
    """Whether it computes what the core needs, and no more."""


def segnet(scale: Scale) -> nn.Module:
    """SegNet whose weights and statistics are random."""
    torch.manual_seed(0)
    return build("segnet", classes=CLASSES, bands=3, width=scale.width).eval()


def pixels_for(scale: Scale) -> Tensor:
    """Noise as a tile's input."""
    noise = torch.randn(1, 3, scale.tile, scale.tile, device=scale.device)
    return noise.bfloat16().contiguous(memory_format=torch.channels_last)


def ready(scale: Scale, **steps: Any) -> Prepared:
    """SegNet as a job prepares it, in bf16, with these steps and no other."""
    chosen = CudaSteps(**{"pooling": False, "fused": False, "upload": False, "graph_pixels": 0, **steps})
    return prepare(segnet(scale), "bf16", scale.device, chosen)


def eager(scale: Scale) -> Callable[[Tensor], Tensor]:
    """What people run: channels-last under autocast, batch normalisation and all."""
    network = segnet(scale).to(scale.device, memory_format=torch.channels_last)

    def run(pixels: Tensor) -> Tensor:
        with torch.autocast(scale.device.type, torch.bfloat16):
            return network(pixels)

    return run


def captured(scale: Scale) -> Callable[[Tensor], Tensor]:
    """The pass as one launch."""
    from tilepipe.predict.cuda_graph import Passes

    device = engine_device(scale)
    passes = Passes(ready(scale, pooling=True, fused=True), CLASSES, device, True)

    def run(pixels: Tensor) -> Tensor:
        with on_its_stream(device, scale):
            return passes(pixels, Window.whole((scale.tile, scale.tile))).scores

    return run


def labelled(scale: Scale, **steps: Any) -> Callable[[Tensor], Any]:
    """A job's one tile from the block's pixels to its labels, all on the device."""
    from tilepipe.predict.cuda import CudaEngine, _Block
    from tilepipe.predict.maps import BlockJob, Wanted
    from tilepipe.predict.scores import statistics_of
    from tilepipe.window import Placement

    device, side, core = engine_device(scale), scale.tile, inner(scale)
    chosen = CudaSteps(**{"graph_pixels": 0, **steps})
    network = prepare(segnet(scale), "bf16", scale.device, chosen)
    engine = CudaEngine(network, statistics_of([110.0] * 3, [50.0] * 3, "bf16"), CLASSES, (side, side), device, chosen)
    values = np.random.default_rng(0).integers(0, 256, (3, side, side)).astype(np.uint8)
    place = Placement(Window.whole((side, side)), core, Window.whole(core.shape), core)
    with device.computing():
        block = _Block(engine, BlockJob(values, None, None, [place], core.shape, Wanted()))

    def run(pixels: Tensor) -> Any:
        with on_its_stream(device, scale):
            return block.exact()

    return run


def engine_device(scale: Scale) -> Any:
    """The device as the engine uses it, or what the tests have for one."""
    if not scale.cuda:
        sys.path.append(str(Path(__file__).parents[1]))
        from cuda_simulator import HostDevice

        return HostDevice()
    from tilepipe.predict.cuda_device import CudaDevice

    return CudaDevice(scale.device)


@contextmanager
def on_its_stream(device: Any, scale: Scale) -> Iterator[None]:
    """The engine's own stream, between the clock's events on the current one."""
    if scale.cuda:
        device._computing.wait_stream(torch.cuda.current_stream())
    with device.computing():
        yield
    if scale.cuda:
        torch.cuda.current_stream().wait_stream(device._computing)


def inner(scale: Scale) -> Window:
    """The core of an inner tile."""
    halo = (scale.tile - scale.core) // 2
    return Window.of(halo, halo + scale.core, halo, halo + scale.core)


def cropping(network: Prepared, scale: Scale) -> Callable[[Tensor], Tensor]:
    """The pass as a job runs it."""
    return lambda pixels: network.forward_part(pixels, inner(scale))


def all_steps(scale: Scale) -> Iterator[Step]:
    """The steps in order; each has all that came before it."""
    yield Step("eager, autocast", lambda: eager(scale))
    yield Step("folded", lambda: prepare(segnet(scale), "bf16", scale.device), 1792)
    yield Step("+ pooling kernels", lambda: ready(scale, pooling=True), 1587)
    yield Step("+ fused bias and ReLU", lambda: ready(scale, pooling=True, fused=True), 2400)
    for bands in (4, 8):
        yield Step(
            f"+ input of {bands} channels",
            lambda bands=bands: ready(scale, pooling=True, fused=True, bands=bands),
            0,
        )
    yield Step("+ graph", lambda: captured(scale), -2 * CLASSES * 2 / scale.width)
    yield Step("+ cropped to the core", lambda: cropping(ready(scale, pooling=True, fused=True), scale), None, True)
    yield Step("a job's tile, torch's input", lambda: labelled(scale, upload=False), None, True)
    yield Step("+ input kernel", lambda: labelled(scale), 108 / scale.width, True)
    yield Step("+ labels without scores", lambda: labelled(scale, classifier=True), 160 / scale.width, True)


def steps(scale: Scale, report: Report) -> None:
    """The table of steps: time, rate, share of the matrix product's, gain over the line before and as predicted."""
    product = report.get("product", "bf16 matrix product", "tflops", PRODUCT)
    copy = report.get("product", "copy in device memory", "gbs", COPY)
    before = first = 0.0
    for step in all_steps(scale):
        taken = _pass(step, scale)
        if taken is None:
            report.add("steps", step.name, left_out="it does not run here")
            continue
        first = first or taken
        predicted = None if step.saves is None else step.saves * scale.width * scale.tile**2 / copy / 1e6
        report.add(
            "steps",
            step.name,
            **_rates(taken, flops(scale, step.part), product, scale),
            times_eager=first / taken,
            gain_ms=before - taken if before and predicted is not None else None,
            predicted_gain_ms=predicted,
        )
        if not step.name.startswith("+ input of"):
            before = taken


def _pass(step: Step, scale: Scale) -> float | None:
    with computing(scale):
        try:
            run, pixels = step.make(), pixels_for(scale)
            return Clock(scale).milliseconds(lambda: run(pixels))
        except RuntimeError as error:
            print(f"{step.name}: {str(error).splitlines()[0]}", file=sys.stderr)
            return None


def _rates(taken: float, work: float, product: float, scale: Scale) -> dict[str, float]:
    tflops = work / taken / 1e9
    return {"ms": taken, "mpxs": scale.tile**2 / taken / 1e3, "tflops": tflops, "share": tflops / product}


def flops(scale: Scale, part: bool) -> float:
    """Of one pass, counted by torch."""
    with torch.device("meta"):
        network = build("segnet", classes=CLASSES, bands=3, width=scale.width).eval()
        pixels = torch.empty(1, 3, scale.tile, scale.tile)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.forward_part(pixels, inner(scale)) if part else network(pixels)
    return float(counter.get_total_flops())


# --- kernels --------------------------------------------------------------------------------------------------


def kernels(scale: Scale, report: Report) -> None:
    """Each kernel on the first stage's map: its time, its bytes per second as a share of a copy's, torch's time."""
    copy = report.get("product", "copy in device memory", "gbs", COPY)
    side, channels = scale.tile, max(1, round(64 * scale.width))
    with computing(scale):
        x = torch.randn(1, channels, side, side, device=scale.device).bfloat16()
        x = x.contiguous(memory_format=torch.channels_last)
        bias = torch.randn(channels, device=scale.device).bfloat16()
        shape, size = bias.view(1, -1, 1, 1), x.numel()
        small, switches = triton_kernels.pool(x, bias, True)
        _, indices = F.max_pool2d(x, 2, 2, return_indices=True)
        block = torch.randint(0, 255, (3, side, side), dtype=torch.uint8, device=scale.device)
        mean, std = torch.rand(3, device=scale.device) * 100, torch.rand(3, device=scale.device) + 50
        out = torch.empty_like(pixels_for(scale))
        pairs: dict[str, tuple[float, Callable[[], Any], Callable[[], Any]]] = {
            "bias, ReLU": (4 * size, lambda: triton_kernels.bias_relu_(x, bias), lambda: x.add_(shape).relu_()),
            "bias, ReLU, pool": (
                (2 + 0.75) * size,
                lambda: triton_kernels.pool(x, bias, True),
                lambda: F.max_pool2d(x.add_(shape).relu_(), 2, 2, return_indices=True),
            ),
            "bias, ReLU, unpool": (
                (2 + 0.75) * size,
                lambda: triton_kernels.unpool(small, bias, True, switches, (side, side)),
                lambda: F.max_unpool2d(small.add_(shape).relu_(), indices, 2, 2, output_size=(side, side)).contiguous(
                    memory_format=torch.channels_last
                ),
            ),
            "normalised input": (
                9 * side**2,
                lambda: triton_kernels.normalise(block, None, (0, 0), mean, std, out),
                lambda: out.copy_(block.float().sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))[None]),
            ),
        }
        for name, (moved, ours, torchs) in pairs.items():
            taken, theirs = (Clock(scale).milliseconds(work, scale.seconds / 4) for work in (ours, torchs))
            share = moved / taken / 1e6 / copy
            report.add("kernels", name, ms=taken, share_of_copy=share, predicted_share=0.85, torch_ms=theirs)


# --- rivals ---------------------------------------------------------------------------------------------------


class CudnnRelu(nn.Module):
    """A convolution with bias and ReLU in cuDNN's one kernel."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """The map."""
        c = self.conv
        return torch.cudnn_convolution_relu(x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)


def with_cudnn_relu(network: Prepared) -> Prepared:
    """The network with each convolution, identity and ReLU of a sequence as one kernel."""
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            layers = list(module)
            for n in range(len(layers) - 2):
                if isinstance(layers[n], nn.Conv2d) and isinstance(layers[n + 2], nn.ReLU):
                    module[n], module[n + 2] = CudnnRelu(layers[n]), nn.Identity()
    return network


def by_timing(network: Prepared) -> Callable[[Tensor], Tensor]:
    """The network with cuDNN's fastest algorithms, which another run need not find again."""

    def run(pixels: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
            return network(pixels)

    return run


def rivals(scale: Scale, report: Report) -> None:
    """Other ways to the same pass; each has the pooling kernels, but for torch.compile."""
    product = report.get("product", "bf16 matrix product", "tflops", PRODUCT)
    if not scale.cuda:
        report.add("rivals", "all", left_out="they need a CUDA device")
        return
    whole = flops(scale, False)
    fused = Step("cuDNN's convolution with ReLU", lambda: with_cudnn_relu(ready(scale, pooling=True)))
    timed = Step("algorithms by timing", lambda: by_timing(ready(scale, pooling=True, fused=True)))
    for step in (fused, timed):
        taken = _pass(step, scale)
        told = {"left_out": "it does not run here"} if taken is None else _rates(taken, whole, product, scale)
        report.add("rivals", step.name, **told)
    # In a process of its own, which can be given up.
    command = [sys.executable, __file__, str(scale.seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILING, check=True)
        taken = float(done.stdout.split()[-1])
        report.add("rivals", "torch.compile, max-autotune", **_rates(taken, whole, product, scale))
    except subprocess.TimeoutExpired:
        report.add("rivals", "torch.compile, max-autotune", left_out=f"not compiled after {COMPILING} s")
    except subprocess.CalledProcessError as error:
        report.add("rivals", "torch.compile, max-autotune", left_out=error.stderr.strip().splitlines()[-1])


def compiled() -> None:
    """Prints the milliseconds of SegNet's folded pass compiled by torch."""
    scale = Scale.real(float(sys.argv[1]))
    with torch.inference_mode():
        network = torch.compile(prepare(segnet(scale), "bf16", scale.device), mode="max-autotune-no-cudagraphs")
        pixels = pixels_for(scale)
        print(Clock(scale).milliseconds(lambda: network(pixels)))


if __name__ == "__main__":
    compiled()
