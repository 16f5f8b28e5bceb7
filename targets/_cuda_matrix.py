"""BF16 and FP32 matrix products on Hopper by what was chosen for each: cuBLAS, CUTLASS, or generated kernels.

Nothing here reads the device: where experts' rows lie is known to the kernels alone.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from dsv3c.lazy import lazy
from dsv3c.target import Implementation
from dsv3c.targets import _torch_matrix
from dsv3c.targets._cuda_launch import Call, in_turn, launch, words
from dsv3c.targets._cuda_products import Products, Values
from dsv3c.targets._cuda_text import ZERO_TAIL
from dsv3c.targets._products import STAGE
from dsv3c.targets._torch_matrix import absorb_query, absorb_value, matrix, viewable

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Tensors = tuple["torch.Tensor", ...]

TAIL_PROGRAMS = 1056
"""Programs that share the rows that no expert has."""


def linear(products: Products, inputs: Tensors, outputs: Tensors) -> Call:
    (x, w), (y,) = inputs, outputs
    return _dense(products, "linear", x, w, y) or _torch_matrix.linear(inputs, outputs)


def linear_dgrad(products: Products, inputs: Tensors, outputs: Tensors) -> Call:
    (dy, w), (dx,) = inputs, outputs
    return _dense(products, "linear_dgrad", dy, w, dx) or _torch_matrix.linear_dgrad(inputs, outputs)


def _dense(products: Products, op: str, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> Call | None:
    """By the generated kernel if that was chosen and the tensors lie as it needs them."""
    picked = products.pick(op, (x, w))
    if not picked.generated or not viewable(x):
        return None
    a, out = matrix(x), y.view(-1, y.shape[-1])
    if not fits_tma(a, w, out):
        return None
    values: Values = {"a_desc": a, "b_desc": w, "c_desc": out, "M": a.shape[0], "N": out.shape[1], "K": a.shape[1]}
    return picked.gemm(values)


def linear_wgrad(products: Products, inputs: Tensors, outputs: Tensors, accumulate: bool = False) -> Call:
    (dy, x), (dw,) = inputs, outputs
    picked = products.pick("linear_wgrad", inputs, accumulate)
    a, b = (t if t.dtype == dw.dtype or viewable(t) else t.contiguous() for t in (dy, x))
    if picked.generated and viewable(dy, x) and fits_tma(matrix(dy), matrix(x), dw):
        left, right = matrix(dy), matrix(x)
        whole = -(-left.shape[0] // STAGE) * STAGE  # what lies past the last row reads as zero
        offsets = torch.tensor((0, whole), dtype=torch.int32, device=dw.device)
        return picked.gemm(_sums(left, right, offsets, dw))

    def multiply() -> None:
        left, right = matrix(a).t(), matrix(b)
        if left.dtype == dw.dtype:
            torch.addmm(dw, left, right, beta=1 if accumulate else 0, out=dw)
        elif accumulate:
            torch.addmm(dw, left, right, out_dtype=dw.dtype, out=dw)
        else:
            torch.mm(left, right, out_dtype=dw.dtype, out=dw)

    return multiply


def _sums(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, dw: torch.Tensor) -> Values:
    """Arguments of a kernel that sums dy[rows, n] transposed · x[rows, k] over the rows of each group."""
    return {
        "a_desc": dy, "b_desc": x, "c_desc": dw, "offsets": offsets, "experts": offsets.shape[0] - 1,
        "M": dy.shape[1], "N": x.shape[1], "K": dy.shape[0],
    }  # fmt: skip


def zero_tail(y: torch.Tensor, offsets: torch.Tensor) -> Call:
    """Zero the rows of `y` that no expert has."""
    flat, experts = words(y), offsets.shape[0] - 1
    if flat.dtype != torch.int32:
        raise AssertionError("rows of experts' results are whole words")
    values = {"y": flat, "offsets": offsets, "experts": experts, "rows": y.shape[0], "words": flat.shape[1]}
    return launch(ZERO_TAIL, "zero_tail", (min(y.shape[0], TAIL_PROGRAMS),), values, BLOCK=1024)


def fits_tma(*matrices: torch.Tensor) -> bool:
    """Whether TMA can address the rows of every matrix."""
    return all(t.stride(-1) == 1 and t.stride(-2) * t.dtype.itemsize % 16 == 0 and t.data_ptr() % 16 == 0
               for t in matrices)  # fmt: skip


def grouped_linear(products: Products, inputs: Tensors, outputs: Tensors) -> Call:
    (x, w, offsets), (y,) = inputs, outputs
    if x.dtype != torch.bfloat16 or not fits_tma(x, w, y):
        return _each_expert(x, w.transpose(1, 2), offsets, y)
    picked = products.pick("grouped_linear", inputs)
    if not picked.generated:
        return _by_torch(x, w.transpose(1, 2), offsets, y)
    return in_turn(picked.gemm(_by_rows(x, w, offsets, y)), zero_tail(y, offsets))


def grouped_linear_dgrad(products: Products, inputs: Tensors, outputs: Tensors) -> Call:
    (dy, w, offsets), (dx,) = inputs, outputs
    if dy.dtype != torch.bfloat16 or not fits_tma(dy, w, dx):
        return _each_expert(dy, w, offsets, dx)
    picked = products.pick("grouped_linear_dgrad", inputs)
    if not picked.generated:
        return _by_torch(dy, w, offsets, dx)
    return in_turn(picked.gemm(_by_rows(dy, w, offsets, dx)), zero_tail(dx, offsets))


def _by_rows(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, y: torch.Tensor) -> Values:
    """Arguments of a kernel that multiplies the rows x[R, k] of each expert by its matrix, into y[R, n]."""
    return {
        "a_desc": x, "b_desc": w, "c_desc": y, "offsets": offsets, "experts": w.shape[0], "M": x.shape[0],
        "N": y.shape[1], "K": x.shape[1],
    }  # fmt: skip


def _by_torch(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, y: torch.Tensor) -> Call:
    """y = each expert's rows of x times its w[E, K, N]."""
    ends = offsets[1:]
    tail = zero_tail(y, offsets)

    def run() -> None:
        y.copy_(torch._grouped_mm(x, w, offs=ends))
        tail()

    return run


