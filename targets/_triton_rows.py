"""Generate the Triton source of a region: straight-line code on blocks of columns, for as many rows as fill a program.

Whatever the row programs say is turned into loads at computed columns, arithmetic in float32, reductions over axes of
the block, and stores; nothing is kept in memory between. The text depends on the row program alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv3c.ir import DType, IRError
from dsv3c.rows import Binary, Constant, Down, Reduce, Round, Row, children, walk
from dsv3c.targets import _triton_math as tt
from dsv3c.targets._regions import RegionProgram
from dsv3c.targets._row_pieces import pieces
from dsv3c.targets._triton_blocks import PROGRAMS, At, Blocks, Domain, Tall, stored_pieces
from dsv3c.targets._triton_values import NeedsWholeRow, Scope, Values, identity

TURNED = ("turned", "turned_tile")
STEP = 16
"""Rows that a turned result is stored in at once; its columns have room for a multiple of them."""
_PLACES = ("index", "mask")
"""Keys of what a scope knows about columns."""
ACROSS = False
"""Whether neighbouring programs that hold tiles of rows work on neighbouring columns."""
FOLD_ROWS = 256
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
    whose partial sums ENTRY_sumK adds afterwards. `folds` are results whose partial sums over blocks of columns
    ENTRY_foldK adds. `across`: neighbouring programs work on neighbouring columns, else on neighbouring rows. `warps`
    is the number to start with."""

    text: str
    entry: str
    arguments: tuple[Argument, ...]
    rows: int
    chunks: int
    programs: int
    warps: int
    sums: tuple[int, ...]
    folds: tuple[int, ...] = ()
    across: bool = False


