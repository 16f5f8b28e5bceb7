"""The memory-bound kernels of the FP8 slice on one Hopper GPU, each alone: bytes over time against a plain copy.

    python -m benchmarks.quantizers [--plan FILE] [--everything] [--match TEXT] [--rounds 7] [--record]

Bytes are what the IR says must move: every operand read once, every result written once. Each kernel runs in CUDA
graphs over enough sets of real data that nothing is left in L2 from the turn before; a copy of 1 GiB in the same run
is the measure. By default what quantizes or moves quantized rows; `--everything` takes every row-wise kernel.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

import dsv3c
from benchmarks.common import record
from dsv3c.dims import bind
from dsv3c.ir import DType, Graph, Node, Program, Type
from dsv3c.op import bytes_of
from dsv3c.ops import REGISTRY
from dsv3c.plan import Plan, load_plan
from dsv3c.targets import find
from dsv3c.tensors import torch_dtype

MODEL, SEQ = "deepseek-v3-slice", 4096
SIZES = {"B": 1, "S": SEQ}
CACHE_BYTES = 256 * 2**20
"""Several times the L2 of any Hopper GPU."""
MOST_SETS = 24
COPY_BYTES = 2**30
MOVED = ("permute", "unpermute", "transpose_blocks")
"""Ops that move quantized rows or blocks."""
SMALL = 64e6
"""Bytes under which a kernel's start and end take a good part of its time; its share of the copy is not judged."""

Run = Callable[[], object]
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Work:
    """One kernel: the node that asks for it, how often a round runs it, the bytes it must move."""

    name: str
    node: Node
    count: int
    bytes: int


@dataclass(frozen=True)
class Measured:
    """Seconds of one run, and the share of the copy's bytes per second."""

    work: Work
    seconds: float
    share: float


def all_work(program: Program, everything: bool) -> tuple[Work, ...]:
    """Distinct kernels of one forward and backward round and its prologue, most bytes first."""
    found: dict[str, list[object]] = {}
    for sequence in (s for s in program.sequences if s.name in ("train", "prologue")):
        for layer in sequence.layers:
            for node in program.graph(layer.graph).nodes:
                name = _name(program, node, everything)
                if name:
                    entry = found.setdefault(name, [node, 0])
                    entry[1] = int(str(entry[1])) + 1
    made = [Work(name, n, int(str(c)), _bytes(n)) for name, (n, c) in found.items() if isinstance(n, Node)]
    return tuple(sorted(made, key=lambda w: -w.bytes * w.count))


def _name(program: Program, node: Node, everything: bool) -> str:
    """What the kernel is called in the table; empty if it is not wanted."""
    if node.op == "call":
        graph = program.graph(str(node.attr("graph")))
        wanted = everything or any("quantize" in n.op for n in graph.nodes)
        return graph.name if wanted else ""
    if "quantize" in node.op or node.op in MOVED:
        types = ", ".join(f"{v.type.dtype}{list(v.type.bound(SIZES))}" for v in node.inputs[:1])
        return f"{node.op} {types}"
    return ""


def _bytes(node: Node) -> int:
    inputs, outputs = (tuple(v.type for v in values) for values in (dict.fromkeys(node.inputs), node.outputs))
    if node.op == "call":
        return bind(bytes_of(*inputs, *outputs), SIZES)
    return bind(REGISTRY[node.op].cost(inputs, outputs, **dict(node.attrs)).bytes, SIZES)


def draw(t: Type, generator: torch.Generator) -> torch.Tensor:
    """Numbers such as a training run has: normal activations, positive scales, codes over their whole range."""
    shape, dtype = t.bound(SIZES), torch_dtype(t.dtype)
    if t.dtype in (DType.e4m3, DType.bf16):
        wide = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return wide.mul_(80).to(dtype) if t.dtype is DType.e4m3 else wide
    if t.dtype is DType.f32:
        return torch.rand(shape, generator=generator, device="cuda").add_(0.5)
    return torch.randint(0, 120, shape, generator=generator, device="cuda").to(dtype)


