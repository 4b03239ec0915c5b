"""Vectors in numba kernels, against numpy; and what is read and written at the ends of lines."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError
from numpy.typing import NDArray

from tilepipe.predict.lanes import LANES, cast, exponent, like, load, muladd, store, where, zeros
from tilepipe.predict.softmax import Array

KINDS = (np.float32, np.float64, np.int32, np.uint8, np.uint16)


@njit  # type: ignore[untyped-decorator]
def copied(line: Array, out: Array, start: int, count: int) -> None:
    store(load(line, start, count), out, start, count)


@njit  # type: ignore[untyped-decorator]
def padded(line: Array, out: Array, count: int) -> None:
    store(load(line, 0, count), out, 0, LANES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [*range(LANES + 1), LANES + 5])
def test_only_so_many_are_read_and_written(kind: type[np.generic], count: int) -> None:
    line = np.arange(1, 41).astype(kind)
    taken, out = min(count, LANES), np.full(40, 99, kind)
    copied(line, out, 3, count)
    np.testing.assert_array_equal(out[3 : 3 + taken], line[3 : 3 + taken])
    assert (out[:3] == 99).all()
    assert (out[3 + taken :] == 99).all()
    padded(line, out, count)
    np.testing.assert_array_equal(out[:LANES], np.where(np.arange(LANES) < count, line[:LANES], 0))


@njit  # type: ignore[untyped-decorator]
def combined(a: Array, b: Array, out: Array) -> None:
    x, y = load(a, 0, LANES), load(b, 0, LANES)
    results = (x + y, x - y, x * y, x / y, where(x > y, x, y), muladd(x, y, like(x, 3)), zeros(a.dtype.type) + x)
    for n in range(7):
        store(results[n], out[n], 0, LANES)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_arithmetic_is_numpys(kind: type[np.floating]) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, LANES)).astype(kind)
    a[3], b[5], a[7] = np.nan, np.nan, np.inf
    out = np.empty((7, LANES), kind)
    combined(a, b, out)
    expected = np.stack([a + b, a - b, a * b, a / b, np.where(a > b, a, b), a * b + kind(3), a])
    np.testing.assert_allclose(out, expected, rtol=4 * np.finfo(kind).eps)
    for exact in (0, 1, 2, 3, 4, 6):
        np.testing.assert_array_equal(out[exact], expected[exact])


@njit  # type: ignore[untyped-decorator]
def converted(a: Array, out: Array) -> None:
    store(cast(load(a, 0, LANES), out.dtype.type), out, 0, LANES)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(np.float64, np.float32), (np.float32, np.float64), (np.int32, np.uint8), (np.int32, np.uint16),
     (np.uint8, np.int32), (np.int16, np.int32), (np.int32, np.int32)],
)  # fmt: skip
def test_conversion_is_numpys(given: type[np.generic], wanted: type[np.generic]) -> None:
    values = np.random.default_rng(1).normal(0, 9999, LANES).astype(given)
    out = np.empty(LANES, wanted)
    converted(values, out)
    np.testing.assert_array_equal(out, values.astype(wanted))


@njit  # type: ignore[untyped-decorator]
def powers(a: Array, out: Array) -> None:
    store(exponent(load(a, 0, LANES)), out, 0, LANES)


def test_bits_become_exponents() -> None:
    bits = np.arange(120, 120 + LANES, dtype=np.uint32) | 0x4B400000
    out: NDArray[np.float32] = np.empty(LANES, np.float32)
    powers(bits.view(np.float32), out)
    np.testing.assert_array_equal(out, 2.0 ** (np.arange(120, 120 + LANES) - 127))


@pytest.mark.parametrize("out", [np.empty(LANES, np.float64), np.empty(2 * LANES, np.float32)[::2]])
def test_lines_of_another_type_or_with_gaps_are_refused(out: Array) -> None:
    with pytest.raises(TypingError):
        copied(np.empty(LANES, np.float32), out, 0, LANES)
    with pytest.raises(TypingError):
        converted(np.empty(LANES, np.int32), np.empty(LANES, np.float32))


def test_integers_are_added_only() -> None:
    whole = np.empty(LANES, np.int32)
    with pytest.raises(TypingError):
        combined(whole, whole, np.empty((7, LANES), np.int32))
