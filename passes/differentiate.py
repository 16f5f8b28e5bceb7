"""Reverse-mode differentiation on the IR: one joint graph per layer kind, its nodes tagged F, B or W."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dsv3c.build import Builder
from dsv3c.ir import Graph, IRError, Phase, Value
from dsv3c.op import Registry
from dsv3c.rewrite import ancestors, rename
from dsv3c.state import Pass, State, TakeNote

JOINT = "_joint"
"""Suffix of the graph that holds a layer's forward and backward together."""


@dataclass(frozen=True)
class Differentiate(Pass):
    """Derive gradients: a joint graph for every layer that training differentiates, tagged F, B, W.

    The joint graph of g(x; w) -> y takes also the cotangent `d_y` of every differentiable result and returns, after
    y, `d_x` for inputs and `d_w` for weights. F computes y, B the input gradients, W what only weight gradients
    need: the split that zero-bubble schedules and DualPipe use (report, section 3.2.1). The forward graph stays
    beside the joint one while a sequence refers to it.
    """

    name: ClassVar[str] = "differentiate"

    def run(self, state: State, note: TakeNote) -> State:
        program = state.program
        trained = {layer.graph for s in program.sequences if s.losses for layer in s.layers}
        graphs: list[Graph] = []
        for graph in program.graphs:
            wanted = graph.name in trained if program.sequences else not graph.name.endswith(JOINT)
            if wanted and not program.has_graph(graph.name + JOINT):
                joint = joint_graph(graph, state.registry)
                _describe(graph, joint, note)
                graphs += [graph] if program.sequences else []
                graphs.append(joint)
            else:
                graphs.append(graph)
        return state.with_program(program.with_graphs(tuple(graphs)))


def _describe(graph: Graph, joint: Graph, note: TakeNote) -> None:
    counts = {p: sum(n.phase is p for n in joint.nodes) for p in Phase}
    shown = ", ".join(f"{counts[p]} {p.value}" for p in Phase)
    note("differentiated", graph.name, f"{len(graph.nodes)} nodes became {shown}")
    names = {v.name for v in joint.results}
    for w in graph.weights:
        if f"d_{w.name}" not in names:
            note("kept", f"{graph.name}.{w.name}", "no gradient reaches this weight")


def joint_graph(graph: Graph, registry: Registry) -> Graph:
    """The joint forward and backward graph of `graph`, called NAME_joint.

    Raises IRError if a result is one of the graph's own parameters (give it a node of its own: `identity`).
    """
    active = _active(graph, registry)
    b = Builder.extend(registry, graph.but(name=graph.name + JOINT))
    gradients: dict[str, Value] = {}
    for result in dict.fromkeys(graph.results):
        if result in graph.params:
            raise IRError(f"{graph.name}: the result '{result.name}' is a parameter; return identity({result.name})")
        if result.name in active:
            gradients[result.name] = b.input(f"d_{result.name}", result.type)
    for node in reversed(graph.nodes):
        outputs = tuple(gradients.get(v.name) for v in node.outputs)
        vjp = registry[node.op].vjp
        if vjp is None or all(g is None for g in outputs):
            continue
        with b.at(node.path, Phase.B):
            for v, g in zip(node.inputs, vjp(b, node, *outputs), strict=True):
                if g is not None and v.name in active:
                    assert isinstance(g, Value)
                    known = gradients.get(v.name)
                    gradients[v.name] = g if known is None else b.add(known, g)
    return _finish(graph, b, gradients)


def _active(graph: Graph, registry: Registry) -> set[str]:
    """Names of the values that a gradient can flow through to a floating-point parameter."""
    active = {v.name for v in graph.params if v.type.dtype.is_float}
    for node in graph.nodes:
        if registry[node.op].vjp is not None and any(v.name in active for v in node.inputs):
            active.update(v.name for v in node.outputs if v.type.dtype.is_float)
    return active


def _finish(graph: Graph, b: Builder, gradients: dict[str, Value]) -> Graph:
    """Name each parameter's gradient `d_PARAMETER`, tag W, drop what no result needs."""
    results = list(graph.results)
    body = b.graph([])
    names: dict[str, str] = {}
    wanted: list[tuple[Value, Value]] = [(p, gradients[p.name]) for p in graph.params if p.name in gradients]
    given = {v.name for v in body.params}
    for p, g in wanted:
        name = f"d_{p.name}"
        with b.at(p.name, Phase.B):
            if p in graph.weights and g.type.dtype != p.type.dtype and g.type.dtype.bits < 32:
                g = b.cast(g, dtype="f32")
            if g.name in given or g.name in names or g.name in graph.producers:
                g = b.identity(g, out=name)
            else:
                names[g.name] = name
        results.append(g)
    body = b.graph(results)
    n_inputs = sum(p in graph.inputs for p, _ in wanted)
    inputs_end = len(graph.results) + n_inputs
    forward = {v.name for n in graph.nodes for v in n.outputs}
    needed = ancestors(body, tuple(results))
    backward = ancestors(body, tuple(results[len(graph.results) : inputs_end]))
    nodes = []
    for node in body.nodes:
        made = {v.name for v in node.outputs}
        if made & forward:
            nodes.append(node)
        elif made & needed:
            nodes.append(replace(node, phase=Phase.B if made & backward else Phase.W))
    return rename(body.but(nodes=tuple(nodes)), names)
