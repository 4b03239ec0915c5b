"""Train a network on CamVid's street scenes and score it as the SegNet paper does.

    python workflows/camvid.py DATA OUT                                        SegNet-Basic under the paper's protocol
    python workflows/camvid.py DATA OUT --network segnet --protocol modern     SegNet, trained as one would today
    python workflows/camvid.py DATA OUT --test test testannot                  another folder of images and labels, too

DATA holds `train` and `val`, folders of images, and `trainannot` and `valannot`, with a label map of the same name for
each: 0 Sky ... 10 Bicyclist, 11 void. The data (CC BY-NC 4.0) do not come with this project. OUT gets `run`, the
training run with the model that is best by mean IoU on `val`, the label map of each scored image under `labels`, and
scores.json. The same command goes on where it was stopped; once it is done it only labels and scores again, so that
`--test` can be added later.

Protocol "paper" is that of Table 1 in Badrinarayanan, Kendall and Cipolla, "SegNet" (arXiv 1511.00561, section 4):
SGD with momentum 0.9 at a constant rate of 0.1, batches of 12, weight decay 0.0005 and 10,000 steps as in the published
solver file, no augmentation. It differs in three points. Batches are drawn at random, where the paper shuffles before
each epoch; a window is the largest part of an image that the network takes without loss (352 x 480 of 360 x 480), at
random places; and each band is normalised by the mean and deviation of the training images, where the paper
equalises local contrast. Weights are random at first unless `--start` names a file of VGG16's (the paper's do).

Protocol "modern" has the same data and windows: AdamW with a one-cycle rate, mirrored images, pixels 0.75 to 1.5 times
as large, changes of colour, averaged weights, and extra classifiers on a SegNet's inner stages during training.

Every image is labelled in one pass. Scores are global accuracy G, class average C, mean IoU, and boundary F1 with a
tolerance of 0.75 % of the diagonal, the mean over images. The model is chosen on `val`: its scores there flatter it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tilepipe.checkpoint import ClassInfo, Model, load_model
from tilepipe.cli import show
from tilepipe.cli.training_progress import training_teller
from tilepipe.comparison.scores import Evaluation
from tilepipe.errors import InputError, TilepipeError
from tilepipe.evaluation import EvaluationOptions, evaluate
from tilepipe.machine import versions
from tilepipe.models import MODELS, build
from tilepipe.schedule import stop_on_signals
from tilepipe.trace import geometry_of
from tilepipe.training.options import Stage, TrainOptions
from tilepipe.training.pairs import Pair, open_pairs
from tilepipe.training.samples import IMAGE_SUFFIXES, DataSet, Sample, Split, read_manifest
from tilepipe.training.train import train
from tilepipe.variants.padded import Padded
from tilepipe.window import Window

CLASSES = (
    ClassInfo("Sky", (128, 128, 128)),
    ClassInfo("Building", (128, 0, 0)),
    ClassInfo("Pole", (192, 192, 128)),
    ClassInfo("Road", (128, 64, 128)),
    ClassInfo("Pavement", (60, 40, 222)),
    ClassInfo("Tree", (128, 128, 0)),
    ClassInfo("SignSymbol", (192, 128, 128)),
    ClassInfo("Fence", (64, 64, 128)),
    ClassInfo("Car", (64, 0, 128)),
    ClassInfo("Pedestrian", (64, 64, 0)),
    ClassInfo("Bicyclist", (0, 128, 192)),
)
NAMES = tuple(each.name for each in CLASSES)
VOID = 11

PROTOCOLS: dict[str, dict[str, Any]] = {
    "paper": {
        "optimiser": "sgd",
        "momentum": 0.9,
        "rate": 0.1,
        "weight_decay": 5e-4,
        "decay": "constant",
        "warmup": 0.0,
        "flips": "none",
        "jitter": 0.0,
    },
    "modern": {
        "optimiser": "adamw",
        "rate": 1e-3,
        "weight_decay": 1e-2,
        "decay": "onecycle",
        "warmup": 0.1,
        "flips": "horizontal",
        "scales": (0.75, 1.5),
        "jitter": 0.3,
        "average": 0.999,
    },
}
HINTS = 0.5
"""Weight of the extra classifiers' loss under the modern protocol."""
PUBLISHED = (
    ("SegNet paper, Table 1: SegNet-Basic, median-frequency", "test", 82.7, 62.0, 47.7, 35.78),
    ("SegNet paper, Table 1: SegNet-Basic, natural frequencies (none)", "test", 84.0, 54.6, 46.3, 36.67),
    ("SegNet paper, Table 3: SegNet, trained on 3,433 images", "test", 90.40, 71.20, 60.10, 46.84),
)
"""(what, split, G, C, mean IoU, boundary F1), in percent; Table 1's networks learnt from the same 367 images."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with train, trainannot, val and valannot")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the run, the label maps and scores.json")
    parser.add_argument("--network", choices=sorted(MODELS), default="segnet-basic", help="what is trained")
    parser.add_argument("--width", type=float, help="factor on the network's features; 1 by default")
    parser.add_argument("--start", metavar="FILE", help="weights to start from: VGG16's, or a model file")
    parser.add_argument("--class-weights", choices=("median-frequency", "none"), default="median-frequency")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), default="paper", help="how it is trained")
    parser.add_argument("--steps", type=int, default=10_000, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=12, help="windows of a step")
    parser.add_argument("--rate", type=float, help="highest learning rate; the protocol's by default")
    parser.add_argument("--every", type=int, default=250, help="validate and keep the state each so many steps")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the windows and their changes")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; a GPU where there is one")
    parser.add_argument("--precision", choices=("float32", "bf16", "fp16"), help="of training; bf16 on a GPU")
    parser.add_argument("--workers", type=int, default=2, help="processes that read and change windows")
    parser.add_argument("--threads", type=int, help="processor threads of the network")
    parser.add_argument("--overwrite", action="store_true", help="start anew where OUT holds another run")
    parser.add_argument("--test", nargs=2, type=Path, metavar=("IMAGES", "LABELS"), help="folders to score, too")
    return parser.parse_args(arguments)


# ---- data --------------------------------------------------------------------------------------------------------


def samples_of(images: Path, labels: Path, split: Split) -> tuple[Sample, ...]:
    """Each image of a folder with the label map of its name; InputError where one lacks its partner."""
    found, known = _files(images), _files(labels)
    alone = sorted(found.keys() ^ known.keys())
    if alone or not found:
        what = f"{alone[0]} is in one of them only" if alone else "they hold no image"
        raise InputError(f"{images} and {labels} do not go together: {what}; each image needs a label of its name")
    return tuple(Sample(str(found[name]), str(known[name]), split) for name in sorted(found))


def _files(folder: Path) -> dict[str, Path]:
    """Name without ending: path of each image in a folder."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; DATA needs train, trainannot, val and valannot")
    return {path.stem: path.resolve() for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}


