"""Which windows are drawn: everywhere alike likely, on objects, on candidates; each from its number alone."""

from __future__ import annotations

import math
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasters import noise, real_data, write
from scipy import ndimage, stats

from tilepipe.errors import InputError, UsageError
from tilepipe.training import objects as objects_module
from tilepipe.training.objects import CandidateDraws, Object, ObjectDraws, candidate, find_objects
from tilepipe.training.pairs import open_pairs
from tilepipe.training.samples import Sample, pair_folders
from tilepipe.training.windows import Augmentation, UniformDraws, random_of
from tilepipe.window import Window

PLAIN = Augmentation((3, 4))


def is_even(counts, expected=None):
    """Whether a chi-square test lets counts pass for draws of these chances; seeds are fixed, so it is repeatable."""
    return stats.chisquare(list(counts), expected).pvalue > 1e-3


# ---- anywhere --------------------------------------------------------------------------------------------------


def test_every_place_is_alike_likely():
    draws = UniformDraws(((7, 9),), PLAIN, seed=5)
    places = Counter(draws(index).window for index in range(6000))
    assert set(places) == {Window.of(row, row + 3, col, col + 4) for row in range(5) for col in range(6)}
    assert is_even(places.values())


def test_images_are_drawn_by_their_pixels():
    shapes = ((10, 10), (30, 20), (3, 4), (20, 20))
    draws = UniformDraws(shapes, PLAIN, seed=1)
    drawn = Counter(draws(index).pair for index in range(4000))
    areas = np.array([rows * cols for rows, cols in shapes])
    assert is_even([drawn[pair] for pair in range(4)], 4000 * areas / areas.sum())


def test_an_image_smaller_than_the_window_lies_in_it_anywhere():
    draws = UniformDraws(((5, 40),), Augmentation((8, 8)), seed=0)
    windows = [draws(index).window for index in range(2000)]
    assert all(window.shape == (8, 8) and 0 <= window.cols.start <= 32 for window in windows)
    starts = Counter(window.rows.start for window in windows)
    assert set(starts) == {-3, -2, -1, 0}
    assert is_even(starts.values())


def test_scales_are_even_in_their_logarithm():
    draws = UniformDraws(((5000, 5000),), Augmentation((100, 200), scales=(0.5, 8)), seed=2)
    shapes = np.array([draws(index).window.shape for index in range(3000)])
    assert np.abs(shapes[:, 1] - 2 * shapes[:, 0]).max() <= 1
    scales = np.log(shapes[:, 1] / 200) / math.log(2)
    assert is_even(np.histogram(scales, 8, (-1.01, 3.01))[0])


@pytest.mark.parametrize(("flips", "expected"), [("none", 1), ("horizontal", 2), ("d4", 8)])
def test_flips_are_alike_likely(flips, expected):
    draws = UniformDraws(((50, 50),), Augmentation((3, 4), flips), seed=3)
    drawn = [draws(index) for index in range(2000)]
    ways = Counter((draw.turns, draw.mirrored) for draw in drawn)
    assert len(ways) == expected
    assert expected == 1 or is_even(ways.values())
    assert all(draw.window.shape == ((4, 3) if draw.turns % 2 else (3, 4)) for draw in drawn)


def test_angles():
    draws = UniformDraws(((50, 50),), Augmentation((3, 4), rotate=30), seed=3)
    assert is_even(np.histogram([draws(index).angle for index in range(2000)], 10, (-30, 30))[0])
    assert UniformDraws(((50, 50),), PLAIN, seed=3)(0).angle == 0


