"""Batch normalisations that become part of the convolutions before them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from tilepipe.predict.graphs import calls_of, has_hooks, modules_read, replace_module, traced

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norms(network: nn.Module) -> int:
    """The number of batch normalisations folded, in place, into the convolutions before them.

    A pair is folded when the traced graph shows that every result of the convolution goes to that normalisation
    only, and nothing else reads the modules; a network that torch.fx cannot trace is left as it is. Weights are
    computed in float64 and cast back (Jacob et al., arXiv 1712.05877, section 3.2).
    """
    graph = traced(network)
    if graph is None:
        return 0
    modules = dict(network.named_modules(remove_duplicate=False))
    pairs = list(_foldable(graph, modules))
    for conv, norm in pairs:
        _fold(conv, norm)
        replace_module(network, norm, nn.Identity())
    return len(pairs)


def _foldable(graph: fx.Graph, modules: dict[str, nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    calls = calls_of(graph, modules)
    read = modules_read(graph, modules)
    for norm, nodes in calls.items():
        sources = {node.args[0] for node in nodes if len(node.args) == 1 and not node.kwargs}
        found = {modules[str(s.target)] for s in sources if isinstance(s, fx.Node) and s.op == "call_module"}
        if len(found) != 1 or len(sources) != len(nodes):
            continue
        conv = found.pop()
        single = set(calls[conv]) == sources and all(len(node.users) == 1 for node in calls[conv])
        if single and not {conv, norm} & read and _is_plain(conv, norm):
            yield conv, norm


def _is_plain(conv: Any, norm: Any) -> bool:
    return (
        type(conv) in CONVOLUTIONS
        and type(norm) in NORMALISATIONS
        and norm.running_mean is not None
        and norm.running_var is not None
        and not norm.training
        and not has_hooks(conv)
        and not has_hooks(norm)
        and conv.weight.is_floating_point()
    )


def _fold(conv: Any, norm: Any) -> None:
    shape = [1] * conv.weight.dim()
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        bias = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
        bias = bias * scale if norm.bias is None else bias * scale + norm.bias.double()
        weight = conv.weight.double()
        if conv.transposed:  # (in, out / groups, ...): group g holds outputs g * out / groups and on
            grouped = weight.unflatten(0, (conv.groups, -1))
            factors = scale.view(conv.groups, 1, -1, *shape[2:])
            weight = (grouped * factors).flatten(0, 1)
        else:
            weight = weight * scale.view(-1, *shape[1:])
        kept = conv.weight.dtype
        conv.weight = nn.Parameter(weight.to(kept), requires_grad=False)
        conv.bias = nn.Parameter(bias.to(kept), requires_grad=False)
