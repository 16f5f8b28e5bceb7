"""Generate the TIR of a region for the CPU: one pass over chunks of rows, columns in vectors, few trips to memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

from dsv3c.rows import (
    Binary,
    Constant,
    Operand,
    Reduce,
    Repeat,
    Round,
    Row,
    Select,
    Slice,
    Unary,
)
from dsv3c.targets import _tvm_math as tir
from dsv3c.targets._regions import RegionOperand, RegionProgram, RegionResult
from dsv3c.targets._row_stages import Loop, Stages, Store, plan_stages

CHUNKS = 16
"""Rows are cut into this many chunks whatever the number of threads, so that sums do not depend on it."""

SERIAL_WORK = 32768
"""Fewer numbers than this are not worth waking a second thread."""


@dataclass(frozen=True, slots=True)
class Script:
    """Generated TIR. `in_place`: pairs (operand, result) that may be one and the same tensor."""

    text: str
    in_place: tuple[tuple[int, int], ...]


def generate(program: RegionProgram, entry: str) -> Script:
    """The TIR script of a region, a function called `entry`.

    Arguments are the operands, then the results. The rows are `outer` x `inner`, both read off the arguments:
    `row` is [outer, inner, cols] and `scalar` [outer, inner] with any strides but 1 between columns, `prefix`
    [outer, cols], `column` [cols], `single` [1]. The text depends on the program and `entry` alone.
    """
    generator = _Generator(program, entry)
    text = generator.text()
    return Script(text, tuple(generator.in_place()))


@dataclass
class _Scope:
    """Where statements go: lines so far, the column they are about, and what is already computed there."""

    lines: list[str]
    lanes: int = 1
    column: str = ""
    known: dict[tuple[Row, int, int], str] = field(default_factory=dict)
    outer: _Scope | None = None


def _segments(cols: int, lanes: int) -> Iterator[tuple[int, int, int]]:
    """(start, lanes, count) of the runs of equal vectors that cover `cols` columns."""
    while lanes > 1 and cols < lanes:
        lanes //= 2
    if cols % lanes and cols < 4 * lanes and lanes > 8 and cols % 8 == 0:
        lanes = 8
    whole = cols // lanes
    yield 0, lanes, whole
    rest = cols - whole * lanes
    if rest:
        width = rest & -rest
        yield whole * lanes, width, rest // width


def _indented(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


def _vectors(dtype: str, lanes: int) -> str:
    """The name of the vectors of one type."""
    return f"{dtype[0]}{dtype.lstrip('abcdefghijklmnopqrstuvwxyz')}x{lanes}"


def _lane(lanes: int) -> str:
    return "v" if lanes > 1 else "0"


class _Generator:
    def __init__(self, program: RegionProgram, entry: str) -> None:
        self.program, self.entry = program, entry
        self.wide = tir.STORAGE[program.wide]
        self.lanes = 8 if self.wide == "float64" else 16
        self.stages: Stages = plan_stages(program)
        self.vectors: dict[tuple[str, int], int] = {}
        self.buffers: dict[Row, str] = {}
        for row in self.stages.kept:
            self._place(row)
        self.row = _Scope([])
        self.level = 0
        self.moment = 0
        self.reads: list[tuple[int, int, bool]] = []
        self.writes: list[tuple[int, int, bool]] = []

    def in_place(self) -> Iterator[tuple[int, int]]:
        """Pairs whose operand is never read after the result overwrote it: earlier, or at the same columns."""
        for i, o in enumerate(self.program.operands):
            for k, r in enumerate(self.program.results):
                if o.kind != "row" or r.kind != "row" or (o.cols, o.dtype) != (r.cols, r.dtype):
                    continue
                reads = [(t, same) for index, t, same in self.reads if index == i]
                writes = [(t, same) for index, t, same in self.writes if index == k]
                if all(t < u or (t == u and a and b) for t, a in reads for u, b in writes):
                    yield i, k

    def _vector(self, lanes: int, dtype: str) -> str:
        """A new vector of a chunk's own, as `f32x16[3`, to be closed by its lane."""
        number = self.vectors.setdefault((dtype, lanes), 0)
        self.vectors[dtype, lanes] = number + 1
        return f"{_vectors(dtype, lanes)}[{number}"

    def _memory(self) -> list[str]:
        """Declare what a chunk needs. Vectors stay on the stack, where LLVM makes each a register."""
        stack = ', annotations={"disable_lower_builtin": True}'
        lines = [
            f'{_vectors(dtype, lanes)} = T.alloc_buffer(({number}, {lanes}), "{dtype}", scope="local"{stack})'
            for (dtype, lanes), number in self.vectors.items()
        ]
        for row, name in self.buffers.items():
            lines.append(f'{name} = T.alloc_buffer(({row.cols},), "{self.wide}", scope="local")')
        self.vectors = {}
        self.buffers = {}
        return lines

    def text(self) -> str:
        body = self._row_body()
        rows = ["for i in T.serial(T.int64(0), inner):", *_indented(body)]
        chunk = [
            *self._memory(),
            *self._clear_partials(),
            "for r in T.serial(T.int64(0), T.min(step, outer - chunk * step)):",
            "    o: T.let = chunk * step + r",
            *_indented(rows),
        ]
        widest = max([o.cols for o in self.program.operands] + [r.cols for r in self.program.results] + [1])
        serial = f"T.Select(outer * inner * T.int64({widest}) < T.int64({SERIAL_WORK}), 1, 0)"
        total = self._add_partials()
        lines = [
            f'T.func_attr({{"global_symbol": "{self.entry}"}})',
            "outer = T.int64()",
            "inner = T.int64()",
            *self._bind_buffers(),
            f"step: T.let = (outer + T.int64({CHUNKS - 1})) // T.int64({CHUNKS})",
            *(f'partial{k} = T.alloc_buffer(({CHUNKS * r.cols},), "{self.wide}")' for k, r in self._columns()),
            f'T.evaluate(T.call_extern("int32", "dsv3c_threads", T.Cast("int32", {serial})))',
            f"for chunk in T.parallel(T.int64(0), T.int64({CHUNKS})):",
            "    if chunk * step < outer:",
            *_indented(_indented(chunk)),
            *total,
        ]
        names = [f"p{i}" for i in range(len(self.program.operands))]
        names += [f"q{k}" for k in range(len(self.program.results))]
        head = ["@T.prim_func", f"def {self.entry}({', '.join(f'{n}: T.handle' for n in names)}):"]
        return "\n".join([*head, *_indented(lines)]) + "\n"

    def _columns(self) -> Iterator[tuple[int, RegionResult]]:
        return ((k, r) for k, r in enumerate(self.program.results) if r.kind == "column")

    def _bind_buffers(self) -> list[str]:
        lines: list[str] = []
        for i, o in enumerate(self.program.operands):
            lines += self._bind(f"x{i}", f"p{i}", o)
        for k, r in enumerate(self.program.results):
            lines += self._bind(f"y{k}", f"q{k}", r)
        return lines

    def _bind(self, name: str, handle: str, tensor: RegionOperand | RegionResult) -> list[str]:
        dtype = tir.STORAGE[tensor.dtype]
        shape, strides = {
            "row": (f"outer, inner, {tensor.cols}", ("outer", "inner", "1")),
            "scalar": ("outer, inner", ("outer", "inner")),
            "prefix": (f"outer, {tensor.cols}", ("outer", "1")),
            "column": (f"{tensor.cols},", ()),
            "single": ("1,", ()),
            "unused": ("1,", ()),
        }[tensor.kind]
        symbols = [f"{name}_{s}" for s in strides if s != "1"]
        text = ", ".join(f"{name}_{s}" if s != "1" else s for s in strides)
        given = f", strides=({text})" if strides else ""
        size = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "uint16": 2, "float16": 2, "uint8": 1}[dtype]
        bound = f'{name} = T.match_buffer({handle}, ({shape}), "{dtype}"{given}, align={size})'
        return [*(f"{s} = T.int64()" for s in symbols), bound]

    def _clear_partials(self) -> list[str]:
        lines: list[str] = []
        for k, r in self._columns():
            for start, lanes, count in _segments(r.cols, self.lanes):
                at = f"chunk * T.int64({r.cols}) + {self._column(start, lanes)}"
                zero = [f"partial{k}[{at}] = {tir.number(0.0, self.wide)}"]
                lines += self._loops(lanes, count, zero)
        return lines

    def _add_partials(self) -> list[str]:
        """Sums over all rows: chunk after chunk, in order."""
        lines: list[str] = []
        for k, r in self._columns():
            total: list[str] = []
            final: list[str] = []
            for start, lanes, count in _segments(r.cols, self.lanes):
                at = self._column(start, lanes)
                scope = _Scope([], lanes)
                value = self._let(scope, f"partial{k}[{at}]")
                text = tir.store(value, r.dtype, self.wide, functools.partial(self._let, scope))
                scope.lines.append(f"y{k}[{at}] = {text}")
                more = f"partial{k}[{at}] = partial{k}[{at}] + partial{k}[c * T.int64({r.cols}) + {at}]"
                total += self._loops(lanes, count, [more])
                final += self._loops(lanes, count, scope.lines)
            lines += ["for c in T.serial(T.int64(1), (outer + step - T.int64(1)) // step):", *_indented(total), *final]
        return [*self._memory(), *lines]

    def _loops(self, lanes: int, count: int, body: list[str]) -> list[str]:
        if lanes > 1:
            body = [f"for v in T.vectorized(T.int64(0), T.int64({lanes})):", *_indented(body)]
        return [f"for j in T.serial(T.int64(0), T.int64({count})):", *_indented(body)]

    def _column(self, start: int, lanes: int, group: int = 0) -> str:
        terms = [f"g * {group}"] if group else []
        terms += [f"j * {lanes} + v" if lanes > 1 else "j"]
        terms += [str(start)] if start else []
        return " + ".join(terms)

    def _let(self, scope: _Scope, text: str, dtype: str = "") -> str:
        """Compute `text` in `scope`. A buffer and not a binding: TVM expands bindings into trees when it analyses."""
        named = f"{self._vector(scope.lanes, dtype or self.wide)}, {_lane(scope.lanes)}]"
        scope.lines.append(f"{named} = {text}")
        return named

    def _row_body(self) -> list[str]:
        for index, o in enumerate(self.program.operands):
            if o.kind in ("scalar", "single"):
                row = self._operand(index)
                if row is not None:
                    at = "o, i" if o.kind == "scalar" else "0"
                    text = tir.load(f"x{index}[{at}]", o.dtype, self.wide)
                    self.row.known[row, 1, 0] = self._let(self.row, text)
        for level, loops in enumerate(self.stages.loops):
            self.level = level
            for row in self.stages.scalars[level]:
                self._value(row, self.row)
            for loop in loops:
                self._loop(loop)
        for k, r in enumerate(self.program.results):
            if r.kind == "scalar":
                name = self._value(self.stages.results[k], self.row)
                text = tir.store(name, r.dtype, self.wide, functools.partial(self._let, self.row))
                self.row.lines.append(f"y{k}[o, i] = {text}")
        return self.row.lines

    def _operand(self, index: int) -> Row | None:
        return next((r for r in self.stages.level if isinstance(r, Operand) and r.index == index), None)

    def _loop(self, loop: Loop) -> None:
        self.moment += 1
        lines = self.row.lines
        span = loop.group or loop.cols
        slots: dict[Reduce, list[tuple[str, int]]] = {}
        inner: list[str] = []
        per_group = _Scope([], column="g", outer=self.row)
        for start, lanes, count in _segments(span, self.lanes):
            column = self._column(start, lanes, loop.group)
            scope = _Scope([], lanes, column, outer=per_group if loop.group else self.row)
            for task in loop.tasks:
                if isinstance(task, Reduce):
                    value = self._value(task.x, scope)
                    slot = self._vector(lanes, self.wide)
                    slots.setdefault(task, []).append((slot, lanes))
                    at = f"{slot}, {_lane(lanes)}]"
                    scope.lines.append(f"{at} = {self._reduced(task, at, value)}")
            # All reads of a column come before its stores, so that a result may overwrite an operand.
            stores = [self._store(task, scope) for task in loop.tasks if isinstance(task, Store)]
            scope.lines += stores
            inner += self._loops(lanes, count, scope.lines)
        whole = {t: s for t, s in slots.items() if not t.group}
        grouped = {t: s for t, s in slots.items() if t.group}
        lines += self._start(whole)
        if loop.group:
            ends = _Scope([])
            for task, places in grouped.items():
                ends.lines.append(f"{self._place(task)}[g] = {self._horizontal(task, places, ends)}")
            body = [*per_group.lines, *self._start(grouped), *inner, *ends.lines]
            lines += [f"for g in T.serial(T.int64(0), T.int64({loop.cols // loop.group})):", *_indented(body)]
        else:
            lines += inner
        for task, places in whole.items():
            self.row.known[task, 1, 0] = self._horizontal(task, places, self.row)

    def _place(self, row: Row) -> str:
        """The row-local buffer of a value that is kept."""
        if row not in self.buffers:
            self.buffers[row] = f"kept{len(self.buffers)}"
        return self.buffers[row]

    def _start(self, slots: dict[Reduce, list[tuple[str, int]]]) -> list[str]:
        lines: list[str] = []
        for task, places in slots.items():
            first = tir.number(0.0 if task.function == "sum" else float("-inf"), self.wide)
            for slot, lanes in places:
                vector = [f"for v in T.vectorized(T.int64(0), T.int64({lanes})):", f"    {slot}, v] = {first}"]
                lines += vector if lanes > 1 else [f"{slot}, 0] = {first}"]
        return lines

    def _reduced(self, task: Reduce, x: str, y: str) -> str:
        return tir.binary({"sum": "add", "max": "max"}[task.function], x, y, self.wide)

    def _horizontal(self, task: Reduce, places: list[tuple[str, int]], scope: _Scope) -> str:
        """The lanes of all accumulators as one number, pair by pair."""
        parts = [f"{slot}, {lane}]" for slot, lanes in places for lane in range(lanes)]
        while len(parts) > 1:
            half = (len(parts) + 1) // 2
            joined = [self._let(scope, self._reduced(task, a, b)) for a, b in zip(parts, parts[half:], strict=False)]
            parts = joined + parts[len(joined) : half]
        return parts[0]

    def _store(self, task: Store, scope: _Scope) -> str:
        """The statement that stores; what it needs is computed before."""
        value = self._value(task.value, scope, own=task.kept)
        at = _affine(scope.column, task.stride, task.offset)
        if task.kept is not None:
            return f"{self._place(task.kept)}[{at}] = {value}"
        assert task.result is not None
        result = self.program.results[task.result]
        if result.kind == "column":
            place = f"partial{task.result}[chunk * T.int64({result.cols}) + {at}]"
            return f"{place} = {place} + {value}"
        self.writes.append((task.result, self.moment, task.stride == 1 and task.offset == 0))
        text = tir.store(value, result.dtype, self.wide, functools.partial(self._let, scope))
        return f"y{task.result}[o, i, {at}] = {text}"

    def _value(self, row: Row, scope: _Scope, a: int = 1, b: int = 0, own: Row | None = None) -> str:
        """The name of column a·column + b of `row` in `scope`."""
        if isinstance(row, Constant):
            return tir.number(row.value, self.wide)
        if not row.cols:
            scope, a, b = self.row, 1, 0
        key = (row, a, b)
        if key not in scope.known:
            scope.known[key] = self._compute(row, scope, a, b, own)
        return scope.known[key]

    def _compute(self, row: Row, scope: _Scope, a: int, b: int, own: Row | None) -> str:
        at = _affine(scope.column, a, b)
        if row is not own and self.stages.is_kept(row, self.level):
            return self._let(scope, f"{self._place(row)}[{at}]")

        def of(x: Row) -> str:
            return self._value(x, scope, a, b, own)

        let = functools.partial(self._let, scope)

        match row:
            case Operand(index=index):
                operand = self.program.operands[index]
                self.reads.append((index, self.moment, (a, b) == (1, 0)))
                place = {"row": f"o, i, {at}", "prefix": f"o, {at}", "column": at}[operand.kind]
                return let(tir.load(f"x{index}[{place}]", operand.dtype, self.wide))
            case Reduce():
                return let(f"{self._place(row)}[{at}]")
            case Slice(x=x, start=start, step=step):
                return self._value(x, scope, a * step, b * step + start, own)
            case Repeat(x=x):
                assert scope.outer is not None
                return self._value(x, scope.outer, own=own)
            case Unary(function=function, x=x):
                return let(tir.unary(function, self._named(of(x), scope), self.wide, let))
            case Binary(function=function, x=x, y=y):
                return let(tir.binary(function, of(x), of(y), self.wide))
            case Select(condition=condition, x=x, y=y):
                return let(f"T.Select({of(condition)} != {tir.number(0.0, self.wide)}, {of(x)}, {of(y)})")
            case Round(x=x, dtype=dtype):
                return let(tir.rounded(self._named(of(x), scope), dtype, self.wide, let))
            case _:
                raise AssertionError(f"no rule for {row}")

    def _named(self, text: str, scope: _Scope) -> str:
        """A name for `text`, which may be a constant."""
        return self._let(scope, text) if text.startswith("T.") else text


def _affine(column: str, a: int, b: int) -> str:
    scaled = column if a == 1 else f"({column}) * {a}"
    return scaled if b == 0 else f"{scaled} + {b}"
