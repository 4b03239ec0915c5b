import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tilepipe.errors import UsageError
from tilepipe.scene.synthetic import CLASSES, synthetic_scene, write_scene
from tilepipe.scene.terrain import BUILDING, GRASS, ROAD, WATER

NAMES = [name for name, _ in CLASSES]


def mean_iou(truth, found):
    pairs = truth.ravel().astype(np.int64) * len(CLASSES) + found.ravel()
    confusion = np.bincount(pairs, minlength=len(CLASSES) ** 2).reshape(len(CLASSES), -1)
    hits = np.diag(confusion)
    return float(np.mean(hits / np.maximum(confusion.sum(0) + confusion.sum(1) - hits, 1)))


@pytest.fixture(scope="module")
def scenes():
    return [synthetic_scene((640, 640), seed) for seed in range(1, 6)]


@settings(max_examples=30, deadline=None)
@given(row=st.integers(0, 600), col=st.integers(0, 600), rows=st.integers(1, 40), cols=st.integers(1, 40))
def test_a_window_made_by_itself_is_that_part_of_the_scene(scenes, row, col, rows, cols):
    part = synthetic_scene((rows, cols), 1, (row, col))
    np.testing.assert_array_equal(part.image, scenes[0].image[:, row : row + rows, col : col + cols])
    np.testing.assert_array_equal(part.labels, scenes[0].labels[row : row + rows, col : col + cols])


@pytest.mark.parametrize("origin", [(-700, -301), (0, -64), (5_000_000, 12), (2**31, 2**31)])
def test_the_plane_has_no_edges(origin):
    whole = synthetic_scene((128, 96), 3, origin)
    part = synthetic_scene((50, 40), 3, (origin[0] + 70, origin[1] + 31))
    np.testing.assert_array_equal(part.image, whole.image[:, 70:120, 31:71])
    np.testing.assert_array_equal(part.labels, whole.labels[70:120, 31:71])


def test_seeds_give_different_scenes(scenes):
    assert len({scene.labels.tobytes() for scene in scenes}) == len(scenes)


def test_every_class_occurs(scenes):
    share = np.bincount(np.concatenate([scene.labels.ravel() for scene in scenes]), minlength=len(CLASSES))
    share = share / share.sum()
    assert share.size == len(CLASSES)
    assert share.min() > 0.01, dict(zip(NAMES, share, strict=True))


def test_buildings_stand_whole_beside_roads_and_water(scenes):
    for scene in scenes:
        parts, count = ndimage.label(scene.labels == BUILDING)
        sizes = np.bincount(parts.ravel())[1:]
        cut = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
        whole = np.setdiff1d(np.arange(1, count + 1), cut)
        # The least house is 28 x 20; trees never cover a roof.
        assert (sizes[whole - 1] > 0.9 * 28 * 20).all()
        around = ndimage.binary_dilation(parts > 0) & (parts == 0)
        assert not np.isin(scene.labels[around], (ROAD, WATER)).any()


def test_buildings_cast_shadows_to_one_side(scenes):
    for scene in scenes:
        tall = scene.labels == BUILDING
        light = scene.image.mean(0)
        sides = []
        for angle in np.arange(8) * np.pi / 4:
            dy, dx = round(12 * np.sin(angle)), round(12 * np.cos(angle))
            beside = np.roll(tall, (dy, dx), (0, 1)) & (scene.labels == GRASS)
            sides.append(light[beside].mean())
        assert min(sides) < 0.75 * max(sides)


def test_colour_alone_does_not_tell_the_classes(scenes):
    def colour(scene):
        red, green, blue = scene.image.astype(np.int64) >> 3
        return (red * 32 + green) * 32 + blue

    votes = np.zeros((32**3, len(CLASSES)))
    for seed in range(100, 108):
        scene = synthetic_scene((640, 640), seed)
        np.add.at(votes, (colour(scene).ravel(), scene.labels.ravel()), 1)
    best = votes.argmax(1)
    truth = np.stack([scene.labels for scene in scenes])
    reached = mean_iou(truth, np.stack([best[colour(scene)] for scene in scenes]))
    assert 0.3 < reached < 0.6


def test_files_hold_the_scene_whatever_the_tile(tmp_path):
    scene = synthetic_scene((300, 700), 9)
    for tile in (96, 1024):
        image_path, truth_path = write_scene(tmp_path / str(tile), (300, 700), 9, tile=tile)
        with rasterio.open(image_path) as image, rasterio.open(truth_path) as truth:
            np.testing.assert_array_equal(image.read(), scene.image)
            np.testing.assert_array_equal(truth.read(1), scene.labels)
            for dataset in (image, truth):
                assert dataset.crs.to_epsg() == 32633
                assert dataset.res == (0.3, 0.3)
                assert dataset.transform == image.transform
                assert dataset.compression.name == "deflate"
            assert [truth.colormap(1)[i][:3] for i in range(len(CLASSES))] == [color for _, color in CLASSES]


@pytest.mark.parametrize(
    ("shape", "seed", "told"), [((0, 5), 1, "0 x 5"), ((5, 5), -1, "seed -1"), ((5, 5), 2**31, "seed")]
)
def test_what_cannot_be_made_is_refused(shape, seed, told):
    with pytest.raises(UsageError, match=told):
        synthetic_scene(shape, seed)
