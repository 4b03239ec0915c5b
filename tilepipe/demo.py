"""A complete run on a scene made here, whose truth is known: what the demo shows, and what installers check."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window as RasterWindow

from tilepipe.checkpoint import SYNTHETIC
from tilepipe.errors import InputError, UsageError
from tilepipe.metrics import Confusion
from tilepipe.options import SegmentOptions
from tilepipe.pictures.layout import side_by_side
from tilepipe.pipeline import Summary, segment_raster
from tilepipe.progress import Progress
from tilepipe.scene.synthetic import write_scene
from tilepipe.schedule import Stop
from tilepipe.store.output import OutputStore, open_store

STRIP = 1024
"""Rows that are compared at once."""


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """Where a demo's files are."""

    folder: Path
    image: Path
    """The scene, as a GeoTIFF of three bands."""
    truth: Path
    """Its true labels, as a GeoTIFF."""
    labels: Path
    """The label map, as a zarr store."""
    picture: Path
    new: bool
    """Whether the scene was made just now; an older one is kept as it is, so that its map can be resumed."""


def make_scene(folder: str | Path, shape: tuple[int, int], seed: int) -> DemoFiles:
    """The files of scene `seed` of `shape` (rows, columns) in `folder`, written unless the same scene is there.

    Raises UsageError where the folder holds anything but a demo.
    """
    place = Path(folder)
    wanted = {"shape": list(shape), "seed": seed}
    note = place / "demo.json"
    if place.exists() and (not place.is_dir() or (any(place.iterdir()) and not note.exists())):
        raise UsageError(f"{place} holds something else; name another folder for the demo")
    image, truth = place / "image.tif", place / "truth.tif"
    same = note.exists() and _read_note(note) == wanted and image.exists() and truth.exists()
    if not same:
        place.mkdir(parents=True, exist_ok=True)
        # The note comes last with its content: until then an interrupted scene counts as none.
        note.write_text("{}\n")
        write_scene(place, shape, seed)
        note.write_text(json.dumps(wanted) + "\n")
    return DemoFiles(place, image, truth, place / "labels.zarr", place / "picture.png", new=not same)


def _read_note(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def demo_options(files: DemoFiles) -> SegmentOptions:
    """The options of a demo's job: exact, and anew where the scene is new."""
    return SegmentOptions(stitch="exact", overwrite=files.new)


def segment_scene(
    files: DemoFiles, progress: Callable[[Progress], None] | None = None, stop: Stop | None = None
) -> Summary:
    """What segmenting the scene with the bundled model did."""
    return segment_raster(files.image, files.labels, SYNTHETIC, demo_options(files), progress=progress, stop=stop)


def compare(files: DemoFiles) -> Confusion:
    """The label map's pixels against the truth, of those where both are a class; read in strips."""
    store = open_store(files.labels)
    labels, found = store.array("labels"), Confusion.empty(len(store.spec.classes))
    with rasterio.open(files.truth) as truth:
        if (truth.height, truth.width) != store.spec.shape:
            raise InputError(f"{files.truth} and {files.labels} differ in size; run the demo in another folder")
        for start in range(0, truth.height, STRIP):
            stop = min(start + STRIP, truth.height)
            real = truth.read(1, window=RasterWindow(0, start, truth.width, stop - start))
            said = np.asarray(labels[start:stop])
            found.add(real, said, np.maximum(real, said) < len(store.spec.classes))
    return found


def draw(files: DemoFiles) -> Path:
    """The path of the picture: image, labels and truth side by side, each reduced as it is read."""
    store: OutputStore = open_store(files.labels)
    step = max(1, max(store.spec.shape) // 1800)
    labels = np.asarray(store.array("labels")[::step, ::step])
    with rasterio.open(files.image) as image, rasterio.open(files.truth) as truth:
        shape = labels.shape
        pixels = image.read(out_shape=(image.count, *shape), resampling=rasterio.enums.Resampling.average)
        real = truth.read(1, out_shape=shape)
    side_by_side(pixels, labels, real, store.spec.classes).save(files.picture)
    return files.picture
