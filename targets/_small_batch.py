"""A few tokens at a time, as in decoding: the routing ops with numpy on the tensors' memory, products row by row.

A torch call on ten numbers costs several microseconds and these ops would make hundreds of them for one token. The
functions take a batch if it is small and of a type that numpy has; otherwise the general implementation serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from dsv3c.ir import DType
from dsv3c.lazy import lazy
from dsv3c.ops.rotary import ROTARY_TABLE
from dsv3c.target import Implementation
from dsv3c.tensors import ir_dtype

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Call = Callable[[], None]
Tensors: TypeAlias = "tuple[torch.Tensor, ...]"

MOST_TOKENS = 4
MOST_HEADS = 8
PLAIN = (DType.f32, DType.f64, DType.i32, DType.i64)


def choose_experts(inputs: Tensors, outputs: Tensors, *, k: int, groups: int, kept: int) -> Call:
    """Sorting is stable, so that ties go to the lower index; group scores are rounded as their type rounds."""
    (s, bias), (e,) = (tuple(t.numpy() for t in ts) for ts in (inputs, outputs))
    scores, chosen = s.reshape(-1, s.shape[-1]), e.reshape(-1, k)
    size = scores.shape[1] // groups
    number = scores.dtype.type
    spans = [range(g * size, (g + 1) * size) for g in range(groups)]

    def best(row: list[float], span: range) -> float:
        second, first = sorted(row[span.start : span.stop])[-2:]
        return float(number(first) + number(second))

    def run() -> None:
        for out, row in zip(chosen, (scores + bias).tolist(), strict=True):
            open_ones: list[int] | range = range(len(row))
            if kept < groups:
                order = sorted(range(groups), key=lambda g: -best(row, spans[g]))
                open_ones = [i for g in sorted(order[:kept]) for i in spans[g]]
            out[:] = sorted(open_ones, key=lambda i: -row[i])[:k]

    return run


def embedding(inputs: Tensors, outputs: Tensors, *, dtype: str) -> Call:
    (tokens, w), (x,) = (tuple(t.numpy() for t in ts) for ts in (inputs, outputs))
    del dtype  # that of the output

    def run() -> None:
        x[:] = w[tokens]

    return run


def pick(inputs: Tensors, outputs: Tensors) -> Call:
    (s, e), (p,) = (tuple(t.numpy() for t in ts) for ts in (inputs, outputs))
    scores, chosen, picked = s.reshape(-1, s.shape[-1]), e.reshape(-1, e.shape[-1]), p.reshape(-1, p.shape[-1])
    rows = np.arange(len(scores))[:, None]

    def run() -> None:
        picked[:] = scores[rows, chosen]

    return run


def dispatch(inputs: Tensors, outputs: Tensors) -> Call:
    """On one rank every token stays where it is."""
    pairs = [(o.numpy(), i.numpy().reshape(o.shape)) for i, o in zip(inputs, outputs[:3], strict=True)]
    handle = outputs[3].numpy().reshape(-1)
    order = np.arange(len(handle), dtype=handle.dtype)

    def run() -> None:
        for out, value in pairs:
            out[:] = value
        handle[:] = order

    return run


def sort_by_expert(inputs: Tensors, outputs: Tensors, *, experts: int, align: int, rows: str = "") -> Call:
    (e,), (offsets, slot, source) = (tuple(t.numpy() for t in ts) for ts in (inputs, outputs))
    flat = slot.reshape(-1)

    def run() -> None:
        chosen = e.reshape(-1).tolist()
        order = sorted((x, i) for i, x in enumerate(chosen) if x >= 0)
        places, origins, begins, at, last = [-1] * len(chosen), [-1] * len(source), [0], 0, 0
        for expert, i in order:
            while last < expert:
                at += -at % align
                begins.append(at)
                last += 1
            places[i], origins[at] = at, i
            at += 1
        begins += [at + -at % align] * (experts - last)
        offsets[:], flat[:], source[:] = begins, places, origins

    return run


def permute(inputs: Tensors, outputs: Tensors) -> Call:
    (x, source, slot), (rows,) = (tuple(t.numpy() for t in ts) for ts in (inputs, outputs))
    k = slot.shape[1]
    if len(x) == 1 and len(rows) == k:  # every choice is the one token's; what lies on other ranks comes last

        def spread() -> None:
            rows[:] = x
            if source[-1] < 0:
                rows[source < 0] = 0

        return spread

    def run() -> None:
        np.take(x, source // k, axis=0, out=rows, mode="clip")
        rows[source < 0] = 0

    return run


def unpermute(inputs: Tensors, outputs: Tensors) -> Call:
    (y, slot, source), (x,) = (tuple(t.numpy() for t in ts) for ts in (inputs, outputs))
    if len(x) == 1 and len(y) == slot.shape[1]:

        def gathered() -> None:
            np.add.reduce(y if source[-1] >= 0 else y[source >= 0], axis=0, out=x[0])

        return gathered

    def run() -> None:
        found = y[slot]
        found[slot < 0] = 0
        found.sum(1, out=x)

    return run


def permute_weights(inputs: Tensors, outputs: Tensors) -> Call:
    (p, source, _slot), (rows,) = (tuple(t.numpy() for t in ts) for ts in (inputs, outputs))
    flat = p.reshape(-1)

    def run() -> None:
        np.take(flat, source, out=rows, mode="clip")
        rows[source < 0] = 0

    return run


def grouped_linear(inputs: Tensors, outputs: Tensors) -> Call:
    """One matrix-vector product for each row."""
    (x, w, offsets), (y,) = inputs, outputs
    weights, rows, results, begins = list(w), list(x), list(y), offsets.numpy()

    def run() -> None:
        at = 0
        for expert, end in enumerate(begins[1:].tolist()):
            while at < end:
                torch.mv(weights[expert], rows[at], out=results[at])
                at += 1
        for rest in results[at:]:
            rest.zero_()

    return run


def latent_attention(inputs: Tensors, outputs: Tensors, *, scale: float, rank: int) -> Call:
    """One new token of one sequence: its heads are the queries, the latents both keys and values."""
    (q, cache, start), (y,) = inputs, outputs
    heads, columns = q.shape[-2:]
    queries, made, first = q.view(1, 1, heads, columns), y.view(heads, rank), start.numpy()

    def run() -> None:
        seen = cache[:, None, : int(first) + 1]
        mixed = torch.nn.functional.scaled_dot_product_attention(queries, seen, seen, scale=scale)
        made.copy_(mixed[0, 0, :, :rank])

    return run


def absorb_query(inputs: Tensors, outputs: Tensors) -> Call:
    (q, kv_b), (y,) = inputs, outputs
    heads, key = q.shape[-2:]
    keys = kv_b.unflatten(0, (heads, -1))[:, :key]
    return _each_head([w.t() for w in keys], q, y)


def absorb_value(inputs: Tensors, outputs: Tensors, *, value: int) -> Call:
    (o, kv_b), (y,) = inputs, outputs
    return _each_head(list(kv_b.unflatten(0, (o.shape[-2], -1))[:, -value:]), o, y)


def _each_head(weights: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> Call:
    """One matrix-vector product for each head of one token."""
    heads = list(zip(weights, x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1]), strict=True))

    def run() -> None:
        for w, row, out in heads:
            torch.mv(w, row, out=out)

    return run


def linear(inputs: Tensors, outputs: Tensors) -> Call:
    """One row: a matrix-vector product."""
    (x, w), (y,) = inputs, outputs
    row, out = x.view(-1), y.view(-1)

    def run() -> None:
        torch.mv(w, row, out=out)

    return run


def copied(inputs: Tensors, outputs: Tensors) -> Call:
    """What moves no row on one rank: `combine`, `dispatch_again`."""
    out = outputs[0].numpy()
    value = inputs[0].numpy().reshape(out.shape)

    def run() -> None:
        out[:] = value

    return run


def positions_from(inputs: Tensors, outputs: Tensors) -> Call:
    start, out = inputs[1].numpy(), outputs[0].numpy()
    offsets = np.arange(out.shape[1], dtype=out.dtype)

    def run() -> None:
        np.add(start, offsets, out=out)

    return run


def rotary_table(inputs: Tensors, outputs: Tensors, **attrs: object) -> Call:
    """From a table that grows by doubling as positions are met."""
    (positions,), (cos, sin) = (tuple(t.numpy() for t in ts) for ts in (inputs, outputs))
    tables: list[np.ndarray] = []

    def run() -> None:
        highest = int(positions.max())
        if not tables or highest >= len(tables[0]):
            every = torch.arange(2 * max(highest, 63) + 2, dtype=torch.int32).unsqueeze(0)
            made = ROTARY_TABLE.reference(every, **attrs)
            tables[:] = [t[0].numpy() for t in made]
        np.take(tables[0], positions, axis=0, out=cos)
        np.take(tables[1], positions, axis=0, out=sin)

    return run


def cache_write(inputs: Tensors, outputs: Tensors) -> Call:
    """In place; the caller gave the cache to be continued."""
    (_cache, latent, start), (out,) = (tuple(t.numpy() for t in ts) for ts in (inputs, outputs))
    length = latent.shape[1]

    def run() -> None:
        first = int(start)
        out[:, first : first + length] = latent

    return run


def _tokens(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1] if x.dim() else 1


def _one_token_of_few_heads(inputs: Tensors, outputs: Tensors) -> bool:
    x = inputs[0]
    return x.is_contiguous() and x.numel() == x.shape[-2] * x.shape[-1] and x.shape[-2] <= MOST_HEADS


FEW: Mapping[str, tuple[Callable[..., Call], Callable[[Tensors, Tensors], bool]]] = {
    "embedding": (embedding, lambda i, o: i[0].numel() <= MOST_TOKENS),
    "choose_experts": (choose_experts, lambda i, o: _tokens(i[0]) <= MOST_TOKENS),
    "pick": (pick, lambda i, o: _tokens(i[0]) <= MOST_TOKENS),
    "dispatch": (dispatch, lambda i, o: _tokens(i[0]) <= MOST_TOKENS),
    "sort_by_expert": (sort_by_expert, lambda i, o: len(i[0]) <= MOST_TOKENS),
    "permute": (permute, lambda i, o: len(i[0]) <= MOST_TOKENS),
    "unpermute": (unpermute, lambda i, o: len(o[0]) <= MOST_TOKENS),
    "permute_weights": (permute_weights, lambda i, o: len(i[0]) <= MOST_TOKENS),
    "grouped_linear": (grouped_linear, lambda i, o: len(i[0]) <= 8 * MOST_TOKENS),
    "latent_attention": (latent_attention, lambda i, o: i[0].shape[0] == i[0].shape[1] == 1),
    "linear": (linear, lambda i, o: _tokens(i[0]) == 1 and i[0].is_contiguous()),
    "absorb_query": (absorb_query, _one_token_of_few_heads),
    "absorb_value": (absorb_value, _one_token_of_few_heads),
    "combine": (copied, lambda i, o: len(i[0]) <= MOST_TOKENS),
    "dispatch_again": (copied, lambda i, o: len(o[0]) <= MOST_TOKENS),
    "positions_from": (positions_from, lambda i, o: o[0].numel() <= MOST_TOKENS),
    "rotary_table": (rotary_table, lambda i, o: i[0].numel() <= MOST_TOKENS),
    "cache_write": (
        cache_write,
        lambda i, o: i[1].shape[1] == 1 and i[0].data_ptr() == o[0].data_ptr(),
    ),
}
"""By op: the implementation for a few tokens, and whether it takes these tensors."""


def for_few_tokens(general: Implementation) -> Implementation:
    """`general`, replaced by its small-batch form wherever that form takes the tensors."""
    if general.op not in FEW:
        return general
    small, takes = FEW[general.op]

    def prepare(inputs: Tensors, outputs: Tensors, **attrs: object) -> Call:
        plain = all(ir_dtype(t.dtype) in PLAIN and t.device.type == "cpu" for t in (*inputs, *outputs))
        if plain and all(t.is_contiguous() for t in outputs) and takes(inputs, outputs):
            return small(inputs, outputs, **attrs)
        return general.prepare(inputs, outputs, **attrs)

    return Implementation(general.op, prepare, general.accumulates)
