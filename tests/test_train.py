"""Training: it learns, equal arguments give equal weights, and a run that was stopped ends as an undisturbed one."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import safetensors.torch
import torch
from commands import run
from numpy.typing import NDArray
from torch import nn

from tilepipe.checkpoint import ClassInfo, load_model
from tilepipe.errors import RunError, StoppedError, TilepipeError
from tilepipe.loading.reference import ModelReference
from tilepipe.metrics import Confusion
from tilepipe.schedule import Stop
from tilepipe.training.loop import Told
from tilepipe.training.network import make_network
from tilepipe.training.options import Stage, TrainOptions
from tilepipe.training.samples import DataSet, Sample
from tilepipe.training.state import RunFolder
from tilepipe.training.train import train
from tilepipe.variants.padded import Padded

CLASSES = (ClassInfo("ground", (0, 0, 0)), ClassInfo("disc", (255, 0, 0)), ClassInfo("bar", (0, 255, 0)))
SMALL = TrainOptions(
    model="segnet-basic",
    arguments={"width": 0.1},
    stages=(Stage("uniform", 12),),
    batch=2,
    crop=(32, 48),
    every=4,
    workers=0,
    threads=1,
    device="cpu",
)


def scene(shape: tuple[int, int], seed: int, edge: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image and its labels: discs and bars on noisy ground; bars have the ground's own brightness, not its hue."""
    rng = np.random.default_rng(seed)
    rows, cols = np.ogrid[: shape[0], : shape[1]]
    labels = np.zeros(shape, np.uint8)
    for _ in range(max(2, shape[0] * shape[1] // 600)):
        row, col = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        if rng.random() < 0.5:
            labels[(rows - row) ** 2 + (cols - col) ** 2 < 36] = 1
        else:
            labels[row : row + 5, col : col + 18] = 2
    colours = np.array([[110, 110, 110], [170, 120, 90], [80, 120, 130]])
    image = colours[labels].transpose(2, 0, 1) + rng.normal(0, 12, (3, *shape))
    labels[:2] = edge
    return image.clip(0, 255).astype(np.uint8), labels


def data_of(folder: Path, shape: tuple[int, int] = (96, 128), count: int = 2, edge: int = 255) -> DataSet:
    """Samples on disk, the last of which is for validation."""
    samples = []
    for number in range(count + 1):
        image, labels = scene(shape, number, edge)
        paths = [str(folder / f"{number}_{kind}.tif") for kind in ("image", "label")]
        for path, values in zip(paths, (image, labels[None]), strict=True):
            with rasterio.open(
                path, "w", driver="GTiff", width=shape[1], height=shape[0], count=len(values), dtype="uint8"
            ) as out:
                out.write(values)
        samples.append(Sample(*paths, "validation" if number == count else "train"))
    return DataSet(tuple(samples), CLASSES, (255,))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return data_of(tmp_path_factory.mktemp("data"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "state.pt", weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    """Best model, last weights, optimiser and history are the same to the bit."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    first, second = state(one), state(other)
    assert first["progress"] == second["progress"]
    for name in ("network", "averaged", "hints"):
        for key, tensor in first.get(name, {}).items():
            assert torch.equal(tensor, second[name][key]), key
    assert (one / "curves.csv").read_bytes() == (other / "curves.csv").read_bytes()


# ---- it learns ---------------------------------------------------------------------------------------------------


def test_loss_falls_and_iou_rises(tmp_path: Path) -> None:
    learning = {"batch": 6, "every": 40, "rate": 5e-3, "jitter": 0.0, "class_weights": "none"}
    options = replace(SMALL, stages=(Stage("uniform", 120),), arguments={"width": 0.2}, **learning)
    heard: list[Told] = []
    done = train(data_of(tmp_path, count=3), tmp_path / "run", options, tell=heard.append)
    assert heard[-1].loss < 0.6 * heard[0].loss
    history = state(tmp_path / "run")["progress"]
    assert done.mean_iou > 0.5
    assert done.mean_iou == pytest.approx(load_model(done.model).card.provenance["mean_iou"], abs=1e-4)
    assert '"step": 120' in history


@pytest.mark.slow
def test_the_last_network_may_be_kept(data: DataSet, tmp_path: Path) -> None:
    best = train(data, tmp_path / "best", SMALL)
    last = train(data, tmp_path / "last", replace(SMALL, keep="last"))
    alone = train(replace(data, samples=data.of("train")), tmp_path / "alone", replace(SMALL, keep="last"))
    assert last.best_step == alone.best_step == 12
    assert last.mean_iou == RunFolder(tmp_path / "last").load(torch.device("cpu"))[0].history[-1]["mean_iou"]
    assert best.mean_iou >= last.mean_iou
    assert alone.mean_iou is None
    kept = state(tmp_path / "best")["network"]
    for name_of_run in ("last", "alone"):
        for name, tensor in weights(tmp_path / name_of_run).items():
            assert torch.equal(tensor, kept[name]), name
    assert load_model(last.model).card.provenance["mean_iou"] == pytest.approx(last.mean_iou, abs=1e-4)
    assert "mean_iou" not in load_model(alone.model).card.provenance
    with open(tmp_path / "alone" / "curves.csv", newline="") as file:
        assert [(row["step"], row["mean_iou"]) for row in csv.DictReader(file)] == [("4", ""), ("8", ""), ("12", "")]


# ---- the same run ------------------------------------------------------------------------------------------------

FULL = replace(SMALL, hints=0.5, average=0.9, accumulate=2, jitter=0.3, rotate=10.0, scales=(0.7, 1.5), clip=1.0)


def test_equal_arguments_give_equal_bytes_whatever_the_workers(data: DataSet, tmp_path: Path) -> None:
    train(data, tmp_path / "a", FULL)
    train(data, tmp_path / "b", replace(FULL, workers=2))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    train(data, tmp_path / "c", replace(FULL, seed=1))
    assert not torch.equal(weights(tmp_path / "a")["classifier.weight"], weights(tmp_path / "c")["classifier.weight"])


class StopAt(Stop):
    """Asks to stop at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.seen = step, 0

    @property
    def asked(self) -> bool:
        self.seen += 1
        return self.seen >= self.step

    @asked.setter
    def asked(self, value: bool) -> None: ...


DROPOUT = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 3, 1))
"""


@pytest.mark.parametrize("options", [FULL, replace(SMALL, model="dropout.py:make", arguments={}, optimiser="sgd")])
def test_a_stopped_run_ends_as_an_undisturbed_one(
    data: DataSet, tmp_path: Path, options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose random numbers must go on, too."""
    monkeypatch.chdir(tmp_path)
    Path("dropout.py").write_text(DROPOUT)
    train(data, tmp_path / "whole", options)
    for step in (3, 4, 2):
        with pytest.raises(StoppedError, match="the same command goes on"):
            train(data, tmp_path / "parts", options, stop=StopAt(step))
    done = train(data, tmp_path / "parts", options)
    assert done.resumed_from == 9
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    again = train(data, tmp_path / "parts", options)
    assert (again.resumed_from, again.mean_iou) == (12, done.mean_iou)


def manifest(data: DataSet, path: Path) -> Path:
    """The data set as a file."""
    lines = [f"classes = {[each.name for each in CLASSES]}", f"void = {list(data.void)}"]
    for sample in data.samples:
        lines += ["[[sample]]", *(f"{name} = '{getattr(sample, name)}'" for name in ("image", "label", "split"))]
    path.write_text("\n".join(lines))
    return path


def command(data: DataSet, folder: Path, run: str, steps: int) -> tuple[str, ...]:
    words = ("--model", "segnet-basic", "--arg", "width=0.1", "--steps", str(steps), "--every", "4", "--batch", "2")
    machine = ("--crop", "32x48", "--device", "cpu", "--threads", "1", "--workers", "0", "--average", "0.9")
    return ("train", str(manifest(data, folder / "data.toml")), str(folder / run), *words, *machine)


@pytest.mark.parametrize(
    "delays", [(0.1,), pytest.param((0.0, 0.21, 0.05, 0.4), marks=pytest.mark.slow)], ids=["once", "four times"]
)
def test_a_killed_run_ends_as_an_undisturbed_one(data: DataSet, tmp_path: Path, delays: tuple[float, ...]) -> None:
    """Killed, not asked: wherever it is, in steps, validation or writing."""
    whole, parts = (command(data, tmp_path, name, 40) for name in ("whole", "parts"))
    assert run(*whole).exit_code == 0
    kept = tmp_path / "parts" / "state.pt"
    for delay in delays:
        before = kept.stat().st_mtime_ns if kept.exists() else 0
        process = subprocess.Popen([sys.executable, "-m", "tilepipe", *parts], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (kept.exists() and kept.stat().st_mtime_ns > before):
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "killed before its end"
    result = run(*parts, "--json")
    assert 0 < json.loads(result.stdout)["resumed_from"] < 40
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_stages_follow_each_other(data: DataSet, tmp_path: Path) -> None:
    """DeconvNet's way: windows centred on objects, then candidates; a run stopped in the second goes on in it."""
    stages = (Stage("objects", 5), Stage("candidates", 7))
    options = replace(SMALL, stages=stages)
    assert list(options.segments(3)) == [("objects", 3, 5), ("candidates", 5, 12)]
    train(data, tmp_path / "whole", options)
    with pytest.raises(StoppedError, match="at step 7 of 12"):
        train(data, tmp_path / "parts", options, stop=StopAt(7))
    train(data, tmp_path / "parts", options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    train(data, tmp_path / "uniform", SMALL)
    name = "classifier.weight"
    assert not torch.equal(weights(tmp_path / "uniform")[name], weights(tmp_path / "whole")[name])


def test_tensorboard_is_told(data: DataSet, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(data, tmp_path / "run", SMALL)
    told = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    told.Reload()
    history = json.loads(state(tmp_path / "run")["progress"])["history"]
    found = [(each.step, each.value) for each in told.Scalars("mean_iou")]
    assert found == [(row["step"], pytest.approx(row["mean_iou"])) for row in history]


# ---- what it starts from, what it leaves -------------------------------------------------------------------------


def test_a_model_is_taken_over_with_its_statistics(data: DataSet, tmp_path: Path) -> None:
    first = train(data, tmp_path / "first", SMALL)
    still = replace(SMALL, stages=(Stage("uniform", 1),), rate=0.0, weight_decay=0.0)
    heard: list[str] = []
    train(data, tmp_path / "second", replace(still, start=first.model), note=heard.append)
    one, other = (load_model(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert (one.card.mean, one.card.std) == (other.card.mean, other.card.std)
    found = dict(other.network.named_parameters())
    assert all(torch.equal(value, found[name]) for name, value in one.network.named_parameters())
    assert "tensors" in heard[0]


def test_other_classes_keep_all_but_the_last_layer(data: DataSet, tmp_path: Path) -> None:
    first = train(data, tmp_path / "first", SMALL)
    more = replace(data, classes=(*CLASSES, ClassInfo("none", (9, 9, 9))))
    still = replace(SMALL, stages=(Stage("uniform", 1),), rate=0.0, start=first.model)
    heard: list[str] = []
    train(more, tmp_path / "second", still, note=heard.append)
    assert "new are" in heard[0]
    one, other = (load_model(tmp_path / name / "model.safetensors").network for name in ("first", "second"))
    assert torch.equal(one.encoder[0][0].weight, other.encoder[0][0].weight)  # type: ignore[index,union-attr]
    assert other.classifier.out_channels == 4  # type: ignore[union-attr]


def test_the_encoder_starts_from_vgg16(data: DataSet, tmp_path: Path) -> None:
    from torchvision.models import vgg16_bn

    torch.manual_seed(0)
    vgg = vgg16_bn(weights=None)
    torch.save(vgg.state_dict(), tmp_path / "vgg.pth")
    options = TrainOptions(start=str(tmp_path / "vgg.pth"), device="cpu")
    made = make_network(options, classes=3, bands=3)
    assert torch.equal(made.network.encoder[0][0].weight, vgg.features[0].weight)  # type: ignore[index,union-attr]
    assert made.notes


def test_a_network_of_ones_own_is_trained_and_loaded_again(data: DataSet, tmp_path: Path) -> None:
    code = tmp_path / "net.py"
    code.write_text(
        "from torch import nn\ndef make(width):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 1))\n"
    )
    options = replace(SMALL, model=f"{code}:make", arguments={"width": 6}, crop=(31, 37))
    done = train(data, tmp_path / "run", options)
    model = ModelReference.parse(done.model).load()
    assert [each.name for each in model.card.classes] == ["ground", "disc", "bar"]
    score = evaluate_by_hand(model.network, model.card.mean, model.card.std, data)
    assert score.mean_iou == pytest.approx(done.mean_iou, abs=1e-9)


def evaluate_by_hand(network: nn.Module, mean: Any, std: Any, data: DataSet) -> Confusion:
    """The confusion matrix of one pass over each whole validation image."""
    counted = Confusion.empty(len(CLASSES))
    for sample in data.of("validation"):
        with rasterio.open(sample.image) as image, rasterio.open(sample.label) as label:
            values, truth = image.read().astype(np.float32), label.read(1)
        shape = (-1, 1, 1)
        pixels = torch.from_numpy((values - np.reshape(mean, shape)) / np.reshape(std, shape)).float()
        with torch.inference_mode():
            found = Padded(network.eval())(pixels[None])[0].argmax(0).numpy()
        counted.add(truth, found, truth != 255)
    return counted


def test_the_card_says_what_a_whole_pass_gives(data: DataSet, tmp_path: Path) -> None:
    done = train(data, tmp_path / "run", SMALL)
    model = load_model(done.model)
    by_hand = evaluate_by_hand(model.network, model.card.mean, model.card.std, data)
    assert by_hand.mean_iou == pytest.approx(done.mean_iou, abs=2e-3)  # near-ties of float32 may fall otherwise
    assert model.card.bands == ("red", "green", "blue")
    assert model.card.provenance["steps"] == done.best_step


def test_accumulated_passes_are_one_large_pass(tmp_path: Path) -> None:
    """Without batch normalisation, and where all windows have the same number of labelled pixels."""
    even = replace(data_of(tmp_path, edge=0), void=())
    options = replace(SMALL, model="linear", arguments={}, optimiser="sgd", class_weights="none", batch=4)
    train(even, tmp_path / "one", options)
    train(even, tmp_path / "two", replace(options, batch=2, accumulate=2))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name])


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "segnot"}, "segnot is no architecture; legal are"),
        ({"crop": (32, 50)}, "a crop of 50 columns is no legal size of the network (16n); take 64"),
        ({"arguments": {"width": 0.1, "classes": 7}}, "classes=7 was asked for, and the data have 3"),
        ({"model": "lenet", "arguments": {}}, "one output per 4 pixels"),
        ({"model": "linear", "arguments": {}, "hints": 1.0}, "no stages for hints"),
        ({"start": "nothing.pth"}, "nothing.pth"),
        ({"class_weights": (1.0, 2.0)}, "3"),
        ({"bands": (1, 9)}, "9"),
    ],
)
def test_what_does_not_fit_ends_in_one_line(data: DataSet, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TilepipeError) as error:
        train(data, tmp_path / "run", replace(SMALL, **changes))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "state.pt").exists()
    assert train(data, tmp_path / "run", SMALL).resumed_from == 0, "the corrected command needs no --overwrite"


