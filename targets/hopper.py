"""NVIDIA Hopper: H100, H200 and the H800 of the report, which differ in memory and links only. Row-wise regions are
generated with Triton, matrix products with Gluon or done by cuBLASLt, attention by cuDNN."""

from __future__ import annotations

from dataclasses import replace

from dsv3c.ir import DType
from dsv3c.target import Machine, Target
from dsv3c.targets._cuda_attention import ATTENTION
from dsv3c.targets._cuda_fp8 import FP8
from dsv3c.targets._cuda_matrix import MATRIX
from dsv3c.targets._cuda_tokens import TOKENS
from dsv3c.targets._triton_kernel import load_kernel, region_kernel

GIB = 2**30

H800_MACHINE = Machine(
    name="h800",
    units=132,
    matrix_flops=((DType.e4m3, 1979e12), (DType.bf16, 989e12), (DType.f32, 495e12)),
    vector_flops=67e12,
    memory_bandwidth=3.35e12,
    memory_bytes=77 * GIB,
    latency=3e-6,
    node=8,
    fast_link=160e9,
    fast_latency=5e-6,
    slow_link=40e9,
    slow_latency=10e-6,
)
"""Peak rates by the datasheet; 77 of 80 GB usable; links as reached in the report (section 3.2): NVLink 160 GB/s,
InfiniBand 40 GB/s, per direction. float32 products run as tf32."""

H100_MACHINE = replace(H800_MACHINE, name="h100", fast_link=360e9)
H200_MACHINE = replace(H100_MACHINE, name="h200", memory_bandwidth=4.8e12, memory_bytes=134 * GIB)


def expert_alignment(dtype: DType) -> int:
    """Each expert's rows fill whole 128-row tiles, so that no tile of a grouped GEMM crosses experts."""
    return 128


def _hopper(machine: Machine, doc: str) -> Target:
    return Target(
        name=machine.name,
        doc=doc,
        machine=machine,
        precision="fp8",
        device="cuda",
        expert_alignment=expert_alignment,
        generate=region_kernel,
        implementations={i.op: i for i in (*MATRIX, *FP8, *ATTENTION, *TOKENS)},
        load=load_kernel,
    )


H800 = _hopper(H800_MACHINE, "NVIDIA H800: H100 arithmetic, NVLink at 400 GB/s, as in the report")
H100 = _hopper(H100_MACHINE, "NVIDIA H100 SXM, 80 GB")
H200 = _hopper(H200_MACHINE, "NVIDIA H200 SXM, 141 GB")
