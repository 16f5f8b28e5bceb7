"""Overlap: the search finds the best of all orders, no worse than the published one, and the machine changes it."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3c import driver, pipeline
from dsv3c.costs import Routing, Times, traffic
from dsv3c.interleave import (
    BACKWARD,
    FORWARD,
    Placed,
    Step,
    Work,
    behind,
    best_order,
    hidden,
    picture,
    placed,
    span,
    works,
)
from dsv3c.ir import DType, Phase
from dsv3c.models import resolve
from dsv3c.ops import REGISTRY
from dsv3c.passes.overlap import Overlap
from dsv3c.segments import segments
from dsv3c.state import Note, State
from dsv3c.target import Machine
from dsv3c.targets import find

SUMMARIES = Path(__file__).parent / "overlap"

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


# ---- DeepSeek-V3 on 2048 H800, experts over 64 ranks on 8 nodes ------------------------------------------------------


@functools.cache
def cut_model() -> State:
    """The training program in FP8 as it comes to the pass; the published recomputation, smaller in all but a layer."""
    _, family, config = resolve("deepseek-v3:num_hidden_layers=8,num_nextn_predict_layers=0")
    target = find("h800")
    job = driver.make_job(
        config, target, kind="train", mesh="pp=2,dp=128,ep=64", ranks_per_node=8, seq=4096, micro_batch=1,
        global_batch=1024, precision="fp8", schedule="dualpipe", expert_headroom=1.5, kernels="none",
        implementations="auto", allow_oversize=True, document_end=None, recipe=None,
    )  # fmt: skip
    program = family.build(config, job, target.expert_alignment(job.dtype))
    passes = "differentiate,quantize,shard,eliminate,share,hoist,recompute{price=5},fuse,eliminate,cut"
    return pipeline.run(State(program, REGISTRY, job, target), pipeline.parse(passes)).state


MACHINE: Machine = find("h800").machine
MACHINES = {
    "h800": MACHINE,
    "half_the_network": replace(MACHINE, slow_link=MACHINE.slow_link / 2),
    "twice_the_fp8": replace(MACHINE, matrix_flops=((DType.e4m3, 2 * 1979e12), *MACHINE.matrix_flops[1:])),
}


def overlapped(machine: Machine) -> tuple[State, list[Note]]:
    state = cut_model()
    assert state.target is not None
    notes: list[Note] = []
    after = Overlap().run(state.but(target=replace(state.target, machine=machine)),
                          lambda *text: notes.append(Note("overlap", *text)))  # fmt: skip
    return after, notes


@pytest.mark.parametrize("name", MACHINES)
def test_the_layer_of_deepseek_v3(name: str, update_golden: bool) -> None:
    """A summary golden: the order, what hides behind what, and the picture; others for another network and chip."""
    _, notes = overlapped(MACHINES[name])
    made = "".join(f"{note}\n" for note in notes)
    path = SUMMARIES / f"{name}.txt"
    if update_golden:
        path.parent.mkdir(exist_ok=True)
        path.write_text(made, encoding="utf-8")
    assert made == path.read_text(encoding="utf-8"), f"{path.name} differs; if meant: pytest --update-golden"


def test_the_machine_changes_the_result() -> None:
    results = [(SUMMARIES / f"{name}.txt").read_text(encoding="utf-8") for name in MACHINES]
    assert len(set(results)) == len(results)
    orders = [next(x for x in text.splitlines() if x.startswith("overlap: ordered")) for text in results]
    assert len(set(orders)) > 1


@pytest.mark.parametrize("name", MACHINES)
def test_it_is_no_worse_than_the_published_order_for_deepseek_v3(name: str) -> None:
    after, _ = overlapped(MACHINES[name])
    assert after.overlap is not None
    found = after.overlap.order("moe_block", "moe_block")
    assert found is not None
    times = Times.of(after.program, REGISTRY, after.sizes, MACHINES[name]).with_lent(20)
    table = {w.step: w for w in works(times, {g.name: g for g in after.program.graphs}, "moe_block", "moe_block")}
    ends = [s for s in table if s.segment in ("head", "tail")]
    published = [table[s] for s in (*ends[1:], *PUBLISHED, *ends[:1])]
    assert [w.step.segment for w in (published[0], published[-1])] == ["head", "tail"]
    assert found.seconds <= span(published, 4) / 4 * (1 + 1e-9)


def test_nodes_stand_in_the_order_of_the_segments_afterwards() -> None:
    after, _ = overlapped(MACHINE)
    for graph in after.program.graphs:
        if graph.name.endswith(("_F", "_B", "_W")):
            order = [i for s in segments(graph, REGISTRY) for i in s.nodes]
            assert order == list(range(len(graph.nodes))), graph.name


def test_without_communication_or_machine_nothing_overlaps() -> None:
    after, notes = overlapped(MACHINE)
    alone = after.but(target=None, overlap=None)
    assert Overlap().run(alone, lambda *text: notes.append(Note("", *text))).overlap is None
    assert "no machine is given" in notes[-1].reason


# ---- what is sent ----------------------------------------------------------------------------------------------------

V3 = Routing(experts=256, k=8, groups=8, kept=4)


@pytest.mark.parametrize("parts", [8, 16, 64, 256, 4, 2, 1])
def test_how_many_ranks_a_token_reaches(parts: int) -> None:
    """Against choices drawn at random."""
    rng = random.Random(parts)
    total, draws = 0, 4000
    for _ in range(draws):
        groups = rng.sample(range(8), 4)
        chosen = rng.sample([e for g in groups for e in range(g * 32, g * 32 + 32)], 8)
        total += len({e * parts // 256 for e in chosen})
    assert V3.reached(parts) == pytest.approx(total / draws, rel=0.02)


def test_in_two_hops_less_crosses_between_nodes() -> None:
    two, flat = (traffic(1.0, 64, 8, V3, hops) for hops in (True, False))
    assert two.slow == pytest.approx(V3.reached(8) * 7 / 8) and flat.slow == pytest.approx(V3.reached(64) * 7 / 8)
    assert two.slow < 3.5 < 6 < flat.slow
    inside = traffic(1.0, 8, 8, V3, True)
    assert inside.slow == 0 and inside.fast == pytest.approx(V3.reached(8) * 7 / 8)
