"""The main flow of a benchmark: a job's parts one by one, then the job, then what follows from both.

prepare -> read, stage -> forward per tile -> kernels -> write -> the job itself -> bound and suggestion
"""

from __future__ import annotations

import gc
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tilepipe.bench import input as source
from tilepipe.bench import kernels, network, output, whole
from tilepipe.bench.report import (
    Asked,
    BenchReport,
    ForwardFigure,
    KernelFigure,
    ReadFigure,
    StageFigure,
    Subject,
    WholeFigure,
    best_threads,
    best_tile,
    bound,
    suggestion,
)
from tilepipe.errors import PlanError, RunError, UsageError
from tilepipe.job import Job, prepare, replanned
from tilepipe.machine import versions
from tilepipe.member import Models
from tilepipe.options import SegmentOptions
from tilepipe.predict.cuda_steps import CudaSteps
from tilepipe.predict.prepare import Prepared, use_large_pages
from tilepipe.predict.prepare import prepare as prepare_network
from tilepipe.scene.synthetic import write_scene

SCENE = (4096, 4096)
"""The scene that is made where no raster is given, (rows, columns)."""
SEED = 7
WHOLE = 4
"""How many measurements the job itself lasts, about."""

Note = Callable[[str], None]
"""Hears of what is measured next."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How to measure."""

    seconds: float = 3.0
    """Of one measurement; whatever is measured is done at least once."""
    folder: str | None = None
    """Where to write what is measured and removed again; None is the system's temporary folder."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise UsageError(f"seconds is {self.seconds:g}; it has to be positive")
        if self.folder is not None and not os.path.isdir(self.folder):
            raise UsageError(f"{self.folder} is no folder; name one that is there")


def bench(
    inputs: str | Path | Sequence[str | Path] = (),
    models: Models = None,
    options: SegmentOptions | None = None,
    how: BenchOptions | None = None,
    note: Note = lambda _: None,
) -> BenchReport:
    """What the parts of a job do per second on this machine, what bounds it, and which options suit it.

    `inputs`, `models` and `options` are those of `segment_raster`; without inputs a synthetic scene is written. All
    that is written lies in one folder, which is removed in the end. Raises TilepipeError for what the caller can
    mend: a tile that the network does not take, a raster that cannot be read.
    """
    options, how = options or SegmentOptions(), how or BenchOptions()
    given = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    if options.scheduler is not None:
        raise UsageError("bench measures the machine that it runs on; leave --scheduler out")
    use_large_pages()
    with tempfile.TemporaryDirectory(prefix="tilepipe-bench-", dir=how.folder, ignore_cleanup_errors=True) as place:
        folder = Path(place)
        made = None if given else f"a synthetic scene, seed {SEED}"
        if not given:
            note(f"a synthetic scene of {SCENE[0]} x {SCENE[1]} pixels is being made")
            given = [write_scene(folder, SCENE, SEED)[0]]
        job = prepare(given, models, options)
        return _Bench(given, job, how, folder, note, made).run()


@dataclass(frozen=True, slots=True)
class _Bench:
    """One benchmark."""

    inputs: Sequence[str | Path]
    job: Job
    """As asked for."""
    how: BenchOptions
    folder: Path
    note: Note
    made: str | None
    """What the raster is called where it was made for the purpose."""

    def run(self) -> BenchReport:
        """The report."""
        job, seconds = self.job, self.how.seconds
        read, stage = self._input()
        products: dict[str, float] = {}
        figures = self._forward(products)
        found = suggestion(figures, self._asked())
        best = best_threads(figures, best_tile(figures, found.precision or job.precision))
        chosen = replanned(job, self._options(best, found.tile))
        self.note("the kernels that label and blend")
        measured, copied = kernels.kernels(chosen, self._device(), self._channels_last(chosen), seconds)
        self.note(f"writing blocks of {best.block[0]} x {best.block[1]}")
        written = output.write(chosen, self.folder, seconds)
        reading = ("read", read.rate) if job.staging is None else ("stage", stage.rate)
        rates = dict((reading, ("network", best.rate), _maps(chosen, measured), ("write", written.rate)))
        limit = bound(rates, job.device)
        self.note("the job itself, from file to store")
        gc.collect()
        pixels = limit.expected * 1e6 * WHOLE * seconds
        again = self._network_alone(chosen, best, products[best.precision])
        done = whole.whole(self.inputs, chosen, again, whole.Place(self._device(), self.folder), pixels)
        return BenchReport(
            subject=self._subject(),
            seconds=seconds,
            read=read,
            stage=stage,
            products=products,
            forward=figures,
            copy=copied,
            kernels=measured,
            write=written,
            whole=done,
            rates=rates,
            bound=limit,
            suggestion=found,
            notes=(*job.notes, *_remarks(job, done)),
        )

    def _device(self) -> torch.device:
        """The device of the parts: of several GPUs the first."""
        job = self.job
        if job.device == "cpu":
            return torch.device("cpu")
        gpus = job.options.gpus or ()
        name = f"cuda:{gpus[0]}" if len(gpus) > 1 else job.target
        return torch.device("cuda", int(name.partition(":")[2] or 0))

    def _input(self) -> tuple[ReadFigure, StageFigure]:
        self.note("reading windows of blocks")
        read = source.read(self.job, self.how.seconds)
        self.note("copying into zarr chunks")
        return read, source.stage(self.job, self.folder, self.how.seconds)

    def _forward(self, products: dict[str, float]) -> tuple[ForwardFigure, ...]:
        """The network in each tile worth trying, in each precision; `products` gets the TFLOP/s of each."""
        device, threads, figures = self._device(), self.job.resources.threads, []
        tried = network.candidates(self.job)
        for precision in self._precisions():
            self.note(f"matrix products in {precision}")
            products[precision] = network.product_rate(precision, device, threads, self.how.seconds)
            networks = self._prepared(precision)
            each = [self._in_precision(one, precision) for one in tried]
            fitting = [one for one in each if one is not None]
            for one in fitting:
                batches = network.BATCHES if device.type == "cuda" and max(one.plan.tile) < network.SMALL else ()
                for batch in (1, *batches):
                    figures += self._pass(one, networks, network.Pass(threads, products[precision], batch))
            if precision == self.job.precision and threads > 1 and self.job.options.threads is None:
                best = best_tile(figures, precision)
                one = next(one for one in fitting if one.plan.tile == best.tile)
                figures = self._fewer_threads(one, networks, products[precision], figures)
        if not any(each.precision == self.job.precision and each.batch == 1 for each in figures):
            raise RunError(f"no tile fits into the memory of {device}; choose a smaller --tile")
        return tuple(figures)

    def _fewer_threads(
        self, job: Job, networks: Sequence[Prepared], products: float, figures: list[ForwardFigure]
    ) -> list[ForwardFigure]:
        """The figures, with that of half the threads; where these seem enough, all threads get a second chance."""
        threads = self.job.resources.threads
        figures = figures + self._pass(job, networks, network.Pass(threads // 2, products))
        best = best_tile(figures, job.precision)
        if best_threads(figures, best) is best:
            return figures
        # Another program may have taken the cores meanwhile.
        (again,) = self._pass(job, networks, network.Pass(threads, products))
        return [again if each is best and again.rate > best.rate else each for each in figures]

    def _precisions(self) -> tuple[str, ...]:
        """The job's, and on a CUDA device both that it computes fast."""
        others = ("bf16", "float32") if self.job.device == "cuda" else ()
        return tuple(dict.fromkeys((self.job.precision, *others)))

    def _in_precision(self, job: Job, precision: str) -> Job | None:
        """The job in another precision; None where its tile does not fit then."""
        if precision == job.precision:
            return job
        choice: Any = precision
        try:
            options = replace(job.options, tile=self._tile(job), stitch=job.plan.stitch, precision=choice)
            return replanned(job, options)
        except PlanError:
            return None

    def _tile(self, job: Job) -> tuple[int, int] | None:
        """The tile as an option; several models have none."""
        return job.plan.tile if len(job.members) == 1 else None

    def _pass(self, job: Job, networks: Sequence[Prepared], how: network.Pass) -> list[ForwardFigure]:
        """The one figure; none where the device's memory does not suffice."""
        rows, cols = job.plan.tile
        together = f", {how.batch} together" if how.batch > 1 else ""
        self.note(f"the network in {job.precision} on tiles of {rows} x {cols}, {_threads(how.threads)}{together}")
        try:
            return [network.forward(job, networks, self._device(), self.how.seconds, how)]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return []

    def _network_alone(self, job: Job, best: ForwardFigure, products: float) -> Callable[[], ForwardFigure]:
        """What measures the network of the best figure once more, and holds none between."""
        device, how = self._device(), network.Pass(best.threads, products, best.batch)

        def measure() -> ForwardFigure:
            return network.forward(job, self._prepared(best.precision), device, self.how.seconds, how)

        return measure

    def _prepared(self, precision: str) -> list[Prepared]:
        """The job's networks on the device of the parts."""
        device = self._device()
        steps = CudaSteps.on(device.type)
        return [prepare_network(member.network, precision, device, steps) for member in self.job.members]

    def _asked(self) -> Asked:
        job = self.job
        # A tile that is asked for would otherwise make exact stitching count as worth any cost.
        keep = job.options.stitch == "auto" and job.plan.stitch == "blend" and job.geometry.obstacle is None
        return Asked(
            kind=job.device,
            precision=job.precision,
            models=len(job.members),
            workers=job.options.workers,
            stitch="blend" if keep else None,
        )

    def _options(self, best: ForwardFigure, tile: tuple[int, int] | None) -> SegmentOptions:
        """The options of a job with the best tile."""
        precision: Any = best.precision
        threads = best.threads if self.job.device == "cpu" else self.job.options.threads
        options = replace(self.job.options, tile=tile, block=best.block, threads=threads, precision=precision)
        return replace(options, stitch=self.job.plan.stitch)

    def _channels_last(self, job: Job) -> bool:
        """Whether the network's scores lie in memory as (h, w, classes)."""
        return prepare_network(job.members[0].network, job.precision).channels_last

    def _subject(self) -> Subject:
        job, info = self.job, self.job.source.info
        return Subject(
            device=_device_name(self._device()),
            kind=job.device,
            cores=len(os.sched_getaffinity(0)),
            versions=versions(),
            raster=info.name if self.made is None else self.made,
            shape=info.shape,
            bands=info.bands,
            dtype=info.dtype,
            models=tuple(member.model.source for member in job.members),
            stitch=job.plan.stitch,
            precision=job.precision,
        )


