"""Run a schedule on paper: with a duration for each action, when everything happens and how long ranks stand idle."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3c.schedule import Cell, Schedule
from dsv3c.schedules._check import execution_order, needs, occupancy


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds, or any other unit, of each kind of action of one stage; `B` is both gradients at once."""

    F: float = 1.0
    I: float = 1.0  # noqa: E741 - the term of the field
    W: float = 1.0
    B: float = 2.0

    def of(self, kind: str) -> float:
        """The duration of an action of this kind."""
        return {"F": self.F, "I": self.I, "W": self.W, "B": self.B}[kind]


@dataclass(frozen=True)
class Durations:
    """How long everything takes. `stages` are in order; `pairs[f][b]` is F of stage f overlapped with B of stage b
    (empty: as long as one after the other), and with I instead of B it is shorter by B − I; `transfer` is from the
    end of an action to where its result is on another rank."""

    stages: tuple[Times, ...]
    pairs: tuple[tuple[float, ...], ...] = ()
    transfer: float = 0.0

    def of(self, cell: Cell) -> float:
        """The duration of a cell."""
        times = [self.stages[a.stage].of(a.kind) for a in cell]
        if len(cell) == 1 or not self.pairs:
            return sum(times)
        forward, backward = cell
        return self.pairs[forward.stage][backward.stage] - self.stages[backward.stage].B + times[1]


def equal_stages(stages: int, times: Times | None = None, pair: float | None = None,
                 transfer: float = 0.0) -> Durations:  # fmt: skip
    """Durations that are the same for every stage; without `pair` a pair takes F + B."""
    one = times or Times()
    row = (one.F + one.B if pair is None else pair,) * stages
    return Durations((one,) * stages, (row,) * stages, transfer)


@dataclass(frozen=True)
class Footprint:
    """Bytes per stage: `weights` is everything that a rank holds for a stage all the time, `chunk` what one
    micro-batch holds from F to its weight gradient."""

    weights: tuple[int, ...]
    chunk: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TimedCell:
    """When a cell ran."""

    cell: Cell
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When everything happened. Per rank: `cells` in order, `busy` time, and `memory`, the most bytes held (empty if
    no footprint was given)."""

    cells: tuple[tuple[TimedCell, ...], ...]
    makespan: float
    busy: tuple[float, ...]
    memory: tuple[int, ...] = ()

    @property
    def bubbles(self) -> tuple[float, ...]:
        """Per rank the time it stands idle."""
        return tuple(self.makespan - b for b in self.busy)

    @property
    def bubble(self) -> float:
        """The idle time of the busiest rank."""
        return self.makespan - max(self.busy)

    @property
    def bubble_fraction(self) -> float:
        """The idle part of all ranks' time."""
        return 1 - sum(self.busy) / (self.makespan * len(self.busy)) if self.makespan else 0.0


def simulate(schedule: Schedule, durations: Durations, footprint: Footprint | None = None) -> Timeline:
    """When each cell of a verified schedule runs if every rank starts it as soon as it can.

    A rank works on one cell at a time in the order of its row; a cell starts when what its actions need is there.
    """
    stages = schedule.stages
    ends: dict[tuple[int, int, str], tuple[int, float]] = {}
    lengths: dict[tuple[tuple[int, str], ...], float] = {}
    free = [0.0] * schedule.ranks
    busy = [0.0] * schedule.ranks
    cells: list[list[TimedCell]] = [[] for _ in free]
    for rank, index in execution_order(schedule):
        cell = schedule.rows[rank][index]
        start = free[rank]
        for a in cell:
            for stage, kind in needs(a, stages):
                source, end = ends[stage, a.micro_batch, kind]
                start = max(start, end if source == rank else end + durations.transfer)
        shape = tuple((a.stage, a.kind) for a in cell)
        if shape not in lengths:
            lengths[shape] = durations.of(cell)
        end = start + lengths[shape]
        for a in cell:
            ends[a.stage, a.micro_batch, "I" if a.kind == "B" else a.kind] = rank, end
        free[rank] = end
        busy[rank] += lengths[shape]
        cells[rank].append(TimedCell(cell, start, end))
    memory = () if footprint is None else memory_held(schedule, footprint)
    return Timeline(tuple(map(tuple, cells)), max(free), tuple(busy), memory)


def memory_held(schedule: Schedule, footprint: Footprint) -> tuple[int, ...]:
    """The most bytes that each rank holds: its stages' weights, and a slot for each chunk that is held at once."""
    chunks = occupancy(schedule).chunks
    return tuple(
        sum(footprint.weights[s] + chunks[rank, s] * footprint.chunk[s] for s in schedule.held(rank))
        for rank in range(schedule.ranks)
    )
