"""What each command of `dsv3c` does: a thin call, then the result in words or as JSON.

Heavy libraries are imported where they are needed, so that looking at a plan does not load torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3c.console import number, size, table, tell, write_json
from dsv3c.errors import InputError
from dsv3c.files import read_text, write_text
from dsv3c.report_commands import report as report
from dsv3c.report_commands import simulate as simulate
from dsv3c.schedule_commands import schedule as schedule

if TYPE_CHECKING:
    from dsv3c.job import Mesh
    from dsv3c.plan import Memory, Plan
    from dsv3c.runtime.session import Session
    from dsv3c.state import Note, PassReport
    from dsv3c.target import Target

COMPILE_FLAGS = (
    "job", "target", "mesh", "ranks_per_node", "seq", "micro_batch", "global_batch", "precision", "schedule",
    "expert_headroom", "kernels", "implementations", "passes", "print_after", "dump", "stop_after",
    "document_end",
)  # fmt: skip


def compile(a: argparse.Namespace) -> int:
    """`dsv3c compile`: one line per pass while it works, then what the plan holds."""
    from dsv3c import driver
    from dsv3c.plan import summary

    given = {name: getattr(a, name) for name in COMPILE_FLAGS if getattr(a, name) is not None}
    # With --json the result is all that standard output gets; what --print-after prints then goes beside it.
    with contextlib.redirect_stdout(sys.stderr if a.json else sys.stdout):
        plan = driver.compile(a.model, **given, keep_ir=a.keep_ir, allow_oversize=a.allow_oversize, on_pass=_tell_pass)
    path = a.out or f"{plan.model}.plan"
    if a.stop_after is not None:
        tell(f"stopped after {a.stop_after}: no plan is written")
        if a.dump is None and a.print_after is None and not a.json:
            print(plan.ir, end="")
    else:
        plan.save(path)
        if not a.json:
            print(_overview(plan, SHOWN_KERNELS))
            tell(f"wrote {path} ({size(Path(path).stat().st_size)})")
    if a.json:
        write_json({**summary(plan), "file": None if a.stop_after is not None else str(path)})
    return 0


def _tell_pass(report: PassReport, notes: tuple[Note, ...]) -> None:
    tell(str(report))


def opt(a: argparse.Namespace) -> int:
    """`dsv3c opt`: the program after the passes to standard output, their notes to standard error."""
    from dsv3c import pipeline
    from dsv3c.ops import REGISTRY
    from dsv3c.text import show_program

    passes = pipeline.parse(a.passes)
    text = _standard_input() if a.file == "-" else read_text(a.file, "a program's text")
    target = None if a.target is None else _target(a.target)
    state = pipeline.text_state(
        text, REGISTRY, file=a.file, target=target, precision=a.precision, sizes=pipeline.parse_sizes(a.sizes or "")
    )
    outcome = pipeline.run(
        state, passes, dump=None if a.dump is None else Path(a.dump), print_after=a.print_after,
        stop_after=a.stop_after, out=tell,
    )  # fmt: skip
    result = show_program(outcome.state.program)
    for note in outcome.notes:
        tell(str(note))
    if a.out is not None:
        write_text(a.out, result)
    if a.json:
        notes = [{"pass": n.pass_name, "action": n.action, "node": n.node, "reason": n.reason} for n in outcome.notes]
        write_json({"passes": [r.name for r in outcome.reports], "notes": notes, "ir": result})
    elif a.out is None:
        print(result, end="")
    return 0


def _standard_input() -> str:
    if sys.stdin is None:
        raise InputError("-: standard input is closed; give the path of a program's text")
    try:
        text = sys.stdin.read()
        text.encode()  # some locales read what is not UTF-8 as lone surrogates
    except UnicodeError:
        raise InputError("-: standard input is not text; give a program's text") from None
    return text


def inspect(a: argparse.Namespace) -> int:
    """`dsv3c inspect`: what a plan holds."""
    from dsv3c.comm import division
    from dsv3c.plan import load_plan, summary
    from dsv3c.stages import stage_count

    plan = load_plan(a.plan)
    if stage_count(plan.program):
        division(plan)
    if a.json:
        write_json(summary(plan))
    elif a.ir:
        print(plan.ir, end="")
    else:
        print(_overview(plan))
        print(_notes(plan, a.notes))
    return 0


def diff(a: argparse.Namespace) -> int:
    """`dsv3c diff`: what differs between two plans."""
    from dsv3c.plan import load_plan
    from dsv3c.plandiff import as_json
    from dsv3c.plandiff import diff as differences

    found = differences(load_plan(a.first), load_plan(a.second))
    if a.json:
        write_json(as_json(found))
    else:
        print("\n".join(map(str, found)) if found else "the plans are equal")
    return 0


def list(a: argparse.Namespace) -> int:
    """`dsv3c list`: names with one line about each."""
    kinds = {"ops": _ops, "passes": _passes, "targets": _targets, "models": _models, "schedules": _schedules}
    rows = kinds[a.what]()
    if a.json:
        write_json(rows)
    else:
        print(table([(str(row["name"]), str(row["doc"])) for row in rows]))
        for row in rows:
            if options := row.get("options"):
                print(f"\n{row['name']}: {', '.join(f'{k}={v}' for k, v in dict(options).items())}")  # type: ignore[call-overload]
    return 0


Rows = tuple[dict[str, object], ...]


def _ops() -> Rows:
    from dsv3c.ops import REGISTRY

    return tuple({"name": o.name, "doc": o.doc, "effect": o.effect.value, "row_wise": o.rows is not None}
                 for o in REGISTRY)  # fmt: skip


def _passes() -> Rows:
    from dsv3c.passes import PASSES

    rows: Rows = ()
    for name, kind in sorted(PASSES.items()):
        options = {f.name: f.default for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
        rows += ({"name": name, "doc": kind.help(), "options": options},)
    return rows


def _targets() -> Rows:
    from dsv3c.targets import TARGETS

    return tuple(
        {
            "name": name,
            "doc": t.doc,
            "machine": t.machine.name,
            "precision": t.precision,
            "memory_bytes": t.machine.memory_bytes,
            "runs_here": t.device is not None,
        }
        for name, t in sorted(TARGETS.items())
    )


def _models() -> Rows:
    from dsv3c.models import MODELS
    from dsv3c.models.config import parameter_count

    rows: Rows = ()
    for model in MODELS.values():
        for name, config in model.presets.items():
            counts = parameter_count(config)
            doc = f"{number(counts.total)} parameters, {config.num_hidden_layers} layers of {config.hidden_size}"
            rows += ({"name": name, "doc": doc, "family": model.name, "params_total": counts.total},)
    return rows


def _schedules() -> Rows:
    from dsv3c.schedules import KINDS

    return tuple({"name": k.name, "doc": k.doc, "auto": k.auto} for _, k in sorted(KINDS.items()))


def train(a: argparse.Namespace) -> int:
    """`dsv3c train`: the loop tells its own progress; the result is its last line."""
    from dsv3c.plan import load_plan
    from dsv3c.runtime.train import train as run

    result = run(
        load_plan(a.plan), a.data, steps=a.steps, out=a.out, init=a.init, resume=a.resume, seed=a.seed,
        save_every=a.save_every, lr=a.lr, tokenizer=a.tokenizer, trace=a.trace,
    )  # fmt: skip
    if result.rank == 0:
        if a.json:
            write_json(dataclasses.asdict(result))
        else:
            print(result)
    return 130 if result.interrupted else 0


def generate(a: argparse.Namespace) -> int:
    """`dsv3c generate`: the continuation as it comes."""
    if a.top_p <= 0 or a.top_p > 1:
        raise InputError(f"--top-p {a.top_p}: must be above 0 and at most 1")
    from dsv3c.runtime.generate import generate_text

    session = _session(a)
    weights = a.weights or (a.source if Path(a.source).is_dir() else None)
    result = generate_text(
        session, a.tokens if a.prompt is None else a.prompt, max_new_tokens=a.max_new_tokens,
        temperature=a.temperature, top_p=a.top_p, stop=a.stop, seed=a.seed,
        tokenizer=a.tokenizer or weights, on_text=None if a.json else _stream,
    )  # fmt: skip
    if a.json:
        write_json(dataclasses.asdict(result))
    else:
        print()
    return 0


def _stream(piece: str) -> None:
    print(piece, end="", flush=True)


def _session(a: argparse.Namespace) -> Session:
    from dsv3c import driver

    if Path(a.source).is_dir():
        if a.weights is not None:
            raise InputError(f"--weights {a.weights}: {a.source} is a checkpoint itself; leave --weights out")
        return driver.load(driver.compile(a.source, job="decode"), weights=a.source)
    session = driver.load(a.source, weights=a.weights, seed=a.seed)
    if a.weights is None:
        tell("no --weights: the model is random")
    return session


def verify(a: argparse.Namespace) -> int:
    """`dsv3c verify`: a certificate; exit status 1 if anything differs."""
    if a.length < 2:
        raise InputError("--length 1: the loss needs at least 2 tokens")
    from dsv3c import driver
    from dsv3c.runtime import parity, reference
    from dsv3c.runtime.hf import checkpoint_config

    config = checkpoint_config(a.directory)
    if a.length > config.max_position_embeddings:
        raise InputError(f"--length {a.length} exceeds the model's {config.max_position_embeddings} positions")
    tokens = reference.sample_tokens(config.vocab_size, a.sequences, a.length, a.seed)
    plan = driver.compile(
        config, job="train", target="cpu", precision=a.precision, seq=a.length, micro_batch=a.sequences
    )
    session = driver.load(plan, weights=a.directory)  # first, since it names all that is wrong with a checkpoint
    certificate = parity.compare(session, parity.reference_run(a.directory, tokens, a.precision))
    print(certificate.to_json() if a.json else certificate.render())
    return 0 if certificate.passed else 1


def tune(a: argparse.Namespace) -> int:
    """`dsv3c tune`: a bar while it measures, then where the result lies."""
    from dsv3c.tune import tune as run

    result = run(
        a.sources, target=a.target, precision=a.precision, seq=a.seq, micro_batch=a.micro_batch, rounds=a.rounds
    )
    if a.json:
        write_json(dataclasses.asdict(result))
    else:
        print(f"measured {result.products} products in {result.seconds} s: {result.path}")
    return 0


def export(a: argparse.Namespace) -> int:
    """`dsv3c export`: a trained model for other programs."""
    from dsv3c.runtime.export import export as run

    path = run(a.directory, format=a.format, out=a.out)
    if a.json:
        write_json({"format": a.format, "directory": str(path)})
    else:
        print(f"wrote {path}")
    return 0


def _target(name: str) -> Target:
    from dsv3c.targets import find

    return find(name)


SHOWN_KERNELS = 5
"""How many missing kernels `dsv3c compile` names; `dsv3c inspect` names all."""


def _overview(plan: Plan, shown: int | None = None) -> str:
    """A plan on one screen; `shown`: how many missing kernels are named, None for all."""
    job, memory = plan.job, plan.memory
    batch = f"{job.global_batch} x {job.seq} tokens a step, micro-batches of {job.micro_batch}"
    facts = [
        ("model", plan.model),
        ("job", f"{job.kind} on {plan.target}, {job.precision}, {batch}"),
        ("mesh", _mesh(job.mesh)),
        ("parameters", number(plan.parameters.total)),
        ("  active", number(plan.parameters.active)),
        ("  mtp", number(plan.parameters.mtp)),
        ("memory", _peak(memory)),
        *((f"  {kind}", size(count)) for kind, count in memory.by_kind),
        *_uneven(memory, job.expert_headroom),
    ]
    built = [k for k in plan.kernels if k.has_binary]
    facts.append(("kernels", f"{len(built)} with binary, {len(plan.kernels) - len(built)} as source only"))
    if plan.missing_kernels and job.kernels == "none":
        facts.append(("  missing", f"all {len(plan.missing_kernels)}, as --kernels none asks"))
    elif plan.missing_kernels:
        facts.append(("  missing", f"{len(plan.missing_kernels)}: the target has no generator for"))
        facts += [("", name) for name in plan.missing_kernels[:shown]]
        if shown is not None and (more := len(plan.missing_kernels) - shown) > 0:
            facts.append(("", f"and {more} more, see 'dsv3c inspect'"))
    return table(facts)


def _mesh(mesh: Mesh) -> str:
    if mesh.world == 1:
        return "1 rank"
    return f"{mesh} ({mesh.world} ranks)"


def _peak(memory: Memory) -> str:
    if not memory.limit_bytes:
        return f"{size(memory.peak_bytes)} on the largest rank"
    verdict = "" if memory.fits else ": DOES NOT FIT"
    return f"{size(memory.peak_bytes)} on the largest rank, which has {size(memory.limit_bytes)}{verdict}"


def _uneven(memory: Memory, headroom: float) -> tuple[tuple[str, str], ...]:
    """The memory with buffers for uneven experts, where experts are divided among ranks."""
    if memory.with_headroom_bytes <= memory.peak_bytes:
        return ()
    held = f"{size(memory.with_headroom_bytes)} with buffers for {headroom:g} times the balanced load of experts"
    if memory.limit_bytes and memory.with_headroom_bytes > memory.limit_bytes:
        held += ", MORE THAN THERE IS: run it with a smaller --expert-headroom or more ranks"
    return (("  uneven", held),)


def _notes(plan: Plan, every: bool) -> str:
    """The passes in order with what they did: counts of their notes, or each of them."""
    lines = ["", "passes"]
    told: Mapping[tuple[str, str], int] = Counter((n.pass_name, n.action) for n in plan.notes)
    shown: set[str] = set()
    for r in plan.reports:
        changed = f"{r.nodes_before} -> {r.nodes_after} nodes"
        actions = ", ".join(f"{count} {action}" for (name, action), count in told.items() if name == r.name)
        lines.append(table([(r.name.ljust(14), changed.ljust(24), "" if r.name in shown else actions)], indent=2))
        if every and r.name not in shown:
            mine = [(n.action, n.node, n.reason) for n in plan.notes if n.pass_name == r.name]
            lines += [table(mine, indent=6)] if mine else []
        shown.add(r.name)
    lines += ["", *_implementations(plan, every)]
    return "\n".join(lines)


def _implementations(plan: Plan, every: bool) -> tuple[str, ...]:
    """How matrix products are executed: counts, or the note of each."""
    from dsv3c.selection import STAGE

    notes = [n for n in plan.notes if n.pass_name == STAGE]
    if not notes:
        return ()
    counts = Counter(c.implementation for c in plan.choices)
    head = "matrix products" + (f", by {plan.measured}" if plan.measured else "")
    counted = table([(name, str(count)) for name, count in sorted(counts.items())], indent=2)
    told = table([(n.action, n.node, n.reason) for n in notes], indent=6) if every or not counts else ""
    return tuple(filter(None, (head, counted, told)))
