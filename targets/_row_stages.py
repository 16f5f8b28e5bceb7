"""Turn the expressions of a row program into loops over columns: what is computed when, and what is kept between.

A reduction needs its whole input before anything can read it, so the work on one row falls into levels. Within a
level, everything that runs over the same columns shares one loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
from dsv3c.targets._regions import RegionProgram

CHEAP = 6
"""Work (in additions) that is done again rather than kept in memory across a level."""

LEAST_GROUP = 8
"""Repeated columns fewer than this are kept in memory instead of shaping a loop."""

_WORK = {
    "exp": 20, "sigmoid": 24, "log": 30, "sqrt": 6, "rsqrt": 10, "reciprocal": 5, "power_of_two_above": 6, "div": 5,
    "floor": 2, "half_bits": 6, "half_of_bits": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Store:
    """Column j of `value` goes to column offset + stride·j of result number `result`, or of the buffer of `kept`."""

    value: Row
    cols: int
    offset: int
    stride: int
    result: int | None
    kept: Row | None


Task = Reduce | Store


@dataclass(frozen=True, slots=True)
class Loop:
    """Tasks that run over the same `cols` columns, in groups of `group` (0: no groups)."""

    cols: int
    group: int
    tasks: tuple[Task, ...]


@dataclass(frozen=True, slots=True)
class Stages:
    """The work on one row. `results` are the roots, one per result of the program. At each level first the numbers
    per row of `scalars[level]`, then `loops[level]`. `kept`: row-local buffers and their columns."""

    results: tuple[Row, ...]
    scalars: tuple[tuple[Row, ...], ...]
    loops: tuple[tuple[Loop, ...], ...]
    kept: dict[Row, int]
    level: dict[Row, int]

    def is_kept(self, row: Row, level: int) -> bool:
        """Whether at `level` the value of `row` is read from its buffer."""
        if row not in self.kept:
            return False
        return isinstance(row, STRUCTURAL) or self.level[row] < level


STRUCTURAL = (Join, Interleave, Repeat)


class Simplifier:
    """Gives equal expressions one object, and lets slices reach through joins."""

    def __init__(self) -> None:
        self._done: dict[Row, Row] = {}
        self._known: dict[tuple[object, ...], Row] = {}

    def __call__(self, row: Row) -> Row:
        """The equivalent of `row`, the same object for every equal expression."""
        if row not in self._done:
            parts = tuple(self(c) for c in children(row))
            self._done[row] = self._rebuild(row, parts)
        return self._done[row]

    def _intern(self, new: Row, *key: object) -> Row:
        return self._known.setdefault((type(new).__name__, new.cols, *key), new)

    def _rebuild(self, row: Row, parts: tuple[Row, ...]) -> Row:
        match row:
            case Operand(index=index):
                return self._intern(row, index)
            case Constant(cols=cols, value=value):
                return self._intern(Constant(cols, value), repr(value))
            case Unary(cols=cols, function=f):
                return self._intern(Unary(cols, f, *parts), f, *parts)
            case Binary(cols=cols, function=f):
                return self._intern(Binary(cols, f, *parts), f, *parts)
            case Select(cols=cols):
                return self._intern(Select(cols, *parts), *parts)
            case Round(cols=cols, dtype=dtype):
                return self._intern(Round(cols, parts[0], dtype), parts[0], dtype)
            case Down(cols=cols):
                return self._intern(Down(cols, *parts), *parts)
            case Reduce(cols=cols, function=f, group=group):
                return self._reduce(cols, f, parts[0], group)
            case Slice(cols=cols, start=start, step=step):
                return self._slice(cols, parts[0], start, step)
            case Join(cols=cols):
                return self._join(cols, parts)
            case Interleave(cols=cols):
                return self._intern(Interleave(cols, *parts), *parts)
            case Repeat(cols=cols, times=times):
                if times == 1 or not parts[0].cols:
                    return parts[0]
                return self._intern(Repeat(cols, parts[0], times), parts[0], times)
            case _:
                raise AssertionError(f"no rule for {row}")

    def _reduce(self, cols: int, function: str, x: Row, group: int) -> Row:
        assert x.cols, "a reduction needs columns"
        if isinstance(x, Join) and not group:
            whole = self._reduce(0, function, x.parts[0], 0)
            for part in x.parts[1:]:
                name = {"sum": "add", "max": "max"}[function]
                other = self._reduce(0, function, part, 0)
                whole = self._intern(Binary(0, name, whole, other), name, whole, other)
            return whole
        return self._intern(Reduce(cols, function, x, group), function, x, group)

    def _join(self, cols: int, parts: tuple[Row, ...]) -> Row:
        flat: list[Row] = []
        for p in parts:
            flat += p.parts if isinstance(p, Join) else (p,)
        return flat[0] if len(flat) == 1 else self._intern(Join(cols, tuple(flat)), *flat)

    def _slice(self, cols: int, x: Row, start: int, step: int) -> Row:
        if cols == 1:
            step = 1
        if not x.cols or (start == 0 and step == 1 and cols == x.cols):
            return x
        last = start + (cols - 1) * step
        match x:
            case Constant(value=value):
                return self._intern(Constant(cols, value), repr(value))
            case Slice(x=inner, start=s, step=t):
                return self._slice(cols, inner, s + start * t, step * t)
            case Join(parts=parts):
                base = 0
                for p in parts:
                    if base <= start and last < base + p.cols:
                        return self._slice(cols, p, start - base, step)
                    base += p.cols
            case Interleave(x=a, y=b) if step % 2 == 0 or cols == 1:
                return self._slice(cols, (a, b)[start % 2], start // 2, max(step // 2, 1))
            case Repeat(x=inner, times=times) if step == 1 and start % times == 0 and cols % times == 0:
                part = self._slice(cols // times, inner, start // times, 1)
                return self._intern(Repeat(cols, part, times), part, times)
        return self._intern(Slice(cols, x, start, step), x, start, step)


def plan_stages(program: RegionProgram) -> Stages:
    """Decide the levels, loops and buffers of a row program."""
    simplify = Simplifier()
    results = tuple(simplify(r.row) for r in program.results)
    kept: dict[Row, int] = {}
    while True:
        found = _Attempt(program, results, kept)
        if found.missing is None:
            return found.stages()
        kept[found.missing] = found.missing.cols


class _Attempt:
    """One try with a set of kept values; `missing` is a value that must be kept as well, or None."""

    def __init__(self, program: RegionProgram, results: tuple[Row, ...], kept: dict[Row, int]) -> None:
        self.program, self.results, self.kept = program, results, kept
        self.level: dict[Row, int] = {}
        self.order: list[Row] = []
        for r in results:
            self._visit(r)
        self.tasks: list[list[Task]] = [[] for _ in range(max(self.level.values()) + 1)]
        for row in self.order:
            if isinstance(row, Reduce):
                self.tasks[self.level[row] - 1].append(row)
            elif row in kept:
                level = self.level[row] - (1 if isinstance(row, STRUCTURAL) else 0)
                self.tasks[level] += self._stores(row, row.cols, 0, 1, None, row)
        for index, r in enumerate(results):
            if program.results[index].kind == "scalar":
                continue
            root = r in kept or not isinstance(r, STRUCTURAL)
            level = self.level[r] if root else max(self.level[c] for c in self._leaves(r))
            tasks = self._stores(r, program.results[index].cols, 0, 1, index, None)
            self.tasks[level] += tasks
        self.missing = self._find_missing()

    def _visit(self, row: Row) -> int:
        if row not in self.level:
            below = max((self._visit(c) for c in children(row)), default=0)
            after = isinstance(row, Reduce) or (isinstance(row, STRUCTURAL) and row in self.kept)
            self.level[row] = below + int(after)
            self.order.append(row)
        return self.level[row]

    def _leaves(self, row: Row) -> Iterator[Row]:
        if isinstance(row, (Join, Interleave)) and row not in self.kept:
            for c in children(row):
                yield from self._leaves(c)
        else:
            yield row

    def _stores(self, row: Row, cols: int, offset: int, stride: int, result: int | None,
                into: Row | None) -> list[Task]:  # fmt: skip
        """The stores that write `row`; joins and interleavings fall apart into their parts."""
        inside = row is into or row not in self.kept
        if isinstance(row, Join) and inside:
            tasks: list[Task] = []
            for p in row.parts:
                tasks += self._stores(p, p.cols, offset, stride, result, into)
                offset += p.cols * stride
            return tasks
        if isinstance(row, Interleave) and inside:
            half = cols // 2
            return [
                *self._stores(row.x, half, offset, stride * 2, result, into),
                *self._stores(row.y, half, offset + stride, stride * 2, result, into),
            ]
        return [Store(row, cols, offset, stride, result, into)]

    def _find_missing(self) -> Row | None:
        for level, tasks in enumerate(self.tasks):
            for task in tasks:
                own = task.kept if isinstance(task, Store) else None
                value = task.value if isinstance(task, Store) else task.x
                missing = self._missing(value, level, own, self._group(task), True, set())
                if missing is not None:
                    return missing
        return None

    def _missing(self, row: Row, level: int, own: Row | None, group: int, whole: bool,
                 seen: set[tuple[Row, bool]]) -> Row | None:  # fmt: skip
        """A value below `row` that cannot be computed in place in a loop of `level`. `whole`: columns are those of
        the loop, so that groups coincide."""
        if not row.cols or isinstance(row, Reduce) or self._is_kept(row, level, own) or (row, whole) in seen:
            return None
        seen.add((row, whole))
        if isinstance(row, (Join, Interleave)):
            return row
        if isinstance(row, Repeat):
            return self._missing(row.x, level, own, 0, False, seen) if whole and row.times == group else row
        if not isinstance(row, Slice) and self.level[row] < level and self._work(row, level, own, set()) > CHEAP:
            return row
        for c in children(row):
            missing = self._missing(c, level, own, group, whole and not isinstance(row, Slice), seen)
            if missing is not None:
                return missing
        return None

    def _is_kept(self, row: Row, level: int, own: Row | None) -> bool:
        return row in self.kept and row is not own and (isinstance(row, STRUCTURAL) or self.level[row] < level)

    def _work(self, row: Row, level: int, own: Row | None, seen: set[Row]) -> int:
        """Additions' worth of computing `row` in place."""
        free = not row.cols or isinstance(row, (Reduce, *STRUCTURAL)) or self._is_kept(row, level, own)
        if free or row in seen:
            return 0
        seen.add(row)
        work = 1
        if isinstance(row, (Unary, Binary)):
            work = _WORK.get(row.function, 1)
        elif isinstance(row, Round):
            work = 12
        elif isinstance(row, Slice):
            work = 0
        return work + sum(self._work(c, level, own, seen) for c in children(row))

    def _group(self, task: Task) -> int:
        if isinstance(task, Reduce):
            return task.group or self._repeated(task.x, set())
        value = task.value
        if isinstance(value, Repeat) and (value is task.kept or value not in self.kept):
            return value.times
        return self._repeated(value, set())

    def _repeated(self, row: Row, seen: set[Row]) -> int:
        """The group that a repetition inside `row` asks for, 0 if there is none."""
        if not row.cols or row in self.kept or row in seen or isinstance(row, (Slice, Reduce)):
            return 0
        seen.add(row)
        if isinstance(row, Repeat):
            return row.times if row.times >= LEAST_GROUP else 0
        return next((g for g in (self._repeated(c, seen) for c in children(row)) if g), 0)

    def stages(self) -> Stages:
        scalars: list[list[Row]] = [[] for _ in self.tasks]
        for row in self.order:
            if not row.cols and not isinstance(row, (Operand, Constant, Reduce)):
                scalars[self.level[row]].append(row)
        loops = tuple(tuple(self._merge(tasks)) for tasks in self.tasks)
        return Stages(self.results, tuple(map(tuple, scalars)), loops, dict(self.kept), self.level)

    def _merge(self, tasks: list[Task]) -> Iterator[Loop]:
        found: list[Loop] = []
        for task in tasks:
            cols = task.x.cols if isinstance(task, Reduce) else task.cols
            group = self._group(task)
            for i, loop in enumerate(found):
                if loop.cols == cols and (loop.group == group or not group or not loop.group):
                    found[i] = Loop(cols, loop.group or group, (*loop.tasks, task))
                    break
            else:
                found.append(Loop(cols, group, (task,)))
        return iter(found)
