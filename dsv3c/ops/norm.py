"""RMSNorm and its two gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.dims import same
from dsv3c.ir import DType, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import NO_GRADIENT, Effect, OpDef, Sample, expect, expect_float, io_cost, split_rows
from dsv3c.ops.linear import gradient_dtype
from dsv3c.rows import Row, Rowwise, mean, rsqrt
from dsv3c.tensors import wide

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

EPS = (("eps", 1e-6),)


def _infer_norm(x: Type, w: Type, *, eps: float) -> Type:
    expect_float(x, w)
    expect(w.rank == 1 and x.rank >= 1 and same(x.shape[-1], w.shape[0]), f"the weight {w} does not fit {x}")
    return x


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _norm(x: torch.Tensor, w: torch.Tensor, *, eps: float) -> torch.Tensor:
    return (wide(x) * _inverse_rms(wide(x), eps) * w).to(x.dtype)


def _vjp_norm(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    x, w = node.inputs
    eps = node.attr("eps")
    return b.rms_norm_dx(dy, x, w, eps=eps), b.rms_norm_dw(dy, x, eps=eps)


NORM_ROWS = Rowwise(("row", "column"), ("row",), lambda x, w, *, eps: x * rsqrt(mean(x * x) + eps) * w)

RMS_NORM = OpDef(
    name="rms_norm",
    doc="y = x / sqrt(mean(x²) + eps) · w over the last axis: x[..., n], w[n].",
    infer=_infer_norm,
    reference=_norm,
    cost=io_cost,
    vjp=_vjp_norm,
    shard=split_rows(NORM_ROWS),
    effect=Effect.PURE,
    rows=NORM_ROWS,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 8)), Type(DType.f64, (8,))), EPS),),
)


def _infer_dx(dy: Type, x: Type, w: Type, *, eps: float) -> Type:
    expect(dy.shape == x.shape, f"the gradient {dy} does not fit {x}")
    return _infer_norm(x, w, eps=eps)


def _dx(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, *, eps: float) -> torch.Tensor:
    v, g = wide(x), wide(dy) * w
    r = _inverse_rms(v, eps)
    return (r * (g - v * r * r * (g * v).mean(-1, keepdim=True))).to(x.dtype)


def _dx_row(dy: Row, x: Row, w: Row, *, eps: float) -> Row:
    r, g = rsqrt(mean(x * x) + eps), dy * w
    return r * (g - x * (r * r * mean(g * x)))


DX_ROWS = Rowwise(("row", "row", "column"), ("row",), _dx_row)

RMS_NORM_DX = OpDef(
    name="rms_norm_dx",
    doc="The gradient of `rms_norm` with respect to x, from dy[..., n], x[..., n], w[n].",
    infer=_infer_dx,
    reference=_dx,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=split_rows(DX_ROWS),
    effect=Effect.PURE,
    rows=DX_ROWS,
    aliases=((0, 0),),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 8)), Type(DType.f64, (2, 3, 8)), Type(DType.f64, (8,))), EPS),),
)


def _infer_dw(dy: Type, x: Type, *, eps: float) -> Type:
    expect_float(dy, x)
    expect(dy.shape == x.shape, f"the gradient {dy} does not fit {x}")
    return Type(gradient_dtype(x.dtype), x.shape[-1:])


def _dw(dy: torch.Tensor, x: torch.Tensor, *, eps: float) -> torch.Tensor:
    return (wide(dy) * wide(x) * _inverse_rms(wide(x), eps)).flatten(0, -2).sum(0)


DW_ROWS = Rowwise(("row", "row"), ("column",), lambda dy, x, *, eps: dy * x * rsqrt(mean(x * x) + eps))

RMS_NORM_DW = OpDef(
    name="rms_norm_dw",
    doc="The gradient of `rms_norm` with respect to w, summed over all rows, in float32.",
    infer=_infer_dw,
    reference=_dw,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=split_rows(DW_ROWS),
    effect=Effect.PURE,
    rows=DW_ROWS,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 8)), Type(DType.f64, (2, 3, 8))), EPS),),
)
