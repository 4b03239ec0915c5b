"""Scores against scikit-learn and torchmetrics, boundary F1 against a brute force, and any partition into blocks."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    jaccard_score,
    precision_score,
    recall_score,
)

from tilepipe.errors import InputError, UsageError
from tilepipe.metrics import (
    BoundaryCounts,
    Confusion,
    boundary_counts,
    boundary_margin,
    default_tolerance,
    mean,
)
from tilepipe.window import Window

COUNTS = ("truth", "truth_hits", "found", "found_hits")


def maps(seed: int, shape: tuple[int, int], classes: int, wrong: float = 0.3):
    """Truth in patches, a prediction with some patches and pixels changed, and flags with holes."""
    random = np.random.default_rng(seed)
    rows, cols = -(-shape[0] // 5), -(-shape[1] // 5)

    def patches(values):
        return np.kron(values, np.ones((5, 5), values.dtype))[: shape[0], : shape[1]]

    truth = patches(random.integers(0, classes, (rows, cols), dtype=np.uint8))
    found = np.roll(truth, tuple(random.integers(-2, 3, 2)), (0, 1))
    found = np.where(patches(random.random((rows, cols)) < wrong), random.integers(0, classes), found).astype(np.uint8)
    valid = ~patches(random.random((rows, cols)) < 0.1) & (random.random(shape) > 0.02)
    return truth, found, valid


def counted(truth, found, classes: int, valid=None) -> Confusion:
    confusion = Confusion.empty(classes)
    confusion.add(truth, found, valid)
    return confusion


# ---- the confusion matrix ----


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_scikit_learn(seed: int) -> None:
    classes = 4
    truth, found, valid = maps(seed, (60, 70), classes)
    confusion = counted(truth, found, classes, valid)
    real, said = truth[valid], found[valid]
    each = {"labels": range(classes), "average": None, "zero_division": np.nan}
    assert np.array_equal(confusion.counts, confusion_matrix(real, said, labels=range(classes)))
    assert confusion.accuracy == pytest.approx(accuracy_score(real, said))
    assert confusion.mean_accuracy == pytest.approx(balanced_accuracy_score(real, said))
    for ours, theirs in (
        (confusion.iou, jaccard_score(real, said, labels=range(classes), average=None)),
        (confusion.f1, f1_score(real, said, **each)),
        (confusion.precision, precision_score(real, said, **each)),
        (confusion.recall, recall_score(real, said, **each)),
    ):
        assert ours == pytest.approx(theirs, nan_ok=True)
    assert confusion.mean_iou == pytest.approx(jaccard_score(real, said, average="macro"))
    assert confusion.mean_f1 == pytest.approx(f1_score(real, said, average="macro"))
    assert confusion.mean_precision == pytest.approx(precision_score(real, said, average="macro"))


def test_scores_are_those_of_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.classification", reason="needs torchmetrics")
    torch = pytest.importorskip("torch")
    classes, void = 5, 255
    truth, found, valid = maps(9, (60, 70), classes)
    confusion = counted(truth, found, classes, valid)
    real, said = torch.from_numpy(np.where(valid, truth, void).astype(int)), torch.from_numpy(found.astype(int))

    def theirs(name: str, average: str):
        kind = getattr(metrics, f"Multiclass{name}")
        return kind(classes, average=average, ignore_index=void)(said[None], real[None]).numpy()

    assert confusion.accuracy == pytest.approx(float(theirs("Accuracy", "micro")))
    assert confusion.mean_accuracy == pytest.approx(float(theirs("Accuracy", "macro")))
    assert confusion.mean_iou == pytest.approx(float(theirs("JaccardIndex", "macro")))
    assert confusion.mean_f1 == pytest.approx(float(theirs("F1Score", "macro")))
    assert confusion.iou == pytest.approx(theirs("JaccardIndex", "none"))
    assert confusion.precision == pytest.approx(theirs("Precision", "none"))
    assert confusion.recall == pytest.approx(theirs("Recall", "none"))


def test_classes_that_nobody_shows_are_left_out_of_means() -> None:
    # Class 2 is in the prediction only, class 3 in neither.
    confusion = counted(np.array([[0, 0, 1, 1]]), np.array([[0, 0, 1, 2]]), 4)
    nan = math.nan
    assert confusion.recall == pytest.approx([1, 0.5, nan, nan], nan_ok=True)
    assert confusion.precision == pytest.approx([1, 1, 0, nan], nan_ok=True)
    assert confusion.iou == pytest.approx([1, 0.5, 0, nan], nan_ok=True)
    assert confusion.f1 == pytest.approx([1, 2 / 3, 0, nan], nan_ok=True)
    assert confusion.mean_accuracy == pytest.approx(0.75)
    assert confusion.mean_precision == pytest.approx(2 / 3)
    assert confusion.mean_iou == pytest.approx(0.5)
    assert confusion.mean_f1 == pytest.approx(5 / 9)


def test_scores_of_nothing_are_nan_without_a_warning() -> None:
    nothing = Confusion.empty(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = [nothing.accuracy, nothing.mean_iou, nothing.mean_f1, nothing.mean_accuracy, *nothing.iou]
    assert np.isnan(told).all()
    assert nothing.pixels == 0


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int64"])
def test_any_whole_numbers_are_counted(dtype: str) -> None:
    truth, found, valid = maps(3, (30, 20), 3)
    given_dtype = counted(truth.astype(dtype), found.astype("uint16"), 3, valid)
    assert np.array_equal(given_dtype.counts, confusion_matrix(truth[valid], found[valid], labels=range(3)))


@pytest.mark.parametrize("label", [-1, 3, 255])
def test_a_label_that_is_no_class_is_refused_unless_not_valid(label: int) -> None:
    truth, found = np.zeros((4, 5), np.int16), np.zeros((4, 5), np.int16)
    found[2, 3] = label
    confusion = Confusion.empty(3)
    for one, other in ((truth, found), (found, truth)):
        with pytest.raises(InputError, match=f"{label}.*0 to 2"):
            confusion.add(one, other)
        with pytest.raises(InputError, match="3 classes"):
            boundary_counts(one, other, 3, 1.0)
    assert confusion.pixels == 0
    confusion.add(truth, found, found == 0)
    assert confusion.pixels == 19


def test_arrays_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InputError, match="shape"):
        Confusion.empty(2).add(np.zeros((2, 3), int), np.zeros((3, 2), int))
    with pytest.raises(InputError, match="float64"):
        Confusion.empty(2).add(np.zeros((2, 3)), np.zeros((2, 3), int))


# ---- boundaries ----


def brute_boundary(labels, valid, label: int) -> list[tuple[int, int]]:
    """Pixels of a class with a valid side neighbour of another, pixel by pixel."""
    rows, cols = labels.shape
    found = []
    for i, j in itertools.product(range(rows), range(cols)):
        if not valid[i, j] or labels[i, j] != label:
            continue
        sides = [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
        inside = [(a, b) for a, b in sides if 0 <= a < rows and 0 <= b < cols and valid[a, b]]
        if any(labels[place] != label for place in inside):
            found.append((i, j))
    return found


def brute_counts(truth, found, classes: int, tolerance: float, valid) -> dict[str, list[int]]:
    """Every boundary pixel against every one of the other map."""
    said: dict[str, list[int]] = {name: [] for name in COUNTS}
    for label in range(classes):
        edges = [np.array(brute_boundary(values, valid, label)).reshape(-1, 2) for values in (truth, found)]
        apart = np.sqrt(((edges[0][:, None] - edges[1][None]) ** 2).sum(axis=2))
        near = apart <= tolerance
        for name, edge, axis in (("truth", edges[0], 1), ("found", edges[1], 0)):
            said[name].append(len(edge))
            said[f"{name}_hits"].append(int(near.any(axis=axis).sum()))
    return said


def as_lists(counts: BoundaryCounts) -> dict[str, list[int]]:
    return {name: getattr(counts, name).tolist() for name in COUNTS}


SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24))
TOLERANCES = st.one_of(st.integers(0, 6).map(float), st.floats(0, 9), st.integers(0, 60).map(math.sqrt), st.just(100.0))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), SHAPES, st.integers(1, 4), TOLERANCES)
@example(1, (24, 24), 3, 5.0)
def test_boundary_counts_are_those_of_a_brute_force(seed, shape, classes, tolerance) -> None:
    truth, found, valid = maps(seed, shape, classes)
    counts = boundary_counts(truth, found, classes, tolerance, valid)
    assert as_lists(counts) == brute_counts(truth, found, classes, tolerance, valid)


def partition(random: np.random.Generator, shape: tuple[int, int]) -> list[Window]:
    """Windows of random sizes that make up a raster of `shape`."""
    cuts = [
        sorted({0, length, *random.integers(0, length + 1, int(random.integers(0, 4))).tolist()}) for length in shape
    ]
    rows, cols = (list(itertools.pairwise(edges)) for edges in cuts)
    return [Window.of(*row, *col) for row in rows for col in cols]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), SHAPES, TOLERANCES)
def test_any_partition_into_blocks_gives_the_same(seed, shape, tolerance) -> None:
    classes = 3
    truth, found, valid = maps(seed, shape, classes)
    random = np.random.default_rng(seed)
    confusion, counts, margin = Confusion.empty(classes), BoundaryCounts.empty(classes), boundary_margin(tolerance)
    whole = Window.whole(shape)
    for block in random.permutation(np.array(partition(random, shape), dtype=object)):
        own = block.within(whole)
        confusion.add(truth[own], found[own], valid[own])
        seen = Window(block.rows.grow(margin, margin), block.cols.grow(margin, margin)).clip(shape)
        part = seen.within(whole)
        core = block.shift(-seen.rows.start, -seen.cols.start)
        counts.merge(boundary_counts(truth[part], found[part], classes, tolerance, valid[part], core))
    assert np.array_equal(confusion.counts, counted(truth, found, classes, valid).counts)
    assert as_lists(counts) == as_lists(boundary_counts(truth, found, classes, tolerance, valid))


def test_a_shift_within_the_tolerance_is_no_mistake_and_one_beyond_is() -> None:
    truth = np.zeros((40, 40), np.uint8)
    truth[10:30, 10:30] = 1
    for shift, tolerance, perfect in ((3, 3.0, True), (3, 2.9, False), (0, 0.0, True)):
        found = np.roll(truth, shift, 1)
        f1 = boundary_counts(truth, found, 2, tolerance).f1
        assert (f1 == 1).all() == perfect


def test_an_image_counts_the_classes_of_its_truth() -> None:
    # Class 2 is in the prediction only; class 3 has no boundary in either.
    truth = np.zeros((20, 20), np.uint8)
    truth[:, 10:] = 1
    found = truth.copy()
    found[:5, :5] = 2
    counts = boundary_counts(truth, found, 4, 1.0)
    assert counts.f1[2] == 0
    assert np.isnan(counts.f1[3])
    shown = counts.f1_of(counted(truth, found, 4).truth_pixels)
    assert np.isnan(shown[2:]).all()
    assert mean(shown) == pytest.approx(counts.f1[:2].mean())
    precision = counts.found_hits[0] / counts.found[0]
    assert counts.f1[0] == pytest.approx(2 * precision / (precision + 1))


def test_the_edge_of_the_image_and_void_are_no_boundary() -> None:
    labels = np.ones((9, 9), np.uint8)
    assert boundary_counts(labels, labels, 2, 1.0).truth.sum() == 0
    labels[4] = 0
    assert boundary_counts(labels, labels, 2, 1.0, labels == 1).truth.sum() == 0
    assert boundary_counts(labels, labels, 2, 1.0).truth.tolist() == [9, 18]


def test_the_tolerance_of_the_paper() -> None:
    assert default_tolerance((360, 480)) == pytest.approx(0.0075 * 600)


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused(tolerance: float) -> None:
    with pytest.raises(UsageError, match="tolerance"):
        boundary_counts(np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8), 1, tolerance)
