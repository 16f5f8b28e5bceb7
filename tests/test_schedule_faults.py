"""The verifier of schedules: whatever is wrong is refused, named, and marked in a picture."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3c.errors import InputError
from dsv3c.schedule import Cell, Schedule, parse_csv, show_csv
from dsv3c.schedules import KINDS, execution_order, generate, needs, verify

ONE = generate("1f1b", 4, 6)


def edited(old: str, new: str, kind: str = "1f1b", of: Schedule = ONE) -> Schedule:
    text = show_csv(of)
    assert old in text
    return parse_csv(text.replace(old, new, 1), kind)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (edited("1B3,", ""), "1f1b: 1B3, or 1I3 with a W, is missing; add it to rank 1"),
        (edited("1F2,", ""), "1f1b: 1F2 is missing; add it to rank 1"),
        (edited("1B3", "1I3"), "1f1b: 1W3 is missing; add it to rank 1"),
        (edited("1B3", "1B3,1W3"), "rank 1, cell 11: 1W3 follows 1B3, which makes the weight gradient already"),
        (edited("1B3", "1B2"), "rank 1, cell 10: 1B2 is done twice; take one of them out"),
        (edited("1B3", "1B3,1I3,1W3"), "rank 1, cell 11: 1I3 is done twice"),
        (edited("1B3", "2B3"), "rank 1, cell 10: 2B3 belongs to rank 2"),
        (edited("3F2,3B2", "(3F2;3B2)"), r"the backward of \(3F2;3B2\) needs its forward, so they cannot overlap"),
        (edited("3F2,3B2", "(3B2;3F2)"), "only a forward and then a backward can overlap"),
        (edited("3F2,3B2", "(3F2;3F3),3B2"), "only a forward and then a backward can overlap"),
        (edited("3F2,3B2", "3B2,3F2"), "rank 3, cell 5: 3B2 comes before 3F2, which it needs"),
        (edited("1F0,1F1", "1F1,1F0"), "rank 1, cell 2: 1F0 receives what rank 0 sends first of two, after"),
        (
            edited("0F0,0F1,0F2,0F3,0B0", "0F0,0B0,0F1,0F2,0F3"),
            "deadlock: rank 0 waits before 0B0 for 1B0 of rank 1, rank 1 waits before 1F1 for 0F1 of rank 0",
        ),
        (replace(ONE, rows=ONE.rows[:3]), "3 rows for 4 ranks; write one for each"),
        (replace(ONE, micro_batches=5), "0F5 is no action of 4 stages and 5 micro-batches"),
        (replace(ONE, micro_batches=7), "0F6 is missing; add it to rank 0"),
        (replace(generate("dualpipe", 2, 4), micro_batches=5), "5 micro-batches cannot be divided equally among 2"),
    ],
)  # fmt: skip
def test_a_fault_is_named(schedule: Schedule, message: str) -> None:
    with pytest.raises(InputError, match=message):
        verify(schedule)


def test_a_slower_order_that_can_run_is_let_through() -> None:
    verify(edited("2F0,2F1,2B0", "2F0,2B0,2F1"))


def test_a_sender_waits_until_its_first_message_is_taken() -> None:
    two = "0F0,0F1,1F2,1B2,1F3,1B3,0B0,0B1\n0F2,0F3,1F0,1B0,1F1,1B1,0B2,0B3\n"
    verify(parse_csv(two, "dualpipe"))
    three = "0F0,0F1,0F2,1F3,1B3,1F4,1B4,1F5,1B5,0B0,0B1,0B2\n0F3,0F4,0F5,1F0,1B0,1F1,1B1,1F2,1B2,0B3,0B4,0B5\n"
    message = (
        "dualpipe: deadlock: rank 0 waits before 0F2 until rank 1 takes 0F0, "
        "rank 1 waits before 0F5 until rank 0 takes 0F3; change the order on one of them"
    )
    with pytest.raises(InputError, match=message):
        verify(parse_csv(three, "dualpipe"))


def test_the_picture_marks_the_fault() -> None:
    with pytest.raises(InputError) as failure:
        verify(edited("1F0,1F1", "1F1,1F0"))
    assert str(failure.value).split("\n", 1)[1] == (
        "step    1      2      3    4    5    6    7    8    9    10   11   12\n"
        "rank 0  0F0    0F1    0F2  0F3  0B0  0F4  0B1  0F5  0B2  0B3  0B4  0B5\n"
        "rank 1  >1F1<  >1F0<  1F2  1B0  1F3  1B1  1F4  1B2  1F5  1B3  1B4  1B5\n"
        "rank 2  2F0    2F1    2B0  2F2  2B1  2F3  2B2  2F4  2B3  2F5  2B4  2B5"
    )


def test_the_picture_of_a_long_schedule_shows_the_place() -> None:
    schedule = generate("dualpipe", 16, 120)
    row = [*schedule.rows[9]]
    row[60], row[62] = row[62], row[60]
    with pytest.raises(InputError) as failure:
        verify(replace(schedule, rows=(*schedule.rows[:9], tuple(row), *schedule.rows[10:])))
    lines = str(failure.value).splitlines()
    assert any(line.startswith("rank 9") and ">" in line for line in lines)
    assert len(lines) <= 14 and max(map(len, lines[1:])) < 240


def test_an_order_of_execution_respects_dependencies() -> None:
    for kind in KINDS:
        schedule = generate(kind, 4, 8)
        done: set[tuple[int, int, str]] = set()
        order = execution_order(schedule)
        assert sorted(order) == [(r, i) for r, row in enumerate(schedule.rows) for i in range(len(row))]
        for rank, index in order:
            cell = schedule.rows[rank][index]
            for a in cell:
                assert all((s, a.micro_batch, k) in done for s, k in needs(a, schedule.stages))
            done.update((a.stage, a.micro_batch, "I" if a.kind == "B" else a.kind) for a in cell)


def dependent(first: Cell, second: Cell, stages: int) -> bool:
    keys = {(a.stage, a.micro_batch, "I" if a.kind == "B" else a.kind) for a in first}
    return any((s, b.micro_batch, k) in keys for b in second for s, k in needs(b, stages))


@settings(max_examples=60)
@given(st.data())
def test_two_dependent_cells_of_a_rank_cannot_be_swapped(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    schedule = generate(kind, 4, 8)
    rank = data.draw(st.integers(0, 3))
    row = [*schedule.rows[rank]]
    pairs = [(i, j) for i in range(len(row)) for j in range(i + 1, len(row))
             if dependent(row[i], row[j], schedule.stages)]  # fmt: skip
    i, j = data.draw(st.sampled_from(pairs))
    row[i], row[j] = row[j], row[i]
    with pytest.raises(InputError):
        verify(replace(schedule, rows=(*schedule.rows[:rank], tuple(row), *schedule.rows[rank + 1 :])))


@settings(max_examples=40)
@given(st.data())
def test_nothing_can_be_left_out_or_repeated(data: st.DataObject) -> None:
    schedule = generate(data.draw(st.sampled_from(sorted(KINDS))), 4, 8)
    rank = data.draw(st.integers(0, 3))
    row = schedule.rows[rank]
    at = data.draw(st.integers(0, len(row) - 1))
    changed = row[:at] + row[at + 1 :] if data.draw(st.booleans()) else (*row[: at + 1], *row[at:])
    with pytest.raises(InputError, match=r"missing|twice"):
        verify(replace(schedule, rows=(*schedule.rows[:rank], changed, *schedule.rows[rank + 1 :])))
