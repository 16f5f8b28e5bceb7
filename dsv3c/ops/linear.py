"""Matrix products: a linear layer and its two gradients (Fprop, Dgrad, Wgrad), and MLA's absorbed projections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.dims import Dim, multiply, same
from dsv3c.ir import DType, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import NO_GRADIENT, SUM, Cost, Effect, OpDef, Sample, Split, bytes_of, expect, expect_float
from dsv3c.tensors import wide

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def matrix_cost(inputs: tuple[Type, ...], outputs: tuple[Type, ...], flops: Dim) -> Cost:
    """`flops` on the matrix unit; each input read and each output written once."""
    return Cost(flops=flops, bytes=bytes_of(*inputs, *outputs))


def gradient_dtype(dtype: DType) -> DType:
    """Weight gradients are float32, float64 in a float64 program (report, section 3.3.2)."""
    return DType.f64 if dtype is DType.f64 else DType.f32


def _expect_matrix(x: Type, w: Type, columns: int) -> None:
    expect_float(x, w)
    expect(w.rank == 2, f"the weight must be a matrix, got {w}")
    expect(x.rank >= 1 and same(x.shape[-1], w.shape[columns]), f"{x} does not fit the weight {w}")
    expect(x.dtype == w.dtype, f"{x} and the weight {w} differ in element type; cast one")


def _infer_linear(x: Type, w: Type) -> Type:
    _expect_matrix(x, w, 1)
    return Type(x.dtype, (*x.shape[:-1], w.shape[0]))


def _vjp_linear(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    x, w = node.inputs
    return b.linear_dgrad(dy, w), b.linear_wgrad(dy, x)


def _cost_linear(inputs: tuple[Type, ...], outputs: tuple[Type, ...]) -> Cost:
    x, w = inputs
    return matrix_cost(inputs, outputs, multiply(2, x.elements, w.shape[0]))


LINEAR = OpDef(
    name="linear",
    doc="y[..., N] = x[..., K] · w[N, K] transposed (Fprop).",
    infer=_infer_linear,
    reference=lambda x, w: torch.nn.functional.linear(x, w),
    cost=_cost_linear,
    vjp=_vjp_linear,
    shard=(Split((0, None), (0,)), Split((None, 0), (-1,)), Split((-1, -1), (SUM,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        Sample((Type(DType.f64, (2, 4, 6)), Type(DType.f64, (8, 6)))),
        Sample((Type(DType.bf16, (4, 6)), Type(DType.bf16, (2, 6)))),
    ),
)


def _infer_dgrad(dy: Type, w: Type) -> Type:
    _expect_matrix(dy, w, 0)
    return Type(dy.dtype, (*dy.shape[:-1], w.shape[1]))


def _vjp_dgrad(b: Builder, node: Node, g: Value) -> tuple[Value, ...]:
    dy, w = node.inputs
    return b.linear(g, w), b.linear_wgrad(dy, g)


def _cost_dgrad(inputs: tuple[Type, ...], outputs: tuple[Type, ...]) -> Cost:
    dy, w = inputs
    return matrix_cost(inputs, outputs, multiply(2, dy.elements, w.shape[1]))


LINEAR_DGRAD = OpDef(
    name="linear_dgrad",
    doc="dx[..., K] = dy[..., N] · w[N, K]: the input gradient of `linear` (Dgrad).",
    infer=_infer_dgrad,
    reference=lambda dy, w: torch.matmul(dy, w),
    cost=_cost_dgrad,
    vjp=_vjp_dgrad,
    shard=(Split((0, None), (0,)), Split((None, 1), (-1,)), Split((-1, 0), (SUM,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 4, 8)), Type(DType.f64, (8, 6)))),),
)


def _infer_wgrad(dy: Type, x: Type) -> Type:
    expect_float(dy, x)
    expect(dy.rank == x.rank and dy.rank >= 2, f"expected tensors of one rank, got {dy} and {x}")
    expect(all(map(same, dy.shape[:-1], x.shape[:-1])), f"the rows of {dy} and {x} differ")
    return Type(gradient_dtype(dy.dtype), (dy.shape[-1], x.shape[-1]))


def _wgrad_reference(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("rn,rk->nk", wide(dy).flatten(0, -2), wide(x).flatten(0, -2))


def _vjp_wgrad(b: Builder, node: Node, g: Value) -> tuple[Value, ...]:
    dy, x = node.inputs
    w = b.cast(g, dtype=str(dy.type.dtype))
    return b.linear(x, w), b.linear_dgrad(dy, w)


def _cost_wgrad(inputs: tuple[Type, ...], outputs: tuple[Type, ...]) -> Cost:
    dy, x = inputs
    return matrix_cost(inputs, outputs, multiply(2, dy.elements, x.shape[-1]))


LINEAR_WGRAD = OpDef(
    name="linear_wgrad",
    doc="dw[N, K] = dy[..., N] transposed · x[..., K], summed over all rows, in float32 (Wgrad).",
    infer=_infer_wgrad,
    reference=_wgrad_reference,
    cost=_cost_wgrad,
    vjp=_vjp_wgrad,
    shard=(Split((0, 0), (SUM,)), Split((-1, None), (0,)), Split((None, -1), (1,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 4, 8)), Type(DType.f64, (2, 4, 6)))),),
)


def _heads(kv_b: torch.Tensor, heads: int) -> torch.Tensor:
    """kv_b_proj [heads*(key+value), rank] -> [heads, key+value, rank]."""
    return kv_b.reshape(heads, -1, kv_b.shape[-1])


def _infer_absorb_query(q: Type, kv_b: Type) -> Type:
    expect_float(q, kv_b)
    expect(q.rank >= 2 and kv_b.rank == 2, f"expected q[..., heads, key], kv_b[heads*(key+v), rank], got {q}, {kv_b}")
    return Type(q.dtype, (*q.shape[:-1], kv_b.shape[1]))


def _cost_absorb(inputs: tuple[Type, ...], outputs: tuple[Type, ...], **_: object) -> Cost:
    x, _kv_b = inputs
    return matrix_cost(inputs, outputs, multiply(2, x.elements, outputs[0].shape[-1]))


ABSORB_QUERY = OpDef(
    name="absorb_query",
    doc="Queries q[..., heads, key] to the latent space [..., heads, rank] by kv_b_proj's key half (section 2.1.1).",
    infer=_infer_absorb_query,
    reference=lambda q, kv_b: torch.einsum("...ha,har->...hr", q, _heads(kv_b, q.shape[-2])[:, : q.shape[-1]]),
    cost=_cost_absorb,
    vjp=NO_GRADIENT,
    shard=(Split((0, None), (0,)), Split((-2, 0), (-2,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (4, 1, 2, 4)), Type(DType.f64, (2 * (4 + 3), 5)))),),
)


def _infer_absorb_value(o: Type, kv_b: Type, *, value: int) -> Type:
    expect_float(o, kv_b)
    expect(o.rank >= 2 and kv_b.rank == 2, f"expected o[..., heads, rank], kv_b[heads*(key+v), rank], got {o}, {kv_b}")
    expect(same(o.shape[-1], kv_b.shape[1]), f"{o} is not in the latent space of {kv_b}")
    return Type(o.dtype, (*o.shape[:-1], value))


ABSORB_VALUE = OpDef(
    name="absorb_value",
    doc="Bring o[..., heads, rank] back to values [..., heads, value] by kv_b_proj's value half (section 2.1.1).",
    infer=_infer_absorb_value,
    reference=lambda o, kv_b, *, value: torch.einsum("...hr,hvr->...hv", o, _heads(kv_b, o.shape[-2])[:, -value:]),
    cost=_cost_absorb,
    vjp=NO_GRADIENT,
    shard=(Split((0, None), (0,)), Split((-2, 0), (-2,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (4, 1, 2, 5)), Type(DType.f64, (2 * (4 + 3), 5))), (("value", 3),)),),
)
