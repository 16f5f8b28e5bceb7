"""Move what depends on weights alone out of the layers into a prologue that runs once per step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from dsv3c.ir import Graph, Layer, Node, Program, Sequence, Value
from dsv3c.op import Registry
from dsv3c.passes._prologue import PROLOGUE, Leaf, Prologue, Term, bound, local_terms
from dsv3c.passes.differentiate import JOINT
from dsv3c.rewrite import called, fresh, is_view, place_of, pure, substitute
from dsv3c.state import Cut, Pass, State, TakeNote


@dataclass(frozen=True)
class Hoist(Pass):
    """Move work that depends on weights alone into the sequence `prologue`, which runs once per step.

    The value becomes an input of each graph that reads it, and equal work on the same weight is done once for all
    layers and sequences. A weight that nothing else reads is no longer a parameter, unless a gradient of it is
    returned. Views stay: they cost nothing. A graph and its joint graph change alike, so that `cut` still fits them
    together. Layers that will be differentiated, but are not yet, stay: their gradients must reach the weights.
    """

    name: ClassVar[str] = "hoist"

    def run(self, state: State, note: TakeNote) -> State:
        program, registry = state.program, state.registry
        table = {g.name: g for g in program.graphs}
        plans: dict[str, _Plan] = {}
        for graph in program.graphs:
            reason = _obstacle(graph, program)
            if reason is None:
                plan = _plan(graph, program, registry, table, note)
                if plan is not None:
                    plans[graph.name] = plan
            elif reason and any(_invariant(graph, frozenset(), registry, table)):
                note("kept", graph.name, reason)
        if not plans:
            return state
        prologue = Prologue(program, registry)
        sequences = tuple(_rewired(s, plans, prologue) for s in program.sequences if s.name != PROLOGUE)
        new = {g.name: g for plan in plans.values() for g in plan.graphs}
        extra, sequence = prologue.finish()
        note("hoisted", PROLOGUE, f"it has {len(sequence.layers)} layers for {len(sequence.results)} values")
        graphs = (*(new.get(g.name, g) for g in program.graphs), *extra)
        records = None if state.cut is None else tuple(_not_saved(c, plans) for c in state.cut)
        return state.but(program=program.but(graphs=graphs, sequences=(sequence, *sequences)), cut=records)


def _not_saved(record: Cut, plans: Mapping[str, _Plan]) -> Cut:
    """The record of a cut without the values that its F no longer hands on."""
    plan = plans.get(record.forward or "")
    gone = {plan.old.results[i].name for i in plan.returned} if plan else set[str]()
    f_to_b, f_to_w = (tuple(v for v in names if v not in gone) for names in (record.f_to_b, record.f_to_w))
    return replace(record, f_to_b=f_to_b, f_to_w=f_to_w)


def _obstacle(graph: Graph, program: Program) -> str | None:
    """Why nothing can leave this graph; None if it can, an empty reason if it goes without saying."""
    uses = [(s, y) for s in program.sequences if s.name != PROLOGUE for y in s.layers if y.graph == graph.name]
    if not uses or not graph.weights:
        return ""
    if any(graph.name in called(g) for g in program.graphs):
        return "other graphs call it, so its parameters stay"
    joint = program.has_graph(graph.name + JOINT)
    if any(s.losses and not s.gradients for s, _ in uses) and not joint:
        return "not differentiated yet, and its gradients must reach the weights"
    return None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What becomes of a layer's graph: `graphs` are its new self and its new joint graph if it has one.

    `terms` are the values that it takes from the prologue, `kept` the indices of the weights that stay its own,
    `returned` the results that it no longer hands on, each with the index of the term that it is.
    """

    old: Graph
    graphs: tuple[Graph, ...]
    terms: tuple[Term, ...]
    kept: tuple[int, ...]
    returned: Mapping[int, int]


def _plan(graph: Graph, program: Program, registry: Registry, table: Mapping[str, Graph],
          note: TakeNote) -> _Plan | None:  # fmt: skip
    """How the graph and its joint graph lose their invariant work; None if they have none."""
    joint = program.graph(graph.name + JOINT) if program.has_graph(graph.name + JOINT) else None
    versions = [graph] if joint is None else [graph, joint]
    fixed = frozenset(v.name for g in versions for v in g.results) if joint else _returned_further(graph, program)
    moved = [_invariant(g, fixed, registry, table) for g in versions]
    splits = [_split(g, m, registry) for g, m in zip(versions, moved, strict=True)]
    terms: dict[Term, str] = {}
    for g, m, (_, border) in reversed(list(zip(versions, moved, splits, strict=True))):
        known = local_terms(g, m)
        for v in border:
            if known[v.name] not in terms:
                node = g.producers[v.name]
                terms[known[v.name]] = v.name
                note("hoisted", place_of(node), f"{graph.name}: {known[v.name].text} is computed once per step")
    for node in _staying(versions[-1], splits[-1][0], moved[-1]):
        reason = "acts on others"
        if any(v.name in fixed for v in node.outputs):
            reason = "is a result of the layer"
        elif is_view(node, registry):
            reason = "is a view, which costs nothing"
        note("kept", place_of(node), f"{graph.name}: {node.outputs[0]} {reason}")
    if not terms:
        return None
    inputs = _named(terms, versions, moved)
    stripped = []
    for g, m, (nodes, _) in zip(versions, moved, splits, strict=True):
        known = local_terms(g, m)
        by = {name: inputs[t] for name, t in known.items() if t in inputs}
        short = substitute(g.but(nodes=nodes), by)
        head = len(graph.inputs)
        stripped.append(short.but(inputs=(*g.inputs[:head], *inputs.values(), *g.inputs[head:])))
    order = {v.name: i for i, v in enumerate(inputs.values())}
    returned = {i: order[v.name] for i, v in enumerate(stripped[0].results) if v.name in order}
    stripped[0] = stripped[0].but(results=tuple(v for i, v in enumerate(stripped[0].results) if i not in returned))
    kept = _weights_kept(graph, versions, stripped, moved, note)
    weights = tuple(graph.weights[i] for i in kept)
    return _Plan(graph, tuple(g.but(weights=weights) for g in stripped), tuple(inputs), kept, returned)


