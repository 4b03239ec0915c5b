"""Windows as a network learns from them: where each pixel comes from, what it is worth, and batches by workers."""

from __future__ import annotations

import importlib
import itertools
import os
import pickle
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from rasters import noise, write
from torch.utils.data import get_worker_info
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from tilepipe.errors import InputError, ReadError, RunError, UsageError
from tilepipe.training.augment import Jitter, Layers, oriented, resampled, rotated
from tilepipe.training.dataset import WindowDataset, loader, worker_deaths
from tilepipe.training.jitter import BandJitter
from tilepipe.training.pairs import open_pairs
from tilepipe.training.samples import Sample
from tilepipe.training.statistics import IGNORE, Statistics
from tilepipe.training.windows import Augmentation, Draw, UniformDraws
from tilepipe.window import Window


def plain_statistics(bands, classes):
    """Such that normalising changes nothing."""
    return Statistics((0.0,) * bands, (1.0,) * bands, (1,) * classes, (1,) * classes, 1)


def sample(folder, image, labels, name="a", **options):
    write(folder / f"{name}.tif", image, **options)
    write(folder / f"{name}_label.tif", labels[None])
    return Sample(str(folder / f"{name}.tif"), str(folder / f"{name}_label.tif"))


class Fixed:
    """One draw for every item."""

    def __init__(self, draw):
        self.draw = draw

    def __call__(self, index, attempt=0):
        return self.draw


def fixed(pairs, window, crop, statistics, angle=0.0, turns=0, mirrored=False, **options):
    draws = Fixed(Draw(0, window, angle, turns, mirrored, 5))
    return WindowDataset(pairs, draws, Augmentation(crop), statistics, **options)[0]


@pytest.fixture
def ramps(tmp_path):
    """An image whose bands, and labels which, tell the row (first sample) or column (second) of a pixel."""
    rows, cols = np.mgrid[:90, :120].astype(np.float32)
    image = np.stack([rows, cols])
    samples = [sample(tmp_path, image, axis.astype(np.uint8), name) for axis, name in ((rows, "rows"), (cols, "cols"))]
    return [open_pairs([one]) for one in samples]


# ---- geometry --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_turns_and_mirrors_are_exact(ramps, turns, mirrored):
    crop = (20, 30)
    window = Window.of(10, 30, 40, 70) if turns % 2 == 0 else Window.of(10, 40, 40, 60)
    image, labels = fixed(ramps[0], window, crop, plain_statistics(2, 120), turns=turns, mirrored=mirrored)
    rows, cols = np.mgrid[10 : window.rows.stop, 40 : window.cols.stop]
    expected = [np.rot90(axis, turns) for axis in (rows, cols)]
    expected = [axis[:, ::-1] if mirrored else axis for axis in expected]
    np.testing.assert_array_equal(image, np.stack(expected))
    np.testing.assert_array_equal(labels, expected[0])
    assert (image.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert image.is_contiguous()
    assert labels.is_contiguous()


def test_quarter_turns_are_torchvisions():
    layers = Layers(torch.rand(3, 8, 8), torch.rand(8, 8) > 0.5, torch.randint(9, (8, 8)))
    for turns in range(4):
        image, valid, targets = oriented(layers, turns, False)
        torch.testing.assert_close(image, tv.rotate(layers.image, 90 * turns))
        torch.testing.assert_close(valid, tv.rotate(layers.valid[None].float(), 90 * turns)[0] > 0.5)
        torch.testing.assert_close(targets, tv.rotate(layers.targets[None].float(), 90 * turns)[0].long())
    torch.testing.assert_close(oriented(layers, 0, True).image, tv.hflip(layers.image))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("scale", "angle"), [(2, 0), (0.5, 0), (1.6, 0), (1, 17), (2.5, -40), (0.7, 90), (1, 133)])
