"""Two GPUs against one: the same work on each, how much of the exchange of rows is hidden, and what a pair takes.

    torchrun --nproc-per-node 2 -m benchmarks.two_gpus --one ONE.plan --plans EP2.plan,PP2.plan
             [--check TINY_ONE.plan:TINY_TWO.plan,...] [--rounds 4] [--trace PREFIX] [--record]

`ONE.plan` is for one GPU and the same micro-batches as each of the two gets. `--check` trains both plans of a pair
for some steps from the same weights and compares their losses. Rank 0 measures one GPU while rank 1 waits.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist

import dsv3c
from benchmarks.common import record
from benchmarks.slice import draw_on_gpu
from dsv3c.plan import Plan, load_plan
from dsv3c.runtime.lanes import COMMUNICATION, COMPUTE, Span, write_trace
from dsv3c.runtime.rank_weights import RankWeights
from dsv3c.runtime.ranks import RankSession, connect
from dsv3c.runtime.weights import Weights
from dsv3c.runtime.world import World

STEPS = 3


def draw_shards(weights: RankWeights, seed: int, parts: object) -> None:
    """Weights of the right distribution, drawn where they lie."""
    for group in weights.groups.values():
        group.master.fill_(1.0) if group.name == "norm" else group.master.normal_(0.0, 0.006)


def tokens_of(plan: Plan, device: str | torch.device, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = plan.config["vocab_size"]
    assert isinstance(vocabulary, int)
    return torch.randint(vocabulary, (plan.job.global_batch, plan.job.seq), generator=generator).to(device)


def wait() -> None:
    torch.cuda.synchronize()
    dist.barrier()


def seconds(run: Callable[[], object], rounds: int, together: Callable[[], None]) -> float:
    """The median of `rounds` runs after one more."""
    times = []
    for turn in range(rounds + 1):
        together()
        start = time.perf_counter()
        run()
        together()
        if turn:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """When any of the spans is under way."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((s.start, s.end) for s in spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def covered(spans: Iterable[tuple[float, float]], by: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(end, e) - max(start, s)) for start, end in spans for s, e in by)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def check(world: World, one: str, two: str) -> None:
    """Losses of some steps on one GPU and on two, from the same weights."""
    found = []
    if world.rank == 0:
        alone = dsv3c.load(one, seed=5)
        plan = load_plan(one)
        found = [alone.step(tokens_of(plan, "cpu", s), 1e-3).loss for s in range(STEPS)]
        del alone
        free()
    wait()
    plan = load_plan(two)
    session = RankSession(plan, replace(world, mesh=plan.job.mesh), seed=5)
    close = True
    both = [session.step(tokens_of(plan, "cpu", s), 1e-3) for s in range(STEPS)]
    if world.rank == 0:
        for step, (a, b) in enumerate(zip(found, both, strict=True), 1):
            print(f"check {two}: step {step}: one GPU {a:.6f}, two GPUs {b.loss:.6f}, {abs(a - b.loss) / a:.1e} apart, "
                  f"norm {b.grad_norm:.4f}", flush=True)  # fmt: skip
            close = close and abs(a - b.loss) < 5e-3 * a
    wait()
    if not close:
        print(f"check {two}: NOT the losses of one GPU", flush=True)


def made(plan: Plan, world: World) -> RankSession:
    with mock.patch.object(RankWeights, "initialize", draw_shards):
        return RankSession(plan, replace(world, mesh=plan.job.mesh))


