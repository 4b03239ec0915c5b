"""What one job is, before anything runs: raster, models, plans, workers; and why it may be resumed.

`prepare` opens and inspects, and touches no device's memory and no output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tilepipe.checkpoint import ClassInfo, Model
from tilepipe.crf.parameters import CrfParameters, parse_crf
from tilepipe.crf.refine import working_bytes
from tilepipe.errors import PlanError, UsageError
from tilepipe.geometry.network import Geometry
from tilepipe.grid import OutputGrid
from tilepipe.machine import device_of, resources_of, versions
from tilepipe.member import Member, Models, Reference, choose_models, members_of, resolution_notes
from tilepipe.options import SegmentOptions
from tilepipe.plan import PlanRequest, TilePlan
from tilepipe.planner import PlannedNetwork, plan, projected
from tilepipe.predict.cuda_steps import NONE, CudaSteps, triton_version
from tilepipe.projection import Footprint, PixelLayout, Resources
from tilepipe.raster.area import AreaMask, open_area, region_window
from tilepipe.raster.bands import guess
from tilepipe.raster.ingest import needs_staging
from tilepipe.raster.source import RasterInfo, RasterSource, open_raster
from tilepipe.resolution import nearest, span
from tilepipe.schedule import Pool
from tilepipe.shelf import Shelf
from tilepipe.store.spec import ControlPoint, StoreSpec
from tilepipe.trace import activation_bytes
from tilepipe.window import Window

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Machine:
    """What the job runs on, and in which arithmetic."""

    resources: Resources
    precision: str
    steps: CudaSteps = NONE
    """How the network is made faster on a CUDA device."""

    @classmethod
    def of(cls, resources: Resources, precision: str) -> Machine:
        """What this machine's libraries allow."""
        return cls(resources, precision, CudaSteps.on(resources.device))


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One raster, one or several models, and a plan for each of them."""

    source: RasterSource
    """With the bands that the models read."""
    area: AreaMask | None
    members: tuple[Member, ...]
    plans: tuple[TilePlan, ...]
    """One for each member; they share blocks and, when exact, cores."""
    options: SegmentOptions
    crf: CrfParameters | None
    machine: Machine
    notes: tuple[str, ...]
    """What the user should hear before the job starts."""
    staging: str | None = None
    """Why the raster is copied into zarr chunks before it is read; None where it is read in place."""

    @property
    def plan(self) -> TilePlan:
        """The first member's plan: what all share is as good from it as from any."""
        return self.plans[0]

    @property
    def resources(self) -> Resources:
        """What the job may use."""
        return self.machine.resources

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """The kind of device."""
        return self.machine.resources.device

    @property
    def precision(self) -> str:
        """The name of the arithmetic."""
        return self.machine.precision

    @property
    def geometry(self) -> Geometry:
        """The first member's geometry; all have its scale."""
        return self.members[0].geometry

    @property
    def grid(self) -> OutputGrid:
        """Where the outputs lie on the raster."""
        return OutputGrid.of(self.geometry)

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """What the labels mean; none where values are written."""
        return () if self.options.values is not None else self.members[0].model.card.classes

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the channels where values are written: the card's classes, else numbers."""
        if self.options.values is None:
            return ()
        names = tuple(item.name for item in self.members[0].model.card.classes)
        channels = self.geometry.channels_out
        return names if len(names) == channels else tuple(f"output{n}" for n in range(channels))

    @property
    def pool(self) -> Pool:
        """The workers that the options ask for."""
        options = self.options
        gpus = options.gpus or ()
        # A single device needs no process of its own.
        own = gpus if len(gpus) > 1 else ()
        return Pool(options.scheduler, options.workers or 1, self.resources.blocks, own)

    @property
    def target(self) -> str:
        """The device that each worker asks torch for; one of several GPUs is the only one that its worker sees."""
        if self.options.device is None and len(self.options.gpus or ()) == 1:
            return f"cuda:{(self.options.gpus or (0,))[0]}"
        return self.options.device or self.device

    @property
    def transform(self) -> tuple[float, float, float, float, float, float] | None:
        """The output grid's geotransform (a, b, c, d, e, f); None where the raster has none."""
        if self.source.info.transform is None:
            return None
        a, b, c, d, e, f = self.source.info.transform
        (row, rows), (col, cols) = self._steps()
        return a * cols, b * rows, c + a * col + b * row, d * cols, e * rows, f + d * col + e * row

    def _steps(self) -> tuple[tuple[float, int], tuple[float, int]]:
        """Per axis: where the output starts, in raster pixels, and raster pixels per output."""
        (row, col), (rows, cols) = self.plan.region.origin, self.grid.scale
        down, right = self.grid.offset
        return (down + row * rows, rows), (right + col * cols, cols)

    def fingerprint(self) -> dict[str, Any]:
        """What a job that resumes must share with the one that began, in named parts, as JSON values."""
        return {
            "raster": self.source.identity(),
            "mask": None if self.area is None else self.area.identity(),
            "model": "+".join(member.model.digest for member in self.members),
            "options": self.options.meaning(),
            "precision": self.precision,
            "device": self.device,
            "versions": versions(),
            # A job on a CPU is the same whatever GPUs would make of it.
            **({"steps": self.machine.steps.to_json(), "triton": triton_version()} if self.device == "cuda" else {}),
        }

    def spec(self) -> StoreSpec:
        """The layout of the job's output store."""
        info = self.source.info
        (row, rows), (col, cols) = self._steps()
        points = [ControlPoint((p.row - row) / rows, (p.col - col) / cols, p.x, p.y, p.z) for p in info.gcps]
        return StoreSpec(
            shape=self.plan.shape,
            shard=self.plan.block,
            chunk=self.plan.chunk,
            classes=self.classes,
            crs_wkt=info.crs_wkt or info.gcps_crs_wkt,
            transform=self.transform,
            gcps=points or None,
            confidence=self.options.confidence,
            probabilities=self.options.probabilities,
            values=self.options.values,
            outputs=self.outputs,
            shards=self.options.shards,
            settings=self.settings(),
            fingerprint=self.fingerprint(),
        )

    def settings(self) -> dict[str, Any]:
        """The resolved settings that the output keeps, so that the map explains itself; JSON values."""
        models = [
            {
                "source": member.model.source,
                "digest": member.model.digest,
                "card": json.loads(member.model.card.to_json()),
            }
            for member in self.members
        ]
        return {
            "plans": [made.to_json() for made in self.plans],
            "precision": self.precision,
            "device": self.device,
            "steps": self.machine.steps.to_json() if self.device == "cuda" else None,
            "raster": self.source.info.name,
            "models": models,
            "refinement": None if self.crf is None else asdict(self.crf),
            "versions": versions(),
        }


