"""The CUDA network, its kernels and its engine, in Triton's interpreter and numba's simulator."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("script", "checks"),
    [
        ("triton_checks.py", "bias_relu pool unpool normalise"),
        ("network_checks.py", "modules fused parts others padded"),
    ],
)
def test_in_the_interpreter(script: str, checks: str) -> None:
    """Runs a script of tests/, since interpreter and simulator must be chosen before the imports."""
    path = os.path.join(os.path.dirname(__file__), script)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == checks.split()
