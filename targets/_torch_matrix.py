"""Matrix products with torch: linear layers and their gradients, experts, and MLA's absorbed projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dsv3c.lazy import lazy
from dsv3c.target import Implementation
from dsv3c.targets._scratch import widened

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


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out[rows, n] = a[rows, k] · b[k, n]."""
    torch.mm(a, b, out=out)


def linear(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (x, w), (y,) = inputs, outputs
    return _product(x, w.t(), y)


def linear_dgrad(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (dy, w), (dx,) = inputs, outputs
    return _product(dy, w, dx)


def _product(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> Call:
    out = y.view(-1, y.shape[-1])
    if viewable(x):
        rows = matrix(x)
        return lambda: product(rows, w, out)
    return lambda: product(matrix(x), w, out)


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
    return _grouped(x, w.transpose(1, 2), offsets, y)


def grouped_linear_dgrad(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
    (dy, w, offsets), (dx,) = inputs, outputs
    return _grouped(dy, w, offsets, dx)


def _grouped(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, y: torch.Tensor) -> Call:
    weights = w.unbind(0)

    def run() -> None:
        ends = offsets.tolist()
        y[: ends[0]].zero_()
        for e, weight in enumerate(weights):
            start, stop = ends[e], ends[e + 1]
            if stop > start:
                product(x[start:stop], weight, y[start:stop])
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
