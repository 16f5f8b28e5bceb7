"""The CPU's generated kernels against two oracles: the row program evaluated by torch, and the op's reference."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch

from dsv3c.build import Builder
from dsv3c.errors import WorkError
from dsv3c.ir import DType, Graph, IRError, Node, Type, Value
from dsv3c.op import OpDef, Sample
from dsv3c.ops import REGISTRY
from dsv3c.rows import BINARY, Row, Rowwise, as_row, binary, columns, evaluate, interleave, join, largest
from dsv3c.rows import repeat, rounded, select, total, unary
from dsv3c.target import Kernel
from dsv3c.targets._regions import RegionOperand, RegionProgram, RegionResult, compose, single_node_region
from dsv3c.targets._tvm_build import compile_text, load_text
from dsv3c.targets._tvm_kernel import _Loaded, load_kernel, region_kernel
from dsv3c.targets._tvm_rows import generate
from dsv3c.tensors import torch_dtype

ROWS = (1, 3, 257)
FLOATS = (DType.f64, DType.f32, DType.bf16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def close(mine: torch.Tensor, right: torch.Tensor, note: str) -> None:
    """Equal within the storage type's rounding; NaN and infinity in the same places."""
    right = right.to(mine.dtype)
    tolerance = TOLERANCE.get(mine.dtype, 0.0)
    scale = right.double().nan_to_num(0, 0, 0).abs().max().item() if right.numel() else 0.0
    torch.testing.assert_close(
        mine.double(), right.double(), rtol=tolerance, atol=tolerance * max(scale, 1e-6), equal_nan=True,
        msg=lambda m: f"{note}: {m}",
    )  # fmt: skip


POSITIVE = ("normalize", "normalize_grad")
"""Ops that divide by the sum of a row."""

ROWWISE = [(op, i) for op in REGISTRY if op.rows for i in range(len(op.samples))]


def retyped(t: Type, dtype: DType) -> Type:
    return t.with_dtype(dtype) if t.dtype is DType.f64 else t


def resized(op: OpDef, types: tuple[Type, ...], rows: int) -> tuple[Type, ...]:
    """`types` with another number of rows; the dims that do not index a shared prefix stay as they are."""
    assert op.rows is not None
    heads = next((t.shape[2:-1] for t, k in zip(types, op.rows.operands, strict=True) if k == "row"), ())
    shared = "prefix" in op.rows.operands

    def one(t: Type, kind: str) -> Type:
        if kind in ("column", "single") or t.rank < 1 + (kind != "scalar"):
            return t
        if shared:
            return Type(t.dtype, (1, rows, *(heads if kind == "row" else ()), t.shape[-1]))
        return Type(t.dtype, (rows,) if kind == "scalar" else (rows, t.shape[-1]))

    return tuple(one(t, k) for t, k in zip(types, op.rows.operands, strict=True))


def node_of(op: OpDef, types: tuple[Type, ...], sample: Sample) -> Node:
    inputs = tuple(Value(f"x{i}", t) for i, t in enumerate(types))
    outputs = tuple(Value(f"y{i}", t) for i, t in enumerate(op.infer_types(types, sample.attrs)))
    return Node(op.name, inputs, sample.attrs, outputs)


def draw(t: Type, generator: torch.Generator, strided: bool, positive: bool = False) -> torch.Tensor:
    """Normal numbers; `strided` cuts the tensor out of a wider one, so that rows are apart."""
    shape = t.bound({})
    padded = (*shape[:-1], shape[-1] + 5) if shape and strided else shape
    x = torch.randn(padded, generator=generator, dtype=torch.float64)
    x = (x.abs() + 0.1 if positive else x).to(torch_dtype(t.dtype))
    return x[..., 2 : 2 + shape[-1]] if padded != shape else x


def fresh(v: Value) -> torch.Tensor:
    return torch.full(v.type.bound({}), 77, dtype=torch.float64).to(torch_dtype(v.type.dtype))


KERNELS: dict[str, Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], Callable[[], None]]] = {}


def run(kernel: Kernel | None, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> None:
    """Execute a kernel once; equal code is loaded once."""
    assert kernel is not None
    if kernel.id not in KERNELS:
        KERNELS[kernel.id] = load_kernel(kernel)
    KERNELS[kernel.id](inputs, outputs)()


@pytest.mark.parametrize(("op", "number"), ROWWISE, ids=[f"{op.name}-{i}" for op, i in ROWWISE])
def test_every_rowwise_op(op: OpDef, number: int) -> None:
    sample = op.samples[number]
    assert op.rows is not None
    for dtype in FLOATS:
        types = tuple(retyped(t, dtype) for t in sample.inputs)
        for rows, strided in itertools.product(ROWS, (False, True)):
            try:
                node = node_of(op, resized(op, types, rows), sample)
            except IRError:
                continue
            kernel = region_kernel(single_node_region(node), {}, "binary")
            generator = torch.Generator().manual_seed(rows)
            inputs = tuple(
                draw(v.type, generator, strided and k not in ("column", "single"), op.name in POSITIVE)
                for v, k in zip(node.inputs, op.rows.operands, strict=True)
            )
            outputs = tuple(fresh(v) for v in node.outputs)
            run(kernel, inputs, outputs)
            made = op.reference(*inputs, **dict(sample.attrs))
            for mine, right in zip(outputs, made if isinstance(made, tuple) else (made,), strict=True):
                close(mine, right, f"{op.name} {dtype} {rows} rows strided={strided}")
