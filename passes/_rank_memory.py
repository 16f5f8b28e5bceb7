"""Bytes that each pipeline rank needs when the model is divided among many ranks; all its data ranks need as many."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from dsv3c.arena import GraphLayout, RankMemory, SequenceLayout, sequence_layout
from dsv3c.capacity import capacity, exchange_room, route_bytes
from dsv3c.chunks import ChunkLayout, RankArena, chunk_layout, rank_arena
from dsv3c.ir import DType, Graph, Node, Phase, Program, Sequence
from dsv3c.job import LANE
from dsv3c.layout import FlatGroup, flat_groups, optimizer_bytes
from dsv3c.rewrite import crosses_ranks
from dsv3c.schedule import Schedule
from dsv3c.stages import COTANGENT, PROLOGUE, borders, bound_directly, prologue_of, stage_count, stage_name, value_types
from dsv3c.state import State


@dataclass(frozen=True)
class Division:
    """What a divided program needs. `stages`: a chunk of each stage; per pipeline rank its arena, its bytes by kind,
    and the layout of its prologue."""

    stages: tuple[ChunkLayout, ...]
    arenas: tuple[RankArena, ...]
    ranks: tuple[RankMemory, ...]
    prologues: tuple[SequenceLayout, ...]


GraphLayouts: TypeAlias = dict[tuple[Graph, frozenset[str]], GraphLayout]


def divided(state: State, headroom: float = 1.0, known: GraphLayouts | None = None) -> Division:
    """The memory of a program that `partition` divided, with buffers for `headroom` times the balanced expert load.

    `known` keeps layouts of graphs for other programs of the same sizes.
    """
    program, schedule, job = state.program, state.schedule, state.job
    assert schedule is not None and job is not None
    sizes = {**state.sizes, **capacity(program, state.sizes, headroom)}
    known = {} if known is None else known
    lasting = {w.name for w in program.weights}
    if program.has_sequence(PROLOGUE):
        lasting.update(program.sequence(PROLOGUE).results)
    stages: list[ChunkLayout] = []
    alike: dict[object, tuple[tuple[str, ...], ChunkLayout]] = {}
    for i in range(stage_count(program)):
        sequence = program.sequence(stage_name(i))
        fixed = lasting | {f"{COTANGENT}{loss}" for loss in sequence.losses}
        outside = frozenset(name for name, _ in sequence.gradients)
        form, names = _form(sequence, fixed)
        if form not in alike or not sequence.layers:
            alike[form] = names, chunk_layout(program, sequence, state.registry, sizes, outside.__contains__,
                                              fixed.__contains__, known)  # fmt: skip
        theirs, layout = alike[form]
        by = dict(zip(theirs, names, strict=True))
        stages.append(layout if theirs == names else replace(layout, slots=_renamed(layout.slots, by, sequence.name)))
    groups = flat_groups(program, schedule.holders, job.mesh)
    room = exchange_room(program, sizes, job.mesh.ep, job.ranks_per_node)
    arenas, ranks, prologues = [], [], []
    alike_first: dict[object, tuple[tuple[str, ...], SequenceLayout]] = {}
    extra: dict[tuple[str, ...], int] = {}
    for rank in range(schedule.ranks):
        held = schedule.held(rank)
        arenas.append(rank_arena(schedule, rank, {s: stages[s] for s in held}))
        spaces = sum(max(stages[s].workspace[phase] for s in held) for phase in Phase)
        first = prologue_of(program, held)
        prologue = None
        if first is not None:
            form, names = _form(first, lasting)
            if form not in alike_first:
                alike_first[form] = names, sequence_layout(program, first, state.registry, sizes)
            theirs, prologue = alike_first[form]
            prologue = _renamed(prologue, dict(zip(theirs, names, strict=True)), f"{PROLOGUE}.{rank}")
            prologues.append(prologue)
        gradients, optimizer = _trained(groups, rank, state)
        runs = (*([first] if first else []), *(program.sequence(stage_name(s)) for s in held))
        graphs = tuple(dict.fromkeys(y.graph for s in runs for y in s.layers))
        if graphs not in extra:
            extra[graphs] = reserved(state, runs, sizes)
        ranks.append(RankMemory(
            rank, _whole(program, held) + (prologue.bytes if prologue else 0), gradients, optimizer,
            arenas[-1].bytes + spaces + extra[graphs],
            room + _between(program, held, schedule, sizes) + _routes(state, arenas[-1], sizes),
        ))  # fmt: skip
    return Division(tuple(stages), tuple(arenas), tuple(ranks), tuple(prologues))


def _form(sequence: Sequence, lasting: Collection[str]) -> tuple[object, tuple[str, ...]]:
    """What decides the layout of a sequence, with numbers for names, and the names in the order of their numbers."""
    numbers: dict[str, int] = {}

    def number(names: Iterable[str]) -> tuple[int, ...]:
        return tuple(numbers.setdefault(n, len(numbers)) for n in names)

    layers = tuple((y.phase, y.graph, number(y.inputs), number(y.weights), number(y.outputs)) for y in sequence.layers)
    ends = number(sequence.inputs), number(sequence.results), number(n for n, _ in sequence.gradients)
    marks = tuple((n in lasting, n.startswith(COTANGENT)) for n in numbers)
    return (layers, ends, marks), tuple(numbers)


def _renamed(layout: SequenceLayout, by: Mapping[str, str], name: str) -> SequenceLayout:
    """The layout of a sequence of the same form."""
    roots = {by[n]: by[r] for n, r in layout.roots.items()}
    return replace(layout, sequence=name, roots=roots, slots=tuple(replace(s, name=by[s.name]) for s in layout.slots))


def _whole(program: Program, stages: tuple[int, ...]) -> int:
    """Whole copies of the weights that layers read themselves; the others exist in the prologue's forms only."""
    return sum(program.weight(name).type.bytes() for name in bound_directly(program, stages))


