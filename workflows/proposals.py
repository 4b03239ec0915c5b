"""Segment a raster as DeconvNet does: window proposals, joined with FCN-8s over the whole image, refined by a CRF.

    python workflows/proposals.py image.tif labels.tif --deconvnet deconvnet.safetensors --fcn fcn8s.safetensors
    python workflows/proposals.py image.tif labels.tif --random        # small random networks, to try the steps out

The steps are those of Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation" (arXiv
1505.04366, sections 5.1 and 5.2):

1. propose    windows at several scales, which see large objects whole and small ones in detail
2. segment    each window, resized to the network's input, by DeconvNet
3. aggregate  the windows' scores into one map by their pixelwise maximum; its softmax gives probabilities
4. ensemble   the mean with the probabilities of FCN-8s, which sees the whole image at once
5. refine     by a CRF, and label each pixel with its best class

Every step but the second works on blocks, whatever the raster's size; intermediate maps lie in `--scratch`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
import zarr
from numpy.typing import NDArray
from rasterio.windows import Window as RasterWindow

from tilepipe.checkpoint import ClassInfo, Model, ModelCard, load_model
from tilepipe.combine import match_classes, softmax_in_place
from tilepipe.crf.parameters import CrfParameters, parse_crf
from tilepipe.crf.refine import refine
from tilepipe.models import build
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import segment_raster
from tilepipe.predict.scores import label_dtype, label_nodata, normalised
from tilepipe.proposals import aggregate, propose_windows
from tilepipe.raster.source import RasterSource, open_raster, select_bands
from tilepipe.store.output import open_store
from tilepipe.trace import geometry_of
from tilepipe.window import Window

BLOCK = 1024
"""Sides of the blocks that maps are made in, in pixels."""


Array = NDArray[Any]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("input", help="raster: anything GDAL opens")
    parser.add_argument("output", type=Path, help="label map to write (.tif)")
    parser.add_argument("--deconvnet", type=Path, help="model file of a DeconvNet")
    parser.add_argument("--fcn", type=Path, help="model file of an FCN-8s with the same classes")
    parser.add_argument("--random", action="store_true", help="use small networks with random weights instead")
    parser.add_argument("--scales", type=int, nargs="+", default=[224, 320, 448], help="windows' sides, in pixels")
    parser.add_argument("--overlap", type=float, default=0.5, help="part of a side that neighbours share")
    parser.add_argument("--batch", type=int, default=4, help="windows that pass through DeconvNet together")
    parser.add_argument("--crf", default="crf", help="crf, or crf:KEY=VALUE,... as of `tilepipe segment --refine`")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--scratch", type=Path, help="folder for intermediate maps; else one that is removed")
    options = parser.parse_args(arguments)
    if not options.random and (options.deconvnet is None or options.fcn is None):
        parser.error("name two model files with --deconvnet and --fcn, or try the steps out with --random")
    return options


def random_models(seed: int = 0) -> tuple[Model, Model]:
    """A DeconvNet and an FCN-8s of three classes at a fiftieth of the published width; their labels mean nothing."""
    torch.manual_seed(seed)
    classes = (
        ClassInfo("ground", (200, 180, 120)),
        ClassInfo("green", (60, 140, 60)),
        ClassInfo("roof", (180, 60, 50)),
    )
    models = []
    for name in ("deconvnet", "fcn8s"):
        arguments = {"classes": len(classes), "bands": 3, "width": 0.02}
        card = ModelCard(
            architecture=name,
            arguments=arguments,
            classes=classes,
            bands=("red", "green", "blue"),
            mean=(110.0, 110.0, 110.0),
            std=(60.0, 60.0, 60.0),
            nodata="masked pixels become 0 after normalisation",
            resolution=None,
            licence="MIT",
            provenance={"weights": "random"},
        )
        models.append(Model.of(build(name, **arguments), card))
    return models[0], models[1]


def window_scores(
    model: Model, source: RasterSource, windows: Sequence[Window], store: Path, batch: int, device: str
) -> zarr.Array[Any]:
    """DeconvNet's scores of each window at the network's own size: zarr float32 (windows, classes, side, side).

    A window is resized to the smallest size that the network accepts, 224 for the published one. `aggregate` resizes
    the scores back.
    """
    side = geometry_of(model.network, len(model.card.bands)).rows.sizes.minimums[0]
    network = model.network.to(device)
    shape = (len(windows), len(model.card.classes), side, side)
    scores = zarr.create_array(store, shape=shape, chunks=(1, *shape[1:]), dtype="float32", overwrite=True)
    with source.open() as reader, torch.inference_mode():
        for first in range(0, len(windows), batch):
            crops = []
            for window in windows[first : first + batch]:
                pixels = reader.read(window)  # reflected where the window reaches beyond the raster
                values = normalised(pixels.values, pixels.valid, model.card.mean, model.card.std, "float32")
                crop = torch.from_numpy(values)[None]
                crops.append(F.interpolate(crop, size=(side, side), mode="bilinear", antialias=True))
            scores[first : first + len(crops)] = network(torch.cat(crops).to(device)).cpu().numpy()
    return scores


def whole_image_probabilities(model: Model, inputs: str, store: Path, device: str) -> zarr.Array[Any]:
    """FCN-8s's probabilities of all pixels, tiled so that they are those of one pass: float16 (classes, rows, cols)."""
    segment_raster(inputs, store, model, SegmentOptions(probabilities="float16", device=device, overwrite=True))
    return open_store(store).array("probabilities")


