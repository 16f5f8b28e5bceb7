"""Cross entropy and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.dims import multiply
from dsv3c.ir import DType, IRError, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import NO_GRADIENT, Cost, Effect, OpDef, Sample, bytes_of, expect, expect_float
from dsv3c.ops.linear import gradient_dtype
from dsv3c.tensors import wide

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def _infer_loss(logits: Type, labels: Type) -> tuple[Type, ...]:
    expect_float(logits)
    expect(labels.dtype is DType.i64, f"expected i64 labels, got {labels}")
    expect(logits.rank >= 2 and logits.shape[:-1] == labels.shape, f"the labels {labels} do not fit {logits}")
    dtype = gradient_dtype(logits.dtype)
    return Type(dtype, ()), Type(dtype, labels.shape)


def _counted(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which labels count, and how many do (at least 1, so that nothing to predict is a loss of 0)."""
    keep = labels >= 0
    return keep, keep.sum().clamp(min=1)


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    scores = wide(logits)
    lse = scores.logsumexp(-1)
    keep, count = _counted(labels)
    chosen = scores.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(keep, lse - chosen, 0).sum() / count, lse


def _vjp_loss(b: Builder, node: Node, dloss: Value | None, dlse: Value | None) -> tuple[Value | None, ...]:
    if dlse is not None:
        raise IRError("the lse of cross_entropy has no gradient; use the loss alone")
    return b.cross_entropy_grad(dloss, *node.inputs, node.outputs[1]), None


def _cost_loss(inputs: tuple[Type, ...], outputs: tuple[Type, ...]) -> Cost:
    logits = next(t for t in inputs if t.rank and t.dtype.is_float)
    return Cost(vector_flops=multiply(4, logits.elements), bytes=bytes_of(*inputs, *outputs))


def _draw_loss(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    labels = torch.randint(0, 6, (2, 5), generator=generator)
    labels[0, -2:] = -100
    return torch.randn((2, 5, 6), generator=generator, dtype=torch.float64), labels


_LOGITS, _LABELS = Type(DType.f64, (2, 5, 6)), Type(DType.i64, (2, 5))

CROSS_ENTROPY = OpDef(
    name="cross_entropy",
    doc="(loss, lse): the mean over labels[...] of at least 0 of lse - logits[..., label], and lse[...], the "
    "log-sum-exp of logits[..., V]; float32 (section 2.2).",
    infer=_infer_loss,
    reference=_loss,
    cost=_cost_loss,
    vjp=_vjp_loss,
    shard=(),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        Sample((_LOGITS, _LABELS), (), _draw_loss),
        Sample((_LOGITS, _LABELS), (), lambda generator: (_draw_loss(generator)[0], torch.full((2, 5), -1))),
    ),
)


def _infer_grad(dloss: Type, logits: Type, labels: Type, lse: Type) -> Type:
    loss, expected = _infer_loss(logits, labels)
    expect(dloss == loss, f"the gradient of the loss must be {loss}, got {dloss}")
    expect(lse == expected, f"the log-sum-exp must be {expected}, got {lse}")
    return logits


def _grad(dloss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    keep, count = _counted(labels)
    p = torch.exp(wide(logits) - lse.unsqueeze(-1))
    hit = labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=labels.device)
    return torch.where(keep.unsqueeze(-1), (p - hit.to(p.dtype)) * (dloss / count), 0).to(logits.dtype)


def _draw_grad(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    logits, labels = _draw_loss(generator)
    return torch.tensor(0.7, dtype=torch.float64), logits, labels, logits.logsumexp(-1)


CROSS_ENTROPY_GRAD = OpDef(
    name="cross_entropy_grad",
    doc="The gradient of `cross_entropy` with respect to logits[..., V], in their element type.",
    infer=_infer_grad,
    reference=_grad,
    cost=_cost_loss,
    vjp=NO_GRADIENT,
    shard=(),
    effect=Effect.PURE,
    rows=None,
    aliases=((1, 0),),
    view=False,
    samples=(Sample((Type(DType.f64, ()), _LOGITS, _LABELS, Type(DType.f64, (2, 5))), (), _draw_grad),),
)
