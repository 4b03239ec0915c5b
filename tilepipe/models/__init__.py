"""The networks that can be named in a model file: a literal table, and `build`."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from tilepipe.errors import ModelError
from tilepipe.models import autoencoder, deconvnet, dilated, fcn, lenet, linear, segnet, segnet_basic

MODELS: dict[str, Callable[..., nn.Module]] = {
    "autoencoder": autoencoder.autoencoder,
    "bilinear-interpolation": segnet_basic.bilinear_interpolation,
    "deconvnet": deconvnet.deconvnet,
    "dilated-fcn": dilated.dilated_fcn,
    "fcn-basic": segnet_basic.fcn_basic,
    "fcn-basic-noaddition": segnet_basic.fcn_basic_noaddition,
    "fcn-basic-noaddition-nodimreduction": segnet_basic.fcn_basic_noaddition_nodimreduction,
    "fcn-basic-nodimreduction": segnet_basic.fcn_basic_nodimreduction,
    "fcn32s": fcn.fcn32s,
    "fcn16s": fcn.fcn16s,
    "fcn8s": fcn.fcn8s,
    "lenet": lenet.lenet,
    "linear": linear.Linear,
    "segnet": segnet.segnet,
    "segnet-basic": segnet_basic.segnet_basic,
    "segnet-basic-encoder-addition": segnet_basic.encoder_addition,
    "segnet-basic-single-channel-decoder": segnet_basic.single_channel_decoder,
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
