"""Merging small regions against GDAL's sieve."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from rasterio.features import sieve
from shapes_of import NODATA, label_maps

from tilepipe.polygons.sieve import Sieve
from tilepipe.polygons.strips import Strip


def sieved(labels: np.ndarray, threshold: int, rows: int = 1000) -> np.ndarray:
    wide = labels.astype(np.uint16)

    def strips():
        return (Strip(row, wide[row : row + rows]) for row in range(0, len(wide), rows))

    found = Sieve.of(strips, labels.shape[1], threshold, NODATA)
    return np.concatenate([strip.labels for strip in found.apply(strips())])


@given(label_maps(), st.integers(1, 12), st.integers(1, 9))
def test_the_map_is_gdals(labels, threshold, rows) -> None:
    # rasterio takes thresholds below the raster's size, and no mask that hides all.
    threshold = min(threshold, labels.size - 1)
    if threshold < 1 or (labels == NODATA).all():
        return
    wanted = sieve(labels, threshold, connectivity=4, mask=labels != NODATA)
    np.testing.assert_array_equal(sieved(labels, threshold, rows), wanted)


def test_a_small_region_joins_its_largest_neighbour() -> None:
    labels = np.zeros((8, 10), np.uint8)
    labels[:, 6:] = 1
    labels[3, 5] = 2
    wanted = np.where(labels == 2, 0, labels)
    np.testing.assert_array_equal(sieved(labels, 2), wanted)
    np.testing.assert_array_equal(sieved(labels, 1), labels)


def test_small_regions_among_themselves_stay() -> None:
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(sieved(labels, 5), labels)


def test_what_has_no_data_takes_no_part() -> None:
    labels = np.full((6, 6), NODATA, np.uint8)
    labels[2, 2] = 1
    labels[4:, 4:] = 3
    np.testing.assert_array_equal(sieved(labels, 4), labels)
