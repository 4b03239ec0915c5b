"""The demo end to end at a tiny size, its scores against scikit-learn, and the pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from sklearn.metrics import confusion_matrix
from typer.testing import CliRunner

from tilepipe.cli import app
from tilepipe.demo import compare, make_scene, segment_scene
from tilepipe.errors import InputError, UsageError
from tilepipe.pictures.colors import NODATA_COLOR, colorize
from tilepipe.pictures.layout import PANEL, side_by_side
from tilepipe.store.output import open_store
from tilepipe.store.spec import LabelClass

CLASSES = [LabelClass("a", (255, 0, 0)), LabelClass("b", (0, 255, 0)), LabelClass("c", (0, 0, 255))]


def test_the_demo_runs_scores_draws_and_runs_again(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    words = ["demo", str(folder), "--size", "160x192", "--seed", "5", "--json", "-q"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["stitch"] == "exact"
    assert 0 < found["accuracy"] <= 1
    assert 0 < found["mean_iou"] <= 1
    with Image.open(folder / "picture.png") as picture:
        assert picture.width > 3 * 192
        assert picture.height > 160
    again = json.loads(CliRunner().invoke(app, words).stdout)
    assert (again["computed"], again["accuracy"]) == (0, found["accuracy"])
    text = CliRunner().invoke(app, ["demo", str(folder), "--size", "128", "--seed", "5"])
    assert text.exit_code == 0, text.output
    for said in ("tiles", "Mpx/s", "accuracy", "mean IoU", "picture.png", "water"):
        assert said in text.output


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="something else"):
        make_scene(tmp_path, (64, 64), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_scene_is_made_again_only_when_another_is_wanted(tmp_path: Path) -> None:
    first = make_scene(tmp_path / "demo", (64, 80), 1)
    written = first.image.stat().st_mtime_ns
    again = make_scene(tmp_path / "demo", (64, 80), 1)
    assert (first.new, again.new, again.image.stat().st_mtime_ns) == (True, False, written)
    assert make_scene(tmp_path / "demo", (64, 80), 2).new


def test_the_label_map_is_scored_as_scikit_learn_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips together, without the pixels that one map does not label."""
    monkeypatch.setattr("tilepipe.demo.STRIP", 50)
    files = make_scene(tmp_path / "demo", (160, 192), 5)
    segment_scene(files)
    with rasterio.open(files.truth, "r+") as file:
        truth = file.read(1)
        truth[::7, ::3] = 255
        file.write(truth, 1)
    store = open_store(files.labels)
    said = np.asarray(store.array("labels")[:])
    scores, labelled = compare(files), truth != 255
    expected = confusion_matrix(truth[labelled], said[labelled], labels=range(len(store.spec.classes)))
    assert np.array_equal(scores.counts, expected)
    assert 0.5 < scores.accuracy < 1


def test_labels_get_their_colours_and_nodata_its_own() -> None:
    colors = colorize(np.array([[0, 2], [255, 1]], np.uint8), CLASSES)
    assert colors.tolist() == [[[255, 0, 0], [0, 0, 255]], [list(NODATA_COLOR), [0, 255, 0]]]
    assert np.array_equal(colorize(np.array([[65535]], np.uint16), CLASSES)[0, 0], NODATA_COLOR)
    with pytest.raises(InputError, match="unsigned"):
        colorize(np.zeros((2, 2)), CLASSES)


@pytest.mark.parametrize("shape", [(40, 60), (2000, 500), (1, 1)])
def test_a_picture_shows_image_labels_truth_and_legend(shape: tuple[int, int]) -> None:
    image = np.empty((3, *shape), np.uint8)
    image[:] = np.array([77, 12, 140])[:, None, None]
    labels, truth = np.zeros(shape, np.uint8), np.ones(shape, np.uint8)
    picture = np.asarray(side_by_side(image, labels, truth, CLASSES))
    factor = min(1, PANEL / max(shape))
    panel = max(1, round(shape[0] * factor)) * max(1, round(shape[1] * factor))
    assert picture.dtype == np.uint8

    def count(color: tuple[int, int, int]) -> int:
        return int((picture == np.array(color)).all(axis=-1).sum())

    # Each panel is there whole, and each class has its swatch besides.
    swatch = count(CLASSES[2].color)
    assert swatch > 200
    assert count((77, 12, 140)) == panel
    assert count(CLASSES[0].color) == panel + swatch
    assert count(CLASSES[1].color) == panel + swatch


def test_a_picture_of_things_that_do_not_fit_is_refused() -> None:
    labels = np.zeros((4, 5), np.uint8)
    with pytest.raises(InputError, match="image"):
        side_by_side(np.zeros((3, 5, 4), np.uint8), labels, None, CLASSES)
    with pytest.raises(InputError, match="truth"):
        side_by_side(np.zeros((3, 4, 5), np.uint8), labels, labels.T, CLASSES)
