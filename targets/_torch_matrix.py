"""Matrix products with torch: linear layers and their gradients, experts, and MLA's absorbed projections."""

from __future__ import annotations

import functools
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


def matrix(x: torch.Tensor) -> torch.Tensor:
    """x[..., n] as [rows, n]: a view where strides allow one, else a copy of what it holds now."""
    return x.reshape(-1, x.shape[-1])


def viewable(*tensors: torch.Tensor) -> bool:
    """Whether every tensor has a [rows, n] view, so that it can be taken once for all calls."""
    return all(matrix(t).data_ptr() == t.data_ptr() for t in tensors)


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this CPU has bf16 products; without them they take four times as long as float32."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    found = ask() if ask else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


FEW_ROWS = 16
"""Fewer rows than this do not pay for converting a weight."""


def product(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, transposed: bool) -> None:
    """out[rows, n] = x[rows, k] · w[k, n], or · w[n, k] `transposed`."""
    if x.dtype != torch.bfloat16 or multiplies_bf16() or x.shape[0] < FEW_ROWS:
        torch.mm(x, w.t() if transposed else w, out=out)
        return
    weight = widened(1, w)
    made = scratch(2, tuple(out.shape), torch.float32)
    out.copy_(torch.mm(widened(0, x), weight.t() if transposed else weight, out=made))


def linear(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (x, w), (y,) = inputs, outputs
    return _product(x, w, y, True)


def linear_dgrad(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (dy, w), (dx,) = inputs, outputs
    return _product(dy, w, dx, False)


def _product(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, transposed: bool) -> Call:
    out = y.view(-1, y.shape[-1])
    if not viewable(x):
        return lambda: product(matrix(x), w, out, transposed)
    rows = matrix(x)
    if x.dtype == torch.bfloat16:
        return lambda: product(rows, w, out, transposed)
    weight = w.t() if transposed else w
    return lambda: torch.mm(rows, weight, out=out)  # type: ignore[return-value]


def linear_wgrad(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], accumulate: bool = False) -> Call:
    (dy, x), (dw,) = inputs, outputs
    beta = 1 if accumulate else 0

    def add(a: torch.Tensor, b: torch.Tensor) -> None:
        torch.addmm(dw, a.t(), b, beta=beta, out=dw)

    if viewable(dy, x) and dy.dtype == x.dtype == dw.dtype:
        a, b = matrix(dy), matrix(x)
        return lambda: add(a, b)
    return lambda: add(widened(0, matrix(dy)), widened(1, matrix(x)))


def grouped_linear(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (x, w, offsets), (y,) = inputs, outputs
    return _grouped(x, w, offsets, y, True)


def grouped_linear_dgrad(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (dy, w, offsets), (dx,) = inputs, outputs
    return _grouped(dy, w, offsets, dx, False)


def _grouped(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, y: torch.Tensor, transposed: bool) -> Call:
    weights = w.unbind(0)

    def run() -> None:
        ends = offsets.tolist()
        y[: ends[0]].zero_()
        for e, weight in enumerate(weights):
            start, stop = ends[e], ends[e + 1]
            if stop > start:
                product(x[start:stop], weight, y[start:stop], transposed)
        y[ends[-1] :].zero_()

    return run


def grouped_linear_wgrad(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...],
                         accumulate: bool = False) -> Call:  # fmt: skip
    (dy, x, offsets), (dw,) = inputs, outputs
    parts = dw.unbind(0)
    beta = 1 if accumulate else 0

    def run() -> None:
        ends = offsets.tolist()
        a, b = widened(0, dy), widened(1, x)
        for e, part in enumerate(parts):
            start, stop = ends[e], ends[e + 1]
            if stop > start:
                torch.addmm(part, a[start:stop].t(), b[start:stop], beta=beta, out=part)
            elif not accumulate:
                part.zero_()

    return run


def absorb_query(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (q, kv_b), (y,) = inputs, outputs
    keys = kv_b.unflatten(0, (q.shape[-2], -1))[:, : q.shape[-1]]
    return _per_head(q, keys, y)


def absorb_value(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], *, value: int) -> Call:
    (o, kv_b), (y,) = inputs, outputs
    values = kv_b.unflatten(0, (o.shape[-2], -1))[:, -value:]
    return _per_head(o, values.transpose(1, 2), y)


def _per_head(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> Call:
    """y[..., h, :] = x[..., h, :] · w[h]."""
    out = y.view(-1, *y.shape[-2:]).transpose(0, 1)

    def run() -> None:
        torch.bmm(x.reshape(-1, *x.shape[-2:]).transpose(0, 1), w, out=out)

    return run


MATRIX = (
    Implementation("linear", linear),
    Implementation("linear_dgrad", linear_dgrad),
    Implementation("linear_wgrad", linear_wgrad, accumulates=True),
    Implementation("grouped_linear", grouped_linear),
    Implementation("grouped_linear_dgrad", grouped_linear_dgrad),
    Implementation("grouped_linear_wgrad", grouped_linear_wgrad, accumulates=True),
    Implementation("absorb_query", absorb_query),
    Implementation("absorb_value", absorb_value),
)
