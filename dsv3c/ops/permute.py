"""Rows in the order of their experts and back, so that one grouped product serves all experts of a rank.

`slot[t, j]` is the row of token t's j-th choice, -1 if it has none here; `source[r]` is the flat choice t*k+j that
row r holds, -1 for padding. Each is the inverse of the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.dims import add, multiply, same, symbol
from dsv3c.ir import DType, IRError, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import (
    NO_GRADIENT,
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
from dsv3c.ops.router import distinct_experts, wide_of

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

TOKENS, K, EXPERTS, ALIGN = 5, 2, 4, 4
ROWS = TOKENS * K + EXPERTS * (ALIGN - 1)  # whole blocks already


def padding(experts: int, align: int) -> int:
    """Rows enough for each expert to fill its last block, in whole blocks, so that strides over rows stay aligned."""
    return -(-experts * (align - 1) // align) * align


def _infer_sort(e: Type, *, experts: int, align: int, rows: str = "") -> tuple[Type, ...]:
    expect_integer(e)
    expect(e.rank == 2, f"expected choices [tokens, k], got {e}")
    expect(experts >= 1, f"the number of experts must be at least 1, got {experts}")
    expect(align >= 1, f"the alignment must be at least 1 row, got {align}")
    if not isinstance(rows, str) or (rows and not rows.isidentifier()):
        raise IRError(f"rows={rows!r} is not the name of a symbol")
    total = symbol(rows) if rows else add(multiply(*e.shape), padding(experts, align))
    return Type(DType.i32, (experts + 1,)), Type(DType.i32, e.shape), Type(DType.i32, (total,))


def _sort(e: torch.Tensor, *, experts: int, align: int, rows: str = "") -> tuple[torch.Tensor, ...]:
    flat = e.flatten().long()
    key = torch.where(flat < 0, experts, flat)
    order = key.argsort(stable=True)
    counts = torch.bincount(key, minlength=experts + 1)[:experts]
    zero = counts.new_zeros(1)
    first, offsets = (torch.cat((zero, n.cumsum(0))) for n in (counts, (counts + align - 1) // align * align))
    order = order[: int(first[-1])]
    expert = flat[order]
    row = offsets[expert] + torch.arange(len(order), device=e.device) - first[expert]
    slot = torch.full_like(flat, -1).scatter(0, order, row)
    source = flat.new_full((flat.numel() + padding(experts, align),), -1).scatter(0, row, order)
    return offsets.int(), slot.view(e.shape).int(), source.int()


SORT_BY_EXPERT = OpDef(
    name="sort_by_expert",
    doc="For choices e[D, k], -1 where there is none: each expert's first row (a multiple of `align`), each choice's "
    "row, each row's choice. There are `rows` rows, a symbol; left out, enough for every choice.",
    infer=_infer_sort,
    reference=_sort,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=tuple(
        Sample(
            (Type(DType.i32, (TOKENS, K)),),
            (("experts", EXPERTS), ("align", align)),
            lambda generator: (distinct_experts(generator, (TOKENS,), K, EXPERTS),),
        )
        for align in (1, ALIGN)
    ),
)


def _expect_maps(source: Type, slot: Type) -> None:
    expect_integer(source, slot)
    expect(source.rank == 1, f"expected source[rows], got {source}")
    expect(slot.rank == 2, f"expected slot[tokens, k], got {slot}")


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[index] along the first axis; 0 where the index is negative."""
    if x.dtype == torch.float8_e4m3fn:  # torch gathers bytes, not float8; zero is the same byte
        return _gather(x.view(torch.uint8), index).view(x.dtype)
    if not len(x):
        return x.new_zeros(*index.shape, *x.shape[1:])
    rows = x[index.clamp(min=0).long()]
    return rows.masked_fill((index < 0).view(*index.shape, *[1] * (x.dim() - 1)), 0)


def _cost_permute(inputs: tuple[Type, ...], outputs: tuple[Type, ...]) -> Cost:
    """Every row is read where its token lies, k times per token, and written."""
    _x, *maps = inputs
    return Cost(bytes=bytes_of(*outputs, *outputs, *maps))


def _infer_permute(x: Type, source: Type, slot: Type) -> Type:
    expect_float(x)
    _expect_maps(source, slot)
    expect(x.rank == 2 and same(x.shape[0], slot.shape[0]), f"the tokens of {x} and slot {slot} differ")
    return Type(x.dtype, (source.shape[0], x.shape[1]))


