"""An op from outside: a gated MLP activation with a ReLU gate, and its gradient; each states its row program, so both
are fused and get generated kernels on every target."""

from __future__ import annotations

import torch

from dsv3c.build import Builder
from dsv3c.ir import DType, Node, Type, Value
from dsv3c.op import NO_GRADIENT, Effect, OpDef, Sample, expect, expect_float, io_cost, split_rows
from dsv3c.ops import register
from dsv3c.rows import Row, Rowwise, binary, columns, join


def _infer(gate_up: Type) -> Type:
    expect_float(gate_up)
    width = gate_up.shape[-1]
    expect(isinstance(width, int) and width % 2 == 0, f"the last axis of {gate_up} must split into gate and up")
    return Type(gate_up.dtype, (*gate_up.shape[:-1], int(width) // 2))


def _reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate.relu() * up


def _rows(gate_up: Row) -> Row:
    half = gate_up.cols // 2
    return binary("max", columns(gate_up, 0, half), 0.0) * columns(gate_up, half, gate_up.cols)


def _vjp(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    return (b.relu_glu_grad(dy, node.inputs[0]),)


ROWS = Rowwise(("row",), ("row",), _rows)

RELU_GLU = register(OpDef(
    name="relu_glu",
    doc="y[..., I] = relu(gate) · up of gate_up[..., 2I], gate first.",
    infer=_infer, reference=_reference, cost=io_cost, vjp=_vjp, shard=split_rows(ROWS), effect=Effect.PURE, rows=ROWS,
    aliases=(), view=False, samples=(Sample((Type(DType.f64, (2, 3, 8)),)),),
))  # fmt: skip


def _reference_grad(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.cat((dy * up * (gate > 0), dy * gate.relu()), -1)


def _rows_grad(dy: Row, gate_up: Row) -> Row:
    half = dy.cols
    gate, up = columns(gate_up, 0, half), columns(gate_up, half, gate_up.cols)
    return join(dy * up * binary("less", 0.0, gate), dy * binary("max", gate, 0.0))


GRAD_ROWS = Rowwise(("row", "row"), ("row",), _rows_grad)

RELU_GLU_GRAD = register(OpDef(
    name="relu_glu_grad",
    doc="The gradient of `relu_glu` from dy[..., I] and gate_up[..., 2I].",
    infer=lambda dy, gate_up: gate_up, reference=_reference_grad, cost=io_cost, vjp=NO_GRADIENT,
    shard=split_rows(GRAD_ROWS), effect=Effect.PURE, rows=GRAD_ROWS, aliases=(), view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 4)), Type(DType.f64, (2, 3, 8)))),),
))  # fmt: skip
