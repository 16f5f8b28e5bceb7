"""Ops that treat every number alone: sums, products, casts, the sigmoid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.ir import DTYPES, DType, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import NO_GRADIENT, Effect, OpDef, Sample, Split, expect, expect_float, io_cost
from dsv3c.rows import Row, Rowwise, rounded
from dsv3c.rows import sigmoid as sigmoid_row
from dsv3c.tensors import round_to, torch_dtype, wide

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

ONE = (Split((0,), (0,)), Split((-1,), (-1,)))
"""How an op of one input divides that treats every number alone."""
TWO = (Split((0, 0), (0,)), Split((-1, -1), (-1,)))
"""The same with two inputs."""


def _infer_same(x: Type, y: Type) -> Type:
    expect_float(x, y)
    expect(x.shape == y.shape, f"the shapes of {x} and {y} differ")
    expect(x.dtype == y.dtype, f"{x} and {y} differ in element type; cast one")
    return x


def _infer_one(x: Type) -> Type:
    expect_float(x)
    return x


def _vjp_add(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    return dy, dy


ADD = OpDef(
    name="add",
    doc="z = x + y, all of one shape and element type.",
    infer=_infer_same,
    reference=lambda x, y: (wide(x) + wide(y)).to(x.dtype),
    cost=io_cost,
    vjp=_vjp_add,
    shard=TWO,
    effect=Effect.PURE,
    rows=Rowwise(("row", "row"), ("row",), lambda x, y: x + y),
    aliases=((0, 0), (1, 0)),
    view=False,
    samples=(
        Sample((Type(DType.f64, (2, 3, 4)), Type(DType.f64, (2, 3, 4)))),
        Sample((Type(DType.bf16, (4, 6)), Type(DType.bf16, (4, 6)))),
    ),
)


def _vjp_multiply(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    x, y = node.inputs
    return b.multiply(dy, y), b.multiply(dy, x)


MULTIPLY = OpDef(
    name="multiply",
    doc="z = x * y, all of one shape and element type.",
    infer=_infer_same,
    reference=lambda x, y: (wide(x) * wide(y)).to(x.dtype),
    cost=io_cost,
    vjp=_vjp_multiply,
    shard=TWO,
    effect=Effect.PURE,
    rows=Rowwise(("row", "row"), ("row",), lambda x, y: x * y),
    aliases=((0, 0), (1, 0)),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 4)), Type(DType.f64, (2, 3, 4)))),),
)


def _infer_scale(x: Type, *, by: float) -> Type:
    expect(isinstance(by, int | float), f"the factor must be a number, got {by!r}")
    return _infer_one(x)


def _vjp_scale(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    return (b.scale(dy, by=node.attr("by")),)


SCALE = OpDef(
    name="scale",
    doc="y = x times the constant `by`.",
    infer=_infer_scale,
    reference=lambda x, *, by: (wide(x) * by).to(x.dtype),
    cost=io_cost,
    vjp=_vjp_scale,
    shard=ONE,
    effect=Effect.PURE,
    rows=Rowwise(("row",), ("row",), lambda x, *, by: x * by),
    aliases=((0, 0),),
    view=False,
    samples=(
        Sample((Type(DType.f64, (2, 3, 4)),), (("by", -0.3),)),
        Sample((Type(DType.f64, ()),), (("by", 3),)),
    ),
)


def _infer_cast(x: Type, *, dtype: str) -> Type:
    expect_float(x)
    expect(dtype in DTYPES and DTYPES[dtype].is_float, f"expected the name of a floating-point type, got {dtype!r}")
    return x.with_dtype(DTYPES[dtype])


def _cast(x: torch.Tensor, *, dtype: str) -> torch.Tensor:
    return round_to(wide(x), DTYPES[dtype]).to(torch_dtype(DTYPES[dtype]), copy=True)


def _vjp_cast(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    (x,) = node.inputs
    return (b.cast(dy, dtype=str(x.type.dtype)),)


def _cast_row(x: Row, *, dtype: str) -> Row:
    """Rows are float32 at least, so only narrower types round; the rest is rounded where the result is stored."""
    return rounded(x, DTYPES[dtype]) if DTYPES[dtype].bits < 32 else x


CAST = OpDef(
    name="cast",
    doc="y = x in the element type `dtype`, rounded to nearest even; e4m3 and e5m6 saturate.",
    infer=_infer_cast,
    reference=_cast,
    cost=io_cost,
    vjp=_vjp_cast,
    shard=ONE,
    effect=Effect.PURE,
    rows=Rowwise(("row",), ("row",), _cast_row),
    aliases=(),
    view=False,
    samples=(
        Sample((Type(DType.f64, (2, 3, 4)),), (("dtype", "f64"),)),
        Sample((Type(DType.f64, (4, 6)),), (("dtype", "f32"),)),
        Sample((Type(DType.f32, (4, 6)),), (("dtype", "bf16"),)),
        Sample((Type(DType.bf16, (4, 6)),), (("dtype", "f32"),)),
        Sample((Type(DType.f32, (4, 6)),), (("dtype", "e4m3"),)),
    ),
)


def _vjp_sigmoid(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    return (b.sigmoid_grad(dy, node.output),)


SIGMOID = OpDef(
    name="sigmoid",
    doc="y = 1 / (1 + exp(-x)).",
    infer=_infer_one,
    reference=lambda x: torch.sigmoid(wide(x)).to(x.dtype),
    cost=io_cost,
    vjp=_vjp_sigmoid,
    shard=ONE,
    effect=Effect.PURE,
    rows=Rowwise(("row",), ("row",), lambda x: sigmoid_row(x)),
    aliases=((0, 0),),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 4)),)),),
)


SIGMOID_GRAD = OpDef(
    name="sigmoid_grad",
    doc="dx = dy * y * (1 - y): the gradient of `sigmoid` from its output y.",
    infer=_infer_same,
    reference=lambda dy, y: (wide(dy) * wide(y) * (1 - wide(y))).to(dy.dtype),
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=TWO,
    effect=Effect.PURE,
    rows=Rowwise(("row", "row"), ("row",), lambda dy, y: dy * y * (1.0 - y)),
    aliases=((0, 0), (1, 0)),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 4)), Type(DType.f64, (2, 3, 4)))),),
)


def _vjp_copy(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    return (dy,)


COPY = OpDef(
    name="copy",
    doc="y = x in memory of its own, whatever the strides of x.",
    infer=_infer_one,
    reference=lambda x: x.clone(memory_format=torch.contiguous_format),
    cost=io_cost,
    vjp=_vjp_copy,
    shard=ONE,
    effect=Effect.PURE,
    rows=Rowwise(("row",), ("row",), lambda x: x),
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 4)),)),),
)
