"""The networks that can be named in a model file: a literal table, and `build`."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from tilepipe.errors import ModelError
from tilepipe.models import deconvnet, fcn, linear, segnet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "deconvnet": deconvnet.deconvnet,
    "fcn32s": fcn.fcn32s,
    "fcn16s": fcn.fcn16s,
    "fcn8s": fcn.fcn8s,
    "linear": linear.Linear,
    "segnet": segnet.segnet,
    "segnet-basic": segnet.segnet_basic,
}
"""Architecture names, and the functions that make them from keyword arguments."""


def build(name: str, **arguments: object) -> nn.Module:
    """A new network of the named architecture, with random weights.

    `arguments` are the architecture's own, usually `classes`, `bands` and `width`. Raises ModelError for a name
    or an argument that is not legal.

    >>> sum(p.numel() for p in build("segnet-basic", classes=11).parameters())
    1416587
    """
    factory = MODELS.get(name)
    if factory is None:
        raise ModelError(f"unknown architecture {name!r}; legal are {', '.join(sorted(MODELS))}")
    legal = inspect.signature(factory).parameters
    for argument in arguments:
        if argument not in legal:
            raise ModelError(f"architecture {name} takes no argument {argument!r}; legal are {', '.join(legal)}")
    return factory(**arguments)
