"""The compiler in one place: model config → IR → passes → target code → plan → session."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dsv3c import pipeline
from dsv3c.arena import BufferPlan, Slot
from dsv3c.capacity import capacity
from dsv3c.comm import to_json
from dsv3c.errors import InputError, did_you_mean
from dsv3c.ir import DType, Program, Type
from dsv3c.job import JOBS, PRECISIONS, Job, Recipe, parse_mesh
from dsv3c.models import ModelConfig, resolve
from dsv3c.models.config import parameter_count
from dsv3c.ops import REGISTRY
from dsv3c.plan import MEMORY_KINDS, Json, Memory, Parameters, Plan, StoredWeight, load_plan
from dsv3c.schedule import show_csv
from dsv3c.selection import select
from dsv3c.settle import Settler
from dsv3c.stages import stage_count, stage_name
from dsv3c.state import Note, PassReport, State
from dsv3c.target import Kernel, Target
from dsv3c.targets import find
from dsv3c.targets.nccl import plan_communication

if TYPE_CHECKING:
    from dsv3c.runtime.session import Session

PathLike = str | os.PathLike[str]

TRAIN_PASSES = "eliminate,share,hoist,recompute,fuse,eliminate,cut,plan_buffers"
RANKS_PASSES = (
    "shard,eliminate,share,hoist,recompute,fuse,eliminate,cut{early=true},dualpipe,partition,overlap,plan_buffers"
)
SERVE_PASSES = "eliminate,share,hoist,fuse,eliminate,plan_buffers"


def compile(model: str | PathLike | ModelConfig, *, job: str = "train", target: str = "cpu", mesh: str = "",
            ranks_per_node: int = 8, seq: int | None = None, micro_batch: int = 1, global_batch: int | None = None,
            precision: str | None = None, schedule: str = "auto", expert_headroom: float = 1.5,
            kernels: str = "binary", implementations: str = "auto", passes: str | None = None,
            print_after: str | None = None, dump: PathLike | None = None, stop_after: str | None = None,
            keep_ir: bool = False, allow_oversize: bool = False, document_end: int | None = None,
            recipe: Recipe | None = None,
            on_pass: Callable[[PassReport, tuple[Note, ...]], None] | None = None) -> Plan:  # fmt: skip
    """Compile a model into a plan; keywords are the flags of `dsv3c compile` with underscores.

    `model`: a preset, a path to a config.json or a folder with one, or a ModelConfig. Raises InputError for
    anything that does not fit together.
    """
    name, family, config = resolve(model)
    machine = find(target)
    task = make_job(
        config, machine, kind=job, mesh=mesh, ranks_per_node=ranks_per_node, seq=seq, micro_batch=micro_batch,
        global_batch=global_batch, precision=precision, schedule=schedule, expert_headroom=expert_headroom,
        kernels=kernels, implementations=implementations, allow_oversize=allow_oversize,
        document_end=document_end, recipe=recipe,
    )  # fmt: skip
    program = family.build(config, task, machine.expert_alignment(task.dtype))
    steps = pipeline.parse(passes if passes is not None else default_passes(task))
    outcome = pipeline.run(
        State(program, REGISTRY, task, machine), steps, dump=Path(dump) if dump else None, print_after=print_after,
        stop_after=stop_after, on_pass=on_pass, keep_steps=keep_ir, settle=Settler(),
    )  # fmt: skip
    made, missing = generate_kernels(outcome.state.program, machine, task)
    selection = select(outcome.state.program, machine, task)
    if machine.selector is not None:
        made = (*made, *machine.selector.kernels(selection.choices, task.kernels))
    return Plan.of(
        outcome.state.program, model=name, config=config.to_hf_dict(), parameters=_parameters(config), job=task,
        pipeline=pipeline.show(outcome.passes), notes=(*outcome.notes, *selection.notes),
        reports=outcome.reports, weights=_stored(outcome.state.program),
        memory=_memory(outcome.state.buffers, machine), kernels=tuple(sorted(made, key=lambda k: k.id)),
        missing_kernels=missing, buffers=_buffers(outcome.state.buffers), steps=outcome.steps,
        choices=selection.choices, measured=selection.measured, schedule=_schedule(outcome.state),
        comm=_communication(outcome.state),
    )  # fmt: skip


def default_passes(job: Job) -> str:
    """The pipeline of a job as text."""
    quantize = "quantize," if job.precision == "fp8" else ""
    if job.kind != "train":
        return f"{quantize}{SERVE_PASSES}"
    return f"differentiate,{quantize}{TRAIN_PASSES if job.mesh.world == 1 else RANKS_PASSES}"


def load(plan: Plan | PathLike, weights: PathLike | None = None, seed: int = 0) -> Session:
    """A session that executes a plan (or the file that holds it). `weights`: a Hugging Face directory, or None to draw
    them from `seed`.

    For a plan for many ranks this process must be one of those that torchrun started. It gets a
    `dsv3c.runtime.ranks.RankSession`: all ranks call `step`, `save_hf` and at the end `close` together.
    """
    found = plan if isinstance(plan, Plan) else load_plan(plan)
    directory = os.fspath(weights) if weights else None
    if found.job.mesh.world > 1:
        from dsv3c.runtime.ranks import RankSession, connect

        return cast("Session", RankSession(found, connect(found), directory, seed))
    from dsv3c.runtime.session import Session

    return Session(found, directory, seed)


def make_job(config: ModelConfig, target: Target, *, kind: str, mesh: str, ranks_per_node: int, seq: int | None,
             micro_batch: int, global_batch: int | None, precision: str | None, schedule: str,
             expert_headroom: float, kernels: str, implementations: str, allow_oversize: bool, document_end: int | None,
             recipe: Recipe | None) -> Job:  # fmt: skip
    """The job that the flags describe, with the defaults filled in.

    Raises InputError for a value that is out of range or does not fit the model or the target.
    """
    _choice("--job", kind, JOBS)
    _choice("--kernels", kernels, ("none", "source", "binary"))
    _choice("--implementations", implementations, ("auto", "generated", "library"))
    _choice("--schedule", schedule, ("auto", "dualpipe", "dualpipev", "zb1p", "1f1b"))
    chosen = precision or target.precision
    _choice("--precision", chosen, PRECISIONS)
    if chosen == "fp64" and target.device != "cpu":
        raise InputError(f"--precision fp64 runs on --target cpu only, not on {target.name}")
    if chosen == "fp8" and DType.e4m3 not in dict(target.machine.matrix_flops):
        raise InputError(f"--precision fp8 needs FP8 tensor cores, which {target.name} lacks; take bf16, fp32 or fp64")
    axes = parse_mesh(mesh)
    if axes.tp > 1 and kind == "train":
        raise InputError(f"--mesh {mesh}: training has no tensor parallelism; leave out tp={axes.tp}")
    if axes.world > 1 and kind != "train":
        raise InputError(f"--mesh {mesh}: only training runs on several ranks; leave out --mesh for --job {kind}")
    length = min(4096, config.max_position_embeddings) if seq is None else seq
    batch = micro_batch * axes.dp if global_batch is None else global_batch
    for flag, value in (
        ("--seq", length),
        ("--micro-batch", micro_batch),
        ("--global-batch", batch),
        ("--ranks-per-node", ranks_per_node),
    ):
        if value < 1:
            raise InputError(f"{flag} {value} must be at least 1")
    if kind == "train" and length < 2:
        raise InputError(f"--seq {length}: the loss needs at least 2 tokens")
    if length > config.max_position_embeddings:
        raise InputError(
            f"--seq {length} exceeds the model's {config.max_position_embeddings} positions (max_position_embeddings)"
        )
    if batch % (micro_batch * axes.dp):
        raise InputError(
            f"--global-batch {batch} is not a multiple of micro-batch × dp = {micro_batch * axes.dp} sequences"
        )
    if document_end is not None and not 0 <= document_end < config.vocab_size:
        raise InputError(f"--document-end {document_end} is not a token of the model's {config.vocab_size}")
    if not 1 <= expert_headroom < float("inf"):
        raise InputError(f"--expert-headroom {expert_headroom} must be at least 1, the balanced load")
    return Job(kind, target.name, chosen, length, micro_batch, batch, axes, ranks_per_node, schedule, expert_headroom,
               kernels, implementations, allow_oversize, document_end, recipe or Recipe())  # fmt: skip


def generate_kernels(program: Program, target: Target, job: Job) -> tuple[tuple[Kernel, ...], tuple[str, ...]]:
    """Code for every region that a graph calls, and the names of those that the target has no generator for."""
    called = dict.fromkeys(str(n.attr("graph")) for g in program.graphs for n in g.nodes if n.op == "call")
    sizes = job.sizes | capacity(program, job.sizes)
    made: list[Kernel] = []
    missing: list[str] = []
    for name in called:
        kernel = None if job.kernels == "none" else target.generate(program.graph(name), sizes, job.kernels)
        if kernel is None:
            missing.append(name)
        else:
            made.append(kernel)
    return tuple(sorted(made, key=lambda k: k.id)), tuple(missing)


def _choice(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{flag} {value} is unknown; {did_you_mean(value, known)}")


def _parameters(config: ModelConfig) -> Parameters:
    counts = parameter_count(config)
    return Parameters(counts.total, counts.active_without_embedding, counts.mtp_own)


def _stored(program: Program) -> tuple[StoredWeight, ...]:
    """The checkpoint's tensors: shapes are whole, `shard` says among how many ranks the leading axis divides."""
    return tuple(
        StoredWeight(w.name, str(w.type.dtype), Type(w.type.dtype, w.shape).bound({}),
                     "whole" if w.parts == 1 else f"experts/{w.parts}")
        for w in program.weights
    )  # fmt: skip


