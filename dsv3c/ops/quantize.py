"""FP8 storage of tensors (report, section 3.3.2): quantizing in tiles and blocks, and back.

A tile is 128 neighbours on one axis, a block 128×128; each has one float32 scale, and a number is its code times its
scale. scale = amax/448, computed from the data at hand; q = e4m3(x · (1/scale)), all in float32, nearest even. The
scale is at least 2^-126, so that neither it nor its reciprocal leaves the normal numbers; an all-zero tile has scale 1;
a tile that holds NaN or an infinity has scale NaN, so that nothing computed from it can pass unseen. With
`power_of_two` the scale is the smallest power of two that is not smaller. What an axis lacks to a multiple of 128 makes
a smaller tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.dims import ceil_div, multiply
from dsv3c.ir import DTYPES, DType, Type
from dsv3c.lazy import lazy
from dsv3c.op import NO_GRADIENT, Effect, OpDef, Sample, Split, expect, expect_float, io_cost
from dsv3c.rows import (
    Row,
    Rowwise,
    binary,
    columns,
    join,
    largest,
    largest_down,
    repeat,
    rounded,
    select,
    unary,
)
from dsv3c.tensors import E4M3_MAX, round_to, torch_dtype, wide

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

TILE = 128
"""Numbers that share a scale along the quantized axis, and how many products are summed before promotion."""
LEAST_SCALE = 2.0**-126


def expect_tiles(q: Type, s: Type, what: str) -> None:
    """Raise IRError unless `q` e4m3[..., n] has the scales `s` f32[..., ⌈n/128⌉]."""
    expect(q.dtype is DType.e4m3 and q.rank >= 1, f"{what} must be e4m3[..., n], got {q}")
    expect(
        s == Type(DType.f32, (*q.shape[:-1], ceil_div(q.shape[-1], TILE))),
        f"{s} does not fit 1×128 tiles of {what} {q}",
    )


def expect_blocks(q: Type, s: Type, rank: int | None = None) -> None:
    """Raise IRError unless `q` e4m3[..., N, K] has the scales `s` f32[..., ⌈N/128⌉, ⌈K/128⌉]."""
    expect(q.dtype is DType.e4m3 and q.rank >= 2, f"a weight in blocks must be e4m3[..., N, K], got {q}")
    expect(rank is None or q.rank == rank, f"expected a weight of rank {rank}, got {q}")
    scales = Type(DType.f32, (*q.shape[:-2], *(ceil_div(d, TILE) for d in q.shape[-2:])))
    expect(s == scales, f"{s} does not fit 128×128 blocks of {q}")


def expect_quantizable(x: Type, power_of_two: bool) -> None:
    """Raise IRError unless `x` can be quantized, with or without power-of-two scales."""
    expect_float(x)
    expect(x.dtype.bits >= 16 and x.dtype is not DType.f16, f"expected bf16 or wider, got {x}")
    expect(isinstance(power_of_two, bool), f"power_of_two must be True or False, got {power_of_two!r}")


def expect_dtype(dtype: object) -> DType:
    """The element type called `dtype`; IRError unless it is a float of 16 bits or more."""
    known = isinstance(dtype, str) and dtype in DTYPES and DTYPES[dtype].is_float and DTYPES[dtype].bits >= 16
    expect(known, f"expected the name of a floating-point type of 16 bits or more, got {dtype!r}")
    return DTYPES[str(dtype)]


def _power_of_two_above(x: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))


def scale(amax: torch.Tensor, top: float, power_of_two: bool) -> torch.Tensor:
    """The float32 scale of tiles whose largest magnitudes are `amax`, for codes up to `top`."""
    s = (amax / top).clamp(min=LEAST_SCALE).float()
    finite = s.isfinite()
    s = _power_of_two_above(s.where(finite, 1.0)) if power_of_two else s
    return torch.where(amax == 0, 1.0, torch.where(finite, s, torch.nan))


def scale_row(amax: Row, top: float, power_of_two: bool) -> Row:
    """`scale` as a row program: the same operations in the same order."""
    plain = rounded(binary("max", amax / top, LEAST_SCALE), DType.f32)
    s = unary("power_of_two_above", plain) if power_of_two else plain
    s = select(binary("less", plain, float("inf")), s, float("nan"))
    return select(binary("equal", amax, 0.0), 1.0, s)


def tiles(x: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [..., ⌈n/128⌉, 128], zeros past the end."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % TILE))
    return padded.view(*x.shape[:-1], -1, TILE)


def spread(s: torch.Tensor, n: int, axis: int = -1) -> torch.Tensor:
    """Each scale for its 128 numbers: ⌈n/128⌉ becomes n on `axis`."""
    return s.repeat_interleave(TILE, axis).narrow(axis, 0, n)


def amax_row(x: Row) -> Row:
    """The largest magnitude of each tile."""
    size = unary("abs", x)
    whole = x.cols // TILE * TILE
    parts = [largest(columns(size, 0, whole), TILE)] if whole else []
    if x.cols > whole:
        parts.append(largest(columns(size, whole, x.cols), x.cols - whole))
    return join(*parts)


def spread_row(s: Row, cols: int) -> Row:
    """Each scale for the numbers of its tile, `cols` in all."""
    count, rest = divmod(cols, TILE)
    parts = [repeat(columns(s, 0, count), TILE)] if count else []
    if rest:
        parts.append(repeat(columns(s, count, count + 1), rest))
    return join(*parts)


def _infer_tile(x: Type, *, power_of_two: bool) -> tuple[Type, Type]:
    expect_quantizable(x, power_of_two)
    expect(x.rank >= 1, f"expected x[..., n], got {x}")
    return x.with_dtype(DType.e4m3), Type(DType.f32, (*x.shape[:-1], ceil_div(x.shape[-1], TILE)))


def _codes(x: torch.Tensor) -> torch.Tensor:
    return round_to(x, DType.e4m3).to(torch_dtype(DType.e4m3))


def _quantize_tile(x: torch.Tensor, *, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    v = wide(x)
    s = scale(tiles(v.abs()).amax(-1), E4M3_MAX, power_of_two)
    return _codes(v * spread(1.0 / s.to(v.dtype), x.shape[-1])), s


def _quantize_tile_row(x: Row, *, power_of_two: bool) -> tuple[Row, Row]:
    s = scale_row(amax_row(x), E4M3_MAX, power_of_two)
    return rounded(x * spread_row(1.0 / s, x.cols), DType.e4m3), s


def _samples(*shapes: tuple[int, ...]) -> tuple[Sample, ...]:
    kinds = ((DType.f32, False), (DType.bf16, True))
    return tuple(Sample((Type(d, s),), (("power_of_two", p),)) for s in shapes for d, p in kinds)


QUANTIZE_TILE = OpDef(
    name="quantize_tile",
    doc="x[..., n] in 1×128 tiles along the last axis: q e4m3[..., n], s f32[..., ⌈n/128⌉] (section 3.3.2).",
    infer=_infer_tile,
    reference=_quantize_tile,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(Split((0,), (0, 0)), Split((-1,), (-1, -1))),
    effect=Effect.PURE,
    rows=Rowwise(("row",), ("row", "row"), _quantize_tile_row),
    aliases=(),
    view=False,
    samples=_samples((2, 4, 256), (3, 133), (2, 3, 77)),
)


def _infer_rows(x: Type, *, power_of_two: bool) -> tuple[Type, Type]:
    expect_quantizable(x, power_of_two)
    expect(x.rank >= 2, f"expected x[..., n] with rows, got {x}")
    rows, n = multiply(*x.shape[:-1]), x.shape[-1]
    return Type(DType.e4m3, (n, rows)), Type(DType.f32, (n, ceil_div(rows, TILE)))


def _quantize_rows(x: torch.Tensor, *, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize_tile(x.flatten(0, -2).t().contiguous(), power_of_two=power_of_two)


def _quantize_rows_row(x: Row, *, power_of_two: bool) -> tuple[Row, Row]:
    s = scale_row(largest_down(unary("abs", x)), E4M3_MAX, power_of_two)
    return rounded(x * (1.0 / s), DType.e4m3), s


QUANTIZE_ROWS = OpDef(
    name="quantize_rows",
    doc="x[..., n] of R rows transposed, in 128×1 tiles of rows: q e4m3[n, R], s f32[n, ⌈R/128⌉]; operands of Wgrad.",
    infer=_infer_rows,
    reference=_quantize_rows,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(Split((0,), (1, 1)), Split((-1,), (0, 0))),
    effect=Effect.PURE,
    rows=Rowwise(("row",), ("turned", "turned_tile"), _quantize_rows_row),
    aliases=(),
    view=False,
    samples=_samples((2, 128, 6), (133, 5)),
)


def _infer_block(w: Type, *, power_of_two: bool) -> tuple[Type, Type]:
    expect_quantizable(w, power_of_two)
    expect(w.rank >= 2, f"expected w[..., N, K], got {w}")
    return w.with_dtype(DType.e4m3), Type(DType.f32, (*w.shape[:-2], *(ceil_div(d, TILE) for d in w.shape[-2:])))


def _spread_blocks(s: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    return spread(spread(s, cols), rows, -2)


def _quantize_block(w: torch.Tensor, *, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    v = wide(w)
    columnwise = tiles(v.abs()).amax(-1)
    amax = tiles(columnwise.transpose(-1, -2)).amax(-1).transpose(-1, -2)
    s = scale(amax, E4M3_MAX, power_of_two).contiguous()
    return _codes(v * _spread_blocks(1.0 / s.to(v.dtype), *w.shape[-2:])), s


QUANTIZE_BLOCK = OpDef(
    name="quantize_block",
    doc="w[..., N, K] in 128×128 blocks: q e4m3[..., N, K], s f32[..., ⌈N/128⌉, ⌈K/128⌉] (section 3.3.2).",
    infer=_infer_block,
    reference=_quantize_block,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(Split((-2,), (-2, -2)), Split((-1,), (-1, -1))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=_samples((256, 256), (2, 133, 201)),
)


def _blocks(*shape: int) -> tuple[Type, Type]:
    """Types of a weight in blocks."""
    return _infer_block(Type(DType.f32, shape), power_of_two=False)


def _draw_blocks(generator: torch.Generator, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize_block(torch.randn(shape, generator=generator), power_of_two=False)


def _infer_transpose(q: Type, s: Type) -> tuple[Type, Type]:
    expect_blocks(q, s)
    turned = [(*t.shape[:-2], t.shape[-1], t.shape[-2]) for t in (q, s)]
    return Type(q.dtype, turned[0]), Type(s.dtype, turned[1])


TRANSPOSE_BLOCKS = OpDef(
    name="transpose_blocks",
    doc="A weight in blocks q[..., N, K] as q[..., K, N], scales likewise: exact, for `linear_fp8_dgrad`.",
    infer=_infer_transpose,
    reference=lambda q, s: (q.transpose(-1, -2).contiguous(), s.transpose(-1, -2).contiguous()),
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(Split((-2, -2), (-1, -1)), Split((-1, -1), (-2, -2))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(Sample(_blocks(256, 256), (), lambda g: _draw_blocks(g, 256, 256)),),
)


def _infer_block_both(w: Type, *, power_of_two: bool) -> tuple[Type, ...]:
    q, s = _infer_block(w, power_of_two=power_of_two)
    return (q, s, *_infer_transpose(q, s))


def _quantize_block_both(w: torch.Tensor, *, power_of_two: bool) -> tuple[torch.Tensor, ...]:
    q, s = _quantize_block(w, power_of_two=power_of_two)
    return q, s, q.transpose(-1, -2).contiguous(), s.transpose(-1, -2).contiguous()


QUANTIZE_BLOCK_BOTH = OpDef(
    name="quantize_block_both",
    doc="`quantize_block` of w[..., N, K] and `transpose_blocks` of what it gives, in one pass over the weight.",
    infer=_infer_block_both,
    reference=_quantize_block_both,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(Split((-2,), (-2, -2, -1, -1)), Split((-1,), (-1, -1, -2, -2))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=_samples((256, 256), (2, 133, 201)),
)


def _infer_dequantize_tile(q: Type, s: Type, *, dtype: str) -> Type:
    expect_tiles(q, s, "q")
    return q.with_dtype(expect_dtype(dtype))


def _dequantize_tile(q: torch.Tensor, s: torch.Tensor, *, dtype: str) -> torch.Tensor:
    return (q.float() * spread(s, q.shape[-1])).to(torch_dtype(DTYPES[dtype]))


def _draw_tiles(generator: torch.Generator, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize_tile(torch.randn(shape, generator=generator), power_of_two=False)


def _tiled(*shape: int, dtype: str) -> Sample:
    types = _infer_tile(Type(DType.f32, shape), power_of_two=False)
    return Sample(types, (("dtype", dtype),), lambda g: _draw_tiles(g, *shape))


DEQUANTIZE_TILE = OpDef(
    name="dequantize_tile",
    doc="x[..., n] = q · s for 1×128 tiles q e4m3[..., n], s f32[..., ⌈n/128⌉], in the element type `dtype`.",
    infer=_infer_dequantize_tile,
    reference=_dequantize_tile,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(Split((0, 0), (0,)), Split((-1, -1), (-1,))),
    effect=Effect.PURE,
    rows=Rowwise(("row", "row"), ("row",), lambda q, s, *, dtype: q * spread_row(s, q.cols)),
    aliases=(),
    view=False,
    samples=(_tiled(2, 4, 256, dtype="bf16"), _tiled(3, 133, dtype="f32")),
)


def _infer_dequantize_block(q: Type, s: Type, *, dtype: str) -> Type:
    expect_blocks(q, s)
    return q.with_dtype(expect_dtype(dtype))


def _dequantize_block(q: torch.Tensor, s: torch.Tensor, *, dtype: str) -> torch.Tensor:
    return (q.float() * _spread_blocks(s, *q.shape[-2:])).to(torch_dtype(DTYPES[dtype]))


DEQUANTIZE_BLOCK = OpDef(
    name="dequantize_block",
    doc="w[..., N, K] = q · s for 128×128 blocks, in the element type `dtype`.",
    infer=_infer_dequantize_block,
    reference=_dequantize_block,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(Split((-2, -2), (-2,)), Split((-1, -1), (-1,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        Sample(_blocks(256, 256), (("dtype", "bf16"),), lambda g: _draw_blocks(g, 256, 256)),
        Sample(_blocks(2, 133, 201), (("dtype", "f32"),), lambda g: _draw_blocks(g, 2, 133, 201)),
    ),
)
