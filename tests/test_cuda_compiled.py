"""The CUDA kernels that numba compiles, compiled for a chip that is not here."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

if find_spec("numba_cuda") is None:
    pytest.skip("needs numba-cuda, which the gpu extra brings", allow_module_level=True)

from numba import types

from tilepipe.crf.cuda import kernels_for
from tilepipe.predict import blend_cuda

CHIP = 9, 0
"""Compute capability of an H100 or H200."""
FLOATS = types.float32, types.float64
PAIR, SCALE = types.UniTuple(types.int64, 2), types.UniTuple(types.float64, 2)


@pytest.fixture(autouse=True)
def _chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions that kernels call are compiled for the device at hand."""
    monkeypatch.setattr(
        "numba.cuda.dispatcher.get_current_device", lambda: SimpleNamespace(compute_capability=CHIP), raising=True
    )


def array(dtype: Any, dims: int, layout: str = "C") -> types.Array:
    return types.Array(dtype, dims, layout)


def compiled(kernel: Any, *arguments: Any) -> str:
    """The kernel's PTX."""
    from numba import cuda

    code, _ = cuda.compile_ptx(kernel.py_func, arguments, cc=CHIP)
    return str(code)


def bodies(code: str) -> str:
    """What of some PTX is not a declaration of numba's own helpers."""
    return code[code.rindex(".entry") :]


@pytest.mark.parametrize("real", FLOATS, ids=str)
def test_kernels_of_maps_compile_for_all_types(real: Any) -> None:
    """Scores of any strides; labels of one byte and two; probabilities of one byte and as floats."""
    scores, keep, count = array(real, 3, "A"), array(types.boolean, 2), array(types.int32, 1)
    for labels, shares in itertools.product((types.uint8, types.uint16), (types.uint8, types.float32)):
        maps = array(labels, 2), array(types.uint8, 2), array(shares, 3)
        assert ".visible .entry" in compiled(blend_cuda.score_maps, scores, PAIR, keep, *maps, SCALE, count)
        assert ".visible .entry" in compiled(blend_cuda.finish, array(types.float32, 3), PAIR, *maps, SCALE)


def test_float32_scores_are_added_in_float32() -> None:
    weights, sums, state = array(types.float32, 2, "A"), array(types.float32, 3), array(types.int32, 2)
    rest = PAIR, array(types.boolean, 2), weights, sums, state, array(types.int32, 1)
    code = bodies(compiled(blend_cuda.accumulate, array(types.float32, 3, "A"), *rest))
    assert ".f64" not in code
    assert ".f64" in bodies(compiled(blend_cuda.accumulate, array(types.float64, 3, "A"), *rest))


@pytest.mark.parametrize("real", FLOATS, ids=str)
def test_refinement_compiles_and_stays_in_its_type(real: Any) -> None:
    strengths, step = kernels_for(np.dtype(str(real)))
    planes, known, table = array(real, 3), array(types.boolean, 2), array(real, 2)
    first = bodies(compiled(strengths, planes, known, table, array(real, 1), planes))
    second = bodies(compiled(step, planes, planes, planes, planes, known, planes, table))
    for code in first, second:
        assert (".f64" in code) == (real is types.float64)
