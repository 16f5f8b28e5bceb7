"""Row programs: what a row-wise op computes on one row, as an expression that every kernel generator can read.

A row is the last axis of a tensor; all rows are independent. Arithmetic is float32 (float64 if an operand is),
whatever the storage types are. An op that states its row program is fused and gets generated kernels on every
target without anybody writing one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from dsv3c.ir import DType, IRError
from dsv3c.lazy import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

UNARY = (
    "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sigmoid", "floor", "half_bits",
    "half_of_bits", "power_of_two_above",
)  # fmt: skip
"""`half_bits(x)` is the number 0 to 65535 that the bits of x in float16 make, for x that float16 holds exactly;
`half_of_bits` its inverse; `power_of_two_above(x)` the smallest power of two that is at least x, for x > 0."""
BINARY = ("add", "sub", "mul", "div", "max", "min", "less", "equal")
TILE_ROWS = 128
"""Neighbouring rows in a tile, counted from the first row: what 128×1 quantization shares a scale over."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """An expression of `cols` numbers per row; `cols == 0` means one number per row, which broadcasts."""

    cols: int

    def __add__(self, other: RowLike) -> Row:
        return binary("add", self, other)

    def __radd__(self, other: RowLike) -> Row:
        return binary("add", other, self)

    def __sub__(self, other: RowLike) -> Row:
        return binary("sub", self, other)

    def __rsub__(self, other: RowLike) -> Row:
        return binary("sub", other, self)

    def __mul__(self, other: RowLike) -> Row:
        return binary("mul", self, other)

    def __rmul__(self, other: RowLike) -> Row:
        return binary("mul", other, self)

    def __truediv__(self, other: RowLike) -> Row:
        return binary("div", self, other)

    def __rtruediv__(self, other: RowLike) -> Row:
        return binary("div", other, self)

    def __neg__(self) -> Row:
        return unary("neg", self)


RowLike: TypeAlias = "Row | float | int"


@dataclass(frozen=True, slots=True, eq=False)
class Operand(Row):
    """Input number `index` of the region."""

    index: int


@dataclass(frozen=True, slots=True, eq=False)
class Constant(Row):
    value: float


@dataclass(frozen=True, slots=True, eq=False)
class Unary(Row):
    function: str
    x: Row


@dataclass(frozen=True, slots=True, eq=False)
class Binary(Row):
    function: str
    x: Row
    y: Row


@dataclass(frozen=True, slots=True, eq=False)
class Select(Row):
    """`x` where `condition` is not zero, else `y`."""

    condition: Row
    x: Row
    y: Row


@dataclass(frozen=True, slots=True, eq=False)
class Reduce(Row):
    """Reduction over the row; with `group`, over each run of `group` neighbouring columns."""

    function: str
    x: Row
    group: int


@dataclass(frozen=True, slots=True, eq=False)
class Down(Row):
    """The largest of `x` down each tile of TILE_ROWS neighbouring rows, column by column; each row of it holds that.

    What depends on it is no longer independent row by row, but tile by tile; the last tile may be smaller.
    """

    x: Row


@dataclass(frozen=True, slots=True, eq=False)
class Slice(Row):
    """Columns `start, start+step, ...` of `x`."""

    x: Row
    start: int
    step: int


@dataclass(frozen=True, slots=True, eq=False)
class Join(Row):
    """The columns of all `parts` one after the other."""

    parts: tuple[Row, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Interleave(Row):
    """Columns x0, y0, x1, y1, ..."""

    x: Row
    y: Row


@dataclass(frozen=True, slots=True, eq=False)
class Repeat(Row):
    """Each column of `x` repeated `times` times: the inverse of a grouped reduction's shape change."""

    x: Row
    times: int


@dataclass(frozen=True, slots=True, eq=False)
class Round(Row):
    """`x` rounded to what `dtype` can hold (e4m3 saturates at 448, NaN stays NaN)."""

    x: Row
    dtype: DType


def children(row: Row) -> tuple[Row, ...]:
    """The expressions that `row` is made of."""
    match row:
        case Binary(x=x, y=y) | Interleave(x=x, y=y):
            return x, y
        case Select(condition=condition, x=x, y=y):
            return condition, x, y
        case Join(parts=parts):
            return parts
        case Unary(x=x) | Reduce(x=x) | Down(x=x) | Slice(x=x) | Repeat(x=x) | Round(x=x):
            return (x,)
        case _:
            return ()


