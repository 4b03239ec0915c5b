"""Refinement by the conditional random field of `tilepipe.crf.parameters` in host memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilepipe.crf.cpu import Field, Kernels, Scratch, pair_offsets, run
from tilepipe.crf.parameters import CrfParameters
from tilepipe.predict.scores import Array


def working_bytes(classes: int, width: int, itemsize: int, parameters: CrfParameters) -> int:
    """The memory that `refine` works in beside its arguments and its result, for rows of `width` pixels."""
    wide = width + 2 * parameters.radius
    kernel_rows = parameters.reach + 1
    pairs = 2 * parameters.radius * (parameters.radius + 1)
    kept_rows = 2 * parameters.radius + 1
    return itemsize * wide * (kernel_rows * (pairs + 2) + kept_rows * (parameters.iterations * classes + 1))


def refine(probabilities: Array, colors: Array, valid: Array | None, parameters: CrfParameters) -> Array:
    """The refined probabilities, of the shape and type of `probabilities`; those of invalid pixels are unchanged.

    probabilities: (classes, h, w) float32 or float64. colors: (bands, h, w), the same type, normalised by the
    model's statistics; finite where valid. valid: (h, w) bool, None for all. All arithmetic is in that type, in one
    thread without the GIL; memory: the result and `working_bytes`.
    """
    classes, height, width = probabilities.shape
    dtype = probabilities.dtype
    assert dtype in (np.float32, np.float64), f"probabilities in {dtype}"
    assert colors.dtype == dtype, f"colours in {colors.dtype} beside probabilities in {dtype}"
    assert colors.shape[1:] == (height, width), "one colour per pixel"
    assert valid is None or valid.shape == (height, width), "one flag per pixel"
    out = np.empty(probabilities.shape, dtype)
    run(
        np.ascontiguousarray(probabilities),
        np.ascontiguousarray(colors),
        np.ones((height, width), np.bool_) if valid is None else np.ascontiguousarray(valid, np.bool_),
        _kernels(parameters, dtype),
        Field.empty(classes, width, dtype, (parameters.iterations, parameters.radius)),
        Scratch.empty(classes, parameters.radius, dtype),
        out,
    )
    return out


def profiles(parameters: CrfParameters, dtype: Any) -> tuple[Array, Array]:
    """What the kernels make of distance, (2, radius + 1) for 0 to `radius` rows or columns, and the two weights.

    The first row is the appearance kernel's exponent, of which rows' and columns' are added; the second is the
    smoothness kernel, of which they are multiplied.
    """
    squares = np.arange(parameters.radius + 1) ** 2
    near = squares / (2 * parameters.appearance_deviation**2)
    smooth = np.exp(-squares / (2 * parameters.smoothness_deviation**2))
    weights = np.array([parameters.appearance_weight, parameters.smoothness_weight], dtype)
    return np.stack([near, smooth]).astype(dtype), weights


def _kernels(parameters: CrfParameters, dtype: Any) -> Kernels:
    offsets = pair_offsets(parameters.radius)
    (near, smooth), weights = profiles(parameters, dtype)
    rows, cols = np.abs(offsets).T
    color = dtype.type(1 / (2 * parameters.color_deviation**2))
    return Kernels(offsets, near[rows] + near[cols], color, smooth.copy(), weights)
