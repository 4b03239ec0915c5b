"""Scores of a label map against the truth: the confusion matrix with what follows from it, and boundary F1.

A score without a pixel to tell it (a class that neither map shows has no IoU, one that the truth does not show no
recall) is NaN, and means leave it out: the mean IoU is over the classes that truth or prediction show.

Boundary F1 is Csurka et al., "What is a good evaluation measure for semantic segmentation?" (BMVC 2013, section 3),
as Badrinarayanan, Kendall and Cipolla, "SegNet" (arXiv 1511.00561, section 4) use it. A class's boundary are its
pixels that touch, with one of their four sides, a pixel of another class. Pixels that are not valid are nobody's:
they have no boundary and make none, and neither does the edge of the image. A boundary pixel is a hit if the other
map has a boundary pixel of the same class within the tolerance, a Euclidean distance in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tilepipe.errors import InputError, UsageError
from tilepipe.window import Window

Labels = NDArray[np.integer]
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

TOLERANCE = 0.0075
"""The boundary tolerance's share of the image's diagonal (arXiv 1511.00561, section 4)."""


@dataclass(frozen=True, slots=True, eq=False)
class Confusion:
    """Pixels by true class (row) and found class (column); `add` and `merge` count on.

    >>> found = Confusion.empty(2)
    >>> found.add(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]]))
    >>> found.counts.tolist(), found.accuracy, [round(iou, 3) for iou in found.iou.tolist()]
    ([[1, 1], [0, 2]], 0.75, [0.5, 0.667])
    """

    counts: Counts
    """(classes, classes) int64."""

    @classmethod
    def empty(cls, classes: int) -> Confusion:
        """Without a pixel yet."""
        return cls(np.zeros((classes, classes), np.int64))

    def add(self, truth: Labels, found: Labels, valid: NDArray[np.bool_] | None = None) -> None:
        """Count the pixels of two arrays of one shape, of whole numbers; of those that are `valid` where given.

        InputError where a counted pixel's label is no class.
        """
        flags = _checked(truth, found, valid)
        flat = [np.ascontiguousarray(values).reshape(-1) for values in (truth, found, flags)]
        counts = np.zeros_like(self.counts)
        place = _count_pairs(*flat, counts)
        if place >= 0:
            raise InputError(
                f"truth {flat[0][place]} and prediction {flat[1][place]} meet at a pixel, and only 0 to "
                f"{len(counts) - 1} are classes; mark pixels that do not count as not valid"
            )
        self.merge(Confusion(counts))

    def merge(self, other: Confusion) -> None:
        """Count another matrix's pixels, too."""
        self.counts[...] += other.counts

    @property
    def pixels(self) -> int:
        """Pixels counted."""
        return int(self.counts.sum())

    @property
    def correct(self) -> int:
        """Pixels whose label is the true one."""
        return int(np.trace(self.counts))

    @property
    def truth_pixels(self) -> Counts:
        """(classes,): pixels that are of each class."""
        return self.counts.sum(axis=1)

    @property
    def found_pixels(self) -> Counts:
        """(classes,): pixels that were labelled as each class."""
        return self.counts.sum(axis=0)

    @property
    def hits(self) -> Counts:
        """(classes,): pixels of each class that were labelled so."""
        return np.diagonal(self.counts).copy()

    @property
    def accuracy(self) -> float:
        """Global accuracy: the share of pixels whose label is the true one."""
        return self.correct / self.pixels if self.pixels else math.nan

    @property
    def recall(self) -> Floats:
        """(classes,): the share of a class's pixels that were labelled so, its accuracy; NaN if not in the truth."""
        return _ratio(self.hits, self.truth_pixels)

    @property
    def precision(self) -> Floats:
        """(classes,): the share of the pixels labelled as a class that are of it; NaN if not in the prediction."""
        return _ratio(self.hits, self.found_pixels)

    @property
    def iou(self) -> Floats:
        """(classes,): intersection over union; NaN for a class that is in neither map."""
        return _ratio(self.hits, self.truth_pixels + self.found_pixels - self.hits)

    @property
    def f1(self) -> Floats:
        """(classes,): the harmonic mean of precision and recall, 2 hits / (true + found); NaN if in neither map."""
        return _ratio(2 * self.hits, self.truth_pixels + self.found_pixels)

    @property
    def mean_accuracy(self) -> float:
        """Class average accuracy: the mean recall of the classes that the truth shows."""
        return mean(self.recall)

    @property
    def mean_precision(self) -> float:
        """The mean precision of the classes that the prediction shows."""
        return mean(self.precision)

    @property
    def mean_iou(self) -> float:
        """The mean IoU of the classes that truth or prediction show."""
        return mean(self.iou)

    @property
    def mean_f1(self) -> float:
        """The mean F1 of the classes that truth or prediction show."""
        return mean(self.f1)


