"""What one job is, before anything runs: raster, network, geometry, plan, workers; and why it may be resumed.

`prepare` opens and inspects, and touches no device's memory and no output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch

from tilepipe.axis import AxisPlan
from tilepipe.checkpoint import Model, bundled_models, load_model
from tilepipe.errors import ModelError, PlanError, UsageError
from tilepipe.geometry.network import AxisGeometry, Geometry
from tilepipe.options import SegmentOptions
from tilepipe.plan import PlanRequest, TilePlan, plan
from tilepipe.projection import Footprint, PixelLayout, Resources
from tilepipe.raster.area import AreaMask, open_area, region_window
from tilepipe.raster.bands import select_bands
from tilepipe.raster.ingest import needs_staging
from tilepipe.raster.source import RasterInfo, RasterSource, open_raster
from tilepipe.schedule import Pool
from tilepipe.store.spec import ControlPoint, StoreSpec
from tilepipe.trace import activation_bytes, geometry_of
from tilepipe.version import __version__
from tilepipe.window import Window

MEMORY_SHARE = 0.8
"""Of the memory that is free when the job starts, what it may use unless told otherwise."""

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One raster, one network, one plan."""

    source: RasterSource
    area: AreaMask | None
    model: Model
    geometry: Geometry
    plan: TilePlan
    options: SegmentOptions
    device: Literal["cpu", "cuda"]
    precision: str
    resources: Resources
    notes: tuple[str, ...]
    """What the user should hear before the job starts."""
    staging: str | None = None
    """Why the raster is copied into zarr chunks before it is read; None where it is read in place."""

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
        starts = self.plan.region.origin
        return tuple(
            (float(cell_offset(axis) + start * axis.scale), axis.scale)
            for axis, start in zip((self.geometry.rows, self.geometry.cols), starts, strict=True)
        )  # type: ignore[return-value]

    def fingerprint(self) -> dict[str, Any]:
        """What a job that resumes must share with the one that began, in named parts, as JSON values."""
        return {
            "raster": self.source.identity(),
            "mask": None if self.area is None else self.area.identity(),
            "model": self.model.digest,
            "options": self.options.meaning(),
            "precision": self.precision,
            "device": self.device,
            "versions": versions(),
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
            classes=self.model.card.classes,
            crs_wkt=info.crs_wkt or info.gcps_crs_wkt,
            transform=self.transform,
            gcps=points or None,
            confidence=self.options.confidence,
            probabilities=self.options.probabilities,
            shards=self.options.shards,
            settings=self.settings(),
            fingerprint=self.fingerprint(),
        )

    def settings(self) -> dict[str, Any]:
        """The resolved settings that the output keeps, so that the map explains itself; JSON values."""
        return {
            "plan": self.plan.to_json(),
            "precision": self.precision,
            "device": self.device,
            "raster": self.source.info.name,
            "model": {
                "source": self.model.source,
                "digest": self.model.digest,
                "card": json.loads(self.model.card.to_json()),
            },
            "versions": versions(),
        }

    def describe(self) -> dict[str, Any]:
        """All that `tilepipe plan` shows, as JSON values."""
        info, made = self.source.info, self.plan
        axes = {"rows": self.geometry.rows, "cols": self.geometry.cols}
        return {
            "raster": {"name": info.name, "shape": list(info.shape), "bands": info.bands, "dtype": info.dtype},
            "model": {"source": self.model.source, "classes": [c.name for c in self.model.card.classes]},
            "network": {name: describe_axis(axis) for name, axis in axes.items()},
            "stitch": made.stitch,
            "reason": made.reason,
            "window": made.window,
            "tile": list(made.tile),
            "core": list(made.core),
            "halo": [_halo(made.rows), _halo(made.cols)],
            "tiles": made.tiles,
            "block": list(made.block),
            "blocks": made.block_count,
            "chunk": list(made.chunk),
            "shape": list(made.shape),
            "overhead": round(made.overhead, 4),
            "device": self.device,
            "precision": self.precision,
            "host_bytes": made.projection.host_total,
            "host_parts": dict(made.projection.host_parts),
            "device_bytes": made.projection.device,
            "device_parts": dict(made.projection.device_parts),
            "limits": {"host_bytes": self.resources.host_bytes, "device_bytes": self.resources.device_bytes},
            "output_bytes": made.shape[0] * made.shape[1] * output_bytes(self.options, len(self.model.card.classes)),
            "notes": list(self.notes),
        }


