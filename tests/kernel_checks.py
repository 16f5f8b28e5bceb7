"""What the tests of the CPU's generated kernels share: random tensors, running a kernel, comparing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsv3c.ir import DType, Node, Type, Value
from dsv3c.op import OpDef, Sample
from dsv3c.rows import Row
from dsv3c.target import Kernel
from dsv3c.targets._regions import RegionOperand, RegionProgram, RegionResult
from dsv3c.targets._tvm_kernel import load_kernel, program_kernel
from dsv3c.tensors import torch_dtype

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


def program(operands: list[RegionOperand], results: list[RegionResult], wide: DType, name: str = "k") -> RegionProgram:
    return RegionProgram(name, (0,), 1, tuple(operands), tuple(results), wide)


def apply(row: Row, x: torch.Tensor, out: DType, wide: DType = DType.f32) -> torch.Tensor:
    """One expression of one operand, rows [n, cols] in and out."""
    dtype = {torch_dtype(d): d for d in (DType.f64, DType.f32, DType.bf16, DType.f16, DType.e4m3)}[x.dtype]
    made = torch.empty(x.shape, dtype=torch_dtype(out))
    operand = RegionOperand("row", x.shape[1], dtype)
    run(program_kernel(program([operand], [RegionResult("row", x.shape[1], out, row)], wide)), (x,), (made,))
    return made
