"""The optimizer: gradient norm, clipping, and AdamW with moments in any precision (report, sections 3.3.3 and 4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.dims import multiply
from dsv3c.ir import DType, Type
from dsv3c.lazy import lazy
from dsv3c.op import (
    NO_GRADIENT,
    SUM,
    Cost,
    Effect,
    OpDef,
    Sample,
    Split,
    bytes_of,
    expect,
    expect_float,
    io_cost,
    split_rows,
)
from dsv3c.ops.linear import gradient_dtype
from dsv3c.ops.router import wide_of
from dsv3c.rows import Row, Rowwise, unary

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def _infer_squares(g: Type) -> Type:
    expect_float(g)
    return Type(gradient_dtype(g.dtype), ())


SUM_SQUARES = OpDef(
    name="sum_squares",
    doc="The sum of the squares of all numbers of g, in float32 (float64 for a float64 g): the gradient norm squared.",
    infer=_infer_squares,
    reference=lambda g: wide_of(g).square().sum(),
    cost=lambda inputs, outputs: Cost(vector_flops=multiply(2, inputs[0].elements), bytes=bytes_of(*inputs, *outputs)),
    vjp=NO_GRADIENT,
    shard=(Split((0,), (SUM,)),),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (10,)),)), Sample((Type(DType.f32, (10,)),))),
)


def _infer_clip(squares: Type, *, limit: float) -> Type:
    expect_float(squares)
    expect(squares.rank == 0, f"expected one number, got {squares}")
    expect(limit > 0, f"the largest gradient norm must be positive, got {limit}")
    return squares


def _one(*values: float) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(v, dtype=torch.float64) for v in values)


CLIP_SCALE = OpDef(
    name="clip_scale",
    doc="min(1, limit / (sqrt(squares) + 1e-6)): the factor that brings the gradient norm down to `limit`.",
    infer=_infer_clip,
    reference=lambda squares, *, limit: (limit / (squares.sqrt() + 1e-6)).clamp(max=1.0),
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        Sample((Type(DType.f64, ()),), (("limit", 1.0),), lambda generator: _one(16.0)),
        Sample((Type(DType.f64, ()),), (("limit", 1.0),), lambda generator: _one(0.25)),
    ),
)


def _infer_factors(lr: Type, step: Type, *, beta1: float, beta2: float, decay: float) -> tuple[Type, ...]:
    expect_float(lr, step)
    expect(lr.rank == step.rank == 0 and lr.dtype == step.dtype, f"lr and step must be one number, got {lr}, {step}")
    expect(0 <= beta1 < 1 and 0 <= beta2 < 1, f"beta1 and beta2 must be in [0, 1), got {beta1} and {beta2}")
    expect(decay >= 0, f"decay must not be negative, got {decay}")
    return lr, lr, lr


def _factors(
    lr: torch.Tensor, step: torch.Tensor, *, beta1: float, beta2: float, decay: float
) -> tuple[torch.Tensor, ...]:
    # 1 - beta**step cancels in its leading digits: float64 keeps it exact in float32 training.
    correction1, correction2 = (1 - torch.pow(beta, step.double()) for beta in (beta1, beta2))
    wide = lr.double()
    return tuple(t.to(lr.dtype) for t in (wide / correction1, correction2.rsqrt(), 1 - wide * decay))


ADAMW_FACTORS = OpDef(
    name="adamw_factors",
    doc="(rate, root, keep) of an AdamW step: lr/(1-beta1^step), 1/sqrt(1-beta2^step), 1-lr·decay; step is from 1.",
    infer=_infer_factors,
    reference=_factors,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        Sample(
            (Type(DType.f64, ()), Type(DType.f64, ())),
            (("beta1", 0.9), ("beta2", 0.95), ("decay", 0.1)),
            lambda generator: _one(1e-2, 3.0),
        ),
    ),
)


def _infer_adamw(
    w: Type, g: Type, m: Type, v: Type, scale: Type, rate: Type, root: Type, keep: Type,
    *, beta1: float, beta2: float, eps: float,
) -> tuple[Type, ...]:  # fmt: skip
    expect_float(w, g, m, v, scale, rate, root, keep)
    expect(w.dtype in (DType.f32, DType.f64), f"the master weight must be f32 or f64, got {w}")
    expect(
        w.shape == g.shape == m.shape == v.shape, f"weight, gradient and moments differ in shape: {w}, {g}, {m}, {v}"
    )
    for name, t in (("scale", scale), ("rate", rate), ("root", root), ("keep", keep)):
        expect(t.rank == 0, f"{name} must be one number, got {t}")
    expect(0 <= beta1 < 1 and 0 <= beta2 < 1, f"beta1 and beta2 must be in [0, 1), got {beta1} and {beta2}")
    expect(eps >= 0, f"eps must not be negative, got {eps}")
    return w, m, v


def _adamw(
    w: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor,
    scale: torch.Tensor, rate: torch.Tensor, root: torch.Tensor, keep: torch.Tensor,
    *, beta1: float, beta2: float, eps: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    grad = g.to(w.dtype) * scale.to(w.dtype)
    first = m.to(w.dtype) * beta1 + grad * (1 - beta1)
    second = v.to(w.dtype) * beta2 + grad * grad * (1 - beta2)
    moved = w * keep - rate * (first / (second.sqrt() * root + eps))
    return moved, first.to(m.dtype), second.to(v.dtype)


def _adamw_row(
    w: Row, g: Row, m: Row, v: Row, scale: Row, rate: Row, root: Row, keep: Row,
    *, beta1: float, beta2: float, eps: float,
) -> tuple[Row, ...]:  # fmt: skip
    grad = g * scale
    first = m * beta1 + grad * (1 - beta1)
    second = v * beta2 + grad * grad * (1 - beta2)
    return w * keep - rate * (first / (unary("sqrt", second) * root + eps)), first, second


def _cost_adamw(inputs: tuple[Type, ...], outputs: tuple[Type, ...], **_: object) -> Cost:
    """About 16 operations a weight."""
    return Cost(vector_flops=multiply(16, inputs[0].elements), bytes=bytes_of(*inputs, *outputs))


def _adamw_sample(dtype: DType, moments: DType) -> Sample:
    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        kind = torch.float64 if dtype is DType.f64 else torch.float32
        kept = {DType.f64: torch.float64, DType.f32: torch.float32, DType.bf16: torch.bfloat16}[moments]
        w, g, m, v = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(4))
        scale, rate, root, keep = (t.to(kind) for t in _one(0.5, 3e-2, 2.6, 0.999))
        return w.to(kind), g.to(kind), m.to(kept), v.square().to(kept), scale, rate, root, keep

    block, state, one = Type(dtype, (4, 6)), Type(moments, (4, 6)), Type(dtype, ())
    attrs = (("beta1", 0.9), ("beta2", 0.95), ("eps", 1e-8))
    return Sample((block, block, state, state, one, one, one, one), attrs, draw)


ADAMW_ROWS = Rowwise(("row", "row", "row", "row", *("single",) * 4), ("row", "row", "row"), _adamw_row)

ADAMW = OpDef(
    name="adamw",
    doc="One AdamW step on g · scale for weights w and moments m, v; rate, root and keep are those of adamw_factors.",
    infer=_infer_adamw,
    reference=_adamw,
    cost=_cost_adamw,
    vjp=NO_GRADIENT,
    shard=split_rows(ADAMW_ROWS),
    effect=Effect.PURE,
    rows=ADAMW_ROWS,
    aliases=((0, 0), (2, 1), (3, 2)),
    view=False,
    samples=(
        _adamw_sample(DType.f64, DType.f64),
        _adamw_sample(DType.f32, DType.f32),
        _adamw_sample(DType.f32, DType.bf16),
    ),
)