def prepare(
    inputs: str | Path | Sequence[str | Path],
    model: str | Path | Model | None = None,
    options: SegmentOptions | None = None,
    stored: Mapping[str, Any] | None = None,
) -> Job:
    """The job that these inputs, model and options make.

    `stored` is the plan of a job that is being resumed: it is taken as it is. Raises TilepipeError for whatever
    does not fit together, before anything is written.
    """
    options = options or SegmentOptions()
    device = _device(options)
    precision = options.precision or ("bf16" if device == "cuda" else "float32")
    whole = open_raster(inputs, nodata=options.nodata)
    chosen, notes = choose_model(model, whole, options.bands)
    if options.resample:
        if chosen.card.resolution is None:
            raise UsageError("--resample needs a model that states its ground resolution, and this one does not")
        whole = open_raster(inputs, nodata=options.nodata, resample_to=chosen.card.resolution)
    source = whole.select(select_bands(whole.info, chosen.card.bands, options.bands))
    notes += _resolution_notes(source, chosen)
    geometry = geometry_of(chosen.network, len(chosen.card.bands))
    if geometry.channels_out != len(chosen.card.classes):
        raise ModelError(
            f"the network of {chosen.source} gives {geometry.channels_out} scores a pixel for "
            f"{len(chosen.card.classes)} classes; the two have to agree"
        )
    resources = _resources(options, device)
    made = _plan(source, chosen, geometry, options, resources, precision, stored)
    area = None if options.mask is None else open_area(options.mask, source.info)
    if made.exact is False and geometry.obstacle is not None:
        notes.append(f"blended stitching: {geometry.obstacle}")
    staging = _staging(source.info, made, options)
    if staging is not None:
        notes.append(f"staged first: {staging}")
    return Job(source, area, chosen, geometry, made, options, device, precision, resources, tuple(notes), staging)


def _staging(info: RasterInfo, made: TilePlan, options: SegmentOptions) -> str | None:
    if options.stage != "auto":
        return "--stage always" if options.stage == "always" else None
    return needs_staging(info, made.block, made.region.area * made.scale[0] * made.scale[1])


def _plan(
    source: RasterSource,
    model: Model,
    geometry: Geometry,
    options: SegmentOptions,
    resources: Resources,
    precision: str,
    stored: Mapping[str, Any] | None,
) -> TilePlan:
    info, classes = source.info, len(model.card.classes)
    dtype = DTYPES[precision]
    pixel = PixelLayout(
        bands=info.bands,
        itemsize=np.dtype(info.dtype).itemsize,
        output_bytes=output_bytes(options, classes),
        classes=classes,
        weights=sum(p.numel() for p in model.network.parameters()) * dtype.itemsize,
        cache=source.cache_bytes,
    )

    def footprint(tile: tuple[int, int]) -> Footprint:
        memory = activation_bytes(model.network, (1, info.bands, *tile), dtype)
        return Footprint(memory.peak, memory.workspace, memory.largest)

    if stored is not None:
        kept = TilePlan.from_json(dict(stored))
        kept = kept.projected(pixel, footprint(kept.tile), resources)
        if kept.excess(resources):
            raise PlanError(f"the job was planned with more memory: {kept.excess(resources)}")
        return kept
    region = None
    if options.region is not None:
        region = _to_outputs(region_window(info, options.region), geometry)
    request = PlanRequest(options.stitch, options.tile, options.overlap, options.window, options.block, region)
    return plan(geometry, info.shape, pixel, request, resources, footprint)


