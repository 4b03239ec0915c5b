"""The rule that draws windows for each kind of stage."""

from __future__ import annotations

from collections.abc import Sequence

from tilepipe.training.options import Kind
from tilepipe.training.pairs import Pair
from tilepipe.training.windows import Augmentation, Draws, UniformDraws


def draws_of(kind: Kind, pairs: Sequence[Pair], augmentation: Augmentation, seed: int) -> Draws:
    """The draws of a stage."""
    return UniformDraws(tuple(pair.shape for pair in pairs), augmentation, seed)
