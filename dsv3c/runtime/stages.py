"""The stages that a rank holds, bound to memory: chunks in one arena, and workspaces that all of them share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from dsv3c.chunks import ChunkLayout, ChunkPlace, chunk_layout, rank_arena
from dsv3c.ir import Graph, IRError, Layer, Phase, Sequence, Value
from dsv3c.runtime.exchange import Exchange
from dsv3c.runtime.executor import Blocks, Engine, Room, gradients_in_place, prepare_sequence
from dsv3c.runtime.rounds import Further, LayerRounds, Rounds
from dsv3c.runtime.runner import Call, Memory, Runner
from dsv3c.schedule import Schedule
from dsv3c.segments import Segment, segments
from dsv3c.stages import COTANGENT, stage_name, value_types
from dsv3c.tensors import torch_dtype


@dataclass(frozen=True)
class Part:
    """Prepared calls of one segment of a layer: computation, or communication among the ranks of an expert group.

    `kind`: the layer's graph before it was cut into phases. `further`: what may have to follow the calls, alone.
    """

    layer: str
    kind: str
    phase: Phase
    name: str
    comm: bool
    calls: tuple[Call, ...]
    further: Further | None = None


@dataclass
class Chunk:
    """Memory for one micro-batch on one stage, held from its F to its W.

    `parts`: the segments of its layers in the order of the stage's sequence.
    """

    values: Mapping[str, torch.Tensor]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Given:
    """What all stages of a rank are bound to. `tensors`: weights and what the prologue makes, by name; `gradients`:
    by weight; `losses`: the share of each loss in the gradient; `sizes`: of symbols."""

    tensors: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor]
    losses: Mapping[str, float]
    sizes: Mapping[str, int]
    device: str


class Stages:
    """The stages that one pipeline rank holds: their chunks in one arena, as the plan's schedule places them.

    Micro-batches whose chunks lie at the same place share what is bound there.
    """

    def __init__(self, engine: Engine, schedule: Schedule, rank: int, given: Given, exchange: Exchange) -> None:
        self._engine, self._given = engine, given
        program = engine.program
        self._types = value_types(program)
        self._sequences = {k: program.sequence(stage_name(k)) for k in schedule.held(rank)}
        self._layouts = {k: self._layout(s) for k, s in self._sequences.items()}
        arena = rank_arena(schedule, rank, self._layouts)
        self._arena = Memory.allocate(arena.bytes, given.device)
        needs = {p: max((y.workspace[p] for y in self._layouts.values()), default=0) for p in Phase}
        self._workspace = {p: Memory.allocate(n, given.device) for p, n in needs.items()}
        self._parts = {k: self._gradient_parts(s) for k, s in self._sequences.items()}
        self._shares = {n: self._share(n) for s in self._sequences.values() for n in s.losses}
        self._rounds = Rounds(engine, exchange, given.sizes, given.gradients)
        bound: dict[tuple[int, ChunkPlace], Chunk] = {}
        self._chunks: dict[tuple[int, int], Chunk] = {}
        for (stage, micro_batch), place in sorted(arena.places.items(), key=lambda item: item[0]):
            if (stage, place) not in bound:
                bound[stage, place] = self._bind(stage, place)
            self._chunks[stage, micro_batch] = bound[stage, place]

    def chunk(self, stage: int, micro_batch: int) -> Chunk:
        """Where `stage` keeps what it has of `micro_batch`: from the F of it to its W, and no longer."""
        return self._chunks[stage, micro_batch]

    @property
    def room(self) -> torch.Tensor:
        """The memory of all chunks: free from the last W of a step to the first F of the next."""
        return self._arena.block

    def _share(self, loss: str) -> torch.Tensor:
        wide = self._engine.program.weights[0].type.dtype
        return torch.full((), self._given.losses[loss], dtype=torch_dtype(wide), device=self._given.device)

    def _layout(self, sequence: Sequence) -> ChunkLayout:
        given = self._given
        lasting = {*given.tensors, *(f"{COTANGENT}{n}" for n in sequence.losses)}
        outside = frozenset(n for n, _ in sequence.gradients)
        return chunk_layout(self._engine.program, sequence, self._engine.registry, given.sizes, outside.__contains__,
                            lasting.__contains__)  # fmt: skip

    def _gradient_parts(self, sequence: Sequence) -> dict[str, torch.Tensor]:
        """Tensors for gradients that are added to the weight's after they were computed."""
        in_place = gradients_in_place(self._engine, sequence, self._given.gradients)
        types = self._types
        return {n: torch.empty(types[n].bound(self._given.sizes), dtype=torch_dtype(types[n].dtype),
                               device=self._given.device)
                for n, _ in sequence.gradients if n not in in_place}  # fmt: skip

    def _bind(self, stage: int, place: ChunkPlace) -> Chunk:
        """Everything that this stage does with a chunk at this place."""
        engine, given, sequence, layout = self._engine, self._given, self._sequences[stage], self._layouts[stage]
        begins = itertools.accumulate(layout.blocks, initial=0)
        places = zip(begins, (place.held, *place.late), strict=False)  # the last of `begins` is where all end
        spans = tuple((begin, Memory(self._arena.block[at:])) for begin, at in places)
        blocks = Blocks(spans, self._workspace)
        offsets = {s.name: s.offset for s in layout.slots.slots}
        types = self._types
        inputs = {n: blocks.slot(offsets[n], Value(n, types[n]), given.sizes) for n in sequence.inputs if n in offsets}
        inputs |= {f"{COTANGENT}{n}": self._shares[n] for n in sequence.losses}
        room = Room(layout.slots, blocks, self._parts[stage])
        runner = prepare_sequence(engine, sequence, given.sizes, inputs | dict(given.tensors), given.gradients,
                                  room=room)  # fmt: skip
        return Chunk(runner.values, tuple(_parts(engine, sequence, runner, self._rounds.layers(sequence, runner))))


