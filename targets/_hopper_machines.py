"""What Hopper machines reach, in numbers: H100, H200, and the H800 of the report."""

from __future__ import annotations

from dataclasses import replace

from dsv3c.ir import DType
from dsv3c.target import Machine

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
    efficiency=(
        ("attention", 0.575),
        ("attention_grad", 0.429),
        ("bf16", 0.73),
        ("e4m3", 0.59),
        ("f32", 0.6),
        ("grouped_linear_fp8_wgrad", 0.45),
        ("linear_fp8_wgrad", 0.45),
        ("memory", 0.9),
    ),
    few_units=1.037,
    exchange=((8, 0.417), (16, 1.0)),
)
"""Peak rates by the datasheet; 77 of 80 GB usable; links as reached in the report (section 3.2): NVLink 160 GB/s,
InfiniBand 40 GB/s, per direction. float32 products run as tf32.

Efficiencies as measured on one H100 (benchmarks/results.jsonl, docs/hopper-gemm.md): FP8 products 1170 TFLOP/s in the
mean of six shapes, weight gradients 885, BF16 720, attention 569 forward and 424 backward, copies 3.02 TB/s; float32
is assumed. A product on 112 of 132 units loses 12%. Exchanges by NCCL on two H100s: 8 blocks are 2.4 times slower than
16, which reach full speed.
"""

H100_MACHINE = replace(H800_MACHINE, name="h100", fast_link=274e9)
H200_MACHINE = replace(H100_MACHINE, name="h200", memory_bandwidth=4.8e12, memory_bytes=134 * GIB)
