"""Bytes that each pipeline rank needs when the model is divided among many ranks; all its data ranks need as many."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from dsv3c.arena import GraphLayout, RankMemory, SequenceLayout, sequence_layout
from dsv3c.capacity import capacity, exchange_room
from dsv3c.chunks import ChunkLayout, RankArena, chunk_layout, rank_arena
from dsv3c.ir import DType, Graph, Phase, Program, Sequence, Type
from dsv3c.job import LANE
from dsv3c.layout import FlatGroup, flat_groups, optimizer_bytes
from dsv3c.schedule import Schedule
from dsv3c.stages import COTANGENT, PROLOGUE, bound_directly, prologue_of, sent, stage_count, stage_name
from dsv3c.state import State

RECEIVING = 2
"""Messages that may be under way at once on each channel between two stages."""


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
        ranks.append(RankMemory(
            rank, _whole(program, held) + (prologue.bytes if prologue else 0), gradients, optimizer,
            arenas[-1].bytes + spaces, room + _between(program, held, schedule, sizes),
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
    """Room for what arrives from other pipeline ranks while the rank is still at work on something else."""
    types: dict[str, Type] = {}
    for sequence in program.sequences:
        for y in sequence.layers:
            types.update(zip(y.outputs, (v.type for v in program.graph(y.graph).results), strict=True))
    total = 0
    for s in stages:
        for neighbour, direction in ((s - 1, 0), (s + 1, 1)):
            if 0 <= neighbour < schedule.stages:
                total += RECEIVING * sum(types[name].bytes(sizes) for name in sent(program, neighbour)[direction])
    return total
