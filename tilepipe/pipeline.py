"""The main flow: a raster file in, a label map out.

    prepare -> create or resume the store -> run_block over the blocks that are not done -> overviews

Blocks exchange nothing: each reads its own window, halo included, and writes its own shards and record.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from tilepipe.block import BlockRecipe, Outcome, run_block
from tilepipe.errors import ReadError, StoppedError, UsageError
from tilepipe.job import Job, prepare
from tilepipe.member import Models, OneModel
from tilepipe.options import SegmentOptions
from tilepipe.overviews import add_overviews
from tilepipe.plan import BlockIndex
from tilepipe.predict.prepare import use_large_pages
from tilepipe.progress import Progress
from tilepipe.raster.ingest import staged
from tilepipe.raster.source import RasterSource
from tilepipe.schedule import Bounded, Crew, Stop, map_bounded
from tilepipe.shelf import Shelf
from tilepipe.store.objects import is_url
from tilepipe.store.output import OutputStore, create_or_resume, stored_spec
from tilepipe.store.spec import StoreSpec

WAITING = 3
"""Blocks submitted for each that the workers run at once: one that ends finds the next waiting, while the scheduler
hears of several ends together."""
HOPELESS = 1024
"""Blocks that cannot be read, with none that can, after which a run does not try the others."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a finished job did."""

    output: str
    stitch: str
    blocks: int
    computed: int
    """Blocks of this run."""
    resumed: int
    pixels: int
    """Outputs of this run."""
    seconds: float
    """From the first block's start to the last one's end."""
    start_seconds: float
    """Before the first block: opening, geometry, plan, workers, model."""
    classes: dict[str, int]
    """Pixels of each class over the whole map; none where values were written."""
    channels: dict[str, dict[str, Any]]
    """Pixels, min, mean and max of each channel, where values were written."""
    nodata: int
    overlapped: int
    """Pixels that several tiles labelled; blended only."""
    disagreed: int
    """Of these, pixels whose tiles did not agree."""
    notes: tuple[str, ...]
    overviews: Sequence[int] = ()
    """The factors of the overviews that the store has, 2, 4, ...; none where they were not asked for."""
    overview_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Megapixels per second, start-up excluded."""
        return self.pixels / 1e6 / self.seconds if self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return {**asdict(self), "rate": self.rate, "notes": list(self.notes)}


@dataclass(frozen=True, slots=True)
class Workshop:
    """What one job can leave to the next: workers with their networks, models, derivations. For one thread."""

    crew: Crew = field(default_factory=Crew)
    shelf: Shelf = field(default_factory=Shelf)

    def close(self) -> None:
        """Ends the workers that were started here."""
        self.crew.close()


def segment_raster(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    model: Models = None,
    options: SegmentOptions | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
    announce: Callable[[Job], None] | None = None,
    stop: Stop | None = None,
    workshop: Workshop | None = None,
) -> Summary:
    """What was done to make `output` the label map of `inputs`; an unfinished output is resumed.

    `inputs` is anything GDAL opens, several files read as one mosaic, or a zarr array; `model` a model file, a
    bundled model's name, a `ModelReference` or a `Model`, several of these for an ensemble, or None for the bundled
    one that fits. `announce` hears of the job before it starts (its
    plan, its notes), `progress` of every finished block; `workshop` serves several jobs, one after another. Raises
    TilepipeError for what the caller can mend, StoppedError (a TilepipeError) after a request to stop; finished
    blocks are kept in every case.
    """
    started = time.perf_counter()
    use_large_pages()
    options, stop = options or SegmentOptions(), stop or Stop()
    shelf = None if workshop is None else workshop.shelf
    job, replaced = prepare_for(inputs, output, model, options, shelf)
    if announce is not None:
        announce(job)
    with create_or_resume(output, job.spec(), replaced) as store:
        there = store.done()
        remaining = (index for index in job.plan.blocks() if index not in there)
        finished = sum(job.plan.block_window(BlockIndex(*index)).area for index in there)
        run = _Run(job, len(there), job.plan.region.area - finished, progress)
        ready = done = time.perf_counter()
        if len(there) < job.plan.block_count:
            with (
                _readable(job, output, stop) as source,
                closing(Crew()) if workshop is None else nullcontext(workshop.crew) as crew,
                crew.at_work(job.pool, BlockRecipe.of(job, source, store)) as (client, name),
            ):
                ready = time.perf_counter()
                for outcome in map_bounded(client, name, run_block, remaining, _bounded(job, stop)):
                    run.note(outcome, time.perf_counter() - ready)
                    if run.hopeless:
                        break
                done = time.perf_counter()
                # Within: blocks of a job that failed end before its lease.
                run.check(stop, str(output))
        summary = run.summary(store, ready - started, done - ready)
        if not options.overviews:
            return summary
        begun = time.perf_counter()
        levels = add_overviews(store, False, progress, stop)
        return replace(summary, overviews=levels, overview_seconds=time.perf_counter() - begun)


def predict_raster(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    model: OneModel,
    options: SegmentOptions | None = None,
    **telling: Any,
) -> Summary:
    """What was done to make `output` the network's own output for `inputs`: all channels, as numbers.

    As `segment_raster`, whose further arguments it takes, with `values` float32 unless the options say float16.
    """
    options = options or SegmentOptions()
    return segment_raster(inputs, output, model, replace(options, values=options.values or "float32"), **telling)


def prepare_for(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    model: Models,
    options: SegmentOptions,
    shelf: Shelf | None = None,
) -> tuple[Job, bool | StoreSpec]:
    """The job that these make of `output`, and what of it is replaced, as `create_or_resume` takes it.

    A job that is resumed keeps the stored plans. Raises what `prepare` does, and UsageError for an output that the
    job reads.
    """
    spec = None if options.overwrite is True else stored_spec(output)
    plans = None if spec is None else spec.settings.get("plans")
    replaced: bool | StoreSpec = options.overwrite is True
    if spec is not None and options.overwrite == "changed":
        job = prepare(inputs, model, options, None, shelf)
        replaced = spec if job.spec().fingerprint != spec.fingerprint else False
    if not isinstance(replaced, StoreSpec):
        job = prepare(inputs, model, options, plans, shelf)
    _refuse_own_input(job, output)
    return job, replaced


def _bounded(job: Job, stop: Stop) -> Bounded:
    in_flight = WAITING * job.resources.blocks * job.resources.workers
    return Bounded(in_flight, each_thread=0 if job.options.scheduler is None else WAITING, stop=stop)


def _refuse_own_input(job: Job, output: str | Path) -> None:
    """UsageError where the output would take the place of something that the job reads."""
    taken = [os.path.realpath(path) for path in (output, _staging_path(output))]
    for path in (*job.source.paths, *([] if job.area is None else [job.area.path])):
        real = os.path.realpath(path)
        if any(real == place or real.startswith(place + os.sep) for place in taken):
            raise UsageError(f"{path} is read by this job, so that {output} cannot be its output; choose another")


def _staging_path(output: str | Path) -> Path:
    """Beside the output; for one in a bucket in the folder of temporary files, by a name that a resume finds."""
    text = str(output).rstrip("/")
    if is_url(text):
        return Path(gettempdir(), f"tilepipe-{hashlib.sha256(text.encode()).hexdigest()[:16]}.staged.zarr")
    return Path(f"{text}.staged.zarr")


@contextmanager
def _readable(job: Job, output: str | Path, stop: Stop) -> Iterator[RasterSource]:
    """The raster to read from: itself, or a staged copy where windows of it are slow to read."""

    def check(done: int, total: int) -> None:
        if stop.asked:
            raise StoppedError(
                f"stopped after {done} of {total} pixels were staged; the same command stages them anew",
                stop.exit_code,
            )

    if job.staging is not None:
        if job.options.scheduler is not None and is_url(output):
            raise UsageError(
                f"{job.staging}, and beside {output} there is no folder for the copy that all workers see; "
                "run `tilepipe ingest` into a shared folder and segment that, or add --stage never"
            )
        with staged(job.source, _staging_path(output), check) as copy:
            yield copy
    else:
        yield job.source


class _Run:
    """The tally of one run."""

    def __init__(self, job: Job, resumed: int, total_pixels: int, progress: Callable[[Progress], None] | None) -> None:
        self.job, self.progress = job, progress
        self.state = Progress(resumed, job.plan.block_count, resumed, 0, total_pixels, 0.0)
        self.tried = self.unreadable = 0
        self.first: tuple[BlockIndex, str] | None = None
        """Of the blocks that could not be read the first in the grid, and why."""
        self._report()

    def note(self, outcome: Outcome, seconds: float) -> None:
        """Counts one block's outcome."""
        self.tried += 1
        if outcome.error is not None:
            self.unreadable += 1
            self.first = min(self.first or (outcome.block, outcome.error), (outcome.block, outcome.error))
            return
        done, pixels = self.state.done + 1, self.state.pixels + outcome.pixels
        self.state = self.state._replace(done=done, pixels=pixels, seconds=seconds)
        self._report()

    @property
    def hopeless(self) -> bool:
        """Whether so many blocks failed, and no other, that the raster cannot be what it says it is."""
        return self.tried == self.unreadable >= HOPELESS

    def check(self, stop: Stop, output: str) -> None:
        """Raises what kept the job from being complete, if anything did."""
        state = self.state
        unread = ""
        if self.hopeless and self.first is not None:
            raise ReadError(
                f"none of the first {self.tried} of {state.total} blocks could be read, the first: {self.first[1]}; "
                "the raster is damaged or not as large as it says; try a part of it with --region"
            )
        if self.first is not None:
            unread = f"{self.unreadable} of {state.total} blocks could not be read, the first: {self.first[1]}"
        # A stopped job has blocks that nobody tried: running it again helps, whatever else was unreadable.
        if state.done + self.unreadable < state.total:
            told = f"{unread}; " if unread else ""
            raise StoppedError(
                f"{told}stopped after {state.done} of {state.total} blocks; the same command resumes {output}",
                stop.exit_code,
            )
        if unread:
            raise ReadError(
                f"{unread}; {state.done} finished blocks are kept, and the same command tries the others again"
            )

    def summary(self, store: OutputStore, start_seconds: float, seconds: float) -> Summary:
        """The finished job in figures."""
        status, state = store.status(), self.state
        names = [c.name for c in self.job.classes]
        return Summary(
            output=store.path,
            stitch=self.job.plan.stitch,
            blocks=state.total,
            computed=state.done - state.resumed,
            resumed=state.resumed,
            pixels=state.pixels,
            seconds=seconds,
            start_seconds=start_seconds,
            classes=dict(zip(names, status.counts, strict=True)),
            channels=dict(zip(self.job.outputs, (each.describe() for each in status.channels), strict=True)),
            nodata=status.nodata,
            overlapped=status.compared,
            disagreed=status.differing,
            notes=(*self.job.notes, *([store.notice] if store.notice else [])),
        )

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self.state)
