"""Matrix products of quantized operands: FP32 promotion every 128 of the contracted axis (report, section 3.3.2).

What one product of 128 numbers gives is exact before it is rounded to float32 once; then it is scaled by both scales'
product and added, block after block, in float32. So the references give the same bits on every machine.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from dsv3c.dims import Dim, add, multiply, same
from dsv3c.ir import DType, Type
from dsv3c.lazy import lazy
from dsv3c.op import NO_GRADIENT, SUM, Cost, Effect, OpDef, Sample, Split, expect
from dsv3c.ops.experts import expect_offsets
from dsv3c.ops.linear import matrix_cost
from dsv3c.ops.quantize import QUANTIZE_BLOCK, QUANTIZE_ROWS, QUANTIZE_TILE, TILE, expect_blocks, expect_tiles

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def _product(x: torch.Tensor, y: torch.Tensor, sx: torch.Tensor, sy: torch.Tensor, start: int = 0,
             stop: int | None = None) -> torch.Tensor:  # fmt: skip
    """x[M, K] · y[N, K] transposed over columns start:stop, float32; sx[M, ⌈K/128⌉] and sy[N, ⌈K/128⌉] are scales."""
    total = torch.zeros(x.shape[0], y.shape[0], dtype=torch.float32, device=x.device)
    stop = x.shape[1] if stop is None else stop
    for b in range(start // TILE, -(-stop // TILE)):
        span = slice(max(start, b * TILE), min(stop, (b + 1) * TILE))
        part = (x[:, span].double() @ y[:, span].double().t()).float()
        total += part * (sx[:, b, None] * sy[None, :, b])
    return total


def _linear(q: torch.Tensor, s: torch.Tensor, w: torch.Tensor, ws: torch.Tensor) -> torch.Tensor:
    rows = ws.repeat_interleave(TILE, 0)[: w.shape[0]]
    y = _product(q.flatten(0, -2), w, s.flatten(0, -2), rows)
    return y.to(torch.bfloat16).view(*q.shape[:-1], w.shape[0])


def _infer_linear(q: Type, s: Type, w: Type, ws: Type) -> Type:
    expect_tiles(q, s, "the left operand")
    expect_blocks(w, ws, 2)
    expect(q.rank >= 2, f"expected rows q[..., K], got {q}")
    expect(same(q.shape[-1], w.shape[1]), f"{q} does not fit the weight {w}")
    return Type(DType.bf16, (*q.shape[:-1], w.shape[0]))


def _cost_linear(inputs: tuple[Type, ...], outputs: tuple[Type, ...]) -> Cost:
    return matrix_cost(inputs, outputs, multiply(2, inputs[0].elements, inputs[2].shape[-2]))


def _types(op: OpDef, *shape: Dim) -> tuple[Type, ...]:
    return op.infer_types((Type(DType.f32, shape),), (("power_of_two", False),))


def _draw(op: OpDef, generator: torch.Generator, *shape: int) -> tuple[torch.Tensor, ...]:
    made = op.reference(torch.randn(shape, generator=generator), power_of_two=False)
    assert isinstance(made, tuple)
    return made


def _sample(left: tuple[OpDef, tuple[int, ...]], right: tuple[OpDef, tuple[int, ...]],
            offsets: tuple[int, ...] = ()) -> Sample:  # fmt: skip
    """Quantized normal numbers of the given shapes, and the offsets of experts."""
    groups = (Type(DType.i32, (len(offsets),)),) if offsets else ()

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        last = (torch.tensor(offsets, dtype=torch.int32),) if offsets else ()
        return (*_draw(left[0], generator, *left[1]), *_draw(right[0], generator, *right[1]), *last)

    return Sample((*_types(left[0], *left[1]), *_types(right[0], *right[1]), *groups), (), draw)


LINEAR_FP8 = OpDef(
    name="linear_fp8",
    doc="y bf16[..., N] = x[..., K] · w[N, K] transposed (Fprop): x in 1×128 tiles, w in 128×128 blocks.",
    infer=_infer_linear,
    reference=_linear,
    cost=_cost_linear,
    vjp=NO_GRADIENT,
    shard=(
        Split((0, 0, None, None), (0,)),
        Split((None, None, 0, 0), (-1,)),
        Split((-1, -1, -1, -1), (SUM,)),
    ),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        _sample((QUANTIZE_TILE, (2, 4, 256)), (QUANTIZE_BLOCK, (256, 256))),
        _sample((QUANTIZE_TILE, (5, 201)), (QUANTIZE_BLOCK, (133, 201))),
    ),
)

LINEAR_FP8_DGRAD = OpDef(
    name="linear_fp8_dgrad",
    doc="dx bf16[..., K] = dy[..., N] · w[N, K] (Dgrad): dy in 1×128 tiles, the weight transposed, [K, N], in blocks.",
    infer=_infer_linear,
    reference=_linear,
    cost=_cost_linear,
    vjp=NO_GRADIENT,
    shard=LINEAR_FP8.shard,
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(_sample((QUANTIZE_TILE, (2, 4, 256)), (QUANTIZE_BLOCK, (256, 256))),),
)


def _expect_wgrad(dy: Type, dys: Type, x: Type, xs: Type) -> None:
    expect_tiles(dy, dys, "the output gradient")
    expect_tiles(x, xs, "the input")
    expect(dy.rank == 2 and x.rank == 2, f"expected dy[N, R] and x[K, R], got {dy} and {x}")
    expect(same(dy.shape[1], x.shape[1]), f"the rows of {dy} and {x} differ")


def _infer_wgrad(dy: Type, dys: Type, x: Type, xs: Type) -> Type:
    _expect_wgrad(dy, dys, x, xs)
    return Type(DType.f32, (dy.shape[0], x.shape[0]))


def _cost_wgrad(inputs: tuple[Type, ...], outputs: tuple[Type, ...]) -> Cost:
    dy, _dys, x, *_rest = inputs
    return matrix_cost(inputs, outputs, multiply(2, dy.elements, x.shape[0]))


LINEAR_FP8_WGRAD = OpDef(
    name="linear_fp8_wgrad",
    doc="dw f32[N, K] = dy[N, R] · x[K, R] transposed over rows R, both quantized by `quantize_rows` (Wgrad).",
    infer=_infer_wgrad,
    reference=lambda dy, dys, x, xs: _product(dy, x, dys, xs),
    cost=_cost_wgrad,
    vjp=NO_GRADIENT,
    shard=(
        Split((1, 1, 1, 1), (SUM,)),
        Split((0, 0, None, None), (0,)),
        Split((None, None, 0, 0), (1,)),
    ),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        _sample((QUANTIZE_ROWS, (256, 8)), (QUANTIZE_ROWS, (256, 6))),
        _sample((QUANTIZE_ROWS, (133, 3)), (QUANTIZE_ROWS, (133, 5))),
    ),
)


def _infer_grouped(q: Type, s: Type, w: Type, ws: Type, offsets: Type) -> Type:
    expect_tiles(q, s, "the left operand")
    expect_blocks(w, ws, 3)
    expect(q.rank == 2 and same(q.shape[1], w.shape[2]), f"{q} does not fit the weight {w}")
    expect_offsets(offsets, w.shape[0])
    return Type(DType.bf16, (q.shape[0], w.shape[1]))


def _grouped(q: torch.Tensor, s: torch.Tensor, w: torch.Tensor, ws: torch.Tensor,
             offsets: torch.Tensor) -> torch.Tensor:  # fmt: skip
    y = torch.zeros(q.shape[0], w.shape[1], dtype=torch.bfloat16, device=q.device)
    ends = offsets.tolist()
    for e, (start, stop) in enumerate(itertools.pairwise(ends)):
        if stop > start:
            y[start:stop] = _linear(q[start:stop], s[start:stop], w[e], ws[e])
    return y


OFFSETS = (0, 3, 3, 8, 9)
"""Four experts of 3, 0, 5 and 1 rows; the last of ten rows belongs to none."""

GROUPED_SAMPLE = _sample((QUANTIZE_TILE, (10, 256)), (QUANTIZE_BLOCK, (4, 256, 256)), OFFSETS)
GROUPED_SHARD = (Split((None, None, 1, 1, None), (-1,)), Split((-1, -1, -1, -1, None), (SUM,)))

GROUPED_LINEAR_FP8 = OpDef(
    name="grouped_linear_fp8",
    doc="y bf16[R, N]: rows offsets[e]:offsets[e+1] of x[R, K] in tiles times w[e] of w[E, N, K] in blocks; others 0.",
    infer=_infer_grouped,
    reference=_grouped,
    cost=_cost_linear,
    vjp=NO_GRADIENT,
    shard=GROUPED_SHARD,
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(GROUPED_SAMPLE,),
)

GROUPED_LINEAR_FP8_DGRAD = OpDef(
    name="grouped_linear_fp8_dgrad",
    doc="dx bf16[R, K]: the same for dy[R, N] in tiles and the transposed weights, [E, K, N], in blocks (Dgrad).",
    infer=_infer_grouped,
    reference=_grouped,
    cost=_cost_linear,
    vjp=NO_GRADIENT,
    shard=GROUPED_SHARD,
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(GROUPED_SAMPLE,),
)


def _infer_grouped_wgrad(dy: Type, dys: Type, x: Type, xs: Type, offsets: Type) -> Type:
    _expect_wgrad(dy, dys, x, xs)
    expect_offsets(offsets, None)
    return Type(DType.f32, (add(offsets.shape[0], -1), dy.shape[0], x.shape[0]))


def _grouped_wgrad(dy: torch.Tensor, dys: torch.Tensor, x: torch.Tensor, xs: torch.Tensor,
                   offsets: torch.Tensor) -> torch.Tensor:  # fmt: skip
    ends = offsets.tolist()
    return torch.stack([_product(dy, x, dys, xs, start, stop) for start, stop in itertools.pairwise(ends)])


GROUPED_LINEAR_FP8_WGRAD = OpDef(
    name="grouped_linear_fp8_wgrad",
    doc="dw f32[E, N, K]: dy[N, R] · x[K, R] transposed over each expert's rows offsets[e]:offsets[e+1] (Wgrad).",
    infer=_infer_grouped_wgrad,
    reference=_grouped_wgrad,
    cost=_cost_wgrad,
    vjp=NO_GRADIENT,
    shard=(Split((0, 0, None, None, None), (1,)), Split((None, None, 0, 0, None), (2,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        _sample((QUANTIZE_ROWS, (640, 8)), (QUANTIZE_ROWS, (640, 6)), (0, 128, 128, 384, 512)),
        _sample((QUANTIZE_ROWS, (150, 3)), (QUANTIZE_ROWS, (150, 5)), (0, 20, 149)),
    ),
)
