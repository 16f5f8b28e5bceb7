"""More rows for a rank's experts than its buffers hold: what lies between the exchanges of a layer, run again.

The plan's buffers take the first round. Each further one goes through memory of its own, made when it is first needed
and shared by all layers of a kind; backward makes its saved values again. So no token is dropped, and memory stays
bounded however uneven the load is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from dsv3c.ir import Graph, Layer, Node, Phase, Sequence
from dsv3c.op import Registry
from dsv3c.rewrite import crosses_ranks, shares_memory
from dsv3c.runtime.exchange import Exchange
from dsv3c.runtime.executor import Engine
from dsv3c.runtime.runner import Runner
from dsv3c.tensors import torch_dtype

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
    _memory: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

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

    def tensor(self, graph: Graph, name: str) -> torch.Tensor:
        """Memory for a value of a round, the same for all layers that use `graph`."""
        key = graph.name, name
        if key not in self._memory:
            t = graph.value(name).type
            shape, device = t.bound(self.sizes), self.exchange.world.device
            with torch.inference_mode(False):
                self._memory[key] = torch.empty(shape, dtype=torch_dtype(t.dtype), device=device)
        return self._memory[key]


class LayerRounds:
    """The further rounds of one layer and chunk; nothing happens where the first round took all rows."""

    def __init__(self, rounds: Rounds, phases: Mapping[Phase, Layer], runner: Runner,
                 weights: Mapping[str, str]) -> None:  # fmt: skip
        self._rounds, self._phases, self._runner, self._weights = rounds, phases, runner, weights
        self._bound: dict[Phase, list[tuple[Node, RoundCall]]] | None = None
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
        for phase in Phase:
            layer = self._phases.get(phase)
            if layer is None:
                continue
            graph = engine.program.graph(layer.graph)
            nodes = between(graph, known)
            usual = self._runner.bindings[layer.name, phase]
            local = dict(usual) | {n: t for n, t in known.items() if n in usual}
            fresh = made(nodes)
            results = zip(graph.results, layer.outputs, strict=True)
            weights = {v.name: self._weights[name] for v, name in results if name in self._weights}
            sinks = {name: self._rounds.gradients[weight] for name, weight in weights.items()}
            bound[phase] = [call for n in nodes if (call := self._node(n, graph, local, fresh, sinks, registry))]
            for name, total in sinks.items():
                if name in fresh and local[name] is not total:  # no node could add to it
                    bound[phase].append((graph.nodes[-1], _any_round(partial(total.add_, local[name]))))
            known |= {n: local[n] for n in fresh}
        return bound

    def _node(self, node: Node, graph: Graph, local: dict[str, torch.Tensor], fresh: set[str], sinks: Tensors,
              registry: Registry) -> tuple[Node, RoundCall] | None:  # fmt: skip
        """The call of one node for any round; None for a view. `local` learns where its outputs lie."""
        rounds = self._rounds
        inputs = tuple(local[v.name] for v in node.inputs)
        if shares_memory(node, registry):
            local.update(rounds.engine._views(node, inputs))
            return None
        sink = sinks.get(node.outputs[0].name) if len(node.outputs) == 1 else None
        if sink is not None:
            local[node.outputs[0].name] = sink
            return node, _any_round(rounds.engine.prepare(node, inputs, (sink,), accumulate=True))
        handle = next((v.name for v in node.outputs[3:]), "") if crosses_ranks(node) and node.op == "dispatch" else ""
        local.update((v.name, rounds.tensor(graph, v.name)) for v in node.outputs
                     if v.name in fresh and v.name != handle)  # fmt: skip
        outputs = tuple(local[v.name] for v in node.outputs)
        if crosses_ranks(node):
            return node, rounds.exchange.bind_round(node, inputs, outputs)
        return node, _any_round(rounds.engine.prepare(node, inputs, outputs))


def _any_round(call: Callable[[], object]) -> RoundCall:
    def run(c: int) -> None:
        call()

    return run
