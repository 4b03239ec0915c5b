"""`tilepipe evaluate` as its users meet it: table, JSON, pictures, mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import assert_one_line, run
from label_maps import NAMES, SHAPE, options, scene, whole, write_pair
from PIL import Image
from rasters import real_data, write

from tilepipe.evaluation import EvaluationOptions, evaluate
from tilepipe.metrics import Confusion, default_tolerance


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_pair(tmp_path)


WORDS = ("--classes", "land,sea,road,roof", "--void", "255", "-q")


def test_the_command_prints_a_table(files: Path) -> None:
    result = run("evaluate", files / "found.tif", files / "truth.tif", *WORDS)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    head = next(line for line in lines if line.startswith("class "))
    assert head.split() == ["class", "pixels", "accuracy", "IoU", "precision", "recall", "F1", "boundary", "F1"]
    counts, boundary = whole(*scene(), default_tolerance(SHAPE))
    row = next(line for line in lines if line.startswith("sea")).split()
    expected = Confusion(counts)
    assert row[1] == f"{counts[1].sum():,}"
    scores = [expected.recall, expected.iou, expected.precision, expected.recall, expected.f1, boundary]
    assert row[2:] == [f"{score[1]:.4f}" for score in scores]
    assert f"mean IoU                {expected.mean_iou:.4f}" in lines
    assert "nodata in the prediction only" in lines[0]


def test_the_command_prints_json(files: Path) -> None:
    result = run("evaluate", files / "found.tif", files / "truth.tif", *WORDS, "--json", "--tolerance", "2.5")
    told = json.loads(result.stdout)
    found = evaluate(files / "found.tif", files / "truth.tif", options(tolerance=2.5))
    expected = json.loads(json.dumps(found.to_json()))
    for given in (told, expected):
        given.pop("seconds")
    assert told == {"prediction": str(files / "found.tif"), "truth": str(files / "truth.tif"), **expected}
    assert told["confusion"] == found.confusion.counts.tolist()
    assert [row["name"] for row in told["classes"]] == list(NAMES)


def test_what_no_pixel_tells_is_a_dash_and_null(tmp_path: Path) -> None:
    write(tmp_path / "t.tif", np.zeros((1, 5, 5), np.uint8))
    write(tmp_path / "p.tif", np.array([[[0] * 4 + [1]] * 5], np.uint8))
    words = ("evaluate", tmp_path / "p.tif", tmp_path / "t.tif", "--classes", "a,b,c", "-q")
    rows = {line.split()[0]: line.split()[1:] for line in run(*words).stdout.splitlines() if line}
    assert rows["c"] == ["0", "-", "-", "-", "-", "-", "-"]
    assert rows["b"] == ["0", "-", "0.0000", "0.0000", "-", "0.0000", "-"]
    told = json.loads(run(*words, "--json").stdout)
    assert told["classes"][2]["iou"] is None
    assert told["mean_iou"] == pytest.approx(0.4)


def test_the_command_draws_pictures(files: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    words = ("evaluate", files / "found.tif", files / "truth.tif", *WORDS)
    drawn = ("--confusion", files / "c.png", "--errors", files / "e.tif")
    assert run(*words, *drawn).exit_code == 0
    picture = np.asarray(Image.open(files / "c.png").convert("RGB"))
    assert min(picture.shape[:2]) > 300
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert_one_line(run(*words, *drawn), 2, "c.png exists", "--overwrite")
    assert run(*words, *drawn, "--overwrite").exit_code == 0


def test_without_matplotlib_one_line_says_so_before_anything_is_read(files: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("evaluate", "nowhere.tif", files / "truth.tif", "--confusion", files / "c.png")
    assert_one_line(result, 2, "needs matplotlib", "tilepipe[train]")


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (("nowhere.tif", "truth.tif"), 3, "nowhere.tif"),
        (("found.tif", "nowhere.tif"), 3, "nowhere.tif"),
        (("found.tif", "truth.tif", "--classes", "4"), 3, "--void 255 ignores it"),
        (("found.tif", "truth.tif", "--classes", "4", "--void", "255", "--nodata", "none"), 3, "--nodata 255"),
        (("found.tif", "truth.tif", *(w for v in range(256) for w in ("--void", str(v)))), 3, "no pixel"),
        (("found.tif", "truth.tif", "--tolerance", "-1"), 2, "0 to 1024"),
        (("found.tif", "truth.tif", "--classes", "a,,b"), 2, "name missing"),
        (("found.tif", "truth.tif", "--classes", "a,a"), 2, "its own name"),
        (("found.tif", "truth.tif", "--void", "x"), 2, "--void"),
        (("found.tif", "truth.tif", "--errors", "e.jpg"), 2, ".tif or .tiff or .png"),
        (("found.tif", "truth.tif", "--errors", "no/e.tif"), 2, "folder that does not exist"),
        (("found.tif", "truth.tif", "--confusion", "c.tif"), 2, ".png"),
        (("found.tif", "truth.tif", "--confusion", "no/c.png"), 2, "folder that does not exist"),
        (("found.tif",), 2, "TRUTH"),
    ],
)
def test_mistakes_are_one_line(files: Path, monkeypatch, words, exit_code: int, said: str) -> None:
    monkeypatch.chdir(files)
    assert_one_line(run("evaluate", *words, "-q"), exit_code, said)


def test_a_config_file_sets_options(files: Path) -> None:
    (files / "score.toml").write_text('classes = "land,sea,road,roof"\nvoid = [255]\ntolerance = 2.5\n')
    words = ("evaluate", files / "found.tif", files / "truth.tif", "--config", files / "score.toml", "--json", "-q")
    told = json.loads(run(*words).stdout)
    assert told["images"][0]["tolerance"] == 2.5
    assert told["ignored"] == np.count_nonzero(scene()[0] == 255)


def test_camvid_truth_against_itself_shifted() -> None:
    folder = real_data("camvid", "valannot")
    one = sorted(folder.glob("*.png"))[:3]
    found = evaluate(one, one, EvaluationOptions(classes=tuple("abcdefghijk"), void=(11,), nodata=11))
    assert found.confusion.accuracy == 1
    assert found.boundary_f1 == 1
    assert found.images[0].tolerance == pytest.approx(4.5)
