"""One block, on a worker: its window read, its tiles through the networks, its maps written and recorded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from tilepipe.checkpoint import Model, ModelCard
from tilepipe.combine import Combination
from tilepipe.crf.parameters import CrfParameters
from tilepipe.ensemble import Block, Ensemble, Meeting, Voice
from tilepipe.errors import ReadError, RunError
from tilepipe.grid import OutputGrid
from tilepipe.job import Job
from tilepipe.member import Reference
from tilepipe.plan import BlockIndex, TilePlan
from tilepipe.predict.blend import window_weights
from tilepipe.predict.maps import BlockMaps, Wanted
from tilepipe.predict.predictor import Predictor
from tilepipe.predict.prepare import use_large_pages
from tilepipe.raster.area import AreaMask
from tilepipe.raster.reader import Reader
from tilepipe.raster.source import RasterSource
from tilepipe.store.output import OutputStore
from tilepipe.variants.variation import Variation
from tilepipe.window import Window


class Outcome(NamedTuple):
    """What a block's task sends back; its pixels are in the store."""

    block: BlockIndex
    pixels: int
    error: str | None


@dataclass(frozen=True, slots=True, eq=False)
class MemberRecipe:
    """What a worker needs of one model; a model from a file travels by its path."""

    reference: Reference
    digest: str
    variation: Variation
    plan: TilePlan
    bands: tuple[int, ...]
    order: tuple[int, ...]
    channels: int
    """Of the network's output."""

    def load(self) -> Model:
        """The model, if it is still the one that the job was planned with."""
        model = self.reference if isinstance(self.reference, Model) else self.reference.load()
        if model.digest != self.digest:
            raise RunError(f"{model.source} changed while the job was starting; run the command again")
        return model


@dataclass(frozen=True, slots=True, eq=False)
class BlockRecipe:
    """What a worker needs to run blocks: references and small values."""

    source: RasterSource
    area: AreaMask | None
    members: tuple[MemberRecipe, ...]
    combine: Combination
    crf: CrfParameters | None
    device: str
    precision: str
    threads: int
    wanted: Wanted
    grid: OutputGrid
    store: OutputStore | None
    """None where nothing is written."""

    @classmethod
    def of(cls, job: Job, source: RasterSource, store: OutputStore | None) -> BlockRecipe:
        """The recipe of a job's workers."""
        options = job.options
        members = tuple(
            MemberRecipe(
                reference=member.reference,
                digest=member.model.digest,
                variation=member.variation,
                plan=made,
                bands=member.bands,
                order=member.order,
                channels=member.geometry.channels_out,
            )
            for member, made in zip(job.members, job.plans, strict=True)
        )
        return cls(
            source=source,
            area=job.area,
            members=members,
            combine=options.combine,
            crf=job.crf,
            device=job.target,
            precision=job.precision,
            threads=job.resources.threads,
            wanted=Wanted(options.confidence, options.probabilities, options.values),
            grid=job.grid,
            store=store,
        )

    def build(self, former: BlockRunner | None = None) -> BlockRunner:
        """The runner that a worker keeps; networks of `former` that it needs serve on, and the rest of it ends."""
        use_large_pages()
        return BlockRunner(self, former)

    def settled_for(self, member: MemberRecipe) -> tuple[object, ...]:
        """All that a member's network is prepared from and for: jobs in which it is equal can share the network."""
        return (
            *(member.digest, member.variation, member.channels, member.plan.tile, member.plan.projection.device),
            *(self.device, self.precision, self.threads),
        )


class Ready(NamedTuple):
    """A network that is loaded, prepared and warm, and its model's card."""

    predictor: Predictor
    card: ModelCard


