"""Train a small SegNet on synthetic scenes, which are made for it; this made the bundled `synthetic-landcover`.

    python workflows/train_synthetic.py OUT

OUT gets the scenes, the training run and synthetic-landcover.safetensors, a model file in half precision. Training
scenes have the seeds from 1,000,000 on, the scenes that it is validated on the seeds 1 to 4, so all others are unseen.
The same command goes on where it was stopped; the same arguments, libraries and processor give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import rasterio

from tilepipe.checkpoint import ClassInfo, load_model, save_model
from tilepipe.cli.training_progress import training_teller
from tilepipe.errors import TilepipeError
from tilepipe.scene.synthetic import CLASSES, write_scene
from tilepipe.schedule import stop_on_signals
from tilepipe.training.options import Stage, TrainOptions
from tilepipe.training.samples import DataSet, Sample, Split
from tilepipe.training.train import train

NAME = "synthetic-landcover"
TRAINING_SEEDS = 1_000_000
VALIDATION_SEEDS = (1, 2, 3, 4)
VALIDATION_SIDE = 1024


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the scenes, the run and the model file")
    parser.add_argument("--steps", type=int, default=1200, help="optimiser steps")
    parser.add_argument("--width", type=float, default=0.125, help="factor on SegNet's features")
    parser.add_argument("--scenes", type=int, default=120, help="number of training scenes")
    parser.add_argument("--side", type=int, default=640, help="sides of a training scene, in pixels")
    parser.add_argument("--crop", type=int, default=192, help="sides of a window")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--every", type=int, default=200, help="validate and keep the state each so many steps")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the windows")
    parser.add_argument("--threads", type=int, default=1, help="processor threads of the network")
    parser.add_argument("--workers", type=int, default=1, help="processes that read windows")
    return parser.parse_args(arguments)


def write_scenes(folder: Path, seeds: Sequence[int], side: int, split: Split) -> list[Sample]:
    """A sample for each seed; scenes that are there from an earlier call are taken as they are."""
    samples = []
    for seed in seeds:
        image, truth = folder / str(seed) / "image.tif", folder / str(seed) / "truth.tif"
        finished = folder / str(seed) / f"{side}.done"
        if not finished.exists():
            write_scene(folder / str(seed), (side, side), seed)
            finished.touch()
        samples.append(Sample(str(image.resolve()), str(truth.resolve()), split))
    return samples


def class_weights(samples: Sequence[Sample]) -> tuple[float, ...]:
    """The inverse square root of each class's share, so that roofs and roads count; their mean is 1.

    A class that no scene shows counts nothing.
    """
    counts = np.zeros(len(CLASSES))
    for sample in samples:
        with rasterio.open(sample.label) as labels:
            counts += np.bincount(labels.read(1).ravel(), minlength=len(CLASSES))
    weights = np.where(counts > 0, 1 / np.sqrt(np.maximum(counts, 1)), 0)
    return tuple((weights / weights.mean()).round(4).tolist())


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse(arguments)
    seeds = range(TRAINING_SEEDS, TRAINING_SEEDS + asked.scenes)
    training = write_scenes(asked.out / "scenes", seeds, asked.side, "train")
    judging = write_scenes(asked.out / "scenes", VALIDATION_SEEDS, VALIDATION_SIDE, "validation")
    data = DataSet((*training, *judging), tuple(ClassInfo(name, color) for name, color in CLASSES))
    options = TrainOptions(
        arguments={"width": asked.width},
        licence="MIT",
        stages=(Stage("uniform", asked.steps),),
        crop=(asked.crop, asked.crop),
        jitter=0.0,
        class_weights=class_weights(training),
        hints=1.0,
        device="cpu",
        **{name: getattr(asked, name) for name in ("batch", "rate", "every", "seed", "threads", "workers")},
    )
    with stop_on_signals() as stop, training_teller(quiet=False, log_json=False) as tell:
        done = train(data, asked.out / "run", options, tell=tell, note=tell.note, stop=stop)
    model = load_model(done.model)
    told = ("steps", "width", "scenes", "side", "crop", "batch", "rate", "every", "seed", "threads")
    words = " ".join(f"--{name} {getattr(asked, name)}" for name in told)
    provenance = {
        **model.card.provenance,
        "command": f"python workflows/train_synthetic.py OUT {words}",
        "data": f"scenes of tilepipe.scene, seeds {seeds[0]} to {seeds[-1]}",
        "evaluation": f"seeds {', '.join(map(str, VALIDATION_SEEDS))} of {VALIDATION_SIDE} x {VALIDATION_SIDE} pixels",
        "not for": "imagery of real places, which looks different",
    }
    path = asked.out / f"{NAME}.safetensors"
    save_model(path, model.network, replace(model.card, provenance=provenance), half=True)
    print(f"{path}: mean IoU {done.mean_iou:.4f} at step {done.best_step} of {done.steps}")


if __name__ == "__main__":
    try:
        main()
    except TilepipeError as error:
        print(f"train_synthetic.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
