"""Attention with torch: the flash kernel in float32 for training, plain products over the latent cache.

Flash wins over explicit scores at every length in float32 and in its backward pass; in bf16 its backward is three
times slower than converting. It wants one head size for all, so that narrower heads are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dsv3c.lazy import lazy
from dsv3c.target import Implementation
from dsv3c.targets._scratch import scratch, widened

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Call = Callable[[], None]

BLOCK_SCORES = 2**22
"""Scores over the cache are computed for as many queries at a time as this many numbers allow."""


def _heads_first(slot: int, x: torch.Tensor, columns: int) -> torch.Tensor:
    """x[B, S, H, D] as [B, H, S, columns], float32 at least, padded with zeros; itself where nothing changes."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dtype == wide and x.shape[-1] == columns and x.stride(-1) == 1:
        return x.transpose(1, 2)
    copy = scratch(slot, (*x.shape[:-1], columns), wide)
    copy[..., : x.shape[-1]].copy_(x)
    copy[..., x.shape[-1] :].zero_()
    return copy.transpose(1, 2)


def _document_mask(documents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a position may look, -inf elsewhere: [B, 1, S, S]."""
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    hidden = same.logical_not_().logical_or_(torch.ones_like(same[0]).triu_(1))
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).unsqueeze(1)


def _mask(documents: tuple[torch.Tensor, ...], dtype: torch.dtype) -> dict[str, object]:
    mask = _document_mask(documents[0], dtype) if documents else None
    return {"is_causal": not documents, "attn_mask": mask}


def attention(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], *, scale: float) -> Call:
    (q, k, v, *rest), (o, lse) = inputs, outputs
    documents = tuple(rest)
    columns = max(q.shape[-1], v.shape[-1])
    values = v.shape[-1]

    def run() -> None:
        query, key, value = (_heads_first(i, t, columns) for i, t in enumerate((q, k, v)))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        made, sums = flash(query, key, value, 0.0, scale=scale, **_mask(documents, query.dtype))
        o.copy_(made.transpose(1, 2)[..., :values])
        lse.copy_(sums)

    return run


def attention_grad(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], *, scale: float) -> Call:
    (do, q, k, v, o, lse, *rest), (dq, dk, dv) = inputs, outputs
    documents = tuple(rest)
    columns = max(q.shape[-1], v.shape[-1])

    def run() -> None:
        g, query, key, value, made = (_heads_first(i, t, columns) for i, t in enumerate((do, q, k, v, o)))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = flash(g, query, key, value, made, lse, 0.0, scale=scale, **_mask(documents, query.dtype))
        for out, gradient in zip((dq, dk, dv), gradients, strict=True):
            out.copy_(gradient.transpose(1, 2)[..., : out.shape[-1]])

    return run


def latent_attention(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], *, scale: float,
                     rank: int) -> Call:  # fmt: skip
    (q, cache, start), (y,) = inputs, outputs
    batch, positions, heads, columns = q.shape

    def run() -> None:
        first = int(start)
        keys = widened(0, cache[:, : first + positions])
        block = max(1, BLOCK_SCORES // (batch * heads * max(first + positions, 1)))
        for i in range(0, positions, block):
            queries = widened(1, q[:, i : i + block])
            count, seen = queries.shape[1], first + min(i + block, positions)
            shape = (batch, count * heads, seen)
            scores = scratch(2, shape, queries.dtype)
            torch.bmm(queries.reshape(batch, count * heads, columns), keys[:, :seen].transpose(1, 2), out=scores)
            scores.mul_(scale)
            if count > 1:
                rows = torch.arange(first + i, first + i + count).unsqueeze(1)
                hidden = (torch.arange(seen) > rows).unsqueeze(1)
                scores.view(batch, count, heads, seen).masked_fill_(hidden, float("-inf"))
            torch.softmax(scores, -1, out=scores)
            made = torch.bmm(scores, keys[:, :seen, :rank])
            y[:, i : i + count].copy_(made.view(batch, count, heads, rank))

    return run


def cache_write(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (cache, latent, start), (out,) = inputs, outputs
    in_place = cache.data_ptr() == out.data_ptr()

    def run() -> None:
        if not in_place:
            out.copy_(cache)
        out.narrow(1, int(start), latent.shape[1]).copy_(latent)

    return run


ATTENTION = (
    Implementation("attention", attention),
    Implementation("attention_grad", attention_grad),
    Implementation("latent_attention", latent_attention),
    Implementation("cache_write", cache_write),
)
