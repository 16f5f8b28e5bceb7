"""partition: stages balanced by cost, values that cross only to neighbours, and the same numbers as one sequence."""

from __future__ import annotations

import functools
import itertools
import random

import pytest
from meaning import Draw, Proof

from dsv3c import driver, pipeline
from dsv3c.errors import InputError
from dsv3c.ir import Phase, Program
from dsv3c.ops import REGISTRY
from dsv3c.passes.partition import balanced
from dsv3c.schedules import generate
from dsv3c.stages import borders, bound_directly, prologue_of, received, sent, stage_count, stage_name, weights_of
from dsv3c.state import State

MODEL = "deepseek-v3-tiny:num_hidden_layers=3,hidden_size=32,vocab_size=64"
BEFORE = "differentiate,eliminate,share,hoist,cut"


@functools.cache
def model(passes: str = BEFORE) -> Program:
    return driver.compile(MODEL, precision="fp64", seq=8, kernels="none", passes=passes).program


@functools.cache
def divided(stages: int) -> Program:
    return model(f"{BEFORE},partition{{stages={stages}}}")


def trained(program: Program) -> Program:
    """The program without what serves and what updates weights."""
    kept = tuple(s for s in program.sequences if s.name == "train" or s.name.startswith("stage."))
    used = {y.graph for s in kept for y in s.layers}
    return program.but(sequences=kept, graphs=tuple(g for g in program.graphs if g.name in used))


@pytest.mark.parametrize("stages", [1, 2, 3, 7])
def test_stages_one_after_another_are_the_whole(stages: int) -> None:
    """Each knows what its neighbours sent and nothing else; seven stages leave some without any layer."""
    proof = Proof(trained(model()), trained(divided(stages)), REGISTRY, Draw({"B": 2, "S": 6}, {"tokens": 64}), 1e-13)
    assert "train" in proof.run()


def test_embedding_first_head_and_mtp_last() -> None:
    program = divided(2)
    first, last = ([y.name for y in program.sequence(f"stage.{i}").layers if y.phase is Phase.F] for i in (0, 1))
    assert first[:3] == ["positions", "embedding", "model.layers.0"]
    assert last[0] == "positions" and last[-4:] == ["head", *(f"model.layers.3{n}" for n in (".entry", "", ".head"))]


def test_a_stage_has_its_own_losses_gradients_and_results() -> None:
    whole, stages = model().sequence("train"), [divided(3).sequence(stage_name(i)) for i in range(3)]
    assert sorted(n for s in stages for n in s.losses) == sorted(whole.losses)
    assert sorted(g for s in stages for g in s.gradients) == sorted(whole.gradients)
    for s in stages:
        made = {n for y in s.layers for n in y.outputs}
        assert {n for n in whole.results if n in made} <= set(s.results)
        assert {f"d:{n}" for n in s.losses} == {n for n in s.inputs if n.removeprefix("d:") in whole.losses}


@pytest.mark.parametrize("stages", [2, 3, 7])
def test_what_is_sent_is_what_is_received(stages: int) -> None:
    program = divided(stages)
    assert stage_count(program) == stages
    for i, border in enumerate(borders(program)):
        assert received(program, i) == (border.received, border.cotangents_received)
        assert sent(program, i) == (border.sent, border.cotangents_sent)
        assert i == 0 or border.received == borders(program)[i - 1].sent
        assert {*border.received, *border.cotangents_received} <= set(program.sequence(stage_name(i)).inputs)
    assert not borders(program)[0].cotangents_sent and not borders(program)[-1].sent


def test_what_is_the_same_tensor_crosses_once() -> None:
    """The gradients of residual and delta are one tensor, since their sum is all that the layer reads."""
    (residual, delta), (cotangent,) = (borders(divided(2))[0].sent, borders(divided(2))[0].cotangents_received)
    assert (residual.split(".")[0], delta.split(".")[0], cotangent) == ("residual", "delta", f"d:{residual}")


def test_through_a_stage_without_layers_values_pass_both_ways() -> None:
    program = divided(7)
    empty = [i for i in range(7) if not program.sequence(stage_name(i)).layers]
    assert empty
    for i in empty:
        s = program.sequence(stage_name(i))
        assert set(s.inputs) == set(s.results) and not s.losses and not s.gradients
        assert borders(program)[i].received == borders(program)[i].sent