def _parts(engine: Engine, sequence: Sequence, runner: Runner, rounds: Mapping[str, LayerRounds]) -> Iterator[Part]:
    """The calls of a bound stage, segment by segment; where a layer's rows come back, its further rounds.

    W runs after what its B computed, not after its B's exchanges, and the next layer's may begin beside it: so W must
    not read their memory.
    """
    steps = iter(runner.again)
    taken = next(steps, None)
    exchanged: set[str] = set()
    for layer in sequence.layers:
        graph = engine.program.graph(layer.graph)
        kind = layer.graph.removesuffix(f"_{layer.phase.value}")
        found = _in_order(segments(graph, engine.registry))
        if layer.phase is Phase.B:
            exchanged |= _exchanged(layer, graph, found, runner)
        elif layer.phase is Phase.W and not exchanged.isdisjoint(layer.inputs):
            name = min(exchanged.intersection(layer.inputs))
            raise IRError(f"{layer.name}: the weight gradient reads {name}, which an exchange brings; copy it in B")
        back = max((i for i, s in enumerate(found) if s.comm), default=-1)
        for i, segment in enumerate(found):
            calls: list[Call] = []
            while taken is not None and taken.layer == layer.name and taken.phase is layer.phase \
                    and taken.index <= segment.nodes[-1]:  # fmt: skip
                calls.append(taken.call)
                taken = next(steps, None)
            further = None
            if i == back and layer.name in rounds:
                further = rounds[layer.name].forward if layer.phase is Phase.F else rounds[layer.name].backward
            yield Part(layer.name, kind, layer.phase, segment.name, segment.comm, tuple(calls), further)
    assert taken is None


def _exchanged(layer: Layer, graph: Graph, found: tuple[Segment, ...], runner: Runner) -> set[str]:
    """Names of what a layer hands on that lies where an exchange put it."""
    assert runner.layout is not None
    roots = runner.layout.graphs[graph.name].roots
    brought = {v.name for s in found if s.comm for i in s.nodes for v in graph.nodes[i].outputs}
    return {name for v, name in zip(graph.results, layer.outputs, strict=True) if roots[v.name] in brought}


def _in_order(found: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """The segments of a graph whose nodes stand in their order; all in one if they do not and nothing communicates."""
    nodes = [i for s in found for i in s.nodes]
    if nodes == sorted(nodes):
        return found
    if any(s.comm for s in found):
        raise IRError("the nodes of a layer that communicates do not stand in the order of its segments")
    return (Segment(found[0].name, False, tuple(sorted(nodes))),)


__all__ = ["Chunk", "Given", "Part", "Stages"]