def _trained(groups: tuple[FlatGroup, ...], rank: int, state: State) -> tuple[int, int]:
    """Bytes of whole gradients, and of one rank's shard of masters and moments."""
    assert state.job is not None
    wide = 8 if state.job.dtype is DType.f64 else 4
    moment = 8 if state.job.dtype is DType.f64 else 2
    mine = [g for g in groups if rank in g.holders]
    gradients = sum(g.rows * LANE * wide for g in mine)
    return gradients, sum(optimizer_bytes(g, state.job.mesh, wide + 2 * moment) for g in mine)


def _between(program: Program, stages: tuple[int, ...], schedule: Schedule, sizes: dict[str, int]) -> int:
    """Room for one message from and one to each neighbour of each stage: no transfer is bound to a chunk's memory."""
    types, each = value_types(program), borders(program)
    names = (name for s in stages for way in dataclasses.astuple(each[s]) for name in way)
    return sum(types[name].bytes(sizes) for name in names)


def _routes(state: State, arena: RankArena, sizes: dict[str, int]) -> int:
    """What is kept of the way of rows, for each layer that sends some and each place of a chunk."""
    program, job = state.program, state.job
    assert job is not None
    places = Counter(stage for stage, _ in {(stage, place) for (stage, _), place in arena.places.items()})
    total = 0
    for stage, count in places.items():
        for y in program.sequence(stage_name(stage)).layers:
            sends = (n for n in program.graph(y.graph).nodes if n.op == "dispatch" and crosses_ranks(n))
            total += count * sum(route_bytes(n, sizes, job.mesh.ep, job.ranks_per_node) for n in sends)
    return total


def reserved(state: State, sequences: Iterable[Sequence], sizes: dict[str, int]) -> int:
    """Bytes that executing these sequences holds beside all tensors of the program: scratch, libraries."""
    program = state.program
    if state.target is None or state.target.reserve is None or state.job is None:
        return 0
    nodes: list[tuple[Node, dict[str, int]]] = []
    for sequence in sequences:
        for name in dict.fromkeys(layer.graph for layer in sequence.layers):  # a graph used again needs no more
            nodes += [(node, sizes_of(sequence, sizes)) for node in program.graph(name).nodes]
    return state.target.reserve(nodes, state.job.implementations)


def sizes_of(sequence: Sequence, sizes: dict[str, int]) -> dict[str, int]:
    """Decoding handles one new token per sequence; all else the job's sizes."""
    return {**sizes, "S": 1} if sequence.name == "decode" else sizes
