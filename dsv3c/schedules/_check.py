"""Prove a schedule before anything runs: every action once, in its place, after what it needs, and no deadlock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

from dsv3c.errors import InputError
from dsv3c.schedule import Action, Schedule, show_cell

Place: TypeAlias = tuple[int, int]
"""(rank, index of a cell in its row)."""

SHOWN_STEPS, SHOWN_RANKS = 12, 12
"""How much of a wrong schedule an error shows."""


@dataclass(frozen=True)
class Occupancy:
    """What each rank holds at most at once, in chunks: one stage's work on one micro-batch.

    `in_flight` counts from F to B or I, `deferred` from I to W, per rank. `chunks[rank, stage]` counts from F to the
    action that makes the weight gradient, both included, an overlapped forward before its backward: so many slots for
    saved values need to be there.
    """

    in_flight: tuple[int, ...]
    deferred: tuple[int, ...]
    chunks: Mapping[tuple[int, int], int]


def verify(schedule: Schedule) -> Occupancy:
    """Check that a schedule can run and does all of the work once; gives what it holds at most.

    Transfers block. A rank stops before a cell until what it receives is there. From one rank to another there is a
    channel for forward and for backward and for each route; it delivers in the order of sending and holds one message:
    a rank that has sent a second one stops until the receiver comes for the first. Raises InputError with a picture,
    rank by step, that marks the fault.
    """
    places = _places(schedule)
    _check_channels(schedule, places)
    _order(schedule, places)
    return occupancy(schedule)


def execution_order(schedule: Schedule) -> list[Place]:
    """All cells in an order in which each comes after those it needs; InputError if there is none."""
    return _order(schedule, _places(schedule))


def needs(action: Action, stages: int) -> Iterator[tuple[int, str]]:
    """(stage, kind F or I) of the actions on the same micro-batch that this one follows; I stands for B, too."""
    if action.kind == "F":
        if action.stage:
            yield action.stage - 1, "F"
    elif action.kind == "W":
        yield action.stage, "I"
    else:
        yield action.stage, "F"
        if action.stage + 1 < stages:
            yield action.stage + 1, "I"


def occupancy(schedule: Schedule) -> Occupancy:
    """What each rank of a right schedule holds at most."""
    in_flight, deferred = [], []
    chunks: dict[tuple[int, int], int] = {}
    for rank, row in enumerate(schedule.rows):
        held = dict.fromkeys(schedule.held(rank), 0)
        most = dict(held)
        flying = waiting = most_flying = most_waiting = 0
        for cell in row:
            for a in cell:
                if a.kind == "F":
                    held[a.stage] += 1
                    most[a.stage] = max(most[a.stage], held[a.stage])
                    flying += 1
                    most_flying = max(most_flying, flying)
                    continue
                flying -= a.kind != "W"
                held[a.stage] -= a.kind != "I"
                waiting += (a.kind == "I") - (a.kind == "W")
                most_waiting = max(most_waiting, waiting)
        in_flight.append(most_flying)
        deferred.append(most_waiting)
        chunks |= {(rank, stage): count for stage, count in most.items()}
    return Occupancy(tuple(in_flight), tuple(deferred), chunks)


_Key: TypeAlias = tuple[int, int, str]
"""(stage, micro-batch, kind) of an action; I stands for B, too."""

_Places: TypeAlias = dict[_Key, Place]
"""Where each action is."""


def _places(schedule: Schedule) -> _Places:
    """Where everything is, once every cell is well formed, on its rank, and everything is there once."""
    stages, count = schedule.stages, schedule.micro_batches
    if count < 1 or count % len(schedule.routes):
        parts = len(schedule.routes)
        raise InputError(f"{schedule.kind}: {count} micro-batches cannot be divided equally among {parts} directions")
    if len(schedule.rows) != schedule.ranks:
        raise InputError(f"{schedule.kind}: {len(schedule.rows)} rows for {schedule.ranks} ranks; write one for each")
    places: _Places = {}
    both: dict[tuple[int, int], Place] = {}
    for rank, row in enumerate(schedule.rows):
        for index, cell in enumerate(row):
            here = rank, index
            if len(cell) != 1 and not (len(cell) == 2 and cell[0].kind == "F" and cell[1].kind in "BI"):
                _fail(schedule, "only a forward and then a backward can overlap", here)
            for a in cell:
                if a.kind not in "FIWB" or not 0 <= a.stage < stages or not 0 <= a.micro_batch < count:
                    _fail(schedule, f"{a} is no action of {stages} stages and {count} micro-batches", here)
                if (right := schedule.rank_of(a.stage, a.micro_batch)) != rank:
                    _fail(schedule, f"{a} belongs to rank {right}", here)
                key = _key(a)
                if key in places:
                    _fail(schedule, f"{a} is done twice; take one of them out", here, places[key])
                places[key] = here
                if a.kind == "B":
                    both[key[:2]] = here
    for stage in range(stages):
        for m in range(count):
            for kind in "FIW":
                there, done = (stage, m, kind) in places, kind == "W" and (stage, m) in both
                if there == done:
                    _missing_or_twice(schedule, Action(stage, kind, m), places, both)
    return places


def _missing_or_twice(schedule: Schedule, a: Action, places: _Places,
                      both: Mapping[tuple[int, int], Place]) -> NoReturn:  # fmt: skip
    key = a.stage, a.micro_batch
    if key in both and a.kind == "W":
        message = (
            f"{a} follows {a.stage}B{a.micro_batch}, which makes the weight gradient already; take one of them out"
        )
        _fail(schedule, message, places[*key, "W"], both[key])
    rank = schedule.rank_of(*key)
    near = [places[*key, k] for k in "FIW" if (*key, k) in places]
    name = f"{a.stage}B{a.micro_batch}, or {a.stage}I{a.micro_batch} with a W," if a.kind == "I" else str(a)
    message = f"{name} is missing; add it to rank {rank}"
    _fail(schedule, message, *(near or [(rank, max(0, len(schedule.rows[rank]) - 1))]), named=False)


def _order(schedule: Schedule, places: _Places) -> list[Place]:
    """The cells as ranks get to them when each runs its row as far as it can, again and again.

    What a rank waits for are events: an action is done (F, I, W), or the rank that receives its result has come to
    the cell that needs it (f, i).
    """
    stages = schedule.stages
    at = [0] * schedule.ranks
    behind: list[list[_Key]] = [[] for _ in at]  # what must have been taken before the next cell can start
    last: dict[tuple[int, int, str, int], _Key] = {}
    happened: set[_Key] = set()
    waiting: dict[_Key, list[int]] = {}
    order: list[Place] = []
    ready = list(range(schedule.ranks))[::-1]

    def happen(event: _Key) -> None:
        happened.add(event)
        ready.extend(waiting.pop(event, ()))

    while ready:
        rank = ready.pop()
        row = schedule.rows[rank]
        while at[rank] < len(row):
            cell = row[at[rank]]
            wanted = [(s, a.micro_batch, k) for a in cell for s, k in needs(a, stages)]
            for s, m, k in wanted:
                if places[s, m, k][0] != rank and (s, m, k.lower()) not in happened:
                    happen((s, m, k.lower()))
            missing = next((event for event in (*behind[rank], *wanted) if event not in happened), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            order.append((rank, at[rank]))
            at[rank] += 1
            behind[rank] = []
            for a in cell:
                key = _key(a)
                happen(key)
                to = _receiver(schedule, key)
                if to is not None and places[to][0] != rank:
                    channel = rank, places[to][0], key[2], schedule.route_of(a.micro_batch)
                    if channel in last:
                        s, m, k = last[channel]
                        behind[rank].append((s, m, k.lower()))
                    last[channel] = key
    if waiting:
        _deadlock(schedule, places, {rank: event for event, ranks in waiting.items() for rank in ranks}, at)
    return order


def _key(a: Action) -> _Key:
    return a.stage, a.micro_batch, "I" if a.kind == "B" else a.kind


def _receiver(schedule: Schedule, key: _Key) -> _Key | None:
    """What needs the result of an action in another stage."""
    stage, micro_batch, kind = key
    other = {"F": stage + 1, "I": stage - 1}.get(kind, -1)
    return (other, micro_batch, kind) if 0 <= other < schedule.stages else None


def _deadlock(schedule: Schedule, places: _Places, wanted: Mapping[int, _Key], at: list[int]) -> NoReturn:
    """Name a circle of ranks that wait for each other; `wanted`: the event for which each waits."""

    def waits_for(rank: int) -> Place:
        stage, micro_batch, kind = wanted[rank]
        key = stage, micro_batch, kind.upper()
        return places[key] if kind.isupper() else places[_receiver(schedule, key) or key]

    rank = min(wanted)
    seen: list[int] = []
    while rank not in seen:
        seen.append(rank)
        rank = waits_for(rank)[0]
    circle = seen[seen.index(rank) :]
    here = [(r, at[r]) for r in circle]
    cells = [show_cell(schedule.rows[r][i]) for r, i in here]
    if len(circle) == 1:
        other = waits_for(rank)
        if other == here[0]:
            _fail(schedule, f"the backward of {cells[0]} needs its forward, so they cannot overlap", here[0])
        _fail(schedule, f"{cells[0]} comes before {_at(schedule, places, wanted[rank])}, which it needs", *here, other)
    told = []
    for r, cell in zip(circle, cells, strict=True):
        stage, micro_batch, kind = wanted[r]
        name = _at(schedule, places, (stage, micro_batch, kind.upper()))
        other_rank = waits_for(r)[0]
        what = f"for {name} of rank {other_rank}" if kind.isupper() else f"until rank {other_rank} takes {name}"
        told.append(f"rank {r} waits before {cell} {what}")
    _fail(schedule, f"deadlock: {', '.join(told)}; change the order on one of them", *here, named=False)


def _at(schedule: Schedule, places: _Places, key: _Key) -> str:
    """The action that stands for `key`."""
    rank, index = places[key]
    return next(str(a) for a in schedule.rows[rank][index] if _key(a) == key)


def _check_channels(schedule: Schedule, places: _Places) -> None:
    """Each channel is received from in the order in which it is sent to."""
    last: dict[tuple[int, int, str, int], tuple[int, Place]] = {}
    for rank, row in enumerate(schedule.rows):
        for index, cell in enumerate(row):
            for a in cell:
                for stage, kind in needs(a, schedule.stages):
                    key = stage, a.micro_batch, kind
                    source, sent = places[key]
                    if source == rank:
                        continue
                    channel = source, rank, kind, schedule.route_of(a.micro_batch)
                    before, other = last.get(channel, (-1, (0, 0)))
                    if sent < before:
                        message = (
                            f"{a} receives what rank {source} sends first of two, after the second was received at "
                            f"{show_cell(schedule.rows[other[0]][other[1]])}; receive in the order of sending"
                        )
                        _fail(schedule, message, (rank, index), other)
                    last[channel] = sent, (rank, index)


def _fail(schedule: Schedule, message: str, *marks: Place, named: bool = True) -> NoReturn:
    rank, index = marks[0]
    where = f"rank {rank}, cell {index + 1}: " if named else ""
    raise InputError(f"{schedule.kind}: {where}{message}\n{picture(schedule, marks)}")


def picture(schedule: Schedule, marks: Iterable[Place]) -> str:
    """The part of the schedule around `marks`, one line per rank, one column per cell; marked ones stand in `> <`."""
    marked = list(marks)
    ranks = sorted({r + d for r, _ in marked for d in (-1, 0, 1) if 0 <= r + d < schedule.ranks})[:SHOWN_RANKS]
    first = max(0, min(marked[0][1] - SHOWN_STEPS // 2, min(i for _, i in marked) - 2))
    if max(i for _, i in marked) >= first + SHOWN_STEPS:
        first = max(0, marked[0][1] - SHOWN_STEPS // 2)
    columns = range(first, first + SHOWN_STEPS)
    rows = [["step", *(str(i + 1) for i in columns)]]
    for rank in ranks:
        row = schedule.rows[rank]
        texts = [show_cell(row[i]) if i < len(row) else "" for i in columns]
        shown = [f">{text}<" if (rank, i) in marked else text for i, text in zip(columns, texts, strict=True)]
        rows.append([f"rank {rank}", *shown])
    while len(rows[0]) > 1 and not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
