"""A pass from outside: two scalings in a row become one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dsv3c.ir import Graph
from dsv3c.passes import register
from dsv3c.state import Pass, State, TakeNote


@register
@dataclass(frozen=True)
class MergeScales(Pass):
    """Replace scale(scale(x)) by one scale; those whose inner result is needed elsewhere are left alone."""

    name: ClassVar[str] = "merge_scales"

    def run(self, state: State, note: TakeNote) -> State:
        graphs = tuple(self._merge(g, note) for g in state.program.graphs)
        return state.with_program(state.program.with_graphs(graphs))

    def _merge(self, graph: Graph, note: TakeNote) -> Graph:
        for i, outer in enumerate(graph.nodes):
            inner = graph.producers.get(outer.inputs[0].name) if outer.op == "scale" else None
            if inner is None or inner.op != "scale":
                continue
            if len(graph.users[inner.output.name]) > 1 or inner.output in graph.results:
                note("kept", outer.path or graph.name, f"{inner.output} is needed elsewhere")
                continue
            by = float(inner.attr("by")) * float(outer.attr("by"))  # type: ignore[arg-type]
            merged = replace(outer, inputs=inner.inputs, attrs=(("by", by),))
            nodes = (*graph.nodes[:i], merged, *graph.nodes[i + 1 :])
            note("merged", outer.path or graph.name, f"two scalings became one by {by}")
            return self._merge(graph.but(nodes=tuple(n for n in nodes if n is not inner)), note)
        return graph
