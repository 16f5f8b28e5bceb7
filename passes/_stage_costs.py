"""What pipeline stages cost, as far as the layers tell: times of F, B and W and of pairs, and bytes that are held."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache

from dsv3c.costs import Times, crossing
from dsv3c.ir import Graph, Phase, Program, Sequence
from dsv3c.passes.partition import Partition
from dsv3c.schedules import Durations, Footprint, equal_stages
from dsv3c.schedules import Times as StageTimes
from dsv3c.segments import communicates
from dsv3c.stages import PROLOGUE, sent, stage_name
from dsv3c.state import State
from dsv3c.target import Machine

UNITS = (8, 16, 24)
"""Numbers of units that are tried for communication; `overlap` tries more."""

GRADIENT_BYTES, SHARDED_BYTES = 4, 8
"""Of each weight: its FP32 gradient on every rank, and what ranks share: the FP32 master and two BF16 moments."""


class StageCosts:
    """Estimates for a model that is divided into any number of stages as `partition` would do it."""

    def __init__(self, state: State, machine: Machine) -> None:
        self.state = state
        self.machine = replace(machine, node=state.job.ranks_per_node) if state.job else machine
        self.divided = cache(self._divided)
        self.durations = cache(self._durations)
        self.footprint = cache(self._footprint)
        self._known: dict[tuple[int, int], tuple[Graph, float, float]] = {}

    def _divided(self, stages: int) -> tuple[Program, Times]:
        program = Partition(stages).run(self.state, _silent).program
        return program, Times.of(program, self.state.registry, self.state.sizes, self.machine)

    def _durations(self, stages: int) -> Durations:
        """Seconds of each stage's F, I and W one after another; of a pair, with its communication as well hidden as
        one number of lent units allows; and of sending to a neighbour."""
        program, alone = self.divided(stages)
        sequences = [program.sequence(stage_name(s)) for s in range(stages)]
        serial = self._by_phase(program, sequences, alone)
        times = tuple(
            StageTimes(compute[Phase.F] + comm[Phase.F], compute[Phase.B] + comm[Phase.B], compute[Phase.W],
                       sum(compute[p] + comm[p] for p in (Phase.B, Phase.W)))
            for compute, comm in serial
        )  # fmt: skip
        pairs: tuple[tuple[float, ...], ...] = ()
        if any(sum(comm.values()) for _, comm in serial):
            lent = [u for u in UNITS if 2 * u <= alone.machine.units]
            options = [self._by_phase(program, sequences, alone.with_lent(u)) for u in lent]
            pairs = tuple(
                tuple(min([times[f].F + times[b].B, *(_pair(o[f], o[b]) for o in options)]) for b in range(stages))
                for f in range(stages)
            )
        bytes_sent = _bytes(program, sequences[0], sent(program, 0)[0], alone)
        apart = self.state.mesh.world > self.machine.node
        return Durations(times, pairs, crossing(self.machine, bytes_sent, apart))

    def _footprint(self, stages: int) -> Footprint:
        """Bytes of each stage: forms of weights and gradients with a share of the optimizer's state; and of a chunk."""
        program, times = self.divided(stages)
        saved = {c.forward: {*c.f_to_b, *c.f_to_w} for c in self.state.cut or ()}
        hoisted = program.sequence(PROLOGUE) if program.has_sequence(PROLOGUE) else None
        weights, chunks = [], []
        for s in (program.sequence(stage_name(i)) for i in range(stages)):
            names = {w for _, w in s.gradients}
            total = 0
            bound = {name for layer in s.layers for name in layer.weights}
            for w in program.weights:
                if w.name in names:
                    shared = max(1, self.state.mesh.dp // w.parts)
                    count = w.type.bytes(times.sizes) * 8 // w.type.dtype.bits
                    total += count * GRADIENT_BYTES + count * SHARDED_BYTES // shared
                if w.name in bound:
                    total += w.type.bytes(times.sizes)
            if hoisted is not None:
                total += _bytes(program, hoisted, [n for n in hoisted.results if n in s.inputs], times)
            weights.append(total)
            chunks.append(sum(
                v.type.bytes(times.sizes)
                for layer in s.layers
                if layer.graph in saved
                for v in program.graph(layer.graph).results
                if v.name in saved[layer.graph]
            ))  # fmt: skip
        return Footprint(tuple(weights), tuple(chunks))

    def _by_phase(self, program: Program, sequences: list[Sequence], times: Times) -> list[_ByPhase]:
        """Of each stage the seconds of computation and of communication by phase, each alone."""
        found = []
        for sequence in sequences:
            totals: _ByPhase = dict.fromkeys(Phase, 0.0), dict.fromkeys(Phase, 0.0)
            for layer in sequence.layers:
                for total, seconds in zip(totals, self._cost(program.graph(layer.graph), times), strict=True):
                    total[layer.phase] += seconds
            found.append(totals)
        return found

    def _cost(self, graph: Graph, times: Times) -> tuple[float, float]:
        """Seconds of computation and of communication of a graph, computed once for each number of lent units."""
        key = id(graph), times.lent
        if key not in self._known:
            sends = [communicates(n, times.registry) for n in graph.nodes]
            compute = sum(times.seconds(n) for n, sent in zip(graph.nodes, sends, strict=True) if not sent)
            units = times.lent or None
            comm = sum(times.exchange(n, units) for n, sent in zip(graph.nodes, sends, strict=True) if sent)
            self._known[key] = graph, compute, comm
        return self._known[key][1:]


_ByPhase = tuple[dict[Phase, float], dict[Phase, float]]
"""Seconds of computation and of communication."""


def _pair(forward: _ByPhase, backward: _ByPhase) -> float:
    """The longer of the two streams."""
    return max(f[Phase.F] + b[Phase.B] + b[Phase.W] for f, b in zip(forward, backward, strict=True))


def _bytes(program: Program, sequence: Sequence, names: Iterable[str], times: Times) -> int:
    """Bytes of what layers of the sequence make under these names."""
    types = {
        name: v.type
        for layer in sequence.layers
        for name, v in zip(layer.outputs, program.graph(layer.graph).results, strict=True)
    }
    return sum(types[name].bytes(times.sizes) for name in names if name in types)


def _silent(action: str, node: str, reason: str) -> None:
    pass


def equal(ranks: int, stages: int) -> Durations:
    """Where nothing is known: a rank's F, I and W take 1 each, however many stages it has."""
    share = ranks / stages
    return equal_stages(stages, StageTimes(share, share, share, 2 * share))
