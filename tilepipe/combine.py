"""Several models' probabilities made one: classes matched by name, softmax, mean or maximum, and the maps of it.

Probabilities are (classes, rows, columns), float32 or float64 and C-contiguous; their own precision is kept
throughout. Each pixel's sums are formed in a fixed order, members in the order in which they were named and then
classes in theirs, so that results do not depend on how a raster is cut. Scores must be finite enough to have a
best class: whoever computes them refuses the others (`tilepipe.predict.maps.BlockJob.refuse_undefined`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numba import njit

from tilepipe.errors import ModelError, UsageError
from tilepipe.predict.maps import BlockMaps, Wanted
from tilepipe.predict.scores import CONFIDENCE_STEPS
from tilepipe.predict.softmax import SEGMENT, Array, segment_of, softmax

Combination = Literal["mean", "max"]

COMBINATIONS: tuple[Combination, ...] = ("mean", "max")
"""How members' probabilities become one: their mean, or the largest of each class, scaled to a sum of 1."""


def match_classes(cards: Sequence[Sequence[str]]) -> tuple[tuple[int, ...], ...]:
    """For each model, where it keeps the first model's classes: order[n] is its index of the first's class n.

    cards: each model's class names, in its own order. Raises ModelError where a model lacks one of the first's
    classes, has others, or names one twice.

    >>> match_classes([("water", "wood"), ("wood", "water")])
    ((0, 1), (1, 0))
    """
    first = tuple(cards[0])
    for number, names in enumerate(cards, start=1):
        twice = sorted({name for name in names if list(names).count(name) > 1})
        if twice:
            raise ModelError(f"model {number} names {_quoted(twice)} more than once; classes are matched by name")
        missing = [name for name in first if name not in names]
        others = [name for name in names if name not in first]
        if missing or others:
            parts = [f"lacks {_quoted(missing)}"] if missing else []
            parts += [f"has {_quoted(others)} instead" if missing else f"has {_quoted(others)} too"] if others else []
            raise ModelError(
                f"model {number} {' and '.join(parts)}; models that are combined need the classes of the first: "
                f"{_quoted(first)}"
            )
    return tuple(tuple(list(names).index(name) for name in first) for names in cards)


