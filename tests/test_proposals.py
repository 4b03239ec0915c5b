"""Aggregation against numpy pixel by pixel, resizing against torch, and what is read and written out of core."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional as F

from tilepipe.errors import InputError, UsageError
from tilepipe.proposals import aggregate, propose_windows, resize_scores
from tilepipe.window import Window

few = settings(deadline=None, max_examples=60)

Array = NDArray[Any]


def brute(maps: Sequence[Array], windows: Sequence[Window], shape: tuple[int, int], reduce: str, fill: float) -> Array:
    """The definition: for each pixel the scores of all windows that cover it, then numpy's maximum or mean."""
    out = np.full((len(maps[0]), *shape), fill, np.float32)
    for row in range(shape[0]):
        for col in range(shape[1]):
            found = [
                scores[:, row - window.rows.start, col - window.cols.start]
                for scores, window in zip(maps, windows, strict=True)
                if window.contains(Window.of(row, row + 1, col, col + 1))
            ]
            if found:
                stack = np.stack(found).astype(np.float64)
                out[:, row, col] = stack.max(0) if reduce == "max" else stack.sum(0) / len(found)
    return out


@st.composite
def proposals(draw: Any) -> tuple[list[Array], list[Window], tuple[int, int]]:
    shape = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    maps, windows = [], []
    for _ in range(draw(st.integers(1, 8))):
        height, width = draw(st.integers(1, 15)), draw(st.integers(1, 15))
        row, col = draw(st.integers(-16, shape[0] + 3)), draw(st.integers(-16, shape[1] + 3))
        windows.append(Window.of(row, row + height, col, col + width))
        maps.append(random.normal(size=(3, height, width)).astype(np.float32))
    return maps, windows, shape


blocks = st.tuples(st.integers(1, 30), st.integers(1, 30))


@few
@given(proposals(), st.sampled_from(["max", "mean"]), blocks, st.sampled_from([np.nan, 0.0, -3.5]))
def test_aggregation_is_its_definition(given_proposals, reduce, block, fill) -> None:
    maps, windows, shape = given_proposals
    found = aggregate(maps, windows, shape, reduce=reduce, block=block, fill=fill)
    np.testing.assert_array_equal(found, brute(maps, windows, shape, reduce, fill))


@few
@given(proposals(), blocks, st.randoms())
def test_the_order_of_windows_does_not_matter_to_the_maximum(given_proposals, block, random) -> None:
    maps, windows, shape = given_proposals
    order = list(range(len(maps)))
    random.shuffle(order)
    other = aggregate([maps[i] for i in order], [windows[i] for i in order], shape, block=block)
    np.testing.assert_array_equal(aggregate(maps, windows, shape), other)


@few
@given(proposals(), st.sampled_from(["max", "mean"]), blocks, st.integers(1, 9), st.integers(1, 9))
def test_maps_of_another_size_are_resized_whatever_the_blocks(given_proposals, reduce, block, height, width) -> None:
    maps, windows, shape = given_proposals
    small = [np.ascontiguousarray(scores[:, :height, :width]) for scores in maps]
    resized = [resize_scores(scores, window.shape) for scores, window in zip(small, windows, strict=True)]
    expected = brute(resized, windows, shape, reduce, np.nan)
    found = aggregate(small, windows, shape, reduce=reduce, block=block)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found, aggregate(small, windows, shape, reduce=reduce))


@few
@given(*[st.integers(1, 20)] * 4, st.sampled_from([np.float32, np.float64]))
def test_resizing_is_torchs(height, width, rows, cols, dtype) -> None:
    scores = np.random.default_rng(height * 20 + width).normal(size=(2, height, width)).astype(dtype)
    expected = F.interpolate(torch.from_numpy(scores)[None], size=(rows, cols), mode="bilinear")[0].numpy()
    found = resize_scores(scores, (rows, cols))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    if (height, width) == (rows, cols):
        np.testing.assert_array_equal(found, scores)


