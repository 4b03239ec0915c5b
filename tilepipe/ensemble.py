"""Several networks, or one that is refined: a block's maps from their combined class probabilities.

Exact, they meet core by core: each network gives its probabilities over the core and the margin that the refinement
looks at, from one tile of its own. So the map depends on the plan's cores, and not on the blocks. Blended, they
meet block by block: blended probabilities do not depend on blocks either.

    networks   tile -> scores -> probabilities of core + margin  \\
               tile -> scores -> probabilities of core + margin   > combined -> refined -> core's labels
    raster     colours of core + margin, and where it has data   /
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch

from tilepipe.combine import Combination, combine, maps_of, softmax_in_place
from tilepipe.crf.parameters import CrfParameters
from tilepipe.crf.refine import refine
from tilepipe.grid import OutputGrid
from tilepipe.plan import Cell, TilePlan
from tilepipe.predict.maps import BlockMaps, Wanted
from tilepipe.predict.predictor import Predictor
from tilepipe.predict.prepare import use_one_thread
from tilepipe.predict.scores import Array, normalised
from tilepipe.window import Placement, Window


class Block(NamedTuple):
    """One block's pixels, and what is asked of them."""

    values: Array
    """(bands, H, W) as stored in the raster."""
    valid: Array | None
    """(H, W) bool: pixels with data; None for all."""
    hull: Window
    """Where these pixels lie in the raster; it may reach beyond it."""
    outputs: Window
    """The outputs that are asked for, on the output grid."""
    keep: Array | None
    """(rows, columns) bool: outputs that get a label; None for all."""
    grid: OutputGrid

    def known(self, outer: Window) -> Array | None:
        """Which of some outputs, given in pixels of the block's output, have data; None for all."""
        if self.valid is None:
            return None
        return self.grid.middles(self.valid, self.hull, outer.shift(*self.outputs.origin))


@dataclass(frozen=True, slots=True, eq=False)
class Voice:
    """One network's part on this worker."""

    predictor: Predictor
    plan: TilePlan
    bands: tuple[int, ...]
    """Its bands among those of the block, from 0."""
    order: tuple[int, ...]
    """Where it keeps the job's classes."""
    weights: Array | None
    """Of a tile's outputs while blending; None when exact."""

    def hull(self, outputs: Window) -> Window:
        """The raster pixels that it needs for `outputs`."""
        return self.plan.hull(outputs)

    def pixels(self, values: Array) -> Array:
        """Its bands of a block's pixels."""
        return values if self.bands == tuple(range(len(values))) else values[list(self.bands)]


@dataclass(frozen=True, slots=True)
class Meeting:
    """How the networks' probabilities become one label map."""

    how: Combination
    crf: CrfParameters | None
    mean: Sequence[float]
    """Of the first network's bands, by which colours are normalised; likewise `std`."""
    std: Sequence[float]
    precision: str
    device: str
    """Where the refinement runs."""

    @property
    def dtype(self) -> Literal["float64", "float32"]:
        """The arithmetic of probabilities."""
        return "float64" if self.precision == "float64" else "float32"


