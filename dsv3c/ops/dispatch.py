"""Tokens to the ranks that hold their experts and back; on one rank both only flatten and restore the token axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.dims import multiply, same
from dsv3c.ir import DType, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import Cost, Effect, OpDef, Sample, Split, bytes_of, expect, expect_float, expect_integer
from dsv3c.ops.router import distinct_experts, expect_choices

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def _cost(inputs: tuple[Type, ...], outputs: tuple[Type, ...], **_: object) -> Cost:
    """Nothing is sent on one rank; the rows are read and written."""
    return Cost(bytes=bytes_of(*inputs, *outputs))


def _cost_view(inputs: tuple[Type, ...], outputs: tuple[Type, ...], **_: object) -> Cost:
    return Cost()


def _infer_dispatch(x: Type, e: Type, p: Type) -> tuple[Type, ...]:
    expect_float(x, p)
    expect(x.rank >= 2, f"expected rows of tokens, got {x}")
    expect_choices(x, e)
    expect(p.shape == e.shape, f"the weights {p} do not fit the choices {e}")
    tokens = multiply(*x.shape[:-1])
    rows = tuple(Type(t.dtype, (tokens, t.shape[-1])) for t in (x, e, p))
    return (*rows, Type(DType.i32, x.shape[:-1]))


def _dispatch(x: torch.Tensor, e: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, ...]:
    rows = tuple(t.flatten(0, -2) for t in (x, e, p))
    tokens = torch.arange(rows[0].shape[0], dtype=torch.int32, device=x.device)
    return (*rows, tokens.view(x.shape[:-1]))


def _vjp_dispatch(
    b: Builder, node: Node, dx: Value | None, de: Value | None, dp: Value | None, dhandle: Value | None
) -> tuple[Value | None, ...]:
    handle = node.outputs[3]
    return None if dx is None else b.combine(dx, handle), None, None if dp is None else b.combine(dp, handle)


def _dispatch_sample(dtype: DType) -> Sample:
    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        kind = torch.float64 if dtype is DType.f64 else torch.bfloat16
        x, p = (torch.randn(2, 3, n, generator=generator, dtype=torch.float64) for n in (4, 2))
        return x.to(kind), distinct_experts(generator, (2, 3), 2, 8), p if dtype is DType.f64 else p.float()

    wide = DType.f64 if dtype is DType.f64 else DType.f32
    return Sample((Type(dtype, (2, 3, 4)), Type(DType.i32, (2, 3, 2)), Type(wide, (2, 3, 2))), (), draw)


DISPATCH = OpDef(
    name="dispatch",
    doc="Send tokens x[..., d], choices e[..., k], weights p[..., k] to their experts' ranks as rows, with a handle.",
    infer=_infer_dispatch,
    reference=_dispatch,
    cost=_cost,
    vjp=_vjp_dispatch,
    shard=(),
    effect=Effect.COMM,
    rows=None,
    aliases=((0, 0), (1, 1), (2, 2)),
    view=False,
    samples=(_dispatch_sample(DType.f64), _dispatch_sample(DType.bf16)),
)


def _expect_handle(handle: Type) -> None:
    expect_integer(handle)
    expect(handle.rank >= 1, f"expected the handle of a dispatch, got {handle}")


def _infer_again(dy: Type, handle: Type) -> Type:
    expect_float(dy)
    _expect_handle(handle)
    fits = dy.rank == handle.rank + 1 and all(map(same, dy.shape[:-1], handle.shape))
    expect(fits, f"the tokens of {dy} are not those of the handle {handle}")
    return Type(dy.dtype, (handle.elements, dy.shape[-1]))


def _handle_sample(*shape: int, dtype: DType = DType.f64) -> Sample:
    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        handle = torch.arange(6, dtype=torch.int32).view(2, 3)
        return x if dtype is DType.f64 else x.bfloat16(), handle

    return Sample((Type(dtype, shape), Type(DType.i32, (2, 3))), (), draw)


DISPATCH_AGAIN = OpDef(
    name="dispatch_again",
    doc="Send dy[..., d] along the routes of an earlier dispatch, as rows [D, d]: the gradient of `combine`.",
    infer=_infer_again,
    reference=lambda dy, handle: dy.flatten(0, -2),
    cost=_cost_view,
    vjp=lambda b, node, g: (b.combine(g, node.inputs[1]), None),
    shard=(Split((0, 0), (0,)), Split((-1, None), (-1,))),
    effect=Effect.COMM,
    rows=None,
    aliases=(),
    view=True,
    samples=(_handle_sample(2, 3, 4), _handle_sample(2, 3, 4, dtype=DType.bf16)),
)


def _infer_combine(y: Type, handle: Type) -> Type:
    expect_float(y)
    _expect_handle(handle)
    expect(y.rank == 2 and same(y.shape[0], handle.elements), f"the rows of {y} are not those of the handle {handle}")
    return Type(y.dtype, (*handle.shape, y.shape[1]))


COMBINE = OpDef(
    name="combine",
    doc="Bring rows y[D, n] of a dispatch back to their tokens [..., n], summed over the ranks that they went to.",
    infer=_infer_combine,
    reference=lambda y, handle: y.view(*handle.shape, y.shape[-1]),
    cost=_cost_view,
    vjp=lambda b, node, g: (b.dispatch_again(g, node.inputs[1]), None),
    shard=(Split((0, 0), (0,)), Split((-1, None), (-1,))),
    effect=Effect.COMM,
    rows=None,
    aliases=(),
    view=True,
    samples=(_handle_sample(6, 4), _handle_sample(6, 4, dtype=DType.bf16)),
)
