"""BF16 and FP32 matrix products on Hopper: cuBLAS for one weight, generated and CUTLASS kernels for one per expert.

Nothing here reads the device: where experts' rows lie is known to the kernels alone.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from dsv3c.lazy import lazy
from dsv3c.target import Implementation
from dsv3c.targets._cuda_launch import Call, gemm, in_turn, launch, scratch, words
from dsv3c.targets._cuda_text import TRANSPOSE, ZERO_TAIL
from dsv3c.targets._gluon_gemm import GemmSpec
from dsv3c.targets._torch_matrix import absorb_query, absorb_value, linear, linear_dgrad, matrix, viewable

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

ROWS_BF16 = GemmSpec("grouped_rows", "bf16", 256, 128, 4, pair="a")
COLUMNS_BF16 = GemmSpec("grouped_k", "bf16", 256, 128, 4, output="accumulate_f32", pair="a")
SPECS = (ROWS_BF16, COLUMNS_BF16)
"""Generated kernels that this module may launch."""

Tensors = tuple["torch.Tensor", ...]


def linear_wgrad(inputs: Tensors, outputs: Tensors, accumulate: bool = False) -> Call:
    (dy, x), (dw,) = inputs, outputs
    a, b = (t if t.dtype == dw.dtype or viewable(t) else t.contiguous() for t in (dy, x))

    def run() -> None:
        left, right = matrix(a).t(), matrix(b)
        if left.dtype == dw.dtype:
            torch.addmm(dw, left, right, beta=1 if accumulate else 0, out=dw)
        elif accumulate:
            dw.add_(torch.mm(left, right, out_dtype=dw.dtype))
        else:
            torch.mm(left, right, out_dtype=dw.dtype, out=dw)

    return run


def zero_tail(y: torch.Tensor, offsets: torch.Tensor) -> Call:
    """Zero the rows of `y` that no expert has."""
    flat, experts = words(y), offsets.shape[0] - 1
    if flat.dtype != torch.int32:
        raise AssertionError("rows of experts' results are whole words")
    values = {"y": flat, "offsets": offsets, "experts": experts, "rows": y.shape[0], "words": flat.shape[1]}
    return launch(ZERO_TAIL, "zero_tail", (y.shape[0],), values, BLOCK=1024)


def fits_tma(*matrices: torch.Tensor) -> bool:
    """Whether TMA can address the rows of every matrix."""
    return all(t.stride(-1) == 1 and t.stride(-2) * t.dtype.itemsize % 16 == 0 and t.data_ptr() % 16 == 0
               for t in matrices)  # fmt: skip


def grouped_linear(inputs: Tensors, outputs: Tensors) -> Call:
    (x, w, offsets), (y,) = inputs, outputs
    if x.dtype != torch.bfloat16 or not fits_tma(x, w, y):
        return _each_expert(x, w.transpose(1, 2), offsets, y)
    values = {"a_desc": x, "b_desc": w, "c_desc": y, "offsets": offsets, "experts": w.shape[0], "M": x.shape[0],
              "N": w.shape[1], "K": w.shape[2]}  # fmt: skip
    return in_turn(gemm(ROWS_BF16, values), zero_tail(y, offsets))


def grouped_linear_dgrad(inputs: Tensors, outputs: Tensors) -> Call:
    (dy, w, offsets), (dx,) = inputs, outputs
    if dy.dtype != torch.bfloat16 or not fits_tma(dy, w, dx):
        return _each_expert(dy, w, offsets, dx)
    ends = offsets[1:]
    tail = zero_tail(dx, offsets)

    def run() -> None:
        dx.copy_(torch._grouped_mm(dy, w, offs=ends))
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


def turned(slot: int, x: torch.Tensor) -> tuple[torch.Tensor, Call]:
    """x[R, n] transposed into scratch [n, R], and the call that does it. Its rows step by a multiple of 16 bytes."""
    rows, cols = x.shape
    stride = -(-rows // 64) * 64
    room = scratch(slot, (cols, stride), x.dtype, x.device)
    values = {"x": x, "y": room, "rows": rows, "cols": cols, "step": x.stride(0),
              "stride": stride}  # fmt: skip
    grid = (-(-cols // 128), -(-rows // 128), 1)
    return room[:, :rows], launch(TRANSPOSE, "transpose", grid, values, warps=8, TILE=128)


def grouped_linear_wgrad(inputs: Tensors, outputs: Tensors, accumulate: bool = False) -> Call:
    (dy, x, offsets), (dw,) = inputs, outputs
    clear: Call = (lambda: None) if accumulate else functools.partial(_zero, dw)
    if dy.dtype != torch.bfloat16 or not fits_tma(dw):
        return in_turn(clear, _add_each_expert(dy, x, offsets, dw))
    (a, turn_a), (b, turn_b) = turned(0, dy), turned(1, x)
    n, k = dy.shape[1], x.shape[1]
    values = {"a_desc": a, "b_desc": b, "c_desc": dw, "offsets": offsets, "experts": dw.shape[0],
              "M": n, "N": k, "K": x.shape[0]}  # fmt: skip
    return in_turn(clear, turn_a, turn_b, gemm(COLUMNS_BF16, values))


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
