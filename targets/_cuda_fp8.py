"""Products of quantized operands on Hopper by what was chosen for each, and what quantizes along rows and in blocks.

Products go through generated kernels or cuBLASLt's block-scaled ones; what neither takes goes through float32. Both
want the scales of a tile row as [tiles, rows], so scales are transposed first.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from dsv3c.lazy import lazy
from dsv3c.ops.quantize import TILE, spread
from dsv3c.target import Implementation
from dsv3c.targets._cuda_launch import Call, in_turn, launch, scratch
from dsv3c.targets._cuda_matrix import fits_tma, zero_tail
from dsv3c.targets._cuda_products import Picked, Products, Values
from dsv3c.targets._cuda_text import QUANTIZE_BLOCK, QUANTIZE_BLOCK_BOTH, QUANTIZE_ROWS, TRANSPOSE
from dsv3c.targets._products import FALLBACK
from dsv3c.targets._torch_matrix import matrix, viewable

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

SCALE_COLUMNS = 256
"""Transposed scales step by a multiple of this, the widest tile of a generated kernel."""

Tensors = tuple["torch.Tensor", ...]


def _copy(to: torch.Tensor, what: torch.Tensor) -> Call:
    def run() -> None:
        to.copy_(what)

    return run


def _tiles_first(slot: int, s: torch.Tensor) -> tuple[torch.Tensor, Call]:
    """Scales s[rows, tiles] as [tiles, rows] in scratch, whose rows step by a multiple of SCALE_COLUMNS."""
    rows, tiles = s.shape
    stride = -(-rows // SCALE_COLUMNS) * SCALE_COLUMNS
    room = scratch(slot, (tiles, stride), s.dtype, s.device)
    return room, _copy(room[:, :rows], s.t())


def _unpadded(slot: int, s: torch.Tensor) -> tuple[torch.Tensor, Call]:
    room = scratch(slot, (s.shape[1], s.shape[0]), s.dtype, s.device)
    return room, _copy(room, s.t())


def linear_fp8(products: Products, inputs: Tensors, outputs: Tensors) -> Call:
    (q, s, w, ws), (y,) = inputs, outputs
    picked = products.pick("linear_fp8", inputs)
    whole = viewable(q, s, y) and all(t.is_contiguous() for t in (w, ws))
    if picked.name == FALLBACK or not whole:
        return _widened(q, s, w, ws, y)
    a, out, tiles = matrix(q), y.view(-1, y.shape[-1]), matrix(s)
    (m, k), n = a.shape, w.shape[0]
    if not picked.generated:
        sa, turn = _unpadded(10, tiles)

        def run() -> None:
            turn()
            torch._scaled_mm(a, w.t(), sa.t(), ws.t(), out_dtype=torch.bfloat16, out=out)

        return run
    if not fits_tma(a, w, out):
        return _widened(q, s, w, ws, y)
    room, turn = _tiles_first(10, tiles)
    values: Values = {
        "a_desc": a, "b_desc": w, "c_desc": out, "a_scale": room, "b_scale": ws, "M": m, "N": n, "K": k,
        "a_scale_stride": room.stride(0),
    }  # fmt: skip
    return in_turn(turn, picked.gemm(values))


def _widened(q: torch.Tensor, s: torch.Tensor, w: torch.Tensor, ws: torch.Tensor, y: torch.Tensor) -> Call:
    """Through float32, for shapes that no kernel takes."""

    def run() -> None:
        left = matrix(q).float() * spread(matrix(s), q.shape[-1])
        right = w.float() * spread(spread(ws, w.shape[1]), w.shape[0], -2)
        y.copy_(torch.mm(left, right.t()).view(y.shape))

    return run


def linear_fp8_wgrad(products: Products, inputs: Tensors, outputs: Tensors, accumulate: bool = False) -> Call:
    (dy, dys, x, xs), (dw,) = inputs, outputs
    rows = dy.shape[1]
    picked = products.pick("linear_fp8_wgrad", inputs, accumulate)
    if picked.name == FALLBACK:

        def wide() -> None:
            left, right = (q.float() * spread(s, rows) for q, s in ((dy, dys), (x, xs)))
            torch.addmm(dw, left, right.t(), beta=1 if accumulate else 0, out=dw)

        return wide
    if picked.generated:
        offsets = torch.tensor((0, rows), dtype=torch.int32, device=dy.device)
        return _columns(picked, dy, dys, x, xs, offsets, dw)
    (sa, turn_a), (sb, turn_b) = _unpadded(10, dys), _unpadded(11, xs)

    def run() -> None:
        turn_a()
        turn_b()
        torch._scaled_mm(dy, x.t(), sa.t(), sb, out_dtype=torch.float32, out=dw)

    return run


def _columns(picked: Picked, dy: torch.Tensor, dys: torch.Tensor, x: torch.Tensor, xs: torch.Tensor,
             offsets: torch.Tensor, dw: torch.Tensor) -> Call:  # fmt: skip
    """dy · x transposed over the columns of each expert."""
    (sa, turn_a), (sb, turn_b) = _tiles_first(10, dys), _tiles_first(11, xs)
    values: Values = {
        "a_desc": dy, "b_desc": x, "c_desc": dw, "offsets": offsets, "experts": offsets.shape[0] - 1,
        "M": dy.shape[0], "N": x.shape[0], "K": dy.shape[1],
        "a_scale": sa, "b_scale": sb, "a_scale_stride": sa.stride(0), "b_scale_stride": sb.stride(0),
    }  # fmt: skip
    return in_turn(turn_a, turn_b, picked.gemm(values))


def grouped_linear_fp8(products: Products, inputs: Tensors, outputs: Tensors) -> Call:
    (q, s, w, ws, offsets), (y,) = inputs, outputs
    picked = products.pick("grouped_linear_fp8", inputs)
    if not picked.generated or not fits_tma(q, w, y):
        return _each_expert(q, s, w, ws, offsets, y)
    sa, turn = _tiles_first(10, s)
    values: Values = {
        "a_desc": q, "b_desc": w, "c_desc": y, "a_scale": sa, "b_scale": ws, "offsets": offsets, "experts": w.shape[0],
        "M": q.shape[0], "N": w.shape[1], "K": w.shape[2], "a_scale_stride": sa.stride(0),
    }  # fmt: skip
    return in_turn(turn, picked.gemm(values), zero_tail(y, offsets))


def _each_expert(q: torch.Tensor, s: torch.Tensor, w: torch.Tensor, ws: torch.Tensor, offsets: torch.Tensor,
                 y: torch.Tensor) -> Call:  # fmt: skip
    rows = torch.arange(q.shape[0], device=q.device)

    def run() -> None:
        left = q.float() * spread(s, q.shape[1])
        y.zero_()
        for e in range(w.shape[0]):
            mine = ((rows >= offsets[e]) & (rows < offsets[e + 1])).unsqueeze(1)
            right = w[e].float() * spread(spread(ws[e], w.shape[2]), w.shape[1], -2)
            y.copy_(torch.where(mine, torch.mm(left, right.t()), y))

    return run


def _aligned(slot: int, q: torch.Tensor) -> tuple[torch.Tensor, Call]:
    """Codes whose rows step by a multiple of 16 bytes: `q` itself, or a copy."""
    if fits_tma(q):
        return q, lambda: None
    room = scratch(slot, (q.shape[0], -(-q.shape[1] // TILE) * TILE), q.dtype, q.device)[:, : q.shape[1]]
    return room, _copy(room.view(torch.uint8), q.view(torch.uint8))


def grouped_linear_fp8_wgrad(products: Products, inputs: Tensors, outputs: Tensors, accumulate: bool = False) -> Call:
    (dy, dys, x, xs, offsets), (dw,) = inputs, outputs
    picked = products.pick("grouped_linear_fp8_wgrad", inputs, accumulate)
    if not picked.generated or not fits_tma(dw):
        add = _add_each_expert(dy, dys, x, xs, offsets, dw)
        return add if accumulate else in_turn(dw.zero_, add)
    (a, copy_a), (b, copy_b) = _aligned(14, dy), _aligned(15, x)
    return in_turn(copy_a, copy_b, _columns(picked, a, dys, b, xs, offsets, dw))


def _add_each_expert(dy: torch.Tensor, dys: torch.Tensor, x: torch.Tensor, xs: torch.Tensor, offsets: torch.Tensor,
                     dw: torch.Tensor) -> Call:  # fmt: skip
    rows = dy.shape[1]
    at = torch.arange(rows, device=dy.device)

    def run() -> None:
        left, right = (q.float() * spread(s, rows) for q, s in ((dy, dys), (x, xs)))
        for e in range(dw.shape[0]):
            mine = (at >= offsets[e]) & (at < offsets[e + 1])
            dw[e].addmm_(torch.where(mine, left, 0), torch.where(mine, right, 0).t())

    return run


def quantize_rows(inputs: Tensors, outputs: Tensors, *, power_of_two: bool) -> Call:
    (x,), (q, s) = inputs, outputs
    n, rows = q.shape
    flat = matrix(x) if viewable(x) else scratch(13, (rows, n), x.dtype, x.device)
    values = {"x": flat, "q": q, "s": s, "rows": rows, "cols": n, "step": flat.stride(0), "tiles": s.shape[1]}
    grid = (s.shape[1], -(-n // 64))
    go = launch(QUANTIZE_ROWS, "quantize_rows", grid, values, BLOCK=64, POWER=int(power_of_two))
    return go if viewable(x) else in_turn(functools.partial(_gather, flat, x), go)


def _gather(to: torch.Tensor, x: torch.Tensor) -> None:
    to.copy_(x.reshape(to.shape))


def quantize_block(inputs: Tensors, outputs: Tensors, *, power_of_two: bool) -> Call:
    (w,), (q, s) = inputs, outputs
    n, k = w.shape[-2:]
    values = {"w": w.contiguous() if not w.is_contiguous() else w, "q": q, "s": s, "rows": n, "cols": k}
    grid = (s.shape[-1], s.shape[-2], w[..., 0, 0].numel())
    return launch(QUANTIZE_BLOCK, "quantize_block", grid, values, warps=8, POWER=int(power_of_two))


def quantize_block_both(inputs: Tensors, outputs: Tensors, *, power_of_two: bool) -> Call:
    (w,), (q, s, qt, st) = inputs, outputs
    n, k = w.shape[-2:]
    values = {"w": w.contiguous() if not w.is_contiguous() else w, "q": q, "s": s, "qt": qt, "st": st, "rows": n,
              "cols": k}  # fmt: skip
    grid = (s.shape[-1], s.shape[-2], w[..., 0, 0].numel())
    return launch(QUANTIZE_BLOCK_BOTH, "quantize_block_both", grid, values, warps=8, POWER=int(power_of_two))


def transpose_blocks(inputs: Tensors, outputs: Tensors) -> Call:
    (q, s), (qt, st) = inputs, outputs
    n, k = q.shape[-2:]
    values = {"x": q.view(torch.uint8), "y": qt.view(torch.uint8), "rows": n, "cols": k, "step": k, "stride": n}
    grid = (-(-k // 128), -(-n // 128), q[..., 0, 0].numel())
    go = launch(TRANSPOSE, "transpose", grid, values, TILE=128)
    return in_turn(go, _copy(st, s.transpose(-1, -2)))


def fp8_implementations(products: Products) -> tuple[Implementation, ...]:
    """Products of quantized operands, as chosen, and what quantizes."""
    adding = (("linear_fp8_wgrad", linear_fp8_wgrad), ("grouped_linear_fp8_wgrad", grouped_linear_fp8_wgrad))
    others = (("linear_fp8", linear_fp8), ("linear_fp8_dgrad", linear_fp8),
              ("grouped_linear_fp8", grouped_linear_fp8), ("grouped_linear_fp8_dgrad", grouped_linear_fp8))  # fmt: skip
    return (
        *(Implementation(op, functools.partial(run, products)) for op, run in others),
        *(Implementation(op, functools.partial(run, products), accumulates=True) for op, run in adding),
        Implementation("quantize_rows", quantize_rows),
        Implementation("quantize_block", quantize_block),
        Implementation("quantize_block_both", quantize_block_both),
        Implementation("transpose_blocks", transpose_blocks),
    )