def test_a_nan_score_makes_its_pixel_nan_and_infinities_survive() -> None:
    first, second = np.full((2, 4, 4), -np.inf, np.float32), np.zeros((2, 4, 4), np.float32)
    second[1, 2, 2] = np.nan
    window = Window.of(0, 4, 0, 4)
    for maps in ([first, second], [second, first]):
        found = aggregate(maps, [window] * 2, (4, 4))
        assert np.isnan(found[1, 2, 2])
        assert np.count_nonzero(found == 0) == 31
    np.testing.assert_array_equal(aggregate([first], [window], (4, 4)), first)


# ---- out of core ------------------------------------------------------------------------------------------------


class Counting:
    """An array that counts the blocks written to it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.values = np.full(shape, np.nan, np.float32)
        self.shape, self.dtype = shape, self.values.dtype
        self.written: list[Any] = []

    def __setitem__(self, place: Any, values: Any) -> None:
        self.written.append(place)
        self.values[place] = values


def scattered(count: int = 30, side: int = 12, shape: tuple[int, int] = (200, 300)) -> tuple[list[Array], list[Window]]:
    random = np.random.default_rng(7)
    corners = random.integers(0, 60, (count, 2))
    windows = [Window.of(r, r + side, c, c + side) for r, c in corners.tolist()]
    return [random.normal(size=(2, side, side)).astype(np.float32) for _ in windows], windows


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_zarr_in_and_out_equals_memory(tmp_path, reduce) -> None:
    maps, windows = scattered()
    stored = zarr.create_array(tmp_path / "maps.zarr", shape=(30, 2, 12, 12), chunks=(1, 2, 12, 12), dtype="float32")
    stored[:] = np.stack(maps)
    out = zarr.create_array(
        tmp_path / "out.zarr", shape=(2, 200, 300), chunks=(2, 32, 32), dtype="float32", fill_value=np.nan
    )
    aggregate(stored, windows, (200, 300), reduce=reduce, out=out, block=(64, 32))
    np.testing.assert_array_equal(out[:], aggregate(maps, windows, (200, 300), reduce=reduce))
    touched = {(r, c) for window in windows for r in range(200 // 32) for c in range(300 // 32)
               if window.intersect(Window.of(32 * r, 32 * r + 32, 32 * c, 32 * c + 32)).area}  # fmt: skip
    chunks = {tuple(map(int, path.relative_to(tmp_path / "out.zarr/c").parts[1:]))
              for path in (tmp_path / "out.zarr/c").rglob("*") if path.is_file()}  # fmt: skip
    assert touched <= chunks
    assert max(row for row, _ in chunks) <= 3
    assert max(col for _, col in chunks) <= 2


def test_only_touched_blocks_are_written_and_each_once() -> None:
    maps, windows = scattered()
    out = Counting((2, 200, 300))
    assert aggregate(maps, windows, (200, 300), out=out, block=(16, 16)) is out
    touched = {(r, c) for window in windows for r in range(0, 200, 16) for c in range(0, 300, 16)
               if window.intersect(Window.of(r, r + 16, c, c + 16)).area}  # fmt: skip
    assert sorted((place[1].start, place[2].start) for place in out.written) == sorted(touched)
    assert len(touched) < 13 * 19
    np.testing.assert_array_equal(out.values, aggregate(maps, windows, (200, 300)))


def test_a_few_windows_in_a_raster_of_a_million_squared_write_a_few_chunks(tmp_path) -> None:
    shape = 1_000_000, 1_000_000
    windows = [Window.of(row, row + 20, row, row + 20) for row in range(5, 1_000_000, 90_000)]
    out = zarr.create_array(
        tmp_path / "out.zarr", shape=(1, *shape), chunks=(1, 64, 64), dtype="float32", fill_value=np.nan
    )
    aggregate(lambda i: np.full((1, 20, 20), i, np.float32), windows, shape, out=out, block=(64, 64))
    files = [path for path in (tmp_path / "out.zarr/c").rglob("*") if path.is_file()]
    assert len(windows) <= len(files) <= 4 * len(windows)
    last = windows[-1].rows.start
    assert (out[0, last : last + 20, last : last + 20] == len(windows) - 1).all()
    assert np.isnan(out[0, last - 1, last])


def test_each_map_is_loaded_at_most_once_per_block_it_touches() -> None:
    maps, windows = scattered()
    loads: Counter[int] = Counter()

    def load(index: int) -> Array:
        loads[index] += 1
        return maps[index]

    found = aggregate(load, windows, (200, 300), block=(16, 16), cache_bytes=1, out=Counting((2, 200, 300)))
    grid = [Window.of(r, r + 16, c, c + 16) for r in range(0, 80, 16) for c in range(0, 80, 16)]
    touches = [sum(window.intersect(block).area > 0 for block in grid) for window in windows]
    assert [loads[i] for i in range(30)] == touches
    loads.clear()
    again = aggregate(load, windows, (200, 300), block=(16, 16), cache_bytes=1 << 20, out=Counting((2, 200, 300)))
    assert set(loads.values()) == {1}
    np.testing.assert_array_equal(found.values, again.values)


def test_windows_beyond_the_raster_are_never_loaded() -> None:
    windows = [Window.of(0, 4, 0, 4), Window.of(50, 54, 0, 4), Window.of(-9, -5, 0, 4)]
    asked: list[int] = []

    def load(index: int) -> Array:
        asked.append(index)
        return np.ones((1, 4, 4), np.float32)

    assert np.nansum(aggregate(load, windows, (10, 10))) == 16
    assert asked == [0]


# ---- windows ----------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.sampled_from([0.0, 0.25, 0.5, 0.8]))
def test_proposed_windows_cover_the_raster_and_share_what_was_asked(rows, cols, side, overlap) -> None:
    windows = propose_windows((rows, cols), [side], overlap)
    covered = np.zeros((rows, cols), bool)
    for window in windows:
        assert window.shape == (side, side)
        inside = window.clip((rows, cols))
        covered[inside.rows.start : inside.rows.stop, inside.cols.start : inside.cols.stop] = True
        assert inside == window or side > min(rows, cols)
    assert covered.all()
    assert len(set(windows)) == len(windows)
    starts = sorted({window.cols.start for window in windows})
    assert all(side - (b - a) >= overlap * side or b - a == 1 for a, b in pairwise(starts))


def test_scales_follow_one_another_and_may_be_oblong() -> None:
    windows = propose_windows((64, 64), [64, (16, 32)], overlap=0)
    assert windows[0] == Window.of(0, 64, 0, 64)
    assert len(windows) == 1 + 4 * 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (((0, 5), [3]), "at least 1 x 1"),
        (((5, 5), [0]), "scale 0"),
        (((5, 5), [3], 1.0), "from 0 to below 1"),
    ],
)
def test_windows_that_cannot_be_are_refused(arguments, told) -> None:
    with pytest.raises(UsageError, match=told):
        propose_windows(*arguments)


SCORES = np.zeros((2, 3, 3), np.float32)
HERE = [Window.of(0, 3, 0, 3)]


@pytest.mark.parametrize(
    ("maps", "windows", "options", "error", "told"),
    [
        ([SCORES], HERE, {"reduce": "median"}, UsageError, "use one of max, mean"),
        ([SCORES], HERE, {"block": (0, 4)}, UsageError, "at least 1 x 1"),
        ([], [], {}, UsageError, "give out"),
        ([SCORES], HERE, {"out": np.zeros((2, 5, 5), np.float32)}, UsageError, r"needs \(classes, 9, 9\)"),
        ([SCORES[0]], HERE, {}, InputError, r"window 0 are float32 of shape \(3, 3\)"),
        ([SCORES, SCORES[:1]], HERE * 2, {}, InputError, "window 1 have 1 classes; the map has 2"),
    ],
)
def test_what_does_not_fit_is_refused(maps, windows, options, error, told) -> None:
    with pytest.raises(error, match=told):
        aggregate(maps, windows, (9, 9), **options)


def test_a_map_too_large_for_memory_needs_an_array_on_disk() -> None:
    with pytest.raises(UsageError, match="give out"):
        aggregate([SCORES], HERE, (1_000_000, 1_000_000))
