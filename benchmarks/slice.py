"""The slice of DeepSeek-V3 that one rank of 32 computes: forward and backward of 4096 tokens on one Hopper GPU.

    python -m benchmarks.slice [--precision bf16,fp8] [--implementations auto,generated] [--graphs] [--rounds 20]
                               [--plan FILE] [--table] [--record]

One round is what a micro-batch of training takes: the prologue that quantizes or casts the weights, the forward pass,
the backward pass, and the writing of every weight gradient. `--implementations generated` runs every matrix product
for which there is one by a generated kernel. `--table` says where the time goes, kernel by kernel.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from unittest import mock

import torch

import dsv3c
from benchmarks.common import record
from dsv3c.runtime.session import Session
from dsv3c.runtime.weights import Weights

MODEL, SEQ = "deepseek-v3-slice", 4096


def draw_on_gpu(weights: Weights, seed: int, parts: object) -> None:
    """Weights of the right distribution, drawn where they lie: drawing billions on the CPU takes minutes."""
    generator = torch.Generator(device=weights.device).manual_seed(seed)
    for w in weights.program.weights:
        tensor = weights.tensors[w.name]
        if w.init == "normal":
            tensor.normal_(0.0, w.std, generator=generator)
        else:
            tensor.fill_(1.0 if w.init == "ones" else 0.0)


def load(precision: str, plan: str | None, implementations: str = "auto") -> Session:
    """A session on the GPU; `plan` is a file, or None to compile here."""
    made = plan or dsv3c.compile(MODEL, target="h100", precision=precision, seq=SEQ, implementations=implementations)
    with mock.patch.object(Weights, "initialize", draw_on_gpu):
        return dsv3c.load(made)


def rounds(session: Session, tokens: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """One whole round, and the same without the prologue."""
    sequence = session._train_sequence()
    runner = session._runner("train", 1, SEQ)
    session._prologue()
    session._set_losses(runner, sequence, ("main", "mtp", "balance"), 1.0)
    runner.values["tokens"].copy_(tokens)

    def whole() -> None:
        session._stale = True
        session._prologue()
        runner.run()

    return whole, runner.run


def milliseconds(run: Callable[[], None], count: int) -> list[float]:
    """Of each run, by the GPU's clock."""
    times: list[float] = []
    for turn in range(count + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end))
    return times


WRITTEN = (
    "quantize_rows", "quantize_block", "transpose_blocks", "permute", "unpermute", "sort_by_expert", "cross_entropy",
    "cross_entropy_grad", "embedding_wgrad",
)  # fmt: skip
"""Ops whose kernel is the target's own, but not generated from the program."""


def shares(session: Session) -> dict[str, float]:
    """Which part of a round's time goes to generated kernels, to the target's own, and to libraries."""
    runner, plan, selector = session._runner("train", 1, SEQ), session.plan, session.target.selector
    assert selector is not None
    chosen = {c.product: c.implementation for c in plan.choices}
    spent = {"generated": 0.0, "written": 0.0, "library": 0.0}
    runner._timed()
    for step, seconds in zip(runner.first, runner._timed(), strict=True):
        node = step.node
        types = [(str(v.type.dtype), v.type.bound(plan.job.sizes)) for v in node.inputs]
        product = None if node.op == "call" else selector.product(node.op, types, False)
        if node.op == "call":
            kind = "generated" if str(node.attr("graph")) in session.engine.kernels else "library"
        elif product is not None:
            kind = "generated" if chosen[product].startswith("gluon") else "library"
        else:
            kind = "written" if node.op in WRITTEN else "library"
        spent[kind] += seconds
    total = sum(spent.values())
    return {kind: seconds / total for kind, seconds in spent.items()}


def table(session: Session, most: int = 45) -> None:
    """Milliseconds by kernel: count, share, operation."""
    runner = session._runner("train", 1, SEQ)
    runner.profile()
    spent: dict[str, list[float]] = {}
    for (name, path), seconds in runner.profile().items():
        spent.setdefault(f"{name} {path.partition(':')[0]} {path.partition(':')[2]}", []).append(seconds * 1e3)
    total = sum(map(sum, spent.values()))
    print(f"{total:8.2f} ms in all")
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:most]:
        print(f"{sum(times):8.3f} ms {sum(times) / total:6.1%}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="bf16,fp8")
    parser.add_argument("--implementations", default="auto", help="some of auto, generated, library")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--plan", help="a plan made elsewhere; {} is the precision, a second {} the implementations")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    tokens = torch.randint(0, 1024, (1, SEQ), generator=torch.Generator().manual_seed(0))
    for precision, implementations in itertools.product(given.precision.split(","), given.implementations.split(",")):
        session = load(precision, given.plan and given.plan.format(precision, implementations), implementations)
        name = precision if implementations == "auto" else f"{precision} {implementations}"
        whole, bare = rounds(session, tokens)
        whole()
        torch.cuda.synchronize()
        free, size = torch.cuda.mem_get_info()
        runner = session._runner("train", 1, SEQ)
        print(f"{name}: loss {float(runner.values['loss.main']):.4f}, {(size - free) / 2**30:.1f} GiB in use, "
              f"{session.plan.memory.peak_bytes / 2**30:.1f} GiB predicted", flush=True)  # fmt: skip
        if given.graphs:
            runner.capture()
        every = milliseconds(whole, given.rounds)
        without = statistics.median(milliseconds(bare, given.rounds))
        middle = statistics.median(every)
        print(f"{name}: {middle:.2f} ms forward + backward ({min(every):.2f} to {max(every):.2f}), "
              f"{without:.2f} ms without the prologue", flush=True)  # fmt: skip
        parts = shares(session)
        print(f"{name}: " + ", ".join(f"{kind} {share:.1%}" for kind, share in parts.items()), flush=True)
        if given.record:
            record(f"slice/{name}/forward+backward", middle, "ms", load=0.0)
            record(f"slice/{name}/time in generated kernels", parts["generated"], "of all", load=0.0)
        if given.table:
            table(session)
        del session, whole, bare, runner
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
