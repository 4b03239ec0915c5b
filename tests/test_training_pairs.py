"""Images and labels read together, and what is counted of them: numpy over whole rasters says what is right."""

from __future__ import annotations

import pickle
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image
from rasters import GRID, noise, read_whole, real_data, write

from tilepipe.errors import InputError, UsageError
from tilepipe.training import statistics as statistics_module
from tilepipe.training.pairs import UNLABELLED, Readers, band_names, open_pairs
from tilepipe.training.samples import Sample, pair_folders
from tilepipe.training.statistics import IGNORE, Statistics, class_weights, statistics_of, target_table, targets_of
from tilepipe.window import Window


def labels_of(shape, classes, seed=0, dtype="uint8"):
    return np.random.default_rng(seed).integers(0, classes, (1, *shape)).astype(dtype)


def sample(folder, image, labels, name="a", label_options=None, **options):
    write(folder / f"{name}.tif", image, **options)
    write(folder / f"{name}_label.tif", labels, **(label_options or {}))
    return Sample(str(folder / f"{name}.tif"), str(folder / f"{name}_label.tif"))


def png(path, array, palette=None):
    picture = Image.fromarray(array)
    if palette is not None:
        picture.putpalette(palette)
    picture.save(path)
    return str(path)


# ---- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "window", [Window.of(3, 9, 2, 20), Window.of(-5, 4, 18, 31), Window.of(-40, 60, -3, 30), Window.of(30, 33, 0, 4)]
)
def test_a_window_beyond_the_raster_is_reflected_and_unlabelled(tmp_path, window):
    image, labels = noise((2, 20, 25), "uint16"), labels_of((20, 25), 5)
    labels[0, 4, 5] = 200
    (pair,) = open_pairs([sample(tmp_path, image, labels, label_options={"nodata": 200}, nodata=int(image[0, 7, 3]))])
    pads = [(100, 100), (100, 100)]
    whole = np.pad(image, [(0, 0), *pads], mode="reflect")
    numbers = np.pad(labels[0].astype(int), pads, constant_values=UNLABELLED)
    numbers[104, 105] = UNLABELLED
    at = (
        slice(window.rows.start + 100, window.rows.stop + 100),
        slice(window.cols.start + 100, window.cols.stop + 100),
    )
    values, valid, found = pair.read(window)
    np.testing.assert_array_equal(values, whole[:, *at])
    np.testing.assert_array_equal(valid, (whole != image[0, 7, 3]).all(axis=0)[at])
    np.testing.assert_array_equal(found, numbers[at])
    assert found.dtype == np.uint16
    assert (pair.shape, pair.bands) == ((20, 25), 2)


def test_plain_images_and_palettes(tmp_path):
    colours = noise((8, 9, 3))
    indices = labels_of((8, 9), 4)[0]
    table = [10, 20, 30, 40, 50, 60, 70, 80, 90, 1, 2, 3]
    samples = [
        Sample(png(tmp_path / "rgb.png", colours), png(tmp_path / "l.png", indices, table)),
        Sample(png(tmp_path / "palette.png", indices, table), png(tmp_path / "grey.png", indices)),
        Sample(png(tmp_path / "rgba.png", noise((8, 9, 4))), png(tmp_path / "alpha.png", np.stack([indices] * 2, -1))),
    ]
    pairs = open_pairs(samples)
    whole = Window.of(0, 8, 0, 9)
    np.testing.assert_array_equal(pairs[0].read(whole).values, colours.transpose(2, 0, 1))
    expanded = np.array(table).reshape(4, 3)[indices].transpose(2, 0, 1)
    np.testing.assert_array_equal(pairs[1].read(whole).values, expanded)
    for pair in pairs[:2]:
        np.testing.assert_array_equal(pair.read(whole).labels, indices)
    np.testing.assert_array_equal(pairs[2].read(whole).labels, np.where(indices > 0, indices.astype(int), UNLABELLED))
    assert band_names(pairs) == ("red", "green", "blue")


