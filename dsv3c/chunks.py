"""Where the activations of many micro-batches lie on one pipeline rank: blocks for each, placed by the schedule.

A chunk is one stage's work on one micro-batch. What forward makes for backward lies in a block that is held from its
F to the action that makes its weight gradients. What B makes for W lies in one block for each layer, and in one more
if a layer's W reads what another layer's B made. An action that does B and W at once does them layer by layer, so the
layers' blocks may be the same memory; where W is deferred, each layer has its own until then. With room for all of
this in one block, every chunk would take as much as the few whose W is deferred. The blocks lie in one arena, placed
by the cells of the rank's row of the schedule in which they are held.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from dsv3c.arena import ALIGNMENT, GraphLayout, SequenceLayout, Slot, lifetimes, place
from dsv3c.ir import Graph, Phase, Program, Sequence, Type
from dsv3c.op import Registry
from dsv3c.schedule import Schedule
from dsv3c.stages import COTANGENT


@dataclass(frozen=True)
class ChunkLayout:
    """The memory of one chunk. Offsets in `slots.slots` run through all blocks: the first of `held` bytes, then those
    of `late`. What the stage is sent, and its tokens, have slots too.

    `alike`: how many of the late blocks, the first ones, are each of one layer alone. `workspace`: bytes inside
    graphs, for each phase; all chunks of a rank share them.
    """

    slots: SequenceLayout
    held: int
    late: tuple[int, ...]
    alike: int
    workspace: Mapping[Phase, int]

    @property
    def blocks(self) -> tuple[int, ...]:
        """The size of every block, in the order of their offsets."""
        return (self.held, *self.late)


def weight_gradients_apart(sequence: Sequence) -> bool:
    """Whether all of B comes before any W, so that W may be done later."""
    phases = [y.phase for y in sequence.layers if y.phase is not Phase.F]
    return phases == sorted(phases, key=tuple(Phase).index)


def chunk_layout(program: Program, sequence: Sequence, registry: Registry, sizes: Mapping[str, int],
                 outside: Callable[[str], bool], lasting: Callable[[str], bool],
                 known: dict[tuple[Graph, frozenset[str]], GraphLayout] | None = None) -> ChunkLayout:  # fmt: skip
    """Lay out one chunk of a stage.

    `outside(name)`: the value has storage of its own (gradients written where they are summed). `lasting(name)`: the
    input is the same for all chunks (weights, what a prologue makes, weights of losses). `known` as in `lifetimes`.
    """
    live = lifetimes(program, sequence, registry, sizes, known)
    roots, start, end, types = live.roots, dict(live.start), dict(live.end), dict(live.types)
    phases = [y.phase for y in sequence.layers]
    backward = phases.count(Phase.F)
    for name, given in _input_types(program, sequence).items():
        if not lasting(name):
            start[name] = backward if name.startswith(COTANGENT) else 0
            types[name] = given
            end.setdefault(name, start[name])
    for name in sequence.results:
        root, last = roots[name], len(phases) if name.startswith(COTANGENT) else max(backward - 1, 0)
        end[root] = max(end.get(root, last), last)
    for name, _weight in sequence.gradients:
        if not outside(name):  # an overlapped schedule may compute a weight gradient before the rest of backward
            start[roots[name]], end[roots[name]] = min(start[roots[name]], backward), len(phases)
    readers: dict[str, dict[Phase, set[str]]] = {}
    for y in sequence.layers:
        for name in y.inputs:
            readers.setdefault(roots[name], {}).setdefault(y.phase, set()).add(y.name)
    apart = weight_gradients_apart(sequence)
    late: dict[str, list[str]] = {}
    crossing: list[str] = []
    for r, i in live.start.items():
        if apart and phases[i] is Phase.B and Phase.W in readers.get(r, {}) and r not in sequence.results:
            own = sequence.layers[i].name
            if readers[r][Phase.W] == {own}:
                late.setdefault(own, []).append(r)
            else:
                crossing.append(r)
    held = [r for r in start if r in types and not outside(r) and not any(r in rs for rs in (crossing, *late.values()))]
    placed: list[Slot] = []
    sizes_of_blocks: list[int] = []
    for block in (held, *late.values(), *([crossing] if crossing else [])):
        slots, size = place([(r, types[r].bytes(sizes), start[r], end[r]) for r in block])
        placed += (replace(s, offset=sum(sizes_of_blocks) + s.offset) for s in slots)
        sizes_of_blocks.append(size)
    workspace = dict.fromkeys(Phase, 0)
    for y in sequence.layers:
        workspace[y.phase] = max(workspace[y.phase], live.graphs[y.graph].peak)
    layout = SequenceLayout(sequence.name, roots, tuple(placed), sum(sizes_of_blocks), sum(workspace.values()),
                            live.graphs)  # fmt: skip
    return ChunkLayout(layout, sizes_of_blocks[0], tuple(sizes_of_blocks[1:]), len(late), workspace)


def _input_types(program: Program, sequence: Sequence) -> dict[str, Type]:
    """Types of what a sequence is given; a stage without layers hands on what others made."""
    wanted = dict.fromkeys(sequence.inputs)
    found: dict[str, Type] = {}
    for other in (sequence, *program.sequences):
        if len(found) == len(wanted):
            break
        for y in other.layers:
            graph = program.graph(y.graph)
            for v, name in (*zip(graph.inputs, y.inputs, strict=True), *zip(graph.results, y.outputs, strict=True)):
                if name in wanted:
                    found.setdefault(name, v.type)
    return found


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """Where a chunk's blocks begin in the arena of its rank: that of forward, and each of the late ones."""

    held: int
    late: tuple[int, ...]


