"""The whole-image pass that tiling promises to equal, and what tests need around it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.transform import from_origin
from torch import nn

from tilepipe.axis import extended_size
from tilepipe.checkpoint import ClassInfo, Model, ModelCard
from tilepipe.geometry.network import Geometry
from tilepipe.predict.prepare import prepare
from tilepipe.raster.info import Pixels
from tilepipe.window import Interval, Window

MEAN, STD = 110.0, 60.0


def settled(network: nn.Module, bands: int = 3, size: int = 96, seed: int = 0) -> nn.Module:
    """The network in evaluation mode, its batch normalisations fitted to noise, so that its labels vary."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.reset_parameters()  # biases, too, come from the seed
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    network.train()
    with torch.no_grad():
        for _ in range(2):
            network(torch.randn(2, bands, size, size))
    return network.eval()


def model_of(network: nn.Module, classes: int, bands: int = 3) -> Model:
    """A model in memory around a network."""
    names = ("red", "green", "blue", "nir", *(f"band{n}" for n in range(5, 40)))
    card = ModelCard(
        architecture="test",
        arguments={},
        classes=tuple(ClassInfo(f"class{n}", (n * 20 % 256, 90, 200)) for n in range(classes)),
        bands=names[:bands],
        mean=(MEAN,) * bands,
        std=(STD,) * bands,
        nodata="0 after normalisation",
        resolution=None,
        licence="MIT",
        provenance={},
    )
    return Model.of(network, card)


def scene(shape: tuple[int, int], bands: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Blobs with edges and noise, (bands, rows, columns) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (bands, shape[0] // 9 + 2, shape[1] // 9 + 2))
    smooth = coarse.repeat(9, axis=1).repeat(9, axis=2)[:, : shape[0], : shape[1]]
    return (smooth + rng.integers(0, 56, smooth.shape)).astype(np.uint8)


def write_raster(path: Path, values: NDArray[Any], **profile: Any) -> Path:
    """A georeferenced GeoTIFF of (bands, rows, columns) values."""
    settings = {"crs": "EPSG:32633", "transform": from_origin(500000, 5400000, 0.5, 0.5), **profile}
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=len(values),
        height=values.shape[1],
        width=values.shape[2],
        dtype=values.dtype,
        **settings,
    ) as out:
        out.write(values)
    return path


def whole_scores(
    model: Model, geometry: Geometry, values: NDArray[Any], valid: NDArray[np.bool_] | None, precision: str
) -> NDArray[Any]:
    """Scores (classes, rows, columns) of one pass over the extended raster."""
    axes = (geometry.rows, geometry.cols)
    indices = [
        Interval(-axis.trim[0], extended_size(axis, length) - axis.trim[0]).reflect(length)
        for axis, length in zip(axes, values.shape[1:], strict=True)
    ]
    network = prepare(model.network, precision)
    pixels = values[:, indices[0]][:, :, indices[1]].astype(np.float64 if precision == "float64" else np.float32)
    pixels = (pixels - MEAN) / STD
    if valid is not None:
        pixels[:, ~valid[indices[0]][:, indices[1]]] = 0
    with torch.inference_mode():
        scores = network(torch.from_numpy(np.ascontiguousarray(pixels))[None])[0]
    return scores.contiguous().numpy()


def whole_labels(
    model: Model,
    geometry: Geometry,
    values: NDArray[Any],
    valid: NDArray[np.bool_] | None = None,
    precision: str = "float64",
) -> NDArray[np.uint8]:
    """The reference label map of networks at full resolution, (rows, columns)."""
    scores = whole_scores(model, geometry, values, valid, precision)[:, : values.shape[1], : values.shape[2]]
    labels = scores.argmax(0).astype(np.uint8)
    if valid is not None:
        labels[~valid] = 255
    return labels


@dataclass(frozen=True)
class ArraySource:
    """A raster in memory that reads as a file does."""

    values: NDArray[Any]
    valid: NDArray[np.bool_] | None = None

    def open(self) -> ArraySource:
        return self

    def close(self) -> None:
        pass

    def read(self, window: Window) -> Pixels:
        rows = window.rows.reflect(self.values.shape[1])
        cols = window.cols.reflect(self.values.shape[2])
        valid = None if self.valid is None else self.valid[rows][:, cols]
        return Pixels(np.ascontiguousarray(self.values[:, rows][:, :, cols]), valid)
