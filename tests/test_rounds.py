"""More rows for a rank's experts than its buffers hold: no token is dropped, and the result is that of one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_runs import run
from small import SMALL

import dsv3c
from dsv3c.build import Builder
from dsv3c.comm import from_json
from dsv3c.ir import DType, Phase, Type
from dsv3c.ops import REGISTRY
from dsv3c.plan import Json, Plan, load_plan
from dsv3c.runtime.rounds import between, made, round_layout

SEQ, BATCH, STEPS = 64, 8, 2


def tokens(plan: Plan, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    vocabulary = plan.config["vocab_size"]
    assert isinstance(vocabulary, int)
    return torch.randint(vocabulary, (BATCH, SEQ), generator=generator)


def train(path: Path) -> tuple[list[tuple[float, float]], int]:
    """Loss and gradient norm of some steps on one of the ranks, and the most rounds that a dispatch took."""
    from dsv3c.runtime.exchange import Exchange
    from dsv3c.runtime.ranks import RankSession, connect

    most = 1
    rounds = Exchange.rounds

    def counted(self: Exchange, handle: torch.Tensor) -> int:
        nonlocal most
        count = rounds(self, handle)
        most = max(most, count)
        return count

    plan = load_plan(path)
    with pytest.MonkeyPatch.context() as patch, connect(plan) as world:
        patch.setattr(Exchange, "rounds", counted)
        session = RankSession(plan, world, seed=7)
        steps = [session.step(tokens(plan, i), 1e-3) for i in range(STEPS)]
    return [(s.loss, s.grad_norm) for s in steps], most


def test_rows_beyond_the_buffers_come_in_rounds(tmp_path: Path) -> None:
    plan = dsv3c.compile(SMALL, mesh="dp=2,ep=2", schedule="dualpipev", seq=SEQ, global_batch=BATCH, precision="fp64",
                         kernels="none", ranks_per_node=2)  # fmt: skip
    narrow: dict[str, Json] = {name: -(-count // 3 // 32) * 32 for name, count in from_json(plan.comm).rows}
    path = tmp_path / "narrow.plan"
    replace(plan, comm={**plan.comm, "rows": narrow}).save(path)
    alone = dsv3c.load(dsv3c.compile(SMALL, seq=SEQ, global_batch=BATCH, precision="fp64", kernels="none"), seed=7)
    wanted = [alone.step(tokens(plan, i), 1e-3) for i in range(STEPS)]
    for found, most in run(2, train, path):
        assert most > 1, "the buffers were wide enough, so this tests nothing"
        for got, want in zip(found, wanted, strict=True):
            assert got == pytest.approx((want.loss, want.grad_norm), rel=1e-10)


def test_a_round_is_what_reads_rows_until_tokens_are_whole_again() -> None:
    b = Builder(REGISTRY, "layer")
    x = b.input("x", Type(DType.f64, (2, 3, 4)))
    e, p = b.input("e", Type(DType.i32, (2, 3, 2))), b.input("p", Type(DType.f64, (2, 3, 2)))
    rows, chosen, _, handle = b.dispatch(b.scale(x, by=2.0), e, p, ranks=2, experts=4, rows="D")
    offsets, slot, source = b.sort_by_expert(chosen, experts=2, align=1, rows="R")
    back = b.unpermute(b.permute(rows, source, slot), slot, source)
    whole = b.combine(back, handle, ranks=2)
    graph = b.graph([b.add(whole, x, out="sum"), offsets])
    nodes = between(graph, ())
    assert [n.op for n in nodes] == ["dispatch", "sort_by_expert", "permute", "unpermute", "combine"]
    assert "sum" not in made(nodes) and whole.name not in made(nodes) and offsets.name in made(nodes)


def test_rounds_share_memory_by_lifetime_and_have_none_for_gradients() -> None:
    plan = dsv3c.compile(SMALL, mesh="dp=2,ep=2", schedule="dualpipev", seq=SEQ, global_batch=BATCH, precision="fp64",
                         kernels="none")  # fmt: skip
    program, sizes = plan.program, {"B": 1, "S": SEQ, **dict(from_json(plan.comm).rows)}
    graphs = {p: program.graph(f"moe_block_{p.value}") for p in Phase}
    weights = {n for s in program.sequences for n, _ in s.gradients}
    layers = {y.graph: y for s in program.sequences for y in s.layers if s.name.startswith("stage.")}
    gradients = {
        p: {v.name for v, n in zip(g.results, layers[g.name].outputs, strict=True) if n in weights}
        for p, g in graphs.items()
    }
    found = round_layout(graphs, gradients, REGISTRY, sizes)
    values = {v.name: v for p in Phase for n in found.nodes[p] for v in n.outputs}
    assert gradients[Phase.W] & values.keys() and not gradients[Phase.W] & found.offsets.keys()
    apart = sum(values[n].type.bytes(sizes) for n in found.offsets if n in values)
    assert max(values[n].type.bytes(sizes) for n in found.offsets if n in values) < found.bytes < 0.8 * apart
    assert {n.op for n in found.nodes[Phase.B] if n.op in ("dispatch", "dispatch_again", "combine")} > {"combine"}
