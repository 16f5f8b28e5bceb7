"""CUDA source that TVM generates for row-wise regions: on the CPU as C++, on a GPU by NVRTC, against the references and
against the Triton kernel of the same region."""

from __future__ import annotations

from pathlib import Path

import cuda_on_cpu
import pytest
import torch
from triton_regions import REGIONS, Tensors, built, check_region, drawn, fresh

from dsv3c.build import Builder
from dsv3c.errors import WorkError
from dsv3c.ir import DType, Graph, IRError, Type, Value
from dsv3c.target import Kernel
from dsv3c.targets import _triton_kernel
from dsv3c.targets._triton_launcher import RegionLauncher
from dsv3c.targets._triton_rows import SUM_COLUMNS
from dsv3c.targets._tvm_cuda import THREADS
from dsv3c.targets._tvm_cuda_launch import compile_cuda, load_kernel, region_kernel

ROWS_ALONE = [n for n in REGIONS if not n.endswith(("_rows", "both_ways"))]
SUM_TYPES = ["*", "*", "i32"]


def on_cpu(folder: Path, kernel: Kernel, inputs: Tensors, outputs: Tensors) -> None:
    launcher = RegionLauncher(kernel)
    sums = [f"{launcher.entry}_sum{k}" for k in launcher.sums]
    threads = {launcher.entry: THREADS} | dict.fromkeys(sums, SUM_COLUMNS)
    types = {launcher.entry: [a.dtype for a in launcher.arguments]} | dict.fromkeys(sums, SUM_TYPES)
    library = cuda_on_cpu.build(kernel.file("cu").decode(), folder)
    cuda_on_cpu.execute(library, launcher.bind(inputs, outputs), threads, types)


@pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(("name", "rows", "n"), [(n, 2, 256) for n in ROWS_ALONE] + [("norm_backward", 3, 320)])
def test_the_source_computes_the_region(tmp_path: Path, name: str, rows: int, n: int) -> None:
    region = REGIONS[name](rows, n)

    def start(_: Kernel | None, inputs: Tensors, outputs: Tensors) -> None:
        on_cpu(tmp_path, region_kernel(region, {}), inputs, outputs)

    check_region(start, region, "source", torch.device("cpu"))


def test_the_text_depends_on_the_region_alone() -> None:
    first, second = (region_kernel(REGIONS["norm_quantize"](3, 256), {}) for _ in range(2))
    assert first == second
    text = first.file("cu").decode()
    assert "/tmp" not in text and "#include" not in text and text.count("__global__") == 2  # declared and defined
    assert b"T.prim_func" in first.file("tir.py")


def test_what_it_cannot_make_is_refused() -> None:
    with pytest.raises(IRError, match="tiles of rows"):
        region_kernel(REGIONS["both_ways"](128, 256), {})

    def long(b: Builder) -> list[Value]:
        x = b.sigmoid(b.input("x", Type(DType.f32, (2, 16384))))
        return [b.rms_norm(x, b.input("w", Type(DType.f32, (16384,))), eps=1e-6)]

    with pytest.raises(IRError, match="shared memory"):
        region_kernel(built(long), {})


# On a GPU.


def launch(region: Graph, inputs: Tensors, outputs: Tensors) -> None:
    load_kernel(region_kernel(region, {}))(inputs, outputs)()
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROWS_ALONE)
@pytest.mark.parametrize(("rows", "n"), [(257, 2048), (31, 576)])
def test_both_generators_agree_on_the_gpu(name: str, rows: int, n: int) -> None:
    pytest.importorskip("tvm")
    n = {"rotated": 192}.get(name, n)
    region = REGIONS[name](rows, n)
    check_region(lambda _, i, o: launch(region, i, o), region, "source", torch.device("cuda"))
    generator = torch.Generator().manual_seed(2)
    given = tuple(drawn(v.type, generator, positive=v.type.dtype is DType.f32).cuda() for v in region.params)
    mine, theirs = (tuple(fresh(v).cuda() for v in region.results) for _ in range(2))
    launch(region, given, mine)
    kernel = _triton_kernel.region_kernel(region, {}, "binary")
    assert kernel is not None
    _triton_kernel.load_kernel(kernel)(given, theirs)()
    torch.cuda.synchronize()
    for a, b in zip(mine, theirs, strict=True):
        wide = (t.float().cpu() for t in (a, b))
        torch.testing.assert_close(*wide, rtol=0.13, atol=0.02)


@pytest.mark.gpu
def test_bad_cuda_is_one_sentence() -> None:
    with pytest.raises(WorkError, match="NVRTC refuses generated CUDA"):
        compile_cuda('extern "C" __global__ void f(int *x) { *x = nothing; }')
