"""Ground sizes of pixels that a model knows, and a raster's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rasters import noise, write
from runs import pixel_model, segment

from tilepipe.checkpoint import ModelCard
from tilepipe.resolution import is_resolution, mismatch, nearest, span, spelled

VALUES = noise((3, 97, 131))
SIZES = st.floats(0.01, 100)
RANGES = st.one_of(SIZES, st.tuples(SIZES, SIZES).map(lambda pair: (min(pair), max(pair))))


@given(RANGES, SIZES)
def test_the_nearest_size_is_in_the_range_and_none_in_it_is_nearer(trained, actual: float) -> None:
    least, greatest = span(trained)
    assert is_resolution(trained)
    found = nearest(trained, actual)
    assert least <= found <= greatest
    assert all(abs(found - actual) <= abs(other - actual) for other in (least, greatest, (least + greatest) / 2))
    assert mismatch(trained, actual) >= 1
    assert (mismatch(trained, actual) == 1) == (least <= actual <= greatest)


@given(RANGES)
def test_an_unknown_size_fits(trained) -> None:
    assert mismatch(trained, None) == mismatch(None, 1.0) == 1


@pytest.mark.parametrize("value", [0, -1, True, "0.3", float("nan"), float("inf"), (2, 1), (1,), (1, 2, 3), (0, 1), {}])
def test_what_is_no_resolution(value) -> None:
    assert not is_resolution(value)


def test_words() -> None:
    assert [spelled(each) for each in (None, 0.3, (0.0746, 0.2984), [1, 2])] == [
        "any size",
        "0.3 m",
        "0.0746 to 0.298 m",
        "1 to 2 m",
    ]


def test_a_card_keeps_a_range() -> None:
    card = replace(pixel_model().card, resolution=(0.075, 0.3))
    assert ModelCard.from_json(card.to_json()) == card


def test_resampling_reads_at_the_nearest_end_of_a_range(tmp_path: Path) -> None:
    """The raster's pixels are 2 m."""
    path = write(tmp_path / "in.tif", VALUES)
    for number, (trained, expected) in enumerate([((3.1, 7.0), 3.1), ((0.5, 1.0), 1.0), ((1.0, 4.0), 2.0)]):
        labels, _ = segment(path, tmp_path / f"{number}.zarr", pixel_model(resolution=trained), resample=True)
        assert labels.shape == tuple(round(side * 2 / expected) for side in VALUES.shape[1:])


def test_a_size_outside_the_range_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "in.tif", VALUES)
    notes = [
        segment(path, tmp_path / f"{least}.zarr", pixel_model(resolution=(least, 20.0)))[1].notes
        for least in (1.5, 3.0, 5.0)
    ]
    assert [any("was trained at" in note for note in each) for each in notes] == [False, False, True]
    assert "trained at 5 to 20 m" in " ".join(notes[2])
