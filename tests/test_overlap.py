"""Overlap: the search finds the best of all orders, no worse than the published one, and the machine changes it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from dsv3c.interleave import BACKWARD, FORWARD, Placed, Step, Work, behind, best_order, hidden, picture, placed, span
from dsv3c.ir import Phase

ATTENTION_F, DISPATCH_F, MLP_F, COMBINE_F = (
    Step(FORWARD, Phase.F, n) for n in ("attention", "dispatch", "mlp", "combine")
)
COMBINE_B, MLP_B, DISPATCH_B, ATTENTION_B = (
    Step(BACKWARD, Phase.B, n) for n in ("combine", "mlp", "dispatch", "attention")
)
MLP_W, ATTENTION_W = (Step(BACKWARD, Phase.W, n) for n in ("mlp", "attention"))

NEEDS = {
    ATTENTION_F: (), DISPATCH_F: (ATTENTION_F,), MLP_F: (DISPATCH_F,), COMBINE_F: (MLP_F,),
    COMBINE_B: (), MLP_B: (COMBINE_B,), DISPATCH_B: (MLP_B,), ATTENTION_B: (DISPATCH_B,),
    MLP_W: (MLP_B,), ATTENTION_W: (ATTENTION_B,),
}  # fmt: skip
PUBLISHED = (
    COMBINE_B, ATTENTION_F, MLP_B, DISPATCH_F, DISPATCH_B, MLP_W, MLP_F, ATTENTION_B, ATTENTION_W, COMBINE_F,
)  # fmt: skip
"""The order in the published trace of one overlapped pair."""


def pair(seed: int) -> list[Work]:
    rng = random.Random(seed)
    comm = ("dispatch", "combine")
    return [Work(s, rng.choice((0.5, 1.0, 2.0, rng.random())), s.segment in comm, n) for s, n in NEEDS.items()]


def in_order(works: Sequence[Work], steps: Sequence[Step]) -> list[Work]:
    table = {w.step: w for w in works}
    return [table[s] for s in steps]


def test_two_streams_each_keep_their_order() -> None:
    a, b, c = (
        Work(Step(FORWARD, Phase.F, "a"), 2.0, False, ()),
        Work(Step(FORWARD, Phase.F, "b"), 3.0, True, (Step(FORWARD, Phase.F, "a"),)),
        Work(Step(BACKWARD, Phase.B, "c"), 1.0, False, ()),
    )
    assert placed([a, b, c]) == [Placed(a, 0.0, 2.0), Placed(b, 2.0, 5.0), Placed(c, 2.0, 3.0)]
    assert placed([c, a, b])[-1] == Placed(b, 3.0, 6.0)
    assert hidden([a, b, c], 1) == pytest.approx(1 / 3)


def test_the_next_pair_follows_layer_by_layer() -> None:
    f, w = Work(Step(FORWARD, Phase.F, "f"), 1.0, True, ()), Work(Step(BACKWARD, Phase.W, "w"), 5.0, False, ())
    b = Work(Step(BACKWARD, Phase.B, "b"), 1.0, False, ())
    second = placed([f, b, w], rows=2)[3:]
    assert [p.start for p in second] == [1.0, 6.0, 7.0]  # W holds up its stream, but nothing waits for its result


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rows", [1, 3])
def test_no_order_is_better_than_the_one_found(seed: int, rows: int) -> None:
    """Against all orders of two shorter layers, written down a second time."""
    works = [w for w in pair(seed) if w.step not in (ATTENTION_F, DISPATCH_F, ATTENTION_W, ATTENTION_B)]
    kept = {w.step for w in works}
    works = [replace(w, needs=tuple(s for s in w.needs if s in kept)) for w in works]
    index = {w.step: i for i, w in enumerate(works)}
    legal = [
        order for order in itertools.permutations(works)
        if all(order.index(works[index[s]]) < order.index(w) for w in works for s in w.needs)
    ]  # fmt: skip
    best = min(span(order, rows) for order in legal)
    _, order, seconds = best_order([works], rows)
    assert seconds * rows == pytest.approx(best)
    assert span(order, rows) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_at_least_as_good_as_the_published_order(seed: int) -> None:
    works = pair(seed)
    _, _, seconds = best_order([works], 4)
    assert seconds <= span(in_order(works, PUBLISHED), 4) / 4 * (1 + 1e-9)


def test_the_published_order_is_found_where_nothing_is_better() -> None:
    """With computation and communication of like length it hides nearly all, as the published trace does."""
    works = [replace(w, seconds=0.9 if w.comm else 1.0) for w in pair(0)]
    order = in_order(works, PUBLISHED)
    assert hidden(order, 4) > 0.95
    assert best_order([works], 4)[2] == pytest.approx(span(order, 4) / 4)


def test_options_compete() -> None:
    """Fewer units for communication make it slower and computation faster: the best split depends on both."""
    works = pair(1)

    def scaled(compute: float, sent: float) -> list[Work]:
        return [replace(w, seconds=w.seconds * (sent if w.comm else compute)) for w in works]

    assert best_order([scaled(1.0, 9.0), scaled(1.1, 1.0), scaled(1.5, 0.9)], 2)[0] == 1
    assert best_order([works, works], 2)[0] == 0


def test_the_result_does_not_depend_on_the_unit_of_time() -> None:
    works = pair(2)
    _, slow, _ = best_order([[replace(w, seconds=w.seconds * 1e-3) for w in works]], 4)
    _, fast, _ = best_order([works], 4)
    assert [w.step for w in slow] == [w.step for w in fast]


def test_what_hides_behind_what() -> None:
    works = in_order([replace(w, seconds=1.0) for w in pair(0)], PUBLISHED)
    told = dict(behind(works))
    assert told[COMBINE_B] == (ATTENTION_W,)  # of the pair before
    assert told[DISPATCH_F] == (MLP_B,)
    assert set(told) == {COMBINE_B, DISPATCH_F, DISPATCH_B, COMBINE_F}


def test_a_picture_has_two_streams() -> None:
    works = in_order([replace(w, seconds=1.0) for w in pair(0)], PUBLISHED)
    compute, sent = picture(works, 60)
    assert compute.count("|") == 1 + 7 and compute.startswith("|attentio|attenti|mlp(B)-")
    assert "|combine" in sent and "|dispatc" in sent
    assert max(len(compute), len(sent)) == 61
