"""Everything that a CUDA device has to show, in one go: about eight minutes on an H200.

    python tests/benchmarks/gpu.py [--only product,kernels,steps,rivals,agreement,whole,gigapixels] [--json FILE]
                                   [--folder DIR] [--seconds 3] [--rehearse]

    product      the rates that all else is judged by: bf16 matrix products, sustained, and a copy in device memory
    kernels      each of our kernels beside what torch does in its place
    steps        SegNet's bare forward pass at tile 4480, step after step, beside its prediction
    rivals       the same pass by cuDNN's fused convolutions, by its own choice of algorithm, and by torch.compile
    agreement    labels of a bundled network in bf16 against float32
    whole        a job from compressed GeoTIFFs to label shards against the bare pass, halos paid for
    gigapixels   10 gigapixels, warm, the start apart

The last three need the whole package; the others torch, Triton and numba only. Predictions are those of GPU_NOTES.md.
`--rehearse` runs all that can run without a device, tiny, in interpreter and simulator: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ |= {"TRITON_INTERPRET": "1", "NUMBA_ENABLE_CUDASIM": "1"}  # before their imports

import torch

PARTS = ("product", "kernels", "steps", "rivals", "agreement", "whole", "gigapixels")


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is."""

    device: torch.device
    seconds: float
    """Of one measurement."""
    sustained: float
    """Of the matrix products."""
    tile: int
    core: int
    width: float
    """SegNet's."""
    matrix: int
    scene: int
    """Rows and columns of each file behind the VRT, and of the scene that is labelled twice."""
    scenes: int
    side: int
    """Rows and columns of the VRT."""
    whole: int
    """Rows and columns of it that the job against the bare pass computes."""

    @classmethod
    def real(cls, seconds: float) -> Scale:
        """For a CUDA device."""
        return cls(torch.device("cuda", 0), seconds, 10.0, 4480, 4096, 1.0, 8192, 4096, 6, 100_000, 32_768)

    @classmethod
    def rehearsal(cls) -> Scale:
        """For a CPU."""
        return cls(torch.device("cpu"), 0.01, 0.02, 32, 16, 0.05, 64, 128, 2, 300, 256)

    @property
    def cuda(self) -> bool:
        """Whether there is a device."""
        return self.device.type == "cuda"


class Clock:
    """Medians of repeated work, by the device's own events."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    def milliseconds(self, work: Callable[[], Any], seconds: float | None = None) -> float:
        """The median time of one call, after three to warm up."""
        for _ in range(3 if self.scale.cuda else 0):
            work()
        self.settle()
        taken, started = [], time.perf_counter()
        while not taken or time.perf_counter() - started < (seconds or self.scale.seconds):
            taken.append(self._once(work))
        return sorted(taken)[len(taken) // 2]

    def _once(self, work: Callable[[], Any]) -> float:
        if not self.scale.cuda:
            began = time.perf_counter()
            work()
            return (time.perf_counter() - began) * 1e3
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def settle(self) -> None:
        """Waits for the device."""
        if self.scale.cuda:
            torch.cuda.synchronize()


@contextmanager
def computing(scale: Scale) -> Iterator[None]:
    """torch as a job's engine has it: no gradients, cuDNN's algorithms by rule, no TF32."""
    fixed = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), fixed:
        yield
    if scale.cuda:
        torch.cuda.empty_cache()


@dataclass(slots=True)
class Report:
    """What was measured: printed as it comes, kept for the JSON file."""

    figures: dict[str, Any]

    def add(self, part: str, name: str, **values: float | str | None) -> None:
        """One line."""
        self.figures.setdefault(part, {})[name] = values
        told = (f"{key} {_told(value)}" for key, value in values.items() if value is not None)
        print(f"{part:11}{name:34}{'  '.join(told)}", flush=True)

    def get(self, part: str, name: str, key: str, otherwise: float) -> float:
        """A figure measured before, or a stand-in where its part was left out."""
        return float(self.figures.get(part, {}).get(name, {}).get(key, otherwise))


def _told(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.4g}"


def product(scale: Scale, report: Report) -> None:
    """The chip's two ceilings, on random data: zeros run faster than any real pass."""
    clock, side = Clock(scale), scale.matrix
    a, b = (torch.randn(side, side, device=scale.device).bfloat16() for _ in range(2))
    with computing(scale):
        taken = clock.milliseconds(lambda: torch.mm(a, b), scale.sustained)
        report.add("product", "bf16 matrix product", ms=taken, tflops=2 * side**3 / taken / 1e9)
        size = (2 << 30) if scale.cuda else (1 << 16)
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=scale.device)
        target = torch.empty_like(source)
        taken = clock.milliseconds(lambda: target.copy_(source))
        report.add("product", "copy in device memory", ms=taken, gbs=2 * size / taken / 1e6)


def main() -> None:
    """Runs the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where scenes and stores are written; local disk")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    chosen = asked.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    if not asked.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --rehearse runs the parts that need none")
    scale = Scale.rehearsal() if asked.rehearse else Scale.real(asked.seconds)
    report = Report({"device": torch.cuda.get_device_name(0) if scale.cuda else "a rehearsal on a CPU"})
    print(report.figures["device"], "torch", torch.__version__, flush=True)
    with tempfile.TemporaryDirectory(prefix="tilepipe-gpu-", dir=asked.folder) as place:
        for part in PARTS:
            if part in chosen:
                started = time.perf_counter()
                _run(part, scale, report, Path(place))
                report.add(part, "(this part)", seconds=time.perf_counter() - started)
    if asked.json:
        asked.json.write_text(json.dumps(report.figures, indent=1))


def _run(part: str, scale: Scale, report: Report, folder: Path) -> None:
    if part == "product":
        product(scale, report)
    elif part in ("kernels", "steps", "rivals"):
        import gpu_network

        getattr(gpu_network, part)(scale, report)
    else:
        import gpu_job

        getattr(gpu_job, part)(scale, report, folder)


if __name__ == "__main__":
    # Other files import this one by its name: they must find it, and not a second copy.
    sys.modules["gpu"] = sys.modules["__main__"]
    main()
