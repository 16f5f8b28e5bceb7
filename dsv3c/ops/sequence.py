"""Ops that only choose or rename: a result under another name, the last position of a sequence."""

from __future__ import annotations

from dsv3c.build import Builder
from dsv3c.ir import DType, Node, Type, Value
from dsv3c.op import NO_GRADIENT, Cost, Effect, OpDef, Sample, Split, expect


def _vjp_identity(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    return (dy,)


IDENTITY = OpDef(
    name="identity",
    doc="y = x under another name; no data moves.",
    infer=lambda x: x,
    reference=lambda x: x.view_as(x),
    cost=lambda inputs, outputs: Cost(),
    vjp=_vjp_identity,
    shard=(Split((0,), (0,)),),
    effect=Effect.PURE,
    rows=None,
    aliases=((0, 0),),
    view=True,
    samples=(Sample((Type(DType.f64, (2, 4)),)),),
)


def _infer_last(x: Type) -> Type:
    expect(x.rank >= 2, f"expected [B, S, ...], got {x}")
    return Type(x.dtype, (x.shape[0], 1, *x.shape[2:]))


LAST_POSITION = OpDef(
    name="last_position",
    doc="y[B, 1, ...] = the last position of x[B, S, ...]; no data moves.",
    infer=_infer_last,
    reference=lambda x: x[:, -1:],
    cost=lambda inputs, outputs: Cost(),
    vjp=NO_GRADIENT,
    shard=(Split((0,), (0,)),),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=True,
    samples=(Sample((Type(DType.f64, (2, 4, 3)),)),),
)
