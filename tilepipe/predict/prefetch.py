"""Asking a CPU for memory ahead of its use, in numba kernels: it is fetched while they calculate."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

LINE = 64
"""Bytes of a cache line, on all processors that torch runs on; where it is less, less is fetched ahead."""

_READ, _NEAREST, _DATA = 0, 3, 1
"""What LLVM's prefetch is told: to be read, into the nearest cache, not instructions."""


@intrinsic
def _touch(_context: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of an element of a one-dimensional array; no address is wrong."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = context.make_array(signature.args[0])(context, builder, arguments[0])
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = builder.bitcast(builder.gep(held.data, [arguments[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        builder.call(fetch, [address, number(_READ), number(_NEAREST), number(_DATA)])
        return context.get_dummy_value()

    return types.void(array, index), generate


@njit(nogil=True, cache=True)
def prefetch(line: NDArray[Any]) -> None:
    """Ask for a contiguous line (one axis) that is used soon; its values do not change, nor does any result."""
    for x in range(0, line.size, np.int64(LINE // line.itemsize)):
        _touch(line, x)
