"""Lay out memory: lifetimes, offsets and the peak bytes of every rank; refuse what does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv3c.arena import BufferPlan, RankMemory, SequenceLayout, sequence_layout, show_bytes
from dsv3c.capacity import capacity
from dsv3c.errors import InputError
from dsv3c.ir import DType, Program
from dsv3c.passes._rank_memory import GraphLayouts, divided, reserved, sizes_of
from dsv3c.stages import stage_count
from dsv3c.state import Pass, State, TakeNote

KINDS = ("weights", "gradients", "optimizer", "activations", "communication")


@dataclass(frozen=True)
class PlanBuffers(Pass):
    """Place every tensor of every sequence and add up each rank's memory; refuse what does not fit the machine.

    `check=false` plans what does not fit all the same. Bytes are those of the job's sizes at balanced expert load.
    """

    name: ClassVar[str] = "plan_buffers"
    check: bool = True

    def run(self, state: State, note: TakeNote) -> State:
        if state.job is None or not state.program.sequences:
            note("kept", "program", "without a job's sizes there is nothing to lay out")
            return state
        plan = plan_memory(state, both=self.check)
        machine = state.machine
        for rank in plan.ranks if len(plan.ranks) > 1 else ():
            note("planned", f"pipeline rank {rank.rank}", _line(rank))
        note("planned", "memory", memory_table(plan).replace("\n", "; "))
        limit = machine.memory_bytes if machine else 0
        if plan.with_headroom:
            most = max(plan.with_headroom, key=lambda r: r.peak)
            short = f", more than the {show_bytes(limit)} there are" if machine and most.peak > limit else ""
            note(
                "planned", "memory with headroom",
                f"with buffers for {state.job.expert_headroom:g} times the balanced load of experts, pipeline rank "
                f"{most.rank} needs {show_bytes(most.peak)}{short}",
            )  # fmt: skip
        if machine is not None and plan.peak.peak > limit:
            if not state.job.allow_oversize and self.check:
                raise InputError(
                    f"this job needs {show_bytes(plan.peak.peak)} on a rank of {machine.name}, which has "
                    f"{show_bytes(limit)}:\n{rank_table(plan)}\nUse a larger --mesh, a smaller --micro-batch or "
                    "--seq, or --allow-oversize to plan it all the same."
                )
            note("oversize", "memory", f"{show_bytes(plan.peak.peak)} are needed, {show_bytes(limit)} are there")
        return state.but(buffers=plan)


def plan_memory(state: State, both: bool = True, known: GraphLayouts | None = None) -> BufferPlan:
    """The layout of everything and each rank's bytes; with `both` also those with headroom for uneven experts.

    `known` keeps layouts of graphs from one trial to the next, if sizes stay.
    """
    program, sizes = state.program, state.sizes
    if stage_count(program) and state.schedule is not None:
        balanced = divided(state, known=known)
        headroom = state.job.expert_headroom if state.job else 1.0
        more = divided(state, headroom).ranks if both and capacity(program, sizes) else ()
        layouts = (*balanced.prologues, *(c.slots for c in balanced.stages))
        return BufferPlan(layouts, balanced.ranks, more, balanced.stages, balanced.arenas)
    layouts = tuple(
        sequence_layout(
            program,
            s,
            state.registry,
            sizes_of(s, sizes),
            outside=frozenset(n for n, _ in s.gradients).__contains__,
        )
        for s in program.sequences
        if s.name == "prologue" or s.name == main_sequence(state)
    )
    return BufferPlan(layouts, (rank_memory(program, layouts, state),))


def main_sequence(state: State) -> str:
    """The sequence that a job spends its time in."""
    assert state.job is not None
    return state.job.kind if state.program.has_sequence(state.job.kind) else state.program.sequences[0].name


def rank_memory(program: Program, layouts: tuple[SequenceLayout, ...], state: State) -> RankMemory:
    """Bytes of one rank that holds the whole model."""
    job = state.job
    assert job is not None
    stored = sum(w.type.bytes() for w in program.weights)
    trained = [w for w in program.weights if w.group != "state"]
    gradients = optimizer = 0
    if job.kind == "train":
        gradients = sum(w.type.bytes() for w in trained)
        moment = 64 if job.dtype is DType.f64 else 16
        optimizer = sum(2 * w.type.with_dtype(DType.f64 if moment == 64 else DType.bf16).bytes() for w in trained)
    prologue = sum(y.bytes for y in layouts if y.sequence == "prologue")
    activations = max((y.bytes for y in layouts if y.sequence != "prologue"), default=0) + _cache_bytes(program, state)
    runs = [s for s in program.sequences if s.name in ("prologue", main_sequence(state))]
    beside = reserved(state, runs, state.sizes)
    return RankMemory(0, stored + prologue, gradients, optimizer, activations + beside, 0)


def _cache_bytes(program: Program, state: State) -> int:
    name = main_sequence(state)
    sequence = program.sequence(name)
    total = 0
    for layer in sequence.layers:
        for value, bound in zip(program.graph(layer.graph).inputs, layer.inputs, strict=True):
            if bound.startswith("cache.") and bound in sequence.inputs:
                total += value.type.bytes(state.sizes)
    return total


def memory_table(plan: BufferPlan) -> str:
    """What the fullest rank holds, one line per kind."""
    rank = plan.peak
    return "\n".join(f"{kind}: {show_bytes(getattr(rank, kind))}" for kind in KINDS)


def rank_table(plan: BufferPlan) -> str:
    """What the fullest rank holds, or if there are several pipeline ranks, what each of them does."""
    if len(plan.ranks) == 1:
        return memory_table(plan)
    return "\n".join(f"pipeline rank {r.rank}: {_line(r)}" for r in plan.ranks)


def _line(rank: RankMemory) -> str:
    return f"{show_bytes(rank.peak)}: " + ", ".join(f"{kind} {show_bytes(getattr(rank, kind))}" for kind in KINDS)
