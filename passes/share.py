"""Compute once what is computed twice: common subexpressions within each graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

from dsv3c.ir import Graph, Node, Phase, Value
from dsv3c.op import Registry
from dsv3c.rewrite import is_view, place_of, pure
from dsv3c.state import Pass, State, TakeNote


@dataclass(frozen=True)
class Share(Pass):
    """Compute once what PURE nodes compute twice: same op, same inputs, same attributes.

    The shared node runs in the earlier phase. What F computes and B or W repeats is shared only if it is a view or
    is saved for B or W anyway: otherwise sharing would keep more bytes, and that is for `recompute` to decide. A
    result keeps its name through an `identity`.
    """

    name: ClassVar[str] = "share"

    def run(self, state: State, note: TakeNote) -> State:
        graphs = {g.name: g for g in state.program.graphs}
        shared = (_Sharing(g, state.registry, graphs, note).run() for g in state.program.graphs)
        return state.with_program(state.program.with_graphs(tuple(shared)))


_Key: TypeAlias = tuple[str, tuple[str, ...], str]

_ORDER = {Phase.F: 0, Phase.B: 1, Phase.W: 2}


class _Sharing:
    """The work on one graph: `nodes` are those kept so far, `by` what is read instead of a value that went."""

    def __init__(self, graph: Graph, registry: Registry, graphs: Mapping[str, Graph], note: TakeNote) -> None:
        self.graph, self.registry, self.graphs, self.note = graph, registry, graphs, note
        self.results = {v.name for v in graph.results}
        self.by: dict[str, Value] = {}
        self.same: dict[str, list[str]] = {}  # value -> those that it is read instead of
        self.nodes: list[Node] = []
        self.index: dict[str, int] = {}  # output name -> its node's index in self.nodes
        self.gone: set[str] = set()  # first outputs of the nodes removed
        self.seen: dict[_Key, list[str]] = {}  # key -> first outputs of the kept nodes that compute it

    def run(self) -> Graph:
        changed = False
        for node in self.graph.nodes:
            reading = tuple(self.by.get(v.name, v) for v in node.inputs)
            node = node if reading == node.inputs else replace(node, inputs=reading)
            key = (node.op, tuple(v.name for v in reading), repr(sorted(node.attrs)))
            candidates = self.seen.setdefault(key, [])
            if any(self.take(node, self.nodes[self.index[c]]) for c in candidates):
                changed = True
                continue
            self.keep(node)
            candidates.append(node.outputs[0].name)
        return self.graph.but(nodes=tuple(self.nodes)) if changed else self.graph

    def keep(self, node: Node) -> None:
        for v in node.outputs:
            self.index[v.name] = len(self.nodes)
        self.nodes.append(node)

    def take(self, node: Node, first: Node) -> bool:
        """Read `first` instead of its repetition `node`, if that costs nothing."""
        returned = [v for v in node.outputs if v.name in self.results]
        view = is_view(node, self.registry)
        if view and returned:
            return False  # an identity would be one view instead of another
        place, text = place_of(node), f"{self.graph.name}: {node.outputs[0]} repeats {first.outputs[0]}"
        if not pure(node, self.registry, self.graphs):
            self.note("kept", place, f"{text}, but {node.op} acts on others")
            return False
        if _is_late(node) != _is_late(first) and not view and not self.saved(node, first):
            self.note("kept", place, f"{text}, which F would have to save for it")
            return False
        self.note("shared", place, text)
        self.gone.add(node.outputs[0].name)
        if _ORDER[node.phase] < _ORDER[first.phase]:
            self.nodes[self.index[first.outputs[0].name]] = replace(first, phase=node.phase)
        for old, new in zip(node.outputs, first.outputs, strict=True):
            if old in returned:
                self.keep(Node("identity", (new,), (), (old,), node.path, node.phase, node.line))
            else:
                self.by[old.name] = new
                self.same.setdefault(new.name, []).append(old.name)
        return True

    def saved(self, node: Node, first: Node) -> bool:
        """Whether each value that B or W would read of the F node among the two is one that they read already."""
        f, late = (first, node) if _is_late(node) else (node, first)
        pairs = zip(f.outputs, late.outputs, strict=True)
        return all(self.read_late(mine) for mine, other in pairs if self.read_late(other) or other.name in self.results)

    def read_late(self, value: Value) -> bool:
        """Whether B or W reads the value, directly or by a view of it that is taken in F."""
        users = [u for name in (value.name, *self.same.get(value.name, ())) for u in self.graph.users[name]]
        for user in users:
            if user.outputs[0].name in self.gone:
                continue
            if _is_late(user) or (is_view(user, self.registry) and any(map(self.read_late, user.outputs))):
                return True
        return False


def _is_late(node: Node) -> bool:
    """Whether the node runs after F, so that what it reads from F is saved."""
    return node.phase is not Phase.F