@dataclass(frozen=True)
class RankArena:
    """The arena of one pipeline rank: its bytes, and for each (stage, micro-batch) where the chunk lies."""

    bytes: int
    places: Mapping[tuple[int, int], ChunkPlace]


def rank_arena(schedule: Schedule, rank: int, chunks: Mapping[int, ChunkLayout]) -> RankArena:
    """Place the chunks of every micro-batch that a pipeline rank works on; `chunks` is by stage.

    A chunk has its first block from its F on: what it is sent earlier must wait elsewhere.
    """
    begun: dict[tuple[int, int], int] = {}
    turned: dict[tuple[int, int], tuple[int, str]] = {}
    wanted: list[tuple[int, int, int]] = []
    found: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
    for index, cell in enumerate(schedule.rows[rank]):
        for a in cell:
            key, chunk = (a.stage, a.micro_batch), chunks[a.stage]
            if a.kind == "F":
                begun[key] = index
            if a.kind in "IB":
                turned[key] = index, a.kind
            if a.kind in "WB":
                first = len(wanted)
                wanted.append((chunk.held, begun[key], index))
                since, kind = turned[key]
                count = chunk.alike if kind == "B" else 0
                if count:
                    wanted.append((max(chunk.late[:count]), since, index))
                own = range(len(wanted), len(wanted) + len(chunk.late) - count)
                wanted += ((size, since, index) for size in chunk.late[count:])
                found[key] = first, (*((first + 1,) * count), *own)
    offsets, peak = _packed(tuple(wanted))
    places = {k: ChunkPlace(offsets[h], tuple(offsets[i] for i in late)) for k, (h, late) in found.items()}
    return RankArena(peak, places)


@functools.lru_cache(maxsize=128)  # ranks that mirror each other, and trials of what does not change it, ask the same
def _packed(wanted: tuple[tuple[int, int, int], ...]) -> tuple[list[int], int]:
    """Offsets for blocks given as (bytes, start, end), and the peak: the best of three orders of placing them."""
    orders = (
        lambda i: (wanted[i][1], -wanted[i][0], i),
        lambda i: (-wanted[i][0], wanted[i][1], i),
        lambda i: (-wanted[i][2], wanted[i][1], i),
    )
    least = _most_at_once(wanted)
    best: tuple[list[int], int] | None = None
    for key in orders:
        order = sorted(range(len(wanted)), key=key)
        slots, peak = place([("", *wanted[i]) for i in order], by_size=False)
        if best is None or peak < best[1]:
            offsets = dict(zip(order, (s.offset for s in slots), strict=True))
            best = [offsets[i] for i in range(len(wanted))], peak
        if peak <= least:
            break
    assert best is not None
    return best


def _most_at_once(wanted: Iterable[tuple[int, int, int]]) -> int:
    """The most bytes that are held at the same time: no placing takes less."""
    change: dict[int, int] = {}
    for size, start, end in wanted:
        size = -(-size // ALIGNMENT) * ALIGNMENT
        change[start] = change.get(start, 0) + size
        change[end + 1] = change.get(end + 1, 0) - size
    return max(itertools.accumulate(n for _, n in sorted(change.items())), default=0)
