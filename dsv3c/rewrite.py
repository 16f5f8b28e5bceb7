"""Small steps on graphs that passes are made of: who needs what, renaming, replacing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from dsv3c.ir import Graph, Node, Value


def ancestors(graph: Graph, values: Iterable[Value]) -> set[str]:
    """Names of all values that `values` are computed from, themselves included."""
    found = {v.name for v in values}
    for node in reversed(graph.nodes):
        if any(v.name in found for v in node.outputs):
            found.update(v.name for v in node.inputs)
    return found


def descendants(graph: Graph, values: Iterable[Value]) -> set[str]:
    """Names of all values computed from `values`, themselves included."""
    found = {v.name for v in values}
    for node in graph.nodes:
        if any(v.name in found for v in node.inputs):
            found.update(v.name for v in node.outputs)
    return found


def map_values(graph: Graph, new: Callable[[Value], Value]) -> Graph:
    """A copy in which every value, defined, used or returned, is what `new` makes of it."""

    def mapped(node: Node) -> Node:
        return replace(node, inputs=tuple(map(new, node.inputs)), outputs=tuple(map(new, node.outputs)))

    return Graph(graph.name, tuple(map(new, graph.inputs)), tuple(map(new, graph.weights)),
                 tuple(map(mapped, graph.nodes)), tuple(map(new, graph.results)))  # fmt: skip


def rename(graph: Graph, names: Mapping[str, str]) -> Graph:
    """A copy with values renamed; names that are not in `names` stay."""
    values: dict[str, Value] = {}

    def new(v: Value) -> Value:
        return values.setdefault(v.name, Value(names[v.name], v.type)) if v.name in names else v

    return map_values(graph, new)


def substitute(graph: Graph, by: Mapping[str, Value]) -> Graph:
    """A copy in which every use of a value named in `by`, results included, reads another value instead."""

    def new(v: Value) -> Value:
        return by.get(v.name, v)

    nodes = tuple(replace(n, inputs=tuple(map(new, n.inputs))) for n in graph.nodes)
    return graph.but(nodes=nodes, results=tuple(map(new, graph.results)))
