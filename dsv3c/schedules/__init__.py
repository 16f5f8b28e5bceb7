"""The kinds of pipeline schedules, one file each, and what is done with schedules: make, verify, simulate, choose.

Every `Kind` defined in this folder is in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dsv3c.discover import defined_in
from dsv3c.errors import InputError, did_you_mean
from dsv3c.schedule import Kind, Schedule
from dsv3c.schedules._check import Occupancy, execution_order, needs, occupancy, verify
from dsv3c.schedules._choose import Candidate, Choice, weigh
from dsv3c.schedules._simulate import (
    Durations,
    Footprint,
    TimedCell,
    Timeline,
    Times,
    equal_stages,
    memory_held,
    simulate,
)

AUTO = "auto"
"""The name that stands for the fastest kind that fits."""

MOST_CELLS = 1 << 22
"""A schedule has at most so many forward actions, ranks times micro-batches, since it is written out."""

_kinds: dict[str, Kind] = {}
KINDS: Mapping[str, Kind] = _kinds
"""Kinds by name."""


def register(kind: Kind) -> Kind:
    """Add a kind; returns it. Raises InputError if another has its name."""
    if _kinds.get(kind.name, kind) is not kind:
        raise InputError(f"the schedule '{kind.name}' is registered twice; choose another name")
    _kinds[kind.name] = kind
    return kind


def find(name: str) -> Kind:
    """The kind called `name`; InputError with the nearest name if there is none."""
    if name not in _kinds:
        raise InputError(f"the schedule '{name}' is unknown; {did_you_mean(name, _kinds)}")
    return _kinds[name]


def refusal(kind: str, ranks: int, micro_batches: int) -> str | None:
    """Why there is no such schedule and what to choose instead; None if there is."""
    found = find(kind)
    if ranks < 1 or micro_batches < 1:
        return "a schedule needs at least 1 rank and 1 micro-batch"
    if ranks * micro_batches > MOST_CELLS:
        return f"{ranks} ranks × {micro_batches} micro-batches are more than {MOST_CELLS}; take fewer micro-batches"
    return found.refusal(ranks, micro_batches)


def generate(kind: str, ranks: int, micro_batches: int) -> Schedule:
    """The schedule of `kind` for so many pipeline ranks and micro-batches; InputError for numbers it cannot have."""
    reason = refusal(kind, ranks, micro_batches)
    if reason is not None:
        raise InputError(f"{kind} on {ranks} ranks with {micro_batches} micro-batches: {reason}")
    found = find(kind)
    return Schedule(kind, ranks, micro_batches, found.rows(ranks, micro_batches), found.routes(ranks))


def choose(ranks: int, micro_batches: int, durations: Callable[[int], Durations],
           footprint: Callable[[int], Footprint] | None = None, memory_limit: int | None = None) -> Choice:  # fmt: skip
    """The schedule with the shortest simulated time that fits, of the kinds that `auto` may choose.

    `durations` and `footprint` are given the number of stages; `memory_limit` is bytes of one rank. Raises InputError
    saying of each kind why not if none is left.
    """
    kinds = (k.name for k in KINDS.values() if k.auto)

    def make(kind: str) -> Schedule | str:
        return refusal(kind, ranks, micro_batches) or generate(kind, ranks, micro_batches)

    return weigh(kinds, make, durations, footprint, memory_limit)


for _kind in defined_in(__name__, Kind):
    register(_kind)

__all__ = [
    "AUTO", "KINDS", "Candidate", "Choice", "Durations", "Footprint", "Occupancy", "TimedCell", "Timeline", "Times",
    "choose", "equal_stages", "execution_order", "find", "generate", "memory_held", "needs", "occupancy", "refusal",
    "register", "simulate", "verify",
]  # fmt: skip