def prepare(
    inputs: str | Path | Sequence[str | Path],
    model: Models = None,
    options: SegmentOptions | None = None,
    stored: Sequence[Mapping[str, Any]] | None = None,
    shelf: Shelf | None = None,
) -> Job:
    """The job that these inputs, models and options make.

    `stored` are the plans of a job that is being resumed, taken as they are; `shelf` keeps models for other jobs.
    Raises TilepipeError for whatever does not fit together, before anything is written.
    """
    options = options or SegmentOptions()
    whole = open_raster(inputs, nodata=options.nodata)

    def resampled(size: float) -> RasterSource:
        return open_raster(inputs, nodata=options.nodata, resample_to=size)

    return prepare_raster(whole, model, options, stored, resampled, shelf)


def prepare_raster(
    whole: RasterSource,
    model: Models,
    options: SegmentOptions,
    stored: Sequence[Mapping[str, Any]] | None = None,
    resampled: Callable[[float], RasterSource] | None = None,
    shelf: Shelf | None = None,
) -> Job:
    """As `prepare`, of a raster that is open; `resampled` opens it with pixels of another size, in metres."""
    device = device_of(options)
    precision = options.precision or ("bf16" if device == "cuda" else "float32")
    chosen, notes = choose_models(model, whole, options, shelf)
    if options.resample:
        whole = _resampled(whole, chosen, resampled)
    if options.bands is None:
        guesses = (guess(whole.info, each.card.bands) for each, _ in chosen)
        notes += dict.fromkeys(each for each in guesses if each is not None)
    members, source = members_of(chosen, whole, options, shelf)
    crf = _crf(members, options)
    notes += resolution_notes(members, source.info)
    resources = resources_of(options, device)
    machine = Machine.of(resources, precision)
    made = _plan(source, members, options, crf, machine, stored, shelf)
    area = None if options.mask is None else open_area(options.mask, source.info)
    obstacle = next((m.geometry.obstacle for m in members if m.geometry.obstacle is not None), None)
    if made[0].exact is False and obstacle is not None:
        notes.append(f"blended stitching: {obstacle}")
    staging = _staging(source.info, made[0], options)
    if staging is not None:
        notes.append(f"staged first: {staging}")
    if device == "cuda" and triton_version() is None:
        notes.append("Triton is not installed: poolings, biases and ReLUs run as torch's own, which is slower")
    return Job(source, area, members, made, options, crf, machine, tuple(notes), staging)


def replanned(job: Job, options: SegmentOptions) -> Job:
    """The job with other wishes for its tiles, blocks or precision; PlanError where they do not fit.

    Raster, models, memory and threads stay those of `job`, whatever `options` say of them.
    """
    machine = Machine.of(job.resources, options.precision or job.precision)
    made = _plan(job.source, job.members, options, job.crf, machine, None)
    staging = _staging(job.source.info, made[0], options)
    return replace(job, plans=made, options=options, machine=machine, staging=staging)


