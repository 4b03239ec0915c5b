"""What pictures are made of: cells against brute force, views, legends, scale bars, letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from pyproj import CRS, Geod, Transformer
from pyramids import mean as brute_mean
from pyramids import most_frequent
from stores import block_maps, expected, make_spec, make_store, value_spec

from tilepipe.errors import UsageError
from tilepipe.ground import pixel_width
from tilepipe.overviews import make_overviews
from tilepipe.pictures.cells import MANY, Part, majority, mean
from tilepipe.pictures.colors import NODATA_COLOR, confidence_palette
from tilepipe.pictures.fonts import shortened, words
from tilepipe.pictures.legend import ENTRIES, class_entries, value_entries
from tilepipe.pictures.scale import metres, round_length, scale_bar
from tilepipe.pictures.stored import StoredMap
from tilepipe.pictures.view import View, view_of
from tilepipe.store.output import create_or_resume, open_store
from tilepipe.store.spec import LabelClass
from tilepipe.window import Window

DEGREES = CRS.from_epsg(4326).to_wkt()


def whole_part(values: NDArray[Any]) -> Part:
    return Part(values, (0, 0, values.shape[-1], values.shape[-2]))


@st.composite
def labels_and_factor(draw: st.DrawFn) -> tuple[NDArray[np.uint8], int]:
    factor = draw(st.integers(2, 5))
    cells = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    values = st.sampled_from([0, 1, 2, 3, 255])
    return draw(arrays(np.uint8, (cells[0] * factor, cells[1] * factor), elements=values)), factor


@given(labels_and_factor())
def test_a_cell_shows_its_most_frequent_label_and_mean(case: tuple[NDArray[np.uint8], int]) -> None:
    labels, factor = case
    shape = labels.shape[0] // factor, labels.shape[1] // factor
    np.testing.assert_array_equal(majority(whole_part(labels), shape, 255), most_frequent(labels, factor, 255))
    wanted = brute_mean(labels, factor, 255).astype(int)
    # A mean that lies between two integers may be rounded to either.
    assert np.abs(mean(whole_part(labels), shape, 255).astype(int) - wanted).max() <= 1
    values = np.where(labels == 255, np.nan, labels).astype(np.float32)[None]
    np.testing.assert_allclose(mean(whole_part(values), shape, np.nan)[0], brute_mean(values[0], factor, np.nan), 1e-5)


def test_what_is_reduced_in_strips_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(3).integers(0, 4, (90, 60), dtype=np.uint8)
    part, shape = Part(labels, (3, 1.5, 58.25, 88.75)), (41, 23)
    whole = majority(part, shape, 3), mean(part, shape, 3)
    monkeypatch.setattr("tilepipe.pictures.cells.STRIP", 7)
    np.testing.assert_array_equal(majority(part, shape, 3), whole[0])
    np.testing.assert_array_equal(mean(part, shape, 3), whole[1])


@given(labels_and_factor(), st.data())
def test_cells_of_any_size_show_what_lies_in_them(case: tuple[NDArray[np.uint8], int], data: st.DataObject) -> None:
    labels, _ = case
    shape = tuple(data.draw(st.integers(1, side)) for side in labels.shape)
    found = majority(whole_part(labels), shape, 255)
    for row, col in np.ndindex(*shape):
        places = [
            slice(int(n * side / cells), -int(-(n + 1) * side // cells))
            for n, side, cells in zip((row, col), labels.shape, shape, strict=True)
        ]
        assert found[row, col] in labels[tuple(places)]


def test_many_classes_show_the_pixel_in_the_middle() -> None:
    labels = np.arange(3 * 3 * MANY, dtype=np.uint16).reshape(3, 3 * MANY)
    found = majority(whole_part(labels), (1, MANY), 65535)
    np.testing.assert_array_equal(found, labels[1:2, 1::3])


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, NDArray[Any]]]:
    """A finished store with overviews, and its whole arrays."""
    path = tmp_path_factory.mktemp("mapped") / "o.zarr"
    whole = make_store(path, make_spec(shape=(1100, 1600), shard=(512, 512), chunk=(256, 256), confidence=True))
    make_overviews(path)
    return path, whole


def test_overviews_are_shown_where_they_suffice(mapped: tuple[Path, dict[str, NDArray[Any]]]) -> None:
    path, whole = mapped
    stored = StoredMap(open_store(path))
    assert (stored.factors, stored.whole) == ([2, 4], True)
    view = view_of(stored.spec, None, 400, 400)
    assert not stored.sampled(view)
    np.testing.assert_array_equal(stored.labels(view), most_frequent(whole["labels"], 4, 255))
    np.testing.assert_array_equal(stored.confidence(view), brute_mean(whole["confidence"], 4, 255))
    part = View(Window.of(200, 600, 400, 1000), (200, 300))
    np.testing.assert_array_equal(stored.labels(part), most_frequent(whole["labels"][200:600, 400:1000], 2, 255))
    full = View(Window.of(700, 731, 1580, 1600), (31, 20))
    np.testing.assert_array_equal(stored.labels(full), whole["labels"][700:731, 1580:1600])
    np.testing.assert_array_equal(stored.confidence(full), whole["confidence"][700:731, 1580:1600])


def test_little_more_is_read_than_is_shown(
    mapped: tuple[Path, dict[str, NDArray[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, sizes = StoredMap(open_store(mapped[0])), []
    read = StoredMap._read

    def counted(self: StoredMap, *args: Any) -> NDArray[Any]:
        values = read(self, *args)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(StoredMap, "_read", counted)
    for window in ("0:1100,0:1600", "3:900,5:1007", "100:180,30:99"):
        for side in (64, 100, 333):
            view = view_of(stored.spec, window, side, side)
            sizes.clear()
            stored.labels(view)
            # Not twice as many a side, but where the coarsest overview ends; and the pixels at the edges.
            finer = max(2.0, view.ratio / stored.factors[-1])
            assert sum(sizes) <= (finer * view.shape[0] + 2) * (finer * view.shape[1] + 2)


def test_without_overviews_some_pixels_are_shown_of_the_blocks_that_are_done(memory_path: Path) -> None:
    for spec in (
        make_spec(shape=(640, 800), shard=(256, 256), chunk=(64, 64)),
        value_spec(shape=(640, 800), shard=(256, 256), chunk=(64, 64), outputs=("a", "b", "c", "d")),
    ):
        whole, path = expected(spec), memory_path / f"{spec.kind}.zarr"
        done = [index for index in spec.blocks() if index not in ((0, 0), (2, 3))]
        with create_or_resume(path, spec) as store:
            for index in done:
                store.write_block(index, block_maps(spec, whole, index), {})
            # What lies in a block without a record proves nothing.
            store.write_block((0, 0), block_maps(spec, whole, (0, 0)), {})
            store.forget((0, 0))
        stored, values = StoredMap(open_store(path)), whole[spec.kind]
        values[..., :256, :256] = values[..., 512:, 768:] = 255 if spec.kind == "labels" else np.nan
        view = view_of(spec, None, 50, 50)
        assert (stored.whole, stored.sampled(view), stored.factors) == (False, True, [])
        sampled = values[..., ::8, ::8]
        if spec.kind == "labels":
            np.testing.assert_array_equal(stored.labels(view), most_frequent(sampled, 2, 255))
        else:
            wanted = np.stack([brute_mean(layer, 2, np.nan) for layer in sampled[:3]])
            np.testing.assert_allclose(stored.values(view), wanted, rtol=1e-5)


def test_stale_overviews_are_not_shown(tmp_path: Path) -> None:
    spec = make_spec(shape=(600, 600), shard=(512, 512), chunk=(256, 256))
    whole = make_store(tmp_path / "o.zarr", spec)
    make_overviews(tmp_path / "o.zarr")
    whole["labels"][:512, :512] = 2
    with create_or_resume(tmp_path / "o.zarr", spec) as store:
        store.forget((0, 0))
        store.write_block((0, 0), block_maps(spec, whole, (0, 0)), {})
    stored = StoredMap(open_store(tmp_path / "o.zarr"))
    assert stored.factors == []
    view = view_of(spec, None, 300, 300)
    np.testing.assert_array_equal(stored.labels(view), most_frequent(whole["labels"], 2, 255))


def test_views() -> None:
    spec = make_spec(shape=(3000, 9001))
    assert view_of(spec, None, 900, 900).shape == (300, 900)
    assert view_of(spec, "0:1,:", 900, 900).shape == (1, 900)
    assert view_of(spec, "0:5000,0:2", 4096, 900) == View(Window.of(0, 3000, 0, 2), (3000, 2))
    assert view_of(spec, "10:20,30:70", 4096, 900).enlarged == 22
    bounds = view_of(spec, "500010,4999900,500200,4999990", 4096, 900)
    assert bounds.window == Window.of(1, 10, 1, 20)
    for text in ("5:2,0:9", "0:1", "8000:9000,0:9", "x"):
        with pytest.raises(UsageError, match=f"^window {text}"):
            view_of(spec, text, 900, 900)


@given(st.floats(1e-3, 1e7), st.integers(1, 100_000))
def test_scale_bars_are_round_and_fit(pixel: float, cols: int) -> None:
    spec = make_spec(shape=(10, cols), transform=(pixel, 0.0, 0.0, 0.0, -pixel, 0.0))
    bar = scale_bar(spec, View(Window.whole(spec.shape), (10, cols)))
    assert 0.3 / 2.5 - 1e-9 <= bar.share <= 0.3 + 1e-9
    number, unit = bar.text.split()
    length = float(number) * {"km": 1e3, "m": 1.0, "cm": 1e-2, "mm": 1e-3}[unit]
    assert length == pytest.approx(bar.share * cols * pixel)
    assert f"{length:e}"[0] in "125"


def test_scale_bars_of_maps_without_place_count_pixels() -> None:
    spec = make_spec(shape=(10, 400), transform=None, crs_wkt=None)
    assert scale_bar(spec, View(Window.whole(spec.shape), (10, 400))) == (0.25, "100 px")
    assert scale_bar(spec, View(Window.of(0, 1, 0, 1), (1, 1))) == (1.0, "1 px")
    assert [round_length(most) for most in (9.99, 10, 49)] == [5, 10, 20]
    assert metres(2e6) == "2000 km"


@given(st.floats(-80, 80), st.sampled_from([4326, 3857, 32632, 2263]))
def test_pixels_are_as_wide_as_on_the_ground(latitude: float, code: int) -> None:
    place = Transformer.from_crs(4326, code, always_xy=True)
    if code in (32632, 2263):
        spec = make_spec(crs_wkt=CRS.from_epsg(code).to_wkt(), transform=(3.0, 0.0, 5e5, 0.0, -3.0, 2e5))
        metre = 1.0 if code == 32632 else 1200 / 3937
        assert pixel_width(spec, 5, 7) == pytest.approx(3 * metre)
        return
    x, y = place.transform(11.0, latitude)
    width = 1e-4 if code == 4326 else 10.0
    spec = make_spec(crs_wkt=CRS.from_epsg(code).to_wkt(), transform=(width, 0.0, x, 0.0, -width, y))
    back = Transformer.from_crs(code, 4326, always_xy=True)
    (west, north), (east, south) = (back.transform(x + n * width, y) for n in (0, 1))
    assert pixel_width(spec, 0, 0.5) == pytest.approx(Geod(ellps="WGS84").inv(west, north, east, south)[2], rel=1e-6)
    assert pixel_width(make_spec(crs_wkt=None), 0, 0) is None


def test_legends_name_what_is_shown() -> None:
    classes = [LabelClass(f"c{n}", (n % 256, 0, 0)) for n in range(300)]
    labels = np.array([[7, 7, 7, 9], [9, 4, 65535, 65535]], np.uint16)
    names = [entry.name for entry in class_entries(classes, labels)]
    assert names == ["c7", "c9", "c4", "and 297 more", "no data"]
    few = class_entries(classes[:ENTRIES], labels.astype(np.uint8) % 10)
    assert [entry.name for entry in few] == [f"c{n}" for n in range(ENTRIES)]
    entries = value_entries(value_spec(), np.stack([np.arange(101.0), np.arange(101.0)])[:, None])
    assert [entry.name for entry in entries] == ["height above ground: 2 to 98", "and 1 more"]
    assert value_entries(value_spec(), np.full((2, 3, 3), np.nan))[0].name == "and 1 more"
    assert tuple(confidence_palette()[255]) == NODATA_COLOR


def test_letters_that_a_font_lacks_are_taken_from_another_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert words("plain", 18).font is words("text", 18).font
    monkeypatch.setattr("tilepipe.pictures.fonts.SYSTEM", ())
    assert words("Gebäude \n è", 18).text == "Gebaude e"
    assert words("水 road", 18).text == "? road"
    short = shortened("a long name of a class", 18, 80)
    assert short.text.startswith("a l")
    assert short.text.endswith("...")
    assert short.width <= 80
