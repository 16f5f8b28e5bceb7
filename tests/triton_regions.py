"""Regions as `fuse` makes them, and how a kernel of one is held against two oracles."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from dsv3c.build import Builder
from dsv3c.interp import run as interpret
from dsv3c.ir import DType, Graph, Type, Value
from dsv3c.ops import REGISTRY
from dsv3c.rows import evaluate, placed
from dsv3c.target import Kernel
from dsv3c.targets._regions import RegionOperand, RegionProgram, compose
from dsv3c.targets._triton_kernel import region_kernel
from dsv3c.tensors import torch_dtype

Tensors = tuple[torch.Tensor, ...]
BF16, F32, E4M3 = DType.bf16, DType.f32, DType.e4m3
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float8_e4m3fn: 0.0, torch.float16: 2**-9}
EPS = {"eps": 1e-6}
TILES = {"power_of_two": False}


def close(mine: torch.Tensor, right: torch.Tensor, note: str, tolerance: float | None = None) -> None:
    """Equal within the storage type's rounding; NaN and infinity in the same places."""
    right = right.to(mine.dtype)
    bound = TOLERANCE.get(mine.dtype, 0.0) if tolerance is None else tolerance
    scale = right.double().nan_to_num(0, 0, 0).abs().max().item() if right.numel() else 0.0
    torch.testing.assert_close(
        mine.double(), right.double(), rtol=bound, atol=bound * max(scale, 1e-6), equal_nan=True,
        msg=lambda m: f"{note}: {m}",
    )  # fmt: skip


def codes_close(mine: torch.Tensor, right: torch.Tensor, note: str) -> None:
    """FP8 codes of numbers that differ in their last bits: nearly all equal, none more than one code apart."""
    a, b = (t.view(torch.uint8).int() for t in (mine, right))
    a, b = (torch.where(t >= 128, 128 - t, t) for t in (a, b))
    assert (a - b).abs().max() <= 1, note
    assert (a != b).float().mean() < 0.02, note


def drawn(t: Type, generator: torch.Generator, strided: bool = False, positive: bool = False) -> torch.Tensor:
    """Normal numbers; `strided` cuts the tensor out of a wider one, so that rows are apart."""
    shape = t.bound({})
    padded = (*shape[:-1], shape[-1] + 16) if shape and strided else shape
    x = torch.randn(padded, generator=generator, dtype=torch.float64)
    x = 8 * x.abs() if t.dtype is DType.u8 else x.abs() + 0.1 if positive else x
    x = x.to(torch_dtype(t.dtype))
    return x[..., : shape[-1]] if padded != shape else x


def fresh(v: Value) -> torch.Tensor:
    return torch.full(v.type.bound({}), 77, dtype=torch.float64).to(torch_dtype(v.type.dtype))


def built(build: Callable[[Builder], list[Value]]) -> Graph:
    b = Builder(REGISTRY, "region")
    return b.graph(build(b))


def norm_quantize(rows: int, n: int) -> Graph:
    def build(b: Builder) -> list[Value]:
        x, r = b.input("x", Type(BF16, (rows, n))), b.input("r", Type(BF16, (rows, n)))
        h = b.add(x, r)
        return [h, *b.quantize_tile(b.rms_norm(h, b.input("w", Type(BF16, (n,))), **EPS), **TILES)]

    return built(build)


def swiglu_quantize(rows: int, n: int) -> Graph:
    return built(lambda b: [*b.quantize_tile(b.swiglu(b.input("gu", Type(BF16, (rows, 2 * n)))), power_of_two=True)])


