"""Group row-wise work with its producers and consumers into regions, each of which becomes one generated kernel."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import ClassVar

from dsv3c.ir import Graph, Node, Phase, Value
from dsv3c.op import Effect, Registry
from dsv3c.rewrite import map_values, outline
from dsv3c.state import Pass, State, TakeNote
from dsv3c.text import show_graph


@dataclass(frozen=True)
class Fuse(Pass):
    """Turn connected row-wise nodes of one phase into calls of region graphs, so that no intermediate meets memory.

    Two nodes join when one hands the other whole rows (or one number per row) and no path between them leaves the
    region. `single=false` leaves nodes alone that found no partner. Equal regions share one graph.
    """

    name: ClassVar[str] = "fuse"
    single: bool = True
    most_operands: int = 16

    def run(self, state: State, note: TakeNote) -> State:
        program = state.program
        called = {str(n.attr("graph")) for g in program.graphs for n in g.nodes if n.op == "call"}
        regions: dict[str, Graph] = {}
        graphs = []
        for graph in program.graphs:
            graphs.append(graph if graph.name in called else self._fuse(graph, state.registry, regions, note))
        new = tuple(r for r in regions.values() if not program.has_graph(r.name))
        return state.with_program(program.with_graphs((*new, *graphs)))

    def _fuse(self, graph: Graph, registry: Registry, regions: dict[str, Graph], note: TakeNote) -> Graph:
        alone: list[Node] = []
        chosen: list[list[Node]] = []
        for group in Grouping(graph, registry, self.most_operands).groups():
            members = [graph.nodes[i] for i in trimmed(graph, registry, group)]
            work = [n for n in members if not registry[n.op].view]
            if len(work) > 1 or (self.single and work):
                chosen.append(members)
            else:
                alone += work
        for members in chosen:
            made = {v.name for n in members for v in n.outputs}
            indices = [i for i, n in enumerate(graph.nodes) if any(v.name in made for v in n.outputs)]
            found, outer = outline(graph, indices, "region")
            region = named_by_content(found)
            regions.setdefault(region.name, region)
            graph = outer.but(nodes=tuple(_call(n, region.name) if n.op == "call" else n for n in outer.nodes))
            ops = " + ".join(n.op for n in members)
            note("fused", f"{graph.name}.{members[-1].path}", f"{ops} into {region.name}")
        for node in alone:
            note("kept", f"{graph.name}.{node.path}", f"{node.op} has no row-wise neighbour to join, and single=false")
        self._explain(graph, registry, note)
        return graph

    def _explain(self, graph: Graph, registry: Registry, note: TakeNote) -> None:
        """Say why large nodes between regions stay apart: they are not row-wise."""
        for node in graph.nodes:
            if node.op != "call" and not registry[node.op].view and registry[node.op].rows is None:
                note("kept", f"{graph.name}.{node.path}", f"{node.op} is not row-wise")


def _call(node: Node, name: str) -> Node:
    """The call of the region just outlined, under its final name."""
    return replace(node, attrs=(("graph", name),)) if node.attr("graph") == "region" else node


def space_edges(node: Node, registry: Registry) -> tuple[Value, ...]:
    """The inputs that `node` reads row by row in its own row space."""
    rows = registry[node.op].rows
    assert rows is not None
    return tuple(v for v, kind in zip(node.inputs, rows.operands, strict=True) if kind in ("row", "scalar"))


def row_results(node: Node, registry: Registry) -> tuple[Value, ...]:
    """The outputs that have one row per row; sums over all rows are not among them."""
    rows = registry[node.op].rows
    assert rows is not None
    return tuple(v for v, kind in zip(node.outputs, rows.results, strict=True) if kind in ("row", "scalar"))


def is_rowwise(node: Node, registry: Registry) -> bool:
    return node.op != "call" and registry[node.op].rows is not None and registry[node.op].effect is Effect.PURE


class Grouping:
    """Union of row-wise nodes along edges that hand over rows, as long as the contracted graph stays acyclic."""

    def __init__(self, graph: Graph, registry: Registry, most_operands: int) -> None:
        self.graph, self.registry, self.most = graph, registry, most_operands
        self.index = {v.name: i for i, n in enumerate(graph.nodes) for v in n.outputs}
        self.group = list(range(len(graph.nodes)))
        self.preds = [sorted({self.index[v.name] for v in n.inputs if v.name in self.index}) for n in graph.nodes]

    def groups(self) -> list[list[int]]:
        """The groups, each in node order."""
        for i, node in enumerate(self.graph.nodes):
            if not is_rowwise(node, self.registry):
                continue
            for v in space_edges(node, self.registry):
                p = self.index.get(v.name)
                if p is None or self.group[p] == self.group[i]:
                    continue
                producer = self.graph.nodes[p]
                if (
                    producer.phase is node.phase
                    and is_rowwise(producer, self.registry)
                    and v in row_results(producer, self.registry)
                ):
                    self._join(p, i)
        found: dict[int, list[int]] = {}
        for i, node in enumerate(self.graph.nodes):
            if is_rowwise(node, self.registry):
                found.setdefault(self.group[i], []).append(i)
        return list(found.values())

    def _join(self, p: int, i: int) -> None:
        saved = list(self.group)
        keep, drop = self.group[p], self.group[i]
        self.group = [keep if g == drop else g for g in self.group]
        members = [j for j, g in enumerate(self.group) if g == keep]
        if self._operands(members) > self.most or self._cyclic(keep):
            self.group = saved

    def _operands(self, members: list[int]) -> int:
        made = {v.name for j in members for v in self.graph.nodes[j].outputs}
        return len({v.name for j in members for v in self.graph.nodes[j].inputs} - made)

    def _cyclic(self, group: int) -> bool:
        """Whether a path leaves the group and comes back."""
        members = {j for j, g in enumerate(self.group) if g == group}
        by_group: dict[int, list[int]] = {}
        for j, g in enumerate(self.group):
            by_group.setdefault(g, []).append(j)
        stack = [p for j in members for p in self.preds[j] if self.group[p] != group]
        seen: set[int] = set()
        while stack:
            g = self.group[stack.pop()]
            if g == group:
                return True
            if g not in seen:
                seen.add(g)
                stack += [p for j in by_group[g] for p in self.preds[j] if self.group[p] not in seen]
        return False


def trimmed(graph: Graph, registry: Registry, group: list[int]) -> list[int]:
    """The group without views at its ends: a view of a result, or one that others need as well, is free outside."""
    members = list(group)
    results = {v.name for v in graph.results}
    order = {v.name: i for i, n in enumerate(graph.nodes) for v in n.outputs}
    while True:
        inside = set(members)
        producers = {v.name for i in members for v in graph.nodes[i].outputs}
        for i in members:
            node = graph.nodes[i]
            if not registry[node.op].view:
                continue
            users = [order[u.outputs[0].name] for v in node.outputs for u in graph.users[v.name]]
            outside = any(u not in inside for u in users) or any(v.name in results for v in node.outputs)
            trailing = not any(u in inside for u in users)
            leading = not any(v.name in producers for v in node.inputs)
            if trailing or (leading and outside):
                members.remove(i)
                break
        else:
            return members


def named_by_content(region: Graph) -> Graph:
    """The region with plain value names and a name of its own that depends on what it computes alone."""
    names: dict[str, Value] = {}

    def canonical(v: Value) -> Value:
        return names.setdefault(v.name, Value(f"x{len(names)}", v.type))

    nodes = tuple(replace(n, path="", phase=Phase.F, line="") for n in region.nodes)
    plain = map_values(region.but(name="region", nodes=nodes), canonical)
    digest = hashlib.sha256(show_graph(plain).encode()).hexdigest()[:8]
    title = "_".join(dict.fromkeys(n.op for n in region.nodes))
    return plain.but(name=f"{title[:48].rstrip('_')}_{digest}")
