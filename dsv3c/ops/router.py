"""The router: which experts each token goes to, and with what weight (report, section 2.1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.dims import same
from dsv3c.ir import DType, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import (
    NO_GRADIENT,
    Effect,
    OpDef,
    Sample,
    Split,
    expect,
    expect_float,
    expect_integer,
    io_cost,
    split_rows,
)
from dsv3c.rows import Row, Rowwise, total

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

TINY = 1e-20
"""Added to a sum of scores before dividing by it, so that scores that are all 0 give 0 and not NaN."""


def wide_of(x: torch.Tensor) -> torch.Tensor:
    """`x` in the type that arithmetic is done in: float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def distinct_experts(generator: torch.Generator, shape: tuple[int, ...], k: int, experts: int) -> torch.Tensor:
    """Random choices i32[*shape, k] of `k` different experts per token; for samples and tests."""
    return torch.rand(*shape, experts, generator=generator).argsort(-1)[..., :k].to(torch.int32)


def expect_choices(x: Type, e: Type) -> None:
    """Raise IRError unless `e` holds integer choices for the same tokens as `x`: x[..., n], e[..., k]."""
    expect_integer(e)
    expect(e.rank >= 1 and e.rank == x.rank, f"expected one row of choices per row of {x}, got {e}")
    expect(all(map(same, x.shape[:-1], e.shape[:-1])), f"the tokens of {x} and the choices {e} differ")