def _resampled(
    whole: RasterSource,
    chosen: Sequence[tuple[Model, Reference]],
    resampled: Callable[[float], RasterSource] | None,
) -> RasterSource:
    """The raster at the resolution that the models were trained at, which is nearest to its own."""
    trained = next((each.card.resolution for each, _ in chosen if each.card.resolution is not None), None)
    if trained is None:
        raise UsageError("--resample needs a model that states its ground resolution, and this one does not")
    if resampled is None:
        raise UsageError("arrays are not resampled; give one of the model's ground resolution")
    # A raster without a ground resolution is refused by the reader.
    wanted = nearest(trained, whole.info.resolution_m or span(trained)[1])
    return whole if wanted == whole.info.resolution_m else resampled(wanted)


def _crf(members: Sequence[Member], options: SegmentOptions) -> CrfParameters | None:
    """The refinement that the options ask for."""
    if options.refine is None:
        return None
    if any(member.geometry.scale != (1, 1) for member in members):
        raise UsageError("--refine needs an output for each pixel, and this network gives fewer; add --stride 1")
    return parse_crf(options.refine)


def _staging(info: RasterInfo, made: TilePlan, options: SegmentOptions) -> str | None:
    if options.stage != "auto":
        return "--stage always" if options.stage == "always" else None
    return needs_staging(info, made.block, made.region.area * made.scale[0] * made.scale[1])


def _plan(
    source: RasterSource,
    members: Sequence[Member],
    options: SegmentOptions,
    crf: CrfParameters | None,
    machine: Machine,
    stored: Sequence[Mapping[str, Any]] | None,
    shelf: Shelf | None = None,
) -> tuple[TilePlan, ...]:
    networks = [_planned(source, member, options, machine.precision, shelf or Shelf()) for member in members]
    combining = _combining_bytes(members, crf, machine.precision)
    # Those of another number of networks are another job's, which the store refuses by name.
    if stored is not None and len(stored) == len(networks):
        kept = projected([TilePlan.from_json(dict(one)) for one in stored], networks, machine.resources, combining)
        if kept[0].excess(machine.resources):
            raise PlanError(f"the job was planned with more memory: {kept[0].excess(machine.resources)}")
        return kept
    region = None
    if options.region is not None:
        region = _to_outputs(region_window(source.info, options.region), members[0].geometry)
    request = PlanRequest(
        options.stitch,
        options.tile,
        options.overlap,
        options.window,
        options.block,
        region,
        margin=0 if crf is None else crf.reach,
        combining=combining,
    )
    return plan(networks, source.info.shape, request, machine.resources)


def _planned(
    source: RasterSource, member: Member, options: SegmentOptions, precision: str, shelf: Shelf
) -> PlannedNetwork:
    """What the plan has to know of a member."""
    dtype, channels = DTYPES[precision], member.geometry.channels_out
    bands = len(member.bands)
    pixel = PixelLayout(
        bands=bands,
        itemsize=np.dtype(source.info.dtype).itemsize,
        output_bytes=output_bytes(options, channels),
        classes=channels,
        weights=sum(p.numel() for p in member.network.parameters()) * dtype.itemsize,
        cache=source.cache_bytes,
    )

    def footprint(tile: tuple[int, int]) -> Footprint:
        def measure() -> Footprint:
            memory = activation_bytes(member.network, (1, bands, *tile), dtype)
            return Footprint(memory.peak, memory.workspace, memory.largest)

        return shelf.footprint((member.model.digest, member.variation, bands, tile, dtype), measure)

    return PlannedNetwork(member.geometry, pixel, footprint)


def _combining_bytes(members: Sequence[Member], crf: CrfParameters | None, precision: str) -> int:
    """Bytes per output while the members' scores are combined and refined; 0 where neither happens."""
    if len(members) == 1 and crf is None:
        return 0
    itemsize, classes = (8 if precision == "float64" else 4), members[0].geometry.channels_out
    held = itemsize * classes * (len(members) + 1)
    if crf is None:
        return held
    # Rows that are worked on, spread over the pixels of the smallest core.
    work = working_bytes(classes, 512, itemsize, crf) // (512 * 512)
    return held + itemsize * (classes + len(members[0].bands)) + work


def _to_outputs(window: Window, geometry: Geometry) -> Window:
    """The outputs whose cells lie in a window of raster pixels."""
    rows, cols = geometry.rows.scale, geometry.cols.scale
    if rows == cols == 1:
        return window
    return Window.of(
        -(-window.rows.start // rows),
        window.rows.stop // rows,
        -(-window.cols.start // cols),
        window.cols.stop // cols,
    )


def output_bytes(options: SegmentOptions, classes: int) -> int:
    """Bytes per output pixel over all arrays that the options ask for; `classes`: the network's channels."""
    if options.values is not None:
        return classes * np.dtype(options.values).itemsize
    label = 1 if classes <= 255 else 2
    each = {None: 0, "uint8": 1, "float16": 2}[options.probabilities]
    return label + int(options.confidence) + each * classes
