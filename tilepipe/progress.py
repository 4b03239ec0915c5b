"""How far a running job is: what it tells whoever watches."""

from __future__ import annotations

from typing import NamedTuple


class Progress(NamedTuple):
    """How far a job is."""

    done: int
    """Blocks, those of earlier runs included."""
    total: int
    resumed: int
    """Blocks that were done when this run started."""
    pixels: int
    """Outputs finished in this run."""
    total_pixels: int
    """Outputs that this run has to finish."""
    seconds: float
    """Since the first block was handed out."""
    work: str = ""
    """What is being made, where it is not what the job is for."""
