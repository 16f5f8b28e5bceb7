"""Whole training steps of deepseek-v3-mini on one Hopper GPU: speed, memory against the plan, where the time goes.

    python -m benchmarks.mini [--run fp8,bf16,compiled] [--steps 12] [--plan FILE] [--model NAME] [--table] [--record]

A step is 4 micro-batches of 4×4096 tokens, the optimizer included. `eager` and `compiled` are the peer: transformers'
model in bfloat16, forward and backward of one such micro-batch, no optimizer. Each contestant runs in a process of its
own, so that what a process holds on the device can be counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import dsv3c
from benchmarks.common import RESULTS, record
from benchmarks.slice import draw_on_gpu
from dsv3c.models.presets import PRESETS
from dsv3c.runtime.session import Session
from dsv3c.runtime.weights import Weights

MODEL, SEQ, MICRO, COUNT = "deepseek-v3-mini", 4096, 4, 4
PEERS = ("eager", "compiled")
NAME = re.compile(r"[a-z][a-z0-9_]*")


def empty_context() -> int:
    """Bytes in use on the device when this process has a CUDA context and nothing else."""
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return used()


def used() -> int:
    """Bytes in use on the device."""
    free, size = torch.cuda.mem_get_info()
    return size - free


def load(model: str, precision: str, plan: str | None) -> Session:
    """A session with weights drawn on the GPU; `plan` is a file, or None to compile here."""
    made = plan or dsv3c.compile(model, target="h100", precision=precision, seq=SEQ, micro_batch=micro(model),
                                 global_batch=COUNT * micro(model))  # fmt: skip
    with mock.patch.object(Weights, "initialize", draw_on_gpu):
        return dsv3c.load(made)


def micro(model: str) -> int:
    """Sequences of one micro-batch."""
    return 1 if "slice" in model else MICRO


def ours(model: str, precision: str, plan: str | None, steps: int, table: bool) -> dict[str, Any]:
    """Seconds of each step, bytes held and predicted, losses."""
    before = empty_context()
    session = load(model, precision, plan)
    job = session.plan.job
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, session.config.vocab_size, (job.global_batch, job.seq), generator=generator)
    marks, losses, norms, most = [time.perf_counter()], [], [], 0
    for _ in range(steps + 3):
        done = session.step(tokens, lr=1e-5)
        marks.append(time.perf_counter())
        losses.append(done.loss)
        norms.append(done.grad_norm)
        most = max(most, used())
    times = [b - a for a, b in itertools.pairwise(marks[3:])]  # a step returns when its losses are known
    memory = session.plan.memory
    result: dict[str, Any] = {
        "seconds": statistics.median(times), "fastest": min(times), "slowest": max(times), "tokens": tokens.numel(),
        "held": most - before, "predicted": memory.peak_bytes, "by_kind": dict(memory.by_kind),
        "allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.memory_reserved(), "context": before,
        "losses": losses, "norms": norms,
    }  # fmt: skip
    kernels = profile(session, tokens)
    whole = sum(t for t, _ in kernels.values())
    result["generated"] = sum(t for name, (t, _) in kernels.items() if generated(name)) / whole if whole else None
    if table:
        result["kernels"] = sorted(([n, t, c] for n, (t, c) in kernels.items()), key=lambda k: -k[1])
        runner = session._runner("train", job.micro_batch, job.seq)
        runner.profile()
        result["nodes"] = sorted(([*k, t] for k, t in runner.profile().items()), key=lambda k: -k[2])
    return result


def profile(session: Session, tokens: torch.Tensor) -> dict[str, tuple[float, int]]:
    """Seconds and launches by kernel of one step."""
    spent: dict[str, tuple[float, int]] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        session.step(tokens, lr=1e-5)
        torch.cuda.synchronize()
    for event in found.events() or ():
        if str(event.device_type).endswith("CUDA"):
            before, count = spent.get(event.name, (0.0, 0))
            spent[event.name] = before + event.device_time_total / 1e6, count + 1
    return spent


def generated(kernel: str) -> bool:
    """Whether a kernel is ours: libraries' and torch's names are C++, or begin with the library's."""
    library = kernel.startswith(("nvjet", "cutlass", "cudnn", "sm90", "sm80", "cublas"))
    return NAME.fullmatch(kernel) is not None and not library


