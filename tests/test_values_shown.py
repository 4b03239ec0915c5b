"""What people see of a store of values: `status`, `export`, and colours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from commands import assert_one_line, run
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from stores import OUTPUTS, make_store, value_spec

from tilepipe.errors import InputError
from tilepipe.pictures.colors import stretched
from tilepipe.store.output import create_or_resume


def test_status_shows_channels(tmp_path: Path) -> None:
    values = make_store(tmp_path / "o.zarr", value_spec(settings={}))["values"]
    result = run("status", tmp_path / "o.zarr", "--json")
    found = json.loads(result.stdout, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert (found["blocks"], found["done"], found["classes"]) == (6, 6, {})
    assert found["nodata"] == np.isnan(values[0]).sum()
    for name, channel in zip(OUTPUTS, values, strict=True):
        told = found["channels"][name]
        assert told["pixels"] == np.isfinite(channel).sum()
        assert (told["min"], told["max"]) == (np.nanmin(channel), np.nanmax(channel))
        assert told["mean"] == pytest.approx(np.nanmean(channel), rel=1e-5)
    text = run("status", tmp_path / "o.zarr").output
    assert [line.split()[0] for line in text.splitlines()[-4:]] == ["channel", "height", "slope", "nodata"]
    assert f"{np.nanmax(values[1]):.6g}" in text
    assert "predict" not in text


def test_status_of_values_without_data_or_end(tmp_path: Path) -> None:
    spec = value_spec(settings={})
    with create_or_resume(tmp_path / "o.zarr", spec) as store:
        store.write_nodata((0, 0), {})
    found = json.loads(run("status", tmp_path / "o.zarr", "--json").stdout)
    assert found["channels"]["slope"] == {"pixels": 0, "min": None, "mean": None, "max": None}
    text = run("status", tmp_path / "o.zarr").output
    assert "1 of 6 done; the `tilepipe predict` command that made it finishes it" in text
    assert text.splitlines()[-2].split() == ["slope", "0", "-", "-", "-"]


def test_export_on_the_command_line(tmp_path: Path) -> None:
    values = make_store(tmp_path / "o.zarr", value_spec(values="float16"))["values"]
    result = run("export", tmp_path / "o.zarr", tmp_path / "v.tif")
    assert result.exit_code == 0, result.output
    with rasterio.open(tmp_path / "v.tif") as tif:
        np.testing.assert_array_equal(tif.read(), values.astype(np.float32))
    assert_one_line(run("export", tmp_path / "o.zarr", tmp_path / "l.tif", "--array", "labels"), 2, "it has values")


def percentile(values: list[float], percent: float) -> float:
    """By linear interpolation between the sorted values."""
    values = sorted(values)
    place = percent / 100 * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
        elements=st.one_of(st.just(float("nan")), st.integers(-50, 50).map(float)),
    )
)
def test_values_are_stretched_between_percentiles(values: NDArray[Any]) -> None:
    picture = stretched(values)
    shown = values[:3] if len(values) >= 3 else values[:1]
    valid = ~np.isnan(shown).any(axis=0)
    np.testing.assert_array_equal(picture[..., 3], np.where(valid, 255, 0))
    assert (picture[~valid][:, :3] == 255).all()
    for number in range(3):
        channel = shown[number % len(shown)]
        known = channel[valid].tolist()
        for row, col in zip(*np.nonzero(valid), strict=True):
            low, high = percentile(known, 2), percentile(known, 98)
            share = 0.5 if low == high else min(max((channel[row, col] - low) / (high - low), 0), 1)
            assert abs(picture[row, col, number] - 255 * share) <= 0.5 + 1e-6


def test_only_real_numbers_in_channels_are_stretched() -> None:
    for values in (np.zeros((4, 5)), np.zeros((2, 0, 3)), np.zeros((1, 2, 2), bool)):
        with pytest.raises(InputError, match="channels, rows, columns"):
            stretched(values)
