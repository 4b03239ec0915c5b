from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from zarr.storage import MemoryStore

from tilepipe.errors import StoreError
from tilepipe.store.shards import array_json, encode_block
from tilepipe.store.spec import ArraySpec


def make_array(dtype: str, shape: tuple[int, ...], shard: tuple[int, ...], chunk: tuple[int, ...], sharded: bool):
    kind = np.dtype(dtype)
    fill = math.nan if kind.kind == "f" else int(np.iinfo(kind).max)
    dims = ("class", "y", "x")[-len(shape) :]
    return ArraySpec("a", kind, fill, shape, shard, chunk, dims, sharded)


@st.composite
def cases(draw: st.DrawFn) -> tuple[ArraySpec, Any]:
    dtype = draw(st.sampled_from(["uint8", "uint16", "float16"]))
    chunk = tuple(draw(st.integers(1, 5)) for _ in range(2))
    shard = tuple(c * draw(st.integers(1, 3)) for c in chunk)
    shape = tuple(draw(st.integers(1, 3 * s)) for s in shard)
    sharded = draw(st.booleans())
    if draw(st.booleans()):
        bands = draw(st.integers(1, 3))
        shape, shard, chunk = (bands, *shape), (bands if sharded else 1, *shard), (1, *chunk)
    array = make_array(dtype, shape, shard, chunk, sharded)
    values = draw(arrays(array.dtype, shape, elements=st.sampled_from([0, 1, 2]), fill=st.just(array.fill)))
    return array, values


def encode(array: ArraySpec, values: Any) -> dict[str, bytes]:
    (height, width), files = array.shard[-2:], {"a/zarr.json": array_json(array, {})}
    for row in range(-(-values.shape[-2] // height)):
        for col in range(-(-values.shape[-1] // width)):
            part = values[..., row * height : (row + 1) * height, col * width : (col + 1) * width]
            for key, data in encode_block(array, (row, col), part):
                assert key not in files
                if data is not None:
                    files[key] = data
    return files


def opened(files: dict[str, bytes]) -> zarr.Array[Any]:
    buffers = {key: zarr.core.buffer.cpu.Buffer.from_bytes(data) for key, data in files.items()}
    return zarr.open_array(MemoryStore(buffers), path="a", mode="r")


def written_by_zarr(array: ArraySpec, values: Any) -> tuple[MemoryStore, zarr.Array[Any]]:
    store = MemoryStore()
    target = zarr.create_array(
        store,
        name="a",
        shape=array.shape,
        dtype=array.dtype,
        chunks=array.chunk,
        shards=array.shard if array.sharded else None,
        fill_value=array.fill,
        compressors=zarr.codecs.ZstdCodec(level=1),
        dimension_names=array.dims,
    )
    target[...] = values
    return store, target


@settings(max_examples=120, deadline=None)
@given(cases())
def test_zarr_reads_what_was_encoded_and_would_have_made_the_same_files(case: tuple[ArraySpec, Any]) -> None:
    array, values = case
    files = encode(array, values)
    np.testing.assert_array_equal(opened(files)[...], values)
    store, _ = written_by_zarr(array, values)
    assert set(files) == set(store._store_dict) - {"zarr.json"}
    if not array.sharded:
        assert all(files[key] == store._store_dict[key].to_bytes() for key in files if key != "a/zarr.json")


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16"])
def test_metadata_are_what_zarr_writes(dtype: str, sharded: bool) -> None:
    array = make_array(dtype, (30, 40), (16, 16), (8, 4), sharded)
    store, _ = written_by_zarr(array, np.zeros(array.shape, array.dtype))
    assert json.loads(array_json(array, {})) == json.loads(store._store_dict["a/zarr.json"].to_bytes())


def test_parts_of_shards_can_be_read_alone() -> None:
    array = make_array("uint8", (64, 64), (32, 32), (8, 8), True)
    values = np.random.default_rng(1).integers(0, 255, array.shape).astype(np.uint8)
    values[8:24, 8:40] = 255
    np.testing.assert_array_equal(opened(encode(array, values))[5:37, 19:61], values[5:37, 19:61])


def test_spatial_dimensions_other_than_the_arrays_are_refused() -> None:
    array = make_array("uint8", (8, 8), (8, 8), (8, 8), True)
    with pytest.raises(StoreError, match="spatial:dimensions"):
        array_json(array, {"spatial:dimensions": ["lat", "lon"]})
