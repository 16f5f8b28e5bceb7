"""How the columns of a row program are cut into blocks of lanes, and how many rows one Triton program takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsv3c.rows import TILE_ROWS, Join, Reduce, Repeat, Row, children, walk
from dsv3c.targets._row_pieces import ELEMENTWISE

LANES = 4096
"""Lanes of a program that may choose: work enough to hide the latency of memory, registers for several values."""
MOST_LANES = 16384
"""A row up to this long is kept in registers; a longer one is read again for every pass."""
LANES_PER_THREAD = 16
SMALLEST_GROUP = 8
"""Runs of columns shorter than this do not shape the lanes of what is not grouped itself."""
TALL_COLUMNS = 64
"""Columns of a program that holds a tile of rows, unless groups of columns are wider."""
TALL_PER_THREAD = 128
"""Numbers of a tile of rows that a thread holds, shared by the pieces that become rows: registers for each."""
VECTOR = 8
"""Neighbouring rows that a thread holds at most, where columns become rows."""
PROGRAMS = 264
"""Programs that share the rows of a sum over all rows, whatever the GPU, so that its bits do not depend on it."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True, slots=True)
class Domain:
    """Columns as a program sees them: `block` lanes of `cols` columns; with `group`, the lanes are pairs (group,
    column in it), each axis padded to a power of two."""

    cols: int
    group: int
    block: int

    @property
    def lanes_per_group(self) -> int:
        return power_of_two(self.group) if self.group else 1

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.block // self.lanes_per_group

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.groups, self.lanes_per_group) if self.group else (self.block,)

    @property
    def exact(self) -> bool:
        """Whether every lane is a column, in every block."""
        return self.cols % self.block == 0 and self.lanes_per_group == max(self.group, 1)

    @property
    def chunks(self) -> int:
        """Blocks that cover the columns."""
        return -(-self.cols // (self.groups * self.group if self.group else self.block))

    def of_groups(self) -> Domain:
        """The domain of one number per group."""
        return Domain(self.cols // self.group, 0, self.groups)


@dataclass(frozen=True, slots=True)
class At:
    """The column that a lane of `domain` looks at: its own after `steps`, each (times, plus, divided by).
    `outside`: it may lie outside the columns of what is looked at."""

    domain: Domain
    steps: tuple[tuple[int, int, int], ...] = ()
    outside: bool = False

    def affine(self, times: int, plus: int) -> At:
        """Looking at times·column + plus."""
        if (times, plus) == (1, 0):
            return self
        if self.steps and self.steps[-1][2] == 1:
            a, b, _ = self.steps[-1]
            merged = (a * times, b * times + plus, 1)
            return replace(self, steps=(*self.steps[:-1], *(() if merged == (1, 0, 1) else (merged,))))
        return replace(self, steps=(*self.steps, (times, plus, 1)))

    def divided(self, by: int) -> At:
        """Looking at column // by."""
        return replace(self, steps=(*self.steps, (1, 0, by)))


def stored_pieces(row: Row, cols: int) -> Iterator[tuple[Row, int, int]]:
    """(expression, first column, columns) of the parts that a result of `cols` columns is stored in."""
    if isinstance(row, Join):
        offset = 0
        for p in row.parts:
            yield p, offset, p.cols
            offset += p.cols
    else:
        yield row, 0, cols


@dataclass(frozen=True, slots=True)
class Tall:
    """What a kernel over tiles of rows has to do: bits of the numbers of its operands in rows, how many pieces have
    columns that become rows, and whether it stores rows as rows beside."""

    operands: tuple[int, ...]
    turned: int
    kept: bool


class Blocks:
    """The lanes of a kernel. `mode`: `split` if every block of columns is a program of its own (no number of the row
    depends on all of it), `whole` if a program holds rows in registers, `loop` if it walks over blocks.

    With `tall`, a program holds a tile of rows and one block of columns of each stored piece; `results` are then those
    that may not be summed up from blocks of columns. `beside` of its rows go to one thread; `vector`, if not 0: so
    many neighbouring columns are loaded at once, whatever their type.
    """

    def __init__(self, results: tuple[Row, ...], widths: tuple[int, ...], may_split: bool,
                 tall: Tall | None = None) -> None:  # fmt: skip
        every = tuple(walk(results))
        self._groups: dict[int, int] = {}
        for row in every:
            for cols, group in ((_reduced(row), _group(row)), (row.cols, _times(row))):
                if group >= SMALLEST_GROUP and power_of_two(group) == group:
                    self._groups[cols] = max(self._groups.get(cols, 0), group)
        reduces = any(isinstance(r, Reduce) and not r.group for r in every)
        wanted = [self._padded(c, self._groups.get(c, 0)) for c in widths]
        wanted += [self._padded(_reduced(r), _group(r)) for r in every if isinstance(r, Reduce)]
        self._chunks = 1
        self.mode = "whole"
        if tall:
            self.mode = "split"
            self._chunks = -(-max(widths) // max([TALL_COLUMNS, *self._groups.values()]))
        elif not reduces and may_split:
            self.mode = "split"
            self._chunks = _chunks(max([1, *widths]))
        elif max(wanted, default=1) > MOST_LANES:
            self.mode = "loop"
        pieces = [self.domain(c, self._groups.get(c, 0)) for c in widths]
        pieces += [self.domain(_reduced(r), _group(r)) for r in every if isinstance(r, Reduce)]
        self.lanes = max((d.block for d in pieces), default=1)
        self.chunks = max((d.chunks for d in pieces), default=1) if self.mode == "split" else 1
        self.rows = TILE_ROWS if tall else max(1, LANES // self.lanes)
        self.warps = min(16, max(1, self.rows * self.lanes // (32 * LANES_PER_THREAD)))
        self.beside, self.vector = 1, 0
        if tall:
            per_thread = max(32, power_of_two(TALL_PER_THREAD // tall.turned + 1) // 2)
            self.warps = min(16, max(4, self.rows * self.lanes // (32 * per_thread)))
            across = max(1, self.lanes * max(tall.operands) // 128)  # threads that load one row, 16 bytes each
            if tall.turned > 1 or not tall.kept:
                self.beside = max(1, min(VECTOR, self.rows * across // (32 * self.warps)))
            if len(set(tall.operands)) > 1:
                self.vector = 128 // max(tall.operands)

    def _padded(self, cols: int, group: int) -> int:
        return power_of_two(-(-cols // group)) * power_of_two(group) if group else power_of_two(cols)

    def domain(self, cols: int, group: int) -> Domain:
        """The lanes for `cols` columns in groups of `group` (0: none)."""
        block = self._padded(cols, group)
        if self.mode == "split":
            block = self._padded(-(-cols // self._chunks), group)
        elif self.mode == "loop":
            block = max(min(block, LANES), power_of_two(group) if group else 1)
        return Domain(cols, group, block)

    def home(self, row: Row, cols: int) -> Domain:
        """The lanes in which to compute all columns of `row`."""
        found = next((r for r in _natural(row) if isinstance(r, Reduce) and r.group), None)
        if found is not None:
            assert isinstance(found, Reduce)
            return self.domain(found.x.cols, found.group).of_groups()
        spread = [r.times for r in _natural(row) if isinstance(r, Repeat) and power_of_two(r.times) == r.times]
        if spread and max(spread) >= SMALLEST_GROUP:
            return self.domain(cols, max(spread))
        return self.domain(cols, self._groups.get(cols, 0))


def _natural(row: Row) -> Iterator[Row]:
    """What `row` is made of column by column."""
    seen: set[Row] = set()
    stack = [row]
    while stack:
        r = stack.pop()
        if r.cols == row.cols and r not in seen:
            seen.add(r)
            if isinstance(r, ELEMENTWISE):
                stack += reversed(children(r))
            else:
                yield r


def _group(row: Row) -> int:
    return row.group if isinstance(row, Reduce) else 0


def _reduced(row: Row) -> int:
    return row.x.cols if isinstance(row, Reduce) else 0


def _times(row: Row) -> int:
    return row.times if isinstance(row, Repeat) else 0


def _chunks(cols: int) -> int:
    """Into how many blocks to cut: as few as leave an eighth of the lanes idle at most, at least one of LANES."""
    block = min(power_of_two(cols), LANES)
    while block > 128 and -(-cols // block) * block * 8 > cols * 9:
        block //= 2
    return -(-cols // block)
