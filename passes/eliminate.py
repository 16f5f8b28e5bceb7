"""Remove what costs time and changes nothing: dead nodes, identities, casts to the same type, unreachable graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dsv3c.ir import Graph, Node, Program, Value
from dsv3c.op import Registry
from dsv3c.passes.differentiate import JOINT
from dsv3c.rewrite import called, keep, live, place_of, pure, rename, substitute
from dsv3c.state import Pass, State, TakeNote


@dataclass(frozen=True)
class Eliminate(Pass):
    """Remove dead nodes, identities, casts to the same type, and graphs that nothing reaches.

    Signatures are contracts: parameters stay even if nothing reads them, and results keep their names. A result's
    identity goes only if what it names can take over that name. Nodes that communicate or draw random numbers stay.
    A graph is reached if a layer runs it, if it is the joint graph of one that a layer runs, or if a reached graph
    calls it. A graph that nothing names at all is an entry point, run by name, and reached too.
    """

    name: ClassVar[str] = "eliminate"

    def run(self, state: State, note: TakeNote) -> State:
        program, registry = state.program, state.registry
        table = {g.name: g for g in program.graphs}
        graphs = []
        for graph in program.graphs:
            short = without_identities(graph, note)
            graphs.append(without_dead(short, registry, table, note))
        cleaned = program.with_graphs(tuple(graphs))
        reached = _reached(program, cleaned)
        for graph in cleaned.graphs:
            if graph.name not in reached:
                note("removed", graph.name, "no layer reaches this graph")
        kept = tuple(g for g in cleaned.graphs if g.name in reached)
        return state.with_program(cleaned.with_graphs(kept))


def without_identities(graph: Graph, note: TakeNote) -> Graph:
    """The graph without nodes that only rename a value; the same object if there are none."""
    fixed = {v.name for v in (*graph.params, *graph.results)}
    by: dict[str, Value] = {}
    names: dict[str, str] = {}
    removed: list[Node] = []
    for node in graph.nodes:
        if not _renames(node):
            continue
        y = node.output
        x = by.get(node.inputs[0].name, node.inputs[0])
        place = place_of(node)
        if y not in graph.results:
            pass
        elif x.name in fixed or x.name in names:
            note("kept", place, f"{graph.name}: {y} names a result, and {x} has a name to keep")
            continue
        elif graph.producers[x.name].phase is not node.phase:
            note("kept", place, f"{graph.name}: {y} is a result of {node.phase.value}, and {x} of another phase")
            continue
        else:
            names[x.name] = y.name
        by[y.name] = x
        removed.append(node)
        note("removed", place, f"{graph.name}: {y} is {x}")
    if not removed:
        return graph
    gone = {n.output.name for n in removed}
    short = graph.but(nodes=tuple(n for n in graph.nodes if n.outputs[0].name not in gone))
    return rename(substitute(short, by), names)


def _renames(node: Node) -> bool:
    """Whether the node's value is its input under another name."""
    if node.op == "identity":
        return True
    return node.op == "cast" and node.inputs[0].type == node.output.type


def without_dead(graph: Graph, registry: Registry, graphs: Mapping[str, Graph], note: TakeNote) -> Graph:
    """The graph without PURE nodes that no result needs; the same object if there are none."""
    kept = live(graph, registry, graphs)
    needed = {v.name for v in graph.results} | {v.name for i in kept for v in graph.nodes[i].inputs}
    for i, node in enumerate(graph.nodes):
        if i not in kept:
            note("removed", place_of(node), f"{graph.name}: nothing needs {_outputs(node)}")
        elif not pure(node, registry, graphs) and not any(v.name in needed for v in node.outputs):
            note("kept", place_of(node), f"{graph.name}: nothing needs {_outputs(node)}, but {node.op} acts on others")
    return keep(graph, kept)


def _outputs(node: Node) -> str:
    return ", ".join(v.name for v in node.outputs)


def _reached(before: Program, after: Program) -> set[str]:
    """Names of the graphs of `after` that run; what was called in `before` and is no longer, does not."""
    if not after.sequences:
        return {g.name for g in after.graphs}
    run = {layer.graph for s in after.sequences for layer in s.layers}
    roots = run | {name + JOINT for name in run if after.has_graph(name + JOINT)}
    named = {name for g in before.graphs for name in called(g)} | {g.name for g in after.graphs if _is_joint(g, after)}
    pending = [g.name for g in after.graphs if g.name in roots or g.name not in named]
    reached: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += called(after.graph(name))
    return reached


def _is_joint(graph: Graph, program: Program) -> bool:
    """Whether this is the forward or the joint graph of a layer that was differentiated."""
    return graph.name.endswith(JOINT) or program.has_graph(graph.name + JOINT)