class Ensemble:
    """What labels blocks from several networks' combined probabilities; any number of threads may call `maps`."""

    def __init__(self, voices: Sequence[Voice], meeting: Meeting, wanted: Wanted, threads: int | None) -> None:
        self.voices, self.meeting, self.wanted = voices, meeting, wanted
        self.classes = len(voices[0].order)
        count = len(os.sched_getaffinity(0)) if threads is None else threads
        self._refine = _refiner(meeting.device)
        self._pool = ThreadPoolExecutor(count, "tilepipe-core", initializer=use_one_thread)

    def close(self) -> None:
        """Ends the threads; the predictors are their owner's to close."""
        self._pool.shutdown(cancel_futures=True)

    def maps(self, block: Block) -> BlockMaps:
        """The block's labels, and what else is wanted."""
        return self._exact(block) if self.voices[0].plan.exact else self._blend(block)

    def _exact(self, block: Block) -> BlockMaps:
        maps = BlockMaps.unfilled(block.outputs.shape, self.classes, self.wanted)
        layouts = [voice.plan.cells(block.outputs) for voice in self.voices]
        shifts = [hull.shift(-block.hull.rows.start, -block.hull.cols.start).origin for hull, _ in layouts]
        cells = zip(*(cells for _, cells in layouts), strict=True)
        futures = [self._pool.submit(self._cell, block, each, shifts, maps) for each in cells]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
        return maps.finished(block.keep, self.classes, self.wanted)

    def _cell(self, block: Block, cells: Sequence[Cell], shifts: Sequence[tuple[int, int]], maps: BlockMaps) -> None:
        """Labels the inner outputs of one core, whose tiles by network are `cells`."""
        inner, outer = cells[0].inner, cells[0].outer
        keep = None if block.keep is None else block.keep[_slices(inner)]
        if keep is not None and not keep.any():
            return
        known = block.known(outer)
        found = []
        for voice, cell, shift in zip(self.voices, cells, shifts, strict=True):
            source = cell.placement.source.shift(*shift)
            window = _slices(source)
            whole = Window.whole(source.shape)
            place = Placement(whole, cell.placement.crop, Window.whole(outer.shape), cell.placement.core)
            values = voice.pixels(block.values[:, *window])
            valid = None if block.valid is None else block.valid[window]
            wanted = Wanted(values=self.meeting.dtype)
            scores = voice.predictor.exact(values, valid, [place], outer.shape, wanted, known).values
            assert scores is not None
            found.append(softmax_in_place(scores))
        shares = self._refined(block, outer, known, self._combined(found))
        part = inner.shift(-outer.rows.start, -outer.cols.start)
        _put(maps, inner, maps_of(shares[:, *_slices(part)], keep, self.wanted))

    def _blend(self, block: Block) -> BlockMaps:
        needed = self.voices[0].plan.needed(block.outputs)
        outer = needed.shift(-block.outputs.rows.start, -block.outputs.cols.start)
        known = block.known(outer) if self.meeting.crf is not None else block.keep
        found, overlapped, disagreed = [], 0, 0
        for voice in self.voices:
            assert voice.weights is not None, "blending weights its tiles"
            hull, places = voice.plan.placements(needed)
            origin = hull.shift(-block.hull.rows.start, -block.hull.cols.start).origin
            shifted = [place._replace(source=place.source.shift(*origin)) for place in places]
            wanted = Wanted(probabilities="float32")
            pixels, shape = voice.pixels(block.values), needed.shape
            maps = voice.predictor.blend(pixels, block.valid, shifted, shape, voice.weights, wanted, known)
            assert maps.probabilities is not None
            found.append(maps.probabilities)
            overlapped, disagreed = overlapped + maps.overlapped, disagreed + maps.disagreed
        shares = self._refined(block, outer, known, self._combined(found))
        inner = Window.whole(block.outputs.shape).shift(-outer.rows.start, -outer.cols.start)
        made = maps_of(shares[:, *_slices(inner)], block.keep, self.wanted)
        return made._replace(overlapped=overlapped, disagreed=disagreed)

    def _combined(self, found: Sequence[Array]) -> Array:
        return combine(found, [voice.order for voice in self.voices], self.meeting.how)

    def _refined(self, block: Block, outer: Window, known: Array | None, shares: Array) -> Array:
        """The probabilities after the refinement, if there is any."""
        meeting = self.meeting
        if meeting.crf is None:
            return shares
        place = outer.shift(*block.outputs.origin).shift(-block.hull.rows.start, -block.hull.cols.start)
        values = self.voices[0].pixels(block.values[:, *_slices(place)])
        colors = normalised(values, known, meeting.mean, meeting.std, meeting.precision)
        return self._refine(shares, colors.astype(shares.dtype, copy=False), known, meeting.crf)


def _refiner(device: str) -> Callable[[Array, Array, Array | None, CrfParameters], Array]:
    """What refines on this device."""
    if not device.startswith("cuda"):
        return refine
    from tilepipe.crf.cuda import refine_on
    from tilepipe.predict.cuda_device import CudaDevice

    return partial(refine_on, CudaDevice(torch.device(device)))


def _put(maps: BlockMaps, inner: Window, part: BlockMaps) -> None:
    """Copies one core's maps into the block's."""
    window = _slices(inner)
    for whole, piece in zip(maps[:3], part[:3], strict=True):
        if whole is not None and piece is not None:
            whole[(..., *window)] = piece


def _slices(window: Window) -> tuple[slice, slice]:
    return slice(window.rows.start, window.rows.stop), slice(window.cols.start, window.cols.stop)