def test_a_draw_is_a_function_of_seed_number_and_attempt():
    augmentation = Augmentation((3, 4), "d4", 20, (0.5, 2), 0.1)
    draws = UniformDraws(((90, 90), (80, 70)), augmentation, seed=7)
    drawn = [draws(index) for index in range(300)]
    assert [pickle.loads(pickle.dumps(draws))(index) for index in reversed(range(300))] == drawn[::-1]
    others = [draws(index, 1) for index in range(300)]
    others += [UniformDraws(draws.shapes, augmentation, 8)(index) for index in range(300)]
    assert len({draw.seed for draw in drawn + others}) == 900
    assert random_of(2**62, 2**40, 3).integers(9) in range(9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 4),), "a crop of 0 x 4 is not legal"),
        (((3, 4), "vertical"), "flips 'vertical' are unknown; legal are none, horizontal, d4"),
        (((3, 4), "d4", 181), "a rotation of 181 degrees is not legal"),
        (((3, 4), "d4", 0, (2, 1)), "scales 2,1 are not legal"),
        (((3, 4), "d4", 0, (0, 1)), "scales 0,1 are not legal"),
        (((3, 4), "d4", 0, (1, 1), 1.5), "a jitter of 1.5 is not legal"),
    ],
)
def test_augmentations_that_cannot_be(arguments, message):
    with pytest.raises(UsageError, match=message):
        Augmentation(*arguments)


# ---- objects ---------------------------------------------------------------------------------------------------


def pair_of(folder, labels, name="a", **options):
    write(folder / f"{name}.tif", noise((1, *labels.shape)))
    write(folder / f"{name}_label.tif", labels[None].astype(np.uint8), **options)
    return Sample(str(folder / f"{name}.tif"), str(folder / f"{name}_label.tif"))


def by_brute_force(labels, number, classes, smallest):
    """Objects by labelling whole rasters at once."""
    found = set()
    for label in classes:
        parts, count = ndimage.label(labels == label, np.ones((3, 3)))
        for part in range(1, count + 1):
            rows, cols = np.nonzero(parts == part)
            if len(rows) >= smallest:
                box = Window.of(int(rows.min()), int(rows.max()) + 1, int(cols.min()), int(cols.max()) + 1)
                found.add(Object(number, label, box, len(rows)))
    return found


@pytest.mark.parametrize("strip", [1, 60, 1 << 22])
@pytest.mark.parametrize(("classes", "smallest"), [(3, 1), (2, 5)])
def test_objects_are_whole_components_however_they_are_read(tmp_path, monkeypatch, strip, classes, smallest):
    monkeypatch.setattr(objects_module, "STRIP_AREA", strip)
    random = np.random.default_rng(strip + classes)
    rasters = [random.integers(0, classes, shape) for shape in ((30, 20), (25, 31))]
    rasters[0][5:9] = 0  # a strip without any object
    pairs = open_pairs([pair_of(tmp_path, raster, f"n{n}") for n, raster in enumerate(rasters)])
    found = find_objects(pairs, classes, smallest=smallest)
    expected = [by_brute_force(raster, n, range(1, classes), smallest) for n, raster in enumerate(rasters)]
    assert set(found) == expected[0] | expected[1]
    assert len(found) == len(set(found))
    assert set(find_objects(pairs, classes, background=(1,), smallest=smallest)) == {
        one
        for n, raster in enumerate(rasters)
        for one in by_brute_force(raster, n, set(range(classes)) - {1}, smallest)
    }


def test_objects_of_void_and_of_nothing(tmp_path):
    labels = np.zeros((30, 30))
    labels[2:12, 3:13], labels[15:25, 3:13] = 1, 9
    pairs = open_pairs([pair_of(tmp_path, labels)])
    assert find_objects(pairs, 2, (9,)) == (Object(0, 1, Window.of(2, 12, 3, 13), 100),)
    with pytest.raises(InputError, match="no class but the background has an object of 101 pixels or more"):
        find_objects(pairs, 2, (9,), smallest=101)
    with pytest.raises(InputError, match="has the label 9 at row 15, column 3"):
        find_objects(pairs, 2)
    with pytest.raises(UsageError, match="there is no object to draw"):
        ObjectDraws((), ((3, 3),), PLAIN, 0)


BOX = Window.of(100, 140, 300, 320)


def draws_of(*boxes, kind=ObjectDraws, augmentation=None, shape=(1000, 1000), **options):
    objects = tuple(Object(0, 1, box, 64) for box in boxes)
    return kind(objects, (shape,), augmentation or Augmentation((32, 48)), 4, **options)


