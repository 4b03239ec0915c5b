"""The CUDA network, its kernels and engine: in interpreter and simulator, and compiled for a chip that is not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHECKS = [
    *("bias_relu", "pool", "unpool", "normalise", "classify", "check"),
    *("modules", "fused", "parts", "others", "padded"),
    *("engine", "graphs", "failures", "many", "classifier"),
]


def test_in_interpreter_and_simulator() -> None:
    """Runs tests/interpreter.py, since both must be chosen before the imports."""
    script = os.path.join(os.path.dirname(__file__), "interpreter.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == CHECKS


POINTERS = {"float32": "*fp32", "bf16": "*bf16", "float64": "*fp64"}


@pytest.mark.parametrize("kind", list(POINTERS))
@pytest.mark.parametrize("name", ["_bias_relu", "_pool", "_unpool"])
def test_maps_move_in_words_of_16_bytes(name: str, kind: str) -> None:
    """The kernels compiled for compute capability 9.0: every access to a map of 64 channels is as wide as can be."""
    import triton.language as tl

    from tilepipe.predict import triton_kernels as kernels

    rows, cols = kernels.rectangle(64)
    constants = {"channels": 64, "has_bias": True, "relu": True, "rows": rows, "cols": cols}
    constants["kind"] = tl.float64 if kind == "float64" else tl.float32
    pointers = dict.fromkeys(("x", "bias", "pooled", "out"), POINTERS[kind]) | {"switches": "*u8"}
    code = compiled(getattr(kernels, name), pointers, constants)
    loads, stores = (re.findall(rf"{move}\.global\.(\S+)", code) for move in ("ld", "st"))
    assert loads
    assert stores
    assert {*loads, *stores} <= {"v4.b32", "v2.b64"}


def test_the_input_kernel_compiles() -> None:
    from tilepipe.predict import triton_kernels as kernels

    for kind in ("*u8", "*u16", "*i16", "*fp32", "*fp64"):
        pointers = {"values": kind, "valid": "*u8", "mean": "*fp32", "std": "*fp32", "out": "*bf16"}
        constants = {"bands": 3, "channels": 3, "has_valid": True, "rows": 512, "cols": 4}
        code = compiled(kernels._normalise, pointers, constants)
        assert "div.rn.f32" in code, "torch divides exactly"


def compiled(kernel: object, pointers: dict[str, str], constants: dict[str, object]) -> str:
    """The kernel's PTX for compute capability 9.0; needs no device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names  # type: ignore[attr-defined]
    given = {n: v for n, v in constants.items() if n in names}
    signature = {n: "constexpr" if n in given else pointers.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in given.items()}, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
