"""Combining against numpy and scipy, and against the maps of a single model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from tilepipe.combine import combine, maps_of, match_classes, softmax_in_place
from tilepipe.errors import ModelError, UsageError
from tilepipe.predict.maps import BlockMaps, Wanted
from tilepipe.predict.scores import Array, Patch, score_maps

SEEDS = st.integers(0, 2**32)
DTYPES = st.sampled_from([np.float32, np.float64])


def scores_of(rng: np.random.Generator, classes: int, dtype: Any, scale: float = 3) -> Array:
    return rng.normal(0, scale, (classes, int(rng.integers(1, 5)), int(rng.integers(1, 300)))).astype(dtype)


def test_classes_are_matched_by_name() -> None:
    assert match_classes([("a", "b", "c")]) == ((0, 1, 2),)
    assert match_classes([("a", "b", "c"), ("c", "a", "b"), ("a", "b", "c")]) == ((0, 1, 2), (1, 2, 0), (0, 1, 2))


@pytest.mark.parametrize(
    ("cards", "told"),
    [
        ([("a", "b"), ("a", "c")], 'model 2 lacks "b" and has "c" instead; .* of the first: "a", "b"'),
        ([("a", "b"), ("b", "a"), ("a",)], 'model 3 lacks "b"; '),
        ([("a", "b"), ("c", "b", "a")], 'model 2 has "c" too; '),
        ([("a", "b", "a")], 'model 1 names "a" more than once'),
        ([("a",), [f"x{n}" for n in range(40)]], '"x11" and 28 more instead; '),
    ],
)
def test_classes_that_differ_are_named(cards: list[tuple[str, ...]], told: str) -> None:
    with pytest.raises(ModelError, match=told) as caught:
        match_classes(cards)
    assert "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), DTYPES, SEEDS)
def test_softmax_in_its_own_precision(classes: int, dtype: Any, seed: int) -> None:
    scores = scores_of(np.random.default_rng(seed), classes, dtype, 20)
    expected = scipy.special.softmax(scores.astype(np.float64), axis=0)
    found = softmax_in_place(scores)
    assert found is scores
    np.testing.assert_allclose(found, expected, rtol=1e-12 if dtype == np.float64 else 2e-5, atol=1e-37)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), SEEDS)
def test_one_model_alone_has_the_maps_it_had(classes: int, seed: int) -> None:
    """Labels, confidence and probabilities are those that `score_maps` makes of its scores, to the last bit."""
    scores = scores_of(np.random.default_rng(seed), classes, np.float32)
    shape, wanted = scores.shape[1:], Wanted(confidence=True, probabilities="float32")
    before = BlockMaps.unfilled(shape, classes, wanted)
    score_maps(scores, False, Patch(0, 0, 0, 0, *shape), None, *before[:3], wanted.scale)
    keep = np.random.default_rng(seed).random(shape) < 0.8
    before = before.finished(keep, classes, wanted)
    alone = combine([softmax_in_place(scores)], [tuple(range(classes))], "mean")
    after = maps_of(alone, keep, wanted)
    for a, b in zip(before[:3], after[:3], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from(["mean", "max"]), DTYPES, SEEDS)
def test_members_are_combined_as_numpy_does(classes: int, count: int, how: Any, dtype: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = softmax_in_place(scores_of(rng, classes, dtype))
    members = [first, *(rng.dirichlet(np.ones(classes), first.shape[1:]).transpose(2, 0, 1) for _ in range(count - 1))]
    members = [np.ascontiguousarray(m, dtype) for m in members]
    orders = [tuple(rng.permutation(classes).tolist()) for _ in members]
    sorted_ = np.stack([m[list(order)] for m, order in zip(members, orders, strict=True)]).astype(np.float64)
    expected = sorted_.mean(axis=0) if how == "mean" else sorted_.max(axis=0)
    expected /= expected.sum(axis=0)
    found = combine(members, orders, how)
    assert found.dtype == dtype
    tight = 1e-14 if dtype == np.float64 else 5e-6
    np.testing.assert_allclose(found, expected, rtol=tight, atol=tight)


def test_a_pixel_gets_the_same_bits_wherever_it_lies() -> None:
    rng = np.random.default_rng(7)
    pixels = [np.broadcast_to(rng.normal(size=(5, 1, 1)), (5, 3, 217)).astype(np.float32) for _ in range(3)]
    for how in ("mean", "max"):
        found = combine([softmax_in_place(p.copy()) for p in pixels], [(0, 1, 2, 3, 4)] * 3, how)  # type: ignore[arg-type]
        assert (found == found[:, :1, :1]).all()


def test_pixels_without_data_disturb_no_other() -> None:
    rng = np.random.default_rng(9)
    scores = [rng.normal(size=(3, 2, 140)).astype(np.float32) for _ in range(2)]
    keep = rng.random((2, 140)) < 0.5
    holes = [np.where(keep, s, np.float32(np.nan)) for s in scores]
    for how in ("mean", "max"):
        made = [
            maps_of(combine([softmax_in_place(s.copy()) for s in given], [(0, 1, 2)] * 2, how), keep, Wanted(True))  # type: ignore[arg-type]
            for given in (scores, holes)
        ]
        np.testing.assert_array_equal(made[0].labels, made[1].labels)
        np.testing.assert_array_equal(made[0].confidence, made[1].confidence)


def test_other_ways_of_combining_are_refused() -> None:
    with pytest.raises(UsageError, match="'median' is not known; use mean or max"):
        combine([np.ones((1, 1, 1))], [(0,)], "median")  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), DTYPES, SEEDS)
def test_maps_of_probabilities(classes: int, dtype: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.integers(0, 3, (classes, 4, 50)).astype(dtype)  # ties are common
    probabilities /= np.maximum(probabilities.sum(axis=0), 1)
    keep = rng.random((4, 50)) < 0.7
    maps = maps_of(probabilities, keep, Wanted(confidence=True, probabilities="uint8"))
    np.testing.assert_array_equal(maps.labels, np.where(keep, probabilities.argmax(axis=0), 255))
    assert (maps.confidence[~keep] == 255).all()
    assert (maps.probabilities[:, ~keep] == 255).all()
    np.testing.assert_allclose(maps.confidence[keep], probabilities.max(axis=0)[keep] * 254, atol=0.501)
    np.testing.assert_allclose(maps.probabilities[:, keep], probabilities[:, keep] * 254, atol=0.501)
    bare = maps_of(probabilities, None, Wanted())
    np.testing.assert_array_equal(bare.labels, probabilities.argmax(axis=0))
    assert bare.confidence is None
    assert bare.probabilities is None


def test_more_than_255_classes() -> None:
    probabilities = np.random.default_rng(8).random((300, 2, 3))
    maps = maps_of(probabilities, np.array([[True] * 3, [False] * 3]), Wanted())
    assert maps.labels.dtype == np.uint16
    np.testing.assert_array_equal(maps.labels[0], probabilities.argmax(axis=0)[0])
    assert (maps.labels[1] == 65535).all()
