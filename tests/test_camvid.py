"""The CamVid workflow from end to end on small images in CamVid's layout: its protocols, label maps and scores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import camvid
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from tilepipe.checkpoint import load_model
from tilepipe.errors import StoppedError, TilepipeError
from tilepipe.training.options import Stage, TrainOptions
from tilepipe.variants.padded import Padded

SHAPE = (72, 100)
STEPS = 6
SMALL = ("--width", "0.1", "--steps", str(STEPS), "--batch", "2", "--every", "3", "--workers", "0", "--device", "cpu")


def write_street(images: Path, labels: Path, count: int, seed: int) -> None:
    """Images of rectangles, each class with its own colour, and their label maps."""
    random = np.random.default_rng(seed)
    colors = np.array([each.color for each in camvid.CLASSES] + [(0, 0, 0)])
    for folder in (images, labels):
        folder.mkdir(parents=True)
    for number in range(count):
        classes = np.zeros(SHAPE, np.uint8)
        for kind in random.permutation(12):
            row, col = random.integers(0, 60), random.integers(0, 90)
            classes[row : row + 24, col : col + 30] = kind
        noisy = colors[classes] + random.normal(0, 10, (*SHAPE, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(images / f"street{number}.png")
        Image.fromarray(classes).save(labels / f"street{number}.png")


def run(data: Path, out: Path, *words: str) -> dict[str, Any]:
    """What scores.json says after the workflow ran."""
    camvid.main([str(data), str(out), *SMALL, "--threads", str(torch.get_num_threads()), *words])
    return json.loads((out / "scores.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images to train on, two for validation, two for a test."""
    folder = tmp_path_factory.mktemp("camvid")
    for seed, (name, count) in enumerate({"train": 4, "val": 2, "test": 2}.items()):
        write_street(folder / name, folder / f"{name}annot", count, seed)
    return folder


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the workflow leaves."""
    folder = tmp_path_factory.mktemp("out") / "basic"
    run(data, folder)
    return folder


def assert_scores(told: dict[str, Any], truth: list[Path], maps: list[Path]) -> None:
    """G, C and mean IoU are those of the label maps by scikit-learn's confusion matrix."""
    real, found = (np.concatenate([np.asarray(Image.open(path)).ravel() for path in paths]) for paths in (truth, maps))
    counts = confusion_matrix(real[real != 11], found[real != 11], labels=range(11))
    hits, of_truth, of_map = np.diag(counts), counts.sum(1), counts.sum(0)
    assert told["confusion"] == counts.tolist()
    assert told["accuracy"] == pytest.approx(hits.sum() / counts.sum())
    assert told["mean_accuracy"] == pytest.approx(np.mean(hits[of_truth > 0] / of_truth[of_truth > 0]))
    union = of_truth + of_map - hits
    assert told["mean_iou"] == pytest.approx(np.mean(hits[union > 0] / union[union > 0]))


