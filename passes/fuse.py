"""Group row-wise work with its producers and consumers into regions, each of which becomes one generated kernel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from dsv3c.dims import Dim, same
from dsv3c.ir import Graph, Node, Phase, Value
from dsv3c.op import Effect, Registry
from dsv3c.rewrite import CALL, ancestors, map_values, outline, place_of
from dsv3c.rows import Operand, Reduce, Row, walk
from dsv3c.state import Pass, State, TakeNote
from dsv3c.text import show_graph


@dataclass(frozen=True)
class Fuse(Pass):
    """Turn connected row-wise nodes of one phase into calls of region graphs, so that no intermediate meets memory.

    Two nodes join when one hands the other whole rows (or one number per row), or both read the same rows; both have
    the same rows, and no path between them leaves the region. What works on tiles of rows, as quantizing for weight
    gradients does, joins all but what needs whole rows first. `single=false` leaves nodes alone that found no partner.
    Equal regions share one graph.
    """

    name: ClassVar[str] = "fuse"
    single: bool = True
    most_operands: int = 16

    def run(self, state: State, note: TakeNote) -> State:
        program = state.program
        called = {str(n.attr("graph")) for g in program.graphs for n in g.nodes if n.op == CALL}
        regions: dict[str, Graph] = {}
        graphs = []
        for graph in program.graphs:
            if graph.name not in called:
                graph = self._fuse(paired(graph, note), state.registry, regions, note)
            graphs.append(graph)
        new = tuple(r for r in regions.values() if not program.has_graph(r.name))
        return state.with_program(program.with_graphs((*new, *graphs)))

    def _fuse(self, graph: Graph, registry: Registry, regions: dict[str, Graph], note: TakeNote) -> Graph:
        grouping = Grouping(graph, registry, self.most_operands)
        alone: list[Node] = []
        chosen: list[list[Node]] = []
        for group in grouping.groups():
            members = [graph.nodes[i] for i in trimmed(graph, registry, group)]
            work = [n for n in members if not registry[n.op].view]
            if len(work) > 1 or (self.single and work):
                chosen.append(members)
            else:
                alone += work
        for members in chosen:
            made = {v.name for n in members for v in n.outputs}
            indices = [i for i, n in enumerate(graph.nodes) if any(v.name in made for v in n.outputs)]
            found, outer = outline(graph, indices, _REGION)
            region = named_by_content(found)
            regions.setdefault(region.name, region)
            graph = outer.but(nodes=tuple(_call(n, region.name) if n.op == CALL else n for n in outer.nodes))
            ops = " + ".join(n.op for n in members)
            note("fused", f"{graph.name}.{place_of(members[-1])}", f"{ops} into {region.name}")
        for node in alone:
            note(
                "kept",
                f"{graph.name}.{place_of(node)}",
                f"{node.op} has no row-wise neighbour to join, and single=false",
            )
        for node, reason in grouping.refused():
            note("kept", f"{graph.name}.{place_of(node)}", reason)
        self._explain(graph, registry, note)
        return graph

    def _explain(self, graph: Graph, registry: Registry, note: TakeNote) -> None:
        """Say why large nodes between regions stay apart: they are not row-wise."""
        for node in graph.nodes:
            if node.op != CALL and not registry[node.op].view and not is_rowwise(node, registry):
                why = "is not row-wise" if registry[node.op].rows is None else "has rows of any number of columns"
                note("kept", f"{graph.name}.{place_of(node)}", f"{node.op} {why}")


PAIRS = {("quantize_block", "transpose_blocks"): "quantize_block_both"}
"""An op, the op that reads all that it makes and nothing else, and the op that does both in one pass."""


def paired(graph: Graph, note: TakeNote) -> Graph:
    """The graph with an op for each of the `PAIRS` in it: not row-wise, but one trip through memory as well."""
    made = {n.outputs: i for i, n in enumerate(graph.nodes)}
    nodes: list[Node | None] = list(graph.nodes)
    for j, second in enumerate(graph.nodes):
        i = made.get(second.inputs)
        first = None if i is None else nodes[i]
        both = PAIRS.get((first.op, second.op)) if first is not None else None
        if i is not None and first is not None and both is not None and first.phase is second.phase:
            nodes[i], nodes[j] = replace(first, op=both, outputs=(*first.outputs, *second.outputs)), None
            note("fused", f"{graph.name}.{place_of(first)}", f"{first.op} + {second.op} into {both}")
    return graph if None not in nodes else graph.but(nodes=tuple(n for n in nodes if n is not None))


_REGION = "region being named"
"""No identifier, so no graph of the program has this name."""


def _call(node: Node, name: str) -> Node:
    """The call of the region just outlined, under its final name."""
    return replace(node, attrs=(("graph", name),)) if node.attr("graph") == _REGION else node


def space(node: Node, registry: Registry) -> tuple[Dim, ...] | None:
    """The dims over which a row-wise node has rows; None if no operand says."""
    rows = registry[node.op].rows
    assert rows is not None
    return next((v.type.shape[:-1] for v, kind in zip(node.inputs, rows.operands, strict=True) if kind == "row"), None)


def hands_rows(producer: Node, v: Value, node: Node, registry: Registry) -> bool:
    """Whether `node` reads the result `v` of `producer` in the same rows in which `producer` makes it, everywhere.

    Rows as rows, or one number per row as that: not a sum over all rows, a table that rows share, or another shape.
    """
    made, read = registry[producer.op].rows, registry[node.op].rows
    assert made is not None and read is not None
    (result,) = (kind for w, kind in zip(producer.outputs, made.results, strict=True) if w == v)
    operands = {kind for w, kind in zip(node.inputs, read.operands, strict=True) if w == v}
    mine, theirs = space(node, registry), space(producer, registry)
    together = mine is not None and theirs is not None and len(mine) == len(theirs) and all(map(same, mine, theirs))
    return result in ("row", "scalar") and operands == {result} and together


TURNED = ("turned", "turned_tile")


def in_tiles(node: Node, registry: Registry) -> bool:
    """Whether a row-wise node works on tiles of rows."""
    rows = registry[node.op].rows
    assert rows is not None
    return any(kind in TURNED for kind in rows.results)


def needs_whole_rows(node: Node, registry: Registry) -> bool:
    """Whether what a row-wise node hands on of one column depends on all columns of the row."""
    rows = registry[node.op].rows
    assert rows is not None
    operands: list[Row] = []
    for i, (v, kind) in enumerate(zip(node.inputs, rows.operands, strict=True)):
        cols = v.type.shape[-1] if kind in ("row", "prefix", "column") else 0
        if not isinstance(cols, int):
            return True
        operands.append(Operand(cols, i))
    body = rows.body(*operands, **dict(node.attrs))
    made = body if isinstance(body, tuple) else (body,)
    handed = tuple(r for r, kind in zip(made, rows.results, strict=True) if kind not in ("scalar", "column"))
    return any(isinstance(r, Reduce) and not r.group for r in walk(handed))


def is_rowwise(node: Node, registry: Registry) -> bool:
    """Whether `node` can be part of a region: pure, with a row program, its rows of a known number of columns."""
    if node.op == CALL or registry[node.op].effect is not Effect.PURE:
        return False
    rows = registry[node.op].rows
    return rows is not None and all(
        isinstance(v.type.shape[-1], int) for v, kind in zip(node.inputs, rows.operands, strict=True) if kind == "row"
    )


class Grouping:
    """Union of row-wise nodes along edges that hand over rows, as long as the contracted graph stays acyclic."""

    def __init__(self, graph: Graph, registry: Registry, most_operands: int) -> None:
        self.graph, self.registry, self.most = graph, registry, most_operands
        self.index = {v.name: i for i, n in enumerate(graph.nodes) for v in n.outputs}
        self.group = list(range(len(graph.nodes)))
        self.preds = [sorted({self.index[v.name] for v in n.inputs if v.name in self.index}) for n in graph.nodes]
        needed = ancestors(graph, graph.results)
        self.rowwise = [is_rowwise(n, registry) and any(v.name in needed for v in n.outputs) for n in graph.nodes]
        works = [w and not registry[n.op].view for n, w in zip(graph.nodes, self.rowwise, strict=True)]
        self.tiled = [w and in_tiles(n, registry) for n, w in zip(graph.nodes, works, strict=True)]
        self.whole = [w and needs_whole_rows(n, registry) for n, w in zip(graph.nodes, works, strict=True)]
        self._refused: dict[tuple[int, int], str] = {}

    def groups(self) -> list[list[int]]:
        """The groups, each in node order. What no result needs is left out."""
        for i, node in enumerate(self.graph.nodes):
            if not self.rowwise[i]:
                continue
            for v in dict.fromkeys(node.inputs):
                p = self.index.get(v.name)
                if p is None or not self.rowwise[p] or self.group[p] == self.group[i]:
                    continue
                producer = self.graph.nodes[p]
                if producer.phase is not node.phase:
                    continue
                if hands_rows(producer, v, node, self.registry):
                    self._join(p, i)
                else:
                    self._refused[p, i] = f"{node.op} stays apart from {producer.op}: their rows differ"
        for first, second in self._siblings():
            if self.group[first] != self.group[second]:
                self._join(first, second)
        found: dict[int, list[int]] = {}
        for i in range(len(self.graph.nodes)):
            if self.rowwise[i]:
                found.setdefault(self.group[i], []).append(i)
        return list(found.values())

    def _siblings(self) -> Iterator[tuple[int, int]]:
        """Pairs of nodes that read the same value as rows, over the same rows, in one phase: what neither makes."""
        readers: dict[str, list[int]] = {}
        for i, node in enumerate(self.graph.nodes):
            rows = self.registry[node.op].rows if self.rowwise[i] else None
            if rows is None or self.registry[node.op].view:
                continue
            for v, kind in dict.fromkeys(zip(node.inputs, rows.operands, strict=True)):
                p = self.index.get(v.name)
                if kind == "row" and not (p is not None and self.rowwise[p]):
                    readers.setdefault(v.name, []).append(i)
        for indices in readers.values():
            for first, second in pairwise(indices):
                a, b = self.graph.nodes[first], self.graph.nodes[second]
                mine, theirs = space(a, self.registry), space(b, self.registry)
                if a.phase is b.phase and mine and theirs and len(mine) == len(theirs) and all(map(same, mine, theirs)):
                    yield first, second

    def refused(self) -> list[tuple[Node, str]]:
        """Nodes that read rows of a region they could not join, and why; call after `groups`."""
        return [(self.graph.nodes[i], why) for (p, i), why in self._refused.items() if self.group[p] != self.group[i]]

    def _join(self, p: int, i: int) -> None:
        keep, drop = self.group[p], self.group[i]
        merged = [keep if g == drop else g for g in self.group]
        members = [j for j, g in enumerate(merged) if g == keep]
        reason = self._too_many(members) or self._misread(members) or self._tiles(members) or self._cyclic(merged, keep)
        if reason:
            producer, node = self.graph.nodes[p], self.graph.nodes[i]
            self._refused.setdefault((p, i), f"{node.op} stays apart from {producer.op}: {reason}")
        else:
            self.group = merged

    def _too_many(self, members: list[int]) -> str:
        made = {v.name for j in members for v in self.graph.nodes[j].outputs}
        count = len({v.name for j in members for v in self.graph.nodes[j].inputs} - made)
        return f"together they would have {count} operands, above most_operands={self.most}" * (count > self.most)

    def _misread(self, members: list[int]) -> str:
        """What one member would read of another other than row by row."""
        inside = set(members)
        for j in members:
            node = self.graph.nodes[j]
            for v in node.inputs:
                p = self.index.get(v.name)
                if p in inside and not hands_rows(self.graph.nodes[p], v, node, self.registry):
                    return f"{node.op} needs all rows of {v}"
        return ""

    def _tiles(self, members: list[int]) -> str:
        """What one member needs of whole rows where another works on tiles of rows."""
        if not any(self.tiled[j] for j in members):
            return ""
        whole = next((j for j in members if self.whole[j] or self._sum_read(j, members)), None)
        if whole is None:
            return ""
        return f"{self.graph.nodes[whole].op} needs whole rows, tiles of rows are done in parts"

    def _sum_read(self, j: int, members: list[int]) -> bool:
        """Whether a member reads numbers per row that member `j` makes."""
        rows = self.registry[self.graph.nodes[j].op].rows
        assert rows is not None
        made = {v.name for v, k in zip(self.graph.nodes[j].outputs, rows.results, strict=True) if k == "scalar"}
        return any(v.name in made for m in members for v in self.graph.nodes[m].inputs)

    def _cyclic(self, merged: list[int], group: int) -> str:
        """What lies on a path that leaves the group and comes back."""
        by_group: dict[int, list[int]] = {}
        for j, g in enumerate(merged):
            by_group.setdefault(g, []).append(j)
        stack = [(p, p) for j in by_group[group] for p in self.preds[j] if merged[p] != group]
        seen: set[int] = set()
        while stack:
            at, last = stack.pop()
            if merged[at] == group:
                return f"{self.graph.nodes[last].op} lies between them"
            if merged[at] not in seen:
                seen.add(merged[at])
                stack += [(p, at) for j in by_group[merged[at]] for p in self.preds[j] if merged[p] not in seen]
        return ""


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