def write_manifest(path: Path, samples: Sequence[Sample]) -> None:
    """A manifest that `tilepipe train` takes, too."""
    colors = [f"#{bytes(each.color).hex()}" for each in CLASSES]
    lines = [f"classes = {json.dumps(NAMES)}", f"colors = {json.dumps(colors)}", f"void = {VOID}"]
    for sample in samples:
        told = (f"{name} = {json.dumps(getattr(sample, name))}" for name in ("image", "label", "split"))
        lines += ["[[sample]]", *told]
    path.write_text("\n".join(lines) + "\n")


def data_set(data: Path, out: Path) -> DataSet:
    """CamVid as its folders split it, by a manifest in `out`."""
    samples = samples_of(data / "train", data / "trainannot", "train")
    out.mkdir(parents=True, exist_ok=True)
    write_manifest(out / "manifest.toml", samples + samples_of(data / "val", data / "valannot", "validation"))
    return read_manifest(out / "manifest.toml")


# ---- training ----------------------------------------------------------------------------------------------------


def train_options(asked: argparse.Namespace, shape: tuple[int, int]) -> TrainOptions:
    """How the network is trained on images of `shape`."""
    protocol = dict(PROTOCOLS[asked.protocol])
    if asked.rate is not None:
        protocol["rate"] = asked.rate
    if asked.protocol == "modern" and asked.network.startswith("segnet"):
        protocol["hints"] = HINTS
    arguments = {} if asked.width is None else {"width": asked.width}
    geometry = geometry_of(build(asked.network, classes=len(CLASSES), bands=3, **arguments), 3)
    rows, cols = (axis.sizes.nearest(side)[0] for axis, side in zip(geometry.axes, shape, strict=True))
    return TrainOptions(
        model=asked.network,
        arguments=arguments,
        start=asked.start,
        licence="trained on CamVid, CC BY-NC 4.0",
        stages=(Stage("uniform", asked.steps),),
        batch=asked.batch,
        crop=(rows, cols),
        class_weights=asked.class_weights,
        every=min(asked.every, asked.steps),
        seed=asked.seed,
        **{name: getattr(asked, name) for name in ("device", "precision", "workers", "threads")},
        **protocol,
    )