def blocks(shape: tuple[int, int], side: int = BLOCK) -> Iterator[Window]:
    for row in range(0, shape[0], side):
        for col in range(0, shape[1], side):
            yield Window.of(row, row + side, col, col + side).clip(shape)


def refined_labels(
    source: RasterSource,
    card: ModelCard,
    maps: tuple[Any, Any],
    order: Sequence[int],
    crf: CrfParameters,
    side: int = BLOCK,
) -> Iterator[tuple[Window, Array]]:
    """Each block's labels (rows, cols): the mean of both networks' probabilities, refined, and its best class.

    maps: the aggregated scores and FCN-8s's probabilities, (classes, rows, cols) each; `order` finds the first
    network's classes in the second's. A block is refined with the margin that the CRF looks at: blocks leave no seams.
    """
    scores, probabilities = maps
    shape, nodata = source.info.shape, label_nodata(len(card.classes))
    with source.open() as reader:
        for block in blocks(shape, side):
            grown = Window(block.rows.grow(crf.reach, crf.reach), block.cols.grow(crf.reach, crf.reach)).clip(shape)
            place = (slice(None), *grown.within(Window.whole(shape)))
            by_proposals = softmax_in_place(np.ascontiguousarray(scores[place], np.float32))
            by_image = np.nan_to_num(probabilities[place].astype(np.float32))[list(order)]  # NaN is nodata
            pixels = reader.read(grown)
            colors = normalised(pixels.values, pixels.valid, card.mean, card.std, "float32")
            refined = refine((by_proposals + by_image) / 2, colors, pixels.valid, crf)
            labels = refined.argmax(0).astype(label_dtype(len(card.classes)))
            labels[~pixels.validity()] = nodata
            yield block, labels[block.within(grown)]


def segment(options: argparse.Namespace, models: tuple[Model, Model], scratch: Path) -> None:
    deconvnet, fcn = models
    order = match_classes([[each.name for each in model.card.classes] for model in models])[1]
    whole = open_raster(options.input)
    source = whole.select(select_bands(whole.info, deconvnet.card.bands))
    shape = source.info.shape

    windows = propose_windows(shape, options.scales, options.overlap)
    print(f"{len(windows)} windows at {len(options.scales)} scales over {shape[0]} x {shape[1]} pixels", flush=True)
    stored = window_scores(deconvnet, source, windows, scratch / "windows.zarr", options.batch, options.device)
    scores = zarr.create_array(
        scratch / "scores.zarr",
        shape=(len(deconvnet.card.classes), *shape),
        chunks=(len(deconvnet.card.classes), 256, 256),
        dtype="float32",
        fill_value=0,
        overwrite=True,
    )
    aggregate(stored, windows, shape, reduce="max", fill=0, out=scores, block=(BLOCK, BLOCK))

    probabilities = whole_image_probabilities(fcn, options.input, scratch / "fcn.zarr", options.device)
    write(
        options.output,
        source,
        deconvnet.card,
        refined_labels(source, deconvnet.card, (scores, probabilities), order, parse_crf(options.crf)),
    )


def write(path: Path, source: RasterSource, card: ModelCard, labelled: Iterator[tuple[Window, Array]]) -> None:
    """A GeoTIFF of labels on the raster's grid, with the classes' colours."""
    info, classes = source.info, len(card.classes)
    profile = {"height": info.shape[0], "width": info.shape[1], "count": 1, "dtype": label_dtype(classes)}
    place = {"crs": info.crs_wkt, "transform": None if info.transform is None else rasterio.Affine(*info.transform)}
    storage = {"driver": "GTiff", "tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
    with rasterio.open(path, "w", nodata=label_nodata(classes), **profile, **place, **storage) as tif:
        if classes <= 255:
            tif.write_colormap(1, {label: (*each.color, 255) for label, each in enumerate(card.classes)})
        for block, labels in labelled:
            (row, col), (height, width) = block.origin, block.shape
            tif.write(labels, 1, window=RasterWindow(col, row, width, height))


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    models = random_models() if options.random else (load_model(options.deconvnet), load_model(options.fcn))
    if options.scratch is not None:
        options.scratch.mkdir(parents=True, exist_ok=True)
        segment(options, models, options.scratch)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            segment(options, models, Path(scratch))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