def test_windows_are_centred_on_objects_with_a_margin():
    # Rows decide: 40 x 1.2 = 48 rows are 1.5 crops, and so many columns are 72.
    assert draws_of(BOX)(0).window == Window.of(96, 144, 274, 346)
    # Columns decide: 20 x 3 = 60 of 48, where rows are few.
    assert draws_of(Window.of(119, 121, 300, 320), margin=3)(0).window == Window.of(100, 140, 280, 340)
    turned = draws_of(BOX, augmentation=Augmentation((32, 48), "d4"))
    assert {turned(index).window.shape for index in range(50)} == {(48, 72), (48, 32)}


def test_the_zoom_is_bounded():
    assert draws_of(Window.of(100, 102, 300, 302))(0).window == Window.of(97, 105, 295, 307)
    large = draws_of(Window.of(100, 500, 0, 1000), zoom=(0.5, 2))
    windows = [large(index).window for index in range(500)]
    assert {window.shape for window in windows} == {(64, 96)}
    assert all(Window.of(100, 500, 0, 1000).contains(window) for window in windows)
    assert is_even(np.histogram([window.rows.start for window in windows], 6, (100, 437))[0])


def test_windows_are_moved_into_the_raster():
    corner = Window.of(0, 40, 980, 1000)
    assert draws_of(corner)(0).window == Window.of(0, 48, 928, 1000)
    around = draws_of(corner, shape=(45, 1000))(0).window.rows
    assert len(around) == 48
    assert around.start <= 0
    assert around.stop >= 45


def test_objects_are_alike_likely_and_candidates_vary():
    boxes = [Window.of(50 * n, 50 * n + 30, 400, 430) for n in range(1, 6)]
    drawn = Counter(draws_of(*boxes)(index).window for index in range(1000))
    assert len(drawn) == 5
    assert is_even(drawn.values())
    draws = draws_of(*boxes, kind=CandidateDraws)
    assert len({draws(index).window for index in range(200)}) > 190
    assert pickle.loads(pickle.dumps(draws))(17) == draws(17)


def overlap_of(one, other):
    a, b = (np.zeros((300, 300), bool) for _ in range(2))
    a[one.rows.start + 100 : one.rows.stop + 100, one.cols.start + 100 : one.cols.stop + 100] = True
    b[other.rows.start + 100 : other.rows.stop + 100, other.cols.start + 100 : other.cols.stop + 100] = True
    return (a & b).sum() / (a | b).sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 60), st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_candidates_overlap_the_object_enough(seed, rows, cols, least):
    box = Window.of(5, 5 + rows, 7, 7 + cols)
    assert overlap_of(Window(*candidate(random_of(seed, 0), box, least)), box) >= least


def test_candidates_reach_as_far_as_they_may():
    box = Window.of(0, 60, 0, 60)
    found = [Window(*candidate(random_of(0, index), box, 0.5)) for index in range(400)]
    overlaps = [overlap_of(one, box) for one in found]
    assert min(overlaps) < 0.52
    assert max(overlaps) > 0.85
    areas = [one.area / 3600 for one in found]
    assert min(areas) < 0.6
    assert max(areas) > 1.6
    assert sum(one == box for one in found) < 3  # where no box was found, the object's own
    shift = np.mean([one.rows.start + one.rows.stop - 60 for one in found])
    assert abs(shift) < 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0}, "a margin of 0 is not legal"),
        ({"zoom": (3, 2)}, "scales 3,2 are not legal"),
        ({"kind": CandidateDraws, "overlap": 0}, "an overlap of 0 is not legal"),
    ],
)
def test_draws_that_cannot_be(options, message):
    with pytest.raises(UsageError, match=message):
        draws_of(BOX, **options)


def test_buildings_are_objects():
    folder = real_data("buildings")
    found = pair_folders(folder / "area[24]*_rgb.tif", folder / "area[24]*_label.tif", 0.5, 0)
    pairs = open_pairs(found.samples)
    objects = find_objects(pairs, 2, (255,))
    whole = [pair.read_labels(Window.whole(pair.shape)) for pair in pairs]
    assert sum(one.pixels for one in objects) <= sum(int((labels == 1).sum()) for labels in whole)
    for one in objects[:20]:
        inside = whole[one.pair][one.box.within(Window.whole(pairs[one.pair].shape))] == 1
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()
        assert inside.sum() >= one.pixels
