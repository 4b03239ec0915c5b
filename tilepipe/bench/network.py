"""The bare network: which tiles are worth trying, and how fast each passes, beside plain matrix products.

On a CPU one tile per thread with one torch thread each, on a CUDA device one after the other: as a job runs them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tilepipe.axis import AxisPlan, blend_axis, exact_axis, extended_size
from tilepipe.bench.clock import sustained
from tilepipe.bench.report import ForwardFigure
from tilepipe.errors import PlanError
from tilepipe.geometry.network import AxisGeometry
from tilepipe.job import Job, replanned
from tilepipe.models.partial import Partial
from tilepipe.predict.prepare import DTYPES, Prepared, scores_of
from tilepipe.trace import activation_bytes
from tilepipe.window import Window

CORES = (512, 1024, 2048)
"""Outputs of the cores that are tried, about."""
BATCHES = (2, 4)
"""Tiles that pass a CUDA device together, beside single ones, where they are smaller than SMALL."""
SMALL = 1024
LONG = 10.0
"""Seconds of a first pass beside which it does not matter that caches were empty: it is not repeated."""
PRODUCT = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied."""


def candidates(job: Job) -> list[Job]:
    """The job with each tile that is worth trying, the smallest first; only itself where its tile is not free.

    Tiles for cores of about CORES that fit the memory limits, and the one that the plan chose.
    """
    if job.options.tile is not None or len(job.members) > 1:
        return [job]
    found = {job.plan.tile: _fed(job)}
    for core in CORES:
        try:
            # The stitching stays what the plan chose: a tile that is asked for would count as worth any cost.
            made = replanned(job, replace(job.options, tile=_tile(job, core), stitch=job.plan.stitch))
        except PlanError:
            continue
        found.setdefault(made.plan.tile, _fed(made))
    return sorted(found.values(), key=lambda each: each.plan.tile[0] * each.plan.tile[1])


def _fed(job: Job) -> Job:
    """The job with blocks of so many tiles that those in flight have one for each thread, if they fit."""
    plan, resources = job.plan, job.resources
    tiles = max(1, plan.block[0] // plan.core[0]) * max(1, plan.block[1] // plan.core[1])
    if job.options.block is not None or not plan.exact or tiles * resources.blocks >= resources.threads:
        return job
    if plan.block_count == 1:
        return job
    twice = replace(job.options, tile=plan.tile, stitch="exact", block=(2 * plan.block[0], 2 * plan.block[1]))
    try:
        larger = replanned(job, twice)
    except PlanError:
        return job
    return _fed(replace(larger, options=replace(larger.options, block=None)))


def _tile(job: Job, core: int) -> tuple[int, int]:
    """The tile, (rows, columns), around a core of about so many outputs."""
    rows, cols = (
        _axis(axis, length, core, job.plan.exact, job.options.overlap)
        for axis, length in zip(job.geometry.axes, job.source.info.shape, strict=True)
    )
    return rows.tile, cols.tile


def _axis(axis: AxisGeometry, length: int, core: int, exact: bool, overlap: int | None) -> AxisPlan:
    if exact:
        return exact_axis(axis, length, core)
    if axis.sizes.step == 0:
        return blend_axis(axis, length, None, overlap)
    extended = extended_size(axis, length)
    return blend_axis(axis, length, min(axis.sizes.ceil(core + sum(axis.trim), extended), extended), overlap)


@contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """A context in which torch computes on `device` as a job's engine does."""
    with torch.inference_mode():
        if device.type == "cpu":
            yield
            return
        fixed = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.cuda.device(device), fixed:
            yield


def settling(device: torch.device) -> Callable[[], None]:
    """What waits for all that is queued on `device`."""
    return lambda: torch.cuda.synchronize(device) if device.type == "cuda" else None


def product_rate(precision: str, device: torch.device, threads: int, seconds: float) -> float:
    """TFLOP/s of matrix products in this precision, of all threads together."""
    side = PRODUCT[device.type]
    pairs = [[torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2)] for _ in range(threads)]

    def multiply(number: int) -> float:
        with computing(device):
            torch.mm(*pairs[number])
        return 2 * side**3 / 1e12

    return sustained(multiply, seconds, threads, settling(device)).amount


@dataclass(frozen=True, slots=True)
class Pass:
    """How tiles go through the network: how many at once, and beside what they are judged."""

    threads: int
    products: float
    """TFLOP/s of matrix products in the same precision."""
    batch: int = 1


def forward(job: Job, networks: Sequence[Prepared], device: torch.device, seconds: float, how: Pass) -> ForwardFigure:
    """How fast the job's prepared `networks` pass noise in tiles of its plans.

    With several models a pass is one tile of each. Raises ModelError where a network fails, RunError or torch's own
    error where memory does not suffice.
    """
    channels = [member.geometry.channels_out for member in job.members]
    parts = [(len(member.bands), made.tile) for member, made in zip(job.members, job.plans, strict=True)]
    cores = [made.inner_core for made in job.plans]
    noise = [
        [
            _noise(network, (how.batch, bands, *tile), device)
            for network, (bands, tile) in zip(networks, parts, strict=True)
        ]
        for _ in range(how.threads)
    ]
    pixels = how.batch * sum(tile[0] * tile[1] for _, tile in parts) / 1e6

    def run(number: int) -> float:
        with computing(device):
            for network, tiles, classes, core in zip(networks, noise[number], channels, cores, strict=True):
                if how.batch == 1:
                    scores_of(network, tiles, classes, core)
                else:
                    network(tiles)
        return pixels

    rate = sustained(run, seconds, how.threads, settling(device), enough=max(LONG, seconds))
    tflops = rate.amount / pixels * how.batch * flops(job, whole=how.batch > 1) / 1e12
    return ForwardFigure(
        tile=job.plan.tile,
        core=job.plan.core,
        block=job.plan.block,
        blocks=job.plan.block_count,
        precision=job.precision,
        threads=how.threads,
        batch=how.batch,
        seconds=rate.seconds,
        network_rate=rate.amount,
        rate=rate.amount / sum(made.overhead for made in job.plans),
        tflops=tflops,
        share=tflops / how.products,
    )


def flops(job: Job, whole: bool = False) -> int:
    """Multiplications and additions of one inner tile of each of the job's networks; of its `whole` output, or not."""
    return sum(
        _flops(member.network, (1, len(member.bands), *made.tile), None if whole else made.inner_core)
        for member, made in zip(job.members, job.plans, strict=True)
    )


def _flops(network: nn.Module, shape: tuple[int, int, int, int], core: Window | None) -> int:
    if core is None or not isinstance(network, Partial):
        return activation_bytes(network, shape, torch.float32).flops
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        copy.deepcopy(network).to("meta").forward_part(torch.empty(shape, device="meta"), core)
    return int(counter.get_total_flops())


def _noise(network: Prepared, shape: tuple[int, int, int, int], device: torch.device) -> torch.Tensor:
    """Normalised pixels as a job's engine lays them out."""
    dtype = torch.float64 if network.dtype == torch.float64 else torch.float32
    layout = torch.channels_last if network.channels_last else torch.contiguous_format
    return torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=layout)
