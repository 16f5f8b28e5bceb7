"""Matrix products on one Hopper GPU: generated kernels against cuBLASLt, checked against float32 before any timing.

    python -m benchmarks.hopper_gemm [--cases dense,rows,columns,bf16,small,ablation] [--record]

`--record` appends to results.jsonl the best candidate of each case, what the measured table selects, and the peer.
`ablation` leaves stages of the
kernel out, which makes its results wrong and its times an upper bound for what the other stages allow.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import record
from dsv3c.target import Product
from dsv3c.targets._cuda_selector import HopperSelector
from dsv3c.targets._gluon_gemm import source
from dsv3c.targets._gluon_launch import Binary, build, load
from dsv3c.targets._gluon_spec import Element, GemmSpec, Kind, Output, Pair

DENSE = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
ROWS = ((4, 8192), (8, 4096))
EXPERT = ((4096, 7168), (7168, 2048))
E4M3 = torch.float8_e4m3fn
SELECTOR = HopperSelector("h100")
Run = Callable[[], None]


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x[R, K] -> e4m3 and scales [K/128, R], one per 1×128."""
    parts = x.float().unflatten(-1, (-1, 128))
    scale = parts.abs().amax(-1).clamp_min(1e-12) / 448
    return (parts / scale[..., None]).flatten(-2).to(E4M3), scale.t().contiguous()


