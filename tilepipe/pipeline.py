"""The main flow: a raster file in, a label map out.

    prepare -> create or resume the store -> run_block over the blocks that are not done -> finish

Blocks exchange nothing: each reads its own window, halo included, and writes its own shards and record.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from tilepipe.checkpoint import IN_MEMORY, Model, load_model
from tilepipe.errors import ReadError, RunError, StoppedError, UsageError
from tilepipe.job import Job, cell_offset, prepare
from tilepipe.options import SegmentOptions
from tilepipe.plan import BlockIndex, TilePlan
from tilepipe.predict.blend import window_weights
from tilepipe.predict.predictor import BlockMaps, Predictor, Wanted
from tilepipe.predict.prepare import use_large_pages
from tilepipe.raster.area import AreaMask
from tilepipe.raster.ingest import staged
from tilepipe.raster.source import RasterSource
from tilepipe.schedule import Bounded, Stop, connect, map_bounded, resident
from tilepipe.store.output import OutputStore, create_or_resume, stored_spec
from tilepipe.window import Placement, Window

HOPELESS = 1024
"""Blocks that cannot be read, with none that can, after which a run does not try the others."""


class Progress(NamedTuple):
    """How far a job is."""

    done: int
    """Blocks, those of earlier runs included."""
    total: int
    resumed: int
    """Blocks that were done when this run started."""
    pixels: int
    """Outputs finished in this run."""
    total_pixels: int
    """Outputs that this run has to finish."""
    seconds: float
    """Since the first block was handed out."""


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
    start_seconds: float
    """Before the first block: opening, geometry, plan, workers, model."""
    classes: dict[str, int]
    """Pixels of each class over the whole map."""
    nodata: int
    overlapped: int
    """Pixels that several tiles labelled; blended only."""
    disagreed: int
    """Of these, pixels whose tiles did not agree."""
    notes: tuple[str, ...]

    @property
    def rate(self) -> float:
        """Megapixels per second, start-up excluded."""
        return self.pixels / 1e6 / self.seconds if self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return {**asdict(self), "rate": self.rate, "notes": list(self.notes)}


def segment_raster(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    model: str | Path | Model | None = None,
    options: SegmentOptions | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
    announce: Callable[[Job], None] | None = None,
    stop: Stop | None = None,
) -> Summary:
    """What was done to make `output` the label map of `inputs`; an unfinished output is resumed.

    `inputs` is anything GDAL opens, several files read as one mosaic, or a zarr array; `model` a model file, a
    bundled model's name, or None for the bundled one that fits. `announce` hears of the job before it starts (its
    plan, its notes), `progress` of every finished block. Raises TilepipeError for what the caller can mend,
    StoppedError (a TilepipeError) after a request to stop; finished blocks are kept in every case.
    """
    started = time.perf_counter()
    use_large_pages()
    options, stop = options or SegmentOptions(), stop or Stop()
    job = prepare(inputs, model, options, None if options.overwrite else _stored_plan(output))
    if announce is not None:
        announce(job)
    _refuse_own_input(job, output)
    with create_or_resume(output, job.spec(), options.overwrite) as store:
        done = store.done()
        remaining = (index for index in job.plan.blocks() if index not in done)
        finished = sum(job.plan.block_window(BlockIndex(*index)).area for index in done)
        run = _Run(job, len(done), job.plan.region.area - finished, progress)
        ready = time.perf_counter()
        if len(done) < job.plan.block_count:
            with (
                _readable(job, output, stop) as source,
                connect(job.pool) as client,
                resident(client, f"tilepipe-{uuid4().hex}", BlockRecipe.of(job, source, store)) as name,
            ):
                ready = time.perf_counter()
                for outcome in map_bounded(client, name, run_block, remaining, _bounded(job, stop)):
                    run.note(outcome, time.perf_counter() - ready)
                    if run.hopeless:
                        break
        run.check(stop, str(output))
        return run.summary(store, ready - started, time.perf_counter() - ready)


def _stored_plan(output: str | Path) -> Mapping[str, Any] | None:
    """The plan of the job that `output` holds, which a resumed one keeps; None where there is none."""
    spec = stored_spec(output)
    return None if spec is None else spec.settings.get("plan")


def _bounded(job: Job, stop: Stop) -> Bounded:
    # Twice what the workers run at once: a worker that ends a block finds the next one waiting.
    return Bounded(in_flight=2 * job.resources.blocks * job.resources.workers, stop=stop)


def _refuse_own_input(job: Job, output: str | Path) -> None:
    """UsageError where the output would take the place of something that the job reads."""
    taken = [os.path.realpath(path) for path in (output, _staging_path(output))]
    for path in (*job.source.paths, *([] if job.area is None else [job.area.path])):
        real = os.path.realpath(path)
        if any(real == place or real.startswith(place + os.sep) for place in taken):
            raise UsageError(f"{path} is read by this job, so that {output} cannot be its output; choose another")


def _staging_path(output: str | Path) -> Path:
    return Path(f"{str(output).rstrip('/')}.staged.zarr")


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
        with staged(job.source, _staging_path(output), check) as copy:
            yield copy
    else:
        yield job.source


class Outcome(NamedTuple):
    """What a block's task sends back; its pixels are in the store."""

    block: BlockIndex
    pixels: int
    error: str | None


