"""One block, on a worker: its window read, its tiles through the network, its maps written and recorded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilepipe.checkpoint import IN_MEMORY, Model, load_model
from tilepipe.errors import ReadError, RunError
from tilepipe.job import Job, cell_offset
from tilepipe.plan import BlockIndex, TilePlan
from tilepipe.predict.blend import window_weights
from tilepipe.predict.predictor import BlockMaps, Predictor, Wanted
from tilepipe.predict.prepare import use_large_pages
from tilepipe.raster.area import AreaMask
from tilepipe.raster.source import RasterSource
from tilepipe.store.output import OutputStore
from tilepipe.window import Placement, Window


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
            device=job.target,
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
