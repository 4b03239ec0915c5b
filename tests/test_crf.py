"""Refinement against plain loops, cut anywhere against whole, and what it does to noise, edges and holes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilepipe.checkpoint import load_model
from tilepipe.crf.cpu import FLOOR, LIMIT
from tilepipe.crf.parameters import KEYS, CrfParameters, parse_crf
from tilepipe.crf.refine import refine, working_bytes
from tilepipe.errors import UsageError
from tilepipe.predict.scores import Array, normalised
from tilepipe.scene.synthetic import synthetic_scene


def brute_force(probabilities: Array, colors: Array, valid: Array | None, p: CrfParameters) -> Array:
    """The module's formula, pixel by pixel in float64."""
    classes, height, width = probabilities.shape
    valid = np.ones((height, width), bool) if valid is None else valid
    prior = np.maximum(probabilities, FLOOR).astype(np.float64)
    beliefs, r = prior.copy(), p.radius
    for _ in range(p.iterations):
        after = probabilities.astype(np.float64)
        for y, x in np.argwhere(valid):
            sums, messages = np.zeros(2), np.zeros((2, classes))
            for v in range(max(0, y - r), min(height, y + r + 1)):
                for u in range(max(0, x - r), min(width, x + r + 1)):
                    if not valid[v, u] or (v, u) == (y, x):
                        continue
                    distance = (v - y) ** 2 + (u - x) ** 2
                    color = ((colors[:, y, x].astype(np.float64) - colors[:, v, u]) ** 2).sum()
                    exponent = distance / (2 * p.appearance_deviation**2) + color / (2 * p.color_deviation**2)
                    kernels = np.exp([-min(exponent, LIMIT), -distance / (2 * p.smoothness_deviation**2)])
                    sums += kernels
                    messages += kernels[:, None] * beliefs[:, v, u]
            weights = np.array([p.appearance_weight, p.smoothness_weight]) / np.where(sums > 0, sums, 1)
            after[:, y, x] = prior[:, y, x] * np.exp(weights @ messages)
            after[:, y, x] /= after[:, y, x].sum()
        beliefs = after
    return beliefs


def random_field(
    rng: np.random.Generator, classes: int, shape: tuple[int, int], dtype: Any = np.float64, bands: int = 2
) -> tuple[Array, Array]:
    """Probabilities, some of them 0, and colours."""
    powers = rng.random((classes, *shape)) ** 3 * (rng.random((classes, *shape)) < 0.9) + 1e-9
    return (powers / powers.sum(axis=0)).astype(dtype), rng.normal(0, 0.6, (bands, *shape)).astype(dtype)


@st.composite
def parameters(draw: st.DrawFn) -> CrfParameters:
    weights, deviations = st.floats(0, 8), st.floats(0.3, 6)
    return CrfParameters(
        iterations=draw(st.integers(1, 3)),
        radius=draw(st.integers(1, 4)),
        appearance_weight=draw(weights),
        appearance_deviation=draw(deviations),
        color_deviation=draw(st.floats(0.05, 2)),
        smoothness_weight=draw(weights),
        smoothness_deviation=draw(deviations),
    )


def mask(rng: np.random.Generator, shape: tuple[int, int], share: float | None) -> Array | None:
    return None if share is None else rng.random(shape) < share


SHARES = st.sampled_from([None, 0.2, 0.8])
SEEDS = st.integers(0, 2**32)