def walk(rows: tuple[Row, ...]) -> Iterator[Row]:
    """Every expression in `rows` once, arguments first."""
    seen: set[Row] = set()
    stack: list[tuple[Row, bool]] = [(r, False) for r in reversed(rows)]
    while stack:
        row, done = stack.pop()
        if done:
            yield row
        elif row not in seen:
            seen.add(row)
            stack.append((row, True))
            stack += [(c, False) for c in reversed(children(row)) if c not in seen]


def as_row(x: RowLike) -> Row:
    """A number as an expression; an expression as it is."""
    return x if isinstance(x, Row) else Constant(0, float(x))


def _broadcast(*rows: Row) -> int:
    widths = {r.cols for r in rows if r.cols}
    if len(widths) > 1:
        raise IRError(f"row expressions of {' and '.join(map(str, sorted(widths)))} columns do not combine")
    return widths.pop() if widths else 0


def unary(function: str, x: RowLike) -> Row:
    """Apply a function of `UNARY` to every column."""
    assert function in UNARY, function
    row = as_row(x)
    return Unary(row.cols, function, row)


def binary(function: str, x: RowLike, y: RowLike) -> Row:
    """Apply a function of `BINARY`; one number per row broadcasts over columns. Comparisons give 0 or 1."""
    assert function in BINARY, function
    a, b = as_row(x), as_row(y)
    return Binary(_broadcast(a, b), function, a, b)


def select(condition: Row, x: RowLike, y: RowLike) -> Row:
    """`x` where `condition` is not 0, else `y`."""
    a, b = as_row(x), as_row(y)
    return Select(_broadcast(condition, a, b), condition, a, b)


def _expect_columns(x: Row, what: str) -> None:
    if not x.cols:
        raise IRError(f"{what} needs columns, not one number per row")