def _infer_choose(s: Type, bias: Type, *, k: int, groups: int, kept: int) -> Type:
    expect_float(s, bias)
    experts = s.shape[-1] if s.rank else None
    expect(
        bias.rank == 1 and isinstance(experts, int) and same(bias.shape[0], experts),
        f"the bias {bias} does not fit the scores {s}",
    )
    assert isinstance(experts, int)
    expect(groups >= 1 and experts % groups == 0, f"{experts} experts do not divide into {groups} groups")
    expect(1 <= kept <= groups, f"cannot keep {kept} of {groups} groups")
    left = kept * (experts // groups)
    expect(1 <= k <= left, f"cannot choose {k} experts of the {left} in the {kept} groups that are kept")
    return Type(DType.i32, (*s.shape[:-1], k))


def _highest(x: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the `k` highest of the last axis, in descending order, ties to the lower index."""
    return x.sort(stable=True, dim=-1, descending=True).indices[..., :k]


def _choose(s: torch.Tensor, bias: torch.Tensor, *, k: int, groups: int, kept: int) -> torch.Tensor:
    biased = wide_of(s) + bias
    grouped = biased.unflatten(-1, (groups, -1))
    group_score = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
    mask = torch.ones_like(group_score, dtype=torch.bool).scatter(-1, _highest(group_score, kept), False)
    return _highest(grouped.masked_fill(mask.unsqueeze(-1), float("-inf")).flatten(-2), k).to(torch.int32)


def _choose_sample(groups: int, kept: int, dtype: DType = DType.f64) -> Sample:
    types = (Type(dtype, (2, 3, 8)), Type(DType.f32, (8,)))
    return Sample(types, (("k", 2), ("groups", groups), ("kept", kept)))


CHOOSE_EXPERTS = OpDef(
    name="choose_experts",
    doc="The k experts with the highest s[..., E] + bias[E] in the `kept` best groups, best first: i32[..., k].",
    infer=_infer_choose,
    reference=_choose,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(Split((0, None), (0,)),),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(_choose_sample(1, 1), _choose_sample(4, 2), _choose_sample(2, 1, DType.f32)),
)


def _infer_pick(s: Type, e: Type) -> Type:
    expect_float(s)
    expect_choices(s, e)
    return Type(s.dtype, e.shape)


def _vjp_pick(b: Builder, node: Node, dp: Value) -> tuple[Value | None, ...]:
    s, e = node.inputs
    return b.pick_grad(dp, e, experts=s.type.shape[-1]), None


def _pick_sample(width: int, k: int, experts: int, dtype: DType, attrs: bool) -> Sample:
    """Numbers of `width` a token, and `k` choices among `experts`."""

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        x = torch.randn(2, 3, width, generator=generator, dtype=torch.float64)
        kind = torch.float64 if dtype is DType.f64 else torch.bfloat16
        return x.to(kind), distinct_experts(generator, (2, 3), k, experts)

    types = (Type(dtype, (2, 3, width)), Type(DType.i32, (2, 3, k)))
    return Sample(types, (("experts", experts),) if attrs else (), draw)


PICK = OpDef(
    name="pick",
    doc="p[..., k]: the entries of s[..., E] that e[..., k] names.",
    infer=_infer_pick,
    reference=lambda s, e: s.gather(-1, e.long()),
    cost=io_cost,
    vjp=_vjp_pick,
    shard=(Split((0, 0), (0,)),),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(_pick_sample(8, 3, 8, DType.f64, False), _pick_sample(8, 3, 8, DType.bf16, False)),
)


def _infer_pick_grad(dp: Type, e: Type, *, experts: int) -> Type:
    expect_float(dp)
    expect_choices(dp, e)
    expect(same(dp.shape[-1], e.shape[-1]), f"the gradient {dp} does not fit the choices {e}")
    return Type(dp.dtype, (*dp.shape[:-1], experts))


def _vjp_pick_grad(b: Builder, node: Node, g: Value) -> tuple[Value | None, ...]:
    return b.pick(g, node.inputs[1]), None


PICK_GRAD = OpDef(
    name="pick_grad",
    doc="ds[..., experts]: dp[..., k] at the places that e[..., k] names, 0 elsewhere: the gradient of `pick`.",
    infer=_infer_pick_grad,
    reference=lambda dp, e, *, experts: dp.new_zeros(*dp.shape[:-1], experts).scatter_add(-1, e.long(), dp),
    cost=io_cost,
    vjp=_vjp_pick_grad,
    shard=(Split((0, 0), (0,)),),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(_pick_sample(3, 3, 8, DType.f64, True), _pick_sample(3, 3, 8, DType.bf16, True)),
)


def _infer_normalize(p: Type, *, scale: float, eps: float) -> Type:
    expect_float(p)
    expect(p.rank >= 1, f"expected rows of weights, got {p}")
    return p


def _normalize(p: torch.Tensor, *, scale: float, eps: float) -> torch.Tensor:
    wide = wide_of(p)
    return (wide / (wide.sum(-1, keepdim=True) + eps) * scale).to(p.dtype)


def _vjp_normalize(b: Builder, node: Node, dq: Value) -> tuple[Value, ...]:
    (p,) = node.inputs
    return (b.normalize_grad(dq, p, scale=node.attr("scale"), eps=node.attr("eps")),)


def _positive(count: int, *shape: int, dtype: DType = DType.f64) -> Sample:
    """`count` tensors between 0.1 and 1.1, so that no sum is near 0."""

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        kind = torch.float64 if dtype is DType.f64 else torch.bfloat16
        return tuple((torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1).to(kind) for _ in range(count))

    return Sample((Type(dtype, shape),) * count, (("scale", 2.5), ("eps", TINY)), draw)


NORMALIZE_ROWS = Rowwise(("row",), ("row",), lambda p, *, scale, eps: p / (total(p) + eps) * scale)

NORMALIZE = OpDef(
    name="normalize",
    doc="q[..., k] = p / (sum of p over the last axis + eps) · scale: the weights of the chosen experts (equation 13).",
    infer=_infer_normalize,
    reference=_normalize,
    cost=io_cost,
    vjp=_vjp_normalize,
    shard=split_rows(NORMALIZE_ROWS),
    effect=Effect.PURE,
    rows=NORMALIZE_ROWS,
    aliases=((0, 0),),
    view=False,
    samples=(_positive(1, 2, 3, 4), _positive(1, 2, 3, 4, dtype=DType.bf16)),
)


def _infer_normalize_grad(dq: Type, p: Type, *, scale: float, eps: float) -> Type:
    expect(dq == p, f"the gradient {dq} does not fit {p}")
    return _infer_normalize(p, scale=scale, eps=eps)


def _normalize_grad(dq: torch.Tensor, p: torch.Tensor, *, scale: float, eps: float) -> torch.Tensor:
    g, wide = wide_of(dq), wide_of(p)
    r = 1.0 / (wide.sum(-1, keepdim=True) + eps)
    return ((g - (g * wide).sum(-1, keepdim=True) * r) * (r * scale)).to(p.dtype)


def _normalize_grad_row(dq: Row, p: Row, *, scale: float, eps: float) -> Row:
    r = 1.0 / (total(p) + eps)
    return (dq - total(dq * p) * r) * (r * scale)


NORMALIZE_GRAD_ROWS = Rowwise(("row", "row"), ("row",), _normalize_grad_row)

NORMALIZE_GRAD = OpDef(
    name="normalize_grad",
    doc="The gradient of `normalize` with respect to p, from dq[..., k] and p[..., k].",
    infer=_infer_normalize_grad,
    reference=_normalize_grad,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=split_rows(NORMALIZE_GRAD_ROWS),
    effect=Effect.PURE,
    rows=NORMALIZE_GRAD_ROWS,
    aliases=((0, 0),),
    view=False,
    samples=(_positive(2, 2, 3, 4), _positive(2, 2, 3, 4, dtype=DType.bf16)),
)
