"""Arrays and blocks as the bytes of zarr version 3, written without zarr-python.

zarr-python passes every chunk of every thread through one event loop (160 megapixels a second of labels, where
this gives 680 on the same core), which would starve a GPU. The format is small: an array's `zarr.json`, chunks
of little-endian values compressed with zstd, and shards:

    | chunk | chunk | ... | index: uint64 (offset, length) of each chunk, row-major | crc32c of the index |

A chunk that holds only the fill value is left out (offset and length 2^64 - 1), and so is the file of a shard
that holds nothing else. Formulas: zarr v3 core, and its sharding codec `sharding_indexed` version 1.0.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import Zstd  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tilepipe.errors import StoreError
from tilepipe.store.spec import ArraySpec

LEVEL = 1
"""Of zstd: 22 times smaller on label maps; higher levels gain nothing there."""

MISSING = 2**64 - 1


def array_json(array: ArraySpec, attributes: Mapping[str, Any]) -> bytes:
    """The array's `zarr.json`; StoreError where spatial:dimensions are not the array's own, which crashes GDAL."""
    _check_dimensions(array, attributes)
    inner = [_bytes_codec(array.dtype), _ZSTD]
    chunk, codecs = array.chunk, inner
    if array.sharded:
        chunk, codecs = array.shard, [_sharding(array.chunk, inner)]
    metadata = {
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if math.isnan(array.fill) else array.fill,
        "codecs": codecs,
        "attributes": dict(attributes),
        "dimension_names": list(array.dims),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    return json.dumps(metadata, indent=2).encode()


def group_json(attributes: Mapping[str, Any]) -> bytes:
    """A group's `zarr.json`."""
    return json.dumps({"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}, indent=2).encode()


def encode_block(array: ArraySpec, index: tuple[int, ...], values: NDArray[Any]) -> Iterator[tuple[str, bytes | None]]:
    """Each file of one block as (key, bytes), or (key, None) where all is fill and no file may be there.

    `values` are the block's pixels, cut to the array at its edges; leading axes are whole, unless `index` says where
    along them the block lies, too.
    """
    unit, encode = (array.shard, encode_shard) if array.sharded else (array.chunk, encode_chunk)
    index = (*(0,) * (values.ndim - len(index)), *index)
    first = [n * (s // u) for n, s, u in zip(index, array.shard, unit, strict=True)]
    for cell, part in _chunks(values, unit):
        key = "/".join(map(str, (array.name, "c", *(f + n for f, n in zip(first, cell, strict=True)))))
        yield key, encode(part, array)


def encode_shard(values: NDArray[Any], array: ArraySpec) -> bytes | None:
    """The shard that holds `values` in its first corner and fill elsewhere; None where all is fill."""
    grid = tuple(s // c for s, c in zip(array.shard, array.chunk, strict=True))
    index = np.full((*grid, 2), MISSING, dtype="<u8")
    parts: list[bytes] = []
    offset = 0
    for cell, chunk in _chunks(values, array.chunk):
        data = encode_chunk(chunk, array)
        if data is not None:
            index[cell] = offset, len(data)
            offset += len(data)
            parts.append(data)
    if not parts:
        return None
    table = index.tobytes()
    return b"".join([*parts, table, google_crc32c.value(table).to_bytes(4, "little")])


def encode_chunk(values: NDArray[Any], array: ArraySpec) -> bytes | None:
    """The chunk that holds `values` in its first corner and fill elsewhere; None where all is fill."""
    if _all_fill(values, array.fill):
        return None
    if values.shape != array.chunk:
        padded = np.full(array.chunk, array.fill, array.dtype)
        padded[tuple(slice(n) for n in values.shape)] = values
        values = padded
    little = np.ascontiguousarray(values, dtype=array.dtype.newbyteorder("<"))
    return bytes(Zstd(level=LEVEL).encode(little))


def _chunks(values: NDArray[Any], chunk: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], NDArray[Any]]]:
    counts = [range(-(-n // c)) for n, c in zip(values.shape, chunk, strict=True)]
    for cell in itertools.product(*counts):
        yield cell, values[tuple(slice(n * c, (n + 1) * c) for n, c in zip(cell, chunk, strict=True))]


def _all_fill(values: NDArray[Any], fill: int | float) -> bool:
    corner = values[(0,) * values.ndim]
    if math.isnan(fill):
        return bool(np.isnan(corner)) and bool(np.isnan(values).all())
    return bool(corner == fill) and bool((values == fill).all())


def _check_dimensions(array: ArraySpec, attributes: Mapping[str, Any]) -> None:
    spatial = attributes.get("spatial:dimensions")
    if len(array.dims) != len(array.shape) or len(set(array.dims)) != len(array.dims):
        raise StoreError(f"{array.name}: dimension names {array.dims} do not name {len(array.shape)} axes")
    if spatial is not None and tuple(spatial) != array.dims[-2:]:
        raise StoreError(f"{array.name}: spatial:dimensions {spatial} are not its last axes {array.dims[-2:]}")


def _bytes_codec(dtype: np.dtype[Any]) -> dict[str, Any]:
    if dtype.itemsize == 1:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}


_ZSTD: dict[str, Any] = {"name": "zstd", "configuration": {"level": LEVEL, "checksum": False}}


def _sharding(chunk: tuple[int, ...], inner: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(chunk),
            "codecs": inner,
            "index_codecs": [_bytes_codec(np.dtype("<u8")), {"name": "crc32c"}],
            "index_location": "end",
        },
    }
