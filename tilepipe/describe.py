"""What a job would do, as JSON values: what `tilepipe plan` shows."""

from __future__ import annotations

from typing import Any

from tilepipe.axis import AxisPlan
from tilepipe.geometry.network import AxisGeometry
from tilepipe.job import Job, output_bytes
from tilepipe.member import Member
from tilepipe.plan import TilePlan


def describe(job: Job) -> dict[str, Any]:
    """All that decides a job and its cost, as JSON values; sizes are (rows, columns)."""
    info, made = job.source.info, job.plan
    channels = job.geometry.channels_out
    return {
        "raster": {"name": info.name, "shape": list(info.shape), "bands": info.bands, "dtype": info.dtype},
        "models": [_model(member, each) for member, each in zip(job.members, job.plans, strict=True)],
        "classes": [item.name for item in job.classes],
        "outputs": list(job.outputs),
        "combine": job.options.combine if len(job.members) > 1 else None,
        "refinement": job.options.refine,
        "stitch": made.stitch,
        "reason": made.reason,
        "window": made.window,
        "block": list(made.block),
        "blocks": made.block_count,
        "chunk": list(made.chunk),
        "shape": list(made.shape),
        "overhead": round(sum(each.overhead for each in job.plans), 4),
        "device": job.device,
        "precision": job.precision,
        "host_bytes": made.projection.host_total,
        "host_parts": dict(made.projection.host_parts),
        "device_bytes": made.projection.device,
        "device_parts": dict(made.projection.device_parts),
        "limits": {"host_bytes": job.resources.host_bytes, "device_bytes": job.resources.device_bytes},
        "output_bytes": made.shape[0] * made.shape[1] * output_bytes(job.options, channels),
        "notes": list(job.notes),
    }


def _model(member: Member, made: TilePlan) -> dict[str, Any]:
    """One member and its tiles."""
    axes = {"rows": member.geometry.rows, "cols": member.geometry.cols}
    return {
        "source": member.model.source,
        "dense": member.variation.dense,
        "tta": member.variation.tta,
        "network": {name: describe_axis(axis) for name, axis in axes.items()},
        "tile": list(made.tile),
        "core": list(made.core),
        "halo": [_halo(made.rows), _halo(made.cols)],
        "tiles": made.tiles,
        "overhead": round(made.overhead, 4),
    }


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
