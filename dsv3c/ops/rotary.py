"""Rotary position embedding with YaRN: the table of cosines and sines, and the rotation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.dims import multiply
from dsv3c.ir import DTYPES, DType, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import NO_GRADIENT, Cost, Effect, OpDef, Sample, Split, bytes_of, expect, expect_float, split_rows
from dsv3c.rows import Row, Rowwise, columns, join
from dsv3c.rows import interleave as alternate
from dsv3c.tensors import wide

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def _infer_table(positions: Type, *, dim: int, base: float, factor: float, original: int, beta_fast: float,
                 beta_slow: float, magnitude: float, dtype: str) -> tuple[Type, ...]:  # fmt: skip
    expect(dtype in ("f32", "f64"), f"a rotary table is f32 or f64, not {dtype}")
    expect(positions.dtype is DType.i32 and positions.rank == 2, f"expected positions i32[B, S], got {positions}")
    expect(isinstance(dim, int) and dim > 0 and dim % 2 == 0, f"the rotary size must be even, got {dim!r}")
    expect(base > 1 and factor > 0 and original > 0, "base must exceed 1, factor and original 0")
    expect(beta_fast > 0 and beta_slow > 0, "beta_fast and beta_slow must be positive")
    table = Type(DTYPES[dtype], (*positions.shape, dim // 2))
    return table, table


def frequencies(*, dim: int, base: float, factor: float, original: int, beta_fast: float,
                beta_slow: float, dtype: torch.dtype) -> torch.Tensor:  # fmt: skip
    """Angle per position of each pair, [dim/2] of `dtype`; with `factor` other than 1 by YaRN (arXiv 2309.00071).

    YaRN keeps pairs that turn more than `beta_fast` times within `original` positions, slows those that turn less
    than `beta_slow` times by `factor`, and blends linearly between, from whole pair to whole pair.
    """
    period = base ** (torch.arange(0, dim, 2, dtype=dtype) / dim)
    if factor == 1.0:
        return 1.0 / period

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=dtype) - low) / width).clamp(0, 1)
    return 1.0 / (factor * period) * (1 - kept) + 1.0 / period * kept


def _table(positions: torch.Tensor, *, dim: int, base: float, factor: float, original: int, beta_fast: float,
           beta_slow: float, magnitude: float, dtype: str) -> tuple[torch.Tensor, ...]:  # fmt: skip
    number = torch.float64 if dtype == "f64" else torch.float32
    turn = frequencies(dim=dim, base=base, factor=factor, original=original, beta_fast=beta_fast, beta_slow=beta_slow,
                       dtype=number)  # fmt: skip
    angles = positions.to(number).unsqueeze(-1) * turn.to(positions.device)
    # The last bit of torch's cosine depends on where in memory a number stands: keep the layout of transformers.
    angles = torch.cat((angles, angles), -1)
    return tuple((f(angles) * magnitude)[..., : dim // 2].contiguous() for f in (torch.cos, torch.sin))


def _table_cost(inputs: tuple[Type, ...], outputs: tuple[Type, ...], **_: object) -> Cost:
    return Cost(vector_flops=multiply(40, outputs[0].elements), bytes=bytes_of(*inputs, *outputs))


ROTARY_TABLE = OpDef(
    name="rotary_table",
    doc="(cos, sin) [B, S, dim/2] of positions i32[B, S] in `dtype` (f32 or f64), times `magnitude`; `factor` other "
    "than 1 means YaRN.",
    infer=_infer_table,
    reference=_table,
    cost=_table_cost,
    vjp=NO_GRADIENT,
    shard=(Split((0,), (0, 0)),),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=tuple(
        Sample(
            (Type(DType.i32, (2, 5)),),
            (("dim", 16), ("base", 1e4), ("factor", factor), ("original", 64), ("beta_fast", 32.0), ("beta_slow", 1.0),
             ("magnitude", magnitude), ("dtype", dtype)),
            lambda generator: (torch.randint(0, 99, (2, 5), generator=generator, dtype=torch.int32),),
        )
        for factor, magnitude, dtype in ((1.0, 1.0, "f32"), (8.0, 1.2, "f32"), (8.0, 1.2, "f64"))
    ),
)  # fmt: skip


def _infer_rotary(x: Type, cos: Type, sin: Type, *, interleave: bool, inverse: bool) -> Type:
    expect_float(x)
    expect(x.rank in (3, 4), f"expected [B, S, D] or [B, S, H, D], got {x}")
    expect(cos == sin, f"the tables of cosines and sines differ: {cos} and {sin}")
    expect(cos.dtype in (DType.f32, DType.f64), f"a rotary table is f32 or f64, got {cos}")
    expect(cos.rank == 3 and cos.shape[:2] == x.shape[:2], f"the table {cos} does not fit {x}")
    expect(x.shape[-1] == multiply(2, cos.shape[-1]), f"the table {cos} does not have half the columns of {x}")
    return x


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleave: bool, inverse: bool) -> torch.Tensor:
    if x.dim() == 4:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if inverse:
        sin = -sin
    first, second = wide(x).unflatten(-1, (-1, 2)).unbind(-1) if interleave else wide(x).chunk(2, -1)
    turned = first * cos - second * sin, second * cos + first * sin
    return (torch.stack(turned, -1).flatten(-2) if interleave else torch.cat(turned, -1)).to(x.dtype)


def _vjp_rotary(b: Builder, node: Node, dy: Value) -> tuple[Value | None, ...]:
    _, cos, sin = node.inputs
    dx = b.rotary(dy, cos, sin, interleave=node.attr("interleave"), inverse=not node.attr("inverse"))
    return dx, None, None


def _rotary_row(x: Row, cos: Row, sin: Row, *, interleave: bool, inverse: bool) -> Row:
    if inverse:
        sin = -sin
    half = x.cols // 2
    pairs = (columns(x, 0, x.cols, 2), columns(x, 1, x.cols, 2))
    a, b = pairs if interleave else (columns(x, 0, half), columns(x, half, x.cols))
    turned = a * cos - b * sin, b * cos + a * sin
    return alternate(*turned) if interleave else join(*turned)


ROTARY_ROWS = Rowwise(("row", "prefix", "prefix"), ("row",), _rotary_row)


def _rotary_cost(inputs: tuple[Type, ...], outputs: tuple[Type, ...], **_: object) -> Cost:
    return Cost(vector_flops=multiply(3, outputs[0].elements), bytes=bytes_of(*inputs, *outputs))


def _draw(*shape: int) -> Callable[[torch.Generator], tuple[torch.Tensor, ...]]:
    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        angles = torch.randn((*shape[:2], shape[-1] // 2), generator=generator)
        return torch.randn(shape, generator=generator, dtype=torch.float64), angles.cos(), angles.sin()

    return draw


ROTARY = OpDef(
    name="rotary",
    doc="x[B, S, (H,) D] rotated by (cos, sin)[B, S, D/2]: pairs (2i, 2i+1) if `interleave`, "
    "else (i, i+D/2); back if `inverse`.",
    infer=_infer_rotary,
    reference=_rotary,
    cost=_rotary_cost,
    vjp=_vjp_rotary,
    shard=split_rows(ROTARY_ROWS),
    effect=Effect.PURE,
    rows=ROTARY_ROWS,
    aliases=(),
    view=False,
    samples=tuple(
        Sample(
            (Type(DType.f64, shape), Type(DType.f32, (2, 3, 4)), Type(DType.f32, (2, 3, 4))),
            (("interleave", interleaved), ("inverse", inverse)),
            _draw(*shape),
        )
        for shape, interleaved, inverse in (
            ((2, 3, 2, 8), True, False),
            ((2, 3, 2, 8), False, True),
            ((2, 3, 8), True, True),
            ((2, 3, 8), False, False),
        )
    ),
)
