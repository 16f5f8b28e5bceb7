"""The sm_90a binaries of generated kernels: what can be said of them with no GPU, and on one what they compute."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch
from triton_regions import REGIONS, Tensors, built, check_region, drawn, fresh, norm_quantize

from dsv3c.errors import WorkError
from dsv3c.ir import DType, IRError, Type
from dsv3c.target import Kernel
from dsv3c.targets._triton_build import Entry, compile_source, disassemble, resources
from dsv3c.targets._triton_kernel import load_kernel, region_kernel

TALL = [n for n in REGIONS if n.endswith(("_rows", "both_ways"))]
REAL = [(n, r, c) for n in REGIONS if n not in TALL for r, c in ((4096, 7168), (4096, 2048), (4096, 576))]
REAL = [(n, r, {"rotated": 192, "requantize": 16384}.get(n, c)) for n, r, c in REAL]
REAL += [("swiglu_quantize", 64, 18432), *((n, 4096, 2048) for n in TALL)]


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Binaries of this test run only."""
    monkeypatch.setenv("DSV3C_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


@pytest.mark.parametrize(("name", "rows", "n"), dict.fromkeys(REAL))
def test_binaries_keep_rows_in_registers_and_move_whole_vectors(cache: None, name: str, rows: int, n: int) -> None:
    kernel = region_kernel(REGIONS[name](rows, n), {}, "binary")
    assert kernel is not None and kernel.has_binary
    cubins = [f for f in kernel.files if f.suffix.endswith("cubin")]
    assert len(cubins) == 1 + (name in ("norm_backward", "swiglu_backward_rows"))
    for file in cubins:
        taken = resources(file.data)
        assert taken.stack == 0, "spilled registers live on the stack"
        assert taken.registers <= 255
    assert dict(kernel.launch)["shared"] <= 227 * 1024  # type: ignore[operator]

    code = disassemble(kernel.file("cubin"))
    assert re.search(r"LDG\.E\.(\S*\.)?128", code), "wide loads"
    assert re.search(r"STG\.E\.(\S*\.)?(64|128)", code), "wide stores"


def test_text_and_binary_depend_on_the_region_alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    region = norm_quantize(64, 512)
    kernels = []
    for folder in ("a", "b"):
        monkeypatch.setenv("DSV3C_CACHE", f"{tmp_path}/{folder}")
        monkeypatch.setenv("TRITON_CACHE_DIR", f"{tmp_path}/triton-{folder}")
        kernels.append(region_kernel(region, {}, "binary"))
    assert kernels[0] == kernels[1]
    assert kernels[0] is not None
    for file in kernels[0].files:
        assert b"/tmp" not in file.data and str(tmp_path).encode() not in file.data and b"loc(" not in file.data
    monkeypatch.setattr("dsv3c.targets._triton_build._compile", None)
    assert region_kernel(region, {}, "binary") == kernels[0], "the second time it comes from the cache"


def test_a_damaged_cache_is_made_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV3C_CACHE", str(tmp_path))
    region = norm_quantize(8, 128)
    first = region_kernel(region, {}, "binary")
    for path in tmp_path.glob("*.cubin"):
        path.write_bytes(b"rubbish")
    assert region_kernel(region, {}, "binary") == first


def test_no_kernel_without_code() -> None:
    assert region_kernel(norm_quantize(8, 128), {}, "none") is None
    source = region_kernel(norm_quantize(8, 128), {}, "source")
    assert source is not None and not source.has_binary and [f.suffix for f in source.files] == ["py"]


def test_float64_is_refused() -> None:
    with pytest.raises(IRError, match="float64"):
        region_kernel(built(lambda b: [b.scale(b.input("x", Type(DType.f64, (2, 3))), by=2.0)]), {}, "source")


def test_bad_source_is_one_sentence(cache: None) -> None:
    source = "import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef f(x):\n    tl.store(x, nothing)\n"
    with pytest.raises(WorkError, match="could not compile the kernel f"):
        compile_source(source, Entry("f", (("x", "*fp32"),), (), 4))


# On a GPU.


def launch(kernel: Kernel | None, inputs: Tensors, outputs: Tensors) -> None:
    assert kernel is not None
    load_kernel(kernel)(inputs, outputs)()
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["binary", "source"])
@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize(("rows", "n"), [(515, 7168), (1, 2048), (133, 576), (31, 18432)])
def test_regions_on_the_gpu(name: str, rows: int, n: int, kernels: str) -> None:
    n = {"rotated": 192}.get(name, n)
    if name == "swiglu_backward_rows" and n % 128:
        pytest.skip("tiles of rows and of columns do not meet")
    check_region(launch, REGIONS[name](rows, n), kernels, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["norm_backward", "swiglu_backward_rows"])
def test_two_runs_on_the_gpu_give_identical_bits(name: str) -> None:
    region = REGIONS[name](4096, 7168)
    kernel = region_kernel(region, {}, "binary")
    generator = torch.Generator().manual_seed(1)
    given = tuple(drawn(v.type, generator).cuda() for v in region.params)
    runs = [tuple(fresh(v).cuda() for v in region.results) for _ in range(2)]
    for outputs in runs:
        launch(kernel, given, outputs)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
