"""Train a small SegNet on synthetic scenes and write it as a model file; this made `synthetic-landcover`.

    python workflows/train_synthetic.py --output synthetic-landcover.safetensors

The scenes' seeds begin at 1,000,000, so every smaller seed is unseen. The same arguments, libraries and processor
give the same bytes. One thread of a server processor takes about ten minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilepipe.checkpoint import ClassInfo, ModelCard, save_model
from tilepipe.models.segnet import SegNet, segnet
from tilepipe.scene.synthetic import CLASSES, PIXEL_SIZE, Scene, synthetic_scene

TRAINING_SEEDS = 1_000_000
HELD_OUT = (1, 2, 3, 4)
EVALUATION_SIDE = 1024


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="model file to write (.safetensors)")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps")
    parser.add_argument("--width", type=float, default=0.125, help="factor on SegNet's features")
    parser.add_argument("--scenes", type=int, default=120, help="number of training scenes")
    parser.add_argument("--side", type=int, default=640, help="sides of a training scene, in pixels")
    parser.add_argument("--crop", type=int, default=256, help="sides of a training crop, a multiple of 64")
    parser.add_argument(
        "--batch", type=int, default=4, help="crops per step; at first four times as many of half the side"
    )
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the crops and their turns")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--every", type=int, default=250, help="score and save each so many steps")
    return parser.parse_args(arguments)


def keep_large_allocations() -> None:
    """Let glibc reuse the memory of large activations instead of mapping it anew at each step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def statistics(scenes: list[Scene]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each band, rounded so that a model card shows them in full."""
    means = np.mean([scene.image.mean((1, 2)) for scene in scenes], 0)
    squares = np.mean([(scene.image.astype(np.float64) ** 2).mean((1, 2)) for scene in scenes], 0)
    return tuple(np.round(means, 3).tolist()), tuple(np.round(np.sqrt(squares - means**2), 3).tolist())


def batch(scenes: list[Scene], count: int, crop: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random crops, turned and mirrored: images (count, 3, crop, crop) uint8, labels (count, crop, crop)."""
    images, labels = [], []
    for _ in range(count):
        scene = scenes[random.integers(len(scenes))]
        row, col = random.integers(0, scene.labels.shape[0] - crop + 1, 2)
        place = np.s_[..., row : row + crop, col : col + crop]
        turns, mirror = random.integers(4), random.integers(2)
        for pixels, chosen in ((scene.image[place], images), (scene.labels[place], labels)):
            turned = np.rot90(pixels, turns, (-2, -1))
            chosen.append(np.ascontiguousarray(turned[..., ::-1] if mirror else turned))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)).long()


def normalise(images: Tensor, mean: Iterable[float], std: Iterable[float]) -> Tensor:
    shape = (1, -1, 1, 1)
    values = (images.float() - torch.tensor(list(mean)).view(shape)) / torch.tensor(list(std)).view(shape)
    return values.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def score(network: nn.Module, scenes: list[Scene], mean: Iterable[float], std: Iterable[float]) -> list[float]:
    """Each class's intersection over union, over all scenes together."""
    network.eval()
    confusion = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for scene in scenes:
        found = network(normalise(torch.from_numpy(scene.image)[None], mean, std)).argmax(1)[0].numpy()
        pairs = scene.labels.astype(np.int64) * len(CLASSES) + found
        confusion += np.bincount(pairs.ravel(), minlength=confusion.size).reshape(confusion.shape)
    network.train()
    hits = np.diag(confusion)
    return (hits / np.maximum(confusion.sum(0) + confusion.sum(1) - hits, 1)).tolist()


