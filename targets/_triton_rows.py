"""Generate the Triton source of a region: straight-line code on blocks of columns, for as many rows as fill a program.

Whatever the row programs say is turned into loads at computed columns, arithmetic in float32, reductions over axes of
the block, and stores; nothing is kept in memory between. The text depends on the row program alone.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace

from dsv3c.ir import DType, IRError
from dsv3c.rows import Binary, Constant, Interleave, Join, Operand, Reduce, Repeat, Round, Row, Select, Slice, Unary
from dsv3c.targets import _triton_math as tt
from dsv3c.targets._regions import RegionProgram
from dsv3c.targets._row_pieces import pieces
from dsv3c.targets._row_stages import children
from dsv3c.targets._triton_blocks import PROGRAMS, At, Blocks, Domain, power_of_two, stored_pieces, walk

MOST_PICKED = 1 << 20
"""Numbers compared at most to pick columns of a grouped reduction one by one."""

SUM_COLUMNS, SUM_PROGRAMS = 32, 64
"""Columns of a program that adds up partial sums, and how many of them it adds at once."""

_NAME = re.compile(r"t\d+")


@dataclass(frozen=True, slots=True)
class Argument:
    """One parameter of a kernel: `kind` is pointer, stride or size; `dtype` is Triton's name of the type;
    `divisible`: by what its value is promised to divide (bytes for a pointer), 1 if nothing is promised."""

    name: str
    kind: str
    dtype: str
    divisible: int


@dataclass(frozen=True, slots=True)
class Script:
    """Generated Triton source. Each program works on `rows` rows and one of `chunks` blocks of columns; with
    `programs`, so many programs (fewer if there are fewer blocks of rows) share all rows, and `sums` are the results
    whose partial sums ENTRY_sumK adds afterwards. `warps` is the number to start with."""

    text: str
    entry: str
    arguments: tuple[Argument, ...]
    rows: int
    chunks: int
    programs: int
    warps: int
    sums: tuple[int, ...]


class _NeedsWholeRow(Exception):
    """A value is picked from columns that another program computes."""


def generate(program: RegionProgram, entry: str) -> Script:
    """The Triton script of a region, a kernel called `entry`.

    Rows are `outer` x `inner`, row r being (r // inner, r % inner). Parameters, in order: for each operand that is
    used, its pointer, then for `row` and `scalar` its strides over outer and inner, for `prefix` over outer; for each
    result the same, except that `column` has a float32 pointer to partial sums [programs, cols]; `rows`; `inner`.
    Raises IRError for a region that needs float64 or picks columns in a way that does not fit in registers.
    """
    if program.wide is DType.f64:
        raise IRError(f"{program.name}: float64 is not generated for GPUs")
    results = pieces(tuple(r.row for r in program.results))
    try:
        return _Generator(program, entry, results, True).script()
    except _NeedsWholeRow:
        pass
    try:
        return _Generator(program, entry, results, False).script()
    except _NeedsWholeRow:
        raise IRError(f"{program.name}: its rows are too long to pick columns of a grouped reduction") from None


@dataclass
class _Scope:
    """Statements of one place in the kernel and what is known there."""

    lines: list[str] = field(default_factory=list)
    known: dict[tuple[object, ...], str] = field(default_factory=dict)


def _indented(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


class _Generator:
    def __init__(self, program: RegionProgram, entry: str, results: tuple[Row, ...], may_split: bool) -> None:
        self.program, self.entry, self.results = program, entry, results
        kinds = [r.kind for r in program.results]
        self.stored = [
            (k, *piece)
            for k, (row, r) in enumerate(zip(results, program.results, strict=True))
            if r.kind != "scalar"
            for piece in stored_pieces(row, r.cols)
        ]
        self.blocks = Blocks(results, tuple(cols for *_, cols in self.stored), may_split)
        self.many = self.blocks.rows > 1
        self.programs = PROGRAMS if "column" in kinds else 0
        self.names = 0
        self.prologue, self.row = _Scope(), _Scope()
        self.scope = self.row
        self.epilogue: list[str] = []
        self.start = "chunk" if self.blocks.mode == "split" else ""
        self.uses_larger = False

    # The kernel as a whole.

    def script(self) -> Script:
        self._rows()
        if self.blocks.mode == "loop":
            self._passes()
        for k, r in enumerate(self.program.results):
            if r.kind == "scalar":
                self._store_scalar(k)
        self._stores()
        body = [*self.prologue.lines]
        if self.programs:
            step = f"for block in range(first, (rows + {self.blocks.rows - 1}) // {self.blocks.rows}, {self.programs}):"
            body += [step, *_indented(self.row.lines), *self.epilogue]
        else:
            body += self.row.lines
        arguments = self._arguments()
        split = ["chunk = tl.program_id(1)"] if self.blocks.mode == "split" else []
        head = [f"{'first' if self.programs else 'block'} = tl.program_id(0)", *split]
        kernel = [
            "@triton.jit",
            f"def {self.entry}({', '.join(a.name for a in arguments)}):",
            *_indented([*head, *body]),
        ]
        sums = tuple(k for k, r in enumerate(self.program.results) if r.kind == "column")
        parts = [
            f'"""Generated from the region {self.program.name}."""',
            "import triton\nimport triton.language as tl",
            *([tt.MAX_HELPER.rstrip()] if self.uses_larger else []),
            "\n".join(kernel),
            *(_sum_kernel(self.entry, k, self.program.results[k].cols, self.program.results[k].dtype) for k in sums),
        ]
        text = "\n\n\n".join(parts) + "\n"
        b = self.blocks
        return Script(text, self.entry, arguments, b.rows, b.chunks, self.programs, b.warps, sums)

    def _arguments(self) -> tuple[Argument, ...]:
        found: list[Argument] = []

        def tensor(name: str, kind: str, dtype: DType, cols: int) -> None:
            aligned = 16 if kind in ("row", "prefix", "column") else 1
            found.append(Argument(name, "pointer", f"*{tt.POINTER[dtype]}", aligned))
            for axis in {"row": "oi", "scalar": "oi", "prefix": "o"}.get(kind, ""):
                found.append(Argument(f"{name}_{axis}", "stride", "i64", math.gcd(cols, 16) if cols else 1))

        for i, o in enumerate(self.program.operands):
            if o.kind != "unused":
                tensor(f"x{i}", o.kind, o.dtype, o.cols)
        for k, r in enumerate(self.program.results):
            if r.kind == "column":
                found.append(Argument(f"part{k}", "pointer", "*fp32", 16))
            else:
                tensor(f"y{k}", r.kind, r.dtype, r.cols)
        return (*found, Argument("rows", "size", "i32", 1), Argument("inner", "size", "i32", 1))

    def _rows(self) -> None:
        """Which rows the program works on, and where they lie."""
        lines = self.row.lines
        if self.many:
            lines += [
                f"every = block * {self.blocks.rows} + tl.arange(0, {self.blocks.rows})",
                "live = every < rows",
                "r = tl.minimum(every, rows - 1)",
            ]
        else:
            lines.append("r = block")
        lines += ["o = (r // inner).to(tl.int64)", "i = (r % inner).to(tl.int64)"]
        tensors = [(f"x{i}", o.kind) for i, o in enumerate(self.program.operands)]
        tensors += [(f"y{k}", r.kind) for k, r in enumerate(self.program.results)]
        for name, kind in tensors:
            if kind in ("row", "scalar"):
                lines.append(f"{name}_at = o * {name}_o + i * {name}_i")
            elif kind == "prefix":
                lines.append(f"{name}_at = o * {name}_o")

    def _passes(self) -> None:
        """Reductions over rows too long for registers: one loop over blocks for each depth and number of columns."""
        depth: dict[Row, int] = {}
        order = list(walk(self.results))
        for row in order:
            below = max((depth[c] for c in children(row)), default=0)
            depth[row] = below + int(isinstance(row, Reduce) and not row.group)
        whole = [r for r in order if isinstance(r, Reduce) and not r.group]
        for level in range(1, max(depth.values(), default=0) + 1):
            pending = [r for r in whole if depth[r] == level]
            domains = {r: self._reduced_domain(r) for r in pending}
            for domain in dict.fromkeys(domains.values()):
                self._pass(domain, [r for r in pending if domains[r] == domain])

    def _pass(self, domain: Domain, rows: list[Reduce]) -> None:
        names = {r: self._name() for r in rows}
        shape = self._shape(domain)
        for r in rows:
            self.row.lines.append(f"{names[r]} = tl.full([{shape}], {_identity(r)}, {tt.FLOAT32})")
        head = self._loop(domain)
        for r in rows:
            value = self._masked(self._value(r.x, At(domain)), domain, _identity(r))
            joined = f"larger({names[r]}, {value})" if r.function == "max" else f"{names[r]} + {value}"
            self.uses_larger |= r.function == "max"
            self.scope.lines.append(f"{names[r]} = {joined}")
        self._end_loop(head)
        for r in rows:
            self.row.known[r, None] = self._let(self._reduce(r, names[r], len(domain.shape), whole=True))

    def _loop(self, domain: Domain) -> str:
        """Begin a loop over the blocks of `domain`; gives its head."""
        self.start = f"c{self.names}"
        self.names += 1
        self.scope = _Scope()
        return f"for {self.start} in range({domain.chunks}):"

    def _end_loop(self, head: str) -> None:
        self.row.lines += [head, *_indented(self.scope.lines)]
        self.scope, self.start = self.row, ""

    def _stores(self) -> None:
        homes = [self.blocks.home(row, cols) for _, row, _, cols in self.stored]
        if self.blocks.mode != "loop":
            for (k, row, offset, _), domain in zip(self.stored, homes, strict=True):
                self._store(k, row, offset, domain)
            return
        for domain in dict.fromkeys(homes):
            for _, row, _, _ in (s for s, d in zip(self.stored, homes, strict=True) if d == domain):
                self._scalars_of(row)
            head = self._loop(domain)
            for (k, row, offset, _), d in zip(self.stored, homes, strict=True):
                if d == domain:
                    self._store(k, row, offset, domain)
            self._end_loop(head)

    def _scalars_of(self, row: Row) -> None:
        """Compute what `row` needs once per row, outside the loop to come."""
        for r in walk((row,)):
            if not r.cols and not isinstance(r, Constant):
                self._scalar(r)

    def _store(self, k: int, row: Row, offset: int, domain: Domain) -> None:
        result = self.program.results[k]
        at = At(domain)
        if result.kind == "column":
            self._accumulate(k, self._value(row, at), offset, domain)
            return
        exact = row.x if isinstance(row, Round) and row.dtype is result.dtype else row
        name = self._value(exact, at)
        value = tt.store(self._tensor(name), result.dtype, self._let)
        place = f"y{k} + {self._over_columns(f'y{k}_at', domain)} + {self._over_rows(self._index(at), domain)}"
        place += f" + {offset}" if offset else ""
        mask = self._over_rows(self._mask(domain), domain)
        if self.many:
            live = self._over_columns("live", domain)
            mask = f"{live} & {mask}" if mask else live
        self.scope.lines.append(f"tl.store({place}, {value}{f', mask={mask}' if mask else ''})")

    def _accumulate(self, k: int, value: str, offset: int, domain: Domain) -> None:
        """Add the rows of this program to its partial sums: in registers, or in memory if the row is too long."""
        if self.many:
            full = self._let(f"tl.where({self._over_columns('live', domain)}, {value}, 0.0)")
            value = f"tl.sum({full}, 0)"
        shape = ", ".join(map(str, domain.shape))
        index, mask = self._index(At(domain)), self._mask(domain)
        guard = f", mask={mask}" if mask else ""
        place = f"part{k} + first * {self.program.results[k].cols} + {index}{f' + {offset}' if offset else ''}"
        if self.blocks.mode == "loop":
            before = self._let(f"tl.load({place}{guard})")
            kept = self._let(f"tl.where(block == first, tl.full([{shape}], 0.0, {tt.FLOAT32}), {before})")
            self.scope.lines.append(f"tl.store({place}, {kept} + {value}{guard})")
            return
        name = self._name()
        self.prologue.lines.append(f"{name} = tl.full([{shape}], 0.0, {tt.FLOAT32})")
        self.row.lines.append(f"{name} += {value}")
        self.epilogue.append(f"tl.store({place}, {name}{guard})")

    def _store_scalar(self, k: int) -> None:
        value = tt.store(self._tensor(self._scalar(self.results[k])), self.program.results[k].dtype, self._let)
        masks = (["live"] if self.many else []) + (["(chunk == 0)"] if self.blocks.mode == "split" else [])
        guard = f", mask={' & '.join(masks)}" if masks else ""
        self.row.lines.append(f"tl.store(y{k} + y{k}_at, {value}{guard})")

    # Lanes: names, shapes, columns, masks.

    def _name(self) -> str:
        self.names += 1
        return f"t{self.names - 1}"

    def _let(self, text: str) -> str:
        if _NAME.fullmatch(text):
            return text
        name = self._name()
        self.scope.lines.append(f"{name} = {text}")
        return name

    def _tensor(self, text: str) -> str:
        """A constant as a tensor, anything else as it is, so that methods can be called on it."""
        return text if _NAME.match(text) else self._let(tt.scalar(text))

    def _shape(self, domain: Domain) -> str:
        return ", ".join(map(str, (self.blocks.rows, *domain.shape) if self.many else domain.shape))

    def _over_rows(self, text: str, domain: Domain) -> str:
        """A tensor without rows, to be met by one with rows."""
        return f"{text}[None, {', '.join(':' * len(domain.shape))}]" if self.many and text else text

    def _over_columns(self, text: str, domain: Domain) -> str:
        """One number per row, to be met by a tensor with columns."""
        return f"{text}[:, {', '.join(['None'] * len(domain.shape))}]" if self.many else text

    def _places(self) -> _Scope:
        """Where columns are computed: once for all rows unless they move with a loop."""
        return self.scope if self.blocks.mode == "loop" else self.prologue

    def _index(self, at: At) -> str:
        """The columns that `at` looks at, a tensor without rows."""
        scope, key = self._places(), ("index", at.domain, at.steps)
        if key not in scope.known:
            name = f"j{self.names}"
            self.names += 1
            if at.steps:
                times, plus, by = at.steps[-1]
                before = self._index(replace(at, steps=at.steps[:-1]))
                scaled = before if times == 1 else f"{before} * {times}"
                text = f"{scaled} + {plus}" if by == 1 else f"{before} // {by}"
            else:
                text = self._columns(at.domain)
            scope.lines.append(f"{name} = {text}")
            scope.known[key] = name
        return scope.known[key]

    def _columns(self, domain: Domain) -> str:
        start = f"{self.start} * {domain.groups} + " if self.start else ""
        lanes = f"{start}tl.arange(0, {domain.groups})"
        if not domain.group:
            return lanes
        return f"({lanes})[:, None] * {domain.group} + tl.arange(0, {domain.lanes_per_group})[None, :]"

    def _mask(self, domain: Domain) -> str:
        """Which lanes are columns; empty if all are."""
        if domain.exact:
            return ""
        scope, key = self._places(), ("mask", domain)
        if key not in scope.known:
            index = self._index(At(domain))
            text = f"{index} < {domain.cols}"
            if domain.lanes_per_group != max(domain.group, 1):
                text = f"({text}) & (tl.arange(0, {domain.lanes_per_group}) < {domain.group})[None, :]"
            scope.known[key] = f"m{self.names}"
            self.names += 1
            scope.lines.append(f"{scope.known[key]} = {text}")
        return scope.known[key]

    # Values.

    def _scalar(self, row: Row) -> str:
        """One number per row."""
        if isinstance(row, Constant):
            return tt.number(row.value)
        key = (row, None)
        if key not in self.row.known:
            scope, self.scope = self.scope, self.row
            self.row.known[key] = self._let(self._compute(row, None))
            self.scope = scope
        return self.row.known[key]

    def _value(self, row: Row, at: At | None) -> str:
        """What `row` holds at the columns of `at`; broadcasts to the shape of its lanes."""
        if isinstance(row, Constant):
            return tt.number(row.value)
        if at is None or not row.cols:
            text = self._scalar(row)
            return text if at is None or isinstance(row, Constant) else self._over_columns(text, at.domain)
        key = (row, at)
        if key not in self.scope.known:
            self.scope.known[key] = self._let(self._compute(row, at))
        return self.scope.known[key]

    def _compute(self, row: Row, at: At | None) -> str:
        match row:
            case Operand(index=index):
                return self._load(index, at)
            case Unary(function=function, x=x):
                return tt.unary(function, self._tensor_of(x, at), self._let)
            case Binary(function=function, x=x, y=y):
                a = self._value(x, at)
                both = isinstance(x, Constant) and isinstance(y, Constant)
                return tt.binary(function, self._tensor(a) if both else a, self._value(y, at))
            case Round(x=x, dtype=dtype):
                return tt.rounded(self._tensor_of(x, at), dtype, self._let)
            case Select(condition=condition, x=x, y=y):
                return f"tl.where({self._condition(condition, at)}, {self._value(x, at)}, {self._value(y, at)})"
            case Reduce(group=0):
                return self._reduce_whole(row)
        assert at is not None
        match row:
            case Slice(x=x, start=start, step=step):
                return self._value(x, at.affine(step, start))
            case Reduce():
                return self._reduce_groups(row, at)
            case Repeat(x=x, times=times):
                domain = at.domain
                if not at.steps and times == domain.group and domain.cols == row.cols:
                    value = self._value(x, At(domain.of_groups(), (), at.outside))
                    return value if isinstance(x, Constant) else f"{value}[{':, ' * (1 + self.many)}None]"
                return self._value(x, at.divided(times))
            case Interleave(x=x, y=y):
                return self._interleave(row, x, y, at)
            case Join(parts=parts):
                return self._join(parts, at)
            case _:
                raise AssertionError(f"no rule for {row}")

    def _tensor_of(self, row: Row, at: At | None) -> str:
        return self._tensor(self._value(row, at))

    def _condition(self, row: Row, at: At | None) -> str:
        if isinstance(row, Binary) and row.function in ("less", "equal"):
            both = isinstance(row.x, Constant) and isinstance(row.y, Constant)
            x = self._value(row.x, at)
            return tt.condition(row.function, self._tensor(x) if both else x, self._value(row.y, at))
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
        columns, mask = self._index(at), self._mask(domain)
        if at.outside:
            inside = f"({columns} >= 0) & ({columns} < {operand.cols})"
            mask = f"({mask} & {inside})" if mask else f"({inside})"
        place = f"x{index} + {self._over_rows(columns, domain)}"
        if operand.kind in ("row", "prefix"):
            place = f"x{index} + {self._over_columns(f'x{index}_at', domain)} + {self._over_rows(columns, domain)}"
        guard = f", mask={self._over_rows(mask, domain)}" if mask else ""
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
            both = f"({self._index(even)}[:, None] + tl.arange(0, 2)[None, :])"
            mask = self._mask(domain)
            masks = [f"{mask}[:, None]"] if mask else []
            if first + 2 * domain.cols > operand.cols:
                masks.append(f"({both} < {operand.cols})")
            rows = "[None, :, :]" if self.many else ""
            guard = f", mask=({' & '.join(masks)}){rows}" if masks else ""
            start = f"x{index}_at{'[:, None, None]' if self.many else ''} + " if operand.kind != "column" else ""
            loaded = self._let(tt.load(f"tl.load(x{index} + {start}{both}{rows}{guard})", operand.dtype))
            left, right = self._name(), self._name()
            self.scope.lines.append(f"{left}, {right} = tl.split({loaded})")
            self.scope.known[key] = left
            self.scope.known[(*key, "right")] = right
        return self.scope.known[key if at.steps[0][1] == first else (*key, "right")]

    def _masked(self, value: str, domain: Domain, otherwise: str) -> str:
        """`value` in all lanes of `domain`, `otherwise` in those that are no columns."""
        mask = self._over_rows(self._mask(domain), domain)
        text = f"tl.where({mask}, {value}, {otherwise})" if mask else self._tensor(value)
        return self._let(f"tl.broadcast_to({text}, [{self._shape(domain)}])")

    def _reduce(self, row: Reduce, value: str, axes: int, whole: bool) -> str:
        """The reduction of `value` over its last axis, or over all its `axes` of columns."""
        base = 1 if self.many else 0
        for axis in range(base + axes - 1, base - 1 if whole else base + axes - 2, -1):
            if row.function == "max":
                self.uses_larger = True
                value = f"tl.reduce({value}, {axis}, larger)"
            else:
                value = f"tl.sum({value}, {axis})"
        return value

    def _reduced_domain(self, row: Reduce) -> Domain:
        return self.blocks.home(row.x, row.x.cols)

    def _reduce_whole(self, row: Reduce) -> str:
        assert self.blocks.mode == "whole", "reductions over long rows are done in passes"
        domain = self._reduced_domain(row)
        value = self._masked(self._value(row.x, At(domain)), domain, _identity(row))
        return self._reduce(row, value, len(domain.shape), whole=True)

    def _reduce_groups(self, row: Reduce, at: At) -> str:
        lanes = power_of_two(row.group)
        if not at.steps and not at.domain.group and at.domain.cols == row.cols:
            domain = Domain(row.x.cols, row.group, at.domain.block * lanes)
            value = self._masked(self._value(row.x, At(domain)), domain, _identity(row))
            return self._reduce(row, value, 2, whole=False)
        return self._pick(row, at)

    def _pick(self, row: Reduce, at: At) -> str:
        """Columns of a grouped reduction one by one, by comparing with all of them."""
        small = Domain(row.cols, 0, power_of_two(row.cols))
        lanes = small.block * at.domain.block * self.blocks.rows
        if self.blocks.mode != "whole" or lanes > MOST_PICKED:
            raise _NeedsWholeRow
        values = self._tensor(self._value(row, At(small)))
        axes = len(at.domain.shape)
        rows = ":, " if self.many else ""
        spread = f"{values}[{rows}{'None, ' * axes}:]"
        lanes_of = "None, " * self.many + ":, " * axes
        index = f"{self._index(at)}[{lanes_of}None]"
        match = f"{index} == tl.arange(0, {small.block})[{'None, ' * (axes + int(self.many))}:]"
        return f"tl.sum(tl.where({match}, {spread}, 0.0), {axes + int(self.many)})"

    def _interleave(self, row: Row, x: Row, y: Row, at: At) -> str:
        domain = at.domain
        half = Domain(domain.cols // 2, domain.group // 2, domain.block // 2)
        if not at.steps and domain.cols == row.cols and domain.group % 2 == 0 and domain.block > 1:
            shape = self._shape(half)
            parts = [
                self._let(f"tl.broadcast_to({self._tensor(self._value(p, At(half, (), at.outside)))}, [{shape}])")
                for p in (x, y)
            ]
            return f"tl.interleave({parts[0]}, {parts[1]})"
        odd = f"{self._over_rows(self._index(at), domain)} % 2 != 0"
        return f"tl.where({odd}, {self._value(y, at.divided(2))}, {self._value(x, at.divided(2))})"

    def _join(self, parts: tuple[Row, ...], at: At) -> str:
        columns = self._over_rows(self._index(at), at.domain)
        text, start = "", 0
        for p in parts:
            value = self._value(p, replace(at.affine(1, -start), outside=True))
            text = f"tl.where({columns} >= {start}, {value}, {text})" if text else value
            text = self._let(text)
            start += p.cols
        return text


def _identity(row: Reduce) -> str:
    return "0.0" if row.function == "sum" else 'float("-inf")'


def _sum_kernel(entry: str, k: int, cols: int, dtype: DType) -> str:
    """Adds the partial sums of result `k`, in an order that depends on their number alone."""
    return f"""@triton.jit
def {entry}_sum{k}(part, y, count):
    j = tl.program_id(0) * {SUM_COLUMNS} + tl.arange(0, {SUM_COLUMNS})
    total = tl.full([{SUM_PROGRAMS}, {SUM_COLUMNS}], 0.0, {tt.FLOAT32})
    for first in range(0, count, {SUM_PROGRAMS}):
        p = first + tl.arange(0, {SUM_PROGRAMS})
        mask = (p < count)[:, None] & (j < {cols})[None, :]
        total += tl.load(part + p[:, None] * {cols} + j[None, :], mask=mask, other=0.0)
    tl.store(y + j, {tt.store("tl.sum(total, 0)", dtype, lambda t: t)}, mask=j < {cols})"""
