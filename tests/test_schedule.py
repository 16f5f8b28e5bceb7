"""Schedules: their text, every kind against its published figures and against torch, and the simulator."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3c.errors import InputError
from dsv3c.schedule import Action, Schedule, folded, line, mirrored, parse_csv, show_cell, show_csv
from dsv3c.schedules import (
    KINDS,
    Durations,
    Footprint,
    Times,
    choose,
    equal_stages,
    generate,
    needs,
    refusal,
    register,
    simulate,
    verify,
)

PUBLISHED = (Path(__file__).parent / "schedules" / "dualpipe_8_20.csv").read_text(encoding="utf-8")
"""DualPipe with 8 stages and 20 micro-batches as its authors' code orders it."""


# ---- text -----------------------------------------------------------------------------------------------------------


def test_cells_are_short_words() -> None:
    forward, backward = Action(0, "F", 7), Action(7, "B", 3)
    assert show_cell((forward,)) == "0F7"
    assert show_cell((forward, backward)) == "(0F7;7B3)"
    assert forward < backward


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_text_round_trip(kind: str) -> None:
    schedule = generate(kind, 4, 10)
    text = show_csv(schedule)
    assert parse_csv(text, kind) == schedule
    assert text.count("\n") == 4 and text.endswith("\n")
    loose = text.replace(",", " , ").replace("\n", ",,\r\n")  # as a spreadsheet writes it back
    assert parse_csv(loose, kind) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "s.csv is empty; it needs one row per pipeline rank"),
        ("0F0,0X0\n", "s.csv, row 1, cell 2: '0X0' is no cell; write an action such as 0F7"),
        ("0F0,,0B0\n", "s.csv, row 1, cell 2: nothing is no cell"),
        ("0F0\n\n0B0\n", "s.csv, row 2, cell 1: nothing is no cell"),
        ("0F0\n(1F0;1B0;1W0)\n", r"s.csv, row 2, cell 1: '\(1F0;1B0;1W0\)' is no cell"),
        ("(0F0)\n", "is no cell"),
        ("0F0;0B0\n", "is no cell"),
        ("0F٣\n", "is no cell"),
        ("0F0,0B9999999999\n", "is no cell"),
        ("0F0,1F0\n", "s.csv, row 1, cell 2: 1F0 names stage 1; the stages are 0 to 0"),
    ],
)
def test_wrong_text_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_csv(text, "1f1b", "s.csv")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r"'dualpip' is unknown; did you mean 'dualpipe'\?"):
        parse_csv("0F0\n", "dualpip")


# ---- where stages lie -----------------------------------------------------------------------------------------------


