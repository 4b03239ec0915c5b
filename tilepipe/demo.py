"""A complete run on a scene made here, whose truth is known: what the demo shows, and what installers check."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.windows import Window as RasterWindow

from tilepipe.errors import InputError, UsageError
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import Summary, segment_raster
from tilepipe.preview import side_by_side
from tilepipe.progress import Progress
from tilepipe.scene.synthetic import write_scene
from tilepipe.schedule import Stop
from tilepipe.store.output import OutputStore, open_store

MODEL = "synthetic-landcover"
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


@dataclass(frozen=True, slots=True)
class Scores:
    """How well labels agree with the truth, over the pixels that have both."""

    confusion: NDArray[np.int64]
    """(true class, labelled class): pixels."""

    @property
    def accuracy(self) -> float:
        """The share of pixels whose label is the true one."""
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    @property
    def iou(self) -> tuple[float | None, ...]:
        """Each class's intersection over union; None for a class that neither has."""
        right = np.diagonal(self.confusion)
        union = self.confusion.sum(axis=0) + self.confusion.sum(axis=1) - right
        return tuple(float(r / u) if u else None for r, u in zip(right, union, strict=True))

    @property
    def mean_iou(self) -> float:
        """The mean over the classes that occur."""
        found = [value for value in self.iou if value is not None]
        return sum(found) / len(found) if found else 0.0


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
    return segment_raster(files.image, files.labels, MODEL, demo_options(files), progress=progress, stop=stop)


def compare(files: DemoFiles) -> Scores:
    """The label map against the truth, read in strips."""
    store = open_store(files.labels)
    count = len(store.spec.classes)
    labels, total = store.array("labels"), np.zeros((count, count), np.int64)
    with rasterio.open(files.truth) as truth:
        if (truth.height, truth.width) != store.spec.shape:
            raise InputError(f"{files.truth} and {files.labels} differ in size; run the demo in another folder")
        for start in range(0, truth.height, STRIP):
            stop = min(start + STRIP, truth.height)
            real = truth.read(1, window=RasterWindow(0, start, truth.width, stop - start))
            total += confusion(real, np.asarray(labels[start:stop]), count)
    return Scores(total)


def confusion(truth: NDArray[np.unsignedinteger], labels: NDArray[np.unsignedinteger], count: int) -> NDArray[np.int64]:
    """(true class, labelled class): pixels, of those where both are one of `count` classes."""
    both = (truth < count) & (labels < count)
    pairs = truth[both].astype(np.int64) * count + labels[both]
    return np.bincount(pairs, minlength=count * count).reshape(count, count)


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
