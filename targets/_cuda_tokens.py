"""What happens per token on Hopper: embedding, loss, rows in the order of experts, the gradient norm; never waiting
for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.lazy import lazy
from dsv3c.ops.rotary import frequencies
from dsv3c.target import Implementation
from dsv3c.targets._cuda_launch import Call, launch, scratch, width, words
from dsv3c.targets._cuda_text import (
    CHOOSE_EXPERTS,
    CROSS_ENTROPY,
    CROSS_ENTROPY_GRAD,
    EMBEDDING_WGRAD,
    PERMUTE,
    SORT_BY_EXPERT,
    SUM_SQUARES,
    UNPERMUTE,
)
from dsv3c.targets._torch_tokens import choose_experts as _choose_experts
from dsv3c.targets._torch_tokens import embedding, permute_weights, unpermute_weights

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Tensors = tuple["torch.Tensor", ...]

CHUNK = 128
"""Choices that one program counts and places."""
SQUARES_PROGRAMS, SQUARES_BLOCK = 1056, 4096
"""Programs that share a sum of squares, and numbers that one takes at a time."""


def embedding_wgrad(inputs: Tensors, outputs: Tensors, *, vocab: int, accumulate: bool = False) -> Call:
    """Rows of one token are added in their order, so that bits repeat."""
    (tokens, dy), (dw,) = inputs, outputs
    count, cols = tokens.numel(), dw.shape[1]
    sorted_tokens, order = (scratch(slot, (count,), torch.int64, dw.device) for slot in (20, 21))
    rows = dy.view(-1, cols)
    block = width(cols, 1024)
    values = {"tokens": sorted_tokens, "order": order, "dy": rows, "dw": dw, "count": count, "cols": cols}
    go = launch(EMBEDDING_WGRAD, "embedding_wgrad", (count, -(-cols // block)), values, BLOCK=block,
                ADD=int(accumulate))  # fmt: skip

    def run() -> None:
        torch.sort(tokens.reshape(-1).long(), stable=True, out=(sorted_tokens, order))
        if not accumulate:
            dw.zero_()
        go()

    return run


def cross_entropy(inputs: Tensors, outputs: Tensors) -> Call:
    (logits, labels), (loss, lse) = inputs, outputs
    vocab, count = logits.shape[-1], labels.numel()
    part = scratch(22, (count,), torch.float32, logits.device)
    values = {"logits": logits, "labels": labels, "lse": lse, "part": part, "vocab": vocab}
    go = launch(CROSS_ENTROPY, "cross_entropy", (count,), values, BLOCK=width(vocab, 2048))

    def run() -> None:
        go()
        loss.copy_(part.sum() / (labels >= 0).sum().clamp_(min=1))

    return run


def cross_entropy_grad(inputs: Tensors, outputs: Tensors) -> Call:
    (dloss, logits, labels, lse), (dlogits,) = inputs, outputs
    vocab, count = logits.shape[-1], labels.numel()
    factor = scratch(23, (1,), torch.float32, logits.device)
    block = width(vocab, 2048)
    values = {"logits": logits, "labels": labels, "lse": lse, "factor": factor, "out": dlogits, "vocab": vocab}
    go = launch(CROSS_ENTROPY_GRAD, "cross_entropy_grad", (count, -(-vocab // block)), values, BLOCK=block)

    def run() -> None:
        torch.div(dloss.view(1), (labels >= 0).sum().clamp_(min=1), out=factor)
        go()

    return run


def sort_by_expert(inputs: Tensors, outputs: Tensors, *, experts: int, align: int, rows: str = "") -> Call:
    """Count in chunks, add up over chunks, place: the order of choices is kept, so that bits repeat."""
    (e,), (offsets, slot, source) = inputs, outputs
    count, names = e.numel(), width(experts, 2**30)
    chunks = max(1, -(-count // CHUNK))
    counts, sums = (scratch(i, (chunks, names), torch.int32, e.device) for i in (20, 21))
    flat = e.view(-1)
    sizes = {"EXPERTS": names, "CHUNK": CHUNK}
    wide = min(names, 8)
    add_up = launch(SORT_BY_EXPERT, "add_up_choices", (names // wide,), {"counts": counts, "sums": sums,
                    "chunks": chunks}, EXPERTS=names, WIDTH=wide, CHUNKS=256)  # fmt: skip
    tally = launch(SORT_BY_EXPERT, "count_choices", (chunks,), {"e": flat, "counts": counts, "count": count}, **sizes)
    values = {"e": flat, "sums": sums, "offsets": offsets, "slot": slot, "source": source, "count": count,
              "experts": experts, "chunks": chunks, "align": align}  # fmt: skip
    place = launch(SORT_BY_EXPERT, "place_choices", (chunks,), values, **sizes)

    def run() -> None:
        source.fill_(-1)
        tally()
        add_up()
        place()

    return run


def choose_experts(inputs: Tensors, outputs: Tensors, *, k: int, groups: int, kept: int) -> Call:
    """The best group, then the best expert, so many times over; ties go to the lower index."""
    (s, bias), (e,) = inputs, outputs
    size = s.shape[-1] // groups
    if s.dtype != torch.float32 or not s.is_contiguous():
        return _choose_experts(inputs, outputs, k=k, groups=groups, kept=kept)
    wide = {"GROUPS": width(groups, 2**30), "SIZE": width(size, 2**30)}
    rows, together = e.numel() // k, max(1, 1024 // (wide["GROUPS"] * wide["SIZE"]))
    values = {"s": s, "bias": bias, "e": e, "rows": rows, "groups": groups, "size": size}
    return launch(CHOOSE_EXPERTS, "choose_experts", (-(-rows // together),), values, **wide,
                  KEPT=kept if kept < groups else wide["GROUPS"], K=k, ROWS=together)  # fmt: skip


def permute(inputs: Tensors, outputs: Tensors) -> Call:
    (x, source, slot), (y,) = inputs, outputs
    from_, to = words(x), words(y)
    rows, block = to.shape[0], width(to.shape[1], 2048)
    together = max(1, 4096 // block)
    values = {"x": from_, "source": source, "y": to, "rows": rows, "words": to.shape[1], "choices": slot.shape[1]}
    grid = (-(-rows // together), -(-to.shape[1] // block))
    return launch(PERMUTE, "permute", grid, values, warps=8, ROWS=together, BLOCK=block)


def unpermute(inputs: Tensors, outputs: Tensors) -> Call:
    (y, slot, _source), (x,) = inputs, outputs
    cols = x.shape[1]
    block = width(cols, 1024)
    values = {"y": y, "slot": slot, "x": x, "cols": cols}
    return launch(UNPERMUTE, "unpermute", (x.shape[0], -(-cols // block)), values, K=slot.shape[1], BLOCK=block)


def sum_squares(inputs: Tensors, outputs: Tensors) -> Call:
    """Partial sums, whose number does not depend on the GPU, so that bits repeat; nothing as large as the input."""
    (g,), (out,) = inputs, outputs
    if not g.is_contiguous():
        return lambda: out.copy_(torch.linalg.vector_norm(g, dtype=out.dtype).square_())  # type: ignore[return-value]
    part = scratch(24, (SQUARES_PROGRAMS,), torch.float32, g.device)
    blocks, rest = divmod(g.numel(), SQUARES_BLOCK)
    values = {"x": g.view(-1), "part": part, "blocks": blocks, "rest": rest}
    go = launch(SUM_SQUARES, "sum_squares", (SQUARES_PROGRAMS,), values, warps=8, BLOCK=SQUARES_BLOCK)

    def run() -> None:
        go()
        torch.sum(part, 0, out=out)

    return run


def rotary_table(inputs: Tensors, outputs: Tensors, *, dim: int, base: float, factor: float, original: int,
                 beta_fast: float, beta_slow: float, magnitude: float, dtype: str) -> Call:  # fmt: skip
    """Angles per position are computed on the CPU, once."""
    (positions,), (cos, sin) = inputs, outputs
    turn = frequencies(dim=dim, base=base, factor=factor, original=original, beta_fast=beta_fast,
                       beta_slow=beta_slow, dtype=cos.dtype).to(cos.device)  # fmt: skip

    def run() -> None:
        angles = positions.to(cos.dtype).unsqueeze(-1) * turn
        torch.mul(torch.cos(angles), magnitude, out=cos)
        torch.mul(torch.sin(angles), magnitude, out=sin)

    return run


def sum_heads(inputs: Tensors, outputs: Tensors) -> Call:
    (x,), (y,) = inputs, outputs

    def run() -> None:
        torch.sum(x, -2, out=y)  # adds up in float32

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
    Implementation("rotary_table", rotary_table),
    Implementation("sum_heads", sum_heads),
    Implementation("sum_squares", sum_squares),
)

