"""SwiGLU and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.ir import DType, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import NO_GRADIENT, Effect, OpDef, Sample, expect, expect_float, io_cost, split_rows
from dsv3c.rows import Row, Rowwise, columns, join, sigmoid
from dsv3c.tensors import wide

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def _infer_swiglu(gu: Type) -> Type:
    expect_float(gu)
    expect(gu.rank >= 1, f"expected [..., 2*I], got {gu}")
    last = gu.shape[-1]
    if not isinstance(last, int) or last % 2:
        expect(False, f"the last axis of {gu} must be an even number: gate, then up")
        raise AssertionError
    return Type(gu.dtype, (*gu.shape[:-1], last // 2))


def _swiglu(gu: torch.Tensor) -> torch.Tensor:
    gate, up = wide(gu).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gu.dtype)


def _vjp_swiglu(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    return (b.swiglu_grad(dy, *node.inputs),)


def _halves(gu: Row) -> tuple[Row, Row]:
    half = gu.cols // 2
    return columns(gu, 0, half), columns(gu, half, gu.cols)


def _swiglu_row(gu: Row) -> Row:
    gate, up = _halves(gu)
    return gate * sigmoid(gate) * up


SWIGLU_ROWS = Rowwise(("row",), ("row",), _swiglu_row)

SWIGLU = OpDef(
    name="swiglu",
    doc="y[..., I] = silu(gate) * up, where gu[..., 2*I] holds gate, then up.",
    infer=_infer_swiglu,
    reference=_swiglu,
    cost=io_cost,
    vjp=_vjp_swiglu,
    shard=split_rows(SWIGLU_ROWS),
    effect=Effect.PURE,
    rows=SWIGLU_ROWS,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 8)),)),),
)


def _infer_swiglu_grad(dy: Type, gu: Type) -> Type:
    expect(dy == _infer_swiglu(gu), f"the gradient {dy} does not fit {gu}")
    return gu


def _swiglu_grad(dy: torch.Tensor, gu: torch.Tensor) -> torch.Tensor:
    gate, up = wide(gu).chunk(2, -1)
    g, s = wide(dy), torch.sigmoid(gate)
    return torch.cat((g * up * s * (1 + gate * (1 - s)), g * gate * s), -1).to(gu.dtype)


def _swiglu_grad_row(dy: Row, gu: Row) -> Row:
    gate, up = _halves(gu)
    s = sigmoid(gate)
    return join(dy * up * s * (1.0 + gate * (1.0 - s)), dy * gate * s)


SWIGLU_GRAD_ROWS = Rowwise(("row", "row"), ("row",), _swiglu_grad_row)

SWIGLU_GRAD = OpDef(
    name="swiglu_grad",
    doc="The gradient of `swiglu` with respect to gu[..., 2*I], from dy[..., I] and gu.",
    infer=_infer_swiglu_grad,
    reference=_swiglu_grad,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=split_rows(SWIGLU_GRAD_ROWS),
    effect=Effect.PURE,
    rows=SWIGLU_GRAD_ROWS,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 4)), Type(DType.f64, (2, 3, 8)))),),
)
