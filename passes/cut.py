"""Split each joint graph into F, B and W graphs, derive what each hands on, and write out the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from dsv3c.build import Builder
from dsv3c.ir import Graph, IRError, Layer, Node, Phase, Program, Sequence, Type, Value
from dsv3c.op import Registry
from dsv3c.passes.differentiate import JOINT
from dsv3c.rewrite import CALL, is_view, place_of
from dsv3c.state import Cut as CutRecord
from dsv3c.state import Pass, State, TakeNote


@dataclass(frozen=True)
class Cut(Pass):
    """Split joint graphs into F, B and W and derive the three saved lists.

    Each layer of a differentiated sequence becomes three: F in order, then B and W in reverse order, bound by what
    is saved from F to B, from F to W and from B to W. Each takes only the parameters it reads. The cotangent of a
    value e is called `d:e`. What a prologue computes is there anyway and does not count as saved.

    `early`: what W makes of values that B would have to keep for it alone, and that are larger, is made in B instead:
    gradients of norms. Less waits for a W that is done later.
    """

    name: ClassVar[str] = "cut"
    early: bool = False

    def run(self, state: State, note: TakeNote) -> State:
        program = state.program
        joints = [g for g in program.graphs if g.name.endswith(JOINT)]
        if not joints:
            return state
        hoisted = hoisted_inputs(program)
        shared = {y.graph for s in program.sequences if not s.losses for y in s.layers}
        pieces: dict[str, Pieces] = {}
        for g in joints:
            name = g.name.removesuffix(JOINT)
            if self.early:
                g = _with_early_gradients(g, state, note)
            pieces[name] = split(g, state.registry, hoisted.get(name, frozenset()))
        for name, piece in pieces.items():
            r = piece.record
            for what, values in (("F to B", r.f_to_b), ("F to W", r.f_to_w), ("B to W", r.b_to_w)):
                note("saved", f"{name} {what}", ", ".join(values) or "nothing")
        graphs: list[Graph] = []
        for g in program.graphs:
            if g.name.endswith(JOINT):
                graphs += [p for p in pieces[g.name.removesuffix(JOINT)].graphs if p is not None]
            elif g.name not in pieces or g.name in shared:
                graphs.append(g)
        sequences, sums = [], dict[str, Graph]()
        for s in program.sequences:
            sequences.append(backward_sequence(s, program, pieces, sums, state.registry) if s.losses else s)
        program = program.but(graphs=(*graphs, *sums.values()), sequences=tuple(sequences))
        return state.but(program=program, cut=tuple(p.record for p in pieces.values()))


def _with_early_gradients(joint: Graph, state: State, note: TakeNote) -> Graph:
    """The graph with W nodes tagged B if they write less than what they alone would have B keep."""
    sizes = state.sizes
    nodes = list(joint.nodes)
    made = {v.name: i for i, n in enumerate(nodes) for v in n.outputs}
    results = {v.name for v in joint.results}

    def size(v: Value) -> int:
        return v.type.bytes(sizes)

    for i, node in enumerate(nodes):
        phases = {nodes[made[v.name]].phase for v in node.inputs if v.name in made}
        ends = node.phase is Phase.W and Phase.W not in phases and all(v.name in results for v in node.outputs)
        if not ends or _multiplies(node, state.registry):
            continue
        if not set(joint.symbols) <= sizes.keys():
            note("kept", place_of(node), "sizes of symbols are unknown, so nothing is made early")
            break
        alone = [v for v in dict.fromkeys(node.inputs)
                 if v.name in made and nodes[made[v.name]].phase is Phase.B and v.name not in results
                 and all(u is joint.nodes[i] or nodes[made[u.outputs[0].name]].phase is not Phase.W
                         for u in joint.users[v.name])]  # fmt: skip
        kept, written = sum(map(size, alone)), sum(map(size, node.outputs))
        if written < kept:
            nodes[i] = replace(node, phase=Phase.B)
            spared = ", ".join(v.name for v in alone)
            where = f"{joint.name.removesuffix(JOINT)}.{place_of(node)}"
            note("early", where, f"{node.outputs[0]} is made in B, which else would keep {spared}")
    return joint.but(nodes=tuple(nodes))


def _multiplies(node: Node, registry: Registry) -> bool:
    """Whether a node is a matrix product, which is worth doing later."""
    if node.op == CALL:
        return False
    types = tuple(tuple(v.type for v in values) for values in (node.inputs, node.outputs))
    return registry[node.op].cost(*types, **dict(node.attrs)).flops != 0


@dataclass(frozen=True, slots=True)
class Pieces:
    """The F, B and W graphs of one layer kind, and which values they hand on."""

    graphs: tuple[Graph | None, Graph | None, Graph | None]
    record: CutRecord


def hoisted_inputs(program: Program) -> dict[str, frozenset[str]]:
    """Inputs of each graph that every layer takes from the prologue."""
    if not program.has_sequence("prologue"):
        return {}
    made = set(program.sequence("prologue").results)
    found: dict[str, set[str]] = {}
    for layer in (y for s in program.sequences for y in s.layers):
        mine = {v.name for v, name in zip(program.graph(layer.graph).inputs, layer.inputs, strict=True) if name in made}
        found[layer.graph] = found.get(layer.graph, mine) & mine
    return {name: frozenset(values) for name, values in found.items()}


def split(joint: Graph, registry: Registry, hoisted: frozenset[str] = frozenset()) -> Pieces:
    """Cut one joint graph. A view of a saved value is taken again where it is needed, so that its base is saved.

    The inputs called `hoisted` do not count as saved.
    """
    name = joint.name.removesuffix(JOINT)
    producers = joint.producers
    params = {v.name for v in joint.params}
    lasting = {v.name for v in joint.weights} | hoisted
    own = {p: [n for n in joint.nodes if n.phase is p] for p in Phase}
    backward, b_needs = _with_views(own[Phase.B], Phase.B, producers, registry)
    weight, w_needs = _with_views(own[Phase.W], Phase.W, producers, registry)
    phases = {v.name: producers[v.name].phase for v in joint.results}
    primal = [v for v in joint.results if phases[v.name] is Phase.F]
    d_results = [v for v in joint.results if phases[v.name] is not Phase.F]
    cotangents = {f"d_{v.name}" for v in primal}
    made_b = {v.name for n in backward for v in n.outputs}

    def made_by_f(values: dict[str, Value]) -> list[Value]:
        later = cotangents | made_b | lasting
        return [v for v in values.values() if v.name not in later]

    f_to_b, f_to_w = made_by_f(b_needs), made_by_f(w_needs)
    from_b = [v for v in w_needs.values() if v.name in made_b or v.name in cotangents]
    b_to_w = [v for v in from_b if v.name not in cotangents]
    saved = [v for v in dict.fromkeys((*f_to_b, *f_to_w)) if v.name not in params and v not in primal]
    read = {v.name for n in own[Phase.F] for v in n.inputs}
    forward = Graph(
        f"{name}_F", tuple(v for v in joint.inputs if v.name in read),
        tuple(v for v in joint.weights if v.name in read), tuple(own[Phase.F]), (*primal, *saved),
    )  # fmt: skip
    b_results = [v for v in d_results if producers[v.name].phase is Phase.B]
    w_results = [v for v in d_results if producers[v.name].phase is Phase.W]
    record = CutRecord(
        name, forward.name, f"{name}_B" if backward else None, f"{name}_W" if weight else None,
        *(tuple(v.name for v in values) for values in (f_to_b, f_to_w, b_to_w)),
    )  # fmt: skip
    b_out = tuple(dict.fromkeys((*b_results, *b_to_w)))
    return Pieces((
        forward,
        _piece(record.backward, joint, backward, b_needs, b_out),
        _piece(record.weight, joint, weight, w_needs, tuple(w_results)),
    ), record)  # fmt: skip


def _with_views(nodes: list[Node], phase: Phase, producers: Mapping[str, Node],
                registry: Registry) -> tuple[list[Node], dict[str, Value]]:  # fmt: skip
    """`nodes` with copies of the views they read from earlier phases before them, and what they need from outside."""
    made = {v.name for n in nodes for v in n.outputs}
    views: dict[str, Node] = {}
    needs: dict[str, Value] = {}

    def need(v: Value) -> None:
        producer = producers.get(v.name)
        if v.name in made or v.name in views or v.name in needs:
            return
        if producer is not None and is_view(producer, registry):
            for w in producer.inputs:
                need(w)
            views[v.name] = replace(producer, phase=phase)
        else:
            needs[v.name] = v

    for node in nodes:
        for v in node.inputs:
            need(v)
    return [*views.values(), *nodes], needs


def _piece(name: str | None, joint: Graph, nodes: list[Node], needs: dict[str, Value],
           results: tuple[Value, ...]) -> Graph | None:  # fmt: skip
    if name is None:
        return None
    inputs = tuple(v for v in needs.values() if v not in joint.weights)
    weights = tuple(v for v in joint.weights if v.name in needs)
    return Graph(name, inputs, weights, tuple(nodes), results)


def backward_sequence(sequence: Sequence, program: Program, pieces: dict[str, Pieces], sums: dict[str, Graph],
                      registry: Registry) -> Sequence:  # fmt: skip
    """The sequence with its backward pass written out.

    Raises IRError if a differentiable value of a layer is neither read by a later one nor a loss.
    """
    forward: list[Layer] = []
    backward: list[Layer] = []
    gradients: list[tuple[str, str]] = []
    partial: dict[str, list[str]] = {f: [f"d:{f}"] for f in sequence.losses}
    for layer in sequence.layers:
        piece = pieces.get(layer.graph)
        if piece is None or piece.graphs[0] is None:
            forward.append(layer)
            continue
        f, whole = piece.graphs[0], program.graph(layer.graph)
        given = dict(zip((v.name for v in whole.params), layer.inputs + layer.weights, strict=True))
        saved = tuple(f"{layer.name}:{v.name}" for v in f.results[len(layer.outputs) :])
        forward.append(replace(
            layer, graph=f.name, inputs=tuple(given[v.name] for v in f.inputs),
            weights=tuple(given[v.name] for v in f.weights), outputs=layer.outputs + saved,
        ))  # fmt: skip
    for layer in reversed(sequence.layers):
        piece = pieces.get(layer.graph)
        if piece is None:
            continue
        joint = program.graph(layer.graph + JOINT)
        graph = program.graph(layer.graph)
        env = dict(zip((v.name for v in graph.inputs), layer.inputs, strict=True))
        outs = dict(zip((v.name for v in graph.results), layer.outputs, strict=True))
        bound = dict(zip((v.name for v in graph.weights), layer.weights, strict=True))
        names = env | outs
        for v in joint.inputs[len(graph.inputs) :]:
            result = v.name.removeprefix("d_")
            names[v.name] = _summed(outs[result], v.type, partial, layer, backward, sums, registry)
        for v in joint.results[len(graph.results) :]:
            param = v.name.removeprefix("d_")
            if param in bound:
                twice = layer.weights.count(bound[param]) > 1
                names[v.name] = f"d:{bound[param]}@{layer.name}{'.' + param if twice else ''}"
                gradients.append((names[v.name], bound[param]))
            else:
                value = env[param]
                known = partial.setdefault(value, [])
                here, readers = layer.inputs.count(value), sum(y.inputs.count(value) for y in sequence.layers)
                part_of = f"{layer.name}.{param}" if here > 1 else layer.name
                alone = readers == 1 and value not in sequence.losses
                names[v.name] = f"d:{value}" if alone else f"d:{value}@{part_of}"
                known.append(names[v.name])
        for phase, part in ((Phase.B, piece.graphs[1]), (Phase.W, piece.graphs[2])):
            if part is None:
                continue
            for v in (*part.inputs, *part.results):
                names.setdefault(v.name, f"{layer.name}:{v.name}")
            backward.append(Layer(
                layer.name, part.name, tuple(names[v.name] for v in part.inputs),
                tuple(bound[v.name] for v in part.weights), tuple(names[v.name] for v in part.results), phase,
            ))  # fmt: skip
    inputs = (*sequence.inputs, *(f"d:{loss}" for loss in sequence.losses))
    return replace(sequence, inputs=inputs, layers=(*forward, *backward), gradients=tuple(gradients))


def _summed(value: str, type: Type, partial: dict[str, list[str]], layer: Layer, backward: list[Layer],
            sums: dict[str, Graph], registry: Registry) -> str:  # fmt: skip
    """The name of the whole cotangent of `value`, adding up the parts that its readers gave."""
    parts = partial.get(value, [])
    if not parts:
        raise IRError(f"layer '{layer.name}': no later layer reads '{value}' and it is not a loss; do not return it")
    total = parts[0]
    for i, part in enumerate(parts[1:]):
        graph = _sum_graph(type, sums, registry)
        name = f"d:{value}+{i}" if i < len(parts) - 2 or f"d:{value}" in parts else f"d:{value}"
        backward.append(Layer(f"{layer.name}.sum", graph.name, (total, part), (), (name,), Phase.B))
        total = name
    return total


def _sum_graph(type: Type, sums: dict[str, Graph], registry: Registry) -> Graph:
    key = str(type)
    if key not in sums:
        b = Builder(registry, f"accumulate_{len(sums)}" if sums else "accumulate")
        with b.at("accumulate", Phase.B):
            sums[key] = b.graph([b.add(b.input("x", type), b.input("y", type), out="sum")])
    return sums[key]
