"""What happens per token with torch: embedding, loss, rows in the order of experts, and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dsv3c.lazy import lazy
from dsv3c.ops.permute import SORT_BY_EXPERT
from dsv3c.target import Implementation
from dsv3c.targets._scratch import scratch, widened

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Call = Callable[[], None]

CACHED = 2**17
"""Numbers that several operations in a row work on, so that they stay in a core's cache."""


def _chunks(rows: int, cols: int) -> Iterator[slice]:
    step = max(1, CACHED // max(cols, 1))
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def embedding(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], *, dtype: str) -> Call:
    (tokens, w), (y,) = inputs, outputs
    out = y.view(-1, y.shape[-1])

    def run() -> None:
        if w.dtype == y.dtype:
            torch.index_select(w, 0, tokens.reshape(-1), out=out)
        else:
            out.copy_(torch.index_select(w, 0, tokens.reshape(-1)))

    return run


def embedding_wgrad(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], *, vocab: int,
                    accumulate: bool = False) -> Call:  # fmt: skip
    (tokens, dy), (dw,) = inputs, outputs

    def run() -> None:
        if not accumulate:
            dw.zero_()
        dw.index_add_(0, tokens.reshape(-1), widened(0, dy).reshape(-1, dy.shape[-1]))

    return run


def cross_entropy(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (logits, labels), (loss, lse) = inputs, outputs
    cols = logits.shape[-1]
    sums = lse.view(-1)

    def run() -> None:
        rows, flat = logits.reshape(-1, cols), labels.reshape(-1)
        for part in _chunks(len(flat), cols):
            z = widened(0, rows[part])
            top = z.amax(-1)
            shifted = scratch(1, tuple(z.shape), z.dtype)
            torch.sub(z, top.unsqueeze(-1), out=shifted).exp_()
            torch.add(top, shifted.sum(-1).log_(), out=sums[part])
        keep = flat >= 0
        chosen = rows.gather(-1, flat.clamp(min=0).unsqueeze(-1)).squeeze(-1).to(sums.dtype)
        total = torch.where(keep, sums - chosen, 0).sum()
        torch.div(total, keep.sum().clamp_(min=1), out=loss)

    return run


def cross_entropy_grad(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (dloss, logits, labels, lse), (dlogits,) = inputs, outputs
    cols = logits.shape[-1]
    out = dlogits.view(-1, cols)

    def run() -> None:
        rows, flat, sums = logits.reshape(-1, cols), labels.reshape(-1), lse.reshape(-1)
        keep = flat >= 0
        factor = torch.where(keep, dloss / keep.sum().clamp_(min=1), 0).unsqueeze(-1)
        place = flat.clamp(min=0).unsqueeze(-1)
        for part in _chunks(len(flat), cols):
            target = out[part] if dlogits.dtype == lse.dtype else scratch(0, tuple(out[part].shape), lse.dtype)
            torch.sub(rows[part], sums[part].unsqueeze(-1), out=target)
            target.exp_().mul_(factor[part]).scatter_add_(-1, place[part], -factor[part])
            if dlogits.dtype != lse.dtype:
                out[part].copy_(target)

    return run


def choose_experts(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], *, k: int, groups: int,
                   kept: int) -> Call:  # fmt: skip
    """The best one k times over: a few passes where a stable sort takes milliseconds. Ties go to the lower index."""
    (s, bias), (e,) = inputs, outputs
    experts, chosen = s.shape[-1], e.view(-1, k)

    def run() -> None:
        scores = widened(0, s).reshape(-1, experts) + bias
        if kept < groups:
            grouped = scores.view(-1, groups, experts // groups)
            best = grouped.topk(min(2, experts // groups), -1).values.sum(-1)
            hidden = torch.ones_like(best, dtype=torch.bool)
            for _ in range(kept):
                group = best.argmax(-1, keepdim=True)
                hidden.scatter_(-1, group, False)
                best.scatter_(-1, group, float("-inf"))
            grouped.masked_fill_(hidden.unsqueeze(-1), float("-inf"))
        for j in range(k):
            expert = scores.argmax(-1, keepdim=True)
            chosen[:, j : j + 1].copy_(expert)
            scores.scatter_(-1, expert, float("-inf"))

    return run


def permute(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (x, source, slot), (y,) = inputs, outputs
    k = slot.shape[1]

    def run() -> None:
        torch.index_select(x, 0, source.clamp(min=0).div_(k, rounding_mode="floor"), out=y)
        padding = (source < 0).nonzero().squeeze(-1)
        if padding.numel():
            y.index_fill_(0, padding, 0)

    return run


def unpermute(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    """A sum of rows by index is what embedding_bag does; it would add bf16 in bf16, so that rows go in wide."""
    (y, slot, _source), (x,) = inputs, outputs

    def run() -> None:
        rows = widened(0, y)
        missing = slot < 0
        if not bool(missing.any()):
            x.copy_(torch.nn.functional.embedding_bag(slot, rows, mode="sum"))
            return
        part = scratch(1, tuple(x.shape), rows.dtype)
        total = scratch(2, tuple(x.shape), rows.dtype).zero_()
        for j in range(slot.shape[1]):
            torch.index_select(rows, 0, slot[:, j].clamp(min=0), out=part)
            total.add_(part.masked_fill_(missing[:, j : j + 1], 0))
        x.copy_(total)

    return run


def permute_weights(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (p, source, _slot), (out,) = inputs, outputs
    return lambda: _select(p, source, out)


def unpermute_weights(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (dp, slot, _source), (out,) = inputs, outputs
    return lambda: _select(dp, slot, out)


def _select(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """out = x.flatten()[index], 0 where the index is negative."""
    flat = index.reshape(-1)
    torch.index_select(x.reshape(-1), 0, flat.clamp(min=0), out=out.view(-1))
    out.view(-1).masked_fill_(flat < 0, 0)


def sum_squares(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (g,), (out,) = inputs, outputs

    def run() -> None:
        flat = g.reshape(-1)
        total = 0.0
        for part in _chunks(flat.numel(), 1):
            wide = widened(0, flat[part])
            total += float(torch.dot(wide, wide))
        out.fill_(total)

    return run


def sort_by_expert(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], *, experts: int, align: int,
                   rows: str = "") -> Call:  # fmt: skip
    """As the reference, with as many rows as there is memory for: more never come, by how tokens were sent."""
    (e,), (offsets, slot, source) = inputs, outputs
    room = source.numel()

    def run() -> None:
        begins, places, origins = SORT_BY_EXPERT.reference(e, experts=experts, align=align)
        offsets.copy_(begins)
        slot.copy_(places)
        source[origins.numel() :] = -1
        source[: origins.numel()].copy_(origins[:room])

    return run


TOKENS = (
    Implementation("embedding", embedding),
    Implementation("embedding_wgrad", embedding_wgrad, accumulates=True),
    Implementation("cross_entropy", cross_entropy),
    Implementation("cross_entropy_grad", cross_entropy_grad),
    Implementation("choose_experts", choose_experts),
    Implementation("sort_by_expert", sort_by_expert),
    Implementation("permute", permute),
    Implementation("unpermute", unpermute),
    Implementation("permute_weights", permute_weights),
    Implementation("unpermute_weights", unpermute_weights),
    Implementation("sum_squares", sum_squares),
)