def test_places_of_stages() -> None:
    dualpipe, folded_one, straight = generate("dualpipe", 4, 8), generate("dualpipev", 4, 8), generate("1f1b", 4, 8)
    assert (dualpipe.stages, folded_one.stages, straight.stages) == (4, 8, 4)
    assert [dualpipe.rank_of(1, m) for m in range(8)] == [1] * 4 + [2] * 4
    assert [folded_one.rank_of(s, 0) for s in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert dualpipe.held(0) == (0, 3) and dualpipe.held(2) == (1, 2)
    assert dualpipe.holders(3) == (0, 3) and dualpipe.holders(1) == (1, 2)
    assert folded_one.held(1) == (1, 6) and folded_one.holders(6) == (1,)
    assert straight.held(2) == (2,) and straight.holders(2) == (2,)
    assert (line(2), mirrored(2), folded(2)) == (((0, 1),), ((0, 1), (1, 0)), ((0, 1, 1, 0),))


@pytest.mark.parametrize(
    ("kind", "ranks", "count", "reason"),
    [
        ("dualpipe", 3, 12, "an even number of ranks, at least 2"),
        ("dualpipe", 1, 12, "an even number of ranks, at least 2"),
        ("dualpipe", 4, 6, r"at least 2 per rank \(8\)"),
        ("dualpipe", 4, 9, "an even number of micro-batches"),
        ("dualpipev", 4, 7, r"at least 2 micro-batches per rank \(8\)"),
        ("zbv", 4, 6, "at least 7 micro-batches"),
        ("1f1b", 0, 4, "at least 1 rank and 1 micro-batch"),
        ("zb1p", 4, 0, "at least 1 rank and 1 micro-batch"),
        ("1f1b", 100_000, 100_000, "take fewer micro-batches"),
    ],
)
def test_illegal_numbers_are_refused(kind: str, ranks: int, count: int, reason: str) -> None:
    with pytest.raises(InputError, match=f"{kind} on {ranks} ranks with {count} micro-batches: .*{reason}"):
        generate(kind, ranks, count)


@pytest.mark.parametrize("kind", ["1f1b", "zb1p"])
@pytest.mark.parametrize(("ranks", "count"), [(1, 1), (1, 5), (2, 1), (3, 2), (5, 3), (7, 20)])
def test_any_numbers_for_schedules_of_one_direction(kind: str, ranks: int, count: int) -> None:
    verify(generate(kind, ranks, count))


def test_one_rank_takes_turns() -> None:
    assert show_csv(generate("1f1b", 1, 3)) == "0F0,0B0,0F1,0B1,0F2,0B2\n"
    assert show_csv(generate("zb1p", 1, 2)) == "0F0,0I0,0W0,0F1,0I1,0W1\n"


def test_a_kind_has_one_name() -> None:
    with pytest.raises(InputError, match="'1f1b' is registered twice"):
        register(SimpleNamespace(name="1f1b"))  # type: ignore[arg-type]


# ---- published figures ----------------------------------------------------------------------------------------------


def test_dualpipe_is_the_published_one() -> None:
    schedule = generate("dualpipe", 8, 20)
    assert show_csv(schedule) == PUBLISHED
    timeline = simulate(schedule, equal_stages(8, Times(1, 1, 1, 2), 3))
    assert timeline.makespan == 66
    assert timeline.busy == (60,) * 8
    assert verify(schedule).in_flight == (9,) * 8


def numbers(ranks: int) -> list[int]:
    return sorted({2 * ranks, 2 * ranks + 2, 3 * ranks, 120})


@pytest.mark.parametrize("ranks", range(2, 33, 2))
@pytest.mark.parametrize("kind", sorted(k.name for k in KINDS.values() if k.auto))
def test_every_schedule_can_run_and_holds_what_is_published(kind: str, ranks: int) -> None:
    for count in numbers(ranks):
        held = verify(generate(kind, ranks, count))
        chunks = [sum(n for (r, _), n in held.chunks.items() if r == rank) for rank in range(ranks)]
        if kind == "dualpipe":
            assert held.in_flight == (ranks + 1,) * ranks
            assert held.deferred == tuple(min(r, ranks - 1 - r) + 1 for r in range(ranks))
        elif kind == "dualpipev":
            assert held.in_flight == (2 * ranks + 1,) * ranks, "of stages half as long"
            assert held.deferred == tuple(range(1, ranks + 1))
        else:
            assert held.in_flight == tuple(range(ranks, 0, -1))
            assert held.deferred == (tuple(range(1, ranks + 1)) if kind == "zb1p" else (0,) * ranks)
            assert chunks == [ranks] * ranks if kind == "zb1p" else [*range(ranks, 0, -1)], "as much as rank 0 of 1F1B"


@pytest.mark.parametrize("kind", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
@pytest.mark.parametrize(("ranks", "count"), [(2, 4), (4, 8), (6, 14), (8, 24), (16, 32), (16, 120), (32, 64)])
def test_bubbles_are_as_published(kind: str, ranks: int, count: int) -> None:
    for f, pair in ((1, 3), (2, 6)):
        i = w = f  # the formulas are exact where these are equal
        b = i + w
        schedule = generate(kind, ranks, count)
        timeline = simulate(schedule, equal_stages(schedule.stages, Times(f, i, w, b), pair))
        bubble = {
            "1f1b": (ranks - 1) * (f + b),
            "zb1p": (ranks - 1) * (f + b - 2 * w),
            "dualpipe": (ranks // 2 - 1) * (pair + b - 3 * w),
            "dualpipev": (ranks - 1) * (pair + b - 3 * w),
        }[kind]
        assert timeline.bubbles == (bubble,) * ranks
        assert timeline.bubble == bubble
        assert timeline.bubble_fraction == pytest.approx(bubble / timeline.makespan)


# ---- torch ----------------------------------------------------------------------------------------------------------


def torch_rows(name: str, ranks: int, stages_a_rank: int, count: int) -> list[list[str]]:
    """The rows of a schedule class of torch, without the empty cells that it shows bubbles by."""
    from torch.distributed.pipelining import schedules

    rounds = max(1, count // ranks)
    fields = SimpleNamespace(
        pp_group_size=ranks, num_stages=ranks * stages_a_rank, n_local_stages=stages_a_rank, _n_microbatches=count,
        microbatches_per_round=count // rounds,
    )  # fmt: skip
    rows = [getattr(schedules, name)._calculate_single_rank_operations(fields, rank) for rank in range(ranks)]
    return [
        [
            show_cell(tuple(Action(x.stage_index, x.computation_type.value, x.microbatch_index) for x in parts))
            for parts in (a.sub_actions or (a,) for a in row if a is not None)
        ]
        for row in rows
    ]


@pytest.mark.parametrize(
    ("kind", "name", "stages", "sizes"),
    [
        ("dualpipev", "ScheduleDualPipeV", 2, [(2, 4), (2, 5), (4, 8), (4, 9), (6, 12), (8, 20), (16, 120)]),
        ("zbv", "ScheduleZBVZeroBubble", 2, [(1, 1), (2, 3), (2, 4), (4, 7), (4, 8), (6, 13), (8, 20), (16, 120)]),
        ("zb1p", "ScheduleInterleavedZeroBubble", 1, [(2, 4), (4, 8), (8, 24), (16, 112)]),
    ],
)
def test_rows_are_those_of_torch(kind: str, name: str, stages: int, sizes: list[tuple[int, int]]) -> None:
    for ranks, count in sizes:
        expected = torch_rows(name, ranks, stages, count)
        assert [[show_cell(c) for c in row] for row in generate(kind, ranks, count).rows] == expected


# ---- simulator ------------------------------------------------------------------------------------------------------


def slow_makespan(schedule: Schedule, durations: Durations) -> float:
    """The time at which all is done, found by raising start times until nothing starts too early."""
    start = {(r, i): 0.0 for r, row in enumerate(schedule.rows) for i in range(len(row))}
    where = {(a.stage, a.micro_batch, "I" if a.kind == "B" else a.kind): (r, i)
             for r, row in enumerate(schedule.rows) for i, cell in enumerate(row) for a in cell}  # fmt: skip

    def end(place: tuple[int, int]) -> float:
        return start[place] + durations.of(schedule.rows[place[0]][place[1]])

    changed = True
    while changed:
        changed = False
        for r, i in start:
            least = [end((r, i - 1))] if i else [0.0]
            for a in schedule.rows[r][i]:
                for s, k in needs(a, schedule.stages):
                    before = where[s, a.micro_batch, k]
                    least.append(end(before) + (durations.transfer if before[0] != r else 0.0))
            if max(least) > start[r, i]:
                start[r, i], changed = max(least), True
    return max(map(end, start))


@settings(max_examples=25)
@given(st.data())
def test_uneven_stages_take_what_their_dependencies_say(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    ranks = data.draw(st.sampled_from([2, 4]))
    schedule = generate(kind, ranks, data.draw(st.sampled_from([8, 10])))
    time = st.integers(0, 9)
    stages = tuple(Times(*(data.draw(time) for _ in "FIWB")) for _ in range(schedule.stages))
    pairs = tuple(tuple(9.0 + f.F + b.B for b in stages) for f in stages) if data.draw(st.booleans()) else ()
    durations = Durations(stages, pairs, data.draw(time))
    timeline = simulate(schedule, durations)
    assert timeline.makespan == slow_makespan(schedule, durations)
    for row, busy in zip(timeline.cells, timeline.busy, strict=True):
        assert sum(t.end - t.start for t in row) == busy
        assert all(a.end <= b.start for a, b in pairwise(row))


def test_time_of_a_pair() -> None:
    durations = Durations((Times(1, 2, 3, 5), Times(4, 4, 4, 8)), ((5.0, 8.0), (7.0, 9.0)))
    forward, both, own = Action(1, "F", 0), Action(0, "B", 1), Action(0, "I", 1)
    assert durations.of((forward, both)) == 7.0
    assert durations.of((forward, own)) == 4.0, "without the weight gradient it is shorter by as much"
    assert Durations(durations.stages).of((forward, both)) == 9.0


def test_nothing_takes_time() -> None:
    timeline = simulate(generate("1f1b", 2, 2), equal_stages(2, Times(0, 0, 0, 0)))
    assert timeline.makespan == 0 and timeline.bubble_fraction == 0


def test_memory_is_weights_and_slots_for_chunks() -> None:
    timeline = simulate(generate("1f1b", 3, 6), equal_stages(3), Footprint((100, 200, 300), (1, 2, 3)))
    assert timeline.memory == (103, 204, 303)
    mirror = simulate(generate("dualpipe", 2, 4), equal_stages(2), Footprint((100, 200), (1, 10)))
    held = verify(generate("dualpipe", 2, 4)).chunks
    assert mirror.memory == tuple(300 + held[r, 0] + 10 * held[r, 1] for r in (0, 1))


# ---- auto -----------------------------------------------------------------------------------------------------------


def test_auto_takes_the_shortest() -> None:
    choice = choose(4, 8, lambda stages: equal_stages(stages, Times(*(4 / stages * x for x in (1, 1, 1, 2)))))
    assert choice.schedule.kind == "dualpipe"
    assert [c.kind for c in choice.candidates] == ["1f1b", "dualpipe", "dualpipev", "zb1p"], "zbv is for comparison"
    assert choice.timeline.makespan == min(c.timeline.makespan for c in choice.candidates if c.timeline)


def test_auto_stays_within_memory() -> None:
    def footprint(stages: int) -> Footprint:
        return Footprint((80 * 4 // stages,) * stages, (1,) * stages)

    choice = choose(4, 8, equal_stages, footprint, 100)
    dualpipe = next(c for c in choice.candidates if c.kind == "dualpipe")
    assert dualpipe.refusal is not None and "GiB on a rank" in dualpipe.refusal
    assert choice.schedule.kind == "zb1p"
    with pytest.raises(InputError, match="no schedule is possible: 1f1b: it needs"):
        choose(4, 8, equal_stages, footprint, 50)


def test_auto_passes_over_what_does_not_exist() -> None:
    choice = choose(3, 4, equal_stages)
    assert choice.schedule.kind == "zb1p"
    refused = {c.kind: c.refusal for c in choice.candidates if c.schedule is None}
    assert refused == {kind: refusal(kind, 3, 4) for kind in ("dualpipe", "dualpipev")}


def test_one_rank_folded_overlaps_forward_with_backward() -> None:
    """With experts on several ranks and no pipeline, this is what there is to hide an exchange behind."""
    schedule = generate("dualpipev", 1, 6)
    verify(schedule)
    assert sum(len(cell) == 2 for cell in schedule.rows[0]) == 9
