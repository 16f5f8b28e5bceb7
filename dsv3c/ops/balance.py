"""Keeping the experts' load even: counts, the sequence-wise loss, and the bias update (report, section 2.1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.dims import same
from dsv3c.ir import DType, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import NO_GRADIENT, SUM, Effect, OpDef, Sample, Split, expect, expect_float, expect_integer, io_cost
from dsv3c.ops.linear import gradient_dtype
from dsv3c.ops.router import TINY, distinct_experts, expect_choices, wide_of
from dsv3c.rows import Row, Rowwise, binary, total

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def _infer_load(e: Type, *, experts: int) -> Type:
    expect_integer(e)
    return Type(DType.f32, (experts,))


def _load(e: torch.Tensor, *, experts: int) -> torch.Tensor:
    return _count(e.flatten().unsqueeze(0), experts)[0].float()


def _count(e: torch.Tensor, experts: int) -> torch.Tensor:
    """How often each expert occurs in each row of e[B, n]: int64 [B, experts]; negative choices do not count."""
    chosen = e.long()
    ones = (chosen >= 0).long()
    return chosen.new_zeros(e.shape[0], experts).scatter_add(1, chosen.clamp(min=0), ones)


EXPERT_LOAD = OpDef(
    name="expert_load",
    doc="How many of the choices e[..., k] name each expert, as f32[experts]; negative choices do not count.",
    infer=_infer_load,
    reference=_load,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(Split((0,), (SUM,)),),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        Sample(
            (Type(DType.i32, (2, 3, 2)),),
            (("experts", 8),),
            lambda generator: (distinct_experts(generator, (2, 3), 2, 8),),
        ),
    ),
)


def _infer_balance(s: Type, e: Type) -> Type:
    expect_float(s)
    expect_choices(s, e)
    expect(s.rank == 3, f"expected scores [sequences, tokens, experts], got {s}")
    return Type(gradient_dtype(s.dtype), ())


def _frequency(s: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """f[B, E]: the share of each expert in each sequence's choices, 1 if the load is even (equation 18)."""
    length, experts, k = s.shape[1], s.shape[2], e.shape[2]
    return _count(e.flatten(1), experts).to(wide_of(s).dtype) * (experts / (k * length))


def _balance(s: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    wide = wide_of(s)
    probability = (wide / (wide.sum(-1, keepdim=True) + TINY)).mean(1)
    return (_frequency(s, e) * probability).sum(-1).mean()


def _vjp_balance(b: Builder, node: Node, dloss: Value) -> tuple[Value | None, ...]:
    return b.balance_loss_grad(dloss, *node.inputs), None


def _balance_sample(dtype: DType, gradient: bool) -> Sample:
    """Positive scores of 2 sequences of 5 tokens among 8 experts, after the loss's gradient if `gradient`."""
    wide = gradient_dtype(dtype)

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        dloss = torch.randn((), generator=generator, dtype=torch.float64)
        s = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64).sigmoid()
        e = distinct_experts(generator, (2, 5), 3, 8)
        if dtype is not DType.f64:
            dloss, s = dloss.float(), s.float()
        return (dloss, s, e) if gradient else (s, e)

    types = (Type(dtype, (2, 5, 8)), Type(DType.i32, (2, 5, 3)))
    return Sample((Type(wide, ()), *types) if gradient else types, (), draw)


BALANCE_LOSS = OpDef(
    name="balance_loss",
    doc="Sequence-wise balance of s[B, S, E] and choices e[B, S, k], without its factor: mean of Σ f·P (eq. 17-20).",
    infer=_infer_balance,
    reference=_balance,
    cost=io_cost,
    vjp=_vjp_balance,
    shard=(),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(_balance_sample(DType.f64, False), _balance_sample(DType.f32, False)),
)


def _infer_balance_grad(dloss: Type, s: Type, e: Type) -> Type:
    expect(_infer_balance(s, e) == dloss, f"the gradient {dloss} is not that of the loss of {s}")
    return s


def _balance_grad(dloss: torch.Tensor, s: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    wide, f = wide_of(s), _frequency(s, e).unsqueeze(1)
    r = 1.0 / (wide.sum(-1, keepdim=True) + TINY)
    tokens = s.shape[0] * s.shape[1]
    return ((f - (f * wide).sum(-1, keepdim=True) * r) * r * (dloss / tokens)).to(s.dtype)


BALANCE_LOSS_GRAD = OpDef(
    name="balance_loss_grad",
    doc="The gradient of `balance_loss` with respect to s[B, S, E]; it flows through P only, counts are constant.",
    infer=_infer_balance_grad,
    reference=_balance_grad,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(_balance_sample(DType.f64, True), _balance_sample(DType.f32, True)),
)


def _infer_update(bias: Type, load: Type, speed: Type) -> Type:
    expect_float(bias, load, speed)
    expect(bias.dtype in (DType.f32, DType.f64), f"the bias must stay f32 (or f64), got {bias}")
    expect(
        bias.rank == 1 and load.rank == 1 and same(bias.shape[0], load.shape[0]),
        f"the load {load} does not fit the bias {bias}",
    )
    expect(speed.rank == 0, f"the speed must be one number, got {speed}")
    return bias


def _update(bias: torch.Tensor, load: torch.Tensor, speed: torch.Tensor) -> torch.Tensor:
    below_mean = (load.sum() - load * load.shape[0]).sign()
    return (bias + speed * below_mean).to(bias.dtype)


def _update_row(bias: Row, load: Row, speed: Row) -> Row:
    whole, mine = total(load), load * load.cols
    return bias + speed * (binary("less", mine, whole) - binary("less", whole, mine))


UPDATE_ROWS = Rowwise(("row", "row", "single"), ("row",), _update_row)


def _update_sample(dtype: DType) -> Sample:
    """Eight experts with loads above, below and equal to the mean of 3."""

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        kind = torch.float64 if dtype is DType.f64 else torch.float32
        bias = torch.randn(8, generator=generator, dtype=torch.float64).to(kind)
        return bias, torch.tensor([3.0, 0, 6, 2, 4, 3, 5, 1], dtype=kind), torch.tensor(1e-3, dtype=kind)

    return Sample((Type(dtype, (8,)), Type(dtype, (8,)), Type(dtype, ())), (), draw)


UPDATE_BIAS = OpDef(
    name="update_bias",
    doc="bias[E] + speed[()] · sign(mean load - load[E]): overloaded experts are chosen less (auxiliary-loss-free).",
    infer=_infer_update,
    reference=_update,
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=(),
    effect=Effect.PURE,
    rows=UPDATE_ROWS,
    aliases=((0, 0),),
    view=False,
    samples=(_update_sample(DType.f32), _update_sample(DType.f64)),
)
