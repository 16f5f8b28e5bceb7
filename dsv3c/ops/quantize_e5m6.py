"""E5M6, the 12-bit form of the attention output (report, section 3.3.3), packed in bytes.

float16's exponents, 6 bits of mantissa, saturating at 65024; scales per tile of 128 are powers of two, amax/65024 or
the next above. In memory a row of n numbers is n bytes with the upper 8 bits of each, then n/2 bytes with the lower 4
bits of columns j (low half of the byte) and j + n/2. Negative zero becomes zero; a number that is not finite becomes
zero under a scale of NaN. The row programs work on the bits as numbers, which float32 holds exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.dims import ceil_div, same
from dsv3c.ir import DTYPES, DType, Type
from dsv3c.lazy import lazy
from dsv3c.op import NO_GRADIENT, Effect, OpDef, Sample, Split, expect, io_cost
from dsv3c.ops.quantize import (
    TILE,
    amax_row,
    expect_dtype,
    expect_quantizable,
    scale,
    scale_row,
    spread,
    spread_row,
    tiles,
)
from dsv3c.rows import Row, Rowwise, binary, columns, join, rounded, select, unary
from dsv3c.tensors import round_to, torch_dtype, wide

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

E5M6_MAX = 65024.0


def _infer_e5m6(x: Type) -> tuple[Type, Type]:
    expect_quantizable(x, True)
    last = x.shape[-1] if x.rank else 1
    if not isinstance(last, int) or last % 2:
        expect(False, f"the last axis of {x} must be an even number: two columns share a byte")
        raise AssertionError
    return Type(DType.u8, (*x.shape[:-1], last // 2 * 3)), Type(DType.f32, (*x.shape[:-1], ceil_div(last, TILE)))


def _quantize_e5m6(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    v, half = wide(x), x.shape[-1] // 2
    s = scale(tiles(v.abs()).amax(-1), E5M6_MAX, True)
    value = round_to(v * spread(1.0 / s.to(v.dtype), x.shape[-1]), DType.e5m6)
    value = torch.where(value.isfinite() & (value != 0), value, 0.0)
    code = value.half().view(torch.int16).int() >> 4 & 0xFFF
    low = code & 15
    return torch.cat((code >> 4, low[..., :half] | low[..., half:] << 4), -1).to(torch.uint8), s


def _code_row(value: Row) -> tuple[Row, Row]:
    """The upper 8 and the lower 4 bits of an E5M6 number: the upper 12 of float16."""
    bits = select(binary("equal", value, 0.0), 0.0, unary("half_bits", value))
    upper = unary("floor", bits * (1 / 256))
    return upper, (bits - upper * 256.0) * (1 / 16)


def _scaled_row(x: Row) -> tuple[Row, Row]:
    s = scale_row(amax_row(x), E5M6_MAX, True)
    value = rounded(x * spread_row(1.0 / s, x.cols), DType.e5m6)
    return select(binary("less", unary("abs", value), float("inf")), value, 0.0), s


def _quantize_e5m6_row(x: Row) -> tuple[Row, Row]:
    half = x.cols // 2
    if half % TILE == 0:  # each half has tiles of its own
        made = [_scaled_row(columns(x, start, start + half)) for start in (0, half)]
        value, s = (join(*parts) for parts in zip(*made, strict=True))
    else:
        value, s = _scaled_row(x)
    left, right = (_code_row(columns(value, start, start + half)) for start in (0, half))
    return join(left[0], right[0], left[1] + right[1] * 16.0), s


QUANTIZE_E5M6 = OpDef(
    name="quantize_e5m6",
    doc="x[..., n] in 1×128 tiles of packed E5M6 with power-of-two scales: u8[..., 3n/2], f32[..., ⌈n/128⌉] (3.3.3).",
    infer=_infer_e5m6,
    reference=_quantize_e5m6,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(Split((0,), (0, 0)),),
    effect=Effect.PURE,
    rows=Rowwise(("row",), ("row", "row"), _quantize_e5m6_row),
    aliases=(),
    view=False,
    samples=tuple(Sample((Type(d, (2, 4, n)),)) for d in (DType.f32, DType.bf16) for n in (256, 70, 330)),
)


def _infer_dequantize_e5m6(q: Type, s: Type, *, dtype: str) -> Type:
    expect(q.dtype is DType.u8 and q.rank >= 1, f"expected packed E5M6 u8[..., 3n/2], got {q}")
    last = q.shape[-1]
    if not isinstance(last, int) or last % 3:
        expect(False, f"the last axis of {q} must be a multiple of 3: packed E5M6 takes 3 bytes for 2 numbers")
        raise AssertionError
    n = last // 3 * 2
    expect(
        len(s.shape) == q.rank and all(map(same, s.shape, (*q.shape[:-1], ceil_div(n, TILE)))) and s.dtype is DType.f32,
        f"{s} does not fit 1×128 tiles of {n} numbers of {q}",
    )
    return Type(expect_dtype(dtype), (*q.shape[:-1], n))


def _dequantize_e5m6(q: torch.Tensor, s: torch.Tensor, *, dtype: str) -> torch.Tensor:
    n = q.shape[-1] // 3 * 2
    upper, packed = q[..., :n].int(), q[..., n:].int()
    code = upper << 4 | torch.cat((packed & 15, packed >> 4), -1)
    fraction, exponent = code & 63, (code >> 6 & 31).clamp(min=1)
    size = torch.ldexp((fraction + torch.where(code >> 6 & 31 == 0, 0, 64)).float(), exponent - 21)
    return (torch.where(code >= 2048, -size, size) * spread(s, n)).to(torch_dtype(DTYPES[dtype]))


def _value_row(upper: Row, low: Row) -> Row:
    """The number of an E5M6 code."""
    return unary("half_of_bits", upper * 256.0 + low * 16.0)


def _dequantize_e5m6_row(q: Row, s: Row, *, dtype: str) -> Row:
    half = q.cols // 3
    packed = columns(q, 2 * half, 3 * half)
    right = unary("floor", packed * (1 / 16))
    values = (
        _value_row(columns(q, 0, half), packed - right * 16.0),
        _value_row(columns(q, half, 2 * half), right),
    )
    return join(*values) * spread_row(s, 2 * half)


def _packed(*shape: int, dtype: str) -> Sample:
    types = _infer_e5m6(Type(DType.f32, shape))
    return Sample(types, (("dtype", dtype),), lambda g: _quantize_e5m6(torch.randn(shape, generator=g)))


DEQUANTIZE_E5M6 = OpDef(
    name="dequantize_e5m6",
    doc="x[..., n] from packed E5M6 u8[..., 3n/2] and its scales f32[..., ⌈n/128⌉], in the element type `dtype`.",
    infer=_infer_dequantize_e5m6,
    reference=_dequantize_e5m6,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(Split((0, 0), (0,)),),
    effect=Effect.PURE,
    rows=Rowwise(("row", "row"), ("row",), _dequantize_e5m6_row),
    aliases=(),
    view=False,
    samples=(_packed(2, 4, 256, dtype="bf16"), _packed(2, 330, dtype="f32")),
)
