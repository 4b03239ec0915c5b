"""Scores on whole rasters: each is labelled as a job labels it, tiled where it is large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tilepipe.block import BlockRecipe, BlockRunner
from tilepipe.checkpoint import IN_MEMORY, Model, ModelCard
from tilepipe.errors import InputError
from tilepipe.job import prepare
from tilepipe.metrics import Confusion
from tilepipe.options import SegmentOptions
from tilepipe.training.pairs import Pair
from tilepipe.training.statistics import IGNORE, blocks_of, target_table, targets_of
from tilepipe.window import Window

Kind = tuple[tuple[int, int], str]
"""Shape and type of a raster: what a plan depends on."""


class Validation:
    """Scores networks of one architecture on the same rasters, again and again."""

    def __init__(self, pairs: Sequence[Pair], card: ModelCard, void: Sequence[int], options: SegmentOptions) -> None:
        self.card, self.options = card, options
        self._targets = target_table(len(card.classes), void)
        self._pairs: dict[Kind, list[Pair]] = {}
        for pair in pairs:
            self._pairs.setdefault((pair.shape, pair.image.info.dtype), []).append(pair)
        self._recipes: dict[Kind, BlockRecipe] = {}

    def check(self) -> None:
        """Nothing; raises InputError where a label is beyond the classes, or no pixel at all is labelled."""
        labelled = 0
        for pair in (pair for pairs in self._pairs.values() for pair in pairs):
            for window in blocks_of(pair):
                labelled += int(np.count_nonzero(self._truth(pair, window) != IGNORE))
        if not labelled:
            raise InputError("no pixel of the validation images is labelled; check their labels, and --void")

    def __call__(self, network: nn.Module) -> Confusion:
        """The confusion matrix over all rasters together; the network is in evaluation mode afterwards."""
        model = Model(network.eval(), self.card, IN_MEMORY, "")
        confusion = Confusion.empty(len(self.card.classes))
        for kind, pairs in self._pairs.items():
            runner = self._recipe(kind, model).build()
            for pair in pairs:
                runner.read_from(pair.image)
                for index in runner.plan.blocks():
                    self._count(runner, pair, runner.plan.block_window(index), confusion)
            runner.close()
        return confusion

    def _recipe(self, kind: Kind, model: Model) -> BlockRecipe:
        """How rasters of a kind are labelled; planned once."""
        pair = self._pairs[kind][0]
        if kind not in self._recipes:
            options = replace(self.options, bands=pair.image.choice.indices)
            job = prepare(pair.sample.image, model, options)
            self._recipes[kind] = BlockRecipe.of(job, pair.image, None)
        recipe = self._recipes[kind]
        return replace(recipe, members=(replace(recipe.members[0], reference=model, digest=""),))

    def _count(self, runner: BlockRunner, pair: Pair, window: Window, confusion: Confusion) -> None:
        truth, maps = self._truth(pair, window), runner.maps(window)
        if maps is None or maps.labels is None:
            return
        found = maps.labels.astype(np.int64)
        known = (truth != IGNORE) & (found < len(self.card.classes))
        confusion.add(truth, found, known)

    def _truth(self, pair: Pair, window: Window) -> NDArray[np.int64]:
        return targets_of(pair, window, pair.read_labels(window), self._targets)
