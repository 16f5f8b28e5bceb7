"""More rows for a rank's experts than its buffers hold: what lies between the exchanges of a layer, run again.

The plan's buffers take the first round. Each further one goes through memory of its own, made when it is first needed
and shared by all layers; backward makes its saved values again. So no token is dropped, and memory stays bounded
however uneven the load is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from dsv3c.arena import place
from dsv3c.ir import Graph, Layer, Node, Phase, Sequence
from dsv3c.op import Registry
from dsv3c.rewrite import crosses_ranks, shares_memory
from dsv3c.runtime.exchange import Exchange
from dsv3c.runtime.executor import Engine
from dsv3c.runtime.runner import Memory, Runner

RoundCall = Callable[[int], None]
Tensors = Mapping[str, torch.Tensor]


def between(graph: Graph, given: Iterable[str]) -> tuple[Node, ...]:
    """The nodes of a graph that work on rows of one round: exchanges, and all that reads what they bring or a value of
    `given`; what reads the tokens that a `combine` brought back does not count."""
    rows = set(given)
    found = []
    for node in graph.nodes:
        sends = crosses_ranks(node)
        if sends or any(v.name in rows for v in node.inputs):
            found.append(node)
            if not (sends and node.op == "combine"):
                rows.update(v.name for v in node.outputs)
    return tuple(found)


def made(nodes: Iterable[Node]) -> set[str]:
    """Names of what nodes make for one round: not the tokens that a `combine` brings back."""
    return {v.name for n in nodes if not (crosses_ranks(n) and n.op == "combine") for v in n.outputs}


@dataclass(frozen=True)
class RoundLayout:
    """What a further round of a kind of layer does, phase after phase, and the offset of each value that it makes."""

    nodes: Mapping[Phase, tuple[Node, ...]]
    offsets: Mapping[str, int]
    bytes: int


def round_layout(graphs: Mapping[Phase, Graph], gradients: Mapping[Phase, set[str]], registry: Registry,
                 sizes: Mapping[str, int]) -> RoundLayout:  # fmt: skip
    """Place what a round makes by lifetime over F, B and W, in which a value keeps its name.

    `gradients`: results of each phase that are weight gradients. One that is all that a node makes is added where it
    belongs and has no place here; others are added when the phase ends.
    """
    nodes: dict[Phase, tuple[Node, ...]] = {}
    known: set[str] = set()
    roots: dict[str, str] = {}
    size: dict[str, int] = {}
    start: dict[str, int] = {}
    end: dict[str, int] = {}
    step = 0
    for phase, graph in graphs.items():
        nodes[phase] = between(graph, known)
        fresh = made(nodes[phase])
        placed = known | fresh
        for node in nodes[phase]:
            if _adds(node, gradients[phase], registry):
                placed.discard(node.output.name)
            if shares_memory(node, registry):
                base = node.inputs[0].name
                roots[node.output.name] = roots.get(base, base)
            for v in (*node.inputs, *node.outputs):
                root = roots.get(v.name, v.name)
                if root in placed:
                    size.setdefault(root, v.type.bytes(sizes))
                    start.setdefault(root, step)
                    end[root] = step
            step += 1
        for name in gradients[phase] & placed:
            end[roots.get(name, name)] = step
        known |= fresh
    slots, peak = place([(name, size[name], start[name], end[name]) for name in start])
    return RoundLayout(nodes, {s.name: s.offset for s in slots}, peak)


def _adds(node: Node, gradients: Collection[str], registry: Registry) -> bool:
    """Whether a node can add to a weight's gradient what it makes."""
    return len(node.outputs) == 1 and node.output.name in gradients and not shares_memory(node, registry)


@dataclass(frozen=True)
class Further:
    """The further rounds of a layer in one direction, where `needed()`: known once the first `dispatch` was called.

    `run` uses memory and scratch that all parts use, so nothing else may run on the device meanwhile.
    """

    needed: Callable[[], bool]
    run: Callable[[], None]


@dataclass
class Rounds:
    """Makes the further rounds of the layers of one rank. `gradients`: by weight."""

    engine: Engine
    exchange: Exchange
    sizes: Mapping[str, int]
    gradients: Tensors
    _layouts: dict[tuple[str, ...], RoundLayout] = field(default_factory=dict)
    _memory: Memory | None = None

    def layers(self, sequence: Sequence, runner: Runner) -> dict[str, LayerRounds]:
        """For each layer of a bound stage that sends rows, its further rounds."""
        by_name: dict[str, dict[Phase, Layer]] = {}
        for layer in sequence.layers:
            by_name.setdefault(layer.name, {})[layer.phase] = layer
        graphs = self.engine.program
        return {
            name: LayerRounds(self, phases, runner, dict(sequence.gradients))
            for name, phases in by_name.items()
            if Phase.F in phases and any(map(crosses_ranks, graphs.graph(phases[Phase.F].graph).nodes))
        }

    def layout(self, phases: Mapping[Phase, Layer], weights: Mapping[str, str]) -> RoundLayout:
        """That of a layer; the same for all of its kind."""
        graphs = {p: self.engine.program.graph(phases[p].graph) for p in Phase if p in phases}
        key = tuple(g.name for g in graphs.values())
        if key not in self._layouts:
            results = {p: {v.name for v, n in zip(g.results, phases[p].outputs, strict=True) if n in weights}
                       for p, g in graphs.items()}  # fmt: skip
            self._layouts[key] = round_layout(graphs, results, self.engine.registry, self.sizes)
        return self._layouts[key]

    @property
    def bytes(self) -> int:
        """What further rounds take when they are needed."""
        return max((y.bytes for y in self._layouts.values()), default=0)

    @property
    def memory(self) -> Memory:
        """Where rounds of all layers work in turn; made when it is first asked for, after all layers were bound."""
        if self._memory is None:
            with torch.inference_mode(False):
                self._memory = Memory.allocate(self.bytes, str(self.exchange.world.device))
        return self._memory