def _reduced(function: str, x: Row, group: int) -> Row:
    _expect_columns(x, "a reduction")
    if group < 0 or (group and x.cols % group):
        raise IRError(f"{x.cols} columns do not divide into groups of {group}")
    return Reduce(x.cols // group if group else 0, function, x, group)


def total(x: Row, group: int = 0) -> Row:
    """The sum over the row, or over each run of `group` columns."""
    return _reduced("sum", x, group)


def mean(x: Row) -> Row:
    """The mean over the row."""
    return total(x) * (1.0 / x.cols)


def largest(x: Row, group: int = 0) -> Row:
    """The maximum over the row, or over each run of `group` columns; NaN wins."""
    return _reduced("max", x, group)


def largest_down(x: Row) -> Row:
    """The maximum over each tile of TILE_ROWS rows, column by column; NaN wins."""
    _expect_columns(x, "a maximum down the rows")
    return Down(x.cols, x)


def columns(x: Row, start: int, stop: int, step: int = 1) -> Row:
    """Columns `start:stop:step`; at least one, and all must exist."""
    if not (0 <= start < stop <= x.cols and step >= 1):
        raise IRError(f"columns {start}:{stop}:{step} do not exist in a row of {x.cols}")
    return Slice(-(-(stop - start) // step), x, start, step)


def join(*parts: Row) -> Row:
    """Concatenate columns."""
    for p in parts:
        _expect_columns(p, "a join")
    return Join(sum(p.cols for p in parts), parts)


def interleave(x: Row, y: Row) -> Row:
    """Columns x0, y0, x1, y1, ..."""
    cols = _broadcast(x, y)
    _expect_columns(x if cols == x.cols else y, "interleaving")
    return Interleave(2 * cols, x, y)


def repeat(x: Row, times: int) -> Row:
    """Each column `times` times."""
    _expect_columns(x, "repeating")
    return Repeat(x.cols * times, x, times)


def rounded(x: Row, dtype: DType) -> Row:
    """`x` as `dtype` would store it."""
    return Round(x.cols, x, dtype)


def exp(x: RowLike) -> Row:
    return unary("exp", x)


def rsqrt(x: RowLike) -> Row:
    return unary("rsqrt", x)


def sigmoid(x: RowLike) -> Row:
    return unary("sigmoid", x)


OPERAND_KINDS = ("row", "scalar", "prefix", "column", "single")
RESULT_KINDS = ("row", "scalar", "column", "turned", "turned_tile")


@dataclass(frozen=True, slots=True)
class Rowwise:
    """How an op works row by row.

    `operands`, one word per input: `row` [*space, cols], `scalar` [*space] one number per row, `prefix`
    [*first dims of space, cols] (shared by the rows of the remaining dims, as the rotary table is by heads),
    `column` [cols] the same for all rows, `single` [] one number. The row space is all dims of the first `row`
    operand but the last.
    `results`, one word per output: `row`, `scalar`, `column`: summed over all rows, `turned`: rows as columns
    [cols, rows], or `turned_tile`: one number per column and tile of rows [cols, ⌈rows/TILE_ROWS⌉].
    `body(*operands, **attrs)` gives one expression per output.
    """

    operands: tuple[str, ...]
    results: tuple[str, ...]
    body: Callable[..., Row | tuple[Row, ...]]

    def __post_init__(self) -> None:
        assert set(self.operands) <= set(OPERAND_KINDS) and set(self.results) <= set(RESULT_KINDS)


def evaluate(row: Row, operands: tuple[torch.Tensor, ...],
             known: dict[Row, torch.Tensor] | None = None) -> torch.Tensor:  # fmt: skip
    """The value of `row`, with torch; the oracle of the generators.

    `operands` are [rows, cols] (or [rows, 1] for one number per row, [1, cols] for a column), float32 or float64.
    Returns [rows, cols or 1], or a 1 where all rows or columns are equal. `known` caches shared subexpressions
    across calls.
    """
    known = {} if known is None else known
    if row not in known:
        known[row] = _evaluate(row, operands, known)
    return known[row]


def placed(value: torch.Tensor, kind: str, rows: int, cols: int) -> torch.Tensor:
    """What `evaluate` gave for a result of `kind`, one of RESULT_KINDS, as the result holds it.

    [rows, cols] for `row`, [rows] for `scalar`, [cols] for `column`, [cols, rows] and [cols, tiles] for the turned.
    """
    whole = value.expand(rows, max(cols, 1))
    if kind == "scalar":
        return whole[:, 0]
    if kind == "column":
        return whole.sum(0)
    return whole if kind == "row" else whole[:: TILE_ROWS if kind == "turned_tile" else 1].t()


def _evaluate(row: Row, operands: tuple[torch.Tensor, ...], known: dict[Row, torch.Tensor]) -> torch.Tensor:
    wide = torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32

    def of(x: Row) -> torch.Tensor:
        return evaluate(x, operands, known)

    def every_column_of(x: Row) -> torch.Tensor:
        return of(x).expand(-1, x.cols or 1)

    match row:
        case Operand(index=index):
            return operands[index].to(wide)
        case Constant(value=value):
            return torch.full((1, 1), value, dtype=wide, device=operands[0].device)
        case Unary(function="power_of_two_above", x=x):
            mantissa, exponent = torch.frexp(of(x))
            return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).to(exponent.dtype))
        case Unary(function="half_bits", x=x):
            return (of(x).half().view(torch.int16).int() & 0xFFFF).to(wide)
        case Unary(function="half_of_bits", x=x):
            return of(x).int().to(torch.int16).view(torch.half).to(wide)
        case Unary(function=function, x=x):
            return getattr(torch, function)(of(x))  # type: ignore[no-any-return]
        case Binary(function=function, x=x, y=y):
            table = {"max": torch.maximum, "min": torch.minimum, "less": torch.lt, "equal": torch.eq}
            result = table.get(function, getattr(torch, function))(of(x), of(y))
            return result.to(wide)  # type: ignore[no-any-return]
        case Select(condition=condition, x=x, y=y):
            return torch.where(of(condition) != 0, of(x), of(y))
        case Reduce(function=function, x=x, group=group):
            whole = every_column_of(x)
            parts = whole.unflatten(-1, (-1, group)) if group else whole.unsqueeze(-2)
            return parts.sum(-1) if function == "sum" else parts.amax(-1)
        case Down(x=x):
            height = max((t.shape[0] for t in operands), default=1)
            whole = every_column_of(x).expand(height, -1)
            tops = [part.amax(0, keepdim=True).expand_as(part) for part in whole.split(TILE_ROWS)]
            return torch.cat(tops) if tops else whole
        case Slice(x=x, start=start, step=step):
            return every_column_of(x)[:, start : start + (row.cols - 1) * step + 1 : step]
        case Join(parts=parts_):
            height = max(of(p).shape[0] for p in parts_)
            return torch.cat([of(p).expand(height, p.cols) for p in parts_], -1)
        case Interleave(x=x, y=y):
            a, b = torch.broadcast_tensors(of(x).expand(-1, row.cols // 2), of(y))
            return torch.stack((a, b), -1).flatten(-2)
        case Repeat(x=x, times=times):
            return every_column_of(x).repeat_interleave(times, -1)
        case Round(x=x, dtype=dtype):
            from dsv3c.tensors import round_to

            return round_to(of(x), dtype)
        case _:
            raise AssertionError(f"no rule for {row}")
