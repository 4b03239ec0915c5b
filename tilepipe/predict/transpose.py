"""Turning channels-last values into planes in numba kernels, by shuffles that the compiler does not find by itself."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray


@intrinsic
def _quad(_context: Any, source: Any, at: Any, step: Any, target: Any, to: Any, pitch: Any) -> Any:
    """Copy 8 runs of 4 elements, `step` apart from `at` on in `source`, to the columns of 4 runs `pitch` apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source_type, _, _, target_type, _, _ = signature.args
        given, at, step, taken, to, pitch = arguments
        values = context.make_array(source_type)(context, builder, given).data
        places = context.make_array(target_type)(context, builder, taken).data
        element = context.get_data_type(source_type.dtype)
        size = context.get_abi_sizeof(element)

        def run(base: Any, start: Any, apart: Any, number: int, length: int) -> Any:
            index = builder.add(start, builder.mul(apart, ir.Constant(apart.type, number)))
            return builder.bitcast(builder.gep(base, [index]), ir.VectorType(element, length).as_pointer())

        def mixed(first: Any, second: Any, *lanes: int) -> Any:
            order = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
            return builder.shuffle_vector(first, second, order)

        four = [builder.load(run(values, at, step, number, 4), align=size) for number in range(8)]
        # Both halves of a vector of eight are shuffled alike: what a processor does in one step.
        runs = [mixed(four[number], four[number + 4], *range(8)) for number in range(4)]
        low, high = (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)
        pairs = [mixed(*runs[n : n + 2], *lanes) for lanes in (low, high) for n in (0, 2)]
        first, second = (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)
        columns = [mixed(*pairs[n : n + 2], *lanes) for n in (0, 2) for lanes in (first, second)]
        for number, column in enumerate(columns):
            builder.store(column, run(places, to, pitch, number, 8), align=size)
        return context.get_dummy_value()

    return types.void(source, at, step, target, to, pitch), generate


@njit(nogil=True, cache=True)
def planes_of(values: NDArray[Any], planes: NDArray[Any]) -> None:
    """Fill each plane's first elements with a channel of `values`, (pixels, channels); the rest of a plane stays.

    planes: (channels, at least so many pixels). Both are C-contiguous and of one type.
    """
    pixels, channels = values.shape
    pitch = planes.shape[1]
    source, target = values.reshape(-1), planes.reshape(-1)
    whole = pixels // 8 * 8 if channels >= 4 else 0
    for quad in range((channels + 3) // 4 if whole else 0):
        # The last four overlap those before where the channels are no multiple of four.
        first = min(4 * quad, channels - 4)
        for x in range(0, whole, 8):
            _quad(source, x * channels + first, channels, target, first * pitch + x, pitch)
    for x in range(whole, pixels):
        for c in range(channels):
            planes[c, x] = values[x, c]
