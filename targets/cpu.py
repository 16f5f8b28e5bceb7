"""The CPU: everything runs here. Row-wise regions are generated with TVM, the rest is done by torch."""

from __future__ import annotations

from dsv3c.ir import DType
from dsv3c.target import Machine, Target
from dsv3c.targets._torch_cpu import IMPLEMENTATIONS
from dsv3c.targets._tvm_kernel import load_kernel, region_kernel

CPU_MACHINE = Machine(
    name="cpu",
    units=2,
    matrix_flops=((DType.bf16, 130e9), (DType.f32, 130e9), (DType.f64, 60e9)),
    vector_flops=20e9,
    memory_bandwidth=10e9,
    memory_bytes=16 * 1024**3,
    latency=5e-6,
    node=64,
    fast_link=2e9,
    fast_latency=1e-4,
    slow_link=1e9,
    slow_latency=2e-4,
)
"""Two cores with AVX-512 as measured with torch; fixed figures, so that a plan does not depend on where it is made."""


def align_experts(dtype: DType) -> int:
    """oneDNN's bf16 products need blocks of 32 rows to beat float32."""
    return 32 if dtype is DType.bf16 else 1


CPU = Target(
    name="cpu",
    doc="any x86-64 machine with AVX2; regions as LLVM text from TVM, the rest torch",
    machine=CPU_MACHINE,
    precision="fp32",
    device="cpu",
    expert_alignment=align_experts,
    generate=region_kernel,
    implementations=IMPLEMENTATIONS,
    load=load_kernel,
)
