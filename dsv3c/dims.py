"""Tensor dimensions: plain `int` when concrete, an interned sympy expression over named symbols otherwise.

sympy arithmetic costs 20 to 200 microseconds an operation, so every operation here is memoized and equal
results are the same object; `simplify` is never called. Products of sums are multiplied out, so that equal
polynomials have one form.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import sympy

Dim: TypeAlias = "int | sympy.Expr"
"""A dimension: an `int`, or a sympy expression in positive integer symbols such as `B*S`."""


@functools.cache
def symbol(name: str) -> sympy.Expr:
    """The positive integer symbol called `name`; the same object for the same name."""
    return sympy.Symbol(name, integer=True, positive=True)


def _plain(expr: sympy.Expr) -> Dim:
    return int(expr) if expr.is_Integer else expr


@functools.cache
def _multiply(a: Dim, b: Dim) -> Dim:
    return _plain(sympy.expand(sympy.sympify(a) * b))


@functools.cache
def _add(a: Dim, b: Dim) -> Dim:
    return _plain(sympy.sympify(a) + b)


def multiply(*dims: Dim) -> Dim:
    """The product of `dims` (1 for none)."""
    total: Dim = 1
    for d in dims:
        total = total * d if isinstance(total, int) and isinstance(d, int) else _multiply(total, d)
    return total


def add(*dims: Dim) -> Dim:
    """The sum of `dims` (0 for none)."""
    total: Dim = 0
    for d in dims:
        total = total + d if isinstance(total, int) and isinstance(d, int) else _add(total, d)
    return total


@functools.cache
def _ceil_div(a: Dim, b: int) -> Dim:
    return _plain(sympy.ceiling(sympy.sympify(a) / b))


def ceil_div(a: Dim, b: int) -> Dim:
    """`a / b` rounded up, for example how many 128-wide tiles cover `a`."""
    return -(-a // b) if isinstance(a, int) else _ceil_div(a, b)


def round_up(a: Dim, b: int) -> Dim:
    """The smallest multiple of `b` that is at least `a`."""
    return multiply(ceil_div(a, b), b)


def same(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are equal for every value of their symbols."""
    return a is b or a == b


def symbols(dims: Iterable[Dim]) -> tuple[str, ...]:
    """Sorted names of the symbols that occur in `dims`."""
    names: set[str] = set()
    for d in dims:
        if not isinstance(d, int):
            names.update(s.name for s in d.free_symbols)
    return tuple(sorted(names))


@functools.cache
def _compiled(dim: sympy.Expr) -> Callable[[Mapping[str, int]], int]:
    """The function that evaluates `dim` in integers: floating point would round fractions to the wrong side."""
    if dim.is_Integer:
        value = int(dim)
        return lambda sizes: value
    if dim.is_Symbol:
        name = dim.name
        return lambda sizes: sizes[name]
    if isinstance(dim, sympy.ceiling):
        numerator, denominator = map(_compiled, dim.args[0].as_numer_denom())
        return lambda sizes: -(-numerator(sizes) // denominator(sizes))
    parts = tuple(map(_compiled, dim.args))
    if dim.is_Add:
        return lambda sizes: sum(part(sizes) for part in parts)
    if dim.is_Mul:
        return lambda sizes: math.prod(part(sizes) for part in parts)
    base, power = parts
    return lambda sizes: base(sizes) ** power(sizes)


def bind(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The value of `dim` once every symbol has the size given in `sizes`.

    Raises KeyError naming the symbol that has no size.
    """
    return dim if isinstance(dim, int) else _compiled(dim)(sizes)


@functools.cache
def substitute(dim: Dim, name: str, by: Dim) -> Dim:
    """`dim` with the symbol called `name` replaced."""
    return dim if isinstance(dim, int) else _plain(sympy.expand(dim.subs(symbol(name), by)))


@functools.cache
def _shown(dim: sympy.Expr) -> str:
    return str(dim)


def show(dim: Dim) -> str:
    """The text of a dimension; `parse` reads it back."""
    return str(dim) if isinstance(dim, int) else _shown(dim)


def parse(tree: ast.expr) -> Dim:
    """The dimension that a Python expression denotes: names, integers, `+ - * /` and `ceiling(...)`.

    Raises ValueError for anything else.
    """
    match tree:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return value
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return multiply(-1, parse(operand))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return add(parse(left), parse(right))
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return add(parse(left), multiply(-1, parse(right)))
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return multiply(parse(left), parse(right))
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(power))) if power > 0:
            return multiply(*[parse(left)] * power)
        case ast.Call(func=ast.Name(id="ceiling"), args=[inner], keywords=[]):
            return ceil_div(*_fraction(inner))
        case _:
            raise ValueError("expected a dimension: an integer, a name, or a sum or product of them")


def _fraction(tree: ast.expr) -> tuple[Dim, int]:
    """Numerator and denominator of what `ceiling` rounds: a sum of dimensions divided by integers."""
    match tree:
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            divisor = parse(right)
            if not isinstance(divisor, int) or divisor <= 0:
                raise ValueError("the divisor in ceiling(a/b) must be a positive integer")
            return parse(left), divisor
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
            (a, b), (c, d) = _fraction(left), _fraction(right)
            return add(multiply(a, d), multiply(c, b, 1 if isinstance(op, ast.Add) else -1)), b * d
        case _:
            return parse(tree), 1
