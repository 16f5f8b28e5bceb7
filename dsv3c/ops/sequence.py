"""Ops on sequences as a whole: a result under another name, the last position, which document a token is in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.ir import DType, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import NO_GRADIENT, Cost, Effect, OpDef, Sample, Split, expect, io_cost

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


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


def _infer_documents(tokens: Type, *, end: int) -> Type:
    expect(tokens.rank == 2 and tokens.dtype is DType.i64, f"expected tokens i64[B, S], got {tokens}")
    return Type(DType.i32, tokens.shape)


def _documents(tokens: torch.Tensor, *, end: int) -> torch.Tensor:
    ends = (tokens == end).to(torch.int32)
    return (ends.cumsum(-1) - ends).to(torch.int32)


DOCUMENTS = OpDef(
    name="documents",
    doc="Which document of its packed sequence each token i64[B, S] is in, i32[B, S]; the token `end` closes one.",
    infer=_infer_documents,
    reference=_documents,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(Split((0,), (0,)),),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        Sample(
            (Type(DType.i64, (2, 6)),),
            (("end", 1),),
            lambda generator: (torch.randint(0, 3, (2, 6), generator=generator),),
        ),
    ),
)
