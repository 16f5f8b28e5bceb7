"""A pipeline schedule as data: which chunk each rank works on, in which order, and the text form of that."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from dsv3c.errors import InputError

KINDS = "FIWB"
"""Kinds of an action: forward, input gradient, weight gradient, and both gradients at once."""

MOST_DIGITS = 9
"""A number in a cell has at most so many digits."""

_ACTION = re.compile(rf"([0-9]{{1,{MOST_DIGITS}}})([{KINDS}])([0-9]{{1,{MOST_DIGITS}}})")


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One piece of work on one micro-batch in one stage; `kind` is a letter of `KINDS`. `str` gives `0F7`."""

    stage: int
    kind: str
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


Cell: TypeAlias = tuple[Action, ...]
"""What a rank does at once: one action, or two that overlap, the forward one first."""

Rows: TypeAlias = tuple[tuple[Cell, ...], ...]
"""Per pipeline rank its cells in order."""

Routes: TypeAlias = tuple[tuple[int, ...], ...]
"""`routes[i][stage]` is the pipeline rank of a stage. The micro-batches are shared among the routes in equal runs."""


@dataclass(frozen=True)
class Schedule:
    """What every pipeline rank does, in order. `kind` is the name of the generator, `rows` one row per rank.

    With several `routes` the micro-batches are divided among them in order: with two, the first half takes
    `routes[0]`. Nothing here is checked; `dsv3c.schedules.verify` does that.
    """

    kind: str
    ranks: int
    micro_batches: int
    rows: Rows
    routes: Routes

    @property
    def stages(self) -> int:
        """How many stages the model is divided into."""
        return len(self.routes[0])

    def route_of(self, micro_batch: int) -> int:
        """Index of the route that a micro-batch takes."""
        return micro_batch * len(self.routes) // self.micro_batches

    def rank_of(self, stage: int, micro_batch: int) -> int:
        """The pipeline rank on which a stage works on a micro-batch."""
        return self.routes[self.route_of(micro_batch)][stage]

    def held(self, rank: int) -> tuple[int, ...]:
        """The stages whose weights a pipeline rank holds, ascending."""
        return self._held[rank]

    def holders(self, stage: int) -> tuple[int, ...]:
        """The pipeline ranks that hold the weights of a stage, ascending."""
        return self._holders[stage]

    @cached_property
    def _holders(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted({route[s] for route in self.routes})) for s in range(self.stages))

    @cached_property
    def _held(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in range(self.ranks)]
        for stage, ranks in enumerate(self._holders):
            for rank in ranks:
                found[rank].append(stage)
        return tuple(map(tuple, found))


@dataclass(frozen=True)
class Kind:
    """A way to make schedules.

    name     as in `--schedule`
    doc      one sentence, with its source
    routes   routes(ranks): where the stages lie
    refusal  refusal(ranks, micro_batches): why these are illegal and what to choose, None if they are legal
    rows     rows(ranks, micro_batches): what each rank does, for legal arguments
    auto     whether `auto` may choose it
    """

    name: str
    doc: str
    routes: Callable[[int], Routes]
    refusal: Callable[[int, int], str | None]
    rows: Callable[[int, int], Rows]
    auto: bool = True


def line(ranks: int) -> Routes:
    """Stage s on rank s."""
    return (tuple(range(ranks)),)


def mirrored(ranks: int) -> Routes:
    """Two replicas: stage s on rank s for the first half of the micro-batches, on rank P−1−s for the others."""
    return (tuple(range(ranks)), tuple(range(ranks))[::-1])


def folded(ranks: int) -> Routes:
    """2·P stages, stage s on rank min(s, 2·P−1−s)."""
    return ((*range(ranks), *reversed(range(ranks))),)


def show_cell(cell: Cell) -> str:
    """`0F7`, or `(0F7;7B3)` if two actions overlap."""
    return str(cell[0]) if len(cell) == 1 else f"({';'.join(map(str, cell))})"


def show_csv(schedule: Schedule) -> str:
    """The schedule as text: no header, one row per pipeline rank, its cells separated by commas."""
    return "".join(",".join(map(show_cell, row)) + "\n" for row in schedule.rows)


def parse_csv(text: str, kind: str, where: str = "schedule.csv") -> Schedule:
    """The schedule of `kind` that `show_csv` printed; the number of micro-batches is the highest that occurs, plus 1.

    Blanks around cells and empty cells at the end of a row are passed over. Raises InputError with row and cell
    (both from 1) for what is no cell or names a stage that does not exist; `verify` checks the rest.
    """
    from dsv3c.schedules import find

    lines = text.rstrip().splitlines()
    if not lines:
        raise InputError(f"{where} is empty; it needs one row per pipeline rank")
    routes = find(kind).routes(len(lines))
    known: dict[str, Cell] = {}
    rows = tuple(
        tuple(
            _parse_cell(cell.strip(), known, len(routes[0]), f"{where}, row {r}, cell {c}")
            for c, cell in enumerate(re.sub(r"[\s,]+$", "", row).split(","), 1)
        )
        for r, row in enumerate(lines, 1)
    )
    count = 1 + max(a.micro_batch for row in rows for cell in row for a in cell)
    return Schedule(kind, len(lines), count, rows, routes)


def _parse_cell(text: str, known: dict[str, Cell], stages: int, where: str) -> Cell:
    if text not in known:
        inside = text[1:-1].split(";") if text.startswith("(") and text.endswith(")") else [text]
        found = [_ACTION.fullmatch(part.strip()) for part in inside]
        if not all(found) or (len(inside) != 2 and text.startswith("(")):
            shown = repr(text) if text else "nothing"
            raise InputError(f"{where}: {shown} is no cell; write an action such as 0F7, or a pair such as (0F7;7B3)")
        cell = tuple(Action(int(m[1]), m[2], int(m[3])) for m in found if m)
        for action in cell:
            if action.stage >= stages:
                raise InputError(f"{where}: {action} names stage {action.stage}; the stages are 0 to {stages - 1}")
        known[text] = cell
    return known[text]
