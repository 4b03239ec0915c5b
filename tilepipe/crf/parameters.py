"""Refinement of class probabilities by a conditional random field whose pixels see only their neighbourhood.

Mean field inference with a kernel of position and colour and one of position alone, as in Kraehenbuehl and Koltun
("Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", arXiv 1210.5644, sections 2 and 3),
both cut off at `radius` (Teichmann and Cipolla, "Convolutional CRFs for Semantic Segmentation", arXiv 1805.04777,
section 4). Positions p are pixels, colours c the bands normalised by the model's mean and standard deviation. Over
the valid neighbours j of pixel i, those of the (2 radius + 1)^2 window without its centre:

    appearance a(i, j) = exp(-min(|p_i - p_j|^2 / (2 appearance_deviation^2)
                                  + |c_i - c_j|^2 / (2 color_deviation^2), 60))
    smoothness s(i, j) = exp(-|p_i - p_j|^2 / (2 smoothness_deviation^2))
    message    m_i(l)  = sum_j (appearance_weight a(i, j) / sum_k a(i, k)
                                + smoothness_weight s(i, j) / sum_k s(i, k)) Q_j(l)
    step       Q_i(l)  = P_i(l) exp(m_i(l)) / sum_k P_i(k) exp(m_i(k))

P are the network's probabilities, at least FLOOR; the first Q are the same. Labels that differ cost alike (Potts).
Pixels that are not valid neither send nor receive, nor does what lies beyond the border; dividing by the sums over
the neighbours that are left keeps the field as strong beside them. After all iterations a pixel has seen `reach` =
iterations x radius pixels to each side, and its arithmetic does not depend on where it lies in the arrays: refining
a window with that margin, cropped where the raster ends, gives the same bits as refining the raster.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from tilepipe.errors import UsageError

_LEAST = {
    "iterations": 1,
    "radius": 1,
    "appearance_deviation": 0.1,
    "smoothness_deviation": 0.1,
    "color_deviation": 1e-3,
}
_MOST = {"iterations": 100, "radius": 32}


@dataclass(frozen=True, slots=True)
class CrfParameters:
    """What a refinement does; see the module's formula."""

    iterations: int = 5
    """Mean field steps, 1 to 100."""
    radius: int = 5
    """How far a pixel's neighbours lie in rows and columns, 1 to 32 pixels."""
    appearance_weight: float = 5.0
    """How much the neighbours of similar colour count; at least 0."""
    appearance_deviation: float = 4.0
    """The deviation of position in the appearance kernel, in pixels; at least 0.1."""
    color_deviation: float = 0.25
    """The deviation of colour, in the model's standard deviations of a band; at least 0.001."""
    smoothness_weight: float = 1.0
    """How much near neighbours count whatever their colour; at least 0."""
    smoothness_deviation: float = 1.0
    """The deviation of position in the smoothness kernel, in pixels; at least 0.1."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least, most = getattr(self, field.name), _LEAST.get(field.name, 0), _MOST.get(field.name, math.inf)
            whole = field.name in _MOST
            if whole and not (isinstance(value, int) and least <= value <= most):
                raise UsageError(f"crf {field.name} {value!r} is not legal; use a whole number from {least} to {most}")
            if not whole and not (math.isfinite(value) and value >= least):
                raise UsageError(f"crf {field.name} {value!r} is not legal; use a finite number of at least {least}")

    @property
    def reach(self) -> int:
        """How many pixels to each side a refined pixel depends on: iterations x radius."""
        return self.iterations * self.radius

    def to_json(self) -> dict[str, Any]:
        """The parameters by name; `CrfParameters(**values)` gives them back."""
        return asdict(self)


KEYS = {
    "iterations": "iterations",
    "radius": "radius",
    "appearance": "appearance_weight",
    "position": "appearance_deviation",
    "color": "color_deviation",
    "smoothness": "smoothness_weight",
    "distance": "smoothness_deviation",
}
"""What a parameter is called on the command line."""


def parse_crf(text: str) -> CrfParameters:
    """The parameters that "crf" or "crf:key=value,..." asks for; those not named keep their defaults.

    Keys are those of KEYS or the fields' own names. Raises UsageError for anything else.

    >>> parse_crf("crf:iterations=3,radius=4,color=0.2").reach
    12
    """
    name, colon, rest = text.strip().partition(":")
    if name != "crf":
        raise UsageError(f"refinement {text!r} is not known; use crf, or crf:KEY=VALUE,... with {', '.join(KEYS)}")
    values: dict[str, int | float] = {}
    for part in rest.split(",") if colon else ():
        key, _, value = (piece.strip() for piece in part.partition("="))
        field = KEYS.get(key, key)
        if field not in KEYS.values() or field in values:
            told = "is given twice" if field in values else "is not known"
            raise UsageError(
                f"{key!r} in {text!r} {told}; use each of {', '.join(KEYS)} at most once, as in crf:radius=5"
            )
        try:
            values[field] = int(value) if field in _MOST else float(value)
        except ValueError:
            kind = "whole number" if field in _MOST else "number"
            raise UsageError(f"{value!r} for {key} in {text!r} is not a {kind}; write it as in {key}=1") from None
    return CrfParameters(**values)  # type: ignore[arg-type]
