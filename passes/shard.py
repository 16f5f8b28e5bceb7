"""Bind the model to the mesh: experts divide among ranks, and rows go to them and come back through exchanges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from dsv3c.errors import InputError
from dsv3c.ir import Attr, Attrs, Graph, IRError, Layer, Node, Program, Sequence, Type, Value, Weight
from dsv3c.op import Registry
from dsv3c.rewrite import CALL, ancestors, called
from dsv3c.state import Pass, State, TakeNote
from dsv3c.verify import node_types

RECEIVED, SORTED = "D", "R"
"""Symbols of how many rows a rank receives, and how many it sorts by expert; see `dsv3c.capacity`."""

EXCHANGES = ("dispatch", "dispatch_again", "combine")


@dataclass(frozen=True)
class Shard(Pass):
    """Divide the experts among the expert ranks, so that dispatch and combine send rows among them.

    Each rank keeps 1/ep of the leading axis of every expert weight; all else is replicated over the data ranks, and
    the graphs are those of one rank. A token goes once to a rank, however many of its experts are there. A program
    for several ranks trains only: sequences that serve are dropped. `ep`: among how many ranks, if no mesh says so.
    """

    name: ClassVar[str] = "shard"
    ep: int | None = None

    def __post_init__(self) -> None:
        if self.ep is not None and self.ep < 1:
            raise InputError(f"ep={self.ep} expert ranks; there must be at least 1")

    def run(self, state: State, note: TakeNote) -> State:
        mesh, program = state.mesh, state.program
        ep = self.ep or mesh.ep
        if max(mesh.world, ep) == 1:
            note("kept", "program", "one rank holds everything")
            return state
        if mesh.tp > 1:
            raise InputError(f"--mesh {mesh}: training has no tensor parallelism; leave out tp={mesh.tp}")
        if state.job is not None and state.job.kind != "train":
            raise InputError(
                f"--mesh {mesh}: only training runs on several ranks; leave out --mesh for --job {state.job.kind}"
            )
        program = _trained_only(program, note)
        if ep == 1:
            note("kept", "program", "every rank has all experts (ep=1)")
        else:
            program = _divided(program, state.registry, ep, note)
        return state.with_program(program)


def _trained_only(program: Program, note: TakeNote) -> Program:
    """The program without sequences that do not train, and without the graphs that only those use."""
    serving = tuple(s for s in program.sequences if not s.losses and s.name != "prologue")
    if not serving or len(serving) == len(program.sequences):
        return program
    kept = tuple(s for s in program.sequences if s not in serving)
    note("dropped", ", ".join(s.name for s in serving), "on several ranks a program only trains; export to serve")
    used = {y.graph for s in kept for y in s.layers}
    gone = {y.graph for s in serving for y in s.layers} - used
    graphs = tuple(g for g in program.graphs if g.name not in gone)
    needed = {name for g in graphs for name in called(g)}
    lost = gone & needed
    graphs = tuple(g for g in program.graphs if g.name not in gone - lost)
    return program.but(graphs=graphs, sequences=kept)


def _divided(program: Program, registry: Registry, ep: int, note: TakeNote) -> Program:
    graphs: list[Graph] = []
    changed: dict[str, tuple[Graph, Graph]] = {}
    for graph in program.graphs:
        new = sharded(graph, registry, ep)
        if new is not graph:
            changed[graph.name] = (graph, new)
            experts, tokens = _counts(graph, ep)
            note("sharded", graph.name, f"{experts // ep} of {experts} experts on a rank; {tokens} exchanges of rows")
        graphs.append(new)
    if not changed:
        note("kept", "program", f"it has no experts to divide among {ep} ranks")
        return program
    weights = {w.name: w for w in program.weights}
    for sequence in program.sequences:
        for layer in sequence.layers:
            if layer.graph in changed:
                _bind(layer, *changed[layer.graph], weights, ep)
    for sequence in program.sequences:
        _check(sequence, weights, changed, program)
    replicated = sum(w.parts == 1 and w.group != "state" for w in weights.values())
    note("kept", "weights", f"{replicated} that every data rank holds whole")
    return program.but(graphs=tuple(graphs), weights=tuple(weights.values()))


def _counts(graph: Graph, ep: int) -> tuple[int, int]:
    return _experts_of(graph, ep), sum(n.op in EXCHANGES for n in graph.nodes)


def _bind(layer: Layer, old: Graph, new: Graph, weights: dict[str, Weight], ep: int) -> None:
    """Give the weights that a layer binds the types that its graph now has."""
    for was, now, name in zip(old.weights, new.weights, layer.weights, strict=True):
        if was.type != now.type and weights[name].parts == 1:
            w = weights[name]
            weights[name] = replace(w, type=Type(w.type.dtype, now.type.shape), parts=ep)


def _check(sequence: Sequence, weights: Mapping[str, Weight], changed: Mapping[str, tuple[Graph, Graph]],
           program: Program) -> None:  # fmt: skip
    """Raise IRError if a weight whose experts are divided is read whole by another graph."""
    for layer in sequence.layers:
        graph = changed[layer.graph][1] if layer.graph in changed else program.graph(layer.graph)
        for v, name in zip(graph.weights, layer.weights, strict=True):
            if weights[name].type.shape != v.type.shape:
                raise IRError(f"layer '{layer.name}' reads all of {name}, whose experts are divided among ranks")


def _experts_of(graph: Graph, ep: int) -> int:
    """How many experts the graph's exchanges serve; 0 if it has none. InputError if `ep` does not divide them."""
    found = {n.attr("experts") for n in graph.nodes if n.op == "sort_by_expert"}
    if not found or not any(n.op in EXCHANGES for n in graph.nodes):
        return 0
    if len(found) > 1:
        raise IRError(f"{graph.name}: its experts are counted as {sorted(map(str, found))}")
    experts = found.pop()
    assert isinstance(experts, int)
    if experts % ep:
        raise InputError(f"the model's {experts} experts do not divide among ep={ep} ranks; choose an ep that divides")
    return experts