def test_image_and_labels_stay_registered(ramps, axis, scale, angle):
    crop = (12, 16)
    rows, cols = (round(side * scale) for side in crop)
    top, left = 45 - rows // 2, 60 - cols // 2
    image, labels = fixed(
        ramps[axis], Window.of(top, top + rows, left, left + cols), crop, plain_statistics(2, 120), angle
    )
    assert labels.min() >= 0
    # The nearest label lies within half a source pixel of the place itself, a little more where it turns.
    apart = (image[axis] - labels).abs()
    assert apart.max() <= max(0.5, scale / 2) + 0.75 * (angle != 0) + 1e-3
    # Of an even number of source pixels none is in the middle; of others, nothing is shifted.
    assert abs(float((image[axis] - labels).mean())) <= (0.5001 if scale == 2 else 0.25)
    # Where each pixel of the crop lies in the raster, by hand.
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    y, x = np.mgrid[: crop[0], : crop[1]] + 0.5
    y, x = (y - crop[0] / 2) * rows / crop[0], (x - crop[1] / 2) * cols / crop[1]
    place = (sin * x + cos * y + top + rows / 2 - 0.5, cos * x - sin * y + left + cols / 2 - 0.5)
    np.testing.assert_allclose(image, np.stack(place), atol=0.5 if angle else 0.26)


def test_a_rotation_is_torchvisions():
    torch.manual_seed(0)
    layers = Layers(torch.rand(2, 61, 61), torch.ones(61, 61, dtype=torch.bool), torch.randint(9, (61, 61)))
    for angle in (3.0, -25.0, 60.0, 170.0):
        image, valid, targets = rotated(layers, (31, 31), angle)
        whole = tv.rotate(layers.image, angle, v2.InterpolationMode.BILINEAR)[:, 15:46, 15:46]
        torch.testing.assert_close(image, whole, atol=1e-3, rtol=0)
        nearest = tv.rotate(layers.targets[None].float(), angle)[0, 15:46, 15:46]
        assert (targets == nearest.long()).float().mean() > 0.99
        assert bool(valid.all())


def test_resampling_is_torchvisions_and_keeps_what_is_whole():
    layers = Layers(torch.rand(3, 40, 60), torch.rand(40, 60) > 0.02, torch.randint(9, (40, 60)))
    image, valid, targets = resampled(layers, (10, 15))
    torch.testing.assert_close(image, tv.resize(layers.image, [10, 15], antialias=True))
    blocks = layers.targets.reshape(10, 4, 15, 4)
    assert all(targets[r, c] in blocks[r, :, c] for r, c in itertools.product(range(10), range(15)))
    # What is made from a pixel that is not valid is none either: a triangle of 8 x 8 pixels each.
    wide = torch.nn.functional.pad(layers.valid[None, None].float(), (2, 2, 2, 2), value=1.0)
    whole = -torch.nn.functional.max_pool2d(-wide, 8, 4)[0, 0] == 1
    assert torch.equal(valid, whole)


def test_d4_keeps_every_label(tmp_path):
    labels = np.random.default_rng(0).integers(0, 5, (24, 24)).astype(np.uint8)
    pairs = open_pairs([sample(tmp_path, noise((1, 24, 24)), labels)])
    augmentation = Augmentation((24, 24), "d4")
    dataset = WindowDataset(pairs, UniformDraws(((24, 24),), augmentation, 0), augmentation, plain_statistics(1, 5))
    shown = [dataset[index][1] for index in range(60)]
    assert all(np.array_equal(np.bincount(each.flatten()), np.bincount(labels.flatten())) for each in shown)
    assert len({each.numpy().tobytes() for each in shown}) == 8


# ---- values ----------------------------------------------------------------------------------------------------


