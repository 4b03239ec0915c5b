"""`evaluate` against whole-image scores by plain numpy: any block, place, nodata and kind of file; and its errors."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from label_maps import SHAPE, options, scene, whole, write_pair
from PIL import Image
from rasters import GRID, write
from sklearn.metrics import confusion_matrix
from stores import CLASSES, make_spec, make_store

from tilepipe.comparison.error_map import COLORS, CORRECT, IGNORED, WRONG, error_map
from tilepipe.comparison.pairs import open_pairs
from tilepipe.errors import InputError, StoreError, TilepipeError, UsageError
from tilepipe.evaluation import EvaluationOptions, evaluate
from tilepipe.export import ExportOptions, export_geotiff
from tilepipe.metrics import Confusion, default_tolerance, mean
from tilepipe.store.output import create_or_resume
from tilepipe.window import Window


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_pair(tmp_path)


# ---- streaming ----


@pytest.mark.parametrize("block", [1000, 64, 33, 17])
@pytest.mark.parametrize("tolerance", [None, 0.0, 3.5, 40.0])
def test_any_block_gives_the_scores_of_the_whole_image(files: Path, block: int, tolerance: float | None) -> None:
    found = evaluate(files / "found.tif", files / "truth.tif", options(block=block, tolerance=tolerance, threads=2))
    truth, labels = scene()
    used = default_tolerance(SHAPE) if tolerance is None else tolerance
    counts, boundary = whole(truth, labels, used)
    assert np.array_equal(found.confusion.counts, counts)
    assert found.boundary[2] == pytest.approx(boundary)
    assert found.boundary_f1 == pytest.approx(boundary.mean())
    assert found.images[0].tolerance == used
    assert found.ignored == np.count_nonzero(truth == 255) > 0
    assert found.missing == np.count_nonzero((truth != 255) & (labels == 255)) > 0
    assert found.confusion.pixels + found.ignored + found.missing == truth.size


def test_without_boundaries_the_rest_is_the_same(files: Path) -> None:
    found = evaluate(files / "found.tif", files / "truth.tif", options(boundary=False))
    assert np.array_equal(found.confusion.counts, whole(*scene(), 1.0)[0])
    assert math.isnan(found.boundary_f1)
    assert found.to_json()["boundary_f1"] is None


def test_the_default_tolerance_of_a_large_map_is_bounded() -> None:
    assert options().tolerance_of((10**5, 10**5)) == 256
    assert options(tolerance=300).tolerance_of((10**5, 10**5)) == 300
    with pytest.raises(UsageError, match="0 to 1024"):
        options(tolerance=1025)


def test_memory_does_not_grow_with_the_maps(tmp_path: Path) -> None:
    def peak(side: int) -> int:
        truth, labels = scene(shape=(side, side))
        write(tmp_path / "t.tif", truth[None], tiled=True, blockxsize=128, blockysize=128)
        write(tmp_path / "p.tif", labels[None], nodata=255, tiled=True, blockxsize=128, blockysize=128)
        chosen = options(block=128, tolerance=5, errors=tmp_path / "e.tif", overwrite=True)
        tracemalloc.start()
        try:
            evaluate(tmp_path / "p.tif", tmp_path / "t.tif", chosen)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(640)  # what is loaded and compiled once does not count
    small, large = peak(640), peak(1536)
    assert large < 1.2 * small
    assert large < 1536 * 1536 / 2


def test_progress_ends_with_all_pixels(files: Path) -> None:
    seen = []
    evaluate(files / "found.tif", files / "truth.tif", options(block=32), seen.append)
    assert [state.done for state in seen] == list(range(1, 10))
    assert seen[-1].done == seen[-1].total
    assert seen[-1].pixels == seen[-1].total_pixels == math.prod(SHAPE)


# ---- what is void, nodata, a class ----


def test_void_and_nodata_of_the_truth_are_ignored(tmp_path: Path) -> None:
    truth = np.array([[[0, 1, 9, 7], [0, 1, 3, 255]]], np.uint8)
    write(tmp_path / "t.tif", truth, nodata=255)
    write(tmp_path / "p.tif", np.zeros((1, 2, 4), np.uint8))
    found = evaluate(tmp_path / "p.tif", tmp_path / "t.tif", options(void=(9, 7, 3, 70000, -1)))
    assert found.confusion.counts.tolist() == [[2, 0, 0, 0], [2, 0, 0, 0], [0] * 4, [0] * 4]
    assert (found.ignored, found.missing) == (4, 0)


def test_a_class_may_be_void(files: Path) -> None:
    truth, labels = scene()
    found = evaluate(files / "found.tif", files / "truth.tif", options(void=(255, 2)))
    counts = whole(np.where(truth == 2, 255, truth), labels, 1.0)[0]
    assert np.array_equal(found.confusion.counts, counts)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "uint32", "int64"])
def test_labels_of_any_whole_numbers(tmp_path: Path, dtype: str) -> None:
    truth, labels = scene()
    write(tmp_path / "t.tif", truth[None].astype(dtype))
    write(tmp_path / "p.tif", labels[None], nodata=255)
    found = evaluate(tmp_path / "p.tif", tmp_path / "t.tif", options())
    assert np.array_equal(found.confusion.counts, whole(truth, labels, 1.0)[0])


@pytest.mark.parametrize(("dtype", "value"), [("uint8", 4), ("int16", -1), ("int32", 65535), ("uint32", 65536 + 1)])
@pytest.mark.parametrize("which", ["truth", "found"])
def test_a_label_that_is_no_class_is_named_with_its_file_and_place(tmp_path, dtype, value, which) -> None:
    maps = {name: np.zeros((1, 40, 50), dtype) for name in ("truth", "found")}
    maps[which][0, 33, 21] = value
    for name, values in maps.items():
        write(tmp_path / f"{name}.tif", values)
    said = rf"{which}\.tif has label {value} at row 33, column 21; legal are 0 to 3.*land, sea"
    with pytest.raises(InputError, match=said):
        evaluate(tmp_path / "found.tif", tmp_path / "truth.tif", options(block=16))


def test_without_names_values_are_the_classes(files: Path) -> None:
    found = evaluate(files / "found.tif", files / "truth.tif", EvaluationOptions(void=(255,), threads=1))
    assert found.classes == ("0", "1", "2", "3")
    named = evaluate(files / "found.tif", files / "truth.tif", options())
    assert np.array_equal(found.confusion.counts, named.confusion.counts)
    assert found.boundary == pytest.approx(named.boundary)


def test_a_class_declared_to_be_nodata_is_noted_and_may_be_made_to_count(tmp_path: Path) -> None:
    values = np.array([[[0, 0, 1, 1]]], np.uint8)
    write(tmp_path / "t.tif", values, nodata=0)
    write(tmp_path / "p.tif", values)
    found = evaluate(tmp_path / "p.tif", tmp_path / "t.tif", options())
    assert found.ignored == 2
    assert "--truth-nodata none" in found.notes[0]
    found = evaluate(tmp_path / "p.tif", tmp_path / "t.tif", options(truth_nodata="none"))
    assert (found.ignored, found.notes) == (0, ())


def test_an_alpha_band_says_which_pixels_count(tmp_path: Path) -> None:
    truth, labels = scene()
    alpha = np.where(truth == 255, 0, 255).astype(np.uint8)
    inner = np.where(truth == 255, 0, truth)
    Image.fromarray(np.stack([inner, alpha], axis=-1), "LA").save(tmp_path / "t.png")
    Image.fromarray(labels).save(tmp_path / "p.png")
    found = evaluate(tmp_path / "p.png", tmp_path / "t.png", options(nodata=255))
    assert np.array_equal(found.confusion.counts, whole(truth, labels, 1.0)[0])


# ---- where maps lie ----


def test_maps_are_laid_on_each_other_by_their_place(tmp_path: Path) -> None:
    truth, labels = scene()
    write(tmp_path / "p.tif", labels[None, 5:, :60], nodata=255, transform=GRID * Affine.translation(0, 5))
    write(tmp_path / "t.tif", truth[None, :80, 8:], transform=GRID * Affine.translation(8, 0))
    errors = tmp_path / "e.tif"
    found = evaluate(tmp_path / "p.tif", tmp_path / "t.tif", options(block=32, tolerance=3, errors=errors))
    shared = (slice(5, 80), slice(8, 60))
    counts, boundary = whole(truth[shared], labels[shared], 3)
    assert np.array_equal(found.confusion.counts, counts)
    assert found.boundary[2] == pytest.approx(boundary)
    assert found.images[0].shape == (75, 52)
    assert "75 x 52 of 80 x 62" in found.notes[0]
    with rasterio.open(errors) as tif:
        assert tif.transform == GRID * Affine.translation(8, 5)
        assert tif.crs == rasterio.CRS.from_epsg(32632)
        right = np.where(truth == labels, CORRECT, WRONG)
        right[(truth == 255) | (labels == 255)] = IGNORED
        assert np.array_equal(tif.read(1), right[shared])
        assert tif.colormap(1)[WRONG] == (*COLORS[WRONG], 255)


def test_without_georeference_maps_are_compared_pixel_by_pixel(tmp_path: Path) -> None:
    truth, labels = scene()
    Image.fromarray(truth).save(tmp_path / "t.png")
    write(tmp_path / "p.tif", labels[None], nodata=255)
    found = evaluate(tmp_path / "p.tif", tmp_path / "t.png", options())
    assert np.array_equal(found.confusion.counts, whole(truth, labels, 1.0)[0])
    assert "t.png has no georeference" in found.notes[0]


def shifted(cols: float = 0, rows: float = 0, scale: float = 1) -> Affine:
    return GRID * Affine.translation(cols, rows) * Affine.scale(scale)


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ({"transform": shifted(cols=0.5)}, r"\+0.50 columns and \+0.00 rows off the pixel grid"),
        ({"transform": shifted(rows=3.25)}, r"\+0.00 columns and \+0.25 rows off"),
        ({"transform": shifted(scale=2)}, r"pixels of 4 x -4, .* of 2 x -2"),
        ({"transform": shifted(scale=1.001)}, "pixels of 2.002"),
        ({"transform": shifted() * Affine.rotation(10)}, "turned"),
        ({"transform": GRID * Affine.translation(0, 90) * Affine.scale(1, -1)}, "pixels of 2 x 2"),
        ({"transform": shifted(cols=70)}, "do not overlap"),
        ({"crs": "EPSG:32633"}, "EPSG:32633.*EPSG:32632"),
        ({"crs": None}, "no CRS"),
    ],
)
def test_maps_on_other_grids_are_refused(files: Path, truth: dict, said: str) -> None:
    write(files / "other.tif", scene()[0][None], **truth)
    with pytest.raises(InputError, match=said):
        evaluate(files / "found.tif", files / "other.tif", options())
    with pytest.raises(InputError):
        evaluate(files / "other.tif", files / "found.tif", options())


def test_a_grid_that_differs_by_rounding_is_the_same(files: Path) -> None:
    write(files / "other.tif", scene()[0][None], transform=shifted(cols=1e-4) * Affine.scale(1 + 1e-6))
    found = evaluate(files / "found.tif", files / "other.tif", options())
    assert np.array_equal(found.confusion.counts, whole(*scene(), 1.0)[0])


# ---- stores and other files ----


def label_store(path: Path) -> np.ndarray:
    """The labels of a finished store of three classes."""
    return make_store(path, make_spec(crs_wkt=rasterio.CRS.from_epsg(32632).to_wkt(), transform=tuple(GRID)[:6]))[
        "labels"
    ]


def test_a_store_tells_classes_and_nodata(tmp_path: Path) -> None:
    labels = label_store(tmp_path / "out.zarr")
    truth = np.random.default_rng(1).integers(0, 3, labels.shape, np.uint8)
    write(tmp_path / "truth.tif", truth[None])
    found = evaluate(tmp_path / "out.zarr", tmp_path / "truth.tif", EvaluationOptions(threads=1, block=20))
    assert found.classes == tuple(item.name for item in CLASSES)
    valid = labels != 255
    assert np.array_equal(found.confusion.counts, confusion_matrix(truth[valid], labels[valid]))
    assert found.missing == np.count_nonzero(~valid) > 0
    export_geotiff(tmp_path / "out.zarr", tmp_path / "out.tif", ExportOptions())
    exported = evaluate(tmp_path / "out.tif", tmp_path / "truth.tif", EvaluationOptions(threads=1))
    assert exported.classes == found.classes
    assert np.array_equal(exported.confusion.counts, found.confusion.counts)
    itself = evaluate(tmp_path / "out.zarr", tmp_path / "out.zarr")
    assert itself.confusion.accuracy == itself.boundary_f1 == 1


def test_an_unfinished_store_and_one_of_values_are_refused(tmp_path: Path) -> None:
    with create_or_resume(tmp_path / "out.zarr", make_spec()):
        pass
    write(tmp_path / "t.tif", np.zeros((1, 50, 70), np.uint8))
    with pytest.raises(StoreError, match="0 of 6 blocks"):
        evaluate(tmp_path / "out.zarr", tmp_path / "t.tif")
    with create_or_resume(tmp_path / "values.zarr", make_spec(classes=(), values="float32", outputs=("a",))):
        pass
    with pytest.raises(StoreError, match="values, not labels"):
        evaluate(tmp_path / "values.zarr", tmp_path / "t.tif")


def test_maps_of_other_classes_are_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "a.zarr")
    make_store(tmp_path / "b.zarr", make_spec(classes=CLASSES[::-1]))
    with pytest.raises(InputError, match="trees / shrubs, water, bare soil"):
        evaluate(tmp_path / "a.zarr", tmp_path / "b.zarr")


def test_what_is_no_label_map_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rgb.tif", np.zeros((3, 4, 4), np.uint8))
    write(tmp_path / "float.tif", np.zeros((1, 4, 4), np.float32))
    write(tmp_path / "t.tif", np.zeros((1, 4, 4), np.uint8))
    for name, said in (("rgb.tif", "3 bands"), ("float.tif", "float32"), ("none.tif", "none.tif")):
        with pytest.raises(InputError, match=said):
            evaluate(tmp_path / name, tmp_path / "t.tif")


# ---- several images ----


def folders(path: Path, count: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folders truth/ and found/ of PNG files of different sizes, and what they hold."""
    scenes = [scene(seed, (40 + 5 * seed, 50)) for seed in range(count)]
    for name in ("truth", "found"):
        (path / name).mkdir()
        (path / name / "notes.txt").write_text("not a label map")
    for number, (truth, labels) in enumerate(scenes):
        Image.fromarray(truth).save(path / "truth" / f"{number}.png")
        write(path / "found" / f"{number}.tif", labels[None], crs=None, transform=None, nodata=255)
    return scenes


