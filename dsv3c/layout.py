"""How weights lie in flat buffers and which rank holds which part of their optimizer state (ZeRO-1).

Weights of one optimizer group that the same pipeline ranks hold form one flat buffer, seen as rows of LANE numbers;
each begins a row, and the rows divide evenly among the ranks that sum its gradient. Experts have a buffer of their
own, since a rank holds only some of them and sums with fewer others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dsv3c.ir import Program, Weight
from dsv3c.job import LANE, Mesh
from dsv3c.stages import stage_count, weights_of

STATE = "state"
"""The optimizer group of what is never trained by gradient: router biases. No flat buffer holds it."""


@dataclass(frozen=True, slots=True)
class Span:
    """One weight in a flat buffer: its first element's place, and its shape on one rank."""

    name: str
    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """Weights that lie in one flat buffer of `rows` rows of LANE numbers.

    `optimizer`: their group of optimizer settings. `holders`: the pipeline ranks that hold them, ascending. `expert`:
    whether each rank holds only its experts.
    """

    name: str
    optimizer: str
    holders: tuple[int, ...]
    expert: bool
    weights: tuple[Span, ...]
    rows: int


def flat_groups(program: Program, holders_of: Callable[[int], tuple[int, ...]], mesh: Mesh) -> tuple[FlatGroup, ...]:
    """All flat buffers of all ranks, in an order that depends on the program alone.

    `holders_of(stage)` are the pipeline ranks that hold a stage. A program that is not divided is one stage.
    """
    stages = range(stage_count(program))
    binding: dict[str, set[int]] = {}
    for stage in stages:
        for name in weights_of(program, (stage,)):
            binding.setdefault(name, set()).update(holders_of(stage))
    found: dict[tuple[str, tuple[int, ...], bool], list[Weight]] = {}
    for w in program.weights:
        ranks = tuple(sorted(binding.get(w.name, ()))) if stages else holders_of(0)
        if w.group != STATE and ranks:
            found.setdefault((w.group, ranks, w.parts > 1), []).append(w)
    return tuple(_flat(*key, weights, mesh) for key, weights in sorted(found.items()))


def _flat(optimizer: str, holders: tuple[int, ...], expert: bool, weights: Iterable[Weight], mesh: Mesh) -> FlatGroup:
    spans: list[Span] = []
    row = 0
    for w in weights:
        span = Span(w.name, row * LANE, w.type.bound({}))
        spans.append(span)
        row += -(-span.size // LANE)
    shards = shard_count(holders, expert, mesh)
    name = ".".join((optimizer, *(("experts",) if expert else ()), "-".join(map(str, holders))))
    return FlatGroup(name, optimizer, holders, expert, tuple(spans), -(-row // shards) * shards)


def shard_count(holders: tuple[int, ...], expert: bool, mesh: Mesh) -> int:
    """Among how many ranks a flat buffer's optimizer state is divided."""
    return len(holders) * (mesh.dp // mesh.ep if expert else mesh.dp)


def ranks_of(group: FlatGroup, mesh: Mesh, rank: int) -> tuple[int, ...]:
    """The ranks that sum the gradient of a flat buffer with `rank`, which is one of them; shard i is the i-th's.

    In ascending order of (pipeline rank, data rank).
    """
    column = rank % mesh.dp
    return tuple(
        pp * mesh.dp + dp
        for pp in group.holders
        for dp in range(mesh.dp)
        if not group.expert or dp % mesh.ep == column % mesh.ep
    )


def optimizer_bytes(group: FlatGroup, mesh: Mesh, number: int) -> int:
    """Bytes of one rank's share of the optimizer state, at `number` bytes for a master weight and its two moments."""
    return group.rows // shard_count(group.holders, group.expert, mesh) * LANE * number