def choose_model(
    model: str | Path | Model | None, source: RasterSource, bands: tuple[int, ...] | None
) -> tuple[Model, list[str]]:
    """The model asked for, or the bundled one that fits the raster's bands best; with what to tell the user."""
    if isinstance(model, Model):
        return model, []
    if model is not None:
        return load_model(model), []
    found = [load_model(name) for name in bundled_models()]
    fitting = []
    for candidate in found:
        try:
            select_bands(source.info, candidate.card.bands, bands)
        except ValueError:
            continue
        fitting.append(candidate)
    if not fitting:
        known = "; ".join(f"{m.source} wants {', '.join(m.card.bands)}" for m in found)
        raise UsageError(
            f"no bundled model fits a raster of {source.info.bands} bands as it declares them ({known}); "
            "choose bands by --bands, or a model by --model"
        )
    best = min(fitting, key=lambda m: _mismatch(m, source))
    return best, [f"no --model given: using the bundled {best.source}"]


def _mismatch(model: Model, source: RasterSource) -> float:
    """By what factor the model's ground resolution and the raster's differ; 1 where either is unknown."""
    trained, actual = model.card.resolution, source.info.resolution_m
    if not trained or not actual:
        return 1.0
    return max(trained / actual, actual / trained)


def _resolution_notes(source: RasterSource, model: Model) -> list[str]:
    if _mismatch(model, source) <= 2:
        return []
    return [
        f"the raster's pixels are {source.info.resolution_m:.3g} m, the model was trained at "
        f"{model.card.resolution:.3g} m; labels may be poor, --resample reads at the model's resolution"
    ]


def _device(options: SegmentOptions) -> Literal["cpu", "cuda"]:
    asked = options.device or ("cuda" if options.gpus else None)
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cpu":
        return "cpu"
    if asked != "cuda" and not asked.startswith("cuda:"):
        raise UsageError(f"device {asked!r} is not known; legal are cpu, cuda and cuda:N")
    # Devices of a running cluster are its workers' affair.
    if options.scheduler is None and not torch.cuda.is_available():
        raise UsageError(f"device {asked} was asked for, but torch sees no CUDA device here; use --device cpu")
    return "cuda"


def _resources(options: SegmentOptions, device: Literal["cpu", "cuda"]) -> Resources:
    workers = max(options.workers or 1, len(options.gpus or ()))
    host = options.memory or int(free_memory() * MEMORY_SHARE)
    if device == "cuda":
        limit = options.device_memory
        if limit is None and torch.cuda.is_available():
            limit = int(torch.cuda.mem_get_info()[0] * 0.95)
        return Resources("cuda", host, limit, threads=1, blocks=3, workers=workers)
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // workers)
    # A block has about four tiles; one more block than the threads need is being read.
    return Resources("cpu", host, None, threads=threads, blocks=1 + -(-threads // 4), workers=workers)


def free_memory() -> int:
    """Bytes that this process may take now: what is free on the host, within the control group's limit."""
    available = int(psutil.virtual_memory().available)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            root = Path("/sys/fs/cgroup")
            return min(available, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):
            continue
    return available


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


def cell_offset(axis: AxisGeometry) -> Fraction:
    """Where output 0's cell starts, in raster pixels: the raster is extended by what a full-size network trims."""
    return Fraction(0) if axis.scale == 1 else Fraction(axis.offset)


def describe_axis(axis: AxisGeometry) -> dict[str, Any]:
    """One axis of a network's geometry as JSON values."""
    return {
        "sizes": str(axis.sizes),
        "alignment": axis.alignment,
        "reach": None if axis.reach is None else list(axis.reach),
        "halo": None if axis.reach is None else list(axis.halo),
        "scale": axis.scale,
    }


def _halo(axis: AxisPlan) -> list[int]:
    """The margin before and after an inner tile's core, in input pixels."""
    if axis.count == 1:
        return [0, 0]
    return [axis.lead, axis.tile - axis.lead - axis.core * axis.scale]


def output_bytes(options: SegmentOptions, classes: int) -> int:
    """Bytes per output pixel over all arrays that the options ask for."""
    label = 1 if classes <= 255 else 2
    each = {None: 0, "uint8": 1, "float16": 2}[options.probabilities]
    return label + int(options.confidence) + each * classes


def versions() -> dict[str, str]:
    """The libraries that decide the map's bytes, and GDAL, which decodes the raster."""
    import rasterio

    found = {name: version(name) for name in ("torch", "numpy", "numba", "rasterio")}
    return {"tilepipe": __version__, **found, "gdal": rasterio.__gdal_version__}
