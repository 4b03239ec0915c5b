"""What an exported program asks of its input's sizes: ranges, multiples, and conditions under which it was exported.

The archive holds them as Python and sympy text, which torch evaluates as code. Here the text is parsed into a
syntax tree and only arithmetic, comparisons and sizes in it are ever computed.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tilepipe.errors import GeometryError, ModelError

LONGEST = 5000
"""Characters of a condition."""

_BINARY: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_UNARY: Mapping[type[ast.AST], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_CALLS: Mapping[str, Callable[..., Any]] = {
    "Integer": int,
    "Add": lambda *terms: sum(terms),
    "Mul": lambda *terms: math.prod(terms),
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": max,
    "Min": min,
    "max": max,
    "min": min,
    "sym_max": max,
    "sym_min": min,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
    "Eq": operator.eq,
    "Ne": operator.ne,
}


def parsed(text: object) -> ast.expr:
    """The syntax tree of an expression; raises ModelError for what is not one."""
    try:
        if not isinstance(text, str) or len(text) > LONGEST:
            raise ValueError
        return ast.parse(text.strip(), mode="eval").body
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise ModelError(f"the condition {str(text)[:80]!r} on its input's size is not understood") from None


def evaluate(node: ast.expr, symbols: Mapping[str, int], shape: Sequence[int] = ()) -> Any:
    """The value of an expression of integers, named symbols and `L['x'].size()[i]`, which is shape[i].

    Raises ModelError for anything else that the expression holds.
    """
    try:
        return _value(node, symbols, shape)
    except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"the condition {ast.unparse(node)[:80]!r} on its input's size has no value") from None


def _value(node: ast.expr, symbols: Mapping[str, int], shape: Sequence[int]) -> Any:
    match node:
        case ast.Constant(value=int() | float() | bool() as value):
            pass
        case ast.Name(id=name) if name in symbols:
            value = symbols[name]
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str() as name), *_]) if name in symbols:
            value = symbols[name]
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=ast.Subscript(value=ast.Name(id="L")), attr="size"), args=[]),
            slice=ast.Constant(value=int() as index),
        ) if 0 <= index < len(shape):
            value = shape[index]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            value = _BINARY[type(op)](_value(left, symbols, shape), _value(right, symbols, shape))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            value = _UNARY[type(op)](_value(operand, symbols, shape))
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _BINARY for op in ops):
            values = [_value(each, symbols, shape) for each in (left, *others)]
            value = all(_BINARY[type(op)](a, b) for op, a, b in zip(ops, values, values[1:], strict=False))
        case ast.BoolOp(op=op, values=parts):
            values = [bool(_value(each, symbols, shape)) for each in parts]
            value = all(values) if isinstance(op, ast.And) else any(values)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args) if name in _CALLS:
            value = _CALLS[name](*(_value(each, symbols, shape) for each in args))
        case _:
            raise ModelError(f"the condition {ast.unparse(node)[:80]!r} on its input's size is not understood")
    return value


def symbols_in(node: ast.expr) -> set[str]:
    """The names of an expression's symbols, in either of sympy's spellings."""
    called = {id(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)}
    names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and id(each) not in called}
    spelled = {
        str(each.args[0].value)
        for each in ast.walk(node)
        if isinstance(each, ast.Call)
        and isinstance(each.func, ast.Name)
        and each.func.id == "Symbol"
        and each.args
        and isinstance(each.args[0], ast.Constant)
    }
    return names | spelled


@dataclass(frozen=True, slots=True)
class Extent:
    """The legal sizes of one dimension: factor x symbol + offset, the symbol within its range; factor 0: one size."""

    symbol: str
    factor: int
    offset: int
    least: int = 0
    most: int | None = None
    example: int = 0
    """The size that the program was exported with."""

    @classmethod
    def of(cls, told: Mapping[str, Any], ranges: Mapping[str, Any]) -> Extent:
        """The extent that an archive tells as {"as_int": 3} or {"as_expr": {"expr_str": ...}}."""
        if "as_int" in told:
            return cls("", 0, int(told["as_int"]), example=int(told["as_int"]))
        text = told["as_expr"]["expr_str"]
        node = parsed(text)
        names = symbols_in(node)
        if len(names) != 1:
            raise ModelError(f"its input's size {str(text)[:80]!r} is not understood; export it with one Dim per axis")
        (name,) = names
        values = [evaluate(node, {name: n}) for n in (0, 1, 2)]
        factor = values[1] - values[0]
        if values[2] - values[1] != factor or factor < 1:
            raise ModelError(f"its input's size {str(text)[:80]!r} is not a multiple of a Dim, and so not understood")
        limits = ranges.get(name) or {}
        least, most = int(limits.get("min_val") or 0), limits.get("max_val")
        hint = (told["as_expr"].get("hint") or {}).get("as_int")
        example = factor * max(1, least) + values[0] if hint is None else hint
        return cls(name, int(factor), int(values[0]), least, None if most is None else int(most), int(example))

    def admits(self, size: int) -> bool:
        """Whether a dimension may have this size."""
        if not self.factor:
            return size == self.offset
        n, rest = divmod(size - self.offset, self.factor)
        return rest == 0 and n >= self.least and (self.most is None or n <= self.most)

    def __str__(self) -> str:
        if not self.factor:
            return f"{self.offset} only"
        first = self.factor * self.least + self.offset
        steps = "any" if self.factor == 1 else f"in steps of {self.factor}"
        end = "" if self.most is None else f" up to {self.factor * self.most + self.offset}"
        return f"{steps} from {first}{end}"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a program asks of its input's shape (batch, bands, rows, columns)."""

    extents: tuple[Extent, ...]
    guards: tuple[ast.expr, ...]

    @property
    def example(self) -> tuple[int, int, int, int]:
        """The shape (batch, bands, rows, columns) that the program was exported with."""
        images, bands, rows, cols = (extent.example for extent in self.extents)
        return images, bands, rows, cols

    def check(self, shape: Sequence[int]) -> None:
        """Nothing; raises GeometryError for a shape that the program was not exported for."""
        for what, size, extent in zip(("images", "bands", "rows", "columns"), shape, self.extents, strict=True):
            if not extent.admits(size):
                raise GeometryError(
                    f"the exported program cannot take {size} {what}; legal: {extent}; export it for other sizes"
                )
        known: dict[str, int] = {}
        for size, extent in zip(shape, self.extents, strict=True):
            n = extent.factor and (size - extent.offset) // extent.factor
            if known.setdefault(extent.symbol, n) != n:
                raise GeometryError(f"the exported program takes squares only, not {shape[2]} x {shape[3]}")
        for guard in self.guards:
            if not evaluate(guard, {}, shape):
                wanted = ast.unparse(guard)[:120]
                raise GeometryError(f"the exported program was not exported for {shape[2]} x {shape[3]}: {wanted}")

    @classmethod
    def of(cls, sizes: Sequence[Mapping[str, Any]], ranges: Mapping[str, Any], guards: Sequence[str]) -> Conditions:
        """The conditions in an archive; raises ModelError for those that are not understood."""
        if len(sizes) != 4:
            raise ModelError(f"its input has {len(sizes)} dimensions; legal: (batch, bands, rows, columns)")
        found = cls(tuple(Extent.of(size, ranges) for size in sizes), tuple(parsed(guard) for guard in guards))
        for guard in found.guards:  # so that a strange condition is met here and not in the middle of a job
            evaluate(guard, {}, found.example)
        return found