def test_images_of_two_folders_are_matched_by_name_and_pooled(tmp_path: Path) -> None:
    scenes = folders(tmp_path)
    found = evaluate(tmp_path / "found", tmp_path / "truth", options(tolerance=2))
    each = [whole(truth, labels, 2) for truth, labels in scenes]
    assert np.array_equal(found.confusion.counts, sum(counts for counts, _ in each))
    assert found.boundary_f1 == pytest.approx(np.mean([mean(boundary) for _, boundary in each]))
    assert found.boundary[2] == pytest.approx(np.nanmean([boundary for _, boundary in each], axis=0))
    assert [Path(image.prediction).name for image in found.images] == ["0.tif", "1.tif", "2.tif"]
    for image, (counts, boundary) in zip(found.images, each, strict=True):
        assert image.accuracy == pytest.approx(np.trace(counts) / counts.sum())
        assert image.mean_iou == pytest.approx(Confusion(counts).mean_iou)
        assert image.boundary_f1 == pytest.approx(mean(boundary))


def test_a_class_is_averaged_over_the_images_whose_truth_shows_it(tmp_path: Path) -> None:
    half = np.zeros((20, 20), np.uint8)
    half[:, 10:] = 1
    other = np.where(half == 1, 2, 0).astype(np.uint8)
    for name, truth, labels in (("a", half, half), ("b", other, half)):
        write(tmp_path / f"{name}_t.tif", truth[None])
        write(tmp_path / f"{name}_p.tif", labels[None])
    found = evaluate([tmp_path / "a_p.tif", tmp_path / "b_p.tif"], [tmp_path / "a_t.tif", tmp_path / "b_t.tif"])
    # Image a: 0 and 1 are perfect. Image b: 0 is perfect, 2 has none of its boundary found, 1 does not count.
    assert found.boundary[2].tolist() == [1, 1, 0]
    assert found.boundary_f1 == pytest.approx((1 + 0.5) / 2)


