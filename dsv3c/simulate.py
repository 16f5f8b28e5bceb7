"""Run a plan on paper: how long a step takes on its machine, where the time goes, and what it costs.

Times of segments come from `dsv3c.costs`, their interleaving from the plan, the rest from the schedule. What crosses
between pipeline ranks takes time but nobody's bandwidth; every rank has balanced expert load.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from dsv3c.comm import CommPlan, Reduction, check, from_json
from dsv3c.costs import Times, crossing
from dsv3c.errors import InputError
from dsv3c.ir import DType, Sequence
from dsv3c.machines import override
from dsv3c.models.config import ModelConfig
from dsv3c.ops import REGISTRY
from dsv3c.paper import CellTimes, Span, shape
from dsv3c.plan import Plan
from dsv3c.schedule import Action, Cell, Schedule, parse_csv
from dsv3c.schedules import TimedCell, Timeline, generate
from dsv3c.schedules import simulate as run_schedule
from dsv3c.stages import PROLOGUE, prologue_of, stage_count, stage_name
from dsv3c.target import Machine
from dsv3c.targets import find

PUBLISHED_HOURS = 180_000.0
"""GPU hours per trillion tokens that the report states for 2048 H800 (section 1)."""

PARTS = ("1F", "1B", "1W", "1F1B", "bubble", "optimizer")

MASTER_BYTES = 20
"""Bytes that updating one number moves: its gradient read, FP32 master and two BF16 moments read and written."""


@dataclass(frozen=True)
class Simulation:
    """What a step takes. `breakdown`: seconds of PARTS on the busiest pipeline rank, in order; they add up to
    `step_seconds`. `comm_hidden_fraction`: the share of the time in which rows go to experts and back during which the
    same rank computes. `cells`: what runs in a cell; see `spans`.
    """

    step_seconds: float
    tokens_per_second_per_gpu: float
    tflops_per_gpu_causal: float
    mfu_bf16_causal: float
    bubble_fraction: float
    comm_hidden_fraction: float
    memory_peak_bytes: int
    gpu_hours_per_trillion_tokens: float
    breakdown: tuple[tuple[str, float], ...]
    machine: Machine
    schedule: Schedule
    timeline: Timeline
    cells: CellTimes

    def as_json(self) -> dict[str, object]:
        """What `dsv3c simulate --json` prints."""
        return {
            "step_seconds": self.step_seconds,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "tflops_per_gpu_causal": self.tflops_per_gpu_causal,
            "mfu_bf16_causal": self.mfu_bf16_causal,
            "bubble_fraction": self.bubble_fraction,
            "comm_hidden_fraction": self.comm_hidden_fraction,
            "memory_peak_bytes": self.memory_peak_bytes,
            "gpu_hours_per_trillion_tokens": self.gpu_hours_per_trillion_tokens,
            "breakdown_seconds": dict(self.breakdown),
        }

    def spans(self, rank: int) -> Iterator[Span]:
        """What runs on a pipeline rank during the step, cell by cell."""
        for timed in self.timeline.cells[rank]:
            cell = "+".join(map(str, timed.cell))
            for s in self.cells.spans(timed.cell):
                yield Span(f"{cell} {s.name}", s.comm, timed.start + s.start, timed.start + s.end)


def simulate(plan: Plan, changes: Iterable[str] = ()) -> Simulation:
    """Run a plan on paper, on its machine with `changes` (see `machines.override`).

    Raises InputError for a change that makes no sense, or a plan whose parts do not fit together.
    """
    job = plan.job
    machine = replace(override(find(plan.target).machine, changes), node=job.ranks_per_node)
    comm = from_json(plan.comm, f"the plan of {plan.model}") if plan.comm else None
    trains = job.kind == "train"
    if trains and job.mesh.world > 1 and (comm is None or not plan.schedule):
        raise InputError(f"the plan of {plan.model} for {job.mesh.world} ranks has no schedule; compile it again")
    sizes = job.sizes | ({"S": 1} if job.kind == "decode" else {})
    times = Times.of(plan.program, REGISTRY, sizes, machine)
    times = replace(times, two_hop=comm.two_hop if comm else False)
    units = (comm.units or None) if comm else None
    cells = CellTimes(_stages(plan), times, comm.overlap if comm else None, units)
    if trains:
        schedule, timeline = _train(plan, cells, comm, machine)
    else:
        schedule = generate("1f1b", 1, 1)
        only = (Action(0, "F", 0),)
        seconds = cells.seconds(only)
        timeline = Timeline(((TimedCell(only, 0.0, seconds),),), seconds, (seconds,))
    optimizer = _optimizer(plan, times, schedule, comm) if trains else 0.0
    step = timeline.makespan + optimizer
    world = job.mesh.world if trains else 1
    tokens = job.global_batch * job.seq if trains else job.micro_batch * sizes["S"]
    rate = tokens / step / world if step else 0.0
    tflops = rate * flops_per_token(plan) / 1e12
    return Simulation(
        step, rate, tflops, tflops * 1e12 / machine.matrix_rate(DType.bf16), timeline.bubble_fraction,
        _hidden(timeline, cells), plan.memory.peak_bytes, 1e12 / rate / 3600 if rate else 0.0,
        _breakdown(timeline, optimizer), machine, schedule, timeline, cells,
    )  # fmt: skip


def flops_per_token(plan: Plan) -> float:
    """Operations for one token by the usual count: 2 for each active parameter of the main model but the embedding,
    and attention's over half of the sequence; in training three times as many, for both gradients."""
    config = ModelConfig.from_dict(plan.config, where=f"the plan of {plan.model}")
    pairs = plan.job.seq / 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    forward = 2 * plan.parameters.active + 2 * config.num_hidden_layers * pairs
    return forward * (3 if plan.job.kind == "train" else 1)


