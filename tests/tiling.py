"""Tiling a raster in memory as a job does: a plan, a legal tile, and the label map of all blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from reference import ArraySource

from tilepipe.axis import extended_size
from tilepipe.block import BlockRecipe, BlockRunner, MemberRecipe
from tilepipe.checkpoint import Model
from tilepipe.geometry.network import Geometry
from tilepipe.grid import OutputGrid
from tilepipe.plan import PlanRequest, TilePlan
from tilepipe.planner import PlannedNetwork, plan
from tilepipe.predict.predictor import Wanted
from tilepipe.projection import Footprint, PixelLayout, Resources
from tilepipe.variants.variation import Variation


def planned(geometry: Geometry, shape: tuple[int, int], request: PlanRequest) -> TilePlan:
    """The plan of a job on a machine with ample memory."""
    pixel = PixelLayout(bands=3, itemsize=1, classes=5)
    network = PlannedNetwork(geometry, pixel, lambda tile: Footprint(tile[0] * tile[1], 0, 1))
    (made,) = plan([network], shape, request, Resources(host_bytes=1 << 40))
    return made


def tiled_labels(
    model: Model, made: TilePlan, values: NDArray[Any], valid: NDArray[np.bool_] | None, precision: str
) -> NDArray[Any]:
    """The label map that the blocks of a plan give, without files or workers."""
    classes = len(model.card.classes)
    member = MemberRecipe(
        reference=model,
        digest=model.digest,
        variation=Variation(),
        plan=made,
        bands=tuple(range(len(model.card.bands))),
        order=tuple(range(classes)),
        channels=classes,
    )
    runner = BlockRunner(
        BlockRecipe(
            source=ArraySource(values, valid),  # type: ignore[arg-type]
            area=None,
            members=(member,),
            combine="mean",
            crf=None,
            device="cpu",
            precision=precision,
            threads=2,
            wanted=Wanted(),
            grid=OutputGrid((1, 1), (0.0, 0.0)),
            store=None,  # type: ignore[arg-type]
        )
    )
    labels = np.full(made.shape, 255, np.uint8)
    for index in made.blocks():
        outputs = made.block_window(index)
        maps = runner.maps(outputs)
        if maps is not None:
            labels[outputs.within(made.region)] = maps.labels
    runner.close()
    return labels


def some_tile(geometry: Geometry, shape: tuple[int, int], more: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """A legal tile: for a core of at least 48 outputs, and `more` times at least 24 pixels larger."""
    sizes = []
    for axis, length, count in zip((geometry.rows, geometry.cols), shape, more, strict=True):
        unit, step = axis.alignment // axis.scale, axis.sizes.step
        smallest = axis.tile(unit * -(-48 // unit), extended_size(axis, length))
        sizes.append(smallest + count * step * -(-24 // step))
    return sizes[0], sizes[1]