@settings(max_examples=15, deadline=None)
@given(parameters(), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), SHARES, SEEDS)
def test_refined_as_by_brute_force(
    p: CrfParameters, classes: int, height: int, width: int, share: float | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    probabilities, colors = random_field(rng, classes, (height, width), bands=int(rng.integers(1, 5)))
    valid = mask(rng, (height, width), share)
    if valid is not None:
        colors[:, ~valid] = probabilities[:, ~valid] = np.nan  # nobody looks there
    expected = brute_force(probabilities, colors, valid, p)
    refined = refine(probabilities, colors, valid, p)
    assert refined.dtype == np.float64
    np.testing.assert_allclose(refined, expected, rtol=1e-10, atol=1e-12)
    single = refine(probabilities.astype(np.float32), colors.astype(np.float32), valid, p)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(parameters(), st.integers(1, 4), st.booleans(), SHARES, SEEDS)
def test_a_window_grown_by_the_reach_gives_the_bits_of_the_whole(
    p: CrfParameters, classes: int, double: bool, share: float | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = int(rng.integers(1, 40)), int(rng.integers(1, 200))
    probabilities, colors = random_field(rng, classes, shape, np.float64 if double else np.float32)
    valid = mask(rng, shape, share)
    whole = refine(probabilities, colors, valid, p)
    (top, bottom), (left, right) = (sorted(rng.integers(0, n + 1, 2)) for n in shape)
    y, x = max(0, top - p.reach), max(0, left - p.reach)
    grown = slice(y, bottom + p.reach), slice(x, right + p.reach)
    part = refine(probabilities[:, *grown], colors[:, *grown], None if valid is None else valid[grown], p)
    np.testing.assert_array_equal(part[:, top - y : bottom - y, left - x : right - x], whole[:, top:bottom, left:right])


@pytest.mark.parametrize("axis", [1, 2])
def test_the_reach_is_not_wider_than_what_a_pixel_depends_on(axis: int) -> None:
    p = CrfParameters(iterations=3, radius=2, appearance_deviation=5, smoothness_deviation=5)
    probabilities, colors = random_field(np.random.default_rng(0), 3, (23, 23))
    before = refine(probabilities, colors, None, p)
    probabilities = np.moveaxis(probabilities, axis, 1)
    probabilities[:, 11] = probabilities[::-1, 11]
    after = refine(np.moveaxis(probabilities, 1, axis), colors, None, p)
    changed = np.nonzero((before != after).any(axis=(0, 3 - axis)))[0]
    assert (changed[0], changed[-1]) == (11 - p.reach, 11 + p.reach) == (5, 17)


def test_alike_everywhere_stays_alike_and_undecided_stays_undecided() -> None:
    _, colors = random_field(np.random.default_rng(1), 3, (20, 30))
    even = np.full((4, 20, 30), 0.25)
    np.testing.assert_allclose(refine(even, colors, None, CrfParameters()), even, rtol=1e-12)
    constant = np.broadcast_to(np.array([0.2, 0.5, 0.3])[:, None, None], (3, 20, 30))
    refined = refine(
        constant, colors, mask(np.random.default_rng(2), (20, 30), 0.9), replace(CrfParameters(), radius=2)
    )
    assert (refined.argmax(axis=0) == 1).all()


def test_without_weights_nothing_happens() -> None:
    probabilities, colors = random_field(np.random.default_rng(3), 3, (9, 9))
    refined = refine(probabilities, colors, None, CrfParameters(appearance_weight=0, smoothness_weight=0))
    np.testing.assert_allclose(refined, np.maximum(probabilities, FLOOR), atol=3 * FLOOR)


def test_a_wrong_pixel_within_one_colour_is_put_right() -> None:
    probabilities = np.full((2, 15, 15), 0.1, np.float32)
    probabilities[0] = 0.9
    probabilities[:, 7, 7] = 0.2, 0.8
    colors = np.zeros((3, 15, 15), np.float32)
    assert probabilities.argmax(axis=0)[7, 7] == 1
    assert (refine(probabilities, colors, None, CrfParameters()).argmax(axis=0) == 0).all()


def halves(dtype: Any = np.float64) -> Array:
    """Two classes: sure of the first on the left of column 10, and a slight leaning to the second on its right."""
    probabilities = np.empty((2, 12, 21), dtype)
    probabilities[0], probabilities[1] = 0.45, 0.55
    probabilities[:, :, :10] = np.array([0.99, 0.01])[:, None, None]
    return probabilities


def test_nothing_passes_a_wall_without_data() -> None:
    p = CrfParameters(radius=4, iterations=8, smoothness_weight=2, appearance_weight=6)
    probabilities, colors = halves(), np.zeros((1, 12, 21))
    valid = np.ones((12, 21), bool)
    valid[:, 10:14] = False
    refined = refine(probabilities, colors, valid, p)
    np.testing.assert_array_equal(refined[:, ~valid], probabilities[:, ~valid])
    alone = refine(probabilities[:, :, 14:].copy(), colors[:, :, 14:].copy(), None, p)
    np.testing.assert_array_equal(refined[:, :, 14:], alone)
    valid[:, 13] = True
    assert (refine(probabilities, colors, valid, p)[:, :, 14:] != alone).any(), "three columns are within the radius"


def test_little_passes_a_strong_edge_of_colour() -> None:
    p = CrfParameters(smoothness_weight=0)
    edge = np.zeros((1, 12, 21))
    edge[:, :, 10:] = 5
    kept = refine(halves(), edge, None, p)
    assert (kept.argmax(axis=0)[:, 10:] == 1).all()
    assert (refine(halves(), np.zeros((1, 12, 21)), None, p).argmax(axis=0)[:, 10] == 0).all()


def test_it_works_in_the_memory_it_says() -> None:
    tracemalloc = pytest.importorskip("tracemalloc")
    p = CrfParameters(iterations=2, radius=3)
    probabilities, colors = random_field(np.random.default_rng(4), 3, (300, 120), np.float32, 3)
    refine(probabilities[:, :9], colors[:, :9], None, p)
    probabilities, colors = np.ascontiguousarray(probabilities), np.ascontiguousarray(colors)
    tracemalloc.start()
    refine(probabilities, colors, None, p)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    told = probabilities.nbytes + working_bytes(3, 120, 4, p)
    assert told <= peak <= told + 200_000
    assert working_bytes(3, 120, 8, p) == 2 * working_bytes(3, 120, 4, p)


def test_parsing() -> None:
    assert parse_crf("crf") == CrfParameters()
    assert parse_crf("crf:iterations=3, radius=4,color=0.2") == CrfParameters(
        iterations=3, radius=4, color_deviation=0.2
    )
    p = parse_crf("crf:" + ",".join(f"{key}={n}" for n, key in enumerate(KEYS, start=1)))
    assert list(p.to_json().values()) == [1, 2, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert CrfParameters(**p.to_json()) == p
    assert p.reach == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("dense", "'dense' is not known; use crf"),
        ("crf:", "'' in 'crf:' is not known; use each of iterations, radius"),
        ("crf:colour=1", "'colour' in .* is not known; .*color"),
        ("crf:radius=2,radius=3", "'radius' in .* is given twice"),
        ("crf:radius=2.5", "'2.5' for radius .* is not a whole number"),
        ("crf:color=blue", "'blue' for color .* is not a number"),
        ("crf:radius=0", "radius 0 is not legal; use a whole number from 1 to 32"),
        ("crf:iterations=101", "iterations 101 is not legal; use a whole number from 1 to 100"),
        ("crf:appearance=-1", "appearance_weight -1.0 is not legal; use a finite number of at least 0"),
        ("crf:smoothness=inf", "smoothness_weight inf is not legal"),
        ("crf:color=nan", "color_deviation nan is not legal; use a finite number of at least 0.001"),
        ("crf:position=0", "appearance_deviation 0.0 is not legal; use a finite number of at least 0.1"),
    ],
)
def test_parameters_that_are_not_legal(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        parse_crf(text)
    assert "\n" not in str(caught.value)


def test_cuda_kernels_in_the_simulator() -> None:
    """Runs tests/crf_simulator.py, since numba's simulator must be chosen before numba is imported."""
    script = Path(__file__).with_name("crf_simulator.py")
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["agreement", "cuts", "memory"]


def mean_iou(labels: Array, truth: Array, classes: int) -> float:
    """The mean of intersection over union of the classes that the truth has."""
    shares = []
    for c in range(classes):
        found, there = (labels == c) & (truth < classes), truth == c
        if there.any():
            shares.append((found & there).sum() / (found | there).sum())
    return float(np.mean(shares))


def test_the_bundled_model_gains() -> None:
    """Mean intersection over union of its labels and of the refined ones, on a scene that it was not trained on."""
    model, scene = load_model("synthetic-landcover"), synthetic_scene((320, 320), seed=3)
    colors = normalised(scene.image, None, model.card.mean, model.card.std, "float32")
    with torch.inference_mode():
        probabilities = torch.softmax(model.network.eval()(torch.from_numpy(colors)[None])[0], 0).numpy()
    before = mean_iou(probabilities.argmax(axis=0), scene.labels, 6)
    after = mean_iou(refine(probabilities, colors, None, CrfParameters()).argmax(axis=0), scene.labels, 6)
    assert before > 0.8
    assert after > before + 0.02


@pytest.mark.parametrize("area", ["1_1", "2_1", "4_1"])
def test_noisy_maps_of_real_buildings_gain(area: str) -> None:
    folder = os.environ.get("TILEPIPE_TEST_DATA")
    if folder is None:
        pytest.skip("set TILEPIPE_TEST_DATA to the folder of real rasters")
    rasters = [Path(folder) / "buildings" / f"area{area}_{kind}.tif" for kind in ("rgb", "label")]
    image, truth = [rasterio.open(path).read()[:, 600:856, 600:856] for path in rasters]
    colors = normalised(image[:3], None, *zip(*((b.mean(), b.std()) for b in image[:3]), strict=True), "float32")
    rng = np.random.default_rng(0)
    sure = np.stack([truth[0] == c for c in (0, 1)]) * np.float32(1.5)
    scores = sure + rng.normal(0, 1, sure.shape)
    probabilities = scipy.special.softmax(scores, axis=0).astype(np.float32)
    before = mean_iou(probabilities.argmax(axis=0), truth[0], 2)
    refined = refine(probabilities, colors, None, CrfParameters())
    assert mean_iou(refined.argmax(axis=0), truth[0], 2) > before + 0.1
