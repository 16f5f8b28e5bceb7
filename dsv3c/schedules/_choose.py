"""Choose a kind of schedule by simulated time within memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dsv3c.errors import InputError
from dsv3c.schedule import Schedule
from dsv3c.schedules._check import verify
from dsv3c.schedules._simulate import Durations, Footprint, Timeline, simulate


@dataclass(frozen=True)
class Candidate:
    """A kind that was weighed: its schedule and timeline if it exists, and why it was passed over if it was."""

    kind: str
    schedule: Schedule | None
    timeline: Timeline | None
    refusal: str | None


@dataclass(frozen=True)
class Choice:
    """The chosen schedule and all that were weighed, by name."""

    schedule: Schedule
    timeline: Timeline
    candidates: tuple[Candidate, ...]


def weigh(kinds: Iterable[str], make: Callable[[str], Schedule | str], durations: Callable[[int], Durations],
          footprint: Callable[[int], Footprint] | None = None, memory_limit: int | None = None) -> Choice:  # fmt: skip
    """Simulate `make(kind)` for every kind, and choose the shortest that fits; for some it gives why there is none.

    `durations` and `footprint` are given the number of stages, since kinds divide the model differently;
    `memory_limit` is bytes of one rank. Of equally long ones the one that holds least chunks is chosen, then the
    first by name. Raises InputError if none is left.
    """
    weighed: list[Candidate] = []
    best: tuple[tuple[float, int, str], Candidate] | None = None
    for kind in sorted(kinds):
        schedule = make(kind)
        if isinstance(schedule, str):
            weighed.append(Candidate(kind, None, None, schedule))
            continue
        held = sum(verify(schedule).chunks.values())
        stages = schedule.stages
        timeline = simulate(schedule, durations(stages), footprint(stages) if footprint else None)
        refusal = None
        if memory_limit is not None and (needed := max(timeline.memory, default=0)) > memory_limit:
            refusal = f"it needs {needed / 2**30:.2f} GiB on a rank, which has {memory_limit / 2**30:.2f}"
        weighed.append(Candidate(kind, schedule, timeline, refusal))
        # Times that differ by less than rounding are equal, so that the choice is the same everywhere.
        key = (float(f"{timeline.makespan:.9g}"), held * schedule.ranks // stages, kind)
        if refusal is None and (best is None or key < best[0]):
            best = key, weighed[-1]
    if best is None:
        raise InputError("no schedule is possible: " + "; ".join(f"{c.kind}: {c.refusal}" for c in weighed))
    chosen = best[1]
    assert chosen.schedule is not None and chosen.timeline is not None
    return Choice(chosen.schedule, chosen.timeline, tuple(weighed))