def compared(plan: Plan, s: Simulation) -> str:
    """How far this is from what the report states, where it is the same run; otherwise nothing."""
    if (plan.model, plan.target, plan.job.kind, plan.job.precision) != ("deepseek-v3", "h800", "train", "fp8"):
        return ""
    share = s.gpu_hours_per_trillion_tokens / PUBLISHED_HOURS - 1
    direction = "below" if share < 0 else "above"
    return (
        f"The report states {PUBLISHED_HOURS:,.0f} GPU hours per trillion tokens on 2048 H800; this is "
        f"{abs(share):.0%} {direction} it."
    )


def _stages(plan: Plan) -> tuple[Sequence, ...]:
    """The layers of each stage; a plan that is not divided is one stage."""
    program, kind = plan.program, plan.job.kind
    if count := stage_count(program):
        return tuple(program.sequence(stage_name(s)) for s in range(count))
    return (program.sequence(kind) if program.has_sequence(kind) else program.sequences[0],)


def _train(plan: Plan, cells: CellTimes, comm: CommPlan | None, machine: Machine) -> tuple[Schedule, Timeline]:
    """The plan's schedule, and when everything in it happens; on one rank F and B take turns."""
    job = plan.job
    if comm is None or not plan.schedule:
        schedule, transfer = generate("1f1b", 1, job.global_batch // (job.micro_batch * job.mesh.dp)), 0.0
    else:
        schedule = parse_csv(plan.schedule, comm.schedule, f"the schedule of {plan.model}")
        check(comm, schedule, f"the plan of {plan.model}")
        messages = [sum(n for _, n in way) for c in comm.crossings for way in (c.forward, c.backward)]
        apart = job.mesh.dp >= job.ranks_per_node or job.mesh.world > job.ranks_per_node
        mean = sum(messages) / len(messages) if messages else 0
        transfer = crossing(machine, mean, apart) if messages else 0.0
    return schedule, run_schedule(schedule, cells.durations(transfer))


def _hidden(timeline: Timeline, cells: CellTimes) -> float:
    """The share of all exchanges' time during which their rank computes; 1 if there are none."""
    sent = both = 0.0
    counts: dict[Cell, int] = {}
    for timed in (t for row in timeline.cells for t in row):
        counts[shape(timed.cell)] = counts.get(shape(timed.cell), 0) + 1
    for cell, count in counts.items():
        spans = cells.spans(cell)
        computed = [s for s in spans if not s.comm]
        for s in (s for s in spans if s.comm):
            sent += count * (s.end - s.start)
            both += count * sum(max(0.0, min(s.end, c.end) - max(s.start, c.start)) for c in computed)
    return both / sent if sent else 1.0


def _breakdown(timeline: Timeline, optimizer: float) -> tuple[tuple[str, float], ...]:
    """Seconds of PARTS on the rank that is busiest."""
    rank = max(range(len(timeline.busy)), key=timeline.busy.__getitem__)
    found = dict.fromkeys(PARTS, 0.0)
    for timed in timeline.cells[rank]:
        part = "1F1B" if len(timed.cell) > 1 else {"F": "1F", "I": "1B", "B": "1B", "W": "1W"}[timed.cell[0].kind]
        found[part] += timed.end - timed.start
    found["bubble"] = timeline.makespan - timeline.busy[rank]
    found["optimizer"] = optimizer
    return tuple(found.items())


# ---- between steps ---------------------------------------------------------------------------------------------------


def _optimizer(plan: Plan, times: Times, schedule: Schedule, comm: CommPlan | None) -> float:
    """Seconds from the last gradient to the next step, on the slowest pipeline rank.

    Shards of gradients are exchanged and summed, masters and moments updated, whole weights gathered, put into the
    forms that layers read, and gradients zeroed.
    """
    program, job, m = plan.program, plan.job, times.machine
    bandwidth = m.memory_bandwidth * m.reached("memory")
    worst = 0.0
    for rank in range(schedule.ranks):
        if comm is None:
            mine = [Reduction("all", (0,), False, 1, 4 * _trained(plan))]
            sequence = program.sequence(PROLOGUE) if program.has_sequence(PROLOGUE) else None
        else:
            mine = [r for r in comm.reductions if rank in r.holders]
            sequence = prologue_of(program, schedule.held(rank))
        prologue = sum(times.graph(times.graphs[y.graph]) for y in sequence.layers) if sequence else 0.0
        moved = sum(r.bytes * 2 + r.bytes / r.size / 4 * MASTER_BYTES for r in mine) / bandwidth
        sent = sum(2 * _between_shards(r, job.mesh.dp, m) for r in mine)
        worst = max(worst, prologue + moved + sent)
    return worst


def _trained(plan: Plan) -> int:
    """Numbers that training changes, on one rank."""
    weights = (w for w in plan.program.weights if w.group != "state")
    return sum(w.type.bytes() * 8 // w.type.dtype.bits for w in weights)


def _between_shards(r: Reduction, dp: int, m: Machine) -> float:
    """Seconds to send each member of a group its shard of a buffer; to gather takes as long."""
    if r.size == 1:
        return 0.0
    inside = 1 if r.expert else min(m.node, dp, r.size)
    if inside == r.size or r.size * (1 if not r.expert else dp) <= m.node:
        return r.bytes * (r.size - 1) / r.size / m.fast_link + m.fast_latency
    return r.bytes * (r.size - inside) / r.size / m.slow_link + m.slow_latency


# ---- trace -----------------------------------------------------------------------------------------------------------


def trace(simulation: Simulation) -> str:
    """A Chrome trace of the step: a process for each pipeline rank, a track for each of its streams."""
    events: list[str] = []
    tracks = ("compute", "communication")
    for rank in range(simulation.schedule.ranks):
        events.append(_event(ph="M", name="process_name", pid=rank, args={"name": f"pipeline rank {rank}"}))
        for number, name in enumerate(tracks):
            events.append(_event(ph="M", name="thread_name", pid=rank, tid=number, args={"name": name}))
        for s in simulation.spans(rank):
            if s.end > s.start:
                events.append(_event(ph="X", name=s.name, cat=tracks[s.comm], pid=rank, tid=int(s.comm),
                                     ts=round(s.start * 1e6, 3), dur=round((s.end - s.start) * 1e6, 3)))  # fmt: skip
    return '{"traceEvents":[\n' + ",\n".join(events) + "\n]}\n"


def _event(**fields: object) -> str:
    return json.dumps(fields, separators=(",", ":"))