def _permute(x: torch.Tensor, source: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    return _gather(x, source.div(slot.shape[1], rounding_mode="floor"))


def _vjp_permute(b: Builder, node: Node, dy: Value) -> tuple[Value | None, ...]:
    _x, source, slot = node.inputs
    return b.unpermute(dy, slot, source), None, None


def _sample(shape: tuple[int, ...], slot_first: bool, dtype: DType = DType.f64, align: int = ALIGN) -> Sample:
    """A tensor of `shape` and the maps of random choices, one of which is on another rank."""
    rows = TOKENS * K + padding(EXPERTS, align)

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        e = distinct_experts(generator, (TOKENS,), K, EXPERTS)
        e[1, 0] = -1
        _offsets, slot, source = _sort(e, experts=EXPERTS, align=align)
        return x if dtype is DType.f64 else x.bfloat16(), *((slot, source) if slot_first else (source, slot))

    slot, source = Type(DType.i32, (TOKENS, K)), Type(DType.i32, (rows,))
    return Sample((Type(dtype, shape), *((slot, source) if slot_first else (source, slot))), (), draw)


PERMUTE = OpDef(
    name="permute",
    doc="Rows [R, n] in the order of experts: row r is the token of x[D, n] that source[R] names; padding is 0.",
    infer=_infer_permute,
    reference=_permute,
    cost=_cost_permute,
    vjp=_vjp_permute,
    shard=(Split((-1, None, None), (-1,)),),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        _sample((TOKENS, 6), False),
        _sample((TOKENS, 6), False, align=1),
        _sample((TOKENS, 6), False, DType.bf16),
    ),
)


def _infer_unpermute(y: Type, slot: Type, source: Type) -> Type:
    expect_float(y)
    _expect_maps(source, slot)
    expect(y.rank == 2 and same(y.shape[0], source.shape[0]), f"the rows of {y} and source {source} differ")
    return Type(y.dtype, (slot.shape[0], y.shape[1]))


def _cost_unpermute(inputs: tuple[Type, ...], outputs: tuple[Type, ...]) -> Cost:
    """One addition for each number of every row."""
    return Cost(vector_flops=inputs[0].elements, bytes=bytes_of(*inputs, *outputs))


def _vjp_unpermute(b: Builder, node: Node, dx: Value) -> tuple[Value | None, ...]:
    _y, slot, source = node.inputs
    return b.permute(dx, source, slot), None, None


UNPERMUTE = OpDef(
    name="unpermute",
    doc="x[D, n]: the sum of each token's k rows of y[R, n], found by slot[D, k]; the gradient of `permute`.",
    infer=_infer_unpermute,
    reference=lambda y, slot, source: _gather(wide_of(y), slot).sum(1).to(y.dtype),
    cost=_cost_unpermute,
    vjp=_vjp_unpermute,
    shard=(Split((-1, None, None), (-1,)),),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        _sample((ROWS, 6), True),
        _sample((TOKENS * K, 6), True, align=1),
        _sample((ROWS, 6), True, DType.bf16),
    ),
)


def _infer_permute_weights(p: Type, source: Type, slot: Type) -> Type:
    expect_float(p)
    _expect_maps(source, slot)
    expect(p.shape == slot.shape, f"the weights {p} do not fit slot {slot}")
    return Type(p.dtype, source.shape)


def _vjp_permute_weights(b: Builder, node: Node, dq: Value) -> tuple[Value | None, ...]:
    _p, source, slot = node.inputs
    return b.unpermute_weights(dq, slot, source), None, None


PERMUTE_WEIGHTS = OpDef(
    name="permute_weights",
    doc="The weight [R] of each row in the order of experts, from p[D, k] by source[R]; padding is 0.",
    infer=_infer_permute_weights,
    reference=lambda p, source, slot: _gather(p.flatten(), source),
    cost=io_cost,
    vjp=_vjp_permute_weights,
    shard=(),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(_sample((TOKENS, K), False), _sample((TOKENS, K), False, DType.bf16)),
)


def _infer_unpermute_weights(dp: Type, slot: Type, source: Type) -> Type:
    expect_float(dp)
    _expect_maps(source, slot)
    expect(dp.shape == source.shape, f"the row weights {dp} do not fit source {source}")
    return Type(dp.dtype, slot.shape)


def _vjp_unpermute_weights(b: Builder, node: Node, g: Value) -> tuple[Value | None, ...]:
    _dp, slot, source = node.inputs
    return b.permute_weights(g, source, slot), None, None


UNPERMUTE_WEIGHTS = OpDef(
    name="unpermute_weights",
    doc="[D, k]: each choice's entry of dp[R], found by slot[D, k]: the gradient of `permute_weights`.",
    infer=_infer_unpermute_weights,
    reference=lambda dp, slot, source: _gather(dp, slot),
    cost=io_cost,
    vjp=_vjp_unpermute_weights,
    shard=(),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(_sample((ROWS,), True), _sample((ROWS,), True, DType.bf16)),
)
