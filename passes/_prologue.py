"""The work of a prologue: expressions over weights, equal ones once, in as few kinds of graph as possible."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from dsv3c.build import Builder
from dsv3c.ir import Attrs, Graph, Layer, Node, Program, Sequence, Type, Value
from dsv3c.op import Registry

PROLOGUE = "prologue"
"""The sequence that runs once per step, before the first micro-batch."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A weight: by the name of a parameter within a graph, by its own name within a program."""

    name: str
    type: Type

    @property
    def text(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Term:
    """Output `index` of `count` of an op on weights or on other terms; equal terms are equal work."""

    op: str
    inputs: tuple[Term | Leaf, ...]
    attrs: Attrs
    literal: str
    index: int
    count: int
    type: Type

    @property
    def text(self) -> str:
        """`op(weight)`, with the output's number if there are several; attributes are left out."""
        return f"{self.op}({', '.join(t.text for t in self.inputs)})" + (f"[{self.index}]" if self.count > 1 else "")

    @property
    def full_text(self) -> str:
        """As `text`, with attributes and types, so that different terms have different texts."""
        inputs = [t.full_text if isinstance(t, Term) else f"{t.name}: {t.type}" for t in self.inputs]
        attrs = [f"{k}={v!r}" for k, v in self.attrs]
        return f"{self.op}({', '.join(inputs + attrs)})[{self.index}]"


def local_terms(graph: Graph, nodes: Iterable[Node]) -> dict[str, Term]:
    """Each output of `nodes`, which depend on the graph's weights alone, as a term over its parameters."""
    leaves = {v.name: Leaf(v.name, v.type) for v in graph.weights}
    known: dict[str, Term] = {}
    for n in nodes:
        inputs = tuple(known.get(v.name) or leaves[v.name] for v in n.inputs)
        for i, v in enumerate(n.outputs):
            known[v.name] = Term(n.op, inputs, n.attrs, repr(n.attrs), i, len(n.outputs), v.type)
    return known


def bound(term: Term, leaves: Mapping[str, Leaf]) -> Term:
    """The term with other weights for its own, by name."""

    def new(t: Term | Leaf) -> Term | Leaf:
        return bound(t, leaves) if isinstance(t, Term) else leaves[t.name]

    return Term(term.op, tuple(map(new, term.inputs)), term.attrs, term.literal, term.index, term.count, term.type)


def _leaves(term: Term) -> Iterator[Leaf]:
    for t in term.inputs:
        if isinstance(t, Term):
            yield from _leaves(t)
        else:
            yield t


class Prologue:
    """Collects terms over the weights of a program, beside those that its prologue already computes."""

    def __init__(self, program: Program, registry: Registry) -> None:
        self._registry = registry
        self._graphs = {g.name: g for g in program.graphs}
        self._old = program.sequence(PROLOGUE) if program.has_sequence(PROLOGUE) else Sequence(PROLOGUE, (), (), ())
        self._names: dict[Term, str] = {}
        self._taken = {name for s in program.sequences for y in s.layers for name in y.outputs}
        self._new: dict[Term, None] = {}
        self._kinds: dict[tuple[Term, ...], Graph] = {}
        for layer in self._old.layers:
            graph = self._graphs[layer.graph]
            terms = local_terms(graph, graph.nodes)
            leaves = {v.name: Leaf(name, v.type) for v, name in zip(graph.weights, layer.weights, strict=True)}
            for v, name in zip(graph.results, layer.outputs, strict=True):
                self._names[bound(terms[v.name], leaves)] = name

    def name(self, term: Term) -> str:
        """What the prologue calls the value of `term`, which it will compute."""
        if term not in self._names:
            name = term.text if term.text not in self._taken else term.full_text
            self._names[term] = name
            self._taken.add(name)
            self._new[term] = None
        return self._names[term]

    def finish(self) -> tuple[tuple[Graph, ...], Sequence]:
        """The graphs to add to the program, and its prologue."""
        layers = list(self._old.layers)
        results = list(self._old.results)
        known = {y.name for y in layers}
        for weights, terms in _groups(self._new):
            names = tuple(w.name for w in weights)
            title = weights[0].name
            while title in known:
                title += "+"
            known.add(title)
            outputs = tuple(self._names[t] for t in terms)
            layers.append(Layer(title, self._kind(weights, terms).name, (), names, outputs))
            results += outputs
        return tuple(self._kinds.values()), Sequence(PROLOGUE, self._old.inputs, tuple(layers), tuple(results))

    def _kind(self, weights: tuple[Leaf, ...], terms: tuple[Term, ...]) -> Graph:
        """The graph that computes `terms`, the same one for all weights of the same types."""
        leaves = {w.name: Leaf(f"w{i}" if len(weights) > 1 else "w", w.type) for i, w in enumerate(weights)}
        key = tuple(bound(t, leaves) for t in terms)
        if key not in self._kinds:
            stem = "_".join(dict.fromkeys([PROLOGUE, *(t.op for t in terms)]))
            title, i = stem, 0
            while title in self._graphs:
                i += 1
                title = f"{stem}_{i}"
            self._kinds[key] = self._graphs[title] = _graph(title, leaves.values(), key, self._registry, self._graphs)
        return self._kinds[key]


def _graph(title: str, leaves: Iterable[Leaf], terms: tuple[Term, ...], registry: Registry,
           graphs: Mapping[str, Graph]) -> Graph:  # fmt: skip
    b = Builder(registry, title, graphs)
    weights = {leaf: b.weight(leaf.name, leaf.type) for leaf in leaves}
    made: dict[tuple[str, tuple[Term | Leaf, ...], str], tuple[Value, ...]] = {}

    def value(t: Term | Leaf) -> Value:
        if isinstance(t, Leaf):
            return weights[t]
        key = (t.op, t.inputs, t.literal)
        if key not in made:
            made[key] = b.emit(t.op, tuple(map(value, t.inputs)), dict(t.attrs))
        return made[key][t.index]

    with b.path(PROLOGUE):
        return b.graph([value(t) for t in terms])


def _groups(terms: Iterable[Term]) -> list[tuple[tuple[Leaf, ...], tuple[Term, ...]]]:
    """Terms that share weights together, each group with its weights, in order of first appearance."""
    parent: dict[Leaf, Leaf] = {}

    def root(w: Leaf) -> Leaf:
        while parent[w] != w:
            w = parent[w]
        return w

    members: dict[Term, tuple[Leaf, ...]] = {t: tuple(dict.fromkeys(_leaves(t))) for t in terms}
    for leaves in members.values():
        for w in leaves:
            parent.setdefault(w, w)
            parent[root(w)] = root(leaves[0])
    groups: dict[Leaf, tuple[dict[Leaf, None], list[Term]]] = {}
    for t, leaves in members.items():
        weights, together = groups.setdefault(root(leaves[0]), ({}, []))
        weights.update(dict.fromkeys(leaves))
        together.append(t)
    return [(tuple(weights), tuple(together)) for weights, together in groups.values()]
