"""Generate the Triton source of a region: straight-line code on blocks of columns, for as many rows as fill a program.

Whatever the row programs say is turned into loads at computed columns, arithmetic in float32, reductions over axes of
the block, and stores; nothing is kept in memory between. The text depends on the row program alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv3c.ir import DType, IRError
from dsv3c.rows import Constant, Reduce, Round, Row
from dsv3c.targets import _triton_math as tt
from dsv3c.targets._regions import RegionProgram
from dsv3c.targets._row_pieces import pieces
from dsv3c.targets._row_stages import children
from dsv3c.targets._triton_blocks import PROGRAMS, At, Blocks, Domain, stored_pieces, walk
from dsv3c.targets._triton_values import NeedsWholeRow, Scope, Values, identity

SUM_COLUMNS, SUM_PROGRAMS = 32, 64
"""Columns of a program that adds up partial sums, and how many of them it adds at once."""


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
    except NeedsWholeRow:
        pass
    try:
        return _Generator(program, entry, results, False).script()
    except NeedsWholeRow:
        raise IRError(f"{program.name}: its rows are too long to pick columns of a grouped reduction") from None


def _indented(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


class _Generator(Values):
    """The kernel around the values."""

    def __init__(self, program: RegionProgram, entry: str, results: tuple[Row, ...], may_split: bool) -> None:
        self.entry, self.results = entry, results
        self.stored = [
            (k, *piece)
            for k, (row, r) in enumerate(zip(results, program.results, strict=True))
            if r.kind != "scalar"
            for piece in stored_pieces(row, r.cols)
        ]
        super().__init__(program, Blocks(results, tuple(cols for *_, cols in self.stored), may_split))
        self.programs = PROGRAMS if any(r.kind == "column" for r in program.results) else 0
        self.epilogue: list[str] = []

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
            domains = {r: self.reduced_domain(r) for r in pending}
            for domain in dict.fromkeys(domains.values()):
                self._pass(domain, [r for r in pending if domains[r] == domain])

    def _pass(self, domain: Domain, rows: list[Reduce]) -> None:
        names = {r: self.name() for r in rows}
        shape = self.shape(domain)
        for r in rows:
            self.row.lines.append(f"{names[r]} = tl.full([{shape}], {identity(r)}, {tt.FLOAT32})")
        head = self._loop(domain)
        for r in rows:
            value = self.masked(self.value(r.x, At(domain)), domain, identity(r))
            joined = f"larger({names[r]}, {value})" if r.function == "max" else f"{names[r]} + {value}"
            self.uses_larger |= r.function == "max"
            self.scope.lines.append(f"{names[r]} = {joined}")
        self._end_loop(head)
        for r in rows:
            self.row.known[r, None] = self.let(self.reduce(r, names[r], len(domain.shape), whole=True))

    def _loop(self, domain: Domain) -> str:
        """Begin a loop over the blocks of `domain`; gives its head."""
        self.start = f"c{self.names}"
        self.names += 1
        self.scope = Scope()
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
                self.scalar(r)

    def _store(self, k: int, row: Row, offset: int, domain: Domain) -> None:
        result = self.program.results[k]
        at = At(domain)
        if result.kind == "column":
            self._accumulate(k, self.value(row, at), offset, domain)
            return
        exact = row.x if isinstance(row, Round) and row.dtype is result.dtype else row
        name = self.value(exact, at)
        value = tt.store(self.tensor(name), result.dtype, self.let)
        place = f"y{k} + {self.over_columns(f'y{k}_at', domain)} + {self.over_rows(self.index(at), domain)}"
        place += f" + {offset}" if offset else ""
        mask = self.over_rows(self.mask(domain), domain)
        if self.many:
            live = self.over_columns("live", domain)
            mask = f"{live} & {mask}" if mask else live
        self.scope.lines.append(f"tl.store({place}, {value}{f', mask={mask}' if mask else ''})")

    def _accumulate(self, k: int, value: str, offset: int, domain: Domain) -> None:
        """Add the rows of this program to its partial sums: in registers, or in memory if the row is too long."""
        if self.many:
            full = self.let(f"tl.where({self.over_columns('live', domain)}, {value}, 0.0)")
            value = f"tl.sum({full}, 0)"
        shape = ", ".join(map(str, domain.shape))
        index, mask = self.index(At(domain)), self.mask(domain)
        guard = f", mask={mask}" if mask else ""
        place = f"part{k} + first * {self.program.results[k].cols} + {index}{f' + {offset}' if offset else ''}"
        if self.blocks.mode == "loop":
            before = self.let(f"tl.load({place}{guard})")
            kept = self.let(f"tl.where(block == first, tl.full([{shape}], 0.0, {tt.FLOAT32}), {before})")
            self.scope.lines.append(f"tl.store({place}, {kept} + {value}{guard})")
            return
        name = self.name()
        self.prologue.lines.append(f"{name} = tl.full([{shape}], 0.0, {tt.FLOAT32})")
        self.row.lines.append(f"{name} += {value}")
        self.epilogue.append(f"tl.store({place}, {name}{guard})")

    def _store_scalar(self, k: int) -> None:
        value = tt.store(self.tensor(self.scalar(self.results[k])), self.program.results[k].dtype, self.let)
        masks = (["live"] if self.many else []) + (["(chunk == 0)"] if self.blocks.mode == "split" else [])
        guard = f", mask={' & '.join(masks)}" if masks else ""
        self.row.lines.append(f"tl.store(y{k} + y{k}_at, {value}{guard})")


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
