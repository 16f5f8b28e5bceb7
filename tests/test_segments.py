"""Layers fall into the report's segments: every node in one, data dependencies kept, names as in the report."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from small import SMALL

from dsv3c import driver
from dsv3c.ir import Graph, Program
from dsv3c.ops import REGISTRY
from dsv3c.segments import arranged, communicates, segments
from dsv3c.verify import verify

EXCHANGES = ("dispatch", "dispatch_again", "combine")


@functools.cache
def program(target: str, precision: str) -> Program:
    return driver.compile(SMALL, target=target, precision=precision, kernels="none").program


def on_ranks(graph: Graph, ranks: int) -> Graph:
    """The graph as if its rows went to that many ranks; sizes stay as they are, which segments do not read."""
    nodes = (replace(n, attrs=(*n.attrs, ("ranks", ranks))) if n.op in EXCHANGES else n for n in graph.nodes)
    return graph.but(nodes=tuple(nodes))


def names(graph: Graph) -> list[str]:
    return [("*" if s.comm else "") + s.name for s in segments(graph, REGISTRY)]


@pytest.mark.parametrize(("target", "precision"), [("cpu", "fp32"), ("cpu", "bf16"), ("h800", "fp8")])
@pytest.mark.parametrize("ranks", [1, 4])
def test_every_node_is_in_one_segment_after_what_it_reads(target: str, precision: str, ranks: int) -> None:
    for graph in program(target, precision).graphs:
        sharded = on_ranks(graph, ranks)
        found = segments(sharded, REGISTRY)
        order = [i for s in found for i in s.nodes]
        assert sorted(order) == list(range(len(graph.nodes)))
        known = {v.name for v in graph.params}
        for i in order:
            assert {v.name for v in graph.nodes[i].inputs} <= known, (graph.name, graph.nodes[i])
            known |= {v.name for v in graph.nodes[i].outputs}
        for s in found:
            assert {communicates(sharded.nodes[i], REGISTRY) for i in s.nodes} == {s.comm}


def test_a_layer_of_experts_has_the_segments_of_the_report() -> None:
    graphs = program("h800", "fp8")
    parts = {p: on_ranks(graphs.graph(f"moe_block_first_{p}"), 4) for p in "FBW"}
    assert names(parts["F"]) == ["attention", "*dispatch", "mlp", "*combine", "tail"]
    assert names(parts["B"]) == ["head", "*combine", "mlp", "*dispatch", "attention"]
    assert names(parts["W"]) == ["mlp", "attention"]


def test_shared_experts_are_computed_with_the_mlp_and_the_router_with_attention() -> None:
    graphs = program("h800", "fp8")
    for p in "FBW":
        graph = on_ranks(graphs.graph(f"moe_block_first_{p}"), 4)
        where = {graph.nodes[i].path: s.name for s in segments(graph, REGISTRY) for i in s.nodes}
        assert where["mlp.shared.gate_up"] == "mlp"
        assert where["moe.router"] == where["attention.q_up"] == "attention"


def test_the_weight_gradients_of_the_mlp_wait_for_nothing_of_attention() -> None:
    graphs = program("h800", "fp8")
    backward, weight = (on_ranks(graphs.graph(f"moe_block_first_{p}"), 4) for p in "BW")
    late = segments(backward, REGISTRY)[-1]
    assert late.name == "attention"
    made = {v.name for i in late.nodes for v in backward.nodes[i].outputs}
    first = segments(weight, REGISTRY)[0]
    assert not made & {v.name for i in first.nodes for v in weight.nodes[i].inputs}


def test_what_does_not_communicate_is_computed_in_parts_or_at_once() -> None:
    graphs = program("cpu", "fp32")
    assert names(graphs.graph("moe_block_first_F")) == ["attention", "mlp"]
    assert names(graphs.graph("dense_block_first_B")) == ["mlp", "attention"]
    assert names(graphs.graph("head_W")) == ["head"]
    assert segments(graphs.graph("head_W").but(nodes=()), REGISTRY) == ()


def test_arranged_puts_segments_one_after_another() -> None:
    whole = program("cpu", "fp32")
    graphs = {g.name: g for g in whole.graphs}
    graph = whole.graph("moe_block_first_B")
    shuffled = graph.but(nodes=tuple(graph.nodes[i] for s in reversed_ties(graph) for i in s))
    verify(arranged(shuffled, REGISTRY), REGISTRY, graphs)
    sharded = arranged(on_ranks(graph, 4), REGISTRY)
    order = [i for s in segments(sharded, REGISTRY) for i in s.nodes]
    assert order == list(range(len(graph.nodes)))
    assert arranged(sharded, REGISTRY) is sharded


def reversed_ties(graph: Graph) -> list[list[int]]:
    """Another order of the nodes in which each still stands after what it reads: level by level, backward in each."""
    level: dict[str, int] = {v.name: 0 for v in graph.params}
    rows: dict[int, list[int]] = {}
    for i, n in enumerate(graph.nodes):
        here = 1 + max((level[v.name] for v in n.inputs), default=0)
        level.update((v.name, here) for v in n.outputs)
        rows.setdefault(here, []).insert(0, i)
    return [rows[k] for k in sorted(rows)]
