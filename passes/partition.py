"""Divide the layers among pipeline stages, balanced by cost, and write out what each stage does and exchanges."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from dsv3c.costs import Times
from dsv3c.errors import InputError
from dsv3c.ir import Graph, Layer, Phase, Program, Sequence, Value
from dsv3c.op import Registry
from dsv3c.rewrite import crosses_ranks
from dsv3c.stages import COTANGENT, PROLOGUE, stage_name
from dsv3c.state import Pass, State, TakeNote

TRAIN = "train"
ENDS = ("embedding", "head")
"""Optimizer groups of the weights that the first and the last stage hold."""


@dataclass(frozen=True)
class Partition(Pass):
    """Divide the training sequence into one sequence per pipeline stage, balanced by the time that layers take.

    The embedding lies in the first stage, the head and all MTP modules in the last; under DualPipe both lie on one
    rank, which holds what they share once. Layers without weights are repeated wherever they are read. What crosses
    a border is handed on from neighbour to neighbour; what is the same tensor crosses once. `stages`: how many, if
    there is no schedule to say so.
    """

    name: ClassVar[str] = "partition"
    stages: int | None = None

    def __post_init__(self) -> None:
        if self.stages is not None and self.stages < 1:
            raise InputError(f"a pipeline of {self.stages} stages; there must be at least 1")

    def run(self, state: State, note: TakeNote) -> State:
        program = state.program
        count = self.stages or (state.schedule.stages if state.schedule else None)
        if count is None or not program.has_sequence(TRAIN):
            note("kept", "program", "no schedule says how many stages there are" if count is None else "nothing trains")
            return state
        sequence = program.sequence(TRAIN)
        units = _units(program, sequence)
        costs = _costs(program, sequence, units, state)
        chosen = balanced(costs, count)
        begin = 0
        stages: list[tuple[str, ...]] = []
        unit_name, per = ("ms", 1e3) if state.machine else ("nodes", 1)
        for stage, length in enumerate(chosen):
            mine = units[begin : begin + length]
            stages.append(tuple(name for unit in mine for name in unit))
            time = f"{sum(costs[begin : begin + length]) * per:.3g} {unit_name} of {sum(costs) * per:.3g}"
            note("placed", stage_name(stage), f"{_listed(stages[-1])}: {time}")
            begin += length
        split = _late_weight_gradients(state)
        made = _Cutter(program, sequence, stages, split, state.registry).sequences()
        others = tuple(s for s in program.sequences if s.name != TRAIN)
        return state.with_program(program.but(sequences=(*others, *made)))


def _late_weight_gradients(state: State) -> bool:
    """Whether the schedule computes weight gradients apart, so that no B may overwrite what W needs."""
    rows = state.schedule.rows if state.schedule else ()
    return any(action.kind in "IW" for row in rows for cell in row for action in cell)


def _listed(names: tuple[str, ...]) -> str:
    if not names:
        return "no layer, values pass through"
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} layers)"


# ---- which layers lie together ---------------------------------------------------------------------------------------


def _repeated(program: Program, sequence: Sequence) -> frozenset[str]:
    """Names of the layers without weights and gradients, which depend on the sequence's inputs alone."""
    learnt = {y.name for y in sequence.layers if y.phase is not Phase.F or y.weights}
    given = {n for n in sequence.inputs if not n.startswith(COTANGENT)} - _hoisted(program)
    found: set[str] = set()
    for layer in sequence.layers:
        if layer.name not in learnt and given.issuperset(layer.inputs):
            found.add(layer.name)
            given.update(layer.outputs)
    return frozenset(found)


def _hoisted(program: Program) -> frozenset[str]:
    return frozenset(program.sequence(PROLOGUE).results if program.has_sequence(PROLOGUE) else ())


def _units(program: Program, sequence: Sequence) -> list[tuple[str, ...]]:
    """Names of layers in order, in groups that cannot be torn apart: from the head on all are one."""
    repeated = _repeated(program, sequence)
    names = [n for n in dict.fromkeys(y.name for y in sequence.layers if y.phase is Phase.F) if n not in repeated]
    ends = {w.name for w in program.weights if w.group in ENDS}
    bound = _weights_by_layer(program, sequence)
    last = next((i for i, n in enumerate(names) if i > 0 and bound.get(n, frozenset()) & ends), len(names))
    return [*((n,) for n in names[:last]), *([tuple(names[last:])] if names[last:] else [])]


def _weights_by_layer(program: Program, sequence: Sequence) -> dict[str, frozenset[str]]:
    """The weights that each layer binds or makes gradients of."""
    weight_of = dict(sequence.gradients)
    found: dict[str, set[str]] = {}
    for y in sequence.layers:
        made = (weight_of[n] for n in y.outputs if n in weight_of)
        found.setdefault(y.name, set()).update(y.weights, made)
    return {name: frozenset(weights) for name, weights in found.items()}


def _costs(program: Program, sequence: Sequence, units: list[tuple[str, ...]], state: State) -> list[float]:
    """Seconds that the layers of each unit compute, forward and backward; without a machine, how many nodes they
    have."""
    times = Times.of(program, state.registry, state.sizes, state.machine) if state.machine else None
    known: dict[str, float] = {}
    unit_of = {name: i for i, unit in enumerate(units) for name in unit}
    costs = [0.0] * len(units)
    for y in sequence.layers:
        if y.graph not in known:
            nodes = [n for n in program.graph(y.graph).nodes if not crosses_ranks(n)]
            known[y.graph] = sum(map(times.seconds, nodes)) if times else len(nodes)
        unit = unit_of.get(y.name.removesuffix(".sum"))
        if unit is not None:
            costs[unit] += known[y.graph]
    return costs


