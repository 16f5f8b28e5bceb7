"""Which rank is named when ranks stop: from where each of them says that it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv3c.runtime.watch import Place, awaited, first_to_say, sentence, standing_still
from dsv3c.schedules import generate

AT = Place(step=7, cell=3, text="0F3", still=60.0, limit=45.0)
WAITING = replace(AT, waits=True)


@pytest.mark.parametrize(
    ("places", "named"),
    [
        ([WAITING, AT, WAITING], 1),
        ([AT, AT, AT], None),  # all compute: a slow step
        ([WAITING, replace(AT, still=44.0), WAITING], None),  # it may yet come
        ([WAITING, replace(AT, still=60.0, limit=300.0), WAITING], None),  # its steps took minutes before
        ([WAITING, replace(AT, limit=0.0), WAITING], None),  # the first step, or no step: any time
        ([WAITING, replace(WAITING, still=2.0), WAITING], None),  # one goes on
        ([WAITING, replace(WAITING, step=6), WAITING], 1),  # all wait for each other: the one behind
        ([WAITING, replace(AT, step=6), replace(AT, step=7)], 1),
    ],
)
def test_a_rank_that_stands_still_is_named_only_if_others_wait_too_long(places: list[Place], named: int | None) -> None:
    assert standing_still(dict(enumerate(places))) == named


def test_the_action_that_others_wait_for() -> None:
    schedule = generate("1f1b", 2, 4)  # rank 1: 1F0 1B0 1F1 ...; rank 0: 0F0 0F1 0B0 ...
    rows = [[str(c[0]) for c in row] for row in schedule.rows]
    waiting = replace(AT, cell=rows[0].index("0B0"), text="0B0")
    assert awaited(schedule, 1, 1, {0: waiting}) == "1B0"
    assert awaited(schedule, 1, 0, {1: replace(AT, cell=rows[1].index("1F2"), text="1F2")}) == "0F2"
    beside = replace(AT, cell=rows[1].index("1F2"), text="1F2")
    assert awaited(schedule, 2, 3, {2: beside}) == "1F2", "ranks of one pipeline position execute the same cells"
    assert awaited(schedule, 1, 1, {0: replace(AT, cell=0, text="0F0")}) == "", "it waits for nobody"
    ended = replace(AT, cell=len(rows[0]), text="the sum of the gradients")
    assert awaited(schedule, 1, 1, {0: ended}) == ""


def test_the_sentence() -> None:
    others = {0: AT, 2: replace(AT, step=8)}
    assert sentence(1, AT, others, "1F2", True) == "rank 1 does not answer at step 8 in 1F2, so all ranks stop"
    broken = {0: replace(AT, broken=True)}
    assert sentence(1, AT, broken, "", True) == "rank 1 stopped at step 7 in 0F3, so all ranks stop"
    assert sentence(1, AT, others, "", False) == "rank 1 stands still at step 8 in 0F3, so all ranks stop"


def test_one_process_says_everything() -> None:
    assert first_to_say("x", {}) and first_to_say("x", {"WORLD_SIZE": "2", "RANK": "1"})