def test_weight_gradients_that_are_deferred_stand_after_all_input_gradients() -> None:
    for kind, apart in (("1f1b", False), ("zb1p", True)):
        state = State(model(), REGISTRY, schedule=generate(kind, 2, 4))
        program = pipeline.run(state, pipeline.parse("partition")).state.program
        phases = [y.phase.value for y in program.sequence("stage.0").layers]
        assert (phases == sorted(phases, key="FBW".index)) is apart
        assert phases.index("B") > max(i for i, p in enumerate(phases) if p == "F")


def test_weights_of_a_stage_those_of_its_layers_and_of_its_part_of_the_prologue() -> None:
    passes = "differentiate,eliminate,share,hoist,cut,partition{stages=2}"
    program = driver.compile(MODEL, target="h800", precision="bf16", seq=8, kernels="none", passes=passes).program
    first, last = (set(weights_of(program, (i,))) for i in (0, 1))
    assert first | last == {w.name for w in program.weights}
    assert first & last == {"model.embed_tokens.weight"}
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in first
    direct = set(bound_directly(program, (0,)))
    assert "model.layers.0.input_layernorm.weight" in direct and "model.layers.0.self_attn.o_proj.weight" not in direct
    parts = [prologue_of(program, s) for s in ((0,), (1,), (0, 1))]
    whole = program.sequence("prologue")
    assert all(parts) and parts[2] == whole
    assert {n for p in parts[:2] if p for n in p.results} == set(whole.results)
    assert parts[0] is not None and set(parts[0].results) <= set(program.sequence("stage.0").inputs)


def brute(costs: list[float], count: int) -> tuple[float, float]:
    """The least (dearest, squares) of all ways to divide, both ends filled."""
    units = len(costs)
    found = []
    for cuts in itertools.combinations_with_replacement(range(units + 1), count - 1):
        edges = (0, *cuts, units)
        if edges[1] == 0 or edges[-2] == units:
            continue
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]
        found.append((max(sums), sum(x * x for x in sums)))
    least = min(d for d, _ in found)
    return least, min(q for d, q in found if d <= least * (1 + 1e-9))


@pytest.mark.parametrize("seed", range(20))
def test_no_division_is_better_balanced(seed: int) -> None:
    rng = random.Random(seed)
    costs = [rng.choice([0.5, 1.0, 1.0, 3.0]) for _ in range(rng.randint(2, 8))]
    count = rng.randint(2, 6)
    lengths = balanced(costs, count)
    assert len(lengths) == count and sum(lengths) == len(costs) and lengths[0] and lengths[-1]
    edges = [0, *itertools.accumulate(lengths)]
    sums = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]
    dearest, squares = brute(costs, count)
    assert max(sums) == pytest.approx(dearest) and sum(x * x for x in sums) == pytest.approx(squares)


def test_layers_of_deepseek_v3_over_sixteen_stages() -> None:
    """61 layers, a head and an MTP module do not divide by 16: dense layers, which are short, make room."""
    passes = "differentiate,quantize,shard,eliminate,share,hoist,recompute{price=6},fuse,cut,partition{stages=16}"
    plan = driver.compile("deepseek-v3", target="h800", precision="fp8", mesh="pp=16,dp=64,ep=64", seq=4096,
                          kernels="none", passes=passes)  # fmt: skip
    placed = [n.reason.split(":")[0] for n in plan.notes if n.pass_name == "partition" and n.action == "placed"]
    assert placed[0] == "embedding to model.layers.4 (6 layers)"
    assert placed[1] == "model.layers.5 to model.layers.8 (4 layers)"
    assert placed[14] == "model.layers.57 to model.layers.60 (4 layers)"
    assert placed[15] == "head to model.layers.61.head (4 layers)"


def test_without_a_schedule_or_training_nothing_is_divided() -> None:
    for passes, reason in (("partition", "no schedule says"), ("partition{stages=2}", "nothing trains")):
        program = model() if passes == "partition" else model("eliminate").but(sequences=())
        outcome = pipeline.run(State(program, REGISTRY), pipeline.parse(passes))
        assert outcome.state.program is program and reason in outcome.notes[0].reason
    with pytest.raises(InputError, match="a pipeline of 0 stages"):
        pipeline.parse("partition{stages=0}")