def balanced(costs: list[float], count: int) -> list[int]:
    """How many of the units each of `count` consecutive stages gets, the first and the last unit at the ends.

    The dearest stage is as cheap as can be, then the squares of all stages' costs add up to as little as can be.
    """
    total = [0.0, *itertools.accumulate(costs)]
    units, infinite = len(costs), float("inf")
    limit = _least_dearest(total, count) * (1 + 1e-9)
    ends = units >= 2 and count >= 2  # both can be filled
    best = [(0.0, [0])] + [(infinite, [0])] * units
    for stage in range(count):
        row = []
        for end in range(units + 1):
            options = [(infinite, [0])]
            empty = (ends and stage == 0 and end == 0) or (ends and stage == count - 1)
            for begin in range(end - 1 if empty else end, -1, -1):
                cost = total[end] - total[begin]
                if cost > limit:
                    break
                if best[begin][0] < infinite:
                    options.append((best[begin][0] + cost * cost, [*best[begin][1], end]))
            row.append(min(options, key=lambda o: o[0]))
        best = row
    edges = best[units][1]
    return [b - a for a, b in itertools.pairwise(edges)]


def _least_dearest(total: list[float], count: int) -> float:
    """The cost of the dearest of `count` stages if it is as cheap as can be; `total`: sums from the first unit on."""
    sums = sorted({b - a for a, b in itertools.combinations(total, 2)})
    low, high = 0, len(sums) - 1
    while low < high:
        middle = (low + high) // 2
        used, begin = 1, 0.0
        limit = sums[middle] * (1 + 1e-12)
        for before, after in itertools.pairwise(total):
            if after - before > limit:
                used = count + 1
                break
            if after - begin > limit:
                used, begin = used + 1, before
        low, high = (low, middle) if used <= count else (middle + 1, high)
    return sums[low]


# ---- what a stage does and exchanges ---------------------------------------------------------------------------------


@dataclass
class _Cutter:
    """Writes the sequences of the stages. `stages`: the names of each one's layers; `split`: all W after all B."""

    program: Program
    sequence: Sequence
    stages: list[tuple[str, ...]]
    split: bool
    registry: Registry

    def sequences(self) -> tuple[Sequence, ...]:
        place = {name: i for i, names in enumerate(self.stages) for name in names}
        layers = [self._layers(i, place) for i in range(len(self.stages))]
        makers = {n: i for i, own in enumerate(layers) for y in own for n in y.outputs
                  if y.name.removesuffix(".sum") in place}  # fmt: skip
        same = self._same_tensors()
        crossing: list[dict[str, None]] = [{} for _ in self.stages]
        handed: list[dict[str, None]] = [{} for _ in self.stages]
        order = {n: i for i, n in enumerate(n for y in self.sequence.layers for n in y.outputs)}
        for i, own in enumerate(layers):
            made = {n for y in own for n in y.outputs}
            by = {n: same[n] for y in own for n in y.inputs if n not in made and n in same and makers.get(n, i) != i}
            layers[i] = [replace(y, inputs=tuple(by.get(n, n) for n in y.inputs)) for y in own]
            for name in dict.fromkeys(n for y in layers[i] for n in y.inputs):
                home = makers.get(name, i)
                step = 1 if home < i else -1
                for j in range(home, i, step):
                    handed[j][name] = None
                    crossing[j + step][name] = None
        loss = set(self.sequence.losses)
        found = []
        for i, own in enumerate(layers):
            read = dict.fromkeys(n for y in own for n in y.inputs)
            made = {n for y in own for n in y.outputs}
            given = tuple(n for n in self.sequence.inputs if n in read)
            came = sorted(crossing[i], key=lambda n: (n.startswith(COTANGENT), order[n]))
            gone = sorted(handed[i], key=lambda n: (n.startswith(COTANGENT), order[n]))
            first = i == min((k for k, o in enumerate(layers) if o), default=0)
            kept = [n for n in self.sequence.results if (makers.get(n) == i if n in makers else first and n in made)]
            found.append(Sequence(
                stage_name(i), (*given, *came), tuple(own), (*kept, *(n for n in gone if n not in kept)),
                tuple(n for n in self.sequence.losses if n in made and n in loss),
                tuple((n, w) for n, w in self.sequence.gradients if n in made),
            ))  # fmt: skip
        return tuple(found)

    def _layers(self, stage: int, place: Mapping[str, int]) -> list[Layer]:
        """The layers of a stage, with those of no stage that it reads from."""
        mine = [y for y in self.sequence.layers if place.get(y.name.removesuffix(".sum")) == stage]
        needed = {n for y in mine for n in y.inputs}
        repeated = []
        for y in reversed([y for y in self.sequence.layers if y.name.removesuffix(".sum") not in place]):
            if any(n in needed for n in y.outputs):
                repeated.append(y)
                needed.update(y.inputs)
        whole = [*reversed(repeated), *mine]
        if not self.split:
            return whole
        return sorted(whole, key=lambda y: tuple(Phase).index(y.phase))

    def _same_tensors(self) -> dict[str, str]:
        """For each value that is another one's tensor, the name of the first."""
        found: dict[str, str] = {}
        sources: dict[str, tuple[Value, ...]] = {}
        for layer in self.sequence.layers:
            graph = self.program.graph(layer.graph)
            if graph.name not in sources:
                sources[graph.name] = tuple(_source(v, graph) for v in graph.results)
            first: dict[str, str] = {}
            for v, name in zip(sources[graph.name], layer.outputs, strict=True):
                if first.setdefault(v.name, name) != name:
                    found[name] = first[v.name]
        return found


def _source(v: Value, graph: Graph) -> Value:
    """The value of which `v` is but a copy."""
    while v.name in graph.producers and graph.producers[v.name].op == "identity":
        v = graph.producers[v.name].inputs[0]
    return v
