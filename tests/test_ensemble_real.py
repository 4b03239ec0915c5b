"""DeconvNet and FCN-8s, combined and refined by the CRF, on real imagery: tiles equal one pass over it all."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import zarr
from reference import MEAN, STD, model_of, settled, whole_scores
from scipy.special import softmax

from tilepipe.checkpoint import Model
from tilepipe.crf.parameters import parse_crf
from tilepipe.crf.refine import refine
from tilepipe.models import build
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import segment_raster
from tilepipe.predict import scores
from tilepipe.trace import geometry_of

OPTIONS = SegmentOptions(stitch="exact", device="cpu", precision="float64", refine="crf", threads=2)


def crop(tmp_path: Path, rows: slice, cols: slice) -> Path:
    """A part of a drone mosaic, as a raster of its own."""
    folder = os.environ.get("TILEPIPE_TEST_DATA")
    if folder is None:
        pytest.skip("set TILEPIPE_TEST_DATA to a folder of real rasters")
    path = tmp_path / "crop.tif"
    with rasterio.open(Path(folder) / "buildings" / "area2_1_rgb.tif") as mosaic:
        window = rasterio.windows.Window.from_slices(rows, cols)
        profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "height": window.height, "width": window.width}
        with rasterio.open(path, "w", crs=mosaic.crs, transform=mosaic.window_transform(window), **profile) as out:
            out.write(mosaic.read(window=window))
            out.write_mask(mosaic.dataset_mask(window=window))
    return path


def models(width: float) -> list[Model]:
    """Untrained networks whose batch normalisations fit their input, so that labels vary."""
    networks = [build(name, classes=3, width=width) for name in ("deconvnet", "fcn8s")]
    return [model_of(settled(network, size=224, seed=n), 3) for n, network in enumerate(networks)]


def compare(raster: Path, members: list[Model], core: int, tmp_path: Path) -> None:
    """Asserts that the tiled map is that of whole passes, label by label."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tilepipe.planner.CORES", {"cpu": (core,)})
        done = segment_raster(raster, tmp_path / "out.zarr", members, OPTIONS)
    found = zarr.open_group(tmp_path / "out.zarr", mode="r")["labels"][:]
    with rasterio.open(raster) as source:
        values, valid = source.read(), source.dataset_mask() > 0
    shape = valid.shape
    shares = [
        softmax(whole_scores(m, geometry_of(m.network, 3), values, valid, "float64")[:, : shape[0], : shape[1]], axis=0)
        for m in members
    ]
    colors = scores.normalised(values, valid, (MEAN,) * 3, (STD,) * 3, "float64")
    expected = refine(np.mean(shares, axis=0), colors, valid, parse_crf("crf"))
    labels = np.where(valid, expected.argmax(0), 255)
    assert done.stitch == "exact"
    assert len(np.unique(labels[valid])) > 1
    np.testing.assert_array_equal(found, labels)


@pytest.mark.slow
def test_a_reduced_ensemble_on_a_real_mosaic(tmp_path: Path) -> None:
    compare(crop(tmp_path, slice(200, 500), slice(0, 1024)), models(0.02), 128, tmp_path)


@pytest.mark.slow
def test_a_wider_ensemble_on_a_larger_part(tmp_path: Path) -> None:
    compare(crop(tmp_path, slice(0, 1024), slice(0, 1024)), models(0.06), 192, tmp_path)


@pytest.mark.slow
def test_the_published_widths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compare(crop(tmp_path, slice(300, 530), slice(0, 1024)), models(1.0), 128, tmp_path)


@pytest.mark.slow
def test_float32_labels_agree(tmp_path: Path) -> None:
    raster, members = crop(tmp_path, slice(0, 700), slice(0, 1024)), models(0.06)
    maps = []
    for core in (192, 4096):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tilepipe.planner.CORES", {"cpu": (core,)})
            out = tmp_path / f"{core}.zarr"
            segment_raster(raster, out, members, replace(OPTIONS, precision="float32"))
        maps.append(zarr.open_group(out, mode="r")["labels"][:])
    assert (maps[0] == maps[1]).mean() > 0.9999
