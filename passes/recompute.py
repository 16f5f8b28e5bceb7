"""Choose what forward keeps for backward and what backward computes again: a minimum cut between bytes and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import networkx

from dsv3c.dims import bind
from dsv3c.ir import Graph, Node, Phase, Type, Value
from dsv3c.op import Effect, Registry
from dsv3c.passes.differentiate import JOINT
from dsv3c.rewrite import ancestors
from dsv3c.state import Pass, State, TakeNote
from dsv3c.target import Machine


@dataclass(frozen=True)
class Recompute(Pass):
    """Recompute in B and W what is cheaper to compute again than to keep.

    `price`: what keeping one gibibyte for backward costs, in milliseconds; 0 keeps everything. The choice is the
    minimum cut of a network in which each forward value that backward needs is either kept, for its bytes times the
    price, or computed again, for its time under the machine's cost model once its inputs are there.
    """

    name: ClassVar[str] = "recompute"
    price: float = 0.0

    def run(self, state: State, note: TakeNote) -> State:
        if self.price <= 0:
            note("saved", "program", "memory costs nothing at price 0, so nothing is computed again")
            return state
        if state.machine is None:
            note("saved", "program", "no machine is given, so the time of computing again is unknown")
            return state
        graphs = tuple(
            self._choose(g, state.registry, state.sizes, state.machine, note) if g.name.endswith(JOINT) else g
            for g in state.program.graphs
        )
        return state.with_program(state.program.with_graphs(graphs))

    def _choose(self, graph: Graph, registry: Registry, sizes: Mapping[str, int], machine: Machine,
                note: TakeNote) -> Graph:  # fmt: skip
        needed = needed_values(graph)
        again = cheapest(graph, registry, sizes, machine, self.price * 1e-3 / 2**30, needed)
        name = graph.name.removesuffix(JOINT)
        kept = [v for v in needed if v.name in graph.producers and v.name not in again]
        for node in graph.nodes:
            names = [v.name for v in node.outputs if v.name in again]
            if names:
                seconds = node_seconds(node, registry, sizes, machine)
                note(
                    "recomputed",
                    f"{name}.{node.path}",
                    f"{node.op} gives {', '.join(names)} again in {seconds * 1e6:.1f} µs",
                )
        for v in kept:
            node = graph.producers[v.name]
            note("saved", f"{name}.{node.path}", f"{v.name}, {v.type.bytes(sizes) / 2**20:.2f} MiB")
        return with_recomputation(graph, registry, again) if again else graph


def needed_values(graph: Graph) -> tuple[Value, ...]:
    """Forward values and parameters (weights apart) that B or W nodes read, in order of definition."""
    read = {v.name for n in graph.nodes if n.phase is not Phase.F for v in n.inputs}
    weights = {v.name for v in graph.weights}
    cotangents = {f"d_{v.name}" for v in graph.results}
    made_later = {v.name for n in graph.nodes if n.phase is not Phase.F for v in n.outputs}
    return tuple(v for v in graph.values() if v.name in read - weights - cotangents - made_later)


def node_seconds(node: Node, registry: Registry, sizes: Mapping[str, int], machine: Machine) -> float:
    """Time of one node: the longest of arithmetic and memory traffic, and the start of a kernel."""
    op = registry[node.op]
    if op.view:
        return 0.0
    bound = tuple(Type(v.type.dtype, v.type.bound(sizes)) for v in node.inputs)
    outputs = tuple(Type(v.type.dtype, v.type.bound(sizes)) for v in node.outputs)
    cost = op.cost(bound, outputs, **dict(node.attrs))
    rate = machine.matrix_rate(node.inputs[0].type.dtype)
    seconds = (
        bind(cost.flops, {}) / rate,
        bind(cost.vector_flops, {}) / machine.vector_flops,
        bind(cost.bytes, {}) / machine.memory_bandwidth,
    )
    return max(seconds) + machine.latency


def cheapest(graph: Graph, registry: Registry, sizes: Mapping[str, int], machine: Machine, price: float,
             needed: tuple[Value, ...]) -> set[str]:  # fmt: skip
    """Names of the forward values to compute again. `price` is in seconds per byte kept.

    In the network, `need v` is on the source side if backward has v at hand, `again n` if node n runs a second time.
    """
    network = networkx.DiGraph()
    weights = {v.name for v in graph.weights}
    infinite = float("inf")

    def need(v: Value) -> tuple[str, str]:
        return "need", base_of(v, graph, registry).name

    for v in needed:
        if base_of(v, graph, registry).name not in weights:
            network.add_edge("source", need(v), capacity=infinite)
    for node in (n for n in graph.nodes if n.phase is Phase.F):
        if registry[node.op].view:
            continue
        repeat = ("again", node.outputs[0].name)
        repeatable = registry[node.op].effect is Effect.PURE
        for v in node.outputs:
            network.add_edge(("need", v.name), repeat, capacity=price * v.type.bytes(sizes) if repeatable else infinite)
        # A value that cannot be computed again is kept: its bytes are paid on the way to the sink.
        cost = (
            node_seconds(node, registry, sizes, machine)
            if repeatable
            else price * sum(v.type.bytes(sizes) for v in node.outputs)
        )
        network.add_edge(repeat, "sink", capacity=cost)
        if repeatable:
            for v in node.inputs:
                if base_of(v, graph, registry).name not in weights:
                    network.add_edge(repeat, need(v), capacity=infinite)
    for v in graph.inputs:
        if ("need", v.name) in network:
            network.add_edge(("need", v.name), "sink", capacity=price * v.type.bytes(sizes))
    if "source" not in network or "sink" not in network:
        return set()
    _, (source_side, _) = networkx.minimum_cut(network, "source", "sink")
    again = {
        v.name
        for n in graph.nodes
        if n.phase is Phase.F and not registry[n.op].view and registry[n.op].effect is Effect.PURE
        and ("again", n.outputs[0].name) in source_side
        for v in n.outputs
    }  # fmt: skip
    return again & ancestors(graph, needed)


def base_of(v: Value, graph: Graph, registry: Registry) -> Value:
    """The value whose storage `v` is a view of."""
    while v.name in graph.producers and registry[graph.producers[v.name].op].view:
        v = graph.producers[v.name].inputs[0]
    return v


def with_recomputation(graph: Graph, registry: Registry, again: set[str]) -> Graph:
    """A copy in which B and W read values of `again`, and views of them, from nodes that compute them a second time.

    A repeated node is W if only W nodes read it, else B.
    """
    repeated: dict[str, Value] = {}
    copies: list[Node] = []
    for node in (n for n in graph.nodes if n.phase is Phase.F):
        view = registry[node.op].view and node.inputs[0].name in repeated
        if view or any(v.name in again for v in node.outputs):
            outputs = tuple(Value(f"{v.name}_again", v.type) for v in node.outputs)
            inputs = tuple(repeated.get(v.name, v) for v in node.inputs)
            copies.append(replace(node, inputs=inputs, outputs=outputs, phase=Phase.B))
            repeated.update((v.name, w) for v, w in zip(node.outputs, outputs, strict=True))
    forward = [n for n in graph.nodes if n.phase is Phase.F]
    backward = []
    for n in graph.nodes:
        if n.phase is not Phase.F:
            backward.append(replace(n, inputs=tuple(repeated.get(v.name, v) for v in n.inputs)))
    read_by_b = ancestors(
        graph.but(nodes=tuple(copies)), tuple(v for n in backward if n.phase is Phase.B for v in n.inputs)
    )
    read = ancestors(graph.but(nodes=tuple(copies)), tuple(v for n in backward for v in n.inputs))
    used = [
        replace(n, phase=Phase.B if any(v.name in read_by_b for v in n.outputs) else Phase.W)
        for n in copies
        if any(v.name in read for v in n.outputs)
    ]
    return graph.but(nodes=(*forward, *used, *backward))