def test_bands_by_number_and_by_name(tmp_path):
    image = noise((4, 6, 6))
    one = sample(
        tmp_path, image, labels_of((6, 6), 2), photometric="minisblack", descriptions=("NIR", "red", "green", "blue")
    )
    (by_number,) = open_pairs([one], bands=(3, 1))
    (by_name,) = open_pairs([one], names=("green", "nir"))
    for pair in (by_number, by_name):
        np.testing.assert_array_equal(pair.read(Window.of(0, 6, 0, 6)).values, image[[2, 0]])
        assert band_names([pair]) == ("green", "nir")
    assert band_names(open_pairs([one])) == ("nir", "red", "green", "blue")
    with pytest.raises(UsageError, match="band 5 is not in"):
        open_pairs([one], bands=(5,))
    plain = sample(tmp_path, noise((2, 6, 6)), labels_of((6, 6), 2), "b", photometric="minisblack")
    assert band_names(open_pairs([plain])) == ("band1", "band2")
    three = sample(tmp_path, noise((3, 6, 6)), labels_of((6, 6), 2), "c", photometric="minisblack")
    assert band_names(open_pairs([three])) == ("red", "green", "blue")
    mixed = sample(tmp_path, noise((3, 6, 6)), labels_of((6, 6), 2), "d", descriptions=("x", "y", "z"))
    assert band_names(open_pairs([mixed])) == ("red", "green", "blue")


def other_process(pair):
    return pair.read(Window.of(0, 20, 0, 25)).values.sum()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pair_reads_in_other_processes(tmp_path, method):
    image = noise((3, 20, 25))
    (pair,) = open_pairs([sample(tmp_path, image, labels_of((20, 25), 3))])
    assert other_process(pair) == image.sum()
    with get_context(method).Pool(1) as pool:
        assert pool.apply(other_process, (pair,)) == image.sum()
    assert other_process(pair) == image.sum()


def test_only_so_many_rasters_stay_open(tmp_path):
    samples = [sample(tmp_path, noise((1, 4, 4), seed=n), labels_of((4, 4), 2, n), f"n{n}") for n in range(5)]
    pairs = open_pairs(samples)
    few = Readers(3)
    for pair in pairs:
        few.of(("image", pair.sample.image), pair.image).read(Window.of(0, 4, 0, 4))
    assert [name for _, name in few._opened] == [one.image for one in samples[2:]]
    kept = few.of(("image", samples[3].image), pairs[3].image)
    few.of(("image", samples[0].image), pairs[0].image)
    assert few.of(("image", samples[3].image), pairs[3].image) is kept
    assert not pickle.loads(pickle.dumps(few))._opened


# ---- what does not fit -----------------------------------------------------------------------------------------


def wrong_pairs(folder):
    rgb, labels = noise((3, 8, 9)), labels_of((8, 9), 2)
    good = sample(folder, rgb, labels, "good")
    yield [sample(folder, rgb, labels[:, :7], "size")], r"size\.tif has 8 x 9 pixels and its label \S* 7 x 9; they"
    moved = {"transform": GRID * GRID.translation(0.5, 0)}
    yield [sample(folder, rgb, labels, "moved", moved)], r"moved\.tif and its label .* lie up to 0\.5 pixels apart"
    coarse = {"transform": GRID * GRID.scale(1.1)}
    yield [sample(folder, rgb, labels, "coarse", coarse)], r"lie up to 0\.9 pixels apart"
    yield [sample(folder, rgb, labels, "crs", {"crs": "EPSG:32633"})], r"crs\.tif and its label .* differ in CRS"
    yield [sample(folder, rgb, rgb, "colours")], r"colours_label\.tif has 3 bands and cannot be a label"
    yield [sample(folder, rgb, labels.astype("float32"), "float")], r"float_label\.tif holds float32 values and cannot"
    yield [good, sample(folder, rgb[:2], labels, "two")], r"two\.tif has 2 bands and \S*good\.tif has 3; choose"
    yield [Sample(str(folder / "none.tif"), good.label)], r"cannot open \S*none\.tif"


