"""The benchmark for CUDA devices runs to its end without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "benchmarks" / "gpu.py"


def rehearsed(folder: Path, *arguments: str) -> dict[str, Any]:
    """What it wrote; sizes are tiny, and times mean nothing."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(SCRIPT), "--rehearse", "--json", str(folder / "out.json"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "out.json").read_text())


@pytest.mark.slow
def test_the_network_alone(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, "--only", "product,kernels,steps,rivals")
    assert found["product"]["bf16 matrix product"]["tflops"] > 0
    kernels, steps = ({k: v for k, v in found[part].items() if k[0] != "("} for part in ("kernels", "steps"))
    assert all(line["ms"] > 0 and line["torch_ms"] > 0 for line in kernels.values())
    assert len(kernels) == 4
    assert next(iter(steps)) == "eager, autocast"
    assert all(line["ms"] > 0 for line in steps.values()), steps
    assert steps["+ pooling kernels"]["predicted_gain_ms"] > 0
    part, whole = steps["+ cropped to the core"], steps["folded"]
    assert part["tflops"] * part["ms"] < whole["tflops"] * whole["ms"], "a part is less arithmetic than the whole"


@pytest.mark.slow
def test_whole_jobs(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, "--only", "agreement,whole,gigapixels", "--folder", str(tmp_path))
    assert found["agreement"]["synthetic-landcover"]["same"] > 0.98
    assert found["whole"]["end to end"]["of_bare"] > 0
    assert found["gigapixels"]["300 x 300"]["blocks"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "what is written is removed"


def test_without_a_device_a_rehearsal_is_what_can_be_had() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--only", "product"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--rehearse runs the parts that need none" in done.stderr