@dataclass(frozen=True, slots=True, eq=False)
class BoundaryCounts:
    """Boundary pixels of each class in both maps, and how many of them are hits; each (classes,) int64."""

    truth: Counts
    """Boundary pixels of the truth."""
    truth_hits: Counts
    """Those that the prediction's boundary comes near to."""
    found: Counts
    """Boundary pixels of the prediction."""
    found_hits: Counts
    """Those that the truth's boundary comes near to."""

    @classmethod
    def empty(cls, classes: int) -> BoundaryCounts:
        """Without a pixel yet."""
        return cls(*(np.zeros(classes, np.int64) for _ in range(4)))

    def merge(self, other: BoundaryCounts) -> None:
        """Count another part's pixels, too: of the same image, with the same tolerance."""
        for mine, more in zip(self._all, other._all, strict=True):
            mine[...] += more

    @property
    def _all(self) -> tuple[Counts, ...]:
        return self.truth, self.truth_hits, self.found, self.found_hits

    @property
    def precision(self) -> Floats:
        """(classes,): the share of the prediction's boundary that is near the truth's; NaN if it has none."""
        return _ratio(self.found_hits, self.found)

    @property
    def recall(self) -> Floats:
        """(classes,): the share of the truth's boundary that is near the prediction's; NaN if it has none."""
        return _ratio(self.truth_hits, self.truth)

    @property
    def f1(self) -> Floats:
        """(classes,): the harmonic mean of both; 0 if one map alone has a boundary, NaN if neither has."""
        precision, recall = np.nan_to_num(self.precision), np.nan_to_num(self.recall)
        both = precision + recall
        score = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
        return np.where(self.truth + self.found > 0, score, math.nan)

    def f1_of(self, truth_pixels: Counts) -> Floats:
        """(classes,): F1 of the classes of which the image's truth has pixels, NaN for the others.

        The image's score is the mean of these: the paper averages over "each class that is present in the ground
        truth test image".
        """
        return np.where(truth_pixels > 0, self.f1, math.nan)


def boundary_counts(
    truth: Labels,
    found: Labels,
    classes: int,
    tolerance: float,
    valid: NDArray[np.bool_] | None = None,
    core: Window | None = None,
) -> BoundaryCounts:
    """Boundary pixels and hits of two label maps (rows, columns), where both are `valid`.

    `tolerance` is in pixels. Only boundary pixels in `core` are counted, which lies in the arrays: the rest of them
    is what the core's result depends on, `boundary_margin(tolerance)` pixels on each side that the image reaches.
    InputError where a valid label is no class.
    """
    flags = _checked(truth, found, valid)
    own = (Window.whole(truth.shape) if core is None else core).within(Window.whole(truth.shape))
    edges = [_boundary(values, flags, classes) for values in (truth, found)]
    reach, limit = min(boundary_margin(tolerance) - 1, max(truth.shape)), _squared(tolerance)
    places = [_places(edge, *own, classes) for edge in edges]
    hits = np.zeros((2, classes), np.int64)
    near = np.empty(truth.shape, np.int32)
    for number, (rows, cols, ends) in enumerate(places):
        for label in np.flatnonzero(np.diff(ends)):
            _column_distances(edges[1 - number], label + 1, reach, near)
            mine = slice(ends[label], ends[label + 1])
            hits[number, label] = _count_near(near, rows[mine], cols[mine], reach, limit)
    (_, _, truth_ends), (_, _, found_ends) = places
    return BoundaryCounts(np.diff(truth_ends), hits[0], np.diff(found_ends), hits[1])


def boundary_margin(tolerance: float) -> int:
    """Pixels around a part of an image on which its boundary counts depend: the tolerance's, and one to see edges."""
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise UsageError(f"boundary tolerance {tolerance}; give pixels, 0 or more")
    return math.floor(tolerance) + 1


def default_tolerance(shape: tuple[int, int]) -> float:
    """0.75 % of the diagonal of an image of `shape`, in pixels.

    >>> default_tolerance((360, 480))
    4.5
    """
    return TOLERANCE * math.hypot(*shape)


def mean(scores: Floats) -> float:
    """The mean of the scores that are not NaN; NaN where none is."""
    told = scores[~np.isnan(scores)]
    return float(told.mean()) if told.size else math.nan


def _ratio(part: Counts, whole: Counts) -> Floats:
    return np.divide(part, whole, out=np.full(len(part), math.nan), where=whole > 0)


