"""Which prediction goes with which truth, on which pixels, and what their labels are called."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tilepipe.comparison.labels import LabelMap, open_labels
from tilepipe.errors import InputError, UsageError
from tilepipe.raster.overlap import Overlap, overlap_of
from tilepipe.raster.source import Nodata
from tilepipe.raster.zarr import is_zarr

Maps = str | Path | Sequence[str | Path]
"""A label map, several, or a folder of them."""

ENDINGS = (".tif", ".tiff", ".png", ".vrt", ".jp2", ".img", ".bmp", ".gif", ".pgm", ".zarr")
"""Files of a folder that are taken for label maps; others, such as sidecars, are passed over."""

UNNAMED = 256
"""Values that count as classes where nothing says how many there are."""
MOST_CLASSES = 4096
"""Beyond which a confusion matrix is too large."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prediction, its truth, and the pixels that both have."""

    prediction: LabelMap
    truth: LabelMap
    overlap: Overlap
    """Its first window is the prediction's, its second the truth's."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the pixels that both have."""
        return self.overlap.shape


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of an evaluation."""

    names: tuple[str, ...]
    told: bool
    """False: nothing says which there are, and each value below UNNAMED counts as one, named by its number."""

    def remedy(self, ignoring: str) -> str:
        """What may be done about a label that is no class, beside `ignoring` it; a format with {value} in it."""
        names = ", ".join(self.names[:6]) + (", ..." if len(self.names) > 6 else "")
        # Braces in names would be taken for the format's.
        names = names.replace("{", "{{").replace("}", "}}")
        return f"the classes are {names}; {ignoring}" if self.told else f"name the classes (--classes); {ignoring}"


def open_pairs(predictions: Maps, truths: Maps, nodata: Nodata = None, truth_nodata: Nodata = None) -> list[Pair]:
    """Every prediction with its truth, at least one pair; InputError where two do not fit."""
    pairs = []
    for prediction, truth in matched(predictions, truths):
        found, real = open_labels(prediction, nodata), open_labels(truth, truth_nodata)
        pairs.append(Pair(found, real, overlap_of(found.info, real.info)))
    return pairs


def matched(predictions: Maps, truths: Maps) -> list[tuple[str, str]]:
    """(prediction, truth) paths: of two files, of two lists in their order, or of two folders by name.

    Files of folders belong together that have the same name but for the ending; InputError names those without a
    counterpart.
    """
    folders = [isinstance(maps, str | Path) and _is_folder(maps) for maps in (predictions, truths)]
    if all(folders):
        return _by_name(str(predictions), str(truths))
    if any(folders):
        one, other = (predictions, truths) if folders[0] else (truths, predictions)
        raise UsageError(f"{one} is a folder of files and {other} is none; give two files, or two folders")
    named = [
        [str(maps)] if isinstance(maps, str | Path) else [str(one) for one in maps] for maps in (predictions, truths)
    ]
    if not len(named[0]) == len(named[1]) > 0:
        raise UsageError(f"{len(named[0])} predictions and {len(named[1])} truths; give one truth for each prediction")
    return list(zip(*named, strict=True))


def classes_of(pairs: Sequence[Pair], names: tuple[str, ...] | None) -> Classes:
    """The classes: `names` where given, else those that predictions or truths tell, which must all agree."""
    if names is not None:
        if len(set(names)) != len(names) or not 1 <= len(names) <= MOST_CLASSES:
            raise UsageError(
                f"classes {', '.join(names[:9])} are {len(names)}; give 1 to {MOST_CLASSES}, each with its own name"
            )
        return Classes(names, told=True)
    maps = [labels for pair in pairs for labels in (pair.prediction, pair.truth) if labels.classes]
    if not maps:
        return Classes(tuple(map(str, range(UNNAMED))), told=False)
    first = maps[0]
    other = next((labels for labels in maps if labels.classes != first.classes), None)
    if other is not None:
        raise InputError(
            f"{other.name} has the classes {_listed(other.classes)}, {first.name} {_listed(first.classes)}; "
            "give two maps of the same classes, or say which they are (--classes)"
        )
    return classes_of(pairs, first.classes)


def notes_of(pairs: Sequence[Pair], classes: Classes) -> tuple[str, ...]:
    """What a user should know of how the maps were read and laid on each other."""
    notes: dict[str, list[str]] = {}
    for pair in pairs:
        for labels, option, counts in (
            (pair.prediction, "--nodata", "missing from the prediction"),
            (pair.truth, "--truth-nodata", "ignored"),
        ):
            value = labels.nodata
            if classes.told and value is not None and 0 <= value < len(classes.names):
                what = f"declares {value}, class {classes.names[value]!r}, to be nodata: such pixels are {counts}"
                notes.setdefault(f"{what} ({option} none makes them count)", []).append(labels.name)
        info = pair.truth.info
        if not pair.overlap.georeferenced and (info.transform or pair.prediction.info.transform):
            without = pair.prediction if info.transform else pair.truth
            notes.setdefault("has no georeference: compared pixel by pixel", []).append(without.name)
        if pair.shape != info.shape:
            shown = f"{pair.shape[0]} x {pair.shape[1]} of {info.shape[0]} x {info.shape[1]}"
            notes.setdefault(f"is scored on the {shown} pixels that the prediction covers, too", []).append(
                pair.truth.name
            )
    return tuple(f"{_first(names)} {what}" for what, names in notes.items())


def _is_folder(path: str | Path) -> bool:
    return os.path.isdir(path) and not is_zarr(str(path))


def _by_name(predictions: str, truths: str) -> list[tuple[str, str]]:
    found, real = _label_files(predictions), _label_files(truths)
    for folder, lacking, other in (
        (predictions, real.keys() - found.keys(), truths),
        (truths, found.keys() - real.keys(), predictions),
    ):
        if lacking:
            raise InputError(
                f"{folder} has nothing for {_first(sorted(lacking))} of {other}; each file needs one of the same name "
                "in the other folder"
            )
    return [(found[name], real[name]) for name in sorted(found)]


def _label_files(folder: str) -> dict[str, str]:
    """Name without ending: path of each label map in a folder."""
    files: dict[str, str] = {}
    for entry in sorted(os.listdir(folder)):
        stem, ending = os.path.splitext(entry)
        if ending.lower() not in ENDINGS or entry.startswith("."):
            continue
        if stem in files:
            raise InputError(f"{folder} holds {os.path.basename(files[stem])} and {entry}; leave one of that name")
        files[stem] = os.path.join(folder, entry)
    if not files:
        raise InputError(f"{folder} holds no label map; files are known by their endings {', '.join(ENDINGS)}")
    return files


def _listed(names: Iterable[str] | None) -> str:
    return ", ".join(names or ())


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
