"""Sums over rows and over everything, their gradients, and rows scaled each by its own number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.dims import multiply
from dsv3c.ir import DType, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import SUM, Cost, Effect, OpDef, Sample, Split, bytes_of, expect, expect_float, io_cost
from dsv3c.ops.linear import gradient_dtype
from dsv3c.rows import Rowwise, total
from dsv3c.tensors import wide

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def _sum_cost(inputs: tuple[Type, ...], outputs: tuple[Type, ...]) -> Cost:
    return Cost(vector_flops=multiply(len(inputs), inputs[0].elements), bytes=bytes_of(*inputs, *outputs))


def _like(b: Builder, gradient: Value, x: Value) -> Value:
    """`gradient` in the element type of x."""
    same = gradient.type.dtype is x.type.dtype
    return gradient if same else b.cast(gradient, dtype=str(x.type.dtype))


def _infer_row_dot(x: Type, y: Type) -> Type:
    expect(x.shape == y.shape, f"the shapes of {x} and {y} differ")
    expect(x.dtype == y.dtype, f"{x} and {y} differ in element type; cast one")
    return _infer_row_sum(x)


def _vjp_row_dot(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    x, y = node.inputs
    return b.scale_rows(y, dy), b.scale_rows(x, dy)


ROW_DOT = OpDef(
    name="row_dot",
    doc="z[...] = the sum over the last axis of x[..., n] * y[..., n], in float32.",
    infer=_infer_row_dot,
    reference=lambda x, y: (wide(x) * wide(y)).sum(-1),
    cost=_sum_cost,
    vjp=_vjp_row_dot,
    shard=(Split((0, 0), (0,)), Split((-1, -1), (SUM,))),
    effect=Effect.PURE,
    rows=Rowwise(("row", "row"), ("scalar",), lambda x, y: total(x * y)),
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 4)), Type(DType.f64, (2, 3, 4)))),),
)


def _infer_row_sum(x: Type) -> Type:
    expect_float(x)
    expect(x.rank >= 1, f"expected rows [..., n], got {x}")
    return Type(gradient_dtype(x.dtype), x.shape[:-1])


def _vjp_sum(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    (x,) = node.inputs
    return (_like(b, b.spread(dy, x), x),)


ROW_SUM = OpDef(
    name="row_sum",
    doc="y[...] = the sum over the last axis of x[..., n], in float32.",
    infer=_infer_row_sum,
    reference=lambda x: wide(x).sum(-1),
    cost=_sum_cost,
    vjp=_vjp_sum,
    shard=(Split((0,), (0,)), Split((-1,), (SUM,))),
    effect=Effect.PURE,
    rows=Rowwise(("row",), ("scalar",), lambda x: total(x)),
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 4)),)),),
)


def _infer_scale_rows(x: Type, p: Type) -> Type:
    expect_float(x, p)
    expect(x.rank >= 1 and x.shape[:-1] == p.shape, f"{p} does not hold one number for each row of {x}")
    return x


def _vjp_scale_rows(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    x, p = node.inputs
    return b.scale_rows(dy, p), _like(b, b.row_dot(dy, x), p)


SCALE_ROWS = OpDef(
    name="scale_rows",
    doc="y[..., n] = x[..., n] * p[...], in the element type of x.",
    infer=_infer_scale_rows,
    reference=lambda x, p: (wide(x) * p.unsqueeze(-1)).to(x.dtype),
    cost=io_cost,
    vjp=_vjp_scale_rows,
    shard=(Split((0, 0), (0,)), Split((-1, None), (-1,))),
    effect=Effect.PURE,
    rows=Rowwise(("row", "scalar"), ("row",), lambda x, p: x * p),
    aliases=((0, 0),),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 4)), Type(DType.f64, (2, 3)))),),
)


def _infer_sum_all(x: Type) -> Type:
    expect_float(x)
    return Type(gradient_dtype(x.dtype), ())


SUM_ALL = OpDef(
    name="sum_all",
    doc="y[()] = the sum of all numbers of x, in float32.",
    infer=_infer_sum_all,
    reference=lambda x: wide(x).sum(),
    cost=_sum_cost,
    vjp=_vjp_sum,
    shard=(Split((0,), (SUM,)), Split((-1,), (SUM,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 4)),)),),
)


def _infer_spread(x: Type, like: Type) -> Type:
    expect_float(x)
    expect(x.shape == like.shape[: x.rank], f"{x} does not have the first axes of {like}")
    return like.with_dtype(x.dtype)


def _vjp_spread(b: Builder, node: Node, dy: Value) -> tuple[Value | None, ...]:
    x, like = node.inputs
    for _ in range(x.type.rank, like.type.rank):
        dy = b.row_sum(dy)
    return _like(b, dy, x), None


SPREAD = OpDef(
    name="spread",
    doc="y = x repeated along the last axes of `like`, whose first axes x has; a view of stride 0, `like` is not read.",
    infer=_infer_spread,
    reference=lambda x, like: x.reshape(*x.shape, *[1] * (like.dim() - x.dim())).expand(like.shape),
    cost=lambda inputs, outputs: Cost(),
    vjp=_vjp_spread,
    shard=(),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=True,
    samples=(
        Sample((Type(DType.f64, (2, 3)), Type(DType.f64, (2, 3, 4)))),
        Sample((Type(DType.f64, ()), Type(DType.f64, (2, 3)))),
    ),
)
