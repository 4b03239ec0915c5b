"""Windows a second while training: the input alone, the network alone, and both together.

    python tests/benchmarks/training.py [--model segnet] [--arg width=0.25] [--crop 256] [--batch 8] [--workers 2]
                                        [--device cpu] [--data MANIFEST] [--seconds 20]

Without --data, windows come from synthetic scenes in tiled deflate GeoTIFFs. Where the input alone is faster than the
network alone, both together should be as fast as the network: the device does not wait.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from tilepipe.checkpoint import ClassInfo
from tilepipe.loading.spelling import arguments_of
from tilepipe.scene.synthetic import CLASSES, write_scene
from tilepipe.training.dataset import WindowDataset, loader
from tilepipe.training.loop import Batch, Run, Trainer
from tilepipe.training.network import make_network
from tilepipe.training.options import Stage, TrainOptions
from tilepipe.training.pairs import open_pairs
from tilepipe.training.samples import DataSet, Sample, read_manifest
from tilepipe.training.state import RunFolder
from tilepipe.training.statistics import statistics_of
from tilepipe.training.team import Team
from tilepipe.training.windows import Augmentation, UniformDraws

ENDLESS = 10**9
"""Windows, more than any measurement draws."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="segnet")
    parser.add_argument("--arg", action="append", default=[])
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0)
    return parser.parse_args()


def synthetic(folder: Path) -> DataSet:
    """Two scenes of 2048 x 2048 pixels on disk."""
    samples = []
    for seed in (1, 2):
        image, labels = write_scene(folder / str(seed), (2048, 2048), seed)
        samples.append(Sample(str(image), str(labels)))
    return DataSet(tuple(samples), tuple(ClassInfo(name, color) for name, color in CLASSES))


def rate(steps: Iterator[object], seconds: float, windows: int) -> float:
    """Windows a second, after three steps that do not count."""
    for _ in range(3):
        next(steps)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(steps)
        done += windows
    return done / (time.perf_counter() - began)


def trained(trainer: Trainer, batches: Iterator[Batch], synchronise: Callable[[], None]) -> Iterator[None]:
    """A step for each batch."""
    for batch in batches:
        trainer.step([batch])
        synchronise()
        yield


def main() -> None:
    chosen = parse()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory() as folder:
        data = read_manifest(chosen.data) if chosen.data else synthetic(Path(folder))
        classes = len(data.classes or ())
        pairs = open_pairs(data.of("train"))
        statistics = statistics_of(pairs, classes, data.void)
        augmentation = Augmentation((chosen.crop, chosen.crop), "d4", jitter=0.2)
        draws = UniformDraws(tuple(pair.shape for pair in pairs), augmentation, 0)
        dataset = WindowDataset(pairs, draws, augmentation, statistics, data.void)
        options = TrainOptions(
            model=chosen.model,
            arguments=arguments_of(chosen.arg),
            batch=chosen.batch,
            stages=(Stage("uniform", ENDLESS),),
        )
        network = make_network(options, classes, pairs[0].bands).network
        precision = "bf16" if device.type == "cuda" else "float32"
        trainer = Trainer(
            Run(network, classes, None, options, device, precision, RunFolder(folder), dataset, None, Team(), None)  # type: ignore[arg-type]
        )
        synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        batches = iter(loader(dataset, range(ENDLESS), chosen.batch, chosen.workers))
        first = next(batches)
        alone = rate(trained(trainer, cycle([first]), synchronise), chosen.seconds, chosen.batch)
        given = rate(batches, chosen.seconds, chosen.batch)
        both = rate(trained(trainer, batches, synchronise), chosen.seconds, chosen.batch)
    pixels = chosen.crop**2 / 1e6
    print(f"{device}, {chosen.model}, windows of {chosen.crop} x {chosen.crop}, {chosen.workers} workers")
    for name, found in (("input alone", given), ("network alone", alone), ("both", both)):
        print(f"{name:14s} {found:8.2f} windows/s {found * pixels:8.3f} Mpx/s")
    print(f"the network has {np.minimum(1.0, both / alone):.0%} of the pace that it has without the input")


if __name__ == "__main__":
    main()