def test_rasters_that_do_not_fit_are_refused(tmp_path):
    for samples, message in wrong_pairs(tmp_path):
        with pytest.raises(InputError, match=message) as caught:
            open_pairs(samples)
        assert "\n" not in str(caught.value)


def test_a_label_without_georeference_takes_the_images(tmp_path):
    one = sample(tmp_path, noise((3, 8, 9)), labels_of((8, 9), 2))
    open_pairs([Sample(one.image, png(tmp_path / "plain.png", labels_of((8, 9), 2)[0]))])
    close = {"transform": GRID * GRID.translation(0.05, -0.05)}
    open_pairs([sample(tmp_path, noise((3, 8, 9)), labels_of((8, 9), 2), "b", close)])


@pytest.mark.parametrize(("value", "dtype"), [(-1, "int16"), (70000, "int32"), (65535, "uint32")])
def test_labels_that_are_no_class_numbers(tmp_path, value, dtype):
    labels = labels_of((8, 9), 2, dtype=dtype)
    labels[0, 5, 3] = value
    image = noise((1, 8, 9))
    (pair,) = open_pairs([sample(tmp_path, image, labels)])
    with pytest.raises(
        InputError, match=rf"a_label\.tif has the label {value} at row 5, column 3; labels are 0 to 65534"
    ):
        pair.read(Window.of(2, 8, 1, 9))
    (pair,) = open_pairs([sample(tmp_path, image, labels, "b", {"nodata": value})])
    assert pair.read(Window.of(5, 6, 3, 4)).labels == UNLABELLED


def test_targets(tmp_path):
    table = target_table(3, (255, 1, -5, 10**6))
    assert [int(table[value]) for value in (0, 1, 2, 255, UNLABELLED)] == [0, IGNORE, 2, IGNORE, IGNORE]
    labels = labels_of((8, 9), 3)
    labels[0, 6, 7] = 9
    (pair,) = open_pairs([sample(tmp_path, noise((1, 8, 9)), labels)])
    window = Window.of(4, 8, 5, 9)
    with pytest.raises(
        InputError, match=r"a_label\.tif has the label 9 at row 6, column 7, and the classes are 0 to 2; give --void 9"
    ):
        targets_of(pair, window, pair.read(window).labels, table)


# ---- statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "offset"), [("uint8", 0), ("int16", 0), ("float32", 1e5), ("float64", 1e9)])
@pytest.mark.parametrize("area", [1 << 20, 150])
def test_statistics_are_numpys(tmp_path, monkeypatch, dtype, offset, area):
    monkeypatch.setattr(statistics_module, "_BLOCK_AREA", area)
    samples, kept, counted = [], [], []
    for number, shape in enumerate([(40, 33), (7, 90)]):
        image = noise((2, *shape), dtype, number) + np.asarray(offset, dtype)
        labels = labels_of(shape, 4 - number, number)
        labels[0, :2] = 77
        image[0, 3:5] = nodata = image[0, 3, 3] if dtype[0] != "f" else -9999
        samples.append(sample(tmp_path, image, labels, f"n{number}", nodata=nodata, tiled=number == 0))
        valid = (image != nodata).all(axis=0)
        kept.append(image[:, valid].astype(np.float64))
        counted.append((np.bincount(labels[0][valid], minlength=78), valid.sum()))
    found = statistics_of(open_pairs(samples), 4, (77,), threads=3)
    values = np.concatenate(kept, axis=1)
    np.testing.assert_allclose(found.mean, values.mean(axis=1), rtol=5e-6)
    np.testing.assert_allclose(found.std, values.std(axis=1), rtol=5e-6)
    assert found.pixels == tuple(sum(counts[:4] for counts, _ in counted))
    assert found.shown == tuple(sum(total for counts, total in counted if counts[c]) for c in range(4))
    assert found.valid == values.shape[1]
    assert all(float(f"{value:.6g}") == value for value in (*found.mean, *found.std))
    assert Statistics.from_json(found.to_json()) == found


