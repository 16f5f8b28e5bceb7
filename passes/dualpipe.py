"""Decide which chunk every pipeline rank works on, and when: DualPipe, or another kind that is faster here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv3c.errors import InputError
from dsv3c.passes._stage_costs import StageCosts, equal
from dsv3c.schedule import Schedule
from dsv3c.schedules import AUTO, Candidate, Choice, choose, generate, refusal, verify
from dsv3c.state import Pass, State, TakeNote

TRAIN = "train"


@dataclass(frozen=True)
class DualPipe(Pass):
    """Make the schedule of the pipeline ranks and prove that it can run.

    `kind` is one of `dsv3c list schedules`, or auto for the fastest that fits by simulated time; left auto it is the
    job's. `ranks` and `micro_batches` are the job's if they are 0. The program stays as it is.
    """

    name: ClassVar[str] = "dualpipe"
    kind: str = AUTO
    ranks: int = 0
    micro_batches: int = 0

    def run(self, state: State, note: TakeNote) -> State:
        job = state.job
        kind = job.schedule if job and self.kind == AUTO else self.kind
        ranks = self.ranks or state.mesh.pp
        count = self.micro_batches or (job.global_batch // (job.micro_batch * job.mesh.dp) if job else 1)
        if ranks < 1 or count < 1:
            raise InputError(f"a schedule of {ranks} ranks and {count} micro-batches; both must be at least 1")
        schedule = _chosen(state, ranks, count, note) if kind == AUTO else _made(kind, ranks, count)
        held = verify(schedule)
        chunks, late = max(held.in_flight), max(held.deferred)
        actions = sum(len(cell) for row in schedule.rows for cell in row)
        note(
            "verified", schedule.kind,
            f"{actions} actions of {ranks} ranks, {schedule.stages} stages and {count} micro-batches; a rank has at "
            f"most {chunks} chunks in flight and {late} weight gradients deferred",
        )  # fmt: skip
        return state.but(schedule=schedule)


def _made(kind: str, ranks: int, count: int) -> Schedule:
    """The schedule that was asked for. Raises InputError that names the flags if there is none."""
    reason = refusal(kind, ranks, count)
    if reason is not None:
        raise InputError(
            f"--schedule {kind} with {ranks} pipeline ranks and {count} micro-batches: {reason}; change --mesh pp, "
            "--global-batch or --micro-batch, or take --schedule auto"
        )
    return generate(kind, ranks, count)


def _chosen(state: State, ranks: int, count: int, note: TakeNote) -> Schedule:
    """The fastest kind that fits, by the machine's costs if the layers and the machine are known."""
    if state.machine is None or state.cut is None or not state.program.has_sequence(TRAIN):
        note("kept", "durations", "no machine or no layers cut into F, B and W, so all stages take equally long")
        choice = choose(ranks, count, lambda stages: equal(ranks, stages))
        _tell(choice, choice.schedule.kind, 1.0, "", note)
        return choice.schedule
    costs = StageCosts(state, state.machine)
    try:
        choice = choose(ranks, count, costs.durations, costs.footprint, state.machine.memory_bytes)
        kind = choice.schedule.kind
    except InputError:
        choice = choose(ranks, count, costs.durations, costs.footprint)
        made = [c for c in choice.candidates if c.timeline is not None]
        kind = min(made, key=lambda c: max(c.timeline.memory) if c.timeline else 0).kind
        note("kept", "memory", "by these estimates no kind fits, so the one that holds least is taken")
    _tell(choice, kind, 1e3, " ms", note)
    return generate(kind, ranks, count)


def _tell(choice: Choice, kind: str, scale: float, unit: str, note: TakeNote) -> None:
    """A note of each kind's time, and of the choice."""
    for c in choice.candidates:
        note("simulated" if c.timeline else "refused", c.kind, _time(c, scale, unit))
    chosen = next(c for c in choice.candidates if c.kind == kind)
    note("chose", kind, _time(chosen, scale, unit))


def _time(c: Candidate, scale: float, unit: str) -> str:
    if c.timeline is None:
        return c.refusal or ""
    held = f", {max(c.timeline.memory) / 2**30:.2f} GiB" if c.timeline.memory else ""
    more = f"; {c.refusal}" if c.refusal else ""
    return f"{c.timeline.makespan * scale:.5g}{unit}, {c.timeline.bubble_fraction:.1%} of it idle{held}{more}"
