"""A finished label map as polygons: one for each region of connected pixels of a class, whatever the map's size."""

from __future__ import annotations

import contextlib
import glob
import itertools
import math
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import StoreError, UsageError
from tilepipe.ground import row_areas
from tilepipe.polygons.rings import Traced
from tilepipe.polygons.sieve import Sieve
from tilepipe.polygons.strips import Strip, read_strips
from tilepipe.polygons.tracer import IDENTITY, Tracer
from tilepipe.polygons.write import DRIVERS, Layer, import_arrow, write_layer
from tilepipe.store.durable import explain
from tilepipe.store.output import OutputStore, open_store
from tilepipe.store.spec import StoreSpec

SLICE = 1 << 20
"""Pixels after which whole polygons are taken out."""


@dataclass(frozen=True, slots=True)
class PolygonOptions:
    """Which polygons are written, and how."""

    classes: Sequence[str] = ()
    """Names or numbers of the classes to write, none for all. Borders among the others do not count."""
    min_area: str | float | None = None
    """Regions smaller than this are merged into their largest neighbours: square metres, or pixels as "16px"."""
    simplify: str | float | None = None
    """How far a border may move: in the units of the map's CRS, or pixels as "1.5px"."""
    allow_partial: bool = False
    """Export an unfinished store, too, without polygons where blocks are not done."""
    overwrite: bool = False


def is_vector(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name ends as one of polygons."""
    return Path(path).suffix.lower() in DRIVERS


def export_polygons(
    store_path: str | os.PathLike[str],
    file: str | os.PathLike[str],
    options: PolygonOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, int]:
    """The path of the file that now holds the store's polygons, and how many: it appears when it is whole.

    A polygon is a region of pixels of one class that are connected along their sides, with its holes, joined over
    all blocks. `progress` is called with (pixels read, pixels to read); merging small regions reads them three times.
    Raises UsageError for an output that exists or an option that is not legal, StoreError for a store without labels
    or an unfinished one, RunError for a full disk.
    """
    options = options or PolygonOptions()
    target = Path(file)
    if not is_vector(target):
        raise UsageError(f"{target} is no file of polygons; its name must end in {', '.join(DRIVERS)}")
    if target.exists() and (target.is_dir() or not options.overwrite):
        raise UsageError(f"{target} exists; choose another path or use --overwrite")
    import_arrow()
    store = open_store(store_path)
    _check(store, options)
    areas = row_areas(store.spec)
    plan = _plan(store.spec, options, areas)
    layer = Layer(
        target.stem,
        store.spec.classes,
        store.spec.crs_wkt,
        store.spec.transform or IDENTITY,
        areas is not None,
        store.spec.confidence,
    )
    batches = _polygons(store, plan, progress or (lambda done, total: None))
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex}{target.suffix.lower()}")
    try:
        with _explained(target):
            count = write_layer(temporary, layer, batches)
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            os.replace(temporary, target)
    finally:
        for path in target.parent.glob(f"{glob.escape(temporary.stem)}*"):
            path.unlink(missing_ok=True)
    return target, count


def chosen_classes(spec: StoreSpec, classes: Sequence[str]) -> NDArray[np.bool_]:
    """Which labels (values of the labels' dtype,) are chosen by names or numbers; all classes where none are given."""
    names = [label.name for label in spec.classes]
    chosen = np.zeros(spec.nodata + 1, bool)
    for word in classes:
        if word in names:
            chosen[[number for number, name in enumerate(names) if name == word]] = True
        elif word.isdecimal() and int(word) < len(names):
            chosen[int(word)] = True
        else:
            raise UsageError(f"no class {word!r}; the map's are {', '.join(names)}, numbers 0 to {len(names) - 1}")
    if not classes:
        chosen[: len(names)] = True
    return chosen


def _check(store: OutputStore, options: PolygonOptions) -> None:
    if store.spec.kind != "labels":
        raise StoreError(f"{store.path} holds values, no labels; export them as GeoTIFF, since polygons need classes")
    if store.spec.transform is None and store.spec.gcps:
        raise StoreError(
            f"{store.path} has control points, no transform; export a GeoTIFF, which keeps them, and warp that"
        )
    done = len(store.done())
    if done < store.blocks and not options.allow_partial:
        raise StoreError(
            f"{store.path} has {done} of {store.blocks} blocks; run its command again to finish it, "
            "or allow a partial export"
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What becomes of the labels."""

    table: NDArray[np.uint16]
    """The label that each label is traced as: nodata where it is not chosen."""
    cells: NDArray[np.float64]
    """(rows,): the area of a pixel."""
    threshold: int
    """Pixels of the smallest region that stays."""
    tolerance: float | None


def _plan(spec: StoreSpec, options: PolygonOptions, areas: NDArray[np.float64] | None) -> _Plan:
    chosen = chosen_classes(spec, options.classes)
    table = np.where(chosen, np.arange(spec.nodata + 1), spec.nodata).astype(np.uint16)
    cells = np.ones(spec.shape[0]) if areas is None else areas
    a, b, _, d, e, _ = spec.transform or IDENTITY
    smallest = _measure(options.min_area, "min-area", float(cells[len(cells) // 2]))
    tolerance = _measure(options.simplify, "simplify", 1.0, math.sqrt(abs(a * e - b * d)))
    return _Plan(table, cells, 0 if smallest is None else math.ceil(smallest), tolerance)


def _measure(given: str | float | None, name: str, unit: float, pixel: float = 1.0) -> float | None:
    """What was given as a number of pixels times `pixel`: a plain number is divided by `unit`."""
    if given is None:
        return None
    text = str(given).strip().lower()
    try:
        value = float(text.removesuffix("px")) * (pixel if text.endswith("px") else 1 / unit)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise UsageError(f"--{name} {given}; give a number, 0 or more, or pixels as 16px")
    return value


def _polygons(store: OutputStore, plan: _Plan, progress: Callable[[int, int], None]) -> Iterator[Traced]:
    """The polygons, batch by batch."""
    spec = store.spec
    tracer = Tracer(spec.shape, spec.nodata, spec.transform or IDENTITY, plan.tolerance)
    rows = max(1, SLICE // spec.shape[1])
    for strip in _sieved(store, plan, progress):
        labels = plan.table[strip.labels]
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            trust = None if strip.confidence is None else strip.confidence[part]
            yield tracer.feed(labels[part], plan.cells[strip.row :][part], trust)
    yield tracer.finish()


def _sieved(store: OutputStore, plan: _Plan, progress: Callable[[int, int], None]) -> Iterator[Strip]:
    """The map's strips, small regions merged."""
    spec, passes = store.spec, itertools.count()
    total = 3 if plan.threshold > 1 else 1

    def strips(confidence: bool = False) -> Iterator[Strip]:
        before, width = next(passes) * spec.shape[0], spec.shape[1]
        for strip in read_strips(store, confidence):
            yield strip
            progress((before + strip.row + len(strip.labels)) * width, total * spec.shape[0] * width)

    if plan.threshold <= 1:
        return strips(confidence=True)
    return Sieve.of(strips, spec.shape[1], plan.threshold, spec.nodata).apply(strips(confidence=True))


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explain(error, target) from error