def sharded(graph: Graph, registry: Registry, ep: int) -> Graph:
    """The graph as one of `ep` expert ranks runs it; the same graph if it has no experts.

    Raises InputError if `ep` does not divide the experts, IRError if regions are fused already.
    """
    experts = _experts_of(graph, ep)
    if not experts:
        return graph
    products = tuple(v for n in graph.nodes if n.op.startswith("grouped_linear") for v in n.inputs)
    needed = ancestors(graph, products)
    values: dict[str, Value] = {}
    for v in graph.params:
        divided = v.type.rank == 3 and v.type.shape[0] == experts and v.name in needed
        shape = (experts // ep, *v.type.shape[1:])
        values[v.name] = Value(v.name, Type(v.type.dtype, shape)) if divided else v
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op == CALL:
            raise IRError(f"{graph.name}: 'shard' comes before 'fuse', but {node.attr('graph')} is a region already")
        inputs = tuple(values[v.name] for v in node.inputs)
        new = replace(node, inputs=inputs, attrs=_attributes(node, experts, ep))
        types = node_types(new.op, tuple(v.type for v in inputs), new, registry, {})
        outputs = tuple(v if v.type == t else Value(v.name, t) for v, t in zip(node.outputs, types, strict=True))
        values.update((v.name, v) for v in outputs)
        nodes.append(replace(new, outputs=outputs))

    def mapped(old: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(values[v.name] for v in old)

    return Graph(graph.name, mapped(graph.inputs), mapped(graph.weights), tuple(nodes), mapped(graph.results))


def _attributes(node: Node, experts: int, ep: int) -> Attrs:
    """The attributes of a node once its experts are divided among `ep` ranks."""
    added: dict[str, dict[str, Attr]] = {
        "dispatch": {"ranks": ep, "experts": experts, "rows": RECEIVED},
        "dispatch_again": {"ranks": ep, "rows": RECEIVED},
        "combine": {"ranks": ep},
        "sort_by_expert": {"experts": experts // ep, "rows": SORTED},
    }
    known = dict(node.attrs)
    return tuple((known | added[node.op]).items()) if node.op in added else node.attrs