def test_statistics_do_not_depend_on_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics_module, "_BLOCK_AREA", 64)
    monkeypatch.setattr(statistics_module, "_DIGITS", 17)
    pairs = open_pairs([sample(tmp_path, noise((3, 50, 60), "float32"), labels_of((50, 60), 3))])
    assert len({statistics_of(pairs, 3, threads=threads) for threads in (1, 2, 5)}) == 1


def test_statistics_of_what_cannot_be_learnt_from(tmp_path):
    image, labels = noise((2, 8, 9)), labels_of((8, 9), 3)

    def told(match, pairs, **arguments):
        with pytest.raises(InputError, match=match) as caught:
            statistics_of(open_pairs(pairs), 3, **arguments)
        assert "\n" not in str(caught.value)

    good = sample(tmp_path, image, labels)
    empty = sample(tmp_path, np.zeros_like(image), labels, "empty", nodata=0)
    void = sample(tmp_path, image, np.full_like(labels, 255), "void")
    told(r"empty\.tif and \S*empty_label\.tif share no pixel that is valid and labelled; leave", [good, empty])
    told(r"void\.tif and \S*void_label\.tif share no pixel", [good, void], void=(255,))
    told(r"void_label\.tif has the label 255 at row 0, column 0, and the classes are 0 to 2", [good, void])
    flat = image.copy()
    flat[1] = 7
    told(r"band 2 of \S*flat\.tif, and of all others, is 7 everywhere", [sample(tmp_path, flat, labels, "flat")])
    zero = sample(tmp_path, image, labels, "zero", {"nodata": 0})
    told(r"zero_label\.tif declares 0 as nodata, which is a class; .*give --void 0", [zero])
    assert statistics_of(open_pairs([zero]), 3, (0,)).pixels[0] == 0
    with pytest.raises(InputError, match="the stored statistics cannot be read"):
        Statistics.from_json('{"mean": [1]}')


def test_statistics_of_real_images():
    folder = real_data("camvid")
    found = pair_folders(folder / "val", folder / "valannot", 0.1, 0)
    pairs = open_pairs(found.samples[:5])
    result = statistics_of(pairs, 11, (11,))
    images = np.concatenate([read_whole(pair.sample.image)[0].reshape(3, -1) for pair in pairs], axis=1)
    labels = np.concatenate([read_whole(pair.sample.label)[0].reshape(-1) for pair in pairs])
    np.testing.assert_allclose(result.mean, images.mean(axis=1), rtol=5e-6)
    np.testing.assert_allclose(result.std, images.std(axis=1), rtol=5e-6)
    assert result.pixels == tuple(np.bincount(labels, minlength=12)[:11])


# ---- class weights ---------------------------------------------------------------------------------------------


def counted(pixels, shown):
    return Statistics((0.0,), (1.0,), pixels, shown, 1000)


def test_median_frequency_by_hand():
    # Frequencies 0.5, 0.2, 0.1 and 0.25: the median of all four is 0.225.
    weights = class_weights("median-frequency", counted((500, 200, 50, 100), (1000, 1000, 500, 400)))
    assert weights == pytest.approx((0.45, 1.125, 2.25, 0.9))
    # A class that nothing shows stands aside: the median of 0.5, 0.2 and 0.1 is 0.2.
    weights = class_weights("median-frequency", counted((500, 0, 200, 50), (1000, 0, 1000, 500)))
    assert weights == pytest.approx((0.4, 1, 1, 2))


def test_weights_that_are_given():
    some = counted((5, 5), (10, 10))
    assert class_weights("none", some) == (1, 1)
    assert class_weights((0, 2), some) == (0, 2)
    for wrong in ((1,), (1, -1), (1, float("nan")), (0, 0)):
        with pytest.raises(UsageError, match="give 2 numbers of at least 0"):
            class_weights(wrong, some)
    with pytest.raises(UsageError, match="'median' are unknown; legal are none, median-frequency, or 2 numbers"):
        class_weights("median", some)
