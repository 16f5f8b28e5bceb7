"""NVIDIA Hopper: H100, H200 and the H800 of the report, which differ in memory and links only. Row-wise regions are
generated with Triton, matrix products with Gluon or done by cuBLASLt, attention by cuDNN."""

from __future__ import annotations

from dsv3c.ir import DType
from dsv3c.target import Machine, Target
from dsv3c.targets._cuda_device import trouble
from dsv3c.targets._cuda_memory import reserved_bytes
from dsv3c.targets._cuda_products import Products
from dsv3c.targets._cuda_selector import HopperSelector, all_implementations
from dsv3c.targets._hopper_machines import H100_MACHINE, H200_MACHINE, H800_MACHINE
from dsv3c.targets._triton_kernel import load_kernel, region_kernel


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
        implementations=all_implementations(Products()),
        load=load_kernel,
        selector=HopperSelector(machine.name),
        trouble=trouble,
        reserve=reserved_bytes,
    )


H800 = _hopper(H800_MACHINE, "NVIDIA H800: H100 arithmetic, NVLink at 400 GB/s, as in the report")
H100 = _hopper(H100_MACHINE, "NVIDIA H100 SXM, 80 GB")
H200 = _hopper(H200_MACHINE, "NVIDIA H200 SXM, 141 GB")