def inputs_of(node: Node, generator: torch.Generator) -> Tensors:
    """Operands of `node`; rows in the order of experts as a random routing gives them."""
    drawn = [draw(v.type, generator) for v in node.inputs]
    slots = next((i for i, v in enumerate(node.inputs) if v.type.dtype is DType.i32 and v.type.rank == 2), None)
    if slots is not None:
        tokens, k = node.inputs[slots].type.bound(SIZES)
        flat = next(v.type for v in node.inputs if v.type.dtype is DType.i32 and v.type.rank == 1)
        experts = (flat.bound(SIZES)[0] - tokens * k) // 128
        chosen = torch.rand(tokens, experts, generator=generator, device="cuda").argsort(-1)[:, :k].int()
        _, slot, source = REGISTRY["sort_by_expert"].reference(chosen, experts=experts, align=128)
        for i, v in enumerate(node.inputs):
            if v.type.dtype is DType.i32:
                drawn[i] = slot if v.type.rank == 2 else source
    return tuple(drawn)


def poisoned(t: Type) -> torch.Tensor:
    return torch.full((t.bytes(SIZES),), 255, dtype=torch.uint8, device="cuda").view(torch_dtype(t.dtype)).view(
        t.bound(SIZES)
    )


def seconds(calls: list[Run], rounds: int) -> float:
    """Of one call, replayed as CUDA graphs one after the other."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(calls)


def copy_rate(rounds: int) -> float:
    """Bytes per second, read and written: the better of the driver's copy and an element-wise kernel of torch."""
    a, b = (torch.empty(COPY_BYTES // 4, dtype=torch.int32, device="cuda") for _ in range(2))
    a.random_()
    ways: tuple[Run, ...] = (lambda: b.copy_(a), lambda: torch.bitwise_not(a, out=b))
    return 2 * COPY_BYTES / min(seconds([way] * 4, rounds) for way in ways)


def sets(size: int) -> int:
    """How many sets of tensors of `size` bytes to rotate through."""
    return max(2, min(MOST_SETS, -(-CACHE_BYTES // max(size, 1))))


def measure(plan: Plan, works: Iterable[Work], rate: float, rounds: int) -> Iterator[Measured]:
    """Every kernel alone."""
    target = find(plan.target)
    assert target.load is not None
    kernels = {k.op: k for k in plan.kernels}
    for work in works:
        node = work.node
        if node.op == "call":
            prepare = target.load(kernels[str(node.attr("graph"))])
        else:
            attrs = dict(node.attrs)
            made = target.implementations[node.op].prepare
            prepare = lambda i, o, made=made, attrs=attrs: made(i, o, **attrs)  # type: ignore[misc]  # noqa: E731
        generator = torch.Generator(device="cuda").manual_seed(0)
        calls: list[Run] = []
        for _ in range(sets(work.bytes)):
            outputs = tuple(poisoned(v.type) for v in node.outputs)
            calls.append(prepare(inputs_of(node, generator), outputs))
        spent = seconds(calls, rounds)
        yield Measured(work, spent, work.bytes / spent / rate)
        del calls
        torch.cuda.empty_cache()


def ops_of(program: Program, work: Work) -> str:
    """The ops of a region, or the op."""
    if work.node.op != "call":
        return ""
    graph: Graph = program.graph(work.name)
    return " + ".join(n.op for n in graph.nodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", help="a plan compiled elsewhere")
    parser.add_argument("--everything", action="store_true")
    parser.add_argument("--match", default="", help="only kernels with this text in their name")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    plan = load_plan(given.plan) if given.plan else dsv3c.compile(MODEL, target="h100", precision="fp8", seq=SEQ)
    works = [w for w in all_work(plan.program, given.everything) if given.match in w.name]
    rate = copy_rate(given.rounds)
    print(f"copy {rate / 1e12:.3f} TB/s", flush=True)
    print(f"{'share':>6} {'us':>8} {'MB':>8} {'times':>5}  kernel", flush=True)
    done: list[Measured] = []
    for m in measure(plan, works, rate, given.rounds):
        done.append(m)
        w = m.work
        print(f"{m.share:6.1%} {m.seconds * 1e6:8.1f} {w.bytes / 1e6:8.1f} {w.count:5d}  {w.name}", flush=True)
    spent, least = sum(m.seconds * m.work.count for m in done), sum(m.work.bytes * m.work.count for m in done) / rate
    judged = [m for m in done if m.work.bytes >= SMALL]
    print(f"{spent * 1e3:.2f} ms a round, {least * 1e3:.2f} ms at the speed of the copy; "
          f"lowest share {min(m.share for m in judged):.1%}, in the mean {least / spent:.1%}")  # fmt: skip
    if given.record:
        record("quantizers/copy", rate / 1e12, "TB/s", load=0.0)
        for m in done:
            record(f"quantizers/{m.work.name}", m.work.bytes / m.seconds / 1e12, "TB/s", ratio=m.share, peer="copy",
                   load=0.0)  # fmt: skip


if __name__ == "__main__":
    main()
