"""Vectors in numba kernels: LANES numbers at a time, in registers, where the compiler finds no vectors by itself.

    for x in range(0, line.size, LANES):
        value = load(line, x, line.size - x)            # Lanes(float32); 0 behind the line's end
        more = value > like(value, 1)                   # Lanes(bool)
        store(where(more, value * value, value), out, x, line.size - x)

Every lane is computed alike, so a number's result does not depend on where it lies. Lines are one-dimensional and
contiguous. Operators are + - of numbers and * / > of floats; both operands are of one type.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic, models, overload, register_model

Emit = Callable[..., Any]
"""Given LLVM's builder and two vectors, builds what is to be done with them."""

LANES = 16
"""Numbers in a vector: 64 bytes of float32, a line of the cache. Processors of narrower registers take several."""


class Lanes(types.Type):
    """The type of LANES numbers or truth values."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(dmm[fe_type.dtype].get_value_type(), LANES))


def _address(context: Any, builder: Any, line_type: Any, line: Any, at: Any) -> Any:
    element = builder.gep(context.make_array(line_type)(context, builder, line).data, [at])
    return builder.bitcast(element, ir.VectorType(context.get_data_type(line_type.dtype), LANES).as_pointer())


def _splat(builder: Any, value: Any) -> Any:
    vector = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes)


def _suffix(vector: Any) -> str:
    # Of the names of LLVM's functions of vectors.
    return f"v{LANES}{vector.element.intrinsic_name}"


def _masked(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    # A call of LLVM's masked load or store; what a mask is made of is known where `count` is, and then there is none.
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(get_or_insert_function(builder.module, kind, name), arguments)


def _inside(builder: Any, count: Any) -> Any:
    places = ir.Constant(ir.VectorType(count.type, LANES), list(range(LANES)))
    return builder.icmp_signed("<", places, _splat(builder, count))


def _alignment(context: Any, vector: Any) -> Any:
    return ir.IntType(32)(context.get_abi_sizeof(vector.element))


@intrinsic
def load(_context: Any, line: Any, at: Any, count: Any) -> Any:
    """The numbers of a line from `at` on; only `count` of them, and then 0, where that is less than LANES."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], *arguments[:2])
        vector = pointer.type.pointee
        given = [pointer, _alignment(context, vector), _inside(builder, arguments[2]), ir.Constant(vector, None)]
        return _masked(builder, f"llvm.masked.load.{_suffix(vector)}.p0", vector, given)

    return (Lanes(line.dtype)(line, at, count), generate) if line.layout == "C" else None


@intrinsic
def store(_context: Any, value: Any, line: Any, at: Any, count: Any) -> Any:
    """Write a vector to a line of its type from `at` on; only `count` of it where that is less than LANES."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _address(context, builder, signature.args[1], *arguments[1:3])
        vector = pointer.type.pointee
        given = [arguments[0], pointer, _alignment(context, vector), _inside(builder, arguments[3])]
        _masked(builder, f"llvm.masked.store.{_suffix(vector)}.p0", ir.VoidType(), given)
        return context.get_dummy_value()

    fits = value.dtype == line.dtype and line.layout == "C"
    return (types.void(value, line, at, count), generate) if fits else None


@intrinsic
def zeros(_context: Any, kind: Any) -> Any:
    """Zeros of a type such as np.float32."""

    def generate(context: Any, _builder: Any, signature: Any, _arguments: Any) -> Any:
        return ir.Constant(ir.VectorType(context.get_data_type(signature.return_type.dtype), LANES), None)

    return Lanes(kind.dtype)(kind), generate


@intrinsic
def like(_context: Any, lanes: Any, value: Any) -> Any:
    """A number, cast to the type of a vector's, in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        given, wanted = signature.args[1], signature.args[0].dtype
        return _splat(builder, context.cast(builder, arguments[1], given, wanted))

    return lanes(lanes, value), generate


@intrinsic
def where(_context: Any, mask: Any, yes: Any, no: Any) -> Any:
    """In each lane, `yes` where the mask is true, else `no`."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return (yes(mask, yes, no), generate) if mask == Lanes(types.boolean) and yes == no else None


@intrinsic
def muladd(_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the processor has an instruction that does."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        vector = arguments[0].type
        kind = ir.FunctionType(vector, [vector] * 3)
        fused = get_or_insert_function(builder.module, kind, f"llvm.fmuladd.{_suffix(vector)}")
        return builder.call(fused, arguments)

    return (a(a, b, c), generate) if a == b == c else None


@intrinsic
def cast(_context: Any, value: Any, kind: Any) -> Any:
    """Numbers made those of a type such as np.float32, floats of floats and integers of integers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        given, wanted = signature.args[0].dtype, signature.return_type.dtype
        if given == wanted:
            return arguments[0]
        if isinstance(given, types.Float):
            change = builder.fptrunc if wanted.bitwidth < given.bitwidth else builder.fpext
        elif wanted.bitwidth <= given.bitwidth:
            change = builder.trunc
        else:
            change = builder.sext if given.signed else builder.zext
        return change(arguments[0], ir.VectorType(context.get_data_type(wanted), LANES))

    alike = isinstance(value.dtype, types.Float) == isinstance(kind.dtype, types.Float)
    return (Lanes(kind.dtype)(value, kind), generate) if alike else None


@intrinsic
def exponent(_context: Any, bits: Any) -> Any:
    """The float32 whose exponent's bits are the last eight of each number's, and whose other bits are 0."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        whole = ir.VectorType(ir.IntType(32), LANES)
        moved = builder.shl(builder.bitcast(arguments[0], whole), ir.Constant(whole, [23] * LANES))
        return builder.bitcast(moved, arguments[0].type)

    return (bits(bits), generate) if bits == Lanes(types.float32) else None


def _operator(operation: Callable[..., Any], floats: Emit, integers: Emit | None = None, result: Any = None) -> None:
    # An operator of two vectors of one type, by what it is in LLVM; `result`: of what, if not of that type.
    @intrinsic
    def lowered(_context: Any, a: Any, b: Any) -> Any:
        emit = floats if isinstance(a.dtype, types.Float) else integers

        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            assert emit is not None
            return emit(builder, *arguments)

        return ((Lanes(result) if result else a)(a, b), generate) if emit else None

    @overload(operation)
    def typed(a: Any, b: Any) -> Any:
        def apply(a: Any, b: Any) -> Any:
            return lowered(a, b)

        return apply if isinstance(a, Lanes) and a == b else None


def _greater(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    return builder.fcmp_ordered(">", a, b)


_operator(operator.add, ir.IRBuilder.fadd, ir.IRBuilder.add)
_operator(operator.sub, ir.IRBuilder.fsub, ir.IRBuilder.sub)
_operator(operator.mul, ir.IRBuilder.fmul)
_operator(operator.truediv, ir.IRBuilder.fdiv)
_operator(operator.gt, _greater, result=types.boolean)
