"""What row programs compute, as Triton statements on blocks of lanes: columns, masks, loads, reductions."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, field, replace

from dsv3c.ir import DType
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
)
from dsv3c.targets import _triton_math as tt
from dsv3c.targets._regions import RegionProgram
from dsv3c.targets._triton_blocks import At, Blocks, Domain, power_of_two

MOST_PICKED = 1 << 20
"""Numbers compared at most to pick columns of a grouped reduction one by one."""

_NAME = re.compile(r"t\d+")


class NeedsWholeRow(Exception):
    """A value is picked from columns that another program, or another pass of the loop, computes."""


@dataclass
class Scope:
    """Statements of one place in the kernel and what is known there."""

    lines: list[str] = field(default_factory=list)
    known: dict[tuple[object, ...], str] = field(default_factory=dict)


class Values:
    """Emits statements into scopes: `prologue` is what all rows share, `row` what is done for the rows of a program,
    `scope` where statements go now (`row`, or a loop over blocks of columns inside). `start` names the block of
    columns that is worked on, empty if there is one."""

    def __init__(self, program: RegionProgram, blocks: Blocks) -> None:
        self.program, self.blocks = program, blocks
        self.many = blocks.rows > 1
        self.names = 0
        self.prologue, self.row = Scope(), Scope()
        self.scope = self.row
        self.start = "chunk" if blocks.mode == "split" else ""
        self.helpers: set[str] = set()

    def name(self) -> str:
        self.names += 1
        return f"t{self.names - 1}"

    def let(self, text: str) -> str:
        if _NAME.fullmatch(text):
            return text
        name = self.name()
        self.scope.lines.append(f"{name} = {text}")
        return name

    def tensor(self, text: str) -> str:
        """A constant as a tensor, anything else as it is, so that methods can be called on it."""
        return text if _NAME.match(text) else self.let(tt.scalar(text))

    def shape(self, domain: Domain) -> str:
        return ", ".join(map(str, (self.blocks.rows, *domain.shape) if self.many else domain.shape))

    def over_rows(self, text: str, domain: Domain) -> str:
        """A tensor without rows, to be met by one with rows."""
        return f"{text}[None, {', '.join(':' * len(domain.shape))}]" if self.many and text else text

    def over_columns(self, text: str, domain: Domain) -> str:
        """One number per row, to be met by a tensor with columns."""
        return f"{text}[:, {', '.join(['None'] * len(domain.shape))}]" if self.many else text

    def _places(self) -> Scope:
        """Where columns are computed: once for all rows unless they move with a loop."""
        return self.scope if self.blocks.mode == "loop" else self.prologue

    def index(self, at: At) -> str:
        """The columns that `at` looks at, a tensor without rows."""
        scope, key = self._places(), ("index", at.domain, at.steps)
        if key not in scope.known:
            name = f"j{self.names}"
            self.names += 1
            if at.steps:
                times, plus, by = at.steps[-1]
                before = self.index(replace(at, steps=at.steps[:-1]))
                scaled = before if times == 1 else f"{before} * {times}"
                text = f"{scaled} + {plus}" if by == 1 else f"{before} // {by}"
            else:
                text = self._columns(at.domain)
                if self.blocks.vector and at.domain.lanes_per_group > self.blocks.vector:
                    text = f"tl.max_contiguous({text}, [1, {self.blocks.vector}])"
            scope.lines.append(f"{name} = {text}")
            scope.known[key] = name
        return scope.known[key]

    def _columns(self, domain: Domain) -> str:
        start = f"{self.start} * {domain.groups} + " if self.start else ""
        lanes = f"{start}tl.arange(0, {domain.groups})"
        if not domain.group:
            return lanes
        return f"({lanes})[:, None] * {domain.group} + tl.arange(0, {domain.lanes_per_group})[None, :]"

    def mask(self, domain: Domain) -> str:
        """Which lanes are columns; empty if all are."""
        idle = self.blocks.mode == "split" and domain.chunks < self.blocks.chunks
        if domain.exact and not idle:
            return ""
        scope, key = self._places(), ("mask", domain)
        if key not in scope.known:
            index = self.index(At(domain))
            text = f"{index} < {domain.cols}"
            if domain.lanes_per_group != max(domain.group, 1):
                text = f"({text}) & (tl.arange(0, {domain.lanes_per_group}) < {domain.group})[None, :]"
            scope.known[key] = f"m{self.names}"
            self.names += 1
            scope.lines.append(f"{scope.known[key]} = {text}")
        return scope.known[key]

    # Values.

    def scalar(self, row: Row) -> str:
        """One number per row."""
        if isinstance(row, Constant):
            return tt.number(row.value)
        key = (row, None)
        if key not in self.row.known:
            scope, self.scope = self.scope, self.row
            self.row.known[key] = self.let(self._compute(row, None))
            self.scope = scope
        return self.row.known[key]

    def value(self, row: Row, at: At | None) -> str:
        """What `row` holds at the columns of `at`; broadcasts to the shape of its lanes."""
        if isinstance(row, Constant):
            return tt.number(row.value)
        if at is None or not row.cols:
            text = self.scalar(row)
            return text if at is None or isinstance(row, Constant) else self.over_columns(text, at.domain)
        key = (row, at)
        if key not in self.scope.known:
            self.scope.known[key] = self.let(self._compute(row, at))
        return self.scope.known[key]

    def _compute(self, row: Row, at: At | None) -> str:
        match row:
            case Operand(index=index):
                return self._load(index, at)
            case Unary(function=function, x=x):
                self.helpers |= {function} & {*tt.HELPERS}
                return tt.unary(function, self._tensor_of(x, at), self.let)
            case Binary(
                function="max", x=Binary(function="div", x=x, y=Constant(value=by)), y=Constant(value=least)
            ) if 1 <= by < 2**24 and least >= tt.LEAST:
                self.helpers.add("quotient")
                inverse = struct.unpack("f", struct.pack("f", 1.0 / by))[0]
                quotient = f"quotient({self._tensor_of(x, at)}, {tt.number(by)}, {tt.number(inverse)})"
                return tt.binary("max", self.let(quotient), tt.number(least))
            case Binary(function="div", x=Constant(value=1.0), y=y) if _is_normal(y):
                self.helpers.add("inverse")
                return f"inverse({self._tensor_of(y, at)})"
            case Binary(function=function, x=x, y=y):
                a = self.value(x, at)
                both = isinstance(x, Constant) and isinstance(y, Constant)
                return tt.binary(function, self.tensor(a) if both else a, self.value(y, at))
            case Round(x=x, dtype=dtype):
                return tt.rounded(self._tensor_of(x, at), dtype, self.let)
            case Select(condition=condition, x=x, y=y):
                return f"tl.where({self._condition(condition, at)}, {self.value(x, at)}, {self.value(y, at)})"
            case Reduce(group=0):
                return self._reduce_whole(row)
        assert at is not None
        match row:
            case Down(x=x):
                return self._down(x, at)
            case Slice(x=x, start=start, step=step):
                return self.value(x, at.affine(step, start))
            case Reduce():
                return self._reduce_groups(row, at)
            case Repeat(x=x, times=times):
                domain = at.domain
                if not at.steps and times == domain.group and domain.cols == row.cols:
                    value = self.value(x, At(domain.of_groups(), (), at.outside))
                    return value if isinstance(x, Constant) else f"{value}[{':, ' * (1 + self.many)}None]"
                return self.value(x, at.divided(times))
            case Interleave(x=x, y=y):
                return self._interleave(row, x, y, at)
            case Join(parts=parts):
                return self._join(parts, at)
            case _:
                raise AssertionError(f"no rule for {row}")

    def _tensor_of(self, row: Row, at: At | None) -> str:
        return self.tensor(self.value(row, at))

    def _condition(self, row: Row, at: At | None) -> str:
        if isinstance(row, Binary) and row.function in ("less", "equal"):
            both = isinstance(row.x, Constant) and isinstance(row.y, Constant)
            x = self.value(row.x, at)
            return tt.condition(row.function, self.tensor(x) if both else x, self.value(row.y, at))
        return f"{self._tensor_of(row, at)} != 0.0"

    def _load(self, index: int, at: At | None) -> str:
        operand = self.program.operands[index]
        if at is None:
            place = f"x{index} + x{index}_at" if operand.kind == "scalar" else f"x{index}"
            return tt.load(f"tl.load({place})", operand.dtype)
        domain = at.domain
        pair = self._pair(index, at)
        if pair:
            return pair
        columns, mask = self.index(at), self.mask(domain)
        if at.outside:
            inside = f"({columns} >= 0) & ({columns} < {operand.cols})"
            mask = f"({mask} & {inside})" if mask else f"({inside})"
        place = f"x{index} + {self.over_rows(columns, domain)}"
        if operand.kind in ("row", "prefix"):
            place = f"x{index} + {self.over_columns(f'x{index}_at', domain)} + {self.over_rows(columns, domain)}"
        guard = f", mask={self.over_rows(mask, domain)}" if mask else ""
        return tt.load(f"tl.load({place}{guard})", operand.dtype)

    def _pair(self, index: int, at: At) -> str:
        """Every second column of an operand: load both neighbours at once and split them; empty if `at` is another."""
        operand, domain = self.program.operands[index], at.domain
        if len(at.steps) != 1 or at.steps[0][0] != 2 or at.steps[0][2] != 1 or domain.group or at.outside:
            return ""
        first = at.steps[0][1] // 2 * 2
        key = ("pair", index, domain, first)
        if key not in self.scope.known:
            even = replace(at, steps=((2, first, 1),))
            both = f"({self.index(even)}[:, None] + tl.arange(0, 2)[None, :])"
            mask = self.mask(domain)
            masks = [f"{mask}[:, None]"] if mask else []
            if first + 2 * domain.cols > operand.cols:
                masks.append(f"({both} < {operand.cols})")
            rows = "[None, :, :]" if self.many else ""
            guard = f", mask=({' & '.join(masks)}){rows}" if masks else ""
            start = f"x{index}_at{'[:, None, None]' if self.many else ''} + " if operand.kind != "column" else ""
            loaded = self.let(tt.load(f"tl.load(x{index} + {start}{both}{rows}{guard})", operand.dtype))
            left, right = self.name(), self.name()
            self.scope.lines.append(f"{left}, {right} = tl.split({loaded})")
            self.scope.known[key] = left
            self.scope.known[(*key, "right")] = right
        return self.scope.known[key if at.steps[0][1] == first else (*key, "right")]

    def masked(self, value: str, domain: Domain, otherwise: str) -> str:
        """`value` in all lanes of `domain`, `otherwise` in those that are no columns."""
        mask = self.over_rows(self.mask(domain), domain)
        text = f"tl.where({mask}, {value}, {otherwise})" if mask else self.tensor(value)
        return self.let(f"tl.broadcast_to({text}, [{self.shape(domain)}])")

    def reduce(self, row: Reduce, value: str, axes: int, whole: bool) -> str:
        """The reduction of `value` over its last axis, or over all its `axes` of columns."""
        base = 1 if self.many else 0
        for axis in range(base + axes - 1, base - 1 if whole else base + axes - 2, -1):
            if row.function == "max":
                self.helpers.add("larger")
                value = f"tl.reduce({value}, {axis}, larger)"
            else:
                value = f"tl.sum({value}, {axis})"
        return value

    def _down(self, x: Row, at: At) -> str:
        """The largest in each column; rows past the last one repeat it and change nothing."""
        self.helpers.add("larger")
        whole = self.let(f"tl.broadcast_to({self._tensor_of(x, at)}, [{self.shape(at.domain)}])")
        return f"tl.expand_dims(tl.reduce({whole}, 0, larger), 0)"

    def reduced_domain(self, row: Reduce) -> Domain:
        return self.blocks.home(row.x, row.x.cols)

    def _reduce_whole(self, row: Reduce) -> str:
        assert self.blocks.mode != "loop", "reductions over long rows are done in passes"
        domain = self.reduced_domain(row)
        value = self.masked(self.value(row.x, At(domain)), domain, identity(row))
        return self.reduce(row, value, len(domain.shape), whole=True)

    def _reduce_groups(self, row: Reduce, at: At) -> str:
        lanes = power_of_two(row.group)
        if not at.steps and not at.domain.group and at.domain.cols == row.cols:
            domain = Domain(row.x.cols, row.group, at.domain.block * lanes)
            value = self.masked(self.value(row.x, At(domain)), domain, identity(row))
            return self.reduce(row, value, 2, whole=False)
        return self._pick(row, at)

    def _pick(self, row: Reduce, at: At) -> str:
        """Columns of a grouped reduction one by one, by comparing with all of them."""
        small = Domain(row.cols, 0, power_of_two(row.cols))
        lanes = small.block * at.domain.block * self.blocks.rows
        whole = self.blocks.mode == "whole" or (self.blocks.mode == "split" and self.blocks.chunks == 1)
        if not whole or lanes > MOST_PICKED:
            raise NeedsWholeRow
        values = self.tensor(self.value(row, At(small)))
        axes = len(at.domain.shape)
        rows = ":, " if self.many else ""
        spread = f"{values}[{rows}{'None, ' * axes}:]"
        lanes_of = "None, " * self.many + ":, " * axes
        index = f"{self.index(at)}[{lanes_of}None]"
        match = f"{index} == tl.arange(0, {small.block})[{'None, ' * (axes + int(self.many))}:]"
        return f"tl.sum(tl.where({match}, {spread}, 0.0), {axes + int(self.many)})"

    def _interleave(self, row: Row, x: Row, y: Row, at: At) -> str:
        domain = at.domain
        half = Domain(domain.cols // 2, domain.group // 2, domain.block // 2)
        if not at.steps and domain.cols == row.cols and domain.group % 2 == 0 and domain.block > 1:
            shape = self.shape(half)
            parts = [
                self.let(f"tl.broadcast_to({self.tensor(self.value(p, At(half, (), at.outside)))}, [{shape}])")
                for p in (x, y)
            ]
            return f"tl.interleave({parts[0]}, {parts[1]})"
        odd = f"{self.over_rows(self.index(at), domain)} % 2 != 0"
        return f"tl.where({odd}, {self.value(y, at.divided(2))}, {self.value(x, at.divided(2))})"

    def _join(self, parts: tuple[Row, ...], at: At) -> str:
        columns = self.over_rows(self.index(at), at.domain)
        text, start = "", 0
        for p in parts:
            value = self.value(p, replace(at.affine(1, -start), outside=True))
            text = f"tl.where({columns} >= {start}, {value}, {text})" if text else value
            text = self.let(text)
            start += p.cols
        return text


def _is_normal(row: Row) -> bool:
    """Whether what `row` holds, and its inverse, are normal numbers, or NaN."""
    bounds = _bounds(row)
    return bounds is not None and bounds[0] >= tt.LEAST and bounds[1] <= 2.0**125


def _bounds(row: Row) -> tuple[float, float] | None:
    """Positive numbers between which `row` lies, if it is not NaN; None if that is not known."""
    match row:
        case Constant(value=value) if value > 0:
            return value, value
        case Round(x=x, dtype=DType.f32):
            return _bounds(x)
        case Unary(function="power_of_two_above", x=x):
            inside = _bounds(x)
            return inside and (inside[0], 2 * inside[1])
        case Binary(function="max", x=Binary(function="div", y=Constant(value=by)), y=Constant(value=least)) if by > 0:
            return (least, max(tt.MOST / by, least)) if least > 0 else None
        case Select(condition=Binary(function="less", x=small, y=Constant(value=top)), x=x, y=Constant(value=nan)) if (
            math.isinf(top) and math.isnan(nan)
        ):
            return _bounds(x) if x is small or (isinstance(x, Unary) and x.x is small) else None
        case Select(x=x, y=y):
            one, two = _bounds(x), _bounds(y)
            return (min(one[0], two[0]), max(one[1], two[1])) if one and two else None
        case _:
            return None


def identity(row: Reduce) -> str:
    """What changes nothing in a reduction."""
    return "0.0" if row.function == "sum" else 'float("-inf")'