def test_values_are_normalised_and_the_rest_is_ignored(tmp_path):
    image = noise((2, 12, 14), "int16")
    image[0, 3, 4] = -7
    labels = np.random.default_rng(1).integers(0, 3, (12, 14)).astype(np.uint8)
    labels[5, 6] = 255
    pairs = open_pairs([sample(tmp_path, image, labels, nodata=-7)])
    statistics = replace(plain_statistics(2, 3), mean=(100.0, -50.0), std=(2e4, 1e4))
    found, targets = fixed(pairs, Window.of(-2, 10, 0, 16), (12, 16), statistics, void=(255,))
    whole = np.pad(image, [(0, 0), (2, 0), (0, 2)], mode="reflect")[:, :12].astype(np.float32)
    valid = (whole != -7).all(axis=0)
    expected = np.where(valid, (whole - [[[100]], [[-50]]]) / [[[2e4]], [[1e4]]], 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    numbers = np.pad(labels.astype(int), [(2, 0), (0, 2)], constant_values=IGNORE)[:12]
    numbers[~valid | (numbers == 255)] = IGNORE
    np.testing.assert_array_equal(targets, numbers)


def test_nodata_does_not_bleed_into_what_is_resampled(tmp_path):
    image = np.full((1, 40, 40), 10.0, np.float32)
    image[0, 13:20, 11:30] = -1e30
    pairs = open_pairs([sample(tmp_path, image, np.zeros((40, 40), np.uint8), nodata=-1e30)])
    statistics = replace(plain_statistics(1, 1), mean=(9.0,), std=(2.0,))
    for scale, angle in ((2, 0.0), (0.7, 0.0), (1.5, 30.0)):
        side = round(10 * scale)
        window = Window.of(20 - side // 2, 20 - side // 2 + side, 20 - side // 2, 20 - side // 2 + side)
        found, targets = fixed(pairs, window, (10, 10), statistics, angle)
        shown = targets == 0
        torch.testing.assert_close(found[0][shown], torch.full((int(shown.sum()),), 0.5), atol=1e-3, rtol=0)
        assert (found[0][~shown] == 0).all()
        assert 0 < shown.sum() < 100


def test_windows_without_labels_are_drawn_again(tmp_path):
    labels = np.full((40, 40), 255, np.uint8)
    labels[:, 20:] = 1
    pairs = open_pairs([sample(tmp_path, noise((1, 40, 40)), labels)])
    augmentation = Augmentation((4, 4))
    draws = UniformDraws(((40, 40),), augmentation, 0)
    dataset = WindowDataset(pairs, draws, augmentation, plain_statistics(1, 2), (255,))
    without = sum(bool((dataset[index][1] == IGNORE).all()) for index in range(300))
    once = sum(draws(index).window.cols.stop <= 20 for index in range(300))
    assert once > 100
    # Half of the places show none; five draws in a row miss in about 1 of 32 items.
    assert 0 < without < 30


def test_a_label_beyond_the_classes_is_named(tmp_path):
    labels = np.zeros((10, 10), np.uint8)
    labels[4, 7] = 3
    pairs = open_pairs([sample(tmp_path, noise((1, 10, 10)), labels)])
    with pytest.raises(
        InputError, match=r"a_label\.tif has the label 3 at row 4, column 7, and the classes are 0 to 1"
    ):
        fixed(pairs, Window.of(2, 8, 2, 8), (6, 6), plain_statistics(1, 2))


# ---- jitter ----------------------------------------------------------------------------------------------------


def test_jitter_is_torchvisions_and_leaves_random_numbers_alone():
    image = torch.rand(3, 6, 7)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = Jitter(0.4, True)(image, 11)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(11)
    expected = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)(image)
    assert torch.equal(found, expected)
    assert not torch.equal(found, Jitter(0.4, True)(image, 12))
    assert Jitter(0.0, True)(image, 11) is image


def test_bands_that_are_no_colours_get_gains_and_offsets():
    ones = torch.stack([torch.zeros(400, 5, 1), torch.ones(400, 5, 1)], dim=-1)
    drawn = torch.stack([BandJitter(0.3)(each) for each in ones])[:, :, 0]
    offset, gain = drawn[..., 0], drawn[..., 1] - drawn[..., 0]
    for value, middle in ((offset, 0), (gain, 1)):
        assert (value - middle).abs().max() <= 0.3
        assert (value - middle).abs().max() > 0.29
        assert abs(float(value.mean()) - middle) < 0.02
    assert len(drawn.unique()) > 1000


@pytest.mark.parametrize(("bands", "dtype", "colour"), [(3, "uint8", True), (4, "uint8", False), (3, "uint16", False)])
def test_jitter_reaches_the_items(tmp_path, bands, dtype, colour):
    image = noise((bands, 10, 10), dtype)
    image[:, 2, 3] = 7
    pairs = open_pairs([sample(tmp_path, image, np.zeros((10, 10), np.uint8), nodata=7, photometric="minisblack")])
    statistics = replace(plain_statistics(bands, 1), mean=(120.0,) * bands, std=(60.0,) * bands)
    draws = Fixed(Draw(0, Window.of(0, 10, 0, 10), 0.0, 0, False, 5))
    found, _ = WindowDataset(pairs, draws, Augmentation((10, 10), jitter=0.3), statistics)[0]
    raw = torch.from_numpy(image.astype(np.float32))
    raw[:, (image == 7).any(axis=0)] = 120
    expected = (Jitter(0.3, True)(raw / 255, 5) * 255 - 120) / 60 if colour else Jitter(0.3, False)((raw - 120) / 60, 5)
    expected[:, (image == 7).any(axis=0)] = 0
    torch.testing.assert_close(found, expected)


def test_without_torchvision_only_jitter_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "tilepipe.training.jitter")
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(
        UsageError, match=r"jitter needs torchvision, of the train extra: pip install 'tilepipe\[train]'"
    ):
        Jitter(0.1, True)
    Jitter(0.0, True)


