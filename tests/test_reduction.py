from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pyramids import mean, most_frequent

from tilepipe.store.reduction import majority_levels, mean_levels


@st.composite
def maps(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Labels, some without data and in patches of one class, with the number of classes and nodata's value."""
    classes = draw(st.sampled_from([1, 2, 3, 4, 5, 16, 17, 65, 255, 300]))
    dtype = np.uint8 if classes < 256 else np.uint16
    nodata = int(np.iinfo(dtype).max)
    values = st.one_of(st.integers(0, classes - 1), st.integers(0, min(2, classes - 1)), st.just(nodata))
    labels = draw(arrays(dtype, array_shapes(min_dims=2, max_dims=2, max_side=21), elements=values))
    patch = draw(st.sampled_from([1, 1, 2, 4, 5]))
    return np.kron(labels, np.ones((patch, patch), dtype)), classes, nodata


@settings(max_examples=150, deadline=None)
@given(maps(), st.integers(1, 7))
def test_labels_are_the_most_frequent_of_all_pixels(made: tuple[np.ndarray, int, int], levels: int) -> None:
    labels, classes, nodata = made
    before = labels.copy()
    found = majority_levels(labels, levels, classes, nodata)
    assert len(found) == levels
    for level, out in enumerate(found, 1):
        assert out.dtype == labels.dtype
        np.testing.assert_array_equal(out, most_frequent(labels, 1 << level, nodata))
    np.testing.assert_array_equal(labels, before)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["uint8", "float16", "float32"]).flatmap(
        lambda dtype: arrays(
            dtype,
            array_shapes(min_dims=2, max_dims=2, max_side=33),
            elements=st.integers(0, 255)
            if dtype == "uint8"
            else st.one_of(st.floats(-1000, 1000, width=16), st.just(float("nan"))),
        )
    ),
    st.integers(1, 6),
)
def test_numbers_are_the_mean_of_all_pixels_with_data(values: np.ndarray, levels: int) -> None:
    fill: Any = 255 if values.dtype == np.uint8 else float("nan")
    for level, out in enumerate(mean_levels(values, levels, fill), 1):
        wanted = mean(values, 1 << level, fill)
        assert out.dtype == values.dtype
        if values.dtype == np.uint8:
            np.testing.assert_array_equal(out, wanted)
        else:
            np.testing.assert_allclose(out, wanted, rtol=2e-3 if values.dtype == np.float16 else 1e-6, atol=1e-4)


def test_the_majority_of_majorities_is_another_map() -> None:
    # Class 1 has two pixels of each of three quarters, six in all; class 0 has seven.
    labels = np.array([[2, 1, 2, 1], [0, 1, 0, 1], [2, 1, 0, 0], [0, 1, 0, 0]], np.uint8)
    first, second = majority_levels(labels, 2, 3, 255)
    assert first.tolist() == [[1, 1], [1, 0]]
    assert second.tolist() == [[0]]
    assert majority_levels(first, 1, 3, 255)[0].tolist() == [[1]]


@pytest.mark.parametrize("classes", [3, 255])
def test_labels_beyond_the_classes_count_as_no_data(classes: int) -> None:
    labels = np.full((64, 64), 255, np.uint8)
    labels[0, 0], labels[5, 5] = classes, 1
    found = majority_levels(labels, 6, classes, 255)
    assert found[0][0, 0] == 255
    assert found[-1].tolist() == [[1]]


def test_a_cell_of_one_labelled_pixel_has_its_label() -> None:
    labels = np.full((512, 512), 255, np.uint8)
    labels[300, 17] = 2
    assert majority_levels(labels, 9, 6, 255)[-1].tolist() == [[2]]
