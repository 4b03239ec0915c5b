"""`train` and `evaluate` as their users meet them: options, data, JSON, refusals, a run that is stopped and goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from commands import assert_one_line, run
from rasters import write

from tilepipe.checkpoint import load_model
from tilepipe.cli import app
from tilepipe.cli.train import (
    DataOptions,
    LearningOptions,
    NetworkChoice,
    TrainingMachine,
    WindowChoice,
    train_options,
)
from tilepipe.cli.training_progress import seconds_left, sentence
from tilepipe.errors import UsageError
from tilepipe.training.loop import Told
from tilepipe.training.options import Stage, TrainOptions
from tilepipe.training.samples import read_manifest

SHAPE = (90, 120)
SMALL = ("--model", "segnet-basic", "--arg", "width=0.1", "--crop", "32x48", "--batch", "2", "--workers", "0")
QUICK = (*SMALL, "--threads", "1", "--device", "cpu")
NAMES = ("--classes", "ground,hill", "--void", "9")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of bright hills on dark ground, their labels, and a manifest that validates on the last."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    rows, cols = np.ogrid[: SHAPE[0], : SHAPE[1]]
    lines = ['classes = ["ground", "hill"]', "void = 9"]
    for number in range(3):
        random = np.random.default_rng(number)
        labels = np.zeros(SHAPE, np.uint8)
        for row, col in zip(random.integers(0, SHAPE[0], 6), random.integers(0, SHAPE[1], 6), strict=True):
            labels[(rows - row) ** 2 + (cols - col) ** 2 < 150] = 1
        noisy = 80 + 60 * labels + random.normal(0, 25, (3, *SHAPE))
        labels[:, :3] = 9
        name = f"area{number}.tif"
        write(folder / "images" / name, noisy.clip(0, 255).astype(np.uint8), photometric="rgb")
        write(folder / "labels" / name, labels[None])
        split = "validation" if number == 2 else "train"
        lines += ["[[sample]]", f'image = "images/{name}"', f'label = "labels/{name}"', f'split = "{split}"']
    (folder / "data.toml").write_text("\n".join(lines) + "\n")
    return folder


# ---- options -----------------------------------------------------------------------------------------------------


def test_every_option_of_training_reaches_the_library() -> None:
    data = DataOptions(bands="3,1", input_bands="nir,red", licence="MIT")
    network = NetworkChoice(model="fcn8s", arg=["width=0.5", "padding=same"], start="vgg.pth")
    windows = WindowChoice(
        crop="64x96",
        batch=3,
        accumulate=2,
        flips="horizontal",
        rotate=15.0,
        scales="0.5,2",
        jitter=0.4,
        stage=["objects=5", "candidates = 7"],
    )
    learning = LearningOptions(
        rate=0.1,
        optimiser="sgd",
        momentum=0.8,
        weight_decay=0.3,
        decay="polynomial",
        power=2.0,
        warmup=0.2,
        clip=1.5,
        average=0.9,
        class_weights="1,2.5",
        hints=0.7,
        keep="last",
        every=11,
        seed=4,
    )
    machine = TrainingMachine(precision="bf16", device="cpu", workers=5, threads=6, overwrite=True, dry_run=True)
    chosen = train_options(data, network, windows, learning, machine)
    assert chosen == TrainOptions(
        model="fcn8s",
        arguments={"width": 0.5, "padding": "same"},
        start="vgg.pth",
        bands=(3, 1),
        input_bands=("nir", "red"),
        licence="MIT",
        stages=(Stage("objects", 5), Stage("candidates", 7)),
        batch=3,
        accumulate=2,
        crop=(64, 96),
        flips="horizontal",
        rotate=15.0,
        scales=(0.5, 2.0),
        jitter=0.4,
        class_weights=(1.0, 2.5),
        hints=0.7,
        optimiser="sgd",
        rate=0.1,
        momentum=0.8,
        weight_decay=0.3,
        decay="polynomial",
        power=2.0,
        warmup=0.2,
        clip=1.5,
        average=0.9,
        keep="last",
        precision="bf16",
        device="cpu",
        workers=5,
        threads=6,
        every=11,
        seed=4,
    )
    default = TrainOptions()
    assert all(getattr(chosen, each.name) != getattr(default, each.name) for each in fields(default)), "all are told"


def test_defaults_are_the_librarys() -> None:
    groups = DataOptions(), NetworkChoice(), WindowChoice(), LearningOptions(), TrainingMachine()
    assert train_options(*groups) == TrainOptions()
    chosen = train_options(*groups[:3], LearningOptions(steps=7), groups[4])
    assert chosen.stages == (Stage("uniform", 7),)


def test_help_lists_the_options() -> None:
    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    flags = {flag for parameter in command.params for flag in parameter.opts}
    promised = """--classes --void --validation --bands --input-bands --licence --model --arg --start --crop --batch
        --accumulate --flips --rotate --scales --jitter --stage --steps --rate --optimiser --momentum --weight-decay
        --decay --power --warmup --clip --average --class-weights --hints --every --seed --precision --device --workers
        --threads --overwrite --dry-run --config --quiet --verbose --json --log-json"""
    assert set(promised.split()) <= flags
    assert "MANIFEST|IMAGES LABELS RUN" in run("train", "--help").output


# ---- data --------------------------------------------------------------------------------------------------------


def test_the_data_are_a_manifest_or_two_folders(files: Path) -> None:
    manifest = str(files / "data.toml")
    assert DataOptions().read([manifest], 0) == read_manifest(manifest)
    told = DataOptions(classes="a,b", void="7,8").read([manifest], 0)
    assert [each.name for each in told.classes or ()] == ["a", "b"]
    assert told.void == (7, 8)
    folders = [str(files / "images"), str(files / "labels")]
    paired = DataOptions(classes="3", validation=0.6).read(folders, 5)
    assert [len(paired.of(split)) for split in ("train", "validation")] == [1, 2]
    assert [each.name for each in paired.classes or ()] == ["class0", "class1", "class2"]
    drawn = {DataOptions().read(folders, seed).of("validation")[0].image for seed in range(9)}
    assert len(drawn) == 3, "the seed decides which"


def test_a_dry_run_tells_what_would_be_learnt(files: Path, tmp_path: Path) -> None:
    words = ("train", files / "data.toml", tmp_path / "run", *QUICK, "--stage", "objects=4", "--dry-run")
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [(each["split"], each["images"], each["largest"]) for each in told["samples"]] == [
        ("train", 2, [90, 120]),
        ("validation", 1, [90, 120]),
    ]
    shares = [each["share"] for each in told["classes"]]
    assert sum(shares) == pytest.approx(1)
    assert told["classes"][0]["weight"] / told["classes"][1]["weight"] == pytest.approx(shares[1] / shares[0])
    assert told["unlabelled"] == 2 * 3 * SHAPE[0]
    assert told["objects"] >= 2
    assert (told["network"]["rows"], told["crop"], told["steps"]) == ("16n", [32, 48], 4)
    assert told["passes"] == pytest.approx(4 * 2 * 32 * 48 / (2 * 90 * 120))
    text = run(*words).stdout
    for said in ("2 images of 90 x 120", "ground", f"{100 * shares[0]:.2f} %", "legal are rows 16n", "4 of windows"):
        assert said in text
    assert f"{told['network']['parameters']:,} parameters" in text
    assert not (tmp_path / "run").exists()


# ---- runs --------------------------------------------------------------------------------------------------------


def test_folders_are_learnt_from_and_the_result_is_told(files: Path, tmp_path: Path) -> None:
    words = ("train", files / "images", files / "labels", tmp_path / "run", *QUICK, *NAMES, "--steps", "3")
    text = run(*words, "-q")
    assert text.exit_code == 0, text.output
    assert text.stderr == ""
    for said in ("model.safetensors", "mean IoU", "at step 3 of 3", "hill"):
        assert said in text.stdout
    result = run(*words, "--json", "--log-json")
    told = json.loads(result.stdout)
    assert set(told) == {"model", "mean_iou", "iou", "best_step", "steps", "seconds", "resumed_from"}
    assert (told["resumed_from"], told["steps"], set(told["iou"])) == (3, 3, {"ground", "hill"})
    card = load_model(told["model"]).card
    assert [each.name for each in card.classes] == ["ground", "hill"]
    assert card.provenance["mean_iou"] == pytest.approx(told["mean_iou"], abs=1e-4)


def test_the_last_network_is_kept_without_validation(files: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "train.csv"
    manifest.write_text(f"image,label\n{files / 'images' / 'area0.tif'},{files / 'labels' / 'area0.tif'}\n")
    words = ("train", manifest, tmp_path / "run", *QUICK, *NAMES, "--steps", "3")
    refused = run(*words)
    assert refused.exit_code == 2
    assert "--keep last" in refused.stderr
    words = (*words, "--keep", "last")
    assert "validation" not in run(*words, "--dry-run").stdout
    text = run(*words, "-q")
    assert "mean IoU  none, no image is for validation" in text.stdout
    told = json.loads(run(*words, "--json").stdout)
    assert (told["mean_iou"], told["best_step"], told["iou"]) == (None, 3, {"ground": None, "hill": None})


def test_progress_is_told_in_lines_or_as_json(files: Path, tmp_path: Path) -> None:
    words = ("train", files / "data.toml", tmp_path / "run", *QUICK, "--steps", "2", "--every", "1")
    assert "tilepipe: step 2 of 2, loss" in run(*words).stderr
    events = [json.loads(line) for line in run(*words, "--overwrite", "--log-json").stderr.splitlines()]
    last = [event for event in events if event["event"] == "training"][-1]
    assert (last["step"], last["steps"], last["seconds_left"]) == (2, 2, 0)


def test_a_run_says_how_long_it_still_takes() -> None:
    told = Told(step=60, steps=100, loss=0.5, rate=0.1, done=10, windows=80, seconds=20.0, best=0.25)
    assert seconds_left(told) == 80
    assert sentence(told) == "step 60 of 100, loss 0.5000, mean IoU 0.2500, 4.0 windows/s, 1 min 20 s left"
    new = told._replace(done=0, seconds=0.0, best=-1.0)
    assert (seconds_left(new), sentence(new)) == (None, "step 60 of 100, loss 0.5000")


def test_a_config_file_sets_options(files: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        'model = "segnet-basic"\narg = ["width=0.1"]\ncrop = [32, 48]\nclasses = ["low", "high"]\nvoid = 9\n'
        'stage = ["objects=2", "candidates=1"]\nscales = [0.5, 2]\ndry-run = true\ndevice = "cpu"\n'
    )
    result = run("train", files / "images", files / "labels", tmp_path / "run", "--config", config, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [each["name"] for each in told["classes"]] == ["low", "high"]
    assert told["stages"] == [{"kind": "objects", "steps": 2}, {"kind": "candidates", "steps": 1}]
    assert (told["crop"], told["network"]["arguments"]["width"]) == ([32, 48], 0.1)
    config.write_text("cropp = 3\n")
    assert_one_line(run("train", files / "data.toml", tmp_path / "run", "--config", config), 2, "cropp", "'crop'")


def test_a_jobs_stage_in_the_environment_is_not_a_trainings(files: Path, tmp_path: Path) -> None:
    words = ("train", files / "data.toml", tmp_path / "run", *QUICK, "--dry-run", "--json")
    found = run(*words, env={"TILEPIPE_STAGE": "never", "TILEPIPE_TRAINING_STAGE": "candidates=3"})
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["stages"] == [{"kind": "candidates", "steps": 3}]


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_its_model_scores_as_it_said(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    learning = ("--every", "12", "--rate", "0.005", "--class-weights", "none", "--jitter", "0")
    words = [str(word) for word in ("train", files / "data.toml", folder, *QUICK, *learning, "--steps", "60")]
    process = subprocess.Popen([sys.executable, "-m", "tilepipe", *words], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (folder / "state.pt").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert said.splitlines()[-1].startswith("tilepipe: stopped at step ")
    assert "the same command goes on" in said
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert 0 < told["resumed_from"] < 60
    assert f"note: {folder} goes on from step {told['resumed_from']} of 60" in result.stderr
    assert told["mean_iou"] > 0.55
    labels, store = files / "labels" / "area2.tif", tmp_path / "labels.zarr"
    segmented = run("segment", files / "images" / "area2.tif", store, "--model", told["model"], "--device", "cpu", "-q")
    assert segmented.exit_code == 0, segmented.output
    scored = json.loads(run("evaluate", store, labels, "--void", "9", "--json", "-q").stdout)
    assert scored["mean_iou"] == pytest.approx(told["mean_iou"], abs=1e-3)
    assert {row["name"]: row["iou"] for row in scored["classes"]} == pytest.approx(told["iou"], abs=1e-3)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (("M",), 2, "one path was given"),
        (("a", "b", "c", "d"), 2, "4 paths were given; write MANIFEST RUN, or IMAGES LABELS RUN"),
        (("M", "R", "--optimiser", "lion"), 2, "optimiser is 'lion'; legal are adamw, sgd"),
        (("M", "R", "--stage", "objects"), 2, "stage 'objects' is not legal; write KIND=STEPS"),
        (("M", "R", "--stage", "things=3"), 2, "stage 'things' is unknown; legal are uniform, objects, candidates"),
        (("M", "R", "--stage", "objects=3", "--steps", "9"), 2, "--steps 9 and --stage objects=3 were both given"),
        (("M", "R", "--steps", "0"), 2, "steps of a stage is 0"),
        (("nowhere.toml", "R"), 3, "nowhere.toml cannot be read as a manifest"),
        (("I", "nowhere", "R"), 3, "nowhere is no folder"),
        (("I", "L", "R"), 2, "name them with --classes"),
        (("I", "L", "R", "--classes", "ground,hill"), 3, "give --void 9"),
        (("I", "L", "R", "--classes", "hill,hill"), 2, "name each once"),
        (("I", "L", "R", "--classes", "0"), 2, "name each once"),
        (("M", "R", "--void", "nine"), 2, "void 'nine' is not understood"),
        (("M", "R", "--validation", "0.3"), 2, "a manifest says itself"),
        (("I", "L", "R", "--validation", "1"), 2, "validation share of 1.0"),
        (("M", "R", "--crop", "32x50"), 3, "a crop of 50 columns is no legal size of the network (16n); take 64"),
        (("M", "R", "--crop", "big"), 2, "crop 'big' is not understood"),
        (("M", "R", "--scales", "2"), 2, "scales '2' are not legal; write two numbers"),
        (("M", "R", "--class-weights", "median"), 2, "write none, median-frequency, or numbers"),
        (("M", "R", "--class-weights", "1,2,3"), 2, "give 2 numbers"),
        (("M", "R", "--bands", "1,9"), 2, "band 9 is not in"),
        (("M", "R", "--device", "tpu"), 2, "device 'tpu' is not known; legal are cpu, cuda and cuda:N"),
        (("M", "R", "--precision", "int8"), 2, "precision is 'int8'; legal are float32, bf16, fp16"),
        (("M", "R", "--hints", "1", "--model", "linear"), 3, "no stages for hints"),
        (("M", "R", "--start", "nowhere.pth"), 3, "nowhere.pth: no such file"),
        (("M", "R", "--no-such-option"), 2, "--no-such-option"),
    ],
)
def test_mistakes_are_one_line(files: Path, tmp_path: Path, words: tuple[str, ...], exit_code: int, said: str) -> None:
    places = {"M": files / "data.toml", "I": files / "images", "L": files / "labels", "R": tmp_path / "run"}
    given: list[Any] = [places.get(word, word) for word in words]
    defaults = [] if "linear" in words else ["--model", "segnet-basic", "--arg", "width=0.1"]
    given += [*defaults, *(() if "--crop" in words else ("--crop", "32x48"))]
    assert_one_line(run("train", *given), exit_code, said)
    assert not (tmp_path / "run" / "state.pt").exists()


def test_a_dry_run_refuses_what_a_run_does(files: Path, tmp_path: Path) -> None:
    words = ("train", files / "data.toml", tmp_path / "run", "--dry-run")
    assert_one_line(run(*words, "--crop", "250"), 3, "take 256")
    assert_one_line(run(*words, *QUICK, "--class-weights", "1"), 2, "give 2 numbers")
    with pytest.raises(UsageError, match="classes 'a,a'"):
        DataOptions(classes="a,a").read([str(files / "data.toml")], 0)


def test_evaluating_what_is_not_there_is_one_line(files: Path, tmp_path: Path) -> None:
    result = run("evaluate", tmp_path / "none.zarr", files / "labels" / "area2.tif")
    assert_one_line(result, 3, "none.zarr")
