"""The loss of a pass: cross-entropy per labelled pixel, at full size and, as hints, at the network's inner stages."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilepipe.errors import ModelError
from tilepipe.training.dataset import IGNORE


def cross_entropy(scores: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """The mean cross-entropy over labelled pixels, each weighted by its class; 0 where none is labelled.

    scores: (N, classes, h, w); labels: (N, h, w) int64, IGNORE where there is none; weights: (classes,) or None.
    """
    total = F.cross_entropy(scores.float(), labels, weights, ignore_index=IGNORE, reduction="sum")
    known = labels != IGNORE
    share = known.sum() if weights is None else weights[labels.clamp_min(0)].mul(known).sum()
    return total / share.clamp_min(torch.finfo(torch.float32).tiny)


def inner_stages(network: nn.Module) -> list[nn.Module]:
    """A SegNet's stages but the first and the last; raises ModelError for a network without such."""
    encoder, decoder = getattr(network, "encoder", None), getattr(network, "decoder", None)
    if not isinstance(encoder, nn.ModuleList) or not isinstance(decoder, nn.ModuleList):
        raise ModelError(f"{type(network).__name__} has no stages for hints; --hints is for SegNet and SegNet-Basic")
    return [*encoder[1:], *decoder[:-1]]


class Hints(nn.Module):
    """Extra classifiers on a SegNet's inner stages, for training alone.

    A SegNet hands only pooling indices past its bottleneck, so that errors at full size reach the inner layers late
    and training from random weights stalls. Each inner stage's features are therefore classified too, against the
    labels sampled at that stage's scale (deep supervision: Lee et al., arXiv 1409.5185). Raises ModelError for a
    network without such stages.
    """

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.features: list[Tensor] = []
        self.heads = nn.ModuleList()
        for stage in inner_stages(network):
            widths = [layer.out_channels for layer in stage.modules() if isinstance(layer, nn.Conv2d)]
            self.heads.append(nn.Conv2d(widths[-1], classes, 1))
            stage.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self.features.append(output)

    def forward(self, labels: Tensor, weights: Tensor | None) -> Tensor:
        """The mean loss of all stages in the pass that was made last."""
        losses = []
        for head, features in zip(self.heads, self.features, strict=True):
            scale = labels.shape[-1] // features.shape[-1]
            sampled = labels[:, scale // 2 :: scale, scale // 2 :: scale]
            losses.append(cross_entropy(head(features), sampled, weights))
        self.features.clear()
        return torch.stack(losses).mean()
