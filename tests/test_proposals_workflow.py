"""The workflow of proposals end to end, against the same steps written down in numpy and torch on the whole image."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import proposals
import pytest
import rasterio
import torch
import zarr
from reference import scene, settled, write_raster
from torch import nn
from torch.nn import functional as F

from tilepipe.checkpoint import ClassInfo, Model
from tilepipe.crf.parameters import parse_crf
from tilepipe.crf.refine import refine
from tilepipe.errors import ModelError
from tilepipe.models import build
from tilepipe.proposals import propose_windows
from tilepipe.raster.source import open_raster
from tilepipe.store.output import open_store
from tilepipe.window import Interval

SHAPE = (100, 130)
SCALES = (60, 110)
CRF = "crf:iterations=2,radius=2"
HOLE = (slice(20, 26), slice(40, 60))


def balanced(network: nn.Module, last: list[nn.Conv2d]) -> nn.Module:
    """The network with its last layers scaled and shifted, so that every class wins somewhere on noise."""
    noise = F.interpolate(torch.randn(1, 3, 28, 28), scale_factor=8, mode="bilinear")
    with torch.no_grad():
        out = network.eval()(noise)[0]
        mean, std = out.mean((1, 2)), out.std((1, 2))
        for layer in last:
            layer.weight /= std[:, None, None, None]
            layer.bias /= std
        last[-1].bias -= mean / std
    return network


def small_models(module: ModuleType) -> tuple[Model, Model]:
    """The workflow's networks with random weights and statistics at which labels vary."""
    deconvnet, fcn = module.random_models()
    torch.manual_seed(4)
    fine = settled(build("deconvnet", **deconvnet.card.arguments), size=224)
    coarse = build("fcn8s", **fcn.card.arguments)
    # In another order than the first model's: classes are matched by name.
    shuffled = replace(fcn.card, classes=tuple(fcn.card.classes[i] for i in (2, 0, 1)))
    return (
        Model.of(balanced(fine, [fine.classifier]), deconvnet.card),
        Model.of(balanced(coarse, [coarse.score, *coarse.scores]), shuffled),
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, tuple[Model, Model], Path]:
    """The workflow, its models, and a folder in which it has run on a raster with a hole of nodata."""
    folder = tmp_path_factory.mktemp("proposals")
    values = np.maximum(scene(SHAPE), 1)
    values[(slice(None), *HOLE)] = 0
    write_raster(folder / "image.tif", values, nodata=0)
    module = proposals
    models = small_models(module)
    words = [str(folder / "image.tif"), str(folder / "labels.tif"), "--random", "--crf", CRF, "--batch", "3"]
    options = module.parse([*words, "--scales", *map(str, SCALES)])
    module.segment(options, models, folder)
    return module, models, folder


def by_hand(models: tuple[Model, Model], values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores, mean probabilities, refined probabilities): every step on whole arrays, without tilepipe's own maps."""
    valid = (values != 0).all(0)
    card = models[0].card
    colors = ((values - np.float32(card.mean[0])) / np.float32(card.std[0])).astype(np.float32)
    colors[:, ~valid] = 0
    scores = np.full((3, *SHAPE), -np.inf, np.float32)
    for window in propose_windows(SHAPE, SCALES):
        rows, cols = (
            Interval(a.start, a.stop).reflect(n) for a, n in zip((window.rows, window.cols), SHAPE, strict=True)
        )
        crop = torch.from_numpy(colors[:, rows][:, :, cols])[None]
        with torch.no_grad():
            out = models[0].network(F.interpolate(crop, size=224, mode="bilinear", antialias=True))
            pasted = F.interpolate(out, size=window.shape, mode="bilinear")[0].numpy()
        inside = window.clip(SHAPE)
        place = (slice(None), slice(inside.rows.start, inside.rows.stop), slice(inside.cols.start, inside.cols.stop))
        scores[place] = np.maximum(scores[place], pasted[(slice(None), *inside.within(window))])
    with torch.no_grad():
        whole = models[1].network(torch.from_numpy(colors)[None])[0]  # FCN-8s takes any size as it is
    probabilities = [torch.softmax(each, 0).numpy() for each in (torch.from_numpy(scores), whole)]
    mean = (probabilities[0] + probabilities[1][[1, 2, 0]]) / 2
    return scores, mean, refine(mean, colors, valid, parse_crf(CRF))


def test_the_label_map_is_what_the_steps_give_by_hand(done) -> None:
    _, models, folder = done
    with rasterio.open(folder / "image.tif") as tif:
        values = tif.read()
    scores, mean, refined = by_hand(models, values)
    # In float32, a near-tie between two pooled pixels may fall the other way in another batch.
    stored = zarr.open_array(folder / "scores.zarr", mode="r")[:]
    assert np.isclose(stored, scores, rtol=1e-3, atol=1e-3).mean() > 0.99
    with rasterio.open(folder / "labels.tif") as tif, rasterio.open(folder / "image.tif") as image:
        labels = tif.read(1)
        assert (tif.crs, tif.transform, tif.nodata) == (image.crs, image.transform, 255)
        assert tif.colormap(1)[2][:3] == models[0].card.classes[2].color
    hole = np.zeros(SHAPE, bool)
    hole[HOLE] = True
    assert ((labels == 255) == hole).all()
    assert len(np.unique(labels[~hole])) == 3
    # FCN-8s's probabilities were stored as float16, which a near-tie may notice.
    assert (labels == refined.argmax(0))[~hole].mean() > 0.998
    # The other ways to get a map from the same pieces are other maps.
    for other in (mean, scores, np.stack([scores[0], scores[2], scores[1]])):
        assert (labels == other.argmax(0))[~hole].mean() < 0.99


def test_blocks_leave_no_seams(done) -> None:
    module, models, folder = done
    source = open_raster(folder / "image.tif")
    maps = zarr.open_array(folder / "scores.zarr", mode="r"), open_store(folder / "fcn.zarr").array("probabilities")
    pieces = [
        module.refined_labels(source, models[0].card, maps, (1, 2, 0), parse_crf(CRF), side) for side in (1024, 37)
    ]
    whole, cut = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    for labels, piece in zip((whole, cut), pieces, strict=True):
        for block, values in piece:
            labels[block.rows.start : block.rows.stop, block.cols.start : block.cols.stop] = values
    with rasterio.open(folder / "labels.tif") as tif:
        np.testing.assert_array_equal(tif.read(1), whole)
    np.testing.assert_array_equal(whole, cut)


def test_models_of_other_classes_and_missing_models_are_refused(done, tmp_path) -> None:
    module, (deconvnet, fcn), folder = done
    other = replace(fcn.card, classes=(*fcn.card.classes[:2], ClassInfo("sea", (0, 0, 200))))
    options = argparse.Namespace(input=str(folder / "image.tif"), output=tmp_path / "labels.tif")
    with pytest.raises(ModelError, match="sea"):
        module.segment(options, (deconvnet, replace(fcn, card=other)), tmp_path)
    with pytest.raises(SystemExit) as refused:
        module.parse([str(folder / "image.tif"), "labels.tif", "--fcn", "fcn.safetensors"])
    assert refused.value.code == 2
