"""Where every tensor of a sequence lies in memory: lifetimes, offsets, peaks.

Two levels keep this fast for 61 layers. Within a graph, values that do not leave it are placed in a workspace that
all graphs share in turn. Between graphs, what layers hand to each other is placed by lifetime over the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv3c.ir import Graph, Phase, Program, Sequence, Type
from dsv3c.lazy import lazy
from dsv3c.op import Registry
from dsv3c.rewrite import crosses_ranks, shares_memory

if TYPE_CHECKING:
    import numpy

    from dsv3c.chunks import ChunkLayout, RankArena
else:
    numpy = lazy("numpy")

ALIGNMENT = 256
"""Bytes; a multiple of every cache line, vector and TMA alignment."""


def show_bytes(count: int) -> str:
    """A number of bytes for people."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


@dataclass(frozen=True, slots=True)
class Slot:
    """Bytes `offset ... offset+size` hold one tensor from step `start` to step `end`, both included."""

    name: str
    offset: int
    size: int
    start: int
    end: int


def place(wanted: list[tuple[str, int, int, int]], by_size: bool = True) -> tuple[tuple[Slot, ...], int]:
    """Offsets for tensors given as (name, bytes, start, end) so that no two that live at once overlap.

    Largest first, or in the order given, each at the lowest gap that fits. Gives the slots, in the order of `wanted`,
    and the peak bytes.
    """
    order = list(range(len(wanted)))
    if by_size:
        order.sort(key=lambda i: (-wanted[i][1], wanted[i][2], i))
    low, high, born, dead = (numpy.zeros(len(wanted) + 1, numpy.int64) for _ in range(4))  # sorted by `low`
    slots: dict[int, Slot] = {}
    peak = 0
    for count, i in enumerate(order):
        name, size, start, end = wanted[i]
        size = -(-size // ALIGNMENT) * ALIGNMENT
        near = numpy.flatnonzero((born[:count] <= end) & (dead[:count] >= start))
        top = numpy.zeros(len(near) + 1, numpy.int64)
        numpy.maximum.accumulate(high[near], out=top[1:])
        gaps = numpy.flatnonzero(low[near] - top[:-1] >= size)
        offset = int(top[gaps[0] if len(gaps) else -1])
        slots[i] = Slot(name, offset, size, start, end)
        peak = max(peak, offset + size)
        at = int(numpy.searchsorted(low[:count], offset))
        for column, value in ((low, offset), (high, offset + size), (born, start), (dead, end)):
            column[at + 1 : count + 1] = column[at:count]
            column[at] = value
    return tuple(slots[i] for i in range(len(wanted))), peak


@dataclass(frozen=True)
class GraphLayout:
    """One graph's memory: `roots` says for each value whose storage it lives in (a view lives in its base, a value
    written in place in what it replaces); `slots` places roots that stay inside the graph; `peak` is their extent."""

    graph: str
    roots: Mapping[str, str]
    slots: tuple[Slot, ...]
    peak: int


def graph_layout(graph: Graph, registry: Registry, sizes: Mapping[str, int],
                 donated: frozenset[str] = frozenset()) -> GraphLayout:  # fmt: skip
    """Lay out the workspace of one graph for the given symbol sizes.

    `donated` inputs may be overwritten by a result that continues them (a cache, optimizer state).
    """
    roots: dict[str, str] = {v.name: v.name for v in graph.params}
    values = {v.name: v for v in graph.values()}
    last: dict[str, int] = {}
    uses: dict[str, int] = {}
    for i, node in enumerate(graph.nodes):
        for v in node.outputs:
            roots[v.name] = roots[node.inputs[0].name] if shares_memory(node, registry) else v.name
        for v in node.inputs:
            uses[roots[v.name]] = i
    fixed = {v.name for v in graph.params} | {roots[v.name] for v in graph.results}
    merged: dict[str, str] = {}
    start: dict[str, int] = {}
    for i, node in enumerate(graph.nodes):
        for v in node.outputs:
            if roots[v.name] == v.name:
                start[v.name] = i
        if node.op == "call" or crosses_ranks(node):
            continue
        for source, target in registry[node.op].aliases:
            old, new = roots[node.inputs[source].name], node.outputs[target].name
            given = old in donated and new in fixed and old not in merged.values()
            inside = old in start and not {old, new} & fixed
            if uses[old] != i or shares_memory(node, registry) or not (given or inside):
                continue
            same = values[old].type.bytes(sizes) == values[new].type.bytes(sizes)
            whole = roots[node.inputs[source].name] == node.inputs[source].name
            if same and whole and sum(roots[v.name] == old for v in node.inputs) == 1:
                merged[new] = old

    def storage(name: str) -> str:
        while name in merged:
            name = merged[name]
        return name

    final = {name: storage(root) for name, root in roots.items()}
    for name, root in final.items():
        begin = start.get(roots[name])
        if begin is not None:
            last[root] = max(last.get(root, begin), begin, uses.get(roots[name], begin))
    wanted = [(r, values[r].type.bytes(sizes), start[r], last[r]) for r in last if r not in fixed]
    slots, peak = place(wanted)
    return GraphLayout(graph.name, final, slots, peak)


@dataclass(frozen=True)
class SequenceLayout:
    """A sequence's memory: `roots` says for each value handed between layers whose storage it lives in (`weights`
    and what the caller owns included), `slots` places what the sequence owns, `graphs` the layout of each graph.
    Bytes: `peak` of the slots, `workspace` shared by the graphs; both are needed at once."""

    sequence: str
    roots: Mapping[str, str]
    slots: tuple[Slot, ...]
    peak: int
    workspace: int
    graphs: Mapping[str, GraphLayout]

    @property
    def bytes(self) -> int:
        return self.peak + self.workspace


@dataclass(frozen=True)
class Lifetimes:
    """What a sequence hands between its layers: `roots` as in `SequenceLayout`; for each root that a layer makes its
    type, and the layers in which it is made and used last; layouts of the graphs."""

    roots: Mapping[str, str]
    types: Mapping[str, Type]
    start: Mapping[str, int]
    end: Mapping[str, int]
    graphs: Mapping[str, GraphLayout]


def lifetimes(program: Program, sequence: Sequence, registry: Registry, sizes: Mapping[str, int],
              known: dict[tuple[Graph, frozenset[str]], GraphLayout] | None = None) -> Lifetimes:  # fmt: skip
    """When each value that layers hand on is alive; results of the sequence are like any other value.

    `known` keeps layouts of graphs, by graph and donated inputs, for other sequences of the same sizes.
    """
    known = {} if known is None else known
    graphs: dict[str, GraphLayout] = {}
    donated = donated_inputs(program, sequence)
    roots: dict[str, str] = {name: name for name in sequence.inputs}
    types: dict[str, Type] = {}
    start: dict[str, int] = {}
    end: dict[str, int] = {}
    for i, layer in enumerate(sequence.layers):
        graph = program.graph(layer.graph)
        if graph.name not in graphs:
            key = (graph, donated[graph.name])
            if key not in known:
                known[key] = graph_layout(graph, registry, sizes, donated[graph.name])
            graphs[graph.name] = known[key]
        inner = graphs[graph.name].roots
        bound = dict(zip((v.name for v in graph.params), layer.inputs + layer.weights, strict=True))
        for name in layer.inputs:
            root = roots.setdefault(name, name)
            end[root] = i
        leaving: dict[str, str] = {}
        for v, name in zip(graph.results, layer.outputs, strict=True):
            inside = inner[v.name]
            if inside in bound:
                roots[name] = roots.setdefault(bound[inside], bound[inside])
            else:
                roots[name] = leaving.setdefault(inside, name)
            root = roots[name]
            if root == name:
                types[name], start[name] = graph.value(inside).type, i
            end[root] = max(end.get(root, i), i)
    return Lifetimes(roots, types, start, end, graphs)


def sequence_layout(program: Program, sequence: Sequence, registry: Registry, sizes: Mapping[str, int],
                    outside: Callable[[str], bool] = lambda name: False) -> SequenceLayout:  # fmt: skip
    """Lay out a sequence for the given symbol sizes; values for which `outside(name)` holds have storage of their
    own (weight gradients that go straight into the gradient buffer)."""
    live = lifetimes(program, sequence, registry, sizes)
    roots, start, end = live.roots, dict(live.start), dict(live.end)
    for name in sequence.results:
        end[roots[name]] = len(sequence.layers)
    backward = next((i for i, layer in enumerate(sequence.layers) if layer.phase is not Phase.F), 0)
    for name, _weight in sequence.gradients:
        if not outside(name):  # an overlapped schedule may compute a weight gradient before the rest of backward
            root = roots[name]
            start[root], end[root] = min(start.get(root, backward), backward), len(sequence.layers)
    wanted = [(r, live.types[r].bytes(sizes), start[r], end[r]) for r in start if not outside(r)]
    slots, peak = place(wanted)
    workspace = max((g.peak for g in live.graphs.values()), default=0)
    return SequenceLayout(sequence.name, roots, slots, peak, workspace, live.graphs)


def donated_inputs(program: Program, sequence: Sequence) -> dict[str, frozenset[str]]:
    """For each graph the inputs that, wherever the sequence uses it, the caller gave for this one layer alone."""
    readers: dict[str, int] = {}
    for layer in sequence.layers:
        for name in set(layer.inputs):
            readers[name] = readers.get(name, 0) + 1
    own = {name for name in sequence.inputs if readers.get(name) == 1 and name not in sequence.results}
    donated: dict[str, frozenset[str]] = {}
    for layer in sequence.layers:
        graph = program.graph(layer.graph)
        here = frozenset(v.name for v, name in zip(graph.inputs, layer.inputs, strict=True) if name in own)
        donated[graph.name] = donated.get(graph.name, here) & here
    return donated


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes one rank needs, by kind; `peak` is their sum."""

    rank: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    communication: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.communication


@dataclass(frozen=True)
class BufferPlan:
    """Memory of every sequence and of every pipeline rank, for the job's sizes, at balanced expert load.

    `with_headroom`: the same ranks with buffers for as many rows as the job's `expert_headroom` asks for, empty if
    no rows are exchanged. `stages`: the two blocks of a chunk of each stage, `arenas`: where each pipeline rank has
    its chunks; both are empty on one rank.
    """

    sequences: tuple[SequenceLayout, ...]
    ranks: tuple[RankMemory, ...]
    with_headroom: tuple[RankMemory, ...] = ()
    stages: tuple[ChunkLayout, ...] = ()
    arenas: tuple[RankArena, ...] = ()

    @property
    def peak(self) -> RankMemory:
        """The rank that needs most."""
        return max(self.ranks, key=lambda r: r.peak)