def card(
    options: argparse.Namespace, step: int, mean: tuple[float, ...], std: tuple[float, ...], ious: list[float]
) -> ModelCard:
    told = ("steps", "width", "scenes", "side", "crop", "batch", "rate", "seed", "threads")
    return ModelCard(
        architecture="segnet",
        arguments={"classes": len(CLASSES), "bands": 3, "width": options.width},
        classes=tuple(ClassInfo(name, color) for name, color in CLASSES),
        bands=("red", "green", "blue"),
        mean=mean,
        std=std,
        nodata="masked pixels become 0 after normalisation",
        resolution=PIXEL_SIZE,
        licence="MIT",
        provenance={
            "command": " ".join(
                ["python workflows/train_synthetic.py", *(f"--{name} {getattr(options, name)}" for name in told)]
            ),
            "data": f"scenes of tilepipe.scene, seeds {TRAINING_SEEDS} to {TRAINING_SEEDS + options.scenes - 1}",
            "steps": step,
            "mean_iou": round(float(np.mean(ious)), 4),
            "iou": {name: round(iou, 4) for (name, _), iou in zip(CLASSES, ious, strict=True)},
            "evaluation": f"seeds {', '.join(map(str, HELD_OUT))} of {EVALUATION_SIDE} x {EVALUATION_SIDE} pixels",
            "torch": torch.__version__,
        },
    )


class Hints:
    """Extra classifiers on the inner stages, used in training alone.

    A SegNet hands only pooling indices past its bottleneck, so errors at full size reach the inner layers late.
    Each stage's features are therefore classified too, against the labels sampled at that stage's scale.
    """

    def __init__(self, network: SegNet) -> None:
        stages = [*network.encoder[1:], *network.decoder[:-1]]
        self.features: list[Tensor] = []
        self.heads = nn.ModuleList()
        for stage in stages:
            stage.register_forward_hook(lambda _module, _inputs, output: self.features.append(output))
            widths = [layer.out_channels for layer in stage if isinstance(layer, nn.Conv2d)]
            self.heads.append(nn.Conv2d(widths[-1], network.config.classes, 1))

    def loss(self, labels: Tensor, weights: Tensor) -> Tensor:
        """The mean loss of all stages for the pass that was made last."""
        total = torch.zeros(())
        for head, features in zip(self.heads, self.features, strict=True):
            scale = labels.shape[-1] // features.shape[-1]
            sampled = labels[:, scale // 2 :: scale, scale // 2 :: scale]
            total = total + F.cross_entropy(head(features), sampled, weights)
        self.features.clear()
        return total / len(self.heads)


def class_weights(scenes: list[Scene]) -> Tensor:
    """The inverse square root of each class's share, so that roofs and roads count; their mean is 1."""
    counts = sum(np.bincount(scene.labels.ravel(), minlength=len(CLASSES)) for scene in scenes)
    weights = torch.tensor(counts, dtype=torch.float32).rsqrt()
    return weights / weights.mean()


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    random = np.random.default_rng(options.seed)
    scenes = [synthetic_scene((options.side, options.side), TRAINING_SEEDS + index) for index in range(options.scenes)]
    held_out = [synthetic_scene((EVALUATION_SIDE, EVALUATION_SIDE), seed) for seed in HELD_OUT]
    mean, std = statistics(scenes)
    weights = class_weights(scenes)
    network = segnet(classes=len(CLASSES), bands=3, width=options.width)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    hints = Hints(network)
    parameters = [*network.parameters(), *hints.heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.rate, options.steps, pct_start=0.1)
    began, loss_sum = time.monotonic(), 0.0
    for step in range(1, options.steps + 1):
        # Many small crops teach more per pixel than few large ones; the last part gets used to whole surroundings.
        early = step <= 0.6 * options.steps
        count, crop = (4 * options.batch, options.crop // 2) if early else (options.batch, options.crop)
        images, labels = batch(scenes, count, crop, random)
        loss = F.cross_entropy(network(normalise(images, mean, std)), labels, weights)
        optimiser.zero_grad()
        (loss + hints.loss(labels, weights)).backward()
        optimiser.step()
        schedule.step()
        loss_sum += loss.item()
        if step % 25 == 0:
            print(f"step {step}: loss {loss_sum / 25:.4f}, {time.monotonic() - began:.0f} s", flush=True)
            loss_sum = 0.0
        if step % options.every == 0 or step == options.steps:
            ious = score(network, held_out, mean, std)
            hints.features.clear()
            told = ", ".join(f"{name} {iou:.3f}" for (name, _), iou in zip(CLASSES, ious, strict=True))
            print(f"step {step}: mean IoU {np.mean(ious):.4f} ({told})", flush=True)
            save_model(options.output, network, card(options, step, mean, std, ious), half=True)


if __name__ == "__main__":
    keep_large_allocations()
    train(parse(sys.argv[1:]))
