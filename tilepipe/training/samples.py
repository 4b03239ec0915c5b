"""Which images a network learns from: manifests, and folders of images and labels."""

from __future__ import annotations

import csv
import glob
import itertools
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from tilepipe.checkpoint import ClassInfo
from tilepipe.errors import InputError, TilepipeError, UsageError
from tilepipe.loading.reference import palette
from tilepipe.loading.spelling import colors_of

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".vrt", ".img", ".bmp", ".gif", ".webp", ".zarr")
"""Of the files in a folder, those that are taken for images or labels; a pattern takes what it names."""

_SEPARATORS = "_-. "
_SAMPLE_KEYS = ("image", "label", "split")
_MANIFEST_KEYS = ("classes", "colors", "void", "sample")


@dataclass(frozen=True, slots=True)
class Sample:
    """An image and its labels."""

    image: str
    """An absolute path, or what GDAL opens."""
    label: str
    """A raster of one band of class numbers, on the image's grid."""
    split: Split = "train"


@dataclass(frozen=True, slots=True)
class DataSet:
    """What a network is trained and validated on; at least one sample is there to train on."""

    samples: tuple[Sample, ...]
    classes: tuple[ClassInfo, ...] | None = None
    """In the order of the label values; None where nobody said."""
    void: tuple[int, ...] = ()
    """Label values that mean no class: such pixels teach nothing and are not scored."""

    def __post_init__(self) -> None:
        if not self.of("train"):
            raise InputError("the data set has no training sample; give one with the split train")

    def of(self, split: Split) -> tuple[Sample, ...]:
        """The samples of one split, in order."""
        return tuple(sample for sample in self.samples if sample.split == split)