def _each_expert(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, y: torch.Tensor) -> Call:
    """Every row times every expert's matrix w[E, K, N], keeping what belongs: for shapes and types no kernel takes."""
    rows = torch.arange(x.shape[0], device=x.device)

    def run() -> None:
        y.zero_()
        for e in range(w.shape[0]):
            mine = (rows >= offsets[e]) & (rows < offsets[e + 1])
            y.copy_(torch.where(mine.unsqueeze(1), torch.mm(x, w[e]), y))

    return run


def grouped_linear_wgrad(products: Products, inputs: Tensors, outputs: Tensors, accumulate: bool = False) -> Call:
    (dy, x, offsets), (dw,) = inputs, outputs
    picked = products.pick("grouped_linear_wgrad", inputs, accumulate)
    if dy.dtype != torch.bfloat16 or not fits_tma(dy, x, dw) or not picked.generated:
        clear: Call = (lambda: None) if accumulate else functools.partial(_zero, dw)
        return in_turn(clear, _add_each_expert(dy, x, offsets, dw))
    return picked.gemm(_sums(dy, x, offsets, dw))


def _zero(x: torch.Tensor) -> None:
    x.zero_()


def _add_each_expert(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, dw: torch.Tensor) -> Call:
    rows = torch.arange(x.shape[0], device=x.device)

    def run() -> None:
        right = x.to(dw.dtype)
        for e in range(dw.shape[0]):
            mine = ((rows >= offsets[e]) & (rows < offsets[e + 1])).unsqueeze(1)
            dw[e].addmm_(torch.where(mine, dy, 0).to(dw.dtype).t(), torch.where(mine, right, 0))

    return run


def matrix_implementations(products: Products) -> tuple[Implementation, ...]:
    """Products of numbers that are not quantized, as chosen."""
    adding = (("linear_wgrad", linear_wgrad), ("grouped_linear_wgrad", grouped_linear_wgrad))
    others = (("linear", linear), ("linear_dgrad", linear_dgrad), ("grouped_linear", grouped_linear),
              ("grouped_linear_dgrad", grouped_linear_dgrad))  # fmt: skip
    return (
        *(Implementation(op, functools.partial(run, products)) for op, run in others),
        *(Implementation(op, functools.partial(run, products), accumulates=True) for op, run in adding),
        Implementation("absorb_query", absorb_query),
        Implementation("absorb_value", absorb_value),
    )