def measure(world: World, path: str, rounds: int, alone: tuple[float, float], note: bool, trace: str) -> None:
    """One plan for both ranks: `alone` is seconds of a step and of its micro-batches on one GPU."""
    plan = load_plan(path)
    torch.cuda.reset_peak_memory_stats()
    session = made(plan, world)
    tokens = tokens_of(plan, world.device)
    parts = tokens.split(plan.job.micro_batch)
    mine = list(parts[world.dp_index :: plan.job.mesh.dp]) if plan.job.mesh.dp > 1 else list(parts)
    session.step(tokens)
    step = seconds(partial(session.step, tokens), rounds, wait)
    work = seconds(partial(session._actions.run, mine), rounds, wait)
    pairs = timeline(session, mine, serial=False)
    if trace:
        write_trace(f"{trace}{plan.job.mesh.pp}-{world.rank}.json", session.lanes.spans, world.rank)
    serial = timeline(session, mine, serial=True)
    memory = torch.cuda.max_memory_allocated() / 2**30
    del session
    free()
    session = made(replace(plan, comm={**plan.comm, "units": 0}), world)
    session.step(tokens)
    session._actions.run(mine)
    all_units = timeline(session, mine, serial=True)
    del session
    free()
    if world.rank:
        return
    count = tokens.numel()
    mesh = f"pp={plan.job.mesh.pp},ep={plan.job.mesh.ep}"
    share = parts_per_gpu(plan)
    print(f"\n{path}: {mesh}, {plan.job.precision}, {len(parts)} micro-batches, peak {memory:.1f} GiB, "
          f"plan {(plan.memory.with_headroom_bytes or plan.memory.peak_bytes) / 2**30:.1f} GiB, "
          f"{plan.comm['units']} SMs lent")  # fmt: skip
    print(f"step {step * 1e3:.1f} ms ({count / step:,.0f} tokens/s), micro-batches {work * 1e3:.1f} ms; one GPU: step "
          f"{alone[0] * 1e3:.1f} ms, micro-batches {alone[1] * 1e3:.1f} ms for {share} of them")  # fmt: skip
    rate, one = count / work, share * plan.job.seq * plan.job.micro_batch / alone[1]
    step_rate, step_one = count / step, share * plan.job.seq * plan.job.micro_batch / alone[0]
    lines: list[tuple[str, float, str, float | None, str | None]] = [
             (f"two GPUs {mesh} {plan.job.precision}, micro-batches", rate, "tokens/s", rate / one, "one GPU"),
             (f"two GPUs {mesh} {plan.job.precision}, steps", step_rate, "tokens/s", step_rate / step_one, "one GPU")]
    if pairs:
        hidden = statistics.mean(p[1] for p in pairs.values())
        took = statistics.median(p[0] for p in pairs.values())
        compute = statistics.median(p[2] for p in all_units.values())
        moved = statistics.median(p[3] for p in serial.values())
        limit = max(compute, moved)
        fewer = statistics.median(p[2] for p in serial.values())
        print(f"pairs: {took * 1e3:.2f} ms; computation alone on all SMs {compute * 1e3:.2f} ms, on fewer "
              f"{fewer * 1e3:.2f} ms; exchange alone {moved * 1e3:.2f} ms")  # fmt: skip
        lines += [(f"two GPUs {mesh} {plan.job.precision}, exchange hidden", 100 * hidden, "%", None, None),
                  (f"two GPUs {mesh} {plan.job.precision}, pair", took * 1e3, "ms", limit / took,
                   "the longer of computation and exchange alone")]  # fmt: skip
    for name, value, unit, ratio, peer in lines:
        if note:
            record(name, value, unit, ratio=ratio, peer=peer, load=0.0)
        else:
            print(f"{name:<58}{value:>12.2f} {unit}" + (f"   {ratio:.2f}x {peer}" if ratio else ""), flush=True)


def parts_per_gpu(plan: Plan) -> int:
    """How many whole micro-batches' work one GPU does."""
    return plan.job.global_batch // plan.job.micro_batch // plan.job.mesh.world


def timeline(session: RankSession, mine: list[torch.Tensor],
             serial: bool) -> dict[str, tuple[float, float, float, float]]:  # fmt: skip
    """Of every overlapped cell with an exchange: seconds, share of the exchange hidden, and seconds that computation
    and exchange were under way."""
    lanes = session.lanes
    lanes.spans.clear()
    lanes.recording, lanes.serial = True, serial
    session._actions.run(mine)
    spans = list(lanes.finish())
    lanes.recording = lanes.serial = False
    found = {}
    for cell in dict.fromkeys(s.cell for s in spans if "+" in s.cell):
        here = [s for s in spans if s.cell == cell]
        computed = union(s for s in here if s.lane == COMPUTE)
        sent = union(s for s in here if s.lane == COMMUNICATION)
        length = sum(end - start for start, end in sent)
        if length:
            took = max(s.end for s in here) - min(s.start for s in here)
            hidden = covered(sent, computed) / length
            found[cell] = took, hidden, sum(end - start for start, end in computed), length
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", required=True)
    parser.add_argument("--plans", required=True)
    parser.add_argument("--check", default="")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--trace", default="")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    plans = options.plans.split(",")
    first = load_plan(plans[0])
    world = connect(first)
    for pair in filter(None, options.check.split(",")):
        check(world, *pair.split(":"))
    alone = (0.0, 0.0)
    if world.rank == 0:
        plan = load_plan(options.one)
        with mock.patch.object(Weights, "initialize", draw_on_gpu):
            session = dsv3c.load(plan)
        tokens = tokens_of(plan, world.device)
        session.step(tokens)
        session.step(tokens)
        runner = session._runner("train", plan.job.micro_batch, plan.job.seq)

        def micro_batches() -> None:
            for i in range(plan.job.global_batch // plan.job.micro_batch):
                runner.run(accumulate=i > 0)

        alone = (seconds(partial(session.step, tokens), options.rounds, torch.cuda.synchronize),
                 seconds(micro_batches, options.rounds, torch.cuda.synchronize))  # fmt: skip
        del session, runner
        free()
    wait()
    for path in plans:
        measure(world, path, options.rounds, alone, options.record and world.rank == 0, options.trace)
    world.close()


if __name__ == "__main__":
    main()
