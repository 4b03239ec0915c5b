"""Polygons into a file, batch by batch: GeoPackage, FlatGeobuf and GeoJSON by GDAL, GeoParquet by pyarrow."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tilepipe.errors import RunError, UsageError
from tilepipe.polygons.rings import Traced
from tilepipe.polygons.wkb import encode
from tilepipe.store.attributes import parsed_crs
from tilepipe.store.spec import ClassLike

if TYPE_CHECKING:
    import pyarrow

DRIVERS = {".gpkg": "GPKG", ".fgb": "FlatGeobuf", ".geojson": "GeoJSON", ".parquet": "Parquet"}
"""The vector formats, by a file name's ending."""
GROUP, GROUP_BYTES = 1 << 15, 64 << 20
"""Polygons, or bytes, that make a row group of a GeoParquet file."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What all polygons of a file share."""

    name: str
    classes: Sequence[ClassLike]
    crs_wkt: str | None
    transform: tuple[float, float, float, float, float, float]
    square_metres: bool
    """Whether areas are known on the ground; else they are pixels."""
    confidence: bool


def import_arrow() -> Any:
    """pyarrow; UsageError where it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise UsageError("polygons need pyarrow; install it with pip install 'tilepipe[vector]'") from error
    return pyarrow


def write_layer(path: Path, layer: Layer, batches: Iterator[Traced]) -> int:
    """How many polygons are in the new file; the format goes by the path's ending, in `DRIVERS`.

    GeoJSON is written in longitude and latitude of WGS 84, as RFC 7946 wants it; the others, and maps without CRS,
    in the map's own coordinates.
    RunError where the file is not whole.
    """
    arrow = import_arrow()
    schema = _schema(arrow, layer)
    stream = _Stream(_record(arrow, schema, layer, traced) for traced in batches)
    write = _write_parquet if path.suffix == ".parquet" else _write_gdal
    write(path, layer, schema, stream)
    return stream.polygons


class _Stream:
    """Batches, counted, whose failure is remembered: GDAL would tell of it in its own words."""

    def __init__(self, batches: Iterator[pyarrow.RecordBatch]) -> None:
        self._batches = batches
        self.polygons = 0
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[pyarrow.RecordBatch]:
        try:
            for batch in self._batches:
                self.polygons += batch.num_rows
                yield batch
        except BaseException as error:
            self.failure = error
            raise


def _schema(arrow: Any, layer: Layer) -> pyarrow.Schema:
    geometry = arrow.field("geometry", arrow.large_binary(), metadata={"ARROW:extension:name": "geoarrow.wkb"})
    fields = [
        arrow.field("class", arrow.int32()),
        arrow.field("name", arrow.string()),
        arrow.field("color", arrow.string()),
        arrow.field("pixels", arrow.int64()),
        arrow.field("area_m2" if layer.square_metres else "area_px", arrow.float64()),
    ]
    if layer.confidence:
        fields.append(arrow.field("confidence", arrow.float64()))
    return arrow.schema([*fields, geometry])


def _record(arrow: Any, schema: pyarrow.Schema, layer: Layer, traced: Traced) -> pyarrow.RecordBatch:
    labels, pixels, trust, sure = traced.facts.T
    names = arrow.array([label.name for label in layer.classes], arrow.string())
    colors = arrow.array(["#{:02x}{:02x}{:02x}".format(*label.color) for label in layer.classes], arrow.string())
    chosen = arrow.array(labels)
    columns = [
        arrow.array(labels.astype(np.int32)),
        names.take(chosen),
        colors.take(chosen),
        arrow.array(pixels),
        arrow.array(traced.ground),
    ]
    if layer.confidence:
        mean = trust / (254.0 * np.maximum(sure, 1))
        columns.append(arrow.array(mean, mask=sure == 0))
    data, offsets = encode(traced, np.array(layer.transform, np.float64))
    buffers = [None, arrow.py_buffer(offsets), arrow.py_buffer(data)]
    columns.append(arrow.LargeBinaryArray.from_buffers(arrow.large_binary(), len(labels), buffers))
    return arrow.record_batch(columns, schema=schema)


def _write_gdal(path: Path, layer: Layer, schema: pyarrow.Schema, stream: _Stream) -> None:
    import pyarrow
    import pyogrio
    from pyogrio.errors import DataLayerError, DataSourceError, FeatureError, FieldError

    # What has no CRS has no longitudes: its pixels are written as they are.
    places = path.suffix == ".geojson" and layer.crs_wkt is not None
    options = {"RFC7946": "YES", "COORDINATE_PRECISION": "9"} if places else {}
    reader = pyarrow.RecordBatchReader.from_batches(schema, iter(stream))
    try:
        with warnings.catch_warnings():
            # A map without CRS is what its raster was; that was said when it was made.
            warnings.filterwarnings("ignore", "'crs' was not provided", UserWarning)
            pyogrio.raw.write_arrow(
                reader,
                path,
                layer=layer.name,
                driver=DRIVERS[path.suffix],
                geometry_name="geometry",
                geometry_type="Polygon",
                crs=layer.crs_wkt,
                layer_options=options,
            )
    except (DataLayerError, DataSourceError, FeatureError, FieldError, RuntimeError, OSError) as error:
        if stream.failure is not None:
            raise stream.failure from None
        raise RunError(f"{path}: {str(error).splitlines()[0]}; free some space or choose another path") from error
    if stream.failure is not None:
        raise stream.failure
    # GDAL writes late, and says nothing of a disk that is full when it closes the file.
    written = pyogrio.read_info(path, layer=layer.name, force_feature_count=True)["features"]
    if written != stream.polygons:
        raise RunError(
            f"{path}: {written} of {stream.polygons} polygons were written; free some space or choose another path"
        )


def _write_parquet(path: Path, layer: Layer, schema: pyarrow.Schema, stream: _Stream) -> None:
    import pyarrow
    from pyarrow import parquet

    crs = None if layer.crs_wkt is None else parsed_crs(layer.crs_wkt).to_json_dict()
    column = {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": crs}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    schema = schema.with_metadata({"geo": json.dumps(geo)})
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        waiting: list[pyarrow.RecordBatch] = []
        for batch in stream:
            waiting.append(batch)
            if sum(each.num_rows for each in waiting) >= GROUP or sum(each.nbytes for each in waiting) >= GROUP_BYTES:
                writer.write_table(pyarrow.Table.from_batches(waiting).cast(schema))
                waiting = []
        if waiting:
            writer.write_table(pyarrow.Table.from_batches(waiting).cast(schema))
