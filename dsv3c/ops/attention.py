"""The attention core: causal attention with its gradient, and attention over the latent cache (MLA, section 2.1.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.dims import Dim, multiply
from dsv3c.ir import DType, IRError, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import NO_GRADIENT, Cost, Effect, OpDef, Sample, Split, bytes_of, expect, expect_float
from dsv3c.ops.linear import gradient_dtype
from dsv3c.tensors import wide

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def _expect_attention(q: Type, k: Type, v: Type, documents: Type | None) -> None:
    expect_float(q, k, v)
    expect(q.rank == 4, f"expected queries [B, S, H, D], got {q}")
    expect(q == k, f"the queries {q} and the keys {k} differ; causal attention needs the same positions and heads")
    expect(v.rank == 4 and v.shape[:3] == k.shape[:3], f"the values {v} do not fit the keys {k}")
    expect(v.dtype == k.dtype, f"the keys {k} and the values {v} differ in element type; cast one")
    if documents is not None:
        expected = Type(DType.i32, q.shape[:2])
        expect(documents == expected, f"the documents must be {expected}, got {documents}")


def _lse_type(q: Type) -> Type:
    batch, positions, heads, _ = q.shape
    return Type(gradient_dtype(q.dtype), (batch, heads, positions))


def _infer_attention(q: Type, k: Type, v: Type, documents: Type | None = None, *, scale: float) -> tuple[Type, ...]:
    _expect_attention(q, k, v, documents)
    return v, _lse_type(q)


def _scores(q: torch.Tensor, k: torch.Tensor, documents: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Scaled and masked scores [B, H, S, S] of q, k [B, S, H, D] in wide arithmetic."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if documents is not None:
        keep = keep & (documents.unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1)
    return scores.masked_fill(~keep, float("-inf"))


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None = None, *,
               scale: float) -> tuple[torch.Tensor, ...]:  # fmt: skip
    scores = _scores(wide(q), wide(k), documents, scale)
    o = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), wide(v))
    return o.to(v.dtype), scores.logsumexp(-1)


def _vjp_attention(b: Builder, node: Node, do: Value | None, dlse: Value | None) -> tuple[Value | None, ...]:
    if dlse is not None:
        raise IRError("the lse of attention has no gradient; use o alone")
    q, k, v, *documents = node.inputs
    gradients = b.attention_grad(do, q, k, v, *node.outputs, *documents, scale=node.attr("scale"))
    return (*gradients, None) if documents else tuple(gradients)


def _square(q: Type) -> Dim:
    """Twice the number of scores that a causal mask keeps: B * H * S * S."""
    batch, positions, heads, _ = q.shape
    return multiply(batch, heads, positions, positions)


def _cost_attention(inputs: tuple[Type, ...], outputs: tuple[Type, ...], **_: object) -> Cost:
    q, _k, v, *_rest = inputs
    flops = multiply(_square(q), q.shape[-1] + v.shape[-1])
    return Cost(flops=flops, vector_flops=multiply(4, _square(q)), bytes=bytes_of(*inputs, *outputs))


def _documents(generator: torch.Generator, batch: int, positions: int) -> torch.Tensor:
    return torch.randint(0, 2, (batch, positions), generator=generator, dtype=torch.int32).cumsum(1, dtype=torch.int32)


def _draw_attention(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    q, k, v = (torch.randn((2, 6, 2, d), generator=generator, dtype=torch.float64) for d in (4, 4, 2))
    return q, k, v, _documents(generator, 2, 6)


_QUERY, _VALUE, _IDS = Type(DType.f64, (2, 6, 2, 4)), Type(DType.f64, (2, 6, 2, 2)), Type(DType.i32, (2, 6))

ATTENTION = OpDef(
    name="attention",
    doc="Causal softmax attention: q, k[B, S, H, Dk], v[B, S, H, Dv] -> o[B, S, H, Dv] and the log-sum-exp of the "
    "scores [B, H, S]; with documents i32[B, S], positions see only their own document.",
    infer=_infer_attention,
    reference=_attention,
    cost=_cost_attention,
    vjp=_vjp_attention,
    shard=(Split((0, 0, 0, 0), (0, 0)), Split((2, 2, 2, None), (2, 1))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        Sample((_QUERY, _QUERY, _VALUE), (("scale", 0.4),)),
        Sample((_QUERY, _QUERY, _VALUE, _IDS), (("scale", 0.4),), _draw_attention),
    ),
)


def _infer_attention_grad(do: Type, q: Type, k: Type, v: Type, o: Type, lse: Type, documents: Type | None = None, *,
                          scale: float) -> tuple[Type, ...]:  # fmt: skip
    _expect_attention(q, k, v, documents)
    expect(do == v and o == v, f"the output {o} and its gradient {do} must be like the values {v}")
    expect(lse == _lse_type(q), f"the log-sum-exp must be {_lse_type(q)}, got {lse}")
    return q, k, v


def _attention_grad(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
                    lse: torch.Tensor, documents: torch.Tensor | None = None, *,
                    scale: float) -> tuple[torch.Tensor, ...]:  # fmt: skip
    dtype = q.dtype
    do, q, k, v, o = (wide(t) for t in (do, q, k, v, o))
    p = torch.exp(_scores(q, k, documents, scale) - lse.unsqueeze(-1))
    dp = torch.einsum("bihd,bjhd->bhij", do, v)
    ds = p * (dp - (do * o).sum(-1).transpose(1, 2).unsqueeze(-1)) * scale
    dq, dk = torch.einsum("bhij,bjhd->bihd", ds, k), torch.einsum("bhij,bihd->bjhd", ds, q)
    return dq.to(dtype), dk.to(dtype), torch.einsum("bhij,bihd->bjhd", p, do).to(dtype)


def _cost_attention_grad(inputs: tuple[Type, ...], outputs: tuple[Type, ...], **_: object) -> Cost:
    """Five products: the scores again, dp, dv, dq, dk."""
    q, v = inputs[1], inputs[3]
    flops = multiply(_square(q), 3 * q.shape[-1] + 2 * v.shape[-1])
    return Cost(flops=flops, vector_flops=multiply(4, _square(q)), bytes=bytes_of(*inputs, *outputs))


def _draw_grad(documents: bool) -> Callable[[torch.Generator], tuple[torch.Tensor, ...]]:
    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        q, k, v, ids = _draw_attention(generator)
        rest = (ids,) if documents else ()
        o, lse = _attention(q, k, v, *rest, scale=0.4)
        return torch.randn(v.shape, generator=generator, dtype=v.dtype), q, k, v, o, lse, *rest

    return draw


_GRAD_INPUTS = (_VALUE, _QUERY, _QUERY, _VALUE, _VALUE, Type(DType.f64, (2, 2, 6)))

ATTENTION_GRAD = OpDef(
    name="attention_grad",
    doc="(dq, dk, dv) of `attention` from the gradient of o, the inputs, o and the log-sum-exp.",
    infer=_infer_attention_grad,
    reference=_attention_grad,
    cost=_cost_attention_grad,
    vjp=NO_GRADIENT,
    shard=(Split((0,) * 7, (0, 0, 0)), Split((2, 2, 2, 2, 2, 1, None), (2, 2, 2))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        Sample(_GRAD_INPUTS, (("scale", 0.4),), _draw_grad(False)),
        Sample((*_GRAD_INPUTS, _IDS), (("scale", 0.4),), _draw_grad(True)),
    ),
)


def _infer_latent(q: Type, cache: Type, start: Type, *, scale: float, rank: int) -> Type:
    expect_float(q, cache)
    expect(q.rank == 4 and cache.rank == 3, f"expected q[B, S, H, n] and cache[B, C, n], got {q} and {cache}")
    expect(q.shape[::3] == cache.shape[::2], f"the queries {q} do not fit the cache {cache}")
    expect(q.dtype == cache.dtype, f"the queries {q} and the cache {cache} differ in element type; cast one")
    expect(start == Type(DType.i32, ()), f"the start must be i32[()], got {start}")
    columns = q.shape[3]
    fits = rank > 0 and (not isinstance(columns, int) or rank <= columns)
    expect(fits, f"rank {rank} exceeds the columns of {cache}")
    return Type(q.dtype, (*q.shape[:3], rank))


def _latent(q: torch.Tensor, cache: torch.Tensor, start: torch.Tensor, *, scale: float, rank: int) -> torch.Tensor:
    keys = wide(cache)
    scores = torch.einsum("bihn,bjn->bhij", wide(q), keys) * scale
    rows = start + torch.arange(q.shape[1], device=q.device).unsqueeze(1)
    hidden = torch.arange(cache.shape[1], device=q.device) > rows
    p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjr->bihr", p, keys[..., :rank]).to(q.dtype)


def _cost_latent(inputs: tuple[Type, ...], outputs: tuple[Type, ...], *, scale: float, rank: int) -> Cost:
    """As if the cache were full, read once for all heads."""
    q, cache, _ = inputs
    scores = multiply(*q.shape[:3], cache.shape[1])
    flops = multiply(2, scores, q.shape[3] + rank)
    return Cost(flops=flops, vector_flops=multiply(4, scores), bytes=bytes_of(*inputs, *outputs))


def _draw_latent(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    q, cache = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3, 2, 6), (2, 8, 6)))
    return q, cache, torch.tensor(4, dtype=torch.int32)


LATENT_ATTENTION = OpDef(
    name="latent_attention",
    doc="Absorbed attention over the cache (section 2.1.1): q[B, S, H, n] at positions start+i sees rows 0..start+i of "
    "cache[B, C, n] -> [B, S, H, rank]; the values are the first `rank` columns of the cache.",
    infer=_infer_latent,
    reference=_latent,
    cost=_cost_latent,
    vjp=NO_GRADIENT,
    shard=(Split((0, 0, None), (0,)), Split((2, None, None), (2,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        Sample(
            (Type(DType.f64, (2, 3, 2, 6)), Type(DType.f64, (2, 8, 6)), Type(DType.i32, ())),
            (("scale", 0.4), ("rank", 4)),
            _draw_latent,
        ),
    ),
)


def _infer_write(cache: Type, latent: Type, start: Type) -> Type:
    expect_float(cache, latent)
    expect(cache.rank == latent.rank == 3, f"expected cache[B, C, n] and latent[B, S, n], got {cache}, {latent}")
    expect(cache.shape[::2] == latent.shape[::2], f"{latent} does not fit the cache {cache}")
    expect(cache.dtype == latent.dtype, f"{latent} and the cache {cache} differ in element type; cast one")
    expect(start == Type(DType.i32, ()), f"the start must be i32[()], got {start}")
    return cache


def _write(cache: torch.Tensor, latent: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    rows = start + torch.arange(latent.shape[1], device=cache.device)
    return cache.index_copy(1, rows, latent)


def _cost_write(inputs: tuple[Type, ...], outputs: tuple[Type, ...]) -> Cost:
    """In place: only the new rows move."""
    return Cost(bytes=bytes_of(inputs[1], inputs[1], inputs[2]))


def _draw_write(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    cache, latent = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 8, 6), (2, 3, 6)))
    return cache, latent, torch.tensor(4, dtype=torch.int32)


CACHE_WRITE = OpDef(
    name="cache_write",
    doc="cache[B, C, n] with rows start .. start+S-1 replaced by latent[B, S, n]; start is i32[()].",
    infer=_infer_write,
    reference=_write,
    cost=_cost_write,
    vjp=NO_GRADIENT,
    shard=(Split((0, 0, None), (0,)), Split((2, 2, None), (2,))),
    effect=Effect.PURE,
    rows=None,
    aliases=((0, 0),),
    view=False,
    samples=(Sample((Type(DType.f64, (2, 8, 6)), Type(DType.f64, (2, 3, 6)), Type(DType.i32, ())), (), _draw_write),),
)
