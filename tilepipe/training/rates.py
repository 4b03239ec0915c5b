"""The learning rate of each step, as a pure function."""

from __future__ import annotations

import math

from tilepipe.training.options import Decay


def rate_at(step: int, steps: int, rate: float, decay: Decay, warmup: float = 0.0, power: float = 0.9) -> float:
    """The learning rate of a step from 0 to `steps` - 1; `rate` is the highest.

    It rises linearly over the first `warmup` of all steps. Then "onecycle" falls along half a cosine to 0 at the end
    (Smith and Topin, arXiv 1708.07120, with cosine annealing), "polynomial" as (1 - t)^power (Liu et al., arXiv
    1506.04579), and "constant" stays.

    >>> [round(rate_at(step, 10, 1.0, "polynomial", warmup=0.2, power=1), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    rising = round(warmup * steps)
    if step < rising:
        return rate * (step + 1) / rising
    spent = (step - rising) / max(1, steps - rising)
    if decay == "onecycle":
        return rate * (1 + math.cos(math.pi * spent)) / 2
    return rate * float((1 - spent) ** power) if decay == "polynomial" else rate