def _quoted(names: Sequence[str]) -> str:
    shown = ", ".join(f'"{name}"' for name in names[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"


def softmax_in_place(scores: Array) -> Array:
    """`scores` (classes, h, w), which now hold each pixel's probabilities.

    float32: the arithmetic of `tilepipe.predict.scores.score_maps`, so that the best probability, and with it the
    confidence, is the same to the last bit. float64: exponentials and sums in float64.
    """
    if scores.dtype == np.float32:
        _softmax_single(scores)
    else:
        _softmax_double(scores)
    return scores


@njit(nogil=True, cache=True)
def _softmax_single(scores: Array) -> None:
    classes, height, width = scores.shape
    segment = segment_of(scores, classes)
    _, powers, sums, _ = segment
    for y in range(height):
        for start in range(0, width, SEGMENT):
            n = min(SEGMENT, width - start)
            softmax(scores, False, (y, start), n, segment)
            for x in range(n):
                sums[x] = np.float32(1) / sums[x]
            for c in range(classes):
                out, power = scores[c, y, start : start + n], powers[c]
                for x in range(n):
                    out[x] = power[x] * sums[x]


@njit(nogil=True, cache=True)
def _softmax_double(scores: Array) -> None:
    classes, height, width = scores.shape
    best, total = np.empty(width, scores.dtype), np.empty(width, scores.dtype)
    for y in range(height):
        best[:] = scores[0, y]
        total[:] = 0
        for c in range(1, classes):
            line = scores[c, y]
            for x in range(width):
                best[x] = line[x] if line[x] > best[x] else best[x]
        for c in range(classes):
            line = scores[c, y]
            for x in range(width):
                line[x] = math.exp(line[x] - best[x])
                total[x] += line[x]
        for c in range(classes):
            line = scores[c, y]
            for x in range(width):
                line[x] /= total[x]


@njit(nogil=True, cache=True)
def merge(total: Array, probabilities: Array, order: tuple[int, ...], largest: bool) -> None:
    """Add a member's probabilities to `total`, or keep the larger of the two; order: as of `match_classes`."""
    classes, height, width = total.shape
    for c in range(classes):
        source = order[c]
        for y in range(height):
            out, line = total[c, y], probabilities[source, y]
            if largest:
                for x in range(width):
                    out[x] = line[x] if line[x] > out[x] else out[x]
            else:
                for x in range(width):
                    out[x] += line[x]


@njit(nogil=True, cache=True)
def finish(total: Array, members: int, largest: bool) -> None:
    """Turn the members' sum into their mean, or scale the largest probabilities to a sum of 1 in each pixel."""
    classes, height, width = total.shape
    divisor = np.empty(width, total.dtype)
    for y in range(height):
        divisor[:] = members
        if largest:
            divisor[:] = 0
            for c in range(classes):
                line = total[c, y]
                for x in range(width):
                    divisor[x] += line[x]
        for c in range(classes):
            line = total[c, y]
            for x in range(width):
                line[x] /= divisor[x]


def combine(members: Sequence[Array], orders: Sequence[tuple[int, ...]], how: Combination) -> Array:
    """The members' probabilities as one array, classes in the first's order; it may be the first array itself.

    members: one array of probabilities a model, all of one dtype and size. orders: as of `match_classes`. mean: the
    sum over the members, in their order, divided by their number. max: the largest probability of each class,
    divided by the sum of these. One member alone comes back as it is.
    """
    if how not in COMBINATIONS:
        raise UsageError(f"combining by {how!r} is not known; use {' or '.join(COMBINATIONS)}")
    first = members[0]
    assert len(members) == len(orders), "one order a member"
    assert all(m.shape[1:] == first.shape[1:] and m.dtype == first.dtype for m in members), "members of one block"
    total = first if orders[0] == tuple(range(len(first))) else np.ascontiguousarray(first[list(orders[0])])
    if len(members) > 1:
        largest = how == "max"
        for member, order in zip(members[1:], orders[1:], strict=True):
            merge(total, member, np.array(order, np.int64), largest)
        finish(total, len(members), largest)
    return total


@njit(nogil=True, cache=True)
def _maps(
    values: Array, labels: Array, confidence: Array | None, probabilities: Array | None, scale: tuple[float, float]
) -> None:
    classes, height, width = values.shape
    one, factor, offset = values.dtype.type(1), values.dtype.type(scale[0]), values.dtype.type(scale[1])
    steps, half = values.dtype.type(CONFIDENCE_STEPS), values.dtype.type(0.5)
    best, label = np.empty(width, values.dtype), np.empty(width, np.int32)
    for y in range(height):
        best[:] = values[0, y]
        label[:] = 0
        for c in range(1, classes):
            line, base = values[c, y], np.int32(c)
            for x in range(width):
                label[x] = base if line[x] > best[x] else label[x]
                best[x] = line[x] if line[x] > best[x] else best[x]
        labels[y] = label
        if confidence is not None:
            out = confidence[y]
            for x in range(width):
                out[x] = np.int32(min(best[x], one) * steps + half)
        if probabilities is not None:
            for c in range(classes):
                line, share = values[c, y], probabilities[c, y]
                for x in range(width):
                    share[x] = min(line[x], one) * factor + offset


def maps_of(probabilities: Array, keep: Array | None, wanted: Wanted) -> BlockMaps:
    """A block's maps from its probabilities: best classes, and what is wanted beside them.

    The lowest class wins a tie; keep: (rows, columns) bool, pixels that get a label, None for all. Two scores that
    differ by less than their probabilities can tell are a tie here, though not where labels come from scores.
    """
    classes = len(probabilities)
    maps = BlockMaps.unfilled(probabilities.shape[1:], classes, wanted)
    _maps(np.ascontiguousarray(probabilities), *maps[:3], wanted.scale)
    return maps.finished(keep, classes, wanted)
