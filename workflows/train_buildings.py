"""Train a SegNet of reduced width to find buildings in drone and aerial images; this made the bundled `buildings`.

    python workflows/train_buildings.py DATA OUT --hold area3     to judge it: learns from all areas but one
    python workflows/train_buildings.py DATA OUT                  the model: learns from all areas

DATA holds mosaics NAME_rgb.tif (red, green, blue) and their labels NAME_label.tif (0 background, 1 building, 255 void)
on the same grids; the first word of a name, up to `_`, is its area. With --hold, OUT gets `hold-AREA`: the run, and
scores.json with the scores on the area that was held out, at its own pixels and at pixels two and four times as large.
Without, it gets `all`, the run, and buildings.safetensors, a model file in half precision
whose card tells the scores of all held-out areas that are in OUT. The same command goes on where it was stopped.

Windows' pixels are 1 to 4 times as large as the mosaics', so that one network serves images of that range.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import rasterio
import torch
from rasterio.enums import Resampling

from tilepipe.checkpoint import ClassInfo, Model, load_model, save_model
from tilepipe.cli import show
from tilepipe.cli.training_progress import training_teller
from tilepipe.errors import InputError, TilepipeError
from tilepipe.metrics import Confusion
from tilepipe.options import SegmentOptions
from tilepipe.schedule import stop_on_signals
from tilepipe.training.options import Stage, TrainOptions
from tilepipe.training.pairs import open_pairs
from tilepipe.training.samples import DataSet, Sample
from tilepipe.training.train import Outcome, train
from tilepipe.training.validation import Validation

CLASSES = (ClassInfo("background", (180, 180, 160)), ClassInfo("building", (210, 40, 30)))
VOID = 255
WEIGHTS = (1.0, 1.5)
"""Of the classes in the loss."""
SHIFT = 0.85
"""Added to the score of buildings once the network is trained, so that a probability of 0.3 suffices.

In an area that it has not seen it is too careful (precision 0.97, recall 0.42 in area 4); where it has, little changes.
"""
FACTORS = (1, 2, 4)
"""How many times as large as the mosaics' the pixels are at which a held-out area is scored."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of mosaics and their labels")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the runs, the scores and the model file")
    parser.add_argument("--hold", metavar="AREA", help="the area to judge by instead of learning from it")
    parser.add_argument("--start", metavar="FILE", help="weights to start from")
    parser.add_argument("--width", type=float, default=0.25, help="factor on SegNet's features")
    parser.add_argument("--steps", type=int, default=1800, help="optimiser steps")
    parser.add_argument("--crop", type=int, default=256, help="sides of a window")
    parser.add_argument("--batch", type=int, default=6, help="windows of a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--every", type=int, default=200, help="validate and keep the state each so many steps")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the windows and their changes")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; a GPU where there is one")
    parser.add_argument("--threads", type=int, help="processor threads of the network")
    parser.add_argument("--workers", type=int, default=1, help="processes that read and change windows")
    return parser.parse_args(arguments)


def data_set(folder: Path, hold: str | None) -> DataSet:
    """All mosaics to learn from, but for those of an area that is held out."""
    samples = []
    for image in sorted(folder.glob("*_rgb.tif")):
        name = image.stem.removesuffix("_rgb")
        label = image.with_name(f"{name}_label.tif")
        if not label.exists():
            raise InputError(f"{image} has no labels; they are expected in {label}")
        held = name.partition("_")[0] == hold
        samples.append(Sample(str(image.resolve()), str(label.resolve()), "validation" if held else "train"))
    if not samples:
        raise InputError(f"{folder} has no file NAME_rgb.tif")
    data = DataSet(tuple(samples), CLASSES, (VOID,))
    if hold is not None and not data.of("validation"):
        areas = sorted({Path(sample.image).stem.partition("_")[0] for sample in samples})
        raise InputError(f"area {hold} is not in {folder}; it has {', '.join(areas)}")
    return data


def train_options(asked: argparse.Namespace) -> TrainOptions:
    """How the network is trained."""
    return TrainOptions(
        arguments={"width": asked.width},
        start=asked.start,
        licence="MIT; trained on images under CC BY 4.0 (OpenAerialMap) and labels under ODbL (OpenStreetMap)",
        stages=(Stage("uniform", asked.steps),),
        crop=(asked.crop, asked.crop),
        scales=(float(FACTORS[0]), float(FACTORS[-1])),
        jitter=0.6,
        class_weights=WEIGHTS,
        hints=0.5,
        average=0.99,
        keep="last",
        **{name: getattr(asked, name) for name in ("batch", "rate", "every", "seed", "device", "threads", "workers")},
    )


# ---- scores ------------------------------------------------------------------------------------------------------


