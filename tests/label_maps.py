"""Label maps to score: patches of four classes, with void and nodata."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rasters import write
from sklearn.metrics import confusion_matrix

from tilepipe.evaluation import EvaluationOptions
from tilepipe.metrics import boundary_counts

NAMES = ("land", "sea", "road", "roof")
SHAPE = (90, 70)


def scene(seed: int = 0, shape: tuple[int, int] = SHAPE, void: int = 255):
    """(truth with void, prediction with nodata) in patches, four classes, both uint8."""
    random = np.random.default_rng(seed)

    def patches(values, size=7):
        whole = np.kron(values, np.ones((size, size), values.dtype))
        return whole[: shape[0], : shape[1]]

    cells = tuple(-(-side // 7) for side in shape)
    truth = patches(random.integers(0, 4, cells, dtype=np.uint8))
    found = np.roll(truth, (1, 2), (0, 1))
    found[patches(random.random(cells) < 0.2)] = 1
    truth[patches(random.random(cells) < 0.05)] = void
    found[patches(random.random(cells) < 0.05)] = 255
    return truth, found


def write_pair(folder: Path) -> Path:
    """The folder, with truth.tif and found.tif, which declares its nodata."""
    truth, found = scene()
    write(folder / "truth.tif", truth[None])
    write(folder / "found.tif", found[None], nodata=255)
    return folder


def options(**changes) -> EvaluationOptions:
    """Those that fit these maps, with some changes."""
    return EvaluationOptions(**{"classes": NAMES, "void": (255,), "threads": 1, **changes})


def whole(truth, found, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """(confusion matrix, boundary F1 of the classes in the truth) of whole images, where 255 does not count."""
    valid = (truth != 255) & (found != 255)
    counts = confusion_matrix(truth[valid], found[valid], labels=range(4))
    boundary = boundary_counts(truth, found, 4, tolerance, valid)
    return counts, boundary.f1_of(counts.sum(axis=1))