def peer(kind: str, steps: int) -> dict[str, Any]:
    """Seconds of forward and backward of one micro-batch of transformers' model in bfloat16."""
    import transformers

    before = empty_context()
    torch.set_default_dtype(torch.bfloat16)
    settings: dict[str, Any] = {**PRESETS[MODEL].to_hf_dict(), "pad_token_id": None}
    config: Any = transformers.DeepseekV3Config(**settings)
    kind_of: Any = transformers.DeepseekV3ForCausalLM
    with torch.device("cuda"):
        model = kind_of(config).train()
    torch.set_default_dtype(torch.float32)
    tokens = torch.randint(0, config.vocab_size, (MICRO, SEQ), generator=torch.Generator().manual_seed(0)).cuda()
    run: Callable[..., Any] = torch.compile(model) if kind == "compiled" else model

    def once() -> None:
        torch.autograd.backward(run(input_ids=tokens, labels=tokens, use_cache=False).loss)

    times = []
    for _ in range(steps + 3):
        begin = time.perf_counter()
        once()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        model.zero_grad(set_to_none=False)
    return {"seconds": statistics.median(times[3:]), "tokens": tokens.numel(), "held": used() - before}


def show(name: str, made: dict[str, Any]) -> None:
    """What one contestant did, in lines."""
    print(f"{name}: {made['tokens'] / made['seconds']:,.0f} tokens/s, {made['seconds'] * 1e3:.1f} ms; "
          f"holds {made['held'] / 2**30:.2f} GiB above an empty context", flush=True)  # fmt: skip
    if "predicted" not in made:
        return
    gap = made["held"] / made["predicted"] - 1
    kinds = ", ".join(f"{k} {v / 2**30:.2f}" for k, v in made["by_kind"].items())
    print(f"  {made['fastest'] * 1e3:.1f} to {made['slowest'] * 1e3:.1f} ms; predicted {made['predicted'] / 2**30:.2f} "
          f"GiB ({kinds}), {gap:+.1%}; torch reserved {made['reserved'] / 2**30:.2f}, allocated at most "
          f"{made['allocated'] / 2**30:.2f}, context {made['context'] / 2**30:.2f}")  # fmt: skip
    print(f"  share of generated kernels {made['generated'] or 0:.1%}; losses {[round(x, 4) for x in made['losses']]}, "
          f"norms {[round(x, 4) for x in made['norms']]}")  # fmt: skip
    for title, rows in (("kernel, launches", made.get("kernels", ())), ("node", made.get("nodes", ()))):
        total = sum(r[2] if title == "node" else r[1] for r in rows)
        for row in rows[:48]:
            spent, label = (row[2], f"{row[0]} {row[1]}") if title == "node" else (row[1], f"{row[0][:90]} ×{row[2]}")
            print(f"    {spent * 1e3:9.3f} ms {spent / total:6.1%}  {label}")
        if rows:
            print(f"    {total * 1e3:9.3f} ms in all, by {title}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="fp8,bf16,compiled", help="fp8, bf16, eager, compiled (default all but eager)")
    parser.add_argument("--model", default=MODEL, help=f"default {MODEL}")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--plan", help="a plan compiled elsewhere; {} stands for the precision")
    parser.add_argument("--table", action="store_true", help="time by kernel and by node")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # run this contestant here and print what it did as JSON
    given = parser.parse_args()
    if given.one:
        plan = given.plan and given.plan.format(given.one)
        made = peer(given.one, given.steps) if given.one in PEERS else ours(
            given.model, given.one, plan, given.steps, given.table)  # fmt: skip
        print(json.dumps(made))
        return
    found: dict[str, dict[str, Any]] = {}
    for name in given.run.split(","):
        done = subprocess.run([sys.executable, "-m", "benchmarks.mini", *sys.argv[1:], "--one", name], check=False,
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
        if done.returncode:
            print(f"{name}: failed with status {done.returncode}", flush=True)
            continue
        found[name] = json.loads(done.stdout.splitlines()[-1])
        show(name, found[name])
    if given.record:
        write(given.model.removeprefix("deepseek-v3-"), found, given.results)


def write(model: str, found: dict[str, dict[str, Any]], path: Path) -> None:
    """Append the figures to `path`."""
    rates = {n: m["tokens"] / m["seconds"] for n, m in found.items()}
    rival = next((n for n in ("compiled", "eager") if n in rates), None)
    for name, made in found.items():
        if name in PEERS:
            label = f"{model}/transformers {name} bf16, forward + backward"
            record(label, rates[name], "tokens/s", load=0.0, path=path)
            continue
        other = None if rival is None else f"transformers {rival} bf16, no optimizer"
        ratio = None if rival is None else rates[name] / rates[rival]
        record(f"{model}/{name}/training step", rates[name], "tokens/s", ratio=ratio, peer=other, load=0.0, path=path)
        if made["generated"] is not None:
            record(f"{model}/{name}/share of generated kernels", 100 * made["generated"], "%", load=0.0, path=path)
        record(f"{model}/{name}/memory held", made["held"] / 2**30, "GiB", ratio=made["held"] / made["predicted"],
               peer="predicted by the plan", load=0.0, path=path)  # fmt: skip


if __name__ == "__main__":
    main()
