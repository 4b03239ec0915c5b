from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rasters import noise, write

from tilepipe.errors import InputError, UsageError
from tilepipe.raster.bands import guess, select_bands
from tilepipe.raster.info import BandChoice, RasterInfo
from tilepipe.raster.source import open_raster
from tilepipe.window import Window

RGB = ("red", "green", "blue")
RGBN = (*RGB, "nir")


def raster(*colours, names=None, colormap=None):
    count = len(colours)
    return RasterInfo(
        "a.tif", (9, 9), ("uint8",) * count, (None,) * count, colours, names or (None,) * count, colormap=colormap
    )


@pytest.mark.parametrize(
    ("info", "wanted", "expected"),
    [
        (raster("red", "green", "blue"), RGB, (1, 2, 3)),
        (raster("red", "green", "blue", "alpha"), RGB, (1, 2, 3)),
        (raster("undefined", "undefined", "undefined"), RGB, (1, 2, 3)),
        (raster("gray", "undefined", "undefined", "alpha"), RGB, (1, 2, 3)),
        (raster("blue", "green", "red"), RGB, (3, 2, 1)),
        (raster("red", "green", "blue", "undefined"), RGBN, (1, 2, 3, 4)),
        (raster("red", "green", "blue", "undefined"), RGB, (1, 2, 3)),
        (raster("red", "green", "blue", "nir", "undefined"), ("nir", "red", "green"), (4, 1, 2)),
        (raster(*["undefined"] * 5, names=("B", "G", "R", "Near Infrared", "x")), RGBN, (3, 2, 1, 4)),
        (raster("gray", "undefined", names=("elevation", "slope")), ("slope",), (2,)),
        (raster("gray", "alpha"), ("gray",), (1,)),
        (raster("gray", *["undefined"] * 3), ("nir", "green"), (4, 2)),
    ],
)
def test_bands_by_colour_name_or_order(info, wanted, expected):
    assert select_bands(info, wanted) == BandChoice(expected)


@pytest.mark.parametrize(
    ("info", "wanted", "message"),
    [
        (raster("gray"), RGB, r"a\.tif has 1 band \(1 gray\), the model wants 3 \(red, green, blue\)"),
        (raster("red", "green", "alpha"), RGB, "has 2 bands"),
        (raster(*["undefined"] * 8), RGB, r"has 8 bands .*--bands 1,2,3"),
        (raster("red", "red", "green", "blue"), RGB, "names do not say"),
        (raster(*["undefined"] * 4), ("swir", "green"), "names do not say"),
        (raster(*["undefined"] * 4, names=("a", None, None, None)), RGB, "names do not say"),
        (replace(raster(*["undefined"] * 4), dtypes=("uint16",) * 4), RGB, "names do not say"),
        (raster(*["undefined"] * 12), RGB, r"8 undefined, \.\.\."),
    ],
)
def test_bands_that_cannot_be_told(info, wanted, message):
    with pytest.raises(InputError, match=message) as caught:
        select_bands(info, wanted)
    assert "\n" not in str(caught.value)


def test_what_is_guessed_is_said():
    aerial = raster("gray", *["undefined"] * 3)
    assert select_bands(aerial, RGB) == BandChoice((1, 2, 3))
    assert "a.tif does not name its 4 bands, which are taken for red, green, blue, nir" in guess(aerial, RGB)
    assert guess(aerial, RGBN) is None
    assert guess(raster("red", "green", "blue", "undefined"), RGB) is None
    assert guess(raster(*["undefined"] * 5), RGB) is None


def test_the_users_choice_decides():
    info = raster("red", "green", "blue", "undefined")
    assert select_bands(info, RGB, (4, 1, 1)).indices == (4, 1, 1)
    with pytest.raises(UsageError, match="names 2, the model wants 3"):
        select_bands(info, RGB, (1, 2))
    with pytest.raises(UsageError, match=r"band 5 is not in a\.tif, which has 4 bands"):
        select_bands(info, RGB, (1, 2, 5))


def test_a_palette_is_expanded_to_colours(tmp_path):
    random = np.random.default_rng(0)
    table = random.integers(0, 256, (256, 4), dtype=np.uint8)
    values = noise((1, 30, 20))
    path = write(
        tmp_path / "a.tif", values, colormap={i: tuple(map(int, row)) for i, row in enumerate(table)}, nodata=9
    )
    source = open_raster(path)
    for wanted in (RGB, ("blue", "red")):
        chosen = source.select(select_bands(source.info, wanted))
        columns = [RGB.index(name) for name in wanted]
        pixels = chosen.open().read(Window.of(-2, 30, 0, 25))
        index = np.pad(values[0], ((2, 0), (0, 5)), mode="reflect")
        np.testing.assert_array_equal(pixels.values, table[index][..., columns].transpose(2, 0, 1))
        np.testing.assert_array_equal(pixels.validity(), index != 9)
        assert chosen.info.color_interp == wanted
        assert (chosen.info.bands, chosen.info.dtype, chosen.info.colormap) == (len(wanted), "uint8", None)
    assert select_bands(source.info, ("gray",)) == BandChoice((1,))


def test_a_short_palette_is_black_beyond_its_table():
    info = raster("palette", colormap=((1, 2, 3, 255), (4, 5, 6, 255)))

    class Two:
        def fetch(self, bands, window, out):
            out[...] = np.array([[[0, 1, 2, 255]]])

    class Recipe:
        def backend(self):
            return Two()

    from tilepipe.raster.reader import Reader

    pixels = Reader(Recipe(), info, select_bands(info, RGB)).read(Window.of(0, 1, 0, 4))
    np.testing.assert_array_equal(pixels.values[:, 0].T, [[1, 2, 3], [4, 5, 6], [0, 0, 0], [0, 0, 0]])