def read_manifest(path: str | Path) -> DataSet:
    """The data set that a CSV or TOML file describes; paths in it count from its own folder.

    CSV: a header with the columns image, label and, optionally, split (train, validation or test; else train).
    TOML: `classes = ["background", "building"]`, `colors = ["#rrggbb", ...]` and `void = 255` or a list, all
    optional, then a `[[sample]]` table with image, label and, optionally, split for each. InputError in one line,
    naming the file, for anything else, for files that are not there, and for a sample in two splits.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a manifest: {' '.join(str(error).split())}") from None
    try:
        return _read_toml(path, text) if path.suffix.lower() == ".toml" else _read_csv(path, text)
    except TilepipeError as error:
        raise InputError(f"{path}: {error}") from None


def pair_folders(
    images: str | Path, labels: str | Path, validation: float, seed: int, void: tuple[int, ...] = ()
) -> DataSet:
    """The data set of images and labels in folders, of which a share is drawn for validation.

    images, labels: a folder, or a pattern such as 'DIR/*_rgb.tif'. Files belong together that have the same name
    without its suffix (.tif, ...), else once the longest ending that all names of images, and all of labels, share
    is cut off: area1_rgb.tif and area1_label.tif. validation: the share, at least one sample and not all; which,
    the seed decides. InputError names files without a partner.
    """
    if not 0 < validation < 1:
        raise UsageError(f"a validation share of {validation} is not legal; choose one between 0 and 1, such as 0.2")
    if str(images) == str(labels):
        raise UsageError(
            f"images and labels are both {images}; tell them apart by patterns, such as '{images}/*_rgb.tif' "
            f"and '{images}/*_label.tif'"
        )
    pairs = _paired(_files(images), _files(labels))
    if len(pairs) == 1:
        raise InputError(
            f"{pairs[0][0]} is the only sample and cannot be for training and validation both; "
            "give more, or a manifest that says which sample is which"
        )
    count = min(len(pairs) - 1, max(1, round(validation * len(pairs))))
    chosen = set(np.random.default_rng(seed).permutation(len(pairs))[:count].tolist())
    return DataSet(
        tuple(
            Sample(image, label, "validation" if number in chosen else "train")
            for number, (image, label) in enumerate(pairs)
        ),
        void=void,
    )


def _read_csv(path: Path, text: str) -> DataSet:
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    columns = [(name or "").strip().lower() for name in reader.fieldnames or ()]
    missing = [name for name in ("image", "label") if name not in columns]
    if missing:
        raise InputError(
            f"lacks the column {' and '.join(missing)}; its first line is to name image, label and, optionally, split"
        )
    reader.fieldnames = columns
    rows = [row for row in reader if any(isinstance(value, str) and value.strip() for value in row.values())]
    return DataSet(_samples(path, rows))


def _read_toml(path: Path, text: str) -> DataSet:
    try:
        told = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"is not legal TOML: {error}") from None
    _known(told, _MANIFEST_KEYS, "the manifest")
    rows = told.get("sample", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("sample is no list of tables; write each sample under [[sample]]")
    for row in rows:
        _known(row, _SAMPLE_KEYS, "a sample")
    return DataSet(_samples(path, rows), _classes(told), _void(told.get("void", ())))


def _known(table: Mapping[str, Any], legal: Sequence[str], what: str) -> None:
    for key in table:
        if key not in legal:
            raise InputError(f"{what} does not know {key}; legal are {', '.join(legal)}")


def _classes(told: Mapping[str, Any]) -> tuple[ClassInfo, ...] | None:
    names = told.get("classes")
    if names is None:
        if "colors" in told:
            raise InputError("colors are given without classes; name the classes in the order of the label values")
        return None
    if not isinstance(names, list) or not names or len(set(map(str, names))) != len(names):
        raise InputError(f'classes {names!r} are not legal; list each name once, such as ["background", "building"]')
    colors = colors_of(told["colors"]) if "colors" in told else palette(len(names))
    if len(colors) != len(names):
        raise InputError(f"{len(colors)} colors are given for {len(names)} classes; give one for each")
    return tuple(ClassInfo(name, color) for name, color in zip(names, colors, strict=True))


def _void(value: Any) -> tuple[int, ...]:
    values = (value,) if type(value) is int else value
    if not isinstance(values, list | tuple) or not all(type(each) is int for each in values):
        raise InputError(f"void {value!r} is not legal; give a label value, or a list of them")
    return tuple(values)


def _samples(manifest: Path, rows: Iterable[Mapping[str, Any]]) -> tuple[Sample, ...]:
    samples = []
    for number, row in enumerate(rows, 1):
        told = {key: str(row.get(key) or "").strip() for key in _SAMPLE_KEYS}
        lacking = next((key for key in ("image", "label") if not told[key]), None)
        if lacking is not None:
            raise InputError(f"sample {number} has no {lacking}")
        split = told["split"] or "train"
        if split not in SPLITS:
            raise InputError(f"sample {number} has the split {split!r}; legal are {', '.join(SPLITS)}")
        image, label = (_place(manifest, told[key]) for key in ("image", "label"))
        samples.append(Sample(image, label, split))
    _require_files([path for sample in samples for path in (sample.image, sample.label)])
    _require_apart(samples)
    return tuple(samples)


def _place(manifest: Path, name: str) -> str:
    if "://" in name or name.startswith("/vsi"):
        return name
    return os.path.abspath(manifest.parent / name)


def _require_files(paths: Sequence[str]) -> None:
    local = (path for path in paths if "://" not in path and not path.startswith("/vsi"))
    missing = [path for path in local if not os.path.exists(path)]
    if missing:
        raise InputError(f"names {_listing(missing)}, which {'is' if len(missing) == 1 else 'are'} not there")


def _require_apart(samples: Sequence[Sample]) -> None:
    """Scores on what was trained on would say nothing."""
    splits: dict[str, Split] = {}
    for sample in samples:
        first = splits.setdefault(sample.image, sample.split)
        if first != sample.split:
            raise InputError(f"{sample.image} is for {first} and {sample.split} both; keep it in one split")


def _files(place: str | Path) -> list[str]:
    if os.path.isdir(place):
        names = (os.path.join(place, name) for name in os.listdir(place) if not name.startswith("."))
        found = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        legal = f"; known are {', '.join(IMAGE_SUFFIXES)}, a pattern such as '{place}/*.dat' takes others"
    else:
        found, legal = glob.glob(str(place), recursive=True), ""
    if not found:
        raise InputError(f"{place} holds no image{legal}" if legal else f"{place} is no folder, and matches no file")
    return sorted(os.path.abspath(name) for name in found)


def _paired(images: Sequence[str], labels: Sequence[str]) -> list[tuple[str, str]]:
    """Images with their labels, by the way of cutting names that leaves the fewest files alone."""
    best: tuple[dict[str, str], dict[str, str]] | None = None
    fewest = -1
    for cut_image in _cuts(images):
        for cut_label in _cuts(labels):
            keyed = _keyed(images, cut_image), _keyed(labels, cut_label)
            if keyed[0] is None or keyed[1] is None:
                continue
            alone = len(keyed[0].keys() ^ keyed[1].keys())
            if best is None or alone < fewest:
                best, fewest = (keyed[0], keyed[1]), alone
    if best is None:
        raise InputError(f"files of equal name but for the suffix are among {_listing(images)} or {_listing(labels)}")
    by_image, by_label = best
    if fewest:
        without = [by_image[key] for key in sorted(by_image.keys() - by_label.keys())]
        without += [by_label[key] for key in sorted(by_label.keys() - by_image.keys())]
        raise InputError(f"no partner is there for {_listing(without)}; name those that belong together in a manifest")
    return [(by_image[key], by_label[key]) for key in sorted(by_image)]


def _cuts(paths: Sequence[str]) -> list[str]:
    """Endings to cut: none, from the last separator of what all names end in, and all that they end in."""
    backwards = zip(*(reversed(Path(path).stem) for path in paths), strict=False)
    alike = list(itertools.takewhile(lambda letters: len(set(letters)) == 1, backwards))
    shared = "".join(letters[0] for letters in reversed(alike))
    last = max(shared.rfind(separator) for separator in _SEPARATORS)
    return list(dict.fromkeys(["", "" if last < 0 else shared[last:], shared]))


def _keyed(paths: Sequence[str], cut: str) -> dict[str, str] | None:
    """The paths by their names without `cut`; None where two are the same then."""
    keyed = {Path(path).stem.removesuffix(cut): path for path in paths}
    return keyed if len(keyed) == len(paths) else None


def _listing(paths: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(paths[:most])
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"