@dataclass(frozen=True, slots=True, eq=False)
class BlockRecipe:
    """What a worker needs to run blocks: references and small values; a model from a file travels by its path."""

    source: RasterSource
    area: AreaMask | None
    model: Model | str
    digest: str
    plan: TilePlan
    device: str
    precision: str
    threads: int
    wanted: Wanted
    offset: tuple[float, float]
    """Raster pixels before output 0's cell, (rows, columns)."""
    store: OutputStore

    @classmethod
    def of(cls, job: Job, source: RasterSource, store: OutputStore) -> BlockRecipe:
        """The recipe of a job's workers."""
        return cls(
            source=source,
            area=job.area,
            model=job.model if job.model.source == IN_MEMORY else job.model.source,
            digest=job.model.digest,
            plan=job.plan,
            device=job.options.device or job.device,
            precision=job.precision,
            threads=job.resources.threads,
            wanted=Wanted(job.options.confidence, job.options.probabilities),
            offset=(float(cell_offset(job.geometry.rows)), float(cell_offset(job.geometry.cols))),
            store=store,
        )

    def build(self) -> BlockRunner:
        """The runner that a worker keeps."""
        use_large_pages()
        return BlockRunner(self)


class BlockRunner:
    """One worker's open raster, loaded network and store."""

    def __init__(self, recipe: BlockRecipe) -> None:
        self.recipe, self.plan = recipe, recipe.plan
        model = recipe.model if isinstance(recipe.model, Model) else load_model(recipe.model)
        if model.digest != recipe.digest:
            raise RunError(f"{model.source} changed while the job was starting; run the command again")
        self.reader = recipe.source.open()
        self.area = None if recipe.area is None else recipe.area.open()
        self.store = recipe.store
        self.predictor = Predictor(
            model.network,
            mean=model.card.mean,
            std=model.card.std,
            classes=len(model.card.classes),
            device=recipe.device,
            precision=recipe.precision,
            tile=self.plan.tile,
            threads=recipe.threads,
        )
        if self.plan.projection.device:
            # Before anything is stored: what the device cannot do ends the job here.
            self.predictor.settle(self.plan.projection.device)
        self.weights = None if self.plan.window is None else window_weights(self.plan.window, self.plan.tile_output)

    def close(self) -> None:
        """Ends the threads and files that the runner holds."""
        self.predictor.close()
        self.reader.close()

    def maps(self, outputs: Window) -> BlockMaps | None:
        """The label map (and what else is wanted) of a window of outputs; None where no pixel gets a label."""
        inside = None if self.area is None else self.area.read(self._cells(outputs))
        if inside is not None and not inside.any():
            return None
        hull, placements = self.plan.placements(outputs)
        pixels = self.reader.read(hull)
        keep = self._keep(pixels.valid, hull, outputs, inside)
        if keep is not None and not keep.any():
            return None
        return self._predict(pixels.values, pixels.valid, keep, placements, outputs.shape)

    def _predict(
        self,
        values: NDArray[np.generic],
        valid: NDArray[np.bool_] | None,
        keep: NDArray[np.bool_] | None,
        placements: list[Placement],
        shape: tuple[int, int],
    ) -> BlockMaps:
        if self.weights is None:
            return self.predictor.exact(values, valid, placements, shape, self.recipe.wanted, keep)
        return self.predictor.blend(values, valid, placements, shape, self.weights, self.recipe.wanted, keep)

    def _cells(self, outputs: Window) -> Window:
        """The raster pixels that `outputs` stand for."""
        (rows, cols), (down, right) = self.plan.scale, self.recipe.offset
        window = Window.of(
            outputs.rows.start * rows,
            outputs.rows.stop * rows,
            outputs.cols.start * cols,
            outputs.cols.stop * cols,
        )
        return window.shift(int(down), int(right))

    def _keep(
        self,
        valid: NDArray[np.bool_] | None,
        hull: Window,
        outputs: Window,
        inside: NDArray[np.bool_] | None,
    ) -> NDArray[np.bool_] | None:
        """Which outputs get a label: those whose cell's middle pixel is valid and in the area; None for all."""
        cells = self._cells(outputs)
        middle = tuple(slice(scale // 2, None, scale) for scale in self.plan.scale)
        keep = None
        if valid is not None:
            keep = valid[cells.within(hull)][middle]
        if inside is not None:
            keep = inside[middle] if keep is None else keep & inside[middle]
        return keep


def run_block(runner: BlockRunner, index: BlockIndex) -> Outcome:
    """What became of one block: read, predicted, written, recorded; or the error that its pixels gave."""
    outputs = runner.plan.block_window(index)
    started = time.perf_counter()
    try:
        maps = runner.maps(outputs)
    except ReadError as error:
        return Outcome(index, outputs.area, str(error))
    info = {"seconds": {"compute": time.perf_counter() - started}}
    if maps is None:
        runner.store.write_nodata(index, info)
    else:
        runner.store.write_block(index, maps, {**info, "disagreement": [maps.disagreed, maps.overlapped]})
    return Outcome(index, outputs.area, None)


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
        names = [c.name for c in self.job.model.card.classes]
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
            nodata=status.nodata,
            overlapped=status.compared,
            disagreed=status.differing,
            notes=(*self.job.notes, *([store.notice] if store.notice else [])),
        )

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self.state)