class BlockRunner:
    """One worker's open raster, loaded networks and store."""

    def __init__(self, recipe: BlockRecipe, former: BlockRunner | None = None) -> None:
        self.recipe, self.plan = recipe, recipe.members[0].plan
        kept: list[Ready | None] = [None] * len(recipe.members)
        if former is not None:
            kept = [former.give(recipe.settled_for(member)) for member in recipe.members]
            # Before anything is loaded: the device has room for one job.
            former.close()
        pairs = list(zip(recipe.members, kept, strict=True))
        loaded = [self._load(member) if ready is None else ready for member, ready in pairs]
        self._networks: list[Ready | None] = [*loaded]
        self.reader = recipe.source.open()
        self.area = None if recipe.area is None else recipe.area.open()
        self.voices = [self._voice(*pair) for pair in zip(recipe.members, loaded, strict=True)]
        self.ensemble: Ensemble | None = None
        if len(self.voices) > 1 or recipe.crf is not None:
            card = loaded[0].card
            meeting = Meeting(recipe.combine, recipe.crf, card.mean, card.std, recipe.precision, recipe.device)
            self.ensemble = Ensemble(self.voices, meeting, recipe.wanted, recipe.threads)

    def _load(self, member: MemberRecipe) -> Ready:
        model = member.load()
        predictor = Predictor(
            member.variation.network(model.network, model.card.task),
            mean=model.card.mean,
            std=model.card.std,
            classes=member.channels,
            device=self.recipe.device,
            precision=self.recipe.precision,
            tile=member.plan.tile,
            threads=self.recipe.threads,
        )
        if member.plan.projection.device:
            # Before anything is stored: what the device cannot do ends the job here.
            predictor.settle(member.plan.projection.device)
        return Ready(predictor, model.card)

    def _voice(self, member: MemberRecipe, ready: Ready) -> Voice:
        window = member.plan.window
        weights = None if window is None else window_weights(window, member.plan.tile_output)
        return Voice(ready.predictor, member.plan, member.bands, member.order, weights)

    def give(self, settled_for: tuple[object, ...]) -> Ready | None:
        """A network that was prepared so, which from now on is the caller's to close; None where there is none."""
        for number, member in enumerate(self.recipe.members[: len(self._networks)]):
            if self._networks[number] is not None and self.recipe.settled_for(member) == settled_for:
                ready, self._networks[number] = self._networks[number], None
                return ready
        return None

    def close(self) -> None:
        """Ends the threads and files that the runner holds; nothing more can be made by it."""
        if self.ensemble is not None:
            self.ensemble.close()
        for ready in self._networks:
            if ready is not None:
                ready.predictor.close()
        # Their memory is free from now on, whoever still knows of this runner.
        self._networks, self.voices, self.ensemble = [], [], None
        self.reader.close()

    def read_from(self, source: RasterSource) -> None:
        """Reads another raster from now on, one of the same size, type and bands."""
        self.reader.close()
        self.reader = source.open()

    def maps(self, outputs: Window, reader: Reader | None = None) -> BlockMaps | None:
        """The map (and what else is wanted) of a window of outputs; None where no pixel gets one.

        Pixels come from `reader` where it is given, else from the recipe's source.
        """
        grid = self.recipe.grid
        inside = None if self.area is None else self.area.read(grid.cells(outputs))
        if inside is not None and not inside.any():
            return None
        hull = reduce(Window.hull, (voice.hull(outputs) for voice in self.voices))
        pixels = (reader or self.reader).read(hull)
        keep = None if pixels.valid is None else grid.middles(pixels.valid, hull, outputs)
        if inside is not None:
            within = grid.middles(inside, grid.cells(outputs), outputs)
            keep = within if keep is None else keep & within
        if keep is not None and not keep.any():
            return None
        block = Block(pixels.values, pixels.valid, hull, outputs, keep, grid)
        return self._alone(block) if self.ensemble is None else self.ensemble.maps(block)

    def _alone(self, block: Block) -> BlockMaps:
        """The maps of a single network."""
        (voice,) = self.voices
        _, places = self.plan.placements(block.outputs)
        given, shape, wanted = (block.values, block.valid, places), block.outputs.shape, self.recipe.wanted
        if voice.weights is None:
            return voice.predictor.exact(*given, shape, wanted, block.keep)
        return voice.predictor.blend(*given, shape, voice.weights, wanted, block.keep)


def run_block(runner: BlockRunner, index: BlockIndex) -> Outcome:
    """What became of one block: read, predicted, written, recorded; or the error that its pixels gave."""
    outputs, store = runner.plan.block_window(index), runner.recipe.store
    assert store is not None, "blocks that are run are written"
    started = time.perf_counter()
    try:
        maps = runner.maps(outputs)
    except ReadError as error:
        return Outcome(index, outputs.area, str(error))
    info = {"seconds": {"compute": time.perf_counter() - started}}
    if maps is None:
        store.write_nodata(index, info)
    else:
        store.write_block(index, maps, {**info, "disagreement": [maps.disagreed, maps.overlapped]})
    return Outcome(index, outputs.area, None)
