"""The communication of a plan as records: who sends what to whom, in which order, and the proof that it fits together.

Ranks differ only by where they stand in the pipeline, so everything is said per pipeline rank, and groups by formulas.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from dsv3c.errors import InputError
from dsv3c.interleave import Overlap, PairOrder, Step
from dsv3c.ir import Phase
from dsv3c.schedule import Action, Schedule, parse_csv
from dsv3c.schedules import verify

if TYPE_CHECKING:
    from dsv3c.plan import Plan

Named: TypeAlias = tuple[tuple[str, int], ...]
"""Tensors by name, with their bytes, in the order in which they are sent."""

_TRANSFER = re.compile(r"(\d+) (\d+)([FIB])(\d+) (recv|send) ([fb]\d+) (\d+)")


@dataclass(frozen=True, slots=True)
class Transfer:
    """One message of one rank: in cell number `cell` of its row, for `action`, to or from pipeline rank `peer`.

    `channel`: see `channel_of`. Text: `12 4F7 recv f0 3`.
    """

    cell: int
    action: Action
    sends: bool
    channel: str
    peer: int

    def __str__(self) -> str:
        return f"{self.cell} {self.action} {'send' if self.sends else 'recv'} {self.channel} {self.peer}"


@dataclass(frozen=True, slots=True)
class Crossing:
    """What crosses from a stage to the next one (`forward`), and from that one back (`backward`)."""

    forward: Named
    backward: Named


@dataclass(frozen=True, slots=True)
class GroupFormula:
    """Ranks that communicate: every group has `size` members, those of rank (pp, dp) are `members`."""

    name: str
    size: int
    count: int
    members: str


@dataclass(frozen=True, slots=True)
class Reduction:
    """A flat buffer whose gradient shards are exchanged and summed, and whose weights are gathered, among `size`
    ranks: on all `holders`, for experts at the same place. Bytes are of the whole buffer, in FP32."""

    name: str
    holders: tuple[int, ...]
    expert: bool
    size: int
    bytes: int


@dataclass(frozen=True, slots=True)
class RowExchange:
    """One node that sends rows among the ranks that share experts, with the bytes that a rank sends by it at balanced
    load: to other nodes and inside its own. `row_bytes`: of one token."""

    graph: str
    segment: str
    op: str
    row_bytes: int
    slow_bytes: int
    fast_bytes: int


@dataclass(frozen=True)
class CommPlan:
    """Everything in comm.json. `schedule`: its kind. `units`: SMs for transfers beside computation, 0 for no limit.

    `local`: ranks of an expert group on one node. `rows`: capacities of symbols that count received and sorted rows.
    `room_bytes`: memory for rows on their way. `crossings[s]`: between stages s and s+1. `transfers`: per pipeline
    rank, in order.
    """

    schedule: str
    two_hop: bool
    units: int
    local: int
    groups: tuple[GroupFormula, ...]
    crossings: tuple[Crossing, ...]
    transfers: tuple[tuple[Transfer, ...], ...]
    reductions: tuple[Reduction, ...]
    exchanges: tuple[RowExchange, ...]
    rows: tuple[tuple[str, int], ...]
    room_bytes: int
    overlap: Overlap | None = None


# ---- the order of messages -------------------------------------------------------------------------------------------


def transfers_of(schedule: Schedule, crossings: Sequence[Crossing]) -> tuple[tuple[Transfer, ...], ...]:
    """The messages of every pipeline rank in order: what a cell receives, then what it sends. What stays on a rank, or
    is nothing, is no message."""
    return tuple(tuple(_row(schedule, crossings, rank)) for rank in range(schedule.ranks))


def _row(schedule: Schedule, crossings: Sequence[Crossing], rank: int) -> Iterator[Transfer]:
    for index, cell in enumerate(schedule.rows[rank]):
        for sends in (False, True):
            for action in cell:
                forward = action.kind == "F"
                other = action.stage + (1 if forward is sends else -1)
                if action.kind == "W" or not 0 <= other < schedule.stages:
                    continue
                crossing = crossings[min(action.stage, other)]
                peer = schedule.rank_of(other, action.micro_batch)
                if peer != rank and (crossing.forward if forward else crossing.backward):
                    way = (rank, peer) if sends else (peer, rank)
                    yield Transfer(index, action, sends, channel_of(forward, *way), peer)


def channel_of(forward: bool, source: int, target: int) -> str:
    """The channel of a message between two pipeline ranks: f0 and b0 where forward goes up, f1 and b1 where it goes
    down. So the messages of a pair on one channel all go one way, and none waits behind one that waits for it."""
    return f"{'f' if forward else 'b'}{int((target > source) is not forward)}"


def channels(transfers: Sequence[Sequence[Transfer]]) -> tuple[str, ...]:
    """The channels that are used, sorted."""
    return tuple(sorted({t.channel for row in transfers for t in row}))


# ---- proof -----------------------------------------------------------------------------------------------------------


def check(comm: CommPlan, schedule: Schedule, where: str = "the plan") -> None:
    """Prove that the messages are those of the schedule, match on both sides, and never wait for each other.

    Raises InputError naming rank and cell: for a schedule that cannot run (see `dsv3c.schedules.verify`), messages
    that are not those that its rows call for, another order or size on the other side, or a deadlock. A rank goes on
    when what it receives is there; a channel between two ranks holds one message.
    """
    verify(schedule)
    if comm.schedule != schedule.kind:
        raise InputError(f"{where}: comm.json is for the schedule {comm.schedule}, not {schedule.kind}; compile again")
    if len(comm.transfers) != schedule.ranks or len(comm.crossings) != schedule.stages - 1:
        raise InputError(
            f"{where}: comm.json is for {len(comm.transfers)} pipeline ranks and {len(comm.crossings) + 1} stages, "
            f"schedule.csv for {schedule.ranks} and {schedule.stages}; compile the model again"
        )
    for rank, (made, called) in enumerate(zip(comm.transfers, transfers_of(schedule, comm.crossings), strict=True)):
        _compare(made, called, rank, where)
    _check_sides(comm, where)
    _check_progress(comm, where)


def _compare(made: Sequence[Transfer], called: Sequence[Transfer], rank: int, where: str) -> None:
    for a, b in zip(made, called, strict=False):
        if a != b:
            raise InputError(
                f"{where}: schedule.csv and comm.json disagree on pipeline rank {rank}: the schedule calls for "
                f"'{b}' where the communication has '{a}'; compile the model again"
            )
    if len(made) != len(called):
        raise InputError(
            f"{where}: pipeline rank {rank} has {len(made)} messages in comm.json, its row of schedule.csv calls for "
            f"{len(called)}; compile the model again"
        )


def _message(comm: CommPlan, t: Transfer) -> tuple[int, int, str, int]:
    """What both sides must agree on: the border, the micro-batch, the direction, and the bytes."""
    forward = t.action.kind == "F"
    border = t.action.stage if forward is t.sends else t.action.stage - 1
    if not 0 <= border < len(comm.crossings):
        return border, t.action.micro_batch, t.channel, -1
    crossing = comm.crossings[border]
    size = sum(n for _, n in (crossing.forward if forward else crossing.backward))
    return border, t.action.micro_batch, t.channel, size


def _check_sides(comm: CommPlan, where: str) -> None:
    """On each directed pair and channel both sides name the same messages in the same order."""
    lanes: dict[tuple[int, int, str], tuple[list[Transfer], list[Transfer]]] = {}
    for rank, row in enumerate(comm.transfers):
        for t in row:
            pair = (rank, t.peer) if t.sends else (t.peer, rank)
            lanes.setdefault((*pair, t.channel), ([], []))[not t.sends].append(t)
    for (source, target, channel), (sent, received) in sorted(lanes.items()):
        for a, b in zip(sent, received, strict=False):
            if _message(comm, a) != _message(comm, b):
                raise InputError(
                    f"{where}: on channel {channel} pipeline rank {source} sends what {a.action} made where rank "
                    f"{target} awaits what {b.action} reads; compile the model again"
                )
        if len(sent) != len(received):
            raise InputError(
                f"{where}: on channel {channel} pipeline rank {source} sends {len(sent)} messages to rank {target}, "
                f"which receives {len(received)}; compile the model again"
            )


def _check_progress(comm: CommPlan, where: str) -> None:
    """Run all rows side by side until all are done, or none can go on."""
    held: dict[tuple[int, int, str], int] = {}
    at = [0] * len(comm.transfers)
    ready = deque(range(len(at)))
    while ready:
        rank = ready.popleft()
        row = comm.transfers[rank]
        while at[rank] < len(row):
            t = row[at[rank]]
            lane = (rank, t.peer, t.channel) if t.sends else (t.peer, rank, t.channel)
            if held.get(lane, 0) == t.sends:
                break
            held[lane] = int(t.sends)
            at[rank] += 1
            if t.peer not in ready:
                ready.append(t.peer)
    stuck = [r for r, row in enumerate(comm.transfers) if at[r] < len(row)]
    if stuck:
        told = ", ".join(f"rank {r} at '{comm.transfers[r][at[r]]}'" for r in stuck[:4])
        raise InputError(f"{where}: its messages wait for each other for ever: {told}; compile the model again")


# ---- comm.json -------------------------------------------------------------------------------------------------------


def to_json(comm: CommPlan) -> dict[str, Any]:
    """The contents of comm.json."""
    return {
        **{k: v for k, v in _plain(comm).items() if k not in ("transfers", "overlap", "rows")},
        "channels": list(channels(comm.transfers)),
        "rows": dict(comm.rows),
        "transfers": [[str(t) for t in row] for row in comm.transfers],
        "overlap": None if comm.overlap is None else {
            "communication_units": comm.overlap.communication_units,
            "pairs": [
                {**{k: v for k, v in asdict(p).items() if k != "steps"},
                 "steps": [f"{s.which} {s.phase.value} {s.segment}" for s in p.steps]}
                for p in comm.overlap.pairs
            ],
        },
    }  # fmt: skip


def _plain(comm: CommPlan) -> dict[str, Any]:
    """The fields as JSON knows them, all but those of other records."""
    return {
        "schedule": comm.schedule, "two_hop": comm.two_hop, "units": comm.units, "local": comm.local,
        "room_bytes": comm.room_bytes,
        "groups": [asdict(g) for g in comm.groups],
        "crossings": [{"forward": [list(x) for x in c.forward], "backward": [list(x) for x in c.backward]}
                      for c in comm.crossings],
        "reductions": [{**asdict(r), "holders": list(r.holders)} for r in comm.reductions],
        "exchanges": [asdict(e) for e in comm.exchanges],
    }  # fmt: skip


def from_json(data: Mapping[str, Any], where: str = "comm.json") -> CommPlan:
    """The record that `to_json` wrote. Raises InputError if it is something else."""
    try:
        return CommPlan(
            str(data["schedule"]), bool(data["two_hop"]), int(data["units"]), int(data["local"]),
            tuple(GroupFormula(**g) for g in data["groups"]),
            tuple(Crossing(_named(c["forward"]), _named(c["backward"])) for c in data["crossings"]),
            tuple(tuple(map(_transfer, row)) for row in data["transfers"]),
            tuple(Reduction(**{**r, "holders": tuple(r["holders"])}) for r in data["reductions"]),
            tuple(RowExchange(**e) for e in data["exchanges"]),
            tuple(data["rows"].items()), int(data["room_bytes"]), _overlap(data["overlap"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: is not the communication of a plan ({error}); compile the model again") from None


def _named(values: Sequence[Sequence[Any]]) -> Named:
    return tuple((str(name), int(size)) for name, size in values)


def _transfer(text: str) -> Transfer:
    found = _TRANSFER.fullmatch(text)
    if found is None:
        raise ValueError(f"'{text}' is no message")
    cell, stage, kind, micro_batch, way, channel, peer = found.groups()
    return Transfer(int(cell), Action(int(stage), kind, int(micro_batch)), way == "send", channel, int(peer))


def _overlap(data: Mapping[str, Any] | None) -> Overlap | None:
    if data is None:
        return None
    pairs = []
    for p in data["pairs"]:
        steps = (text.split(" ", 2) for text in p["steps"])
        pairs.append(PairOrder(**{**p, "steps": tuple(Step(w, Phase(x), name) for w, x, name in steps)}))
    return Overlap(int(data["communication_units"]), tuple(pairs))


def division(plan: Plan) -> tuple[Schedule, CommPlan]:
    """The schedule and the communication of a plan for many ranks, proven to fit together.

    Raises InputError if the plan has none, a dependency is not met, a message has no counterpart, or the ranks would
    wait for each other.
    """
    if not plan.schedule or not plan.comm:
        raise InputError(
            f"the passes of this plan, '{plan.pipeline}', do not divide it among its {plan.job.mesh.world} ranks; "
            "compile it without -p"
        )
    comm = from_json(plan.comm)
    schedule = parse_csv(plan.schedule, comm.schedule)
    verify(schedule)
    check(comm, schedule)
    return schedule, comm
