"""What the cells of a schedule do and how long they take, segment by segment, as the executor would run them.

A cell of one action runs its segments one after another. In a cell of two, from the first layer that communicates to
the last one, each forward layer runs beside a backward layer in the order that the plan has for their kinds; what is
left runs alone, before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dsv3c.costs import Times
from dsv3c.interleave import Overlap, Work, chain, works
from dsv3c.ir import Graph, Layer, Phase
from dsv3c.ir import Sequence as Layers
from dsv3c.schedule import Action, Cell
from dsv3c.schedules import Durations
from dsv3c.schedules import Times as StageTimes
from dsv3c.segments import segments

PHASES = {"F": (Phase.F,), "I": (Phase.B,), "W": (Phase.W,), "B": (Phase.B, Phase.W)}


@dataclass(frozen=True, slots=True)
class Span:
    """Something that runs on a stream of a rank, in seconds from the start of its cell or of the step."""

    name: str
    comm: bool
    start: float
    end: float


@dataclass(frozen=True)
class CellTimes:
    """Times of cells on paper. `stages`: the layers of each; `times`: with all units computing; `overlap`: the plan's.

    `units`: SMs of exchanges, None for as many as they can use.
    """

    stages: Sequence[Layers]
    times: Times
    overlap: Overlap | None
    units: int | None
    _alone: dict[str, tuple[tuple[str, bool, float], ...]] = field(default_factory=dict)
    _pairs: dict[tuple[str, str, bool], tuple[Work, ...]] = field(default_factory=dict)
    _cells: dict[Cell, tuple[Span, ...]] = field(default_factory=dict)

    def spans(self, cell: Cell) -> tuple[Span, ...]:
        """What runs when in a cell, from its start."""
        key = shape(cell)
        if key not in self._cells:
            self._cells[key] = self._one(key[0]) if len(key) == 1 else self._two(*key)
        return self._cells[key]

    def seconds(self, cell: Cell) -> float:
        """How long a cell takes."""
        return max((s.end for s in self.spans(cell)), default=0.0)

    def durations(self, transfer: float) -> Durations:
        """All that the schedule's simulator needs; `transfer`: seconds from rank to rank."""
        count = range(len(self.stages))
        stages = tuple(StageTimes(*(self.seconds((Action(s, kind, 0),)) for kind in "FIWB")) for s in count)
        known: dict[tuple[tuple[str, ...], tuple[str, ...]], float] = {}
        rows = []
        for f in count:
            row = []
            for b in count:
                key = self._graphs(f), self._graphs(b)
                if key not in known:
                    known[key] = self.seconds((Action(f, "F", 0), Action(b, "B", 0)))
                row.append(known[key])
            rows.append(tuple(row))
        return Durations(stages, tuple(rows), transfer)

    def _graphs(self, stage: int) -> tuple[str, ...]:
        return tuple(y.graph for y in self.stages[stage].layers)

    # ---- cells -----------------------------------------------------------------------------------------------------

    def _one(self, action: Action) -> tuple[Span, ...]:
        return tuple(self._after(0.0, [self._layer(action, layer) for layer in self._layers(action)]))

    def _two(self, forward: Action, backward: Action) -> tuple[Span, ...]:
        ahead, behind = self._split(forward), self._split(backward)
        spans = self._after(0.0, [*ahead[0], *behind[0]])
        paired = min(len(ahead[1]), len(behind[1]))
        orders = [self._pair(a.kind, b.kind, backward.kind == "B") for a, b in zip(ahead[1], behind[1], strict=False)]
        start = _end(spans)
        pieces = iter(chain(orders))
        for order, a, b in zip(orders, ahead[1], behind[1], strict=False):
            for _ in order:
                p = next(pieces)
                layer = (a if p.work.step.phase is Phase.F else b).name
                spans.append(Span(f"{p.work.step} {layer}", p.work.comm, start + p.start, start + p.end))
        rest = [*ahead[1][paired:], *ahead[2], *behind[1][paired:], *behind[2]]
        return tuple(spans + self._after(_end(spans), rest))

    def _after(self, start: float, layers: Sequence[_Unit]) -> list[Span]:
        """Spans of layers that run one after another."""
        found = []
        for layer in layers:
            for name, comm, seconds in layer.work:
                found.append(Span(f"{name} {layer.name}", comm, start, start + seconds))
                start += seconds
        return found

    def _split(self, action: Action) -> tuple[list[_Unit], list[_Unit], list[_Unit]]:
        """The layers before the first that communicates, up to the last that does, and those after."""
        layers = [self._layer(action, y) for y in self._layers(action)]
        where = [i for i, y in enumerate(layers) if any(comm for _, comm, _ in y.work)]
        if not where:
            return layers, [], []
        return layers[: where[0]], layers[where[0] : where[-1] + 1], layers[where[-1] + 1 :]

    def _layers(self, action: Action) -> list[tuple[Layer, ...]]:
        """The action's layers in order, B and W of one together."""
        found: dict[str, list[Layer]] = {}
        for layer in self.stages[action.stage].layers:
            if layer.phase in PHASES[action.kind]:
                found.setdefault(layer.name, []).append(layer)
        return [tuple(v) for v in found.values()]

    def _layer(self, action: Action, layers: tuple[Layer, ...]) -> _Unit:
        kind = layers[0].graph.removesuffix(f"_{layers[0].phase.value}")
        return _Unit(layers[0].name, kind, tuple(w for y in layers for w in self.alone(y)))

    def alone(self, layer: Layer) -> tuple[tuple[str, bool, float], ...]:
        """Name, stream and seconds of each segment of a graph that runs alone."""
        if layer.graph not in self._alone:
            graph = self.times.graphs[layer.graph]
            self._alone[layer.graph] = tuple(
                (f"{s.name}({layer.phase.value})", s.comm, self._segment(graph, s.nodes, s.comm))
                for s in segments(graph, self.times.registry)
            )
        return self._alone[layer.graph]

    def _segment(self, graph: Graph, nodes: tuple[int, ...], comm: bool) -> float:
        each = (graph.nodes[i] for i in nodes)
        return sum(self.times.exchange(n, self.units) if comm else self.times.seconds(n) for n in each)

    def _pair(self, forward: str, backward: str, weights: bool) -> tuple[Work, ...]:
        """The segments of two layers in the plan's order; without one, as they come. `weights`: with W."""
        key = forward, backward, weights
        if key not in self._pairs:
            lent = self.times.with_lent(self.overlap.communication_units if self.overlap else 0)
            every = works(lent, self.times.graphs, forward, backward)
            kept: Mapping[object, Work] = {w.step: w for w in every if weights or w.step.phase is not Phase.W}
            order = self.overlap.order(forward, backward) if self.overlap else None
            first = [kept[s] for s in (order.steps if order else ()) if s in kept]
            done = {w.step for w in first}
            self._pairs[key] = (*first, *(w for s, w in kept.items() if s not in done))
        return self._pairs[key]


@dataclass(frozen=True, slots=True)
class _Unit:
    """One layer of an action: its name, its graph without `_F` or `_B`, and its segments when it runs alone."""

    name: str
    kind: str
    work: tuple[tuple[str, bool, float], ...]


def shape(cell: Cell) -> Cell:
    """The cell without its micro-batches: cells of one shape take equally long."""
    return tuple(Action(a.stage, a.kind, 0) for a in cell)


def _end(spans: Sequence[Span]) -> float:
    return max((s.end for s in spans), default=0.0)