def test_the_best_model_labels_and_scores_whole_images(data: Path, out: Path) -> None:
    told = json.loads((out / "scores.json").read_text())
    maps = sorted((out / "labels" / "validation").iterdir())
    assert [path.name for path in maps] == ["street0.png", "street1.png"]
    assert_scores(told["validation"], sorted((data / "valannot").iterdir()), maps)
    model = load_model(out / "run" / "model.safetensors")
    mean, std = (np.array(values, np.float32) for values in (model.card.mean, model.card.std))
    for path in maps:
        image = (np.asarray(Image.open(data / "val" / path.name)) - mean) / std
        with torch.inference_mode():
            scores = Padded(model.network)(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
        assert np.array_equal(np.asarray(Image.open(path)), scores.argmax(0))
    assert told["validation"]["mean_iou"] == pytest.approx(told["mean_iou"], abs=1e-3)
    tolerances = {image["tolerance"] for image in told["validation"]["images"]}
    assert list(tolerances) == [pytest.approx(0.0075 * np.hypot(*SHAPE))]
    means = [image["boundary_f1"] for image in told["validation"]["images"]]
    assert told["validation"]["boundary_f1"] == pytest.approx(np.mean(means))


def test_a_finished_run_scores_other_images_without_training(data: Path, out: Path, capsys) -> None:
    before = (out / "run" / "state.pt").stat().st_mtime_ns
    told = run(data, out, "--test", str(data / "test"), str(data / "testannot"))
    assert (out / "run" / "state.pt").stat().st_mtime_ns == before
    assert_scores(told["test"], sorted((data / "testannot").iterdir()), sorted((out / "labels" / "test").iterdir()))
    printed = capsys.readouterr().out
    for said in ("82.70  62.00  47.70  35.78", "84.00  54.60  46.30  36.67", "test, 2 images", "validation, 2 images"):
        assert said in printed
    assert f"{100 * told['test']['mean_iou']:.2f}" in printed
    assert f"{STEPS} steps of 2 windows of 64 x 96" in printed
    (out / "trained.json").unlink()
    assert run(data, out)["resumed_from"] == STEPS, "the run itself is found again"


def test_other_settings_are_another_run(data: Path, out: Path) -> None:
    with pytest.raises(TilepipeError, match="class_weights was 'median-frequency', is 'none'"):
        run(data, out, "--class-weights", "none")


def test_a_run_that_is_begun_anew_counts_as_done_only_at_its_end(data: Path, out: Path, monkeypatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise StoppedError("stopped", 75)

    run(data, out)
    monkeypatch.setattr(camvid, "train", stopped)
    for words in (("--overwrite",), ()):
        with pytest.raises(StoppedError):
            run(data, out, *words)


def test_the_modern_protocol_trains_segnet(data: Path, tmp_path: Path) -> None:
    told = run(data, tmp_path / "out", "--network", "segnet", "--protocol", "modern", "--class-weights", "none")
    assert 0 < told["validation"]["mean_iou"] < 1
    settings = json.loads((tmp_path / "out" / "run" / "settings.json").read_text())
    asked = {name: settings[name] for name in ("optimiser", "decay", "flips", "scales", "jitter", "crop", "hints")}
    assert asked == {
        "optimiser": "adamw",
        "decay": "onecycle",
        "flips": "horizontal",
        "scales": [0.75, 1.5],
        "jitter": 0.3,
        "crop": [64, 96],
        "hints": 0.5,
    }


@pytest.mark.parametrize("network", ["segnet-basic", "segnet"])
def test_the_paper_protocol_is_the_papers(network: str) -> None:
    asked = camvid.parse(["data", "out", "--network", network, "--width", "0.1"])
    expected = TrainOptions(
        model=network,
        arguments={"width": 0.1},
        licence="trained on CamVid, CC BY-NC 4.0",
        stages=(Stage("uniform", 10_000),),
        batch=12,
        crop=(352, 480),
        flips="none",
        jitter=0.0,
        optimiser="sgd",
        rate=0.1,
        weight_decay=5e-4,
        decay="constant",
        warmup=0.0,
        every=250,
    )
    assert camvid.train_options(asked, (360, 480)) == expected


def test_images_without_labels_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TilepipeError, match="no folder"):
        camvid.samples_of(data / "train", data / "nowhere", "train")
    with pytest.raises(TilepipeError, match="street2 is in one of them only"):
        camvid.samples_of(data / "train", data / "testannot", "train")
    with pytest.raises(TilepipeError, match="no image"):
        camvid.samples_of(tmp_path, tmp_path, "train")


def test_the_data_are_split_as_published() -> None:
    place = os.environ.get("TILEPIPE_TEST_DATA")
    if not place:
        pytest.skip("set TILEPIPE_TEST_DATA to a folder that holds camvid/")
    folder = Path(place) / "camvid"
    counts = [len(camvid.samples_of(folder / name, folder / f"{name}annot", "train")) for name in ("train", "val")]
    assert counts == [367, 101]