def trained(asked: argparse.Namespace) -> dict[str, Any]:
    """What is known of the finished training run in OUT, which is trained now unless it is there."""
    note = asked.out / "trained.json"
    names = ("network", "width", "start", "class_weights", "protocol", "steps", "batch", "rate", "every", "seed")
    wanted = {name: getattr(asked, name) for name in names}
    if note.exists() and not asked.overwrite:
        told: dict[str, Any] = json.loads(note.read_text())
        if told["asked"] == wanted:
            return told
    if asked.overwrite:
        note.unlink(missing_ok=True)
    data = data_set(asked.data, asked.out)
    options = train_options(asked, open_pairs(data.of("train")[:1])[0].shape)
    with stop_on_signals() as stop, training_teller(quiet=False, log_json=False) as tell:
        done = train(
            data, asked.out / "run", options, tell=tell, note=tell.note, stop=stop, overwrite=asked.overwrite
        )  # fmt: skip
    told = {
        "asked": wanted,
        "images": len(data.of("train")),
        "crop": list(options.crop),
        "hardware": hardware(options),
        "versions": versions(),
        **asdict(done),
    }
    note.write_text(json.dumps(told, indent=2) + "\n")
    return told


def hardware(options: TrainOptions) -> str:
    """What a run's network was computed on."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, {options.precision or 'bf16'}"
    threads = options.threads or torch.get_num_threads()
    return f"{show.count(threads, 'thread')} of {_processor()}"


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        facts = ""
    names = (line.partition(":")[2].strip() for line in facts.splitlines() if line.startswith("model name"))
    return next(names, platform.machine())


# ---- scores ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def label(model: Model, pairs: Sequence[Pair], folder: Path, device: str) -> list[Path]:
    """The label map of each image, a PNG of class numbers, made in one pass over the whole image in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    network = Padded(model.network).to(device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (model.card.mean, model.card.std))
    paths = []
    for pair in pairs:
        values = torch.from_numpy(pair.read(Window.whole(pair.shape)).values).to(device)
        found = network(((values - mean) / std)[None])[0].argmax(0)
        path = folder / f"{Path(pair.sample.image).stem}.png"
        Image.fromarray(found.byte().cpu().numpy()).save(path)
        paths.append(path)
    return paths


def score(model: Model, samples: Sequence[Sample], folder: Path, device: str) -> Evaluation:
    """The scores of a model's label maps, which go to `folder`."""
    pairs = open_pairs(samples)
    maps = label(model, pairs, folder, device)
    truth = [pair.sample.label for pair in pairs]
    return evaluate(maps, truth, EvaluationOptions(classes=NAMES, void=(VOID,)))


def percent(found: Evaluation) -> tuple[float, float, float, float]:
    """G, C, mean IoU and boundary F1."""
    scores = found.confusion.accuracy, found.confusion.mean_accuracy, found.confusion.mean_iou, found.boundary_f1
    return tuple(100 * value for value in scores)  # type: ignore[return-value]


def scores_text(run: dict[str, Any], found: dict[str, Evaluation]) -> str:
    """The scores beside the published ones, and how they came about."""
    asked = run["asked"]
    width = "" if asked["width"] is None else f" of width {asked['width']:g}"
    name = f"{asked['network']}{width}, {asked['class_weights']}, {asked['protocol']} protocol"
    own = [(name, f"{split}, {len(each.images)} images", *percent(each)) for split, each in found.items()]
    lines = [(what, split, *(f"{value:.2f}" for value in values)) for what, split, *values in (*own, *PUBLISHED)]
    classes = [
        (label_name, *(f"{100 * each.confusion.iou[number]:.2f}" for each in found.values()))
        for number, label_name in enumerate(NAMES)
    ]
    began = f" from step {run['resumed_from']} on" if run["resumed_from"] else ""
    windows = f"{asked['batch']} windows of {show.by(run['crop'])}"
    return "\n\n".join(
        [
            show.table(("percent", "split", "G", "C", "mIoU", "BF"), lines, right=range(2, 6)),
            show.table(("IoU, percent", *found), classes, right=range(1, len(found) + 1)),
            f"trained on {run['images']} images: {asked['steps']} steps of {windows}, {show.duration(run['seconds'])}"
            f"{began} on {run['hardware']};\nbest on validation at step {run['best_step']}: {run['model']}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse(arguments)
    splits = {"validation": samples_of(asked.data / "val", asked.data / "valannot", "validation")}
    if asked.test:
        images, labels = asked.test
        splits["test"] = samples_of(images, labels, "test")
    run = trained(asked)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    model = load_model(asked.out / "run" / "model.safetensors")
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    began = time.monotonic()
    found = {
        split: score(model, samples, asked.out / "labels" / split, device) for split, samples in splits.items()
    }  # fmt: skip
    run["parameters"] = sum(each.numel() for each in model.network.parameters())
    told = {**run, "scoring_seconds": time.monotonic() - began}
    told |= {split: each.to_json() for split, each in found.items()}
    (asked.out / "scores.json").write_text(json.dumps(told, indent=1) + "\n")
    print(scores_text(run, found))


if __name__ == "__main__":
    try:
        main()
    except TilepipeError as error:
        print(f"{os.path.basename(__file__)}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
