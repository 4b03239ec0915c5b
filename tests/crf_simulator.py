"""Checks of refinement on a CUDA device, run by test_crf.py in numba's simulator: NUMBA_ENABLE_CUDASIM=1.

Prints one word for each check that held. `HostDevice` stands in for a device, as in cuda_simulator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_simulator import HostDevice

from tilepipe.crf.cuda import kernels_for, refine_on
from tilepipe.crf.parameters import CrfParameters
from tilepipe.crf.refine import refine
from tilepipe.errors import RunError
from tilepipe.predict.scores import Array

RNG = np.random.default_rng(11)


def field(classes: int, shape: tuple[int, int], dtype: Any) -> tuple[Array, Array]:
    probabilities = RNG.dirichlet(np.full(classes, 0.5), shape).transpose(2, 0, 1)
    return np.ascontiguousarray(probabilities, dtype), RNG.normal(0, 0.5, (2, *shape)).astype(dtype)


def check_agreement() -> None:
    p = CrfParameters(iterations=2, radius=2, color_deviation=0.4)
    valid = RNG.random((5, 35)) < 0.8
    for classes, dtype, known, tolerance in ((3, np.float64, None, 1e-12), (10, np.float32, valid, 1e-5)):
        probabilities, colors = field(classes, (5, 35), dtype)
        before, device = (probabilities.copy(), colors.copy()), HostDevice()
        refined = refine_on(device, probabilities, colors, known, p)  # type: ignore[arg-type]
        assert refined.dtype == dtype
        np.testing.assert_allclose(refined, refine(probabilities, colors, known, p), atol=tolerance)
        np.testing.assert_array_equal(probabilities, before[0])
        np.testing.assert_array_equal(colors, before[1])
        assert [kernels_for(np.dtype(dtype)).index(k) for k in device.launched] == [0, 1, 1]
    assert (refined[:, ~valid] == probabilities[:, ~valid]).all()


def check_cuts() -> None:
    p = CrfParameters(iterations=2, radius=1)
    probabilities, colors = field(2, (8, 11), np.float32)
    device: Any = HostDevice()
    whole = refine_on(device, probabilities, colors, None, p)
    part = refine_on(device, probabilities[:, 2:, 3:10], colors[:, 2:, 3:10], None, p)
    np.testing.assert_array_equal(part[:, p.reach :, p.reach : -p.reach], whole[:, 4:, 5:8])


def check_memory() -> None:
    probabilities, colors = field(2, (4, 4), np.float32)
    p = CrfParameters(iterations=1, radius=1)
    once: Any = HostDevice(failures=1)
    refine_on(once, probabilities, colors, None, p)
    assert once.freed == 1
    twice: Any = HostDevice(failures=2)
    with pytest.raises(RunError, match=r"4 x 4 pixels of 2 classes .* smaller --tile or --block"):
        refine_on(twice, probabilities, colors, None, p)


if __name__ == "__main__":
    check_agreement()
    print("agreement")
    check_cuts()
    print("cuts")
    check_memory()
    print("memory")