def test_validation_labels_are_read_before_the_first_step(data: DataSet, tmp_path: Path) -> None:
    one = data.of("validation")[0]

    def relabelled(value: int) -> DataSet:
        path = tmp_path / f"{value}.tif"
        with rasterio.open(one.label) as source, rasterio.open(path, "w", **source.profile) as out:
            out.write(np.full((1, *source.shape), value, np.uint8))
        return replace(data, samples=(*data.of("train"), replace(one, label=str(path))))

    for value, said in ((9, "has the label 9 at row 0"), (255, "no pixel of the validation images is labelled")):
        with pytest.raises(TilepipeError, match=said):
            train(relabelled(value), tmp_path / "run", SMALL, tell=lambda _: pytest.fail("a step was made"))


def test_a_loss_that_is_no_number_stops_the_run(data: DataSet, tmp_path: Path) -> None:
    options = replace(SMALL, optimiser="sgd", rate=1e30, warmup=0.0, decay="constant")
    with pytest.raises(RunError, match="use a lower --rate, or --clip 1"):
        train(data, tmp_path / "run", options)


def test_a_run_with_other_settings_is_not_continued(data: DataSet, tmp_path: Path) -> None:
    train(data, tmp_path / "run", SMALL)
    with pytest.raises(TilepipeError, match=r"rate was 0.001, is 0.5.*--overwrite"):
        train(data, tmp_path / "run", replace(SMALL, rate=0.5))
    smaller = data_of(tmp_path, shape=(64, 80))
    done = train(smaller, tmp_path / "run", SMALL, overwrite=True)
    assert done.resumed_from == 0
    train(smaller, tmp_path / "anew", SMALL)
    assert_same_run(tmp_path / "anew", tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(TilepipeError, match="no folder of a training run"):
        train(data, tmp_path / "other", SMALL)


def test_two_processes_do_not_share_a_run(data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilepipe.training.state.PATIENCE", 0.3)
    with RunFolder(tmp_path / "run").held(overwrite=False):
        for overwrite in (False, True):
            with pytest.raises(RunError, match="another process trains in"):
                train(data, tmp_path / "run", SMALL, overwrite=overwrite)
    train(data, tmp_path / "run", SMALL)


def test_a_damaged_state_is_refused(data: DataSet, tmp_path: Path) -> None:
    train(data, tmp_path / "run", SMALL)
    kept = tmp_path / "run" / "state.pt"
    kept.write_bytes(kept.read_bytes()[:1000])
    with pytest.raises(TilepipeError, match=r"cannot be resumed from .*--overwrite"):
        train(data, tmp_path / "run", SMALL)


def test_data_without_validation_or_classes_are_refused(data: DataSet, tmp_path: Path) -> None:
    with pytest.raises(TilepipeError, match="name them with --classes"):
        train(replace(data, classes=None), tmp_path / "run", SMALL)
    alone = replace(data, samples=data.of("train"))
    with pytest.raises(TilepipeError, match="no sample is for validation"):
        train(alone, tmp_path / "run", SMALL)
    assert not (tmp_path / "run" / "state.pt").exists()