def _checked(truth: Labels, found: Labels, valid: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """The flags of valid pixels; InputError where the arrays do not go together."""
    for name, values in (("truth", truth), ("prediction", found)):
        if values.dtype.kind not in "iu":
            raise InputError(f"labels of the {name} are {values.dtype}; give whole numbers")
    flags = np.ones(truth.shape, bool) if valid is None else valid
    if not truth.shape == found.shape == flags.shape:
        raise InputError(f"truth {truth.shape}, prediction {found.shape} and valid {flags.shape} differ in shape")
    return flags


def _squared(tolerance: float) -> int:
    """The largest squared distance of two pixels that are within the tolerance."""
    square = math.floor(tolerance**2)
    # The root of a whole number, squared again, may have fallen short of it.
    return square + 1 if math.sqrt(square + 1) <= tolerance else square


def _boundary(labels: Labels, valid: NDArray[np.bool_], classes: int) -> NDArray[np.uint16]:
    """(rows, columns): label + 1 of each boundary pixel, 0 elsewhere."""
    if (valid & ((labels < 0) | (labels >= classes))).any():
        raise InputError(f"a label is none of the {classes} classes; mark pixels that do not count as not valid")
    out = np.empty(labels.shape, np.uint16)
    _mark_boundary(np.ascontiguousarray(labels), np.ascontiguousarray(valid), out)
    return out


@njit(nogil=True, cache=True)
def _count_pairs(truth: Labels, found: Labels, valid: NDArray[np.bool_], counts: Counts) -> int:
    """Adds each valid pair of labels to counts[truth, found]; the first index of one beyond it, else -1."""
    classes = counts.shape[0]
    for i in range(truth.size):
        if valid[i]:
            t, f = truth[i], found[i]
            if t < 0 or t >= classes or f < 0 or f >= classes:
                return i
            counts[t, f] += 1
    return -1


@njit(nogil=True, cache=True)
def _mark_boundary(labels: Labels, valid: NDArray[np.bool_], out: NDArray[np.uint16]) -> None:
    """Sets label + 1 where a side neighbour is valid and of another class, else 0."""
    rows, cols = labels.shape
    for i in range(rows):
        # At the image's edge a pixel is its own neighbour. Without branches this becomes vector code.
        up, down = max(i - 1, 0), min(i + 1, rows - 1)
        for j in range(cols):
            own = labels[i, j]
            other = (valid[up, j] & (labels[up, j] != own)) | (valid[down, j] & (labels[down, j] != own))
            out[i, j] = own + 1 if valid[i, j] & other else 0
    for i in range(rows):
        for j in range(1, cols):
            if valid[i, j - 1] & valid[i, j] & (labels[i, j - 1] != labels[i, j]):
                out[i, j - 1], out[i, j] = labels[i, j - 1] + 1, labels[i, j] + 1


@njit(nogil=True, cache=True)
def _places(
    edge: NDArray[np.uint16], rows: slice, cols: slice, classes: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], Counts]:
    """(rows, columns) of the boundary pixels in a part of `edge`, class by class, and where each class ends."""
    ends = np.zeros(classes + 1, np.int64)
    for i in range(rows.start, rows.stop):
        for j in range(cols.start, cols.stop):
            if edge[i, j]:
                ends[edge[i, j]] += 1
    ends = np.cumsum(ends)
    free = ends.copy()
    found = np.empty((2, ends[-1]), np.intp)
    for i in range(rows.start, rows.stop):
        for j in range(cols.start, cols.stop):
            if edge[i, j]:
                k = free[edge[i, j] - 1]
                free[edge[i, j] - 1] = k + 1
                found[0, k], found[1, k] = i, j
    return found[0], found[1], ends


@njit(nogil=True, cache=True)
def _column_distances(edge: NDArray[np.uint16], code: int, reach: int, out: NDArray[np.int32]) -> None:
    """Fills `out` with the distance, in its own column, to the nearest pixel of `code`; reach + 1 beyond reach."""
    rows, cols = edge.shape
    for j in range(cols):
        out[0, j] = 0 if edge[0, j] == code else reach + 1
    for i in range(1, rows):
        for j in range(cols):
            out[i, j] = 0 if edge[i, j] == code else min(out[i - 1, j] + 1, reach + 1)
    for i in range(rows - 2, -1, -1):
        for j in range(cols):
            out[i, j] = min(out[i, j], out[i + 1, j] + 1)


@njit(nogil=True, cache=True)
def _count_near(near: NDArray[np.int32], rows: NDArray[np.intp], cols: NDArray[np.intp], reach: int, limit: int) -> int:
    """How many of the pixels (rows, cols) have a squared distance of at most `limit`, by their columns' distances.

    The nearest point of the other boundary is, among those that are nearest in their columns, the nearest.
    """
    width = near.shape[1]
    hits = 0
    for k in range(rows.size):
        i, j = rows[k], cols[k]
        for d in range(min(reach, width) + 1):
            left = near[i, j - d] if j >= d else reach + 1
            right = near[i, j + d] if j + d < width else reach + 1
            nearest = np.int64(min(left, right))
            if nearest <= reach and nearest * nearest + d * d <= limit:
                hits += 1
                break
    return hits
