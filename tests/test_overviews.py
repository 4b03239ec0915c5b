from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rioxarray  # noqa: F401 - gives xarray its .rio
import zarr
from pyramids import mean, most_frequent
from stores import make_spec, make_store, value_spec

from tilepipe.store.output import create_or_resume, open_store
from tilepipe.store.overviews import write_overviews
from tilepipe.store.pyramid import Pyramid
from tilepipe.store.spec import LabelClass, StoreSpec

SMALL = {"smallest": 4, "square": 32, "chunk": 8}
"""Four levels of a map of 50 x 70: two of shards of their own, two that are joined."""


def add(path: Path, **how: Any) -> Pyramid:
    spec = open_store(path).spec
    pyramid = Pyramid.of(spec, **{**SMALL, **how})
    with create_or_resume(path, spec) as store:
        write_overviews(store, pyramid)
    return pyramid


@pytest.mark.parametrize(
    ("spec", "levels"),
    [
        (make_spec(confidence=True, probabilities="uint8"), 5),
        (make_spec(shards=False, confidence=True), 5),
        (make_spec(shape=(33, 129)), 6),
        (make_spec(shape=(1, 65)), 5),
        (make_spec(classes=[LabelClass(f"c{n}", (n % 256, 0, 0)) for n in range(300)]), 5),
        (value_spec(), 5),
        (value_spec(values="float16", shards=False), 5),
    ],
)
def test_each_level_is_the_brute_force_one(tmp_path: Path, spec: StoreSpec, levels: int) -> None:
    whole = make_store(tmp_path / "o.zarr", spec)
    pyramid = add(tmp_path / "o.zarr")
    assert pyramid.levels == levels
    group = zarr.open_group(tmp_path / "o.zarr", mode="r")
    for level in range(1, levels + 1):
        found, factor = group[f"ovr_{1 << level}x"], 1 << level
        reduced = {array.name for array in pyramid.reduced()}
        assert set(found.array_keys()) - {"spatial_ref", f"x_{factor}x", f"y_{factor}x"} == reduced
        for name in reduced:
            fill = spec.nodata if name == "labels" else 255
            if name == "labels":
                wanted = most_frequent(whole[name], factor, spec.nodata)
            elif name == "confidence":
                wanted = mean(whole[name], factor, fill)
            else:
                wanted = np.stack([mean(layer, factor, np.nan) for layer in whole[name]])
            np.testing.assert_allclose(found[name][:], wanted, rtol=0 if wanted.dtype.kind == "u" else 1e-6)
