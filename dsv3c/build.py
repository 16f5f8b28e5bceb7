"""Build a graph by calling ops as methods: `y = b.linear(x, w)`; types are inferred and checked on the spot."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dsv3c.errors import did_you_mean
from dsv3c.ir import Attr, Graph, IRError, Node, Phase, Type, Value
from dsv3c.op import Registry
from dsv3c.verify import node_error, node_types

if TYPE_CHECKING:
    from collections.abc import Callable


class Builder:
    """Collects the nodes of one graph.

    `b.OP(*values, out="name", **attrs)` adds a node and gives its output Value, or a tuple if the op has several
    (then `out` is a tuple of names). Names are made unique. Raises IRError, with the caller's line, when types
    do not fit.
    """

    def __init__(self, registry: Registry, name: str, graphs: Mapping[str, Graph] | None = None) -> None:
        self.registry = registry
        self.name = name
        self.phase = Phase.F
        self._graphs = graphs or {}
        self._inputs: list[Value] = []
        self._weights: list[Value] = []
        self._nodes: list[Node] = []
        self._names: dict[str, int] = {}
        self._path: list[str] = []

    @classmethod
    def extend(cls, registry: Registry, graph: Graph, graphs: Mapping[str, Graph] | None = None) -> Builder:
        """A builder that goes on after the last node of `graph`."""
        b = cls(registry, graph.name, graphs)
        b._inputs, b._weights, b._nodes = list(graph.inputs), list(graph.weights), list(graph.nodes)
        b._names = {v.name: 0 for v in graph.values()}
        return b

    @classmethod
    def rewriting(cls, registry: Registry, graph: Graph, graphs: Mapping[str, Graph] | None = None) -> Builder:
        """A builder with the parameters of `graph` and none of its nodes; new names avoid all of its names."""
        b = cls.extend(registry, graph, graphs)
        b._nodes = []
        return b

    def input(self, name: str, type: Type) -> Value:
        """Declare an activation or state parameter."""
        self._inputs.append(Value(self._unique(name), type))
        return self._inputs[-1]

    def weight(self, name: str, type: Type) -> Value:
        """Declare a trained parameter."""
        self._weights.append(Value(self._unique(name), type))
        return self._weights[-1]

    @contextmanager
    def path(self, name: str) -> Iterator[None]:
        """Nodes added inside belong to the part of the model called `name`; nested parts join with a dot."""
        self._path.append(name)
        try:
            yield
        finally:
            self._path.pop()

    @contextmanager
    def at(self, path: str, phase: Phase) -> Iterator[None]:
        """Nodes added inside have exactly this path and phase."""
        saved = self._path, self.phase
        self._path, self.phase = [path] if path else [], phase
        try:
            yield
        finally:
            self._path, self.phase = saved

    def emit(self, op: str, inputs: tuple[Value, ...], attrs: Mapping[str, Attr] | None = None,
             out: tuple[str, ...] = (), line: str = "") -> tuple[Value, ...]:  # fmt: skip
        """Add a node of the op called `op`; gives its outputs."""
        pairs = tuple((attrs or {}).items())
        node = Node(op, inputs, pairs, (), ".".join(self._path), self.phase, line)
        try:
            types = node_types(op, tuple(v.type for v in inputs), node, self.registry, self._graphs)
        except IRError as error:
            shown = self.graph(self._inputs[:0])
            raise node_error(shown.but(nodes=(*shown.nodes, node)), len(shown.nodes), str(error)) from None
        names = out or (op,) * len(types)
        if len(names) != len(types):
            raise IRError(f"{self.name}: {op} has {len(types)} results, {len(names)} are named")
        outputs = tuple(Value(self._unique(n), t) for n, t in zip(names, types, strict=True))
        self._nodes.append(Node(op, inputs, pairs, outputs, node.path, self.phase, line))
        return outputs

    def fresh(self, name: str, type: Type) -> Value:
        """A value with a free name, for a node that the caller appends."""
        return Value(self._unique(name), type)

    def append(self, node: Node) -> None:
        """Add a finished node whose output names are already unique."""
        for v in node.outputs:
            self._names.setdefault(v.name, 0)
        self._nodes.append(node)

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op.startswith("_") or (op != "call" and op not in self.registry):
            hint = "" if op.startswith("_") else f"; {did_you_mean(op, (o.name for o in self.registry))}"
            raise AttributeError(f"no op is called '{op}'{hint}")

        def add(*inputs: Value, out: str | tuple[str, ...] = (), **attrs: Attr) -> Value | tuple[Value, ...]:
            caller = sys._getframe(1)
            line = f"{caller.f_code.co_filename}:{caller.f_lineno}"
            outputs = self.emit(op, inputs, attrs, (out,) if isinstance(out, str) else out, line)
            return outputs[0] if len(outputs) == 1 else outputs

        return add

    def graph(self, results: tuple[Value, ...] | list[Value]) -> Graph:
        """The finished graph."""
        return Graph(self.name, tuple(self._inputs), tuple(self._weights), tuple(self._nodes), tuple(results))

    def _unique(self, name: str) -> str:
        """`name` if it is free, else `name_1`, `name_2`, ..."""
        if name not in self._names:
            self._names[name] = 0
            return name
        while True:
            self._names[name] += 1
            candidate = f"{name}_{self._names[name]}"
            if candidate not in self._names:
                self._names[candidate] = 0
                return candidate