# ---- batches ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    shapes = ((60, 50), (40, 70))
    labels = [np.random.default_rng(n).integers(0, 3, shape).astype(np.uint8) for n, shape in enumerate(shapes)]
    pairs = open_pairs([sample(tmp_path, noise((3, *one.shape), seed=n), one, f"n{n}") for n, one in enumerate(labels)])
    augmentation = Augmentation((16, 24), "d4", 15, (0.5, 2), 0.4)
    statistics = replace(plain_statistics(3, 3), mean=(127.0,) * 3, std=(70.0,) * 3)
    return WindowDataset(pairs, UniformDraws(shapes, augmentation, 9), augmentation, statistics)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_do_not_depend_on_workers(dataset):
    dataset[0]  # files that are open here must not be used there
    before = torch.get_rng_state()
    batches = {workers: list(loader(dataset, range(3, 18), 4, workers)) for workers in (0, 1, 3)}
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(images) for images, _ in batches[0]] == [4, 4, 4, 3]
    for workers in (1, 3):
        assert len(batches[workers]) == 4
        assert all(equal(*each) for each in zip(batches[workers], batches[0], strict=True))
    items = [dataset[index] for index in range(3, 18)]
    assert equal((torch.cat([images for images, _ in batches[0]]),), (torch.stack([image for image, _ in items]),))
    assert equal(
        next(loader(dataset, range(11, 18), 4, 0)), next(itertools.islice(loader(dataset, range(3, 18), 4, 0), 2, None))
    )


def test_items_do_not_depend_on_threads(dataset):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        several = [dataset[index] for index in range(8)]
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert all(equal(each, dataset[index]) for index, each in enumerate(several))
    finally:
        torch.set_num_threads(threads)


def test_a_data_set_travels_to_other_processes(dataset):
    copy = pickle.loads(pickle.dumps(dataset))
    assert equal(copy[5], dataset[5])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_items_error_is_told_in_its_turn(dataset, workers):
    importlib.import_module("distributed")  # which lets errors travel with their causes, and GDAL's cannot
    broken = dataset.pairs[0].sample.image
    dataset.pairs[0]._readers._forget()
    with open(broken, "r+b") as file:
        file.truncate(os.path.getsize(broken) // 2)
    first = next(index for index in range(100) if dataset.draws(index).pair == 0)
    batches = loader(dataset, range(60), 1, workers)
    assert len(list(itertools.islice(batches, first))) == first
    with pytest.raises(ReadError, match=r"n0\.tif: cannot read rows") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


class Deadly:
    """Draws that kill the worker which asks for item 5."""

    def __init__(self, draws):
        self.draws = draws

    def __call__(self, index, attempt=0):
        if index == 5 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.draws(index, attempt)


def test_a_worker_that_dies_is_told_in_one_line(dataset):
    dataset.draws = Deadly(dataset.draws)
    with pytest.raises(RunError, match=r"a worker process died.*fewer --workers") as caught, worker_deaths():
        list(loader(dataset, range(40), 4, 1))
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="other"), worker_deaths():
        raise RuntimeError("other")