def _schedule(state: State) -> str:
    return show_csv(state.schedule) if state.schedule else ""


def _communication(state: State) -> dict[str, Json]:
    """The contents of comm.json; empty for one rank."""
    if state.schedule is None or state.job is None or state.machine is None or not stage_count(state.program):
        return {}
    made = plan_communication(state.program, state.registry, state.schedule, state.job, state.machine, state.overlap)
    return to_json(made)


def _memory(buffers: BufferPlan | None, target: Target) -> Memory:
    if buffers is None:
        return Memory(0, tuple((k, 0) for k in MEMORY_KINDS), (), target.machine.memory_bytes)
    kinds = tuple((k, int(getattr(buffers.peak, k))) for k in MEMORY_KINDS)
    return Memory(
        buffers.peak.peak, kinds, tuple(r.peak for r in buffers.ranks), target.machine.memory_bytes,
        max((r.peak for r in buffers.with_headroom), default=buffers.peak.peak),
    )  # fmt: skip


def _buffers(buffers: BufferPlan | None) -> dict[str, Json]:
    if buffers is None:
        return {}
    made: dict[str, Json] = {}
    graphs: dict[str, Json] = {}
    for s in buffers.sequences:
        for name, layout in s.graphs.items():
            graphs[name] = {"peak": layout.peak, "slots": _slots(layout.slots)}
        made.setdefault(s.sequence, {"peak": s.peak, "workspace": s.workspace, "slots": _slots(s.slots)})
    for stage, chunk in enumerate(buffers.stages):
        entry = made[stage_name(stage)]
        assert isinstance(entry, dict)
        spaces: dict[str, Json] = {p.value: n for p, n in chunk.workspace.items()}
        entry |= {"held": chunk.held, "late": list(chunk.late), "workspace": spaces}
    made["graphs"] = graphs
    made["ranks"] = [
        {**{k: int(getattr(r, k)) for k in MEMORY_KINDS}, "peak_bytes": r.peak, "with_headroom_bytes": more}
        for r, more in itertools.zip_longest(buffers.ranks, (h.peak for h in buffers.with_headroom))
    ]
    made["arenas"] = [
        {"bytes": a.bytes,
         "chunks": [[stage, micro_batch, place.held, *place.late] for (stage, micro_batch), place in a.places.items()]}
        for a in buffers.arenas
    ]  # fmt: skip
    return made


def _slots(slots: tuple[Slot, ...]) -> list[Json]:
    return [[x.name, x.offset, x.size, x.start, x.end] for x in slots]


def override_recipe(recipe: Recipe, **changes: float) -> Recipe:
    """A recipe with some fields replaced. Raises InputError for an unknown one."""
    known = {f.name for f in fields(Recipe)}
    for name in changes:
        if name not in known:
            raise InputError(f"unknown recipe field '{name}'; {did_you_mean(name, known)}")
    return replace(recipe, **changes)


__all__ = ["compile", "generate_kernels", "load", "make_job", "override_recipe"]