def coarser(sample: Sample, factor: int, folder: Path) -> Sample:
    """A sample with pixels so many times as large, in files of their own: means of colours, commonest labels."""
    image = _coarser(Path(sample.image), factor, folder, Resampling.average)
    label = _coarser(Path(sample.label), factor, folder, Resampling.mode)
    return Sample(str(image), str(label), sample.split)


def _coarser(path: Path, factor: int, folder: Path, resampling: Resampling) -> Path:
    target = folder / f"{path.stem}_{factor}.tif"
    with rasterio.open(path) as source:
        rows, cols = source.height // factor, source.width // factor
        values = source.read(out_shape=(source.count, rows, cols), resampling=resampling)
        transform = source.transform * source.transform.scale(source.width / cols, source.height / rows)
        profile = {"crs": source.crs, "transform": transform, "dtype": values.dtype, "count": source.count}
    with rasterio.open(target, "w", driver="GTiff", height=rows, width=cols, compress="deflate", **profile) as out:
        out.write(values)
    return target


def scores_of(model: Model, samples: Sequence[Sample], folder: Path, options: SegmentOptions) -> dict[int, Confusion]:
    """The confusion matrix of the held-out samples for each of FACTORS."""
    folder.mkdir(exist_ok=True)
    found = {}
    for factor in FACTORS:
        judged = samples if factor == 1 else [coarser(sample, factor, folder) for sample in samples]
        found[factor] = Validation(open_pairs(judged), model.card, (VOID,), options)(model.network)
    return found


def scores_text(area: str, scores: dict[str, Any]) -> str:
    """The scores of a held-out area as a table."""
    names = ["mean", *(each.name for each in CLASSES)]
    rows = [(f"{factor}x", *(f"{found[name]:.4f}" for name in names)) for factor, found in scores["iou"].items()]
    return show.table((f"IoU of {area}, pixels", *names), rows, right=range(1, len(names) + 1))


def shifted(model: Model) -> Model:
    """The model with SHIFT added to the score of buildings."""
    with torch.no_grad():
        model.network.classifier.bias[1] += SHIFT  # type: ignore[union-attr, index, operator]
    return model


def write_scores(asked: argparse.Namespace, data: DataSet, done: Outcome, folder: Path) -> None:
    """Scores the held-out area; prints them and leaves them in scores.json."""
    options = SegmentOptions(device=asked.device, precision="float32", threads=asked.threads)
    found = scores_of(shifted(load_model(done.model)), data.of("validation"), folder / "coarser", options)
    iou = {
        str(factor): {"mean": scores.mean_iou, **dict(zip((c.name for c in CLASSES), scores.iou.tolist(), strict=True))}
        for factor, scores in found.items()
    }
    told = {"area": asked.hold, "iou": iou, "steps": done.steps, "width": asked.width}
    (folder / "scores.json").write_text(json.dumps(told, indent=1) + "\n")
    print(scores_text(asked.hold, told))


def write_model(asked: argparse.Namespace, data: DataSet, done: Outcome) -> None:
    """Leaves the model file in OUT."""
    model = shifted(load_model(done.model))
    named = ("width", "steps", "crop", "batch", "rate", "seed")
    told = [json.loads(path.read_text()) for path in sorted(asked.out.glob("hold-*/scores.json"))]
    provenance = {
        **model.card.provenance,
        "command": "python workflows/train_buildings.py DATA OUT "
        + " ".join(f"--{name} {getattr(asked, name)}" for name in named),
        "data": f"{len(data.samples)} drone mosaics of four countries from OpenAerialMap, labels from OpenStreetMap",
        "held out": {each["area"]: _rounded(each) for each in told},
        "not for": "decisions about people or property without a look at the image; roofs, ground or light unlike "
        "those it learnt from are labelled wrong",
    }
    path = asked.out / "buildings.safetensors"
    save_model(path, model.network, replace(model.card, provenance=provenance), half=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


def _rounded(scores: dict[str, Any]) -> dict[str, Any]:
    """A run of its own's mean IoU and building's at each size of pixels."""
    iou = {
        f"{factor}x": [round(found[name], 3) for name in ("mean", "building")]
        for factor, found in scores["iou"].items()
    }
    return {"steps": scores["steps"], "mean and building IoU": iou}


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse(arguments)
    data = data_set(asked.data, asked.hold)
    folder = asked.out / (f"hold-{asked.hold}" if asked.hold else "all")
    began = time.monotonic()
    with stop_on_signals() as stop, training_teller(quiet=False, log_json=False) as tell:
        done = train(data, folder / "run", train_options(asked), tell=tell, note=tell.note, stop=stop)
    print(f"{done.steps} steps, {show.duration(time.monotonic() - began)}")
    if asked.hold:
        write_scores(asked, data, done, folder)
    else:
        write_model(asked, data, done)


if __name__ == "__main__":
    try:
        main()
    except TilepipeError as error:
        print(f"train_buildings.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
