"""Choose what forward keeps for backward and what backward computes again: a minimum cut between bytes and time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import networkx

from dsv3c.arena import show_bytes
from dsv3c.costs import Times
from dsv3c.errors import InputError
from dsv3c.ir import Graph, Node, Phase, Value
from dsv3c.op import Registry
from dsv3c.passes.cut import hoisted_inputs
from dsv3c.passes.differentiate import JOINT
from dsv3c.passes.fuse import hands_rows, is_rowwise
from dsv3c.rewrite import fresh, is_view, place_of, pure
from dsv3c.state import Pass, State, TakeNote

GIB = 2**30
UNITS = 10**18
"""Costs are whole attoseconds: a minimum cut in floating point may end up on the wrong side of a rounding error."""


@dataclass(frozen=True)
class Recompute(Pass):
    """Recompute in B and W what is cheaper to compute again than to keep.

    `price`: what keeping one gibibyte for backward costs, in milliseconds; 0 keeps everything, `none` leaves it to the
    driver, which takes the lowest price at which the plan fits the machine. The choice is the minimum cut of a network
    in which each forward value that backward needs is either kept, for its bytes times the price, or computed again,
    for its time under the machine's cost model once its inputs are there.
    """

    name: ClassVar[str] = "recompute"
    price: float | None = None

    def __post_init__(self) -> None:
        if self.price is not None and not 0 <= self.price < float("inf"):
            raise InputError(f"the price of memory is {self.price} ms per GiB; it must be 0 or more")

    def run(self, state: State, note: TakeNote) -> State:
        if not self.price:
            reason = "memory has no price" if self.price is None else "memory costs nothing at price 0"
            note("saved", "program", f"{reason}, so nothing is computed again")
            return state
        if state.machine is None:
            note("saved", "program", "no machine is given, so the time of computing again is unknown")
            return state
        lasting = hoisted_inputs(state.program)
        graphs = []
        for graph in state.program.graphs:
            if graph.name.endswith(JOINT):
                free = lasting.get(graph.name.removesuffix(JOINT), frozenset())
                times = Times(state.registry, state.sizes, state.machine)
                again = cheapest(graph, times, self.price * 1e-3 / GIB, free)
                new = with_recomputation(graph, state.registry, again) if again else graph
                self._describe(graph, new, again, times, free, note)
                graph = new
            graphs.append(graph)
        return state.with_program(state.program.with_graphs(tuple(graphs)))

    def _describe(self, graph: Graph, new: Graph, again: set[str], times: Times, free: frozenset[str],
                  note: TakeNote) -> None:  # fmt: skip
        """Tell both choices: what is computed again, and what is kept at which cost."""
        assert self.price is not None
        name = graph.name.removesuffix(JOINT)
        for node in graph.nodes:
            names = [v.name for v in node.outputs if v.name in again]
            if names:
                time = f"{times.seconds(node, handed_over(node, graph, times.registry), again) * 1e6:.1f} µs"
                note("recomputed", f"{name}.{place_of(node)}", f"{node.op} gives {', '.join(names)} again in {time}")
        kept = (base_of(v, graph, times.registry) for v in needed_values(new))
        for v in dict.fromkeys(kept):
            maker = graph.producers.get(v.name)
            if maker is None or v.name in free:
                continue
            size = v.type.bytes(times.sizes)
            cost = f"{v.name}, {show_bytes(size)}, costs {size / GIB * self.price * 1e3:.1f} µs at this price"
            if not pure(maker, times.registry):
                note("saved", f"{name}.{place_of(maker)}", f"{cost}; {maker.op} is not done twice")
            else:
                seconds = times.seconds(maker)
                note("saved", f"{name}.{place_of(maker)}", f"{cost}; {maker.op} alone takes {seconds * 1e6:.1f} µs")


def needed_values(graph: Graph) -> tuple[Value, ...]:
    """Forward values and parameters (weights apart) that B or W nodes read, in order of definition."""
    read = {v.name for n in graph.nodes if n.phase is not Phase.F for v in n.inputs}
    weights = {v.name for v in graph.weights}
    cotangents = {f"d_{v.name}" for v in graph.results}
    made_later = {v.name for n in graph.nodes if n.phase is not Phase.F for v in n.outputs}
    return tuple(v for v in graph.values() if v.name in read - weights - cotangents - made_later)


def handed_over(node: Node, graph: Graph, registry: Registry) -> tuple[Value, ...]:
    """The inputs that `node` gets row by row from a row-wise producer, with which it can be one kernel (see `fuse`)."""
    if not is_rowwise(node, registry) or registry[node.op].view:
        return ()
    makers = [(v, graph.producers.get(v.name)) for v in dict.fromkeys(node.inputs)]
    return tuple(v for v, m in makers if m and is_rowwise(m, registry) and not registry[m.op].view
                 and hands_rows(m, v, node, registry))  # fmt: skip


def cheapest(graph: Graph, times: Times, price: float, free: frozenset[str] = frozenset()) -> set[str]:
    """Names of the forward values to compute again. `price` is in seconds per byte kept; `free` inputs cost nothing.

    In the network, `need v` is on the source side if backward needs v at hand, `again n` if node n runs a second time.
    Cutting `need v` from the node that makes v means to keep v; cutting `again n` from the sink, to run n again;
    cutting it from a producer that it could be one kernel with, to run n again without it.
    """
    registry, infinite = times.registry, float("inf")
    network = networkx.DiGraph()
    lasting = {v.name for v in graph.weights} | free

    def keep(v: Value) -> int:
        return round(price * v.type.bytes(times.sizes) * UNITS)

    def needs(reader: object, v: Value) -> None:
        base = base_of(v, graph, registry)
        if base.name not in lasting:
            network.add_edge(reader, ("need", base.name), capacity=infinite)

    for v in needed_values(graph):
        needs("source", v)
    for v in graph.inputs:
        network.add_edge(("need", v.name), "sink", capacity=keep(v))
    for node in (n for n in graph.nodes if n.phase is Phase.F and not is_view(n, registry)):
        again = ("again", node.outputs[0].name) if pure(node, registry) else "sink"
        for v in node.outputs:
            network.add_edge(("need", v.name), again, capacity=keep(v))
        if again != "sink":
            handed = handed_over(node, graph, registry)
            together = times.seconds(node, handed, {v.name for v in handed})
            network.add_edge(again, "sink", capacity=round(together * UNITS))
            for v in handed:
                alone = times.reading(v) + (times.machine.latency if v is handed[0] else 0.0)
                with_it = ("again", graph.producers[v.name].outputs[0].name)
                network.add_edge(again, with_it, capacity=round(alone * UNITS))
            for v in node.inputs:
                needs(again, v)
    if "source" not in network:
        return set()
    _, (source_side, _) = networkx.minimum_cut(network, "source", "sink")
    found: set[str] = set()
    todo = [base_of(v, graph, registry) for v in needed_values(graph)]
    while todo:
        maker = graph.producers.get(todo.pop().name)
        if maker and ("again", maker.outputs[0].name) in source_side and maker.outputs[0].name not in found:
            found.update(v.name for v in maker.outputs)
            todo += [base_of(v, graph, registry) for v in maker.inputs]
    return found


def base_of(v: Value, graph: Graph, registry: Registry) -> Value:
    """The value whose storage `v` is a view of."""
    while v.name in graph.producers and is_view(graph.producers[v.name], registry):
        v = graph.producers[v.name].inputs[0]
    return v


def with_recomputation(graph: Graph, registry: Registry, again: set[str]) -> Graph:
    """A copy in which B and W read values of `again`, and views of them, from nodes that compute them a second time.

    A repeated node is W if only W nodes read it, else B. It stands right before the first that reads it, so that what
    it makes does not lie in memory for longer than it must.
    """
    repeated: dict[str, Value] = {}
    makers: dict[str, Node] = {}
    forward = [n for n in graph.nodes if n.phase is Phase.F]
    taken = {v.name for v in graph.values()}
    for node in forward:
        view = is_view(node, registry) and node.inputs[0].name in repeated
        if view or any(v.name in again for v in node.outputs):
            outputs = tuple(Value(fresh(taken, f"{v.name}_again"), v.type) for v in node.outputs)
            copy = replace(node, inputs=tuple(repeated.get(v.name, v) for v in node.inputs), outputs=outputs)
            makers.update((v.name, copy) for v in outputs)
            repeated.update((v.name, w) for v, w in zip(node.outputs, outputs, strict=True))
    later = [replace(n, inputs=tuple(repeated.get(v.name, v) for v in n.inputs))
             for n in graph.nodes if n.phase is not Phase.F]  # fmt: skip
    backward: list[Node] = []

    def emit(v: Value, phase: Phase) -> None:
        node = makers.pop(v.name, None)
        if node is not None:
            for w in node.outputs:
                makers.pop(w.name, None)
            for w in node.inputs:
                emit(w, phase)
            backward.append(replace(node, phase=phase))

    for phase in (Phase.B, Phase.W):
        for node in (n for n in later if n.phase is phase):
            for v in node.inputs:
                emit(v, phase)
            backward.append(node)
    return graph.but(nodes=(*forward, *backward))