def generate(program: RegionProgram, entry: str) -> Script:
    """The Triton script of a region, a kernel called `entry`.

    Rows are `outer` x `inner`, row r being (r // inner, r % inner). Parameters, in order: for each operand that is
    used, its pointer, then for `row` and `scalar` its strides over outer and inner, for `prefix` over outer; for each
    result the same, except that `column` has a float32 pointer to partial sums [programs, cols], a folded `scalar` one
    to partial sums [chunks, rows], and the turned ones a stride over columns; `rows`; `inner`.
    Raises IRError for a region that needs float64, picks columns in a way that does not fit in registers, or needs
    whole rows before tiles of rows.
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
        self.tall = tall = any(isinstance(r, Down) for r in walk(results))
        self.folds = tuple(k for k, r in enumerate(results) if tall and program.results[k].kind == "scalar" and _sum(r))
        rest = tuple(r for k, r in enumerate(results) if k not in self.folds)
        widths = [cols for *_, cols in self.stored]
        if tall:
            if any(isinstance(r, Reduce) and not r.group for r in walk(rest)):
                raise IRError(f"{program.name}: what is computed in tiles of rows needs whole rows first")
            widths += [r.x.cols for r in walk(results) if isinstance(r, Reduce) and not r.group]
        wide = [o.dtype.bits for o in program.operands if o.kind == "row" and o.cols >= max(widths, default=0)]
        kinds = [program.results[k].kind for k, *_ in self.stored]
        shape = Tall(tuple(wide or [32]), max(1, kinds.count("turned")), "row" in kinds) if tall else None
        super().__init__(program, Blocks(rest, tuple(widths), may_split, shape))
        self.across = tall and ACROSS
        self.folds = self.folds if self.blocks.chunks > 1 else ()
        self.programs = PROGRAMS if any(r.kind == "column" for r in program.results) else 0
        self.epilogue: list[str] = []

    def script(self) -> Script:
        self._rows()
        if self.blocks.mode == "loop":
            self._passes()
        if self.tall:
            self._rounds()
        else:
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
        axes = (1, 0) if self.across else (0, 1)
        split = [f"chunk = tl.program_id({axes[1]})"] if self.blocks.mode == "split" else []
        head = [f"{'first' if self.programs else 'block'} = tl.program_id({axes[0]})", *split]
        kernel = [
            "@triton.jit",
            f"def {self.entry}({', '.join(a.name for a in arguments)}):",
            *_indented([*head, *body]),
        ]
        sums = tuple(k for k, r in enumerate(self.program.results) if r.kind == "column")
        parts = [
            f'"""Generated from the region {self.program.name}."""',
            "import triton\nimport triton.language as tl",
            *(text.rstrip() for name, text in tt.HELPERS.items() if name in self.helpers),
            "\n".join(kernel),
            *(_sum_kernel(self.entry, k, self.program.results[k].cols, self.program.results[k].dtype) for k in sums),
            *(_fold_kernel(self.entry, k, self.blocks.chunks, self.program.results[k].dtype) for k in self.folds),
        ]
        text = "\n\n\n".join(parts) + "\n"
        b = self.blocks
        return Script(text, self.entry, arguments, b.rows, b.chunks, self.programs, b.warps, sums, self.folds,
                      self.across)  # fmt: skip

    def _arguments(self) -> tuple[Argument, ...]:
        found: list[Argument] = []

        def tensor(name: str, kind: str, dtype: DType, cols: int) -> None:
            aligned = 16 if kind in ("row", "prefix", "column", "turned") else 1
            found.append(Argument(name, "pointer", f"*{tt.POINTER[dtype]}", aligned))
            for axis in {"row": "oi", "scalar": "oi", "prefix": "o"}.get(kind, ""):
                found.append(Argument(f"{name}_{axis}", "stride", "i64", math.gcd(cols, 16) if cols else 1))
            if kind in TURNED:
                found.append(Argument(f"{name}_c", "stride", "i64", 16 if kind == "turned" else 1))

        for i, o in enumerate(self.program.operands):
            if o.kind != "unused":
                tensor(f"x{i}", o.kind, o.dtype, o.cols)
        for k, r in enumerate(self.program.results):
            if r.kind == "column" or k in self.folds:
                found.append(Argument(f"part{k}", "pointer", "*fp32", 16))
            else:
                tensor(f"y{k}", r.kind, r.dtype, r.cols)
        return (*found, Argument("rows", "size", "i32", 1), Argument("inner", "size", "i32", 1))

    def _rows(self) -> None:
        """Which rows the program works on, and where they lie."""
        lines = self.row.lines
        if self.many:
            every = f"tl.arange(0, {self.blocks.rows})"
            if self.tall and self.blocks.beside > 1:  # neighbouring rows to one thread, so that they stand side by side
                apart = self.blocks.rows // self.blocks.beside
                every = f"{every} % {apart} * {self.blocks.beside} + {every} // {apart}"
            lines += [
                f"every = block * {self.blocks.rows} + {every}",
                "live = every < rows",
                "r = tl.minimum(every, rows - 1)",
            ]
            if any(r.kind == "turned" for r in self.program.results):  # whole vectors, so that the mask cuts none
                lines.append(f"below = block * {self.blocks.rows} + tl.arange(0, {self.blocks.rows})")
                lines.append(f"run = below // {STEP} * {STEP} < rows")
        else:
            lines.append("r = block")
        lines += ["o = (r // inner).to(tl.int64)", "i = (r % inner).to(tl.int64)"]
        tensors = [(f"x{i}", o.kind) for i, o in enumerate(self.program.operands)]
        tensors += [(f"y{k}", r.kind) for k, r in enumerate(self.program.results) if k not in self.folds]
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
            self.helpers |= {"larger"} if r.function == "max" else set()
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

    def _rounds(self) -> None:
        """Tiles of rows: what is quantized from one expression is stored together, then the operands are read again
        for the next, from the cache. To keep them all would take more registers than there are."""
        rounds: list[tuple[set[Row], list[tuple[int, Row, int, int]]]] = []
        for piece in self.stored:
            shared = {r.x for r in walk((piece[1],)) if isinstance(r, (Down, Reduce)) and r.cols} or {piece[1]}
            inside = set(walk(tuple(shared)))
            found = next((i for i, (known, _) in enumerate(rounds) if known & shared or piece[1] in known), None)
            if found is None:
                rounds.append((inside, [piece]))
            else:
                rounds[found][0].update(inside)
                rounds[found][1].append(piece)
        scalars = [k for k, r in enumerate(self.program.results) if r.kind == "scalar"]
        for number, (_, stored) in enumerate(rounds):
            for k in [k for k in scalars if self._nearest(k, rounds) == number]:
                self._store_scalar(k)
            for k, row, offset, cols in stored:
                self._store(k, row, offset, self.blocks.home(row, cols))
            self.row.known = {key: v for key, v in self.row.known.items() if key[-1] is None or key[0] in _PLACES}

    def _nearest(self, k: int, rounds: list[tuple[set[Row], list[tuple[int, Row, int, int]]]]) -> int:
        """The round that computes most of what result `k` needs."""
        needed = set(walk((self.results[k],)))
        return max(range(len(rounds)), key=lambda i: (len(needed & rounds[i][0]), -i))

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
        value = tt.store(self.tensor(self.value(exact, at)), result.dtype, self.let)
        if result.kind in TURNED:
            self._store_turned(k, value, offset, domain)
            return
        place = f"y{k} + {self.over_columns(f'y{k}_at', domain)} + {self.over_rows(self.index(at), domain)}"
        place += f" + {offset}" if offset else ""
        mask = self.over_rows(self.mask(domain), domain)
        if self.many:
            live = self.over_columns("live", domain)
            mask = f"{live} & {mask}" if mask else live
        self.scope.lines.append(f"tl.store({place}, {value}{f', mask={mask}' if mask else ''})")

    def _store_turned(self, k: int, value: str, offset: int, domain: Domain) -> None:
        """Columns become rows; of a tile's number one row is stored."""
        axes = len(domain.shape)
        tiles = self.program.results[k].kind == "turned_tile"
        lanes = ", ".join(map(str, domain.shape))
        columns = f"({self.index(At(domain))}{f' + {offset}' if offset else ''}).to(tl.int64) * y{k}_c"
        whole = self.let(f"tl.broadcast_to({value}, [{'1' if tiles else self.blocks.rows}, {lanes}])")
        mask = self.mask(domain)
        if tiles:
            place = f"y{k} + ({columns} + block)[None, {', '.join(':' * axes)}]"
            guard = self.over_rows(mask, domain)
        else:
            beside, rows = self.blocks.beside, self.blocks.rows
            axis_order = ", ".join(map(str, range(2, axes + 2)))
            whole = self.let(f"tl.reshape({whole}, [{beside}, {rows // beside}, {lanes}])")
            whole = self.let(f"tl.reshape(tl.permute({whole}, ({axis_order}, 1, 0)), [{lanes}, {rows}])")
            spread, below = f"[{', '.join(':' * axes)}, None]", f"[{'None, ' * axes}:]"
            place = f"y{k} + ({columns}){spread} + below{below}"
            guard = f"run{below}" + (f" & {mask}{spread}" if mask else "")
        self.scope.lines.append(f"tl.store({place}, {whole}{f', mask={guard}' if guard else ''})")

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
        if k in self.folds:
            place = f"part{k} + chunk.to(tl.int64) * rows + every"
            self.row.lines.append(f"tl.store({place}, {self.tensor(self.scalar(self.results[k]))}, mask=live)")
            return
        value = tt.store(self.tensor(self.scalar(self.results[k])), self.program.results[k].dtype, self.let)
        masks = (["live"] if self.many else []) + (["(chunk == 0)"] if self.blocks.mode == "split" else [])
        guard = f", mask={' & '.join(masks)}" if masks else ""
        self.row.lines.append(f"tl.store(y{k} + y{k}_at, {value}{guard})")


def _sum(row: Row) -> bool:
    """Whether `row` is a sum over columns, or several added up: what blocks of columns can be summed to."""
    if isinstance(row, Binary):
        return row.function == "add" and _sum(row.x) and _sum(row.y)
    return isinstance(row, Reduce) and row.function == "sum" and not row.group


def _fold_kernel(entry: str, k: int, chunks: int, dtype: DType) -> str:
    """Adds the partial sums of the blocks of columns, in their order."""
    return f"""@triton.jit
def {entry}_fold{k}(part, y, y_o, y_i, rows, inner):
    r = tl.program_id(0) * {FOLD_ROWS} + tl.arange(0, {FOLD_ROWS})
    total = tl.full([{FOLD_ROWS}], 0.0, {tt.FLOAT32})
    for chunk in range({chunks}):
        total += tl.load(part + tl.full([], chunk, tl.int64) * rows + r, mask=r < rows, other=0.0)
    place = (r // inner).to(tl.int64) * y_o + (r % inner).to(tl.int64) * y_i
    tl.store(y + place, {tt.store("total", dtype, lambda t: t)}, mask=r < rows)"""


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
