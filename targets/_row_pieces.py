"""Rewrite row programs so that slices sit on operands and joins at the top: what is left between runs over one range
of columns, which is what a generator of vector code wants."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

from dsv3c.rows import (
    Binary,
    Constant,
    Down,
    Interleave,
    Join,
    Operand,
    Reduce,
    Repeat,
    Round,
    Row,
    Select,
    Slice,
    Unary,
    children,
)
from dsv3c.targets._row_stages import Simplifier


def pieces(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Equivalents of `rows`; equal expressions are one object. A slice remains only where its columns can not be told
    from those of the operand, reduction, repetition or interleaving under it; a join remains inside others only under
    a grouped reduction whose groups straddle its parts."""
    simplify = Simplifier()
    lift = _Lift()
    return tuple(simplify(lift(simplify(r))) for r in rows)


def rebuilt(row: Row, cols: int, parts: tuple[Row, ...]) -> Row:
    """An element-wise expression of other arguments and another number of columns."""
    match row:
        case Unary(function=f):
            return Unary(cols, f, *parts)
        case Binary(function=f):
            return Binary(cols, f, *parts)
        case Select():
            return Select(cols, *parts)
        case Down():
            return Down(cols, *parts)
        case Round(dtype=dtype):
            return Round(cols, parts[0], dtype)
        case _:
            raise AssertionError(f"{row} is not element-wise")


ELEMENTWISE = (Unary, Binary, Select, Round, Down)
"""What works column by column."""


def joined(parts: list[Row]) -> Row:
    """The join of `parts`, flat."""
    flat = [q for p in parts for q in (p.parts if isinstance(p, Join) else (p,))]
    return flat[0] if len(flat) == 1 else Join(sum(p.cols for p in flat), tuple(flat))


class _Lift:
    def __init__(self) -> None:
        self._lifted: dict[Row, Row] = {}
        self._cut: dict[tuple[Row, int, int, int], Row] = {}

    def __call__(self, row: Row) -> Row:
        if row not in self._lifted:
            self._lifted[row] = self._lift(row, tuple(self(c) for c in children(row)))
        return self._lifted[row]

    def _lift(self, row: Row, parts: tuple[Row, ...]) -> Row:
        match row:
            case Operand() | Constant():
                return row
            case Slice(cols=cols, start=start, step=step):
                return self.cut(parts[0], start, cols, step)
            case Join():
                return joined(list(parts))
            case Interleave(cols=cols):
                return self._split(parts, cols // 2, lambda n, some: Interleave(2 * n, *some))
            case Repeat(times=times):
                return self._split(parts, parts[0].cols, lambda n, some: Repeat(n * times, some[0], times))
            case Reduce(cols=cols, function=f, group=group):
                x = parts[0]
                if group and isinstance(x, Join) and all(p.cols % group == 0 for p in x.parts):
                    return joined([Reduce(p.cols // group, f, p, group) for p in x.parts])
                return Reduce(cols, f, x, group)
            case _:
                return self._split(parts, row.cols, lambda n, some: rebuilt(row, n, some))

    def _split(self, parts: tuple[Row, ...], cols: int, build: Callable[[int, tuple[Row, ...]], Row]) -> Row:
        """`build` of the parts, taken apart where any of them is a join."""
        ends = {0, cols}
        for p in parts:
            if isinstance(p, Join):
                ends.update(accumulate(q.cols for q in p.parts))
        if len(ends) <= 2:
            return build(cols, parts)
        spans = pairwise(sorted(ends))
        return joined([build(b - a, tuple(self.cut(p, a, b - a, 1) for p in parts)) for a, b in spans])

    def cut(self, x: Row, start: int, cols: int, step: int) -> Row:
        """Columns start, start+step, ... of a lifted expression, `cols` of them."""
        step = 1 if cols == 1 else step
        if not x.cols or (start == 0 and step == 1 and cols == x.cols):
            return x
        key = (x, start, cols, step)
        if key not in self._cut:
            self._cut[key] = self._slice(x, start, cols, step)
        return self._cut[key]

    def _slice(self, x: Row, start: int, cols: int, step: int) -> Row:
        match x:
            case Constant(value=value):
                return Constant(cols, value)
            case Slice(x=inner, start=first, step=stride):
                return self.cut(inner, first + start * stride, cols, step * stride)
            case Join(parts=parts):
                return joined(self._across(parts, start, cols, step))
            case Reduce(function=f, x=inner, group=group) if step == 1:
                return Reduce(cols, f, self.cut(inner, start * group, cols * group, 1), group)
            case Repeat(x=inner, times=times) if cols == 1:
                return self.cut(inner, start // times, 1, 1)
            case Repeat(x=inner, times=times) if step == 1 and start % times == 0 and cols % times == 0:
                return Repeat(cols, self.cut(inner, start // times, cols // times, 1), times)
            case Interleave(x=a, y=b) if cols == 1 or step % 2 == 0:
                return self.cut((a, b)[start % 2], start // 2, cols, max(step // 2, 1))
            case Interleave(x=a, y=b) if step == 1 and start % 2 == 0 and cols % 2 == 0:
                return Interleave(cols, *(self.cut(p, start // 2, cols // 2, 1) for p in (a, b)))
            case Unary() | Binary() | Select() | Round() | Down():
                return rebuilt(x, cols, tuple(self.cut(c, start, cols, step) for c in children(x)))
            case _:
                return Slice(cols, x, start, step)

    def _across(self, parts: tuple[Row, ...], start: int, cols: int, step: int) -> list[Row]:
        """The slice of a join, part by part."""
        found: list[Row] = []
        base, last = 0, start + (cols - 1) * step
        for p in parts:
            first = start if start >= base else base + (start - base) % step
            stop = min(base + p.cols - 1, last)
            if base <= first <= stop:
                found.append(self.cut(p, first - base, (stop - first) // step + 1, step))
            base += p.cols
        return found
