"""Interleave the segments of a forward and a backward layer so that what is sent hides behind what is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from dsv3c.costs import Times
from dsv3c.interleave import Overlap as OverlapRecord
from dsv3c.interleave import PairOrder, Work, behind, best_order, hidden, picture, works
from dsv3c.ir import Graph, Phase, Program
from dsv3c.op import Registry
from dsv3c.segments import arranged, segments
from dsv3c.state import Pass, State, TakeNote
from dsv3c.target import Machine

UNITS = (8, 12, 16, 20, 24, 32)
"""How many units communication may get, where the machine has at least twice as many."""


@dataclass(frozen=True)
class Overlap(Pass):
    """Find for each pair of a forward and a backward layer the order of their segments that hides most communication.

    Compares all orders in which a stream of computation and one of communication can run the segments of F, B and W,
    together with the number of units that communicate, under the machine's cost model, in a row of `rows` such pairs.
    `units` fixes that number. Nodes of all training layers are put in the order of their segments.
    """

    name: ClassVar[str] = "overlap"
    units: int | None = None
    rows: int = 4

    def run(self, state: State, note: TakeNote) -> State:
        program, registry = _arranged(state.program, state.registry), state.registry
        state = state.with_program(program)
        names = {g.name for g in program.graphs if any(s.comm for s in segments(g, registry))}
        kinds = layer_kinds(program)
        main = _main_pair(program, names, kinds)
        if main is None:
            note("kept", "program", "no layer communicates forward and backward, so there is nothing to hide")
            return state
        if state.machine is None:
            note("kept", "program", "no machine is given, so the times of segments are unknown")
            return state
        machine = state.machine if state.job is None else replace(state.machine, node=state.job.ranks_per_node)
        times = Times.of(program, registry, state.sizes, machine)
        graphs = {g.name: g for g in program.graphs}
        options = [times.with_lent(u) for u in self._units(machine)]
        chosen, _, _ = best_order([works(t, graphs, *main) for t in options], self.rows)
        shared = options[chosen]
        pairs = []
        for forward in kinds[Phase.F]:
            for backward in kinds[Phase.B]:
                if f"{forward}_F" in names or f"{backward}_B" in names:
                    order = self._pair(times, shared, graphs, forward, backward)
                    pairs.append(order[0])
                    if (forward, backward) == main:
                        _tell(order, shared, note)
        for p in pairs:
            if (p.forward, p.backward) != main and f"{p.forward}_F" in names and f"{p.backward}_B" in names:
                note("overlapped", f"{p.forward} with {p.backward}", _summary(p))
        return state.but(overlap=OverlapRecord(shared.lent, tuple(pairs)))

    def _units(self, machine: Machine) -> Sequence[int]:
        if self.units is not None:
            return (self.units,)
        return [u for u in UNITS if 2 * u <= machine.units] or (0,)

    def _pair(self, alone: Times, shared: Times, graphs: Mapping[str, Graph], forward: str,
              backward: str) -> tuple[PairOrder, tuple[Work, ...]]:  # fmt: skip
        _, order, seconds = best_order([works(shared, graphs, forward, backward)], self.rows)
        compute = sum(w.seconds for w in works(alone, graphs, forward, backward) if not w.comm)
        sent = sum(w.seconds for w in order if w.comm)
        steps = tuple(w.step for w in order)
        return PairOrder(forward, backward, steps, seconds, compute, sent, hidden(order, self.rows)), order


def _arranged(program: Program, registry: Registry) -> Program:
    """The program with the nodes of every training layer in the order of its segments."""
    suffixes = tuple(f"_{p.value}" for p in Phase)
    trained = {y.graph for s in program.sequences for y in s.layers if y.graph.endswith(suffixes)}
    return program.with_graphs(tuple(arranged(g, registry) if g.name in trained else g for g in program.graphs))


def layer_kinds(program: Program) -> Mapping[Phase, tuple[str, ...]]:
    """The kinds of layer that training runs forward and backward: names of graphs without `_F` and `_B`."""
    found: dict[Phase, dict[str, None]] = {Phase.F: {}, Phase.B: {}}
    for layer in (y for s in program.sequences for y in s.layers):
        for phase, kinds in found.items():
            suffix = f"_{phase.value}"
            if layer.phase is phase and layer.graph.endswith(suffix):
                kinds[layer.graph.removesuffix(suffix)] = None
    return {phase: tuple(kinds) for phase, kinds in found.items()}


def _main_pair(program: Program, sending: set[str], kinds: Mapping[Phase, tuple[str, ...]]) -> tuple[str, str] | None:
    """The commonest kinds of layer that communicate, forward and backward."""
    uses = Counter(y.graph for s in program.sequences for y in s.layers)
    best = [
        max((k for k in kinds[phase] if f"{k}_{phase.value}" in sending),
            key=lambda k: uses[f"{k}_{phase.value}"], default=None)
        for phase in (Phase.F, Phase.B)
    ]  # fmt: skip
    forward, backward = best
    return (forward, backward) if forward and backward else None


def _summary(p: PairOrder) -> str:
    return (
        f"{_ms(p.seconds)} a pair: {_ms(p.compute_seconds)} of computation alone, "
        f"{_ms(p.communication_seconds)} of communication, {p.hidden:.0%} of it hidden"
    )


def _tell(pair: tuple[PairOrder, tuple[Work, ...]], times: Times, note: TakeNote) -> None:
    """The order of the main pair, what hides behind what, and a picture."""
    p, order = pair
    where = f"{p.forward} with {p.backward}"
    units = times.machine.units
    note("split", "units", f"{times.lent} of {units} communicate and {units - times.lent} compute")
    note("overlapped", where, _summary(p))
    note("ordered", where, ", ".join(map(str, p.steps)))
    for sent, computed in behind(order):
        note("hidden", f"{where}, {sent}", f"behind {', '.join(map(str, computed))}" if computed else "behind nothing")
    for name, line in zip(("computation", "communication"), picture(order), strict=True):
        note("picture", name.ljust(13), line)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
