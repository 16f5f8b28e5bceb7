"""The communication of a plan: bytes and order of every message, and plans whose parts do not fit are refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from small import SMALL

from dsv3c import driver, pipeline
from dsv3c.comm import CommPlan, Crossing, Transfer, channels, check, from_json, to_json, transfers_of
from dsv3c.errors import InputError
from dsv3c.models.deepseek_v3 import DEEPSEEK_V3
from dsv3c.ops import REGISTRY
from dsv3c.schedule import Schedule, parse_csv, show_csv
from dsv3c.schedules import generate
from dsv3c.state import State
from dsv3c.targets import find
from dsv3c.targets.nccl import plan_communication

PASSES = "differentiate,shard,eliminate,share,hoist,fuse,eliminate,cut,dualpipe,partition,overlap"
KINDS = ("1f1b", "zb1p", "dualpipe", "dualpipev")


@functools.cache
def compiled(kind: str = "dualpipe", mesh: str = "pp=2,dp=4,ep=4", node: int = 2) -> tuple[State, CommPlan]:
    target = find("cpu")
    job = driver.make_job(
        SMALL, target, kind="train", mesh=mesh, ranks_per_node=node, seq=16, micro_batch=1, global_batch=16,
        precision="fp32", schedule=kind, expert_headroom=1.5, kernels="none", implementations="auto",
        allow_oversize=False, document_end=None, recipe=None,
    )  # fmt: skip
    program = DEEPSEEK_V3.build(SMALL, job, target.expert_alignment(job.dtype))
    state = pipeline.run(State(program, REGISTRY, job, target), pipeline.parse(PASSES)).state
    assert state.schedule is not None
    made = plan_communication(state.program, REGISTRY, state.schedule, job, target.machine, state.overlap)
    return state, made


@pytest.mark.parametrize("kind", KINDS)
def test_every_message_has_two_sides_and_the_bytes_of_what_crosses(kind: str) -> None:
    state, comm = compiled(kind)
    assert state.schedule is not None
    hidden = 16 * SMALL.hidden_size * 4
    for crossing in comm.crossings:
        assert all(size == hidden for _, size in (*crossing.forward, *crossing.backward))
        assert crossing.forward and crossing.backward
    sent = sum(t.sends for row in comm.transfers for t in row)
    apart = sum(
        state.schedule.rank_of(s, m) != state.schedule.rank_of(s + 1, m)
        for s in range(state.schedule.stages - 1)
        for m in range(state.schedule.micro_batches)
    )
    assert sent == 2 * apart  # each way once
    assert sum(map(len, comm.transfers)) == 2 * sent


def test_a_rank_receives_for_a_cell_before_it_sends_what_the_cell_made() -> None:
    schedule = generate("1f1b", 2, 2)
    one = Crossing((("x", 4),), (("d:x", 4),))
    rows = transfers_of(schedule, (one,))
    assert [str(t) for t in rows[0]] == ["0 0F0 send f0 1", "1 0F1 send f0 1", "2 0B0 recv b0 1", "3 0B1 recv b0 1"]
    assert channels(rows) == ("b0", "f0")
    assert transfers_of(schedule, (Crossing((), (("d:x", 4),)),))[0] == tuple(rows[0][2:])


@pytest.mark.parametrize("kind", [*KINDS, "zbv"])
def test_on_a_channel_two_ranks_never_send_both_ways(kind: str) -> None:
    """Transfers of one channel are done in order on both sides: two that face each other would both wait."""
    schedule = generate(kind, 4, 16)
    one = Crossing((("x", 4),), (("d:x", 4),))
    ways: dict[tuple[frozenset[int], str], set[bool]] = {}
    for rank, row in enumerate(transfers_of(schedule, (one,) * (schedule.stages - 1))):
        for t in row:
            ways.setdefault((frozenset((rank, t.peer)), t.channel), set()).add((rank < t.peer) is t.sends)
            if kind == "dualpipe":
                assert t.channel[1:] == str(schedule.route_of(t.action.micro_batch))
    assert len(ways) == 3 * (2 if kind in ("1f1b", "zb1p") else 4)
    assert all(len(found) == 1 for found in ways.values())


def test_groups_and_hops() -> None:
    _, comm = compiled()
    groups = {g.name: g for g in comm.groups}
    assert comm.two_hop and comm.local == 2
    assert (groups["experts"].size, groups["experts"].count) == (4, 2)
    assert (groups["within"].size, groups["across"].size) == (2, 2)
    members = eval(f"[{groups['across'].members.split(',')[0]} for i in range(2)]", {"pp": 1, "dp": 3})
    assert members == [5, 7]
    _, alone = compiled(node=8)
    assert not alone.two_hop and all(e.slow_bytes == 0 < e.fast_bytes for e in alone.exchanges)


def test_rows_among_experts_have_bytes_and_room() -> None:
    state, comm = compiled()
    where = {(e.graph.rpartition("_")[2], e.segment, e.op) for e in comm.exchanges}
    assert {("F", "dispatch", "dispatch"), ("F", "combine", "combine"), ("B", "combine", "dispatch_again")} <= where
    assert all(0 < e.slow_bytes <= 16 * 2 * e.row_bytes for e in comm.exchanges)
    assert comm.room_bytes > 0 and dict(comm.rows)
    assert state.overlap is not None and comm.overlap == state.overlap


def test_reductions_cover_every_trained_weight_once() -> None:
    state, comm = compiled()
    trained = [w for w in state.program.weights if w.group != "state"]
    assert sum(r.bytes for r in comm.reductions) >= sum(w.type.bytes() for w in trained)
    assert {r.size for r in comm.reductions if r.expert} == {2}
    assert {r.size for r in comm.reductions if not r.expert} == {8}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_back_as_it_was(kind: str) -> None:
    _, comm = compiled(kind)
    assert from_json(json.loads(json.dumps(to_json(comm)))) == comm


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.pop("crossings"),
        lambda d: d["transfers"][0].append("12 0X3 recv f0 1"),
        lambda d: d["transfers"].append(7),
        lambda d: d["overlap"]["pairs"][0].update(surprise=1),
        lambda d: d["groups"][0].pop("size"),
        lambda d: d.update(rows=3),
    ],
)
def test_what_is_no_communication_is_refused(spoil: Callable[[dict[str, object]], object]) -> None:
    data = json.loads(json.dumps(to_json(compiled()[1])))
    spoil(data)
    with pytest.raises(InputError, match="is not the communication of a plan"):
        from_json(data)


# ---- what does not fit together --------------------------------------------------------------------------------------


def swapped(schedule: Schedule, rank: int, cell: int) -> Schedule:
    """The schedule read from a CSV in which two neighbouring cells of a rank changed places."""
    rows = [line.split(",") for line in show_csv(schedule).splitlines()]
    rows[rank][cell : cell + 2] = reversed(rows[rank][cell : cell + 2])
    return parse_csv("\n".join(map(",".join, rows)), schedule.kind)


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_actions_are_refused(kind: str) -> None:
    """Any two neighbouring cells of a rank, dependent or not, unless neither sends nor receives anything."""
    state, comm = compiled(kind)
    schedule = state.schedule
    assert schedule is not None
    check(comm, schedule)
    for rank, row in enumerate(schedule.rows):
        silent = set(range(len(row))) - {t.cell for t in comm.transfers[rank]}
        for cell in range(len(row) - 1):
            if row[cell] == row[cell + 1] or {cell, cell + 1} <= silent:
                continue
            with pytest.raises(InputError):
                check(comm, swapped(schedule, rank, cell))


def test_two_dependent_actions_swapped_are_named() -> None:
    state, comm = compiled("1f1b")
    assert state.schedule is not None
    last = swapped(state.schedule, 1, 0)  # the last stage's first F and B
    with pytest.raises(InputError, match="1B0"):
        check(comm, last)


def _with_row(comm: CommPlan, rank: int, row: tuple[Transfer, ...]) -> CommPlan:
    return replace(comm, transfers=tuple(row if i == rank else r for i, r in enumerate(comm.transfers)))


def test_messages_that_the_schedule_does_not_call_for_are_refused() -> None:
    state, comm = compiled()
    assert state.schedule is not None
    first = comm.transfers[0]
    with pytest.raises(InputError, match=r"schedule\.csv and comm\.json disagree on pipeline rank 0"):
        check(_with_row(comm, 0, (first[1], first[0], *first[2:])), state.schedule)
    with pytest.raises(InputError, match=f"has {len(first) - 1} messages"):
        check(_with_row(comm, 0, first[:-1]), state.schedule)
    with pytest.raises(InputError, match=r"comm\.json is for 2 pipeline ranks and 1 stages"):
        check(replace(comm, crossings=()), state.schedule)


def test_other_sizes_or_orders_on_the_two_sides_are_refused() -> None:
    from dsv3c import comm as module

    _, comm = compiled()
    rank, row = 1, list(comm.transfers[1])
    fewer = tuple(t for i, t in enumerate(row) if i != max(i for i, t in enumerate(row) if not t.sends))
    received = [i for i, t in enumerate(row) if not t.sends and t.channel == "f0"]
    row[received[0]], row[received[1]] = row[received[1]], row[received[0]]
    with pytest.raises(InputError, match="on channel f0 pipeline rank 0 sends what 0F0 made where rank 1 awaits"):
        module._check_sides(_with_row(comm, rank, tuple(row)), "p")
    with pytest.raises(InputError, match="which receives"):
        module._check_sides(_with_row(comm, rank, fewer), "p")


def test_messages_that_wait_for_each_other_are_refused() -> None:
    from dsv3c import comm as module

    _, comm = compiled("1f1b")
    stuck = replace(comm, transfers=tuple(tuple(sorted(row, key=lambda t: t.sends)) for row in comm.transfers))
    with pytest.raises(InputError, match="wait for each other for ever: rank"):
        module._check_progress(stuck, "p")