class LayerRounds:
    """The further rounds of one layer and chunk; nothing happens where the first round took all rows."""

    def __init__(self, rounds: Rounds, phases: Mapping[Phase, Layer], runner: Runner,
                 weights: Mapping[str, str]) -> None:  # fmt: skip
        self._rounds, self._phases, self._runner, self._weights = rounds, phases, runner, weights
        self._bound: dict[Phase, list[tuple[Node, RoundCall]]] | None = None
        self._layout = rounds.layout(phases, weights)
        graph = rounds.engine.program.graph(phases[Phase.F].graph)
        sender = next(n for n in graph.nodes if crosses_ranks(n) and n.op == "dispatch")
        self._handle = runner.bindings[phases[Phase.F].name, Phase.F][sender.outputs[3].name]

    @property
    def forward(self) -> Further:
        """After the first round's `combine`: the other rounds; then its output is whole."""
        return Further(lambda: self._count > 1, self._forward)

    @property
    def backward(self) -> Further:
        """After the last `combine` of gradients: the other rounds, with what forward saved made again, and weight
        gradients with them."""
        return Further(lambda: self._count > 1, self._backward)

    @property
    def _count(self) -> int:
        return self._rounds.exchange.rounds(self._handle)

    def _forward(self) -> None:
        for c in range(1, self._count):
            self._run(Phase.F, c)

    def _backward(self) -> None:
        for c in range(1, self._count):
            self._run(Phase.F, c, but="combine")
            self._run(Phase.B, c)
            self._run(Phase.W, c)
        self._rounds.exchange.release(self._handle)

    def _run(self, phase: Phase, c: int, but: str = "") -> None:
        if self._bound is None:
            self._bound = self._bind()
        for node, call in self._bound.get(phase, ()):
            if not (but and node.op == but and crosses_ranks(node)):
                call(c)

    # ---- binding ---------------------------------------------------------------------------------------------------

    def _bind(self) -> dict[Phase, list[tuple[Node, RoundCall]]]:
        engine, registry = self._rounds.engine, self._rounds.engine.registry
        known: dict[str, torch.Tensor] = {}
        bound: dict[Phase, list[tuple[Node, RoundCall]]] = {}
        for phase, nodes in self._layout.nodes.items():
            layer = self._phases[phase]
            graph = engine.program.graph(layer.graph)
            usual = self._runner.bindings[layer.name, phase]
            local = dict(usual) | {n: t for n, t in known.items() if n in usual}
            fresh = made(nodes)
            results = zip(graph.results, layer.outputs, strict=True)
            weights = {v.name: self._weights[name] for v, name in results if name in self._weights}
            sinks = {name: self._rounds.gradients[weight] for name, weight in weights.items()}
            bound[phase] = [call for n in nodes if (call := self._node(n, local, fresh, sinks, registry))]
            for name, total in sinks.items():
                if name in fresh and local[name] is not total:  # no node could add to it
                    bound[phase].append((graph.nodes[-1], _any_round(partial(total.add_, local[name]))))
            known |= {n: local[n] for n in fresh}
        return bound

    def _node(self, node: Node, local: dict[str, torch.Tensor], fresh: set[str], sinks: Tensors,
              registry: Registry) -> tuple[Node, RoundCall] | None:  # fmt: skip
        """The call of one node for any round; None for a view. `local` learns where its outputs lie."""
        rounds = self._rounds
        inputs = tuple(local[v.name] for v in node.inputs)
        if shares_memory(node, registry):
            local.update(rounds.engine._views(node, inputs))
            return None
        if _adds(node, sinks, registry):
            sink = local[node.output.name] = sinks[node.output.name]
            return node, _any_round(rounds.engine.prepare(node, inputs, (sink,), accumulate=True))
        handle = next((v.name for v in node.outputs[3:]), "") if crosses_ranks(node) and node.op == "dispatch" else ""
        local.update((v.name, rounds.memory.tensor(self._layout.offsets[v.name], v, rounds.sizes))
                     for v in node.outputs if v.name in fresh and v.name != handle)  # fmt: skip
        outputs = tuple(local[v.name] for v in node.outputs)
        if crosses_ranks(node):
            return node, rounds.exchange.bind_round(node, inputs, outputs)
        return node, _any_round(rounds.engine.prepare(node, inputs, outputs))


def _any_round(call: Callable[[], object]) -> RoundCall:
    def run(c: int) -> None:
        call()

    return run