def test_files_without_a_counterpart_are_named(tmp_path: Path) -> None:
    folders(tmp_path)
    (tmp_path / "truth" / "1.png").unlink()
    with pytest.raises(InputError, match=r"truth has nothing for 1 of .*found"):
        evaluate(tmp_path / "found", tmp_path / "truth", options())
    with pytest.raises(UsageError, match="two folders"):
        evaluate(tmp_path / "found", tmp_path / "truth" / "0.png", options())
    (tmp_path / "found" / "1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"1\.png and 1\.tif"):
        evaluate(tmp_path / "found", tmp_path / "truth", options())
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no label map"):
        evaluate(tmp_path / "none", tmp_path / "truth", options())
    with pytest.raises(UsageError, match="2 predictions and 1 truths"):
        evaluate(["a.tif", "b.tif"], ["c.tif"])


# ---- pictures ----


@pytest.mark.parametrize("block", [64, 37])
def test_an_error_picture_shows_the_share_of_wrong_pixels(tmp_path: Path, monkeypatch, block: int) -> None:
    monkeypatch.setattr("tilepipe.comparison.error_map.SIDE", 30)
    truth, labels = scene()
    write(tmp_path / "t.tif", truth[None])
    write(tmp_path / "p.tif", labels[None], nodata=255)
    evaluate(tmp_path / "p.tif", tmp_path / "t.tif", options(block=block, errors=tmp_path / "e.png"))
    picture = np.asarray(Image.open(tmp_path / "e.png")).astype(float)
    assert picture.shape == (30, 24, 3)
    for row, col in ((0, 0), (10, 11), (29, 23)):
        cell = slice(3 * row, 3 * row + 3), slice(3 * col, 3 * col + 3)
        scored = (truth[cell] != 255) & (labels[cell] != 255)
        share = (truth[cell] != labels[cell])[scored].mean() if scored.any() else math.nan
        mixed = (1 - share) * np.array(COLORS[CORRECT]) + share * np.array(COLORS[WRONG])
        assert np.abs(picture[row, col] - (mixed if scored.any() else COLORS[IGNORED])).max() <= 0.5


def test_a_failed_run_leaves_no_error_map(files: Path) -> None:
    for name in ("e.tif", "e.png"):
        with pytest.raises(InputError):
            evaluate(files / "found.tif", files / "truth.tif", options(void=(), errors=files / name))
    assert {path.name for path in files.iterdir()} == {"truth.tif", "found.tif"}


def test_an_error_map_that_was_not_written_whole_is_told(files: Path) -> None:
    pair = open_pairs(files / "found.tif", files / "truth.tif")[0]
    target = error_map(str(files / "e.tif"), pair)
    target.write(Window.whole(SHAPE), np.full(SHAPE, WRONG, np.uint8))
    target._wrong += 1
    with pytest.raises(TilepipeError, match="not written whole"):
        target.__exit__(None, None, None)
    assert not (files / "e.tif").exists()
