"""Measuring what can execute a matrix product: on this GPU, on random operands, contestants taking turns.

An implementation whose result differs from the others' is left out and named. Between runs the L2 is overwritten.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3c.errors import Dsv3cError, InputError, WorkError
from dsv3c.lazy import lazy
from dsv3c.target import Product
from dsv3c.targets._cuda_device import device_target, trouble
from dsv3c.targets._cuda_products import Products
from dsv3c.targets._gluon_kernel import gemm_binary
from dsv3c.targets._gluon_spec import GemmSpec
from dsv3c.targets._measured import Row, keep, shipped
from dsv3c.targets._products import candidates, generated, spec_of
from dsv3c.targets._triton_build import triton_version

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Tensors = tuple["torch.Tensor", ...]
Call = Callable[[], None]

ALIKE = 1e-2
"""Relative difference of two results, by norm, up to which both are right."""
TILE = 128
FLUSH = 64 * 2**20
"""Bytes written between runs, more than the L2 holds."""


def tune(target: str, products: Sequence[Product], rounds: int, tell: Callable[[int, int, str], None]) -> Path:
    """Measure the products (those of the shipped table if none are given) and keep the result for `target`."""
    why = trouble()
    if why:
        raise InputError(f"nothing can be measured here: {why}")
    here = device_target()
    if target != here:
        raise InputError(f"--target {target}: this GPU is a {torch.cuda.get_device_name()}; tune for {here}")
    found = tuple(dict.fromkeys(products)) or tuple(row.product for row in shipped().rows)
    build([spec_of(p, c) for p in found for c in candidates(p) if generated(c)])
    rows: list[Row] = []
    for i, p in enumerate(found):
        line = f"{p}: nothing to choose"
        if len(candidates(p)) > 1:
            line, row = _measured(p, rounds)
            rows += [row] if row else []
        tell(i + 1, len(found), line)
    versions = {"torch": str(torch.__version__), "triton": triton_version()}
    return keep(target, str(torch.cuda.get_device_name()), versions, rows)


def build(specs: Sequence[GemmSpec]) -> None:
    """Make the binaries of all specs, side by side, so that they are in the cache; one that fails does so when used."""
    distinct = list(dict.fromkeys(specs))
    if len(distinct) > 1:
        with ProcessPoolExecutor() as pool:
            list(pool.map(_build, distinct))


def _build(spec: GemmSpec) -> None:
    try:
        gemm_binary(spec)
    except Dsv3cError:
        return


def _measured(p: Product, rounds: int) -> tuple[str, Row | None]:
    try:
        rates, wrong = measure(p, rounds)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return f"{p}: left out, since its operands do not fit into memory", None
    ordered = sorted(rates.items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {rate:.0f}" for name, rate in ordered[:3])
    left = f"; wrong: {', '.join(wrong)}" if wrong else ""
    return f"{p}: {told} TFLOP/s{left}", Row(p, tuple((n, round(r, 1)) for n, r in ordered)) if ordered else None


def measure(p: Product, rounds: int) -> tuple[dict[str, float], list[str]]:
    """TFLOP/s of each implementation that gives the right result, and the names of those that fail.

    Each includes what it does to its operands first, such as bringing scales into its order.
    """
    from dsv3c.targets._cuda_selector import all_implementations

    inputs, out = operands(p)
    runs: dict[str, Call] = {}
    wrong: list[str] = []
    first: torch.Tensor | None = None
    adding = {"accumulate": True} if p.adds else {}
    for name in candidates(p):
        implementation = all_implementations(Products(forced=name))[p.op]
        out.fill_(0 if p.adds else float("nan"))
        try:
            run = implementation.prepare(inputs, (out,), **adding)
            run()
            torch.cuda.synchronize()
        except (WorkError, InputError) as error:
            wrong.append(f"{name} ({error})")
            continue
        if first is None:
            first = out.clone()
        elif not _alike(out, first):
            wrong.append(name)
            continue
        runs[name] = run
    times = _median_ms(runs, rounds)
    return {name: p.flops / ms / 1e9 for name, ms in times.items()}, wrong


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    gap, size = 0.0, 0.0
    for x, y in zip(a.flatten().split(FLUSH), b.flatten().split(FLUSH), strict=True):
        wide = y.float()
        gap += float((x.float() - wide).square().sum())
        size += float(wide.square().sum())
    return gap <= ALIKE**2 * size


def _median_ms(runs: dict[str, Call], rounds: int) -> dict[str, float]:
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs.items())
    for turn in range(rounds + 2):
        marks = []
        start_at = turn % max(len(order), 1)  # no contestant is always the first after a pause
        for name, run in order[start_at:] + order[:start_at]:
            flush.zero_()
            torch.cuda._sleep(100_000)  # the host gets ahead, so that short kernels do not wait for their launch
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            marks.append((name, start, end))
        torch.cuda.synchronize()
        if turn >= 2:
            for name, start, end in marks:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def _codes(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(64).to(torch.float8_e4m3fn)


def _scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, device="cuda", dtype=torch.float32).add_(0.5)


def _numbers(dtype: str, *shape: int) -> torch.Tensor:
    kind = torch.float32 if dtype == "f32" else torch.bfloat16
    return torch.randn(shape, device="cuda", dtype=kind)


def _offsets(rows: int, groups: int) -> torch.Tensor:
    """Equal groups of whole tiles that fill the rows as far as that goes."""
    each = max(rows // groups // TILE * TILE, TILE)
    ends = [min(g * each, rows // TILE * TILE) for g in range(groups + 1)]
    return torch.tensor(ends, dtype=torch.int32, device="cuda")


def _tiles(n: int) -> int:
    return -(-n // TILE)


def operands(p: Product) -> tuple[Tensors, torch.Tensor]:
    """Random inputs of the product's op and room for its output."""
    grouped = p.op.startswith("grouped")
    more: Tensors = (_offsets(p.rows, p.groups),) if grouped else ()
    lead = (p.groups,) if grouped else ()
    if p.op.endswith("_wgrad"):
        out = torch.empty(*lead, p.n, p.k, device="cuda", dtype=torch.float32)
        if p.dtype == "e4m3":
            pairs = ((_codes(c, p.rows), _scales(c, _tiles(p.rows))) for c in (p.n, p.k))
            return (*(t for pair in pairs for t in pair), *more), out
        return (_numbers(p.dtype, p.rows, p.n), _numbers(p.dtype, p.rows, p.k), *more), out
    if p.dtype == "e4m3":
        quantized = (_codes(p.rows, p.k), _scales(p.rows, _tiles(p.k)))
        blocks = (_codes(*lead, p.n, p.k), _scales(*lead, _tiles(p.n), _tiles(p.k)))
        return (*quantized, *blocks, *more), torch.empty(p.rows, p.n, device="cuda", dtype=torch.bfloat16)
    weight = (p.k, p.n) if p.op.endswith("_dgrad") else (p.n, p.k)
    x, w = _numbers(p.dtype, p.rows, p.k), _numbers(p.dtype, *lead, *weight)
    return (x, w, *more), torch.empty(p.rows, p.n, device="cuda", dtype=x.dtype)