def quantize_blocks(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w[N, K] -> e4m3 and scales [ceil(N/128), K/128]."""
    n = w.shape[0]
    padded = torch.nn.functional.pad(w.float(), (0, 0, 0, -n % 128)).unflatten(0, (-1, 128)).unflatten(-1, (-1, 128))
    scale = padded.abs().amax((1, 3)).clamp_min(1e-12) / 448
    return (padded / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:n].to(E4M3).contiguous(), scale.contiguous()


def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (q.float().unflatten(-1, (-1, 128)) * scale.t()[..., None]).flatten(-2)


def dequantize_blocks(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows = scale.repeat_interleave(128, 0)[: q.shape[0]]
    return (q.float().unflatten(-1, (-1, 128)) * rows[..., None]).flatten(-2)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def median_ms(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median milliseconds by device events, L2 overwritten before each run; contestants take turns."""
    flush = torch.empty(64 * 1024 * 1024, dtype=torch.int32, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        events = []
        for name, run in runs.items():
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            events.append((name, start, end))
        torch.cuda.synchronize()
        if turn >= 2:
            for name, start, end in events:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


@dataclass(frozen=True, slots=True)
class Case:
    """One problem: what to bind, what the result must be, and the peer if there is one."""

    name: str
    flops: float
    values: dict[str, torch.Tensor | int]
    out: torch.Tensor
    wanted: torch.Tensor
    before: torch.Tensor | None
    peer: Run | None
    product: Product


def _given(**values: torch.Tensor | int) -> dict[str, torch.Tensor | int]:
    return values


def dense_case(m: int, n: int, k: int) -> Case:
    a, a_scale = quantize(torch.randn(m, k, device="cuda"))
    b, b_scale = quantize_blocks(torch.randn(n, k, device="cuda"))
    c = torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16)
    wanted = dequantize(a, a_scale) @ dequantize_blocks(b, b_scale).t()
    blocks = k // 128
    room = torch.ones(b_scale.shape[0], -(-blocks // 4) * 4, device="cuda")
    room[:, :blocks] = b_scale
    theirs = lambda: torch._scaled_mm(a, b.t(), a_scale.t(), room.t()[:blocks], out_dtype=torch.bfloat16)  # noqa: E731
    values = _given(a_desc=a, b_desc=b, c_desc=c, a_scale=a_scale, b_scale=b_scale, M=m, N=n, K=k, a_scale_stride=m)
    return Case(f"dense_e4m3/{m}x{n}x{k}", 2.0 * m * n * k, values, c, wanted, None, lambda: (theirs(), None)[1],
                Product("linear_fp8", "e4m3", m, n, k))  # fmt: skip


def dense_bf16_case(m: int, n: int, k: int) -> Case:
    a = torch.randn(m, k, device="cuda").bfloat16()
    b = torch.randn(n, k, device="cuda").bfloat16()
    c = torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16)
    theirs = torch.empty_like(c)
    values = _given(a_desc=a, b_desc=b, c_desc=c, M=m, N=n, K=k)
    peer = lambda: (torch.mm(a, b.t(), out=theirs), None)[1]  # noqa: E731
    return Case(f"dense_bf16/{m}x{n}x{k}", 2.0 * m * n * k, values, c, a.float() @ b.float().t(), None, peer,
                Product("linear", "bf16", m, n, k))  # fmt: skip


def uneven(groups: int, each: int, spread: float) -> list[int]:
    """Offsets of groups of about `each` rows, all multiples of 128, the same on every run."""
    generator = torch.Generator().manual_seed(groups * each)
    sizes = each * (1 + spread * (2 * torch.rand(groups, generator=generator) - 1))
    return [0, *torch.cumsum((sizes / 128).round().long() * 128, 0).tolist()]


def rows_case(groups: int, each: int, n: int, k: int, spread: float = 0.0) -> Case:
    ends = uneven(groups, each, spread)
    m = ends[-1]
    a, a_scale = quantize(torch.randn(m, k, device="cuda"))
    packed = [quantize_blocks(torch.randn(n, k, device="cuda")) for _ in range(groups)]
    c = torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16)
    wide = dequantize(a, a_scale)
    wanted = torch.cat([wide[i:j] @ dequantize_blocks(*packed[e]).t()
                        for e, (i, j) in enumerate(itertools.pairwise(ends))])  # fmt: skip
    offsets = torch.tensor(ends, device="cuda", dtype=torch.int32)
    values = _given(a_desc=a, b_desc=torch.stack([q for q, _ in packed]), c_desc=c, a_scale=a_scale,
                  b_scale=torch.cat([s for _, s in packed]), offsets=offsets, experts=groups, M=m, N=n, K=k,
                  a_scale_stride=m)  # fmt: skip
    return Case(f"grouped_rows_e4m3/{groups}x{each}x{n}x{k}", 2.0 * m * n * k, values, c, wanted, None, None,
                Product("grouped_linear_fp8", "e4m3", m, n, k, groups))  # fmt: skip


def columns_case(groups: int, each: int, n: int, k: int, spread: float = 0.2) -> Case:
    ends = uneven(groups, each, spread)
    rows = ends[-1]
    a, a_scale = quantize(torch.randn(n, rows, device="cuda"))
    b, b_scale = quantize(torch.randn(k, rows, device="cuda"))
    before = torch.randn(groups, n, k, device="cuda")
    wide_a, wide_b = dequantize(a, a_scale), dequantize(b, b_scale)
    wanted = torch.stack([before[e] + wide_a[:, i:j] @ wide_b[:, i:j].t()
                          for e, (i, j) in enumerate(itertools.pairwise(ends))])  # fmt: skip
    offsets = torch.tensor(ends, device="cuda", dtype=torch.int32)
    out = before.clone()
    values = _given(a_desc=a, b_desc=b, c_desc=out, a_scale=a_scale, b_scale=b_scale, offsets=offsets, experts=groups,
                  M=n, N=k, K=rows, a_scale_stride=n, b_scale_stride=k)  # fmt: skip
    return Case(f"grouped_k_e4m3/{groups}x{each}x{n}x{k}", 2.0 * rows * n * k, values, out, wanted, before, None,
                Product("grouped_linear_fp8_wgrad", "e4m3", rows, n, k, groups, True))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """A case to build later, when its turn comes and memory is free, and the kernels that compete in it."""

    make: Callable[[], Case]
    specs: tuple[GemmSpec, ...]
    tolerance: float


TILES: tuple[tuple[int, int, int, Pair], ...] = (
    (256, 128, 4, ""), (256, 128, 4, "a"), (256, 128, 4, "b"), (128, 256, 4, "a"), (128, 256, 4, "b"),
    (192, 128, 4, ""), (192, 128, 4, "b"), (128, 128, 5, "b"),
)  # fmt: skip


def _specs(kind: Kind, dtype: Element) -> tuple[GemmSpec, ...]:
    """The candidates: for column-scaled products without tiles of 256 columns, whose scales need registers."""
    tiles = [t for t in TILES if kind != "grouped_k" or dtype != "e4m3" or (t[0] != 192 and t[1] == 128)]
    if kind == "grouped_rows":
        tiles = [t for t in tiles if t[3] == "a" or t[0] == 192]
    output: Output = "accumulate_f32" if kind == "grouped_k" else "bf16"
    return tuple(GemmSpec(kind, dtype, bm, bn, stages, output, pair=pair) for bm, bn, stages, pair in tiles)


def plans(cases: list[str]) -> list[Plan]:
    found: list[Plan] = []
    if "dense" in cases:
        found += [Plan(lambda n=n, k=k: dense_case(4096, n, k), _specs("dense", "e4m3"), 4e-3) for n, k in DENSE]
    if "rows" in cases:
        found += [Plan(lambda e=e, r=r, n=n, k=k: rows_case(e, r, n, k), _specs("grouped_rows", "e4m3"), 4e-3)
                  for e, r in ROWS for n, k in EXPERT]  # fmt: skip
    if "columns" in cases:
        found += [Plan(lambda e=e, r=r, n=n, k=k: columns_case(e, r, n, k), _specs("grouped_k", "e4m3"), 1e-3)
                  for (e, r), (n, k) in zip(ROWS, EXPERT, strict=True)]  # fmt: skip
    if "small" in cases:
        tiles = [GemmSpec("dense", "e4m3", 128, bn, stages, pair=p)
                 for bn, stages in ((64, 8), (128, 6)) for p in ("", "b")]  # fmt: skip
        found += [Plan(lambda n=n, k=k: dense_case(128, n, k), tuple(tiles), 4e-3) for n, k in DENSE]
        # Decode: 32 experts with few rows each, padded to 128; weights of 537 MB are what counts.
        groups = [GemmSpec("grouped_rows", "e4m3", 128, bn, 5, pair=p) for bn in (64, 128) for p in ("", "a")]
        found.append(Plan(lambda: rows_case(32, 128, 4096, 4096), tuple(groups), 4e-3))
    if "bf16" in cases:
        found += [Plan(lambda n=n, k=k: dense_bf16_case(4096, n, k), _specs("dense", "bf16"), 4e-3) for n, k in DENSE]
    return found


def _ablated(job: tuple[GemmSpec, str]) -> Binary:
    spec, left_out = job
    text = source(spec)
    if left_out != "nothing":
        text = re.sub(r"^ *acc_\d_\d = gl.inline_asm.*\n", "", text, flags=re.MULTILINE)
    if left_out == "multiplication":
        text = re.sub(r"^ *part = warpgroup_mma.*\n", "", text, flags=re.MULTILINE)
    return build(spec, Path(tempfile.gettempdir()) / "dsv3c_gemm", text)


def ablation(units: int, rounds: int) -> None:
    """How fast stages alone would be: the ring without arithmetic, the tensor cores without promotion."""
    case = dense_case(4096, 7168, 16384)
    for pair in ("", "b"):
        spec = GemmSpec("dense", "e4m3", 128, 256, 4, pair=pair)  # type: ignore[arg-type]
        names = ("nothing", "promotion", "multiplication")
        runs = {n: load(spec, _ablated((spec, n))).bind(units, **case.values) for n in names}
        rates = {n: case.flops / t / 1e9 for n, t in median_ms(runs, rounds).items()}
        print(f"{spec.name} left out: " + "  ".join(f"{n} {rate:.0f}" for n, rate in rates.items()), flush=True)


def _build(spec: GemmSpec) -> Binary | str:
    try:
        return build(spec, Path(tempfile.gettempdir()) / "dsv3c_gemm")
    except Exception as e:  # one failing candidate must not stop the others
        return f"{type(e).__name__}: {str(e)[-200:]}"


def measure(plan: Plan, binaries: dict[GemmSpec, Binary | str], units: int, rounds: int, keep: bool) -> None:
    case = plan.make()
    runs: dict[str, Run] = {}
    for spec in plan.specs:
        label = f"{spec.bm}x{spec.bn}x{spec.stages}{spec.pair}"
        binary = binaries[spec]
        if isinstance(binary, str):
            print(f"{case.name} {label}: {binary}")
            continue
        run = load(spec, binary).bind(units, **case.values)
        if case.before is None:
            case.out.fill_(float("nan"))
        else:
            case.out.copy_(case.before)
        run()
        torch.cuda.synchronize()
        error = relative_error(case.out, case.wanted)
        if not error < plan.tolerance:
            print(f"{case.name} {label}: WRONG, relative error {error:.2e}", flush=True)
            continue
        runs[label] = run
    chosen = SELECTOR.choose([case.product], "auto")[0].implementation
    if case.peer is not None:
        runs["cuBLASLt"] = case.peer
        if not chosen.startswith("gluon"):
            runs["selected"] = case.peer  # the same call once more, measured by itself
    times = median_ms(runs, rounds)
    rates = {name: case.flops / t / 1e9 for name, t in times.items()}
    theirs = rates.pop("cuBLASLt", None)
    selected = rates.pop("selected", rates.get(chosen.removeprefix("gluon ")))
    best = max(rates, key=lambda name: rates[name]) if rates else None
    line = "  ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    beside = f"  cuBLASLt {theirs:.0f}  ratio {rates[best] / theirs:.3f}" if theirs and best else ""
    taken = f"  selected {chosen} {selected:.0f}" if selected else f"  selected {chosen}, not among these"
    if selected and theirs:
        taken += f" ratio {selected / theirs:.3f}"
    print(f"{case.name:<36} {line}{beside}{taken}", flush=True)
    if keep and best is not None:
        peer = {"ratio": rates[best] / theirs, "peer": "cuBLASLt"} if theirs else {}
        record(f"hopper_gemm/{case.name}/generated {best}", rates[best], "TFLOP/s", load=0.0, **peer)
        if theirs:
            record(f"hopper_gemm/{case.name}/cuBLASLt", theirs, "TFLOP/s", load=0.0)
        if selected:
            against = {"ratio": selected / theirs, "peer": "cuBLASLt"} if theirs else {}
            record(f"hopper_gemm/{case.name}/selected ({chosen})", selected, "TFLOP/s", load=0.0, **against)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="dense,rows,columns,bf16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--units", type=int, default=0, help="SMs to use; 0 for all")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    todo = plans(given.cases.split(","))
    specs = list(dict.fromkeys(s for p in todo for s in p.specs))
    with ProcessPoolExecutor() as pool:
        binaries = dict(zip(specs, pool.map(_build, specs), strict=True))
    units = given.units or torch.cuda.get_device_properties(0).multi_processor_count
    torch.manual_seed(1)
    if "ablation" in given.cases.split(","):
        ablation(units, given.rounds)
    for plan in todo:
        measure(plan, binaries, units, given.rounds, given.record)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