def _maps(job: Job, figures: Sequence[KernelFigure]) -> tuple[str, float]:
    """What turns scores into maps, and its Mpx/s of the raster."""
    rates, made = {each.name: each.rate for each in figures}, job.plan
    cells = made.scale[0] * made.scale[1]
    if made.exact:
        return "label", rates["label"] * cells
    added = made.tiles * made.tile_output[0] * made.tile_output[1] / made.region.area
    return "blend", cells / (added / rates["accumulate"] + 1 / rates["finish"])


def _remarks(job: Job, done: WholeFigure) -> Iterator[str]:
    """What the figures leave out."""
    if len(job.members) > 1:
        yield "the tiles of several models follow from their cores, and are not chosen; one pass is a tile of each"
    if len(job.members) > 1 or job.crf is not None:
        yield "combining and refining probabilities is part of the whole job only"
    if done.nodata:
        yield "part of the region has no data; tiles in it are not computed, yet count for the busy share"
    if not job.plan.exact:
        yield "a blended map depends on its tile: another tile is another map"
    if done.blocks < 2 * job.resources.blocks:
        few = "a single block" if done.blocks == 1 else f"{done.blocks} blocks"
        yield f"the job itself had {few}, so that start and end weigh; a larger raster or more --seconds steadies it"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _device_name(device: torch.device) -> str:
    """The name of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
