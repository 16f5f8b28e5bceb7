"""Ops that move axes, columns and positions without arithmetic; most are views."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.dims import Dim, add, multiply
from dsv3c.ir import DType, IRError, Node, Type, Value
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
    expect_integer,
    io_cost,
)
from dsv3c.rows import Constant, Row, Rowwise, columns, join
from dsv3c.tensors import wide

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def _view_cost(inputs: tuple[Type, ...], outputs: tuple[Type, ...], **_: object) -> Cost:
    return Cost()


def _last(x: Type) -> int:
    """The number of columns, which these ops need to know."""
    expect(x.rank >= 1 and isinstance(x.shape[-1], int), f"the last axis of {x} must be a number")
    last = x.shape[-1]
    assert isinstance(last, int)
    return last


def _natural(value: int, name: str, least: int) -> None:
    expect(isinstance(value, int) and value >= least, f"{name} must be an integer of at least {least}, got {value!r}")


def _infer_split(x: Type, *, heads: int) -> Type:
    _natural(heads, "heads", 1)
    columns_ = _last(x)
    expect(columns_ % heads == 0, f"the last axis of {x} does not divide into {heads} heads")
    return Type(x.dtype, (*x.shape[:-1], heads, columns_ // heads))


def _vjp_split(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    return (b.merge_heads(dy),)


SPLIT_HEADS = OpDef(
    name="split_heads",
    doc="y[..., H, D] = x[..., H*D] with H = `heads`; no data moves.",
    infer=_infer_split,
    reference=lambda x, *, heads: x.unflatten(-1, (heads, -1)),
    cost=_view_cost,
    vjp=_vjp_split,
    shard=(Split((0,), (0,)),),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=True,
    samples=(Sample((Type(DType.f64, (2, 4, 6)),), (("heads", 3),)),),
)


def _infer_merge(x: Type) -> Type:
    expect(x.rank >= 2, f"expected [..., H, D], got {x}")
    return Type(x.dtype, (*x.shape[:-2], multiply(*x.shape[-2:])))


def _vjp_merge(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    (x,) = node.inputs
    return (b.split_heads(dy, heads=_whole(x.type.shape[-2])),)


def _whole(dim: Dim) -> int:
    if not isinstance(dim, int):
        raise IRError(f"the number of heads {dim} must be a number")
    return dim


MERGE_HEADS = OpDef(
    name="merge_heads",
    doc="y[..., H*D] = x[..., H, D]; no data moves.",
    infer=_infer_merge,
    reference=lambda x: x.flatten(-2),
    cost=_view_cost,
    vjp=_vjp_merge,
    shard=(Split((0,), (0,)), Split((-2,), (-1,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=True,
    samples=(Sample((Type(DType.f64, (2, 3, 4, 6)),)),),
)


def _infer_slice(x: Type, *, start: int, stop: int) -> Type:
    _natural(start, "start", 0)
    _natural(stop, "stop", start + 1)
    expect(stop <= _last(x), f"columns {start}:{stop} do not exist in {x}")
    return Type(x.dtype, (*x.shape[:-1], stop - start))


def _vjp_slice(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    (x,) = node.inputs
    start, stop = node.attr("start"), node.attr("stop")
    assert isinstance(start, int) and isinstance(stop, int)
    return (b.pad_last(dy, before=start, after=_last(x.type) - stop),)


SLICE_LAST = OpDef(
    name="slice_last",
    doc="y[..., stop-start] = x[..., start:stop]; no data moves.",
    infer=_infer_slice,
    reference=lambda x, *, start, stop: x[..., start:stop],
    cost=_view_cost,
    vjp=_vjp_slice,
    shard=(Split((0,), (0,)),),
    effect=Effect.PURE,
    rows=Rowwise(("row",), ("row",), lambda x, *, start, stop: columns(x, start, stop)),
    aliases=(),
    view=True,
    samples=(
        Sample((Type(DType.f64, (2, 3, 8)),), (("start", 2), ("stop", 7))),
        Sample((Type(DType.f64, (2, 3, 8)),), (("start", 0), ("stop", 8))),
    ),
)


def _infer_pad(x: Type, *, before: int, after: int) -> Type:
    expect_float(x)
    _natural(before, "before", 0)
    _natural(after, "after", 0)
    return Type(x.dtype, (*x.shape[:-1], before + _last(x) + after))


def _vjp_pad(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    (x,) = node.inputs
    before = node.attr("before")
    assert isinstance(before, int)
    return (b.slice_last(dy, start=before, stop=before + _last(x.type)),)


def _pad_row(x: Row, *, before: int, after: int) -> Row:
    parts = Constant(before, 0.0), x, Constant(after, 0.0)
    return join(*(p for p in parts if p.cols))


PAD_LAST = OpDef(
    name="pad_last",
    doc="y[..., before+n+after] = x[..., n] with zeros on both sides.",
    infer=_infer_pad,
    reference=lambda x, *, before, after: torch.nn.functional.pad(x, (before, after)),
    cost=io_cost,
    vjp=_vjp_pad,
    shard=(Split((0,), (0,)),),
    effect=Effect.PURE,
    rows=Rowwise(("row",), ("row",), _pad_row),
    aliases=(),
    view=False,
    samples=(
        Sample((Type(DType.f64, (2, 3, 5)),), (("before", 2), ("after", 1))),
        Sample((Type(DType.f64, (2, 3, 5)),), (("before", 0), ("after", 3))),
    ),
)


def _infer_join(x: Type, y: Type) -> Type:
    expect_float(x, y)
    expect(x.dtype == y.dtype, f"{x} and {y} differ in element type; cast one")
    expect(x.rank == y.rank and x.shape[:-1] == y.shape[:-1], f"the rows of {x} and {y} differ")
    return Type(x.dtype, (*x.shape[:-1], add(x.shape[-1], y.shape[-1])))


def _vjp_join(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    first, second = (_last(v.type) for v in node.inputs)
    return b.slice_last(dy, start=0, stop=first), b.slice_last(dy, start=first, stop=first + second)


JOIN_LAST = OpDef(
    name="join_last",
    doc="z[..., m+n] = the columns of x[..., m], then those of y[..., n].",
    infer=_infer_join,
    reference=lambda x, y: torch.cat((x, y), -1),
    cost=io_cost,
    vjp=_vjp_join,
    shard=(Split((0, 0), (0,)),),
    effect=Effect.PURE,
    rows=Rowwise(("row", "row"), ("row",), lambda x, y: join(x, y)),
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 5)), Type(DType.f64, (2, 3, 2)))),),
)


def _infer_expand(x: Type, *, heads: int) -> Type:
    expect_float(x)
    _natural(heads, "heads", 1)
    expect(x.rank >= 1, f"expected [..., D], got {x}")
    return Type(x.dtype, (*x.shape[:-1], heads, x.shape[-1]))


def _vjp_expand(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    return (b.sum_heads(dy),)


EXPAND_HEADS = OpDef(
    name="expand_heads",
    doc="y[..., H, D] = x[..., D] for each of H = `heads` heads; a view of stride 0 (the RoPE key, section 2.1.1).",
    infer=_infer_expand,
    reference=lambda x, *, heads: x.unsqueeze(-2).expand(*x.shape[:-1], heads, x.shape[-1]),
    cost=_view_cost,
    vjp=_vjp_expand,
    shard=(Split((0,), (0,)), Split((-1,), (-1,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=True,
    samples=(Sample((Type(DType.f64, (2, 4, 6)),), (("heads", 3),)),),
)


def _infer_sum_heads(x: Type) -> Type:
    expect_float(x)
    expect(x.rank >= 2, f"expected [..., H, D], got {x}")
    return Type(x.dtype, (*x.shape[:-2], x.shape[-1]))


def _vjp_sum_heads(b: Builder, node: Node, dy: Value) -> tuple[Value, ...]:
    (x,) = node.inputs
    return (b.expand_heads(dy, heads=_whole(x.type.shape[-2])),)


SUM_HEADS = OpDef(
    name="sum_heads",
    doc="y[..., D] = x[..., H, D] summed over H: the gradient of `expand_heads`.",
    infer=_infer_sum_heads,
    reference=lambda x: wide(x).sum(-2).to(x.dtype),
    cost=io_cost,
    vjp=_vjp_sum_heads,
    shard=(Split((0,), (0,)), Split((-2,), (SUM,)), Split((-1,), (-1,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 3, 4, 6)),)),),
)


def _expect_tokens(tokens: Type) -> None:
    expect_integer(tokens)
    expect(tokens.rank == 2, f"expected tokens [B, S], got {tokens}")


def _infer_shift(tokens: Type, *, by: int, fill: int) -> Type:
    _expect_tokens(tokens)
    _natural(by, "by", 0)
    expect(isinstance(fill, int), f"fill must be an integer, got {fill!r}")
    return tokens


def _shift(tokens: torch.Tensor, *, by: int, fill: int) -> torch.Tensor:
    return torch.nn.functional.pad(tokens[:, by:], (0, min(by, tokens.shape[1])), value=fill)


def _tokens(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    return (torch.randint(0, 9, (2, 5), generator=generator),)


SHIFT = OpDef(
    name="shift",
    doc="y[B, S]: position i holds token i+`by` of tokens[B, S], or `fill` past the end (the targets of section 2.2).",
    infer=_infer_shift,
    reference=_shift,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(Split((0,), (0,)),),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        Sample((Type(DType.i64, (2, 5)),), (("by", 2), ("fill", -100)), _tokens),
        Sample((Type(DType.i64, (2, 5)),), (("by", 7), ("fill", 0)), _tokens),
    ),
)


def _infer_positions(tokens: Type, start: Type | None = None) -> Type:
    _expect_tokens(tokens)
    expect(start is None or start == Type(DType.i32, ()), f"the start must be i32[()], got {start}")
    return Type(DType.i32, tokens.shape)


def _positions(tokens: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
    row = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    return (row if start is None else row + start).expand(tokens.shape).contiguous()


def _positions_cost(inputs: tuple[Type, ...], outputs: tuple[Type, ...]) -> Cost:
    """The tokens are not read, only their shape is."""
    return Cost(bytes=bytes_of(*inputs[1:], *outputs))


POSITIONS = OpDef(
    name="positions",
    doc="i32[B, S]: 0 .. S-1 for each sequence of tokens[B, S].",
    infer=lambda tokens: _infer_positions(tokens),
    reference=lambda tokens: _positions(tokens),
    cost=_positions_cost,
    vjp=NO_GRADIENT,
    shard=(Split((0,), (0,)),),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.i64, (2, 5)),), (), _tokens),),
)


POSITIONS_FROM = OpDef(
    name="positions_from",
    doc="i32[B, S]: start .. start+S-1 for each sequence of tokens[B, S], start i32[()].",
    infer=lambda tokens, start: _infer_positions(tokens, start),
    reference=lambda tokens, start: _positions(tokens, start),
    cost=_positions_cost,
    vjp=NO_GRADIENT,
    shard=(Split((0, None), (0,)),),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        Sample(
            (Type(DType.i64, (2, 5)), Type(DType.i32, ())),
            (),
            lambda generator: (*_tokens(generator), torch.tensor(7, dtype=torch.int32)),
        ),
    ),
)
