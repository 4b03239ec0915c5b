"""Models that were loaded, and what was derived of their networks, kept for the jobs to come."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from tilepipe.checkpoint import Model
from tilepipe.geometry.network import Geometry
from tilepipe.loading.reference import ModelReference
from tilepipe.options import SegmentOptions
from tilepipe.projection import Footprint
from tilepipe.variants.variation import Variation

MODELS = 4
"""Models that are kept, and as many derivations: those used last."""
FOOTPRINTS = 64
"""Measures of memory that are kept."""


class Shelf:
    """Loads each model once, and derives its geometry once for each way in which it is run.

    A model is what its file held when it was first asked for.
    """

    def __init__(self) -> None:
        self._models: OrderedDict[Hashable, Model] = OrderedDict()
        self._varied: OrderedDict[Hashable, tuple[Variation, Geometry]] = OrderedDict()
        self._footprints: OrderedDict[Hashable, Footprint] = OrderedDict()

    def model(self, reference: ModelReference) -> Model:
        """The model that the reference loads; raises ModelError as it does."""
        return _kept(self._models, repr(reference), reference.load, MODELS)

    def varied(self, model: Model, options: SegmentOptions) -> tuple[Variation, Geometry]:
        """How the options want the model's network to run, and the geometry that it then has."""

        def derive() -> tuple[Variation, Geometry]:
            bands = len(model.card.bands)
            variation = Variation.asked(options, model.network, bands)
            return variation, variation.geometry(model.network, bands)

        return _kept(self._varied, (model.digest, options.stride, options.dense, options.tta), derive, MODELS)

    def footprint(self, key: Hashable, measure: Callable[[], Footprint]) -> Footprint:
        """What a network takes for a tile; `key`: all that this depends on."""
        return _kept(self._footprints, key, measure, FOOTPRINTS)


def _kept(shelf: OrderedDict[Hashable, Any], key: Hashable, make: Callable[[], Any], most: int) -> Any:
    """What the shelf, which has room for `most`, holds under the key; made where it is not there."""
    found = shelf.pop(key, None)
    shelf[key] = make() if found is None else found
    if len(shelf) > most:
        shelf.popitem(last=False)
    return shelf[key]
