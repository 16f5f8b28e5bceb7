"""What the files of this folder build rows from: an order of kinds becomes actions by counting micro-batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from dsv3c.schedule import Action, Cell

Unit: TypeAlias = tuple[tuple[str, int], ...]
"""A cell before micro-batches are counted: (kind, direction) of each action; W takes the oldest that is deferred."""

OLDEST: Unit = (("W", -1),)
"""The oldest deferred weight gradient of both directions."""


def row(units: Iterable[Unit], stages: tuple[int, ...], first: tuple[int, ...]) -> tuple[Cell, ...]:
    """The cells of one rank: per direction its stage and its first micro-batch; each kind counts on from there."""
    forward, backward = [*first], [*first]
    deferred: deque[Action] = deque()

    def action(kind: str, direction: int) -> Action:
        if kind == "W":
            oldest = next(a for a in deferred if direction < 0 or a.stage == stages[direction])
            deferred.remove(oldest)
            return oldest
        counts = forward if kind == "F" else backward
        made = Action(stages[direction], kind, counts[direction])
        counts[direction] += 1
        if kind == "I":
            deferred.append(Action(made.stage, "W", made.micro_batch))
        return made

    return tuple(tuple(action(*one) for one in unit) for unit in units)


def bidirectional(half: int, place: int, micro_batches: int) -> Iterator[Unit]:
    """The eight steps of DualPipe (report, section 3.2.1) on the rank that is the `place`-th from the end where
    direction 0 enters; the directions meet after `half` ranks. `micro_batches` are those of one direction.
    """
    far, near = half - place - 1, place + 1
    yield from [(("F", 0),)] * (2 * far)
    for _ in range(near):
        yield (("F", 0),)
        yield (("F", 1),)
    for _ in range(far):
        yield (("I", 1),)
        yield OLDEST
        yield (("F", 1),)
    for i in range(micro_batches - 2 * half + near):
        if i == 0 and far == 0:  # where the directions meet the first two do not overlap, which shortens the bubble
            yield (("F", 0),)
            yield (("B", 1),)
        else:
            yield (("F", 0), ("B", 1))
        yield (("F", 1), ("B", 0))
    for _ in range(far):
        yield (("B", 1),)
        yield (("F", 1), ("B", 0))
    for i in range(2 * near):
        yield (("B" if i < near else "I", 1 - i % 2),)
    for _ in range(far):
        yield OLDEST
        yield (("I", 0),)
    yield from [OLDEST] * near


def one_forward_one_backward(ranks: int, rank: int, micro_batches: int) -> Iterator[str]:
    """F and I in the order of 1F1B: as many forwards as there are ranks behind, then one of each by turns."""
    ahead = min(ranks - 1 - rank, micro_batches)
    yield from "F" * ahead
    yield from "FI" * (micro_batches - ahead)
    yield from "I" * ahead