def _returned_further(graph: Graph, program: Program) -> frozenset[str]:
    """Results of the graph that a sequence hands back under their names, which must therefore stay results."""
    found = set[str]()
    for s in program.sequences:
        told = {*s.results, *s.losses, *(value for value, _ in s.gradients)}
        for layer in s.layers:
            if layer.graph == graph.name:
                found |= {v.name for v, name in zip(graph.results, layer.outputs, strict=True) if name in told}
    return frozenset(found)


def _invariant(graph: Graph, fixed: frozenset[str], registry: Registry, table: Mapping[str, Graph]) -> list[Node]:
    """PURE nodes that depend on weights alone, without views that no other of them reads."""
    known = {v.name for v in graph.weights}
    found: list[Node] = []
    for node in graph.nodes:
        depends = node.inputs and all(v.name in known for v in node.inputs)
        if depends and not any(v.name in fixed for v in node.outputs) and pure(node, registry, table):
            known.update(v.name for v in node.outputs)
            found.append(node)
    needed: set[str] = set()
    moved: list[Node] = []
    for node in reversed(found):
        if not is_view(node, registry) or any(v.name in needed for v in node.outputs):
            needed.update(v.name for v in node.inputs)
            moved.append(node)
    return moved[::-1]


def _split(graph: Graph, moved: list[Node], registry: Registry) -> tuple[tuple[Node, ...], list[Value]]:
    """The nodes that stay, with copies of moved views that they read; and the moved values that they read."""
    gone = {n.outputs[0].name for n in moved}
    needed = {v.name for v in graph.results}
    stay: list[Node] = []
    for node in reversed(graph.nodes):
        wanted = is_view(node, registry) and any(v.name in needed for v in node.outputs)
        if node.outputs[0].name not in gone or wanted:
            stay.append(node)
            needed.update(v.name for v in node.inputs)
    border = [v for n in moved if not is_view(n, registry) for v in n.outputs if v.name in needed]
    return tuple(reversed(stay)), border


def _staying(graph: Graph, stay: tuple[Node, ...], moved: list[Node]) -> list[Node]:
    """Nodes that depend on weights alone and stay all the same."""
    known = {v.name for v in graph.weights} | {v.name for n in moved for v in n.outputs}
    found: list[Node] = []
    for node in stay:
        if node.inputs and all(v.name in known for v in node.inputs) and node not in moved:
            known.update(v.name for v in node.outputs)
            found.append(node)
    return found


def _named(terms: Mapping[Term, str], versions: list[Graph], moved: list[list[Node]]) -> dict[Term, Value]:
    """The new input that stands for each term, under a name that means the same, or nothing yet, in all versions."""
    found: dict[Term, Value] = {}
    known = [local_terms(g, m) for g, m in zip(versions, moved, strict=True)]
    defined = [{v.name for v in g.values()} for g in versions]
    taken = set[str]().union(*defined)
    for term, name in terms.items():
        same = all(name not in d or k.get(name) == term for d, k in zip(defined, known, strict=True))
        chosen = name if same else fresh(taken, name)
        taken.add(chosen)
        found[term] = Value(chosen, term.type)
    return found


def _weights_kept(graph: Graph, versions: list[Graph], stripped: list[Graph], moved: list[list[Node]],
                  note: TakeNote) -> tuple[int, ...]:  # fmt: skip
    """Indices of the weights that the layer still reads, returns a gradient of, or never read."""
    read = {v.name for g in stripped for n in g.nodes for v in n.inputs} | {v.name for g in stripped for v in g.results}
    were = {v.name for m in moved for n in m for v in n.inputs}
    gradients = {v.name for g in versions for v in g.results}
    graded = [w for w in graph.weights if w.name in were and w.name not in read and f"d_{w.name}" in gradients]
    if graded:
        names = ", ".join(w.name for w in graded)
        note("kept", graph.name, f"parameters that only the prologue reads, for their gradients: {names}")
    return tuple(i for i, w in enumerate(graph.weights) if w.name not in were or w.name in read or w in graded)


def _rewired(sequence: Sequence, plans: Mapping[str, _Plan], prologue: Prologue) -> Sequence:
    """The sequence with its layers taking hoisted values; values that layers no longer return are read from there."""
    layers: list[Layer] = []
    inputs = dict.fromkeys(sequence.inputs)
    by: dict[str, str] = {}
    for layer in sequence.layers:
        layer = replace(layer, inputs=tuple(by.get(name, name) for name in layer.inputs))
        plan = plans.get(layer.graph)
        if plan is None:
            layers.append(layer)
            continue
        leaves = {v.name: Leaf(name, v.type) for v, name in zip(plan.old.weights, layer.weights, strict=True)}
        names = tuple(prologue.name(bound(t, leaves)) for t in plan.terms)
        inputs.update(dict.fromkeys(names))
        by |= {layer.outputs[i]: names[k] for i, k in plan.returned.items()}
        layers.append(replace(
            layer, inputs=layer.inputs + names, weights=tuple(layer.weights[i] for i in plan.kept),
            outputs=tuple(name for i, name in enumerate(layer.outputs) if i not in plan.returned),
        ))  # fmt: skip
    inputs.update({name: None for layer in layers for name in layer.inputs if name in by.values()})
    return replace(sequence, inputs=tuple(inputs), layers=tuple(layers))
