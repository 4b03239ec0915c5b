"""Kernels against plain numpy; the CUDA ones, in numba's simulator, against the CPU's."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilepipe.errors import ModelError, UsageError
from tilepipe.predict.blend import WINDOWS, Strip, accumulate, finish, window_weights
from tilepipe.predict.scores import (
    Array,
    Patch,
    label_dtype,
    label_nodata,
    label_pixels,
    normalise,
    normalise_last,
    normalised,
    score_maps,
    statistics_of,
)
from tilepipe.predict.softmax import exponentials
from tilepipe.predict.transpose import planes_of

UINT8 = (254.0, 0.5)


def test_exponentials() -> None:
    x = np.linspace(-95, 0, 300_001).astype(np.float32)
    found = x.copy()
    exponentials(found)
    expected = np.exp(np.maximum(x, np.float32(-87)).astype(np.float64))
    assert found[-1] == 1
    np.testing.assert_allclose(found, expected, rtol=2e-7)
    # Quiet and signalling, of both signs, with something in the bits that tell them apart.
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7FC00001, 0xFFC001FF, 0x7F800001], np.uint32).view(np.float32)
    exponentials(nans)
    assert np.isnan(nans).all()


def planes(strip: Strip) -> Array:
    """A view of the sums, (classes, rows, columns)."""
    return strip.sums[..., : strip.weights.shape[1]].transpose(1, 0, 2)


def softmax(scores: Array) -> Array:
    powers = np.exp(scores.astype(np.float64) - scores.max(axis=0))
    return powers / powers.sum(axis=0)


@st.composite
def crops(draw: st.DrawFn, dtype: Any = np.float32) -> tuple[Array, Patch, tuple[int, int]]:
    """Scores (classes, h, w) with ties, a patch of them, and the shape of the block that it goes to."""
    classes = draw(st.integers(1, 11))
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 300))
    row, col = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    rows, cols = draw(st.integers(1, height - row)), draw(st.integers(1, width - col))
    to_row, to_col = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scores = rng.integers(-6, 7, (classes, height, width)).astype(dtype)
    if draw(st.booleans()):
        scores += rng.standard_normal(scores.shape).astype(dtype)
    return scores, Patch(row, col, to_row, to_col, rows, cols), (to_row + rows + 1, to_col + cols + 2)


def cropped(scores: Array, patch: Patch) -> Array:
    return scores[:, patch.row : patch.row + patch.height, patch.col : patch.col + patch.width]


def target(patch: Patch) -> tuple[slice, slice]:
    return (
        slice(patch.to_row, patch.to_row + patch.height),
        slice(patch.to_col, patch.to_col + patch.width),
    )


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (64, 33)])
def test_window_is_positive_symmetric_and_separable(kind: str, shape: tuple[int, int]) -> None:
    weights = window_weights(kind, shape)
    assert weights.shape == shape
    assert weights.dtype == np.float32
    assert 0 < weights.min() <= weights.max() <= 1
    np.testing.assert_allclose(weights, weights[::-1, ::-1], rtol=1e-6)
    np.testing.assert_allclose(weights * weights[0, 0], np.outer(weights[:, 0], weights[0]), rtol=1e-5)


def test_window_refuses_what_it_does_not_know() -> None:
    with pytest.raises(UsageError, match="hann, gaussian, pyramid, flat"):
        window_weights("hamming", (4, 4))
    with pytest.raises(UsageError, match="at least 1 x 1"):
        window_weights("hann", (0, 4))


def test_label_types() -> None:
    assert (label_dtype(255), label_nodata(255)) == (np.uint8, 255)
    assert (label_dtype(256), label_nodata(256)) == (np.uint16, 65535)
    with pytest.raises(UsageError, match="65535"):
        label_dtype(65536)


@settings(max_examples=60, deadline=None)
@given(crops() | crops(np.float64), st.booleans())
def test_labels_are_the_lowest_best_class(crop: tuple[Array, Patch, tuple[int, int]], last: bool) -> None:
    scores, patch, shape = crop
    labels = np.full(shape, 77, np.uint8)
    laid_out = np.ascontiguousarray(scores.transpose(1, 2, 0)) if last else scores
    undefined = label_pixels(laid_out, last, patch, None, labels)
    expected = np.full(shape, 77, np.uint8)
    expected[target(patch)] = cropped(scores, patch).argmax(axis=0)
    np.testing.assert_array_equal(labels, expected)
    assert undefined == 0


def test_labels_above_255_classes() -> None:
    scores = np.random.default_rng(0).standard_normal((700, 3, 40)).astype(np.float32)
    labels = np.zeros((3, 40), np.uint16)
    label_pixels(scores, False, Patch(0, 0, 0, 0, 3, 40), None, labels)
    np.testing.assert_array_equal(labels, scores.argmax(axis=0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
def test_planes_are_the_transposed_values(dtype: Any) -> None:
    for pixels in (1, 3, 4, 7, 64):
        for channels in (1, 2, 3, 4, 5, 7, 8, 12, 13):
            values = np.arange(pixels * channels).astype(dtype).reshape(pixels, channels)
            planes = np.full((channels, 64), 3, dtype)
            planes_of(values, planes)
            np.testing.assert_array_equal(planes[:, :pixels], values.T)
            assert (planes[:, pixels:] == 3).all()


@pytest.mark.parametrize("last", [False, True])
def test_undefined_pixels_are_counted_where_they_are_kept(last: bool) -> None:
    scores = np.random.default_rng(1).standard_normal((6, 5, 150)).astype(np.float32)
    scores[3, 1, 140] = np.nan
    scores[0, 2, 7] = np.nan
    scores[:, 3, 9] = -np.inf
    scores[5, 4, 11] = np.inf
    scores[2, 4, 12] = -np.inf  # one class is ruled out: the others decide
    scores[:, 4, 13] = 3e38  # their sum overflows, their maximum does not
    kept = np.ones((5, 150), bool)
    kept[2, 7] = False
    patch = Patch(0, 0, 0, 0, 5, 150)
    labels = np.zeros((5, 150), np.uint8)
    given_scores = np.ascontiguousarray(scores.transpose(1, 2, 0)) if last else scores
    for keep, expected in ((None, 4), (kept, 3)):
        assert label_pixels(given_scores, last, patch, keep, labels) == expected
        assert score_maps(given_scores, last, patch, keep, labels, None, None, UINT8) == expected
        strip = Strip.empty(6, 5, 150)
        assert accumulate(given_scores, last, patch, keep, np.ones((5, 150), np.float32), strip) == expected


@settings(max_examples=50, deadline=None)
@given(crops(), st.booleans(), st.sampled_from([np.uint8, np.float32]))
def test_confidence_and_probabilities_are_softmax(
    crop: tuple[Array, Patch, tuple[int, int]], last: bool, kind: Any
) -> None:
    scores, patch, shape = crop
    labels = np.full(shape, 77, np.uint8)
    confidence = np.full(shape, 77, np.uint8)
    probabilities = np.zeros((len(scores), *shape), kind)
    given_scores = np.ascontiguousarray(scores.transpose(1, 2, 0)) if last else scores
    scale = UINT8 if kind == np.uint8 else (1.0, 0.0)
    assert score_maps(given_scores, last, patch, None, labels, confidence, probabilities, scale) == 0
    inside, expected = target(patch), softmax(cropped(scores, patch))
    np.testing.assert_array_equal(labels[inside], cropped(scores, patch).argmax(axis=0))
    if kind == np.float32:
        np.testing.assert_allclose(probabilities[:, *inside], expected, atol=1e-6)
    else:
        np.testing.assert_allclose(probabilities[:, *inside], expected * 254, atol=0.501)
    np.testing.assert_allclose(confidence[inside], expected.max(axis=0) * 254, atol=0.501)
    outside = np.ones(shape, bool)
    outside[inside] = False
    assert (confidence[outside] == 77).all()


def test_a_pixel_gets_the_same_bits_wherever_it_lies() -> None:
    pixel = np.random.default_rng(2).standard_normal((9, 1, 1)).astype(np.float32) * 4
    scores = np.broadcast_to(pixel, (9, 3, 211)).copy()
    probabilities = np.zeros((9, 3, 211), np.float32)
    score_maps(
        scores, False, Patch(0, 0, 0, 0, 3, 211), None, np.zeros((3, 211), np.uint8), None, probabilities, (1, 0)
    )
    assert (probabilities == probabilities[:, :1, :1]).all()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([np.uint8, np.float64]),
    st.integers(1, 5),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from(["float32", "float64"]),
    st.integers(0, 2**32),
)
def test_normalised_pixels(kind: Any, bands: int, width: int, masked: bool, precision: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 200, (bands, 9, width + 3)).astype(kind)
    valid = rng.random((9, width + 3)) < 0.7 if masked else None
    if valid is not None and np.issubdtype(kind, np.floating):
        values[:, ~valid] = np.nan
    mean, std = rng.uniform(0, 100, bands), rng.uniform(0.5, 70, bands)
    whole = normalised(values, valid, mean.tolist(), std.tolist(), precision)
    expected = (values.astype(np.float64) - mean[:, None, None]) / std[:, None, None]
    if valid is not None:
        expected[:, ~valid] = 0
    assert whole.dtype == precision
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-4 if precision == "float32" else 1e-12)

    statistics = statistics_of(mean.tolist(), std.tolist(), precision)
    planar, last = np.empty((bands, 4, width), precision), np.empty((4, width, bands), precision)
    normalise(values, valid, (2, 3), *statistics, planar)
    normalise_last(values, valid, (2, 3), *statistics, last)
    np.testing.assert_array_equal(planar, whole[:, 2:6, 3:])
    np.testing.assert_array_equal(last.transpose(2, 0, 1), planar)


@pytest.mark.parametrize(("mean", "std"), [((1.0,), (0.0,)), ((1.0, 2.0), (1.0,)), ((np.nan,), (1.0,)), ((), ())])
def test_statistics_that_do_not_serve(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ModelError, match="one finite pair a band, std above 0"):
        statistics_of(mean, std, "float32")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 4), st.booleans(), st.integers(0, 2**32))
def test_blending_sums_probabilities(classes: int, tiles: int, last: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width, tile = 7, 160, (5, 140)
    strip, weights = Strip.empty(classes, height, width), window_weights("hann", tile)
    sums, total = np.zeros((classes, height, width)), np.zeros((height, width))
    votes: list[Array] = []
    for _ in range(tiles):
        scores = rng.normal(0, 3, (classes, *tile)).astype(np.float32)
        patch = Patch(1, 3, int(rng.integers(0, 4)), int(rng.integers(0, 30)), 4, 130)
        given_scores = np.ascontiguousarray(scores.transpose(1, 2, 0)) if last else scores
        accumulate(given_scores, last, patch, None, weights, strip)
        sums[:, *target(patch)] += softmax(cropped(scores, patch)) * weights[1:5, 3:133]
        total[target(patch)] += weights[1:5, 3:133]
        votes.append(np.full((height, width), -1))
        votes[-1][target(patch)] = cropped(scores, patch).argmax(axis=0)
    np.testing.assert_allclose(planes(strip), sums, atol=1e-5)
    np.testing.assert_allclose(strip.weights, total, atol=1e-5)

    kept = rng.random((height + 2, width)) < 0.8
    labels, confidence = np.zeros((height + 2, width), np.uint8), np.zeros((height + 2, width), np.uint8)
    probabilities = np.zeros((classes, height + 2, width), np.float32)
    found = finish(strip, (2, height + 2), kept, labels, confidence, probabilities, (1.0, 0.0))
    stack = np.stack(votes)
    count, lowest = (stack >= 0).sum(axis=0), np.where(stack < 0, classes, stack).min(axis=0)
    differ = (count >= 2) & (stack.max(axis=0) != lowest)
    inside = kept[2:]
    assert found == tuple(int((which & inside).sum()) for which in (count >= 2, differ, count == 0))
    covered = count > 0
    expected = sums / np.where(covered, total, 1)
    np.testing.assert_allclose(probabilities[:, 2:][:, covered], expected[:, covered], atol=1e-5)
    np.testing.assert_array_equal(labels[2:], planes(strip).argmax(axis=0))
    np.testing.assert_allclose(confidence[2:][covered], expected.max(axis=0)[covered] * 254, atol=0.51)


def test_strip_advances() -> None:
    strip = Strip.empty(2, 4, 3)
    planes(strip)[:] = np.arange(24).reshape(2, 4, 3)
    strip.seen[:] = 1
    strip.advance(3)
    np.testing.assert_array_equal(planes(strip)[:, 0], [[9, 10, 11], [21, 22, 23]])
    assert not strip.sums[1:].any()
    assert strip.seen.sum() == 3
    strip.advance(9)
    assert not any(array.any() for array in strip)


def test_cuda_kernels_in_the_simulator() -> None:
    """Runs tests/cuda_simulator.py, since numba's simulator must be chosen before numba is imported."""
    script = os.path.join(os.path.dirname(__file__), "cuda_simulator.py")
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["maps", "exact", "blend", "memory", "check", "room"]