def swiglu_backward(rows: int, n: int) -> Graph:
    def build(b: Builder) -> list[Value]:
        gu = b.dequantize_tile(
            b.input("q", Type(E4M3, (rows, 2 * n))), b.input("s", Type(F32, (rows, -(-2 * n // 128)))), dtype="bf16"
        )
        dy, p = b.input("dy", Type(BF16, (rows, n))), b.input("p", Type(BF16, (rows,)))
        d = b.swiglu_grad(b.scale_rows(dy, p), gu)
        return [*b.quantize_tile(d, **TILES), b.row_dot(b.swiglu(gu), dy)]

    return built(build)


def norm_backward(rows: int, n: int) -> Graph:
    def build(b: Builder) -> list[Value]:
        dy, x, r = (b.input(name, Type(BF16, (rows, n))) for name in ("dy", "x", "r"))
        dx = b.add(b.rms_norm_dx(dy, x, b.input("w", Type(BF16, (n,))), **EPS), r)
        return [dx, b.rms_norm_dw(dy, x, **EPS), *b.quantize_tile(dx, **TILES)]

    return built(build)


def rotated(rows: int, n: int) -> Graph:
    def build(b: Builder) -> list[Value]:
        x = b.split_heads(b.input("x", Type(BF16, (1, rows, 4 * n))), heads=4)
        cos, sin = (b.input(name, Type(F32, (1, rows, n // 4))) for name in ("cos", "sin"))
        turned = b.rotary(b.slice_last(x, start=n // 2, stop=n), cos, sin, interleave=True, inverse=False)
        return [b.join_last(b.slice_last(x, start=0, stop=n // 2), turned)]

    return built(build)


def requantize(rows: int, n: int) -> Graph:
    def build(b: Builder) -> list[Value]:
        q, s = b.input("q", Type(E4M3, (rows, n))), b.input("s", Type(F32, (rows, -(-n // 128))))
        x = b.dequantize_tile(q, s, dtype="bf16")
        return [*b.quantize_e5m6(x), *b.quantize_tile(b.scale(x, by=0.5), power_of_two=True)]

    return built(build)


def requantize_rows(rows: int, n: int) -> Graph:
    def build(b: Builder) -> list[Value]:
        q, s = b.input("q", Type(E4M3, (rows, n))), b.input("s", Type(F32, (rows, -(-n // 128))))
        return [*b.quantize_rows(b.dequantize_tile(q, s, dtype="bf16"), **TILES)]

    return built(build)


def both_ways(rows: int, n: int) -> Graph:
    def build(b: Builder) -> list[Value]:
        x = b.add(b.input("x", Type(BF16, (rows, n))), b.input("y", Type(BF16, (rows, n))))
        return [*b.quantize_tile(x, **TILES), *b.quantize_rows(x, **TILES)]

    return built(build)


def swiglu_backward_rows(rows: int, n: int) -> Graph:
    def build(b: Builder) -> list[Value]:
        q, s = b.input("q", Type(E4M3, (rows, 2 * n))), b.input("s", Type(F32, (rows, -(-2 * n // 128))))
        dy, p = b.input("dy", Type(BF16, (rows, n))), b.input("p", Type(BF16, (rows,)))
        gu = b.dequantize_tile(q, s, dtype="bf16")
        y, d = b.swiglu(gu), b.swiglu_grad(b.scale_rows(dy, p), gu)
        return [*b.quantize_rows(b.scale_rows(y, p), **TILES), b.row_dot(y, dy), *b.quantize_tile(d, **TILES),
                *b.quantize_rows(d, **TILES)]  # fmt: skip

    return built(build)


def unpack_rows(rows: int, n: int) -> Graph:
    def build(b: Builder) -> list[Value]:
        q, s = b.input("q", Type(DType.u8, (rows, n // 2 * 3))), b.input("s", Type(F32, (rows, -(-n // 128))))
        x = b.dequantize_e5m6(q, s, dtype="bf16")
        return [x, *b.quantize_rows(x, **TILES)]

    return built(build)


REGIONS: dict[str, Callable[[int, int], Graph]] = {
    f.__name__: f
    for f in (norm_quantize, swiglu_quantize, swiglu_backward, norm_backward, rotated, requantize, requantize_rows,
              both_ways, swiglu_backward_rows, unpack_rows)
}  # fmt: skip


def check_region(start: Callable[[Kernel | None, Tensors, Tensors], None], region: Graph, kernels: str,
                 device: torch.device) -> None:  # fmt: skip
    """A region's kernel against the references of its ops, in float32 between them."""
    generator = torch.Generator().manual_seed(1)
    given = {v.name: drawn(v.type, generator).to(device) for v in region.params}
    for v in region.params:
        if v.type.dtype is F32:
            given[v.name] = given[v.name].abs() + 0.5
    outputs = tuple(fresh(v).to(device) for v in region.results)
    start(region_kernel(region, {}, kernels), tuple(given.values()), outputs)
    program = compose(region, REGISTRY, {})
    operands = tuple(
        as_rows(given[v.name].cpu(), o, program) for v, o in zip(region.params, program.operands, strict=True)
    )
    for v, r, mine in zip(region.results, program.results, outputs, strict=True):
        right = evaluate(r.row, operands)
        height = math.prod(int(d) for d in program.space)
        right = placed(right, r.kind, height, r.cols).reshape(v.type.bound({}))
        if mine.dtype == torch.float8_e4m3fn:
            codes_close(mine.cpu(), right.to(torch.float8_e4m3fn), f"{region.name} {v}")
        elif mine.dtype == torch.uint8:
            assert (mine.cpu() != right.to(torch.uint8)).float().mean() < 0.02
        else:
            close(mine.cpu(), right, f"{region.name} {v}")
    values = interpret(region, {name: t.cpu() for name, t in given.items()}, REGISTRY)
    jumps = any(n.op == "quantize_e5m6" or dict(n.attrs).get("power_of_two") for n in region.nodes)
    for v, mine in zip(region.results, outputs, strict=True):
        note = f"{region.name} {v} against the references"
        if mine.dtype is torch.float32 and jumps:  # a power of two may be the next one where a number was rounded
            factor = (mine.cpu() / values[v.name]).nan_to_num(1.0)
            assert (factor - 1).abs().max() <= 1 and ((factor - 1).abs() > 0.05).float().mean() < 0.05, note
        elif mine.dtype in (torch.float32, torch.bfloat16):
            close(mine.cpu(), values[v.name], note, 0.05)


def as_rows(t: torch.Tensor, o: RegionOperand, program: RegionProgram) -> torch.Tensor:
    """An operand as `evaluate` takes it: [rows, columns] in float32."""
    t = t.float()
    if o.kind == "prefix":
        space = [int(d) for d in program.space]
        first = space[: program.prefix]
        t = t.view(*first, *[1] * (len(space) - len(first)), o.cols).expand(*space, o.cols)
    return t.reshape(-1, o.cols) if o.cols else t.reshape(-1, 1)
