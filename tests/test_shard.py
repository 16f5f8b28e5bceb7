"""shard: all ranks in lockstep do what one rank does, each on its own tokens; what cannot be divided is refused."""

from __future__ import annotations

import functools

import pytest
from meaning import Draw, Proof

from dsv3c import driver, pipeline
from dsv3c.errors import InputError, WorkError
from dsv3c.ir import IRError, Program
from dsv3c.ops import REGISTRY
from dsv3c.state import State
from dsv3c.text import parse_program, show_program

MODEL = "deepseek-v3-tiny:num_hidden_layers=2,num_nextn_predict_layers=0,vocab_size=64"
SMALL = "hidden_size=32,moe_intermediate_size=16"


@functools.cache
def made(passes: str, precision: str = "fp64", model: str = f"{MODEL},{SMALL}") -> Program:
    target = "cpu" if precision == "fp64" else "h800"
    return driver.compile(model, target=target, precision=precision, seq=8, kernels="none", passes=passes).program


def trained(program: Program) -> Program:
    """The program without what serves and what updates weights."""
    (sequence,) = (s for s in program.sequences if s.name == "train")
    used = {n for y in sequence.layers for n in (y.graph, f"{y.graph}_joint")}
    return program.but(sequences=(sequence,), graphs=tuple(g for g in program.graphs if g.name in used))


@pytest.mark.parametrize("ep", [2, 4, 16])
def test_all_ranks_in_lockstep_are_one_rank(ep: int) -> None:
    """Gradients of these weights are sums of large numbers that cancel, so the order of a sum shows."""
    before, after = made("differentiate"), made(f"differentiate,shard{{ep={ep}}}")
    draw = Draw({"B": 1, "S": 6, "C": 6}, {"tokens": 64})
    assert "train" in Proof(trained(before), trained(after), REGISTRY, draw, 1e-6).run()


def test_in_fp8_rows_and_gradients_travel_in_tiles_and_mean_the_same() -> None:
    before, after = (made(f"differentiate,quantize{p}", "fp8", MODEL) for p in ("", ",shard{ep=2}"))
    draw = Draw({"B": 1, "S": 8, "C": 8}, {"tokens": 64})
    assert "train" in Proof(trained(before), trained(after), REGISTRY, draw, 4e-2).run()
    joint = after.graph("moe_block_joint")
    sent = [str(n.outputs[0].type) for n in joint.nodes if n.op in ("dispatch", "dispatch_again")]
    assert sent == ["e4m3[D, 256]", "f32[D, 2]", "e4m3[D, 256]", "f32[D, 2]"]
    back = [str(n.inputs[0].type) for n in joint.nodes if n.op == "combine"]
    assert back == ["bf16[D, 256]", "bf16[D, 256]", "f32[D, 4]"]


def test_experts_are_divided_and_all_else_is_whole() -> None:
    before, after = made("differentiate"), made("differentiate,shard{ep=4}")
    for old, new in zip(before.weights, after.weights, strict=True):
        parts = 4 if ".experts." in old.name else 1
        assert (new.parts, new.shape) == (parts, old.type.shape)
        assert new.type.bound({})[0] * parts == old.type.bound({})[0]
    assert parse_program(show_program(after), REGISTRY).weights == after.weights
    joint = after.graph("moe_block_joint")
    (sort,) = (n for n in joint.nodes if n.op == "sort_by_expert")
    assert dict(sort.attrs)["experts"] == 4
    (load,) = (n for n in joint.nodes if n.op == "expert_load")
    assert dict(load.attrs)["experts"] == 16  # loads are of all experts, on every rank


def test_a_plan_says_how_weights_are_divided_and_keeps_whole_shapes() -> None:
    plan = driver.compile(f"{MODEL},{SMALL}", mesh="dp=2,ep=2", seq=16, kernels="none",
                          passes="differentiate,shard,cut")  # fmt: skip
    shards = {w.name: (w.shard, w.shape) for w in plan.weights}
    assert shards["model.layers.1.mlp.experts.down_proj"] == ("experts/2", (16, 32, 16))
    assert shards["lm_head.weight"] == ("whole", (64, 32))


def test_what_serves_is_dropped_with_its_graphs() -> None:
    after = made("differentiate,shard{ep=2}")
    assert [s.name for s in after.sequences] == ["train"]
    assert not [g.name for g in after.graphs if g.name.endswith(("_forward", "_prefill", "_decode"))]
    assert after.has_graph("update_decayed") and after.has_graph("moe_block")


def test_data_ranks_alone_change_no_graph() -> None:
    plan = driver.compile(MODEL, mesh="dp=2", seq=16, kernels="none", passes="shard")
    whole = driver.compile(MODEL, seq=16, kernels="none", passes="shard")
    assert set(plan.program.graphs) <= set(whole.program.graphs)
    assert [s.name for s in plan.program.sequences] == ["train"]
    assert [s.name for s in whole.program.sequences] == ["train", "forward", "prefill", "decode"]
    assert any("every rank has all experts" in n.reason for n in plan.notes)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mesh": "dp=3,ep=3"}, "16 experts do not divide among ep=3 ranks"),
        ({"mesh": "tp=2"}, "training has no tensor parallelism; leave out tp=2"),
        ({"mesh": "pp=2", "job": "forward"}, "only training runs on several ranks; leave out --mesh for --job forward"),
        ({"mesh": "pp=2,dp=2", "global_batch": 3}, "--global-batch 3 is not a multiple"),
        ({"passes": "shard{ep=0}"}, "ep=0 expert ranks"),
    ],
)
def test_what_cannot_be_divided_is_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        driver.compile(MODEL, seq=16, kernels="none", **flags)  # type: ignore[arg-type]


def test_fused_regions_come_later() -> None:
    program = made("differentiate,eliminate,fuse")
    with pytest.raises((IRError, WorkError), match="'shard' comes before 'fuse'"):
        pipeline.run(State(program, REGISTRY), pipeline.parse("shard{ep=2}"))
