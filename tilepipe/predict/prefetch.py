"""Asking a CPU for memory ahead of its use, in numba kernels: it is fetched while they calculate."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_READ, _NEAREST, _DATA = 0, 3, 1
"""What LLVM's prefetch is told: to be read, into the nearest cache, not instructions."""


@intrinsic
def prefetch(_context: Any, line: Any, at: Any) -> Any:
    """Ask for what lies about an element of a line (one axis), a line of the cache; none is wrong, within it or not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = context.make_array(signature.args[0])(context, builder, arguments[0])
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = builder.bitcast(builder.gep(held.data, [arguments[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        builder.call(fetch, [address, number(_READ), number(_NEAREST), number(_DATA)])
        return context.get_dummy_value()

    return types.void(line, at), generate
