"""Generated Hopper matrix products: their text and machine code without a GPU, their numbers with one (`-m gpu`)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch

from dsv3c.errors import InputError, WorkError
from dsv3c.targets._gluon_gemm import source
from dsv3c.targets._gluon_launch import Binary, build, load
from dsv3c.targets._gluon_ptx import adding, paired
from dsv3c.targets._gluon_spec import SHARED_LIMIT, GemmSpec, arguments

triton = pytest.importorskip("triton")

DENSE = GemmSpec("dense", "e4m3", 128, 256, 4, pair="b")
TALL = GemmSpec("dense", "e4m3", 192, 128, 4, pair="b")
ROWS = GemmSpec("grouped_rows", "e4m3", 256, 128, 4, pair="a")
COLUMNS = GemmSpec("grouped_k", "e4m3", 256, 128, 4, "accumulate_f32", pair="b")
BF16 = GemmSpec("dense", "bf16", 256, 128, 4, pair="a")
TURNED = GemmSpec("grouped_rows", "bf16", 256, 128, 4, pair="a", order="kn")
SUMMED = GemmSpec("grouped_k", "bf16", 256, 128, 4, "f32", pair="b", order="mn")
SPECS = (DENSE, TALL, ROWS, COLUMNS, BF16, TURNED, SUMMED)


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Compiles each spec once."""
    return functools.cache(lambda spec: build(spec, tmp_path_factory.mktemp("gluon")))


def _tool(name: str, *given: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *given], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_machine_code(spec: GemmSpec, binaries, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    binary: Binary = binaries(spec)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.cubin)
    code = _tool("cuobjdump", "-sass", str(cubin))
    assert len(re.findall(r"\b[QH]GMMA\.", code)) >= 8
    assert ("QGMMA" in code) == (spec.dtype == "e4m3")
    assert not re.search(r"\b(STL|LDL)\b", code), "registers spill to local memory"
    assert "STACK:0 " in _tool("cuobjdump", "-res-usage", str(cubin))
    assert ("UTMALDG.2D.MULTICAST" in code) == bool(spec.pair)
    assert ("UTMAREDG" in code) == (spec.output == "accumulate_f32")
    assert binary.shared <= SHARED_LIMIT
    assert abs(binary.shared - spec.shared_bytes) <= 1024


def test_text_is_a_function_of_the_spec() -> None:
    for spec in SPECS:
        assert source(spec) == source(spec)
        compile(source(spec), spec.name, "exec")
    assert len({source(s) for s in SPECS}) == len(SPECS)


def test_epilogue_is_part_of_the_text() -> None:
    doubled = GemmSpec("dense", "e4m3", 128, 256, 4, pair="b", epilogue=("tile = tile * 2.0",))
    lines = source(doubled).splitlines()
    assert sum(line.strip() == "tile = tile * 2.0" for line in lines) == 2
    assert [line for line in lines if line.strip() != "tile = tile * 2.0"] == source(DENSE).splitlines()


def test_arguments_follow_the_kind() -> None:
    assert [n for n, _ in arguments(BF16)] == ["a_desc", "b_desc", "c_desc", "M", "N", "K"]
    assert [n for n, _ in arguments(COLUMNS)][3:7] == ["a_scale", "b_scale", "offsets", "experts"]


@pytest.mark.parametrize("bm, bn, stages", [(64, 128, 4), (256, 256, 2), (128, 96, 4), (256, 128, 8)])
def test_impossible_tiles_are_refused(bm: int, bn: int, stages: int) -> None:
    with pytest.raises(InputError, match=r"no kernel has tiles|shared memory"):
        GemmSpec("dense", "e4m3", bm, bn, stages)


def test_only_bf16_operands_may_lie_otherwise() -> None:
    with pytest.raises(InputError, match="not contiguous along K need bf16"):
        GemmSpec("dense", "e4m3", 256, 128, 4, order="kn")
    with pytest.raises(InputError, match="must come in one copy; pair on b"):
        GemmSpec("grouped_k", "bf16", 256, 128, 4, "f32", pair="a", order="mn")


def test_unknown_ptx_is_refused() -> None:
    with pytest.raises(WorkError, match="unknown form"):
        paired("nothing here", copies=2, arrivals=4)
    with pytest.raises(WorkError, match="unknown form"):
        adding("nothing here")


# ---- on the GPU -----------------------------------------------------------------------------------------------------


def _quantized(rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """e4m3 [rows, k], scales [k/128, rows], and the float32 values they stand for."""
    x = torch.randn(rows, k, device="cuda") * torch.rand(rows, 1, device="cuda").add(0.1)
    parts = x.unflatten(-1, (-1, 128))
    scale = parts.abs().amax(-1) / 448
    q = (parts / scale[..., None]).to(torch.float8_e4m3fn)
    return q.flatten(-2), scale.t().contiguous(), (q.float() * scale[..., None]).flatten(-2)


def _quantized_blocks(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """e4m3 [n, k], scales [ceil(n/128), k/128], and the float32 values they stand for."""
    w = torch.randn(n, k, device="cuda")
    scale = torch.rand(-(-n // 128), k // 128, device="cuda") + 0.5
    q = w.to(torch.float8_e4m3fn)
    wide = scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
    return q, scale, q.float() * wide


def _given(**values: torch.Tensor | int) -> dict[str, torch.Tensor | int]:
    return values


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("m, n, k, units", [(1000, 576, 512, 132), (7, 2112, 7168, 132), (4096, 2112, 384, 100)])
@pytest.mark.parametrize("spec", [DENSE, TALL, GemmSpec("dense", "e4m3", 256, 128, 4)], ids=lambda s: s.name)
def test_dense(spec: GemmSpec, m: int, n: int, k: int, units: int, binaries) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(m + n + k)
    a, a_scale, wide_a = _quantized(m, k)
    b, b_scale, wide_b = _quantized_blocks(n, k)
    c = torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16)
    values = _given(a_desc=a, b_desc=b, c_desc=c, a_scale=a_scale, b_scale=b_scale, M=m, N=n, K=k, a_scale_stride=m)
    run = load(spec, binaries(spec)).bind(units, **values)
    run()
    first = c.clone()
    assert _error(first, wide_a.double() @ wide_b.double().t()) < 4e-3
    c.fill_(float("nan"))
    run()
    assert torch.equal(first, c)


@pytest.mark.gpu
def test_dense_bf16_and_epilogue(binaries) -> None:  # type: ignore[no-untyped-def]
    spec = GemmSpec("dense", "bf16", 256, 128, 4, pair="a", epilogue=("tile = gl.maximum(tile, 0.0)",))
    a = torch.randn(777, 576, device="cuda").bfloat16()
    b = torch.randn(2112, 576, device="cuda").bfloat16()
    c = torch.full((777, 2112), float("nan"), device="cuda", dtype=torch.bfloat16)
    load(spec, binaries(spec)).bind(132, a_desc=a, b_desc=b, c_desc=c, M=777, N=2112, K=576)()
    assert _error(c, (a.double() @ b.double().t()).relu()) < 4e-3


GROUPS = ((128, 0, 384, 0, 256), (0, 0, 1024, 0, 0), (0, 128, 0, 0, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", GROUPS, ids=["uneven", "one takes all", "few"])
@pytest.mark.parametrize("n, k", [(576, 512), (2112, 256)])
@pytest.mark.parametrize("spec", [ROWS, GemmSpec("grouped_rows", "e4m3", 128, 128, 6)], ids=lambda s: s.name)
def test_grouped_rows(spec: GemmSpec, n: int, k: int, sizes: tuple[int, ...], binaries) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(n + k)
    ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    rows = ends[-1] + 128  # the last rows belong to no expert and must stay as they are
    a, a_scale, wide_a = _quantized(rows, k)
    weights = [_quantized_blocks(n, k) for _ in sizes]
    c = torch.full((rows, n), float("nan"), device="cuda", dtype=torch.bfloat16)
    values = _given(a_desc=a, b_desc=torch.stack([w[0] for w in weights]), c_desc=c, a_scale=a_scale,
                  b_scale=torch.cat([w[1] for w in weights]), offsets=torch.tensor(ends, device="cuda",
                  dtype=torch.int32), experts=len(sizes), M=rows, N=n, K=k, a_scale_stride=rows)  # fmt: skip
    load(spec, binaries(spec)).bind(132, **values)()
    parts = zip(ends, ends[1:], weights, strict=False)
    wanted = torch.cat([wide_a[i:j].double() @ w[2].double().t() for i, j, w in parts])
    assert _error(c[: ends[-1]], wanted) < 4e-3
    assert bool(c[ends[-1] :].isnan().all())


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", GROUPS, ids=["uneven", "one takes all", "few"])
@pytest.mark.parametrize("n, k", [(576, 2112), (256, 512)])
@pytest.mark.parametrize("spec", [COLUMNS, GemmSpec("grouped_k", "e4m3", 128, 128, 5, "accumulate_f32")],
                         ids=lambda s: s.name)  # fmt: skip
def test_grouped_k(spec: GemmSpec, n: int, k: int, sizes: tuple[int, ...], binaries) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(n + k)
    ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    a, a_scale, wide_a = _quantized(n, ends[-1])
    b, b_scale, wide_b = _quantized(k, ends[-1])
    before = torch.randn(len(sizes), n, k, device="cuda")
    wanted = torch.stack([before[e].double() + wide_a[:, i:j].double() @ wide_b[:, i:j].double().t()
                          for e, (i, j) in enumerate(itertools.pairwise(ends))])  # fmt: skip
    found = []
    for _ in range(2):
        c = before.clone()
        values = _given(a_desc=a, b_desc=b, c_desc=c, a_scale=a_scale, b_scale=b_scale, offsets=torch.tensor(ends,
                      device="cuda", dtype=torch.int32), experts=len(sizes), M=n, N=k, K=ends[-1], a_scale_stride=n,
                      b_scale_stride=k)  # fmt: skip
        load(spec, binaries(spec)).bind(132, **values)()
        found.append(c)
    assert _error(found[0], wanted) < 1e-3
    assert torch.equal(*found)
    plain = dataclasses.replace(spec, output="f32")
    for _ in range(3 if n % 64 == 0 else 0):  # each expert's last tile reaches past its rows and must not write there
        c = torch.full_like(before, float("nan"))
        load(plain, binaries(plain)).bind(132, **values | {"c_desc": c})()
        assert _error(c, wanted - before) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", GROUPS, ids=["uneven", "one takes all", "few"])
def test_grouped_bf16(sizes: tuple[int, ...], binaries) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(len(sizes))
    ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    rows, n, k = ends[-1], 576, 2112
    offsets = torch.tensor(ends, device="cuda", dtype=torch.int32)
    x, dy = (torch.randn(rows, width, device="cuda").bfloat16() for width in (k, n))
    w = torch.randn(len(sizes), n, k, device="cuda").bfloat16()
    y = torch.full((rows, n), float("nan"), device="cuda", dtype=torch.bfloat16)
    by_rows = GemmSpec("grouped_rows", "bf16", 256, 128, 4, pair="a")
    given = _given(offsets=offsets, experts=len(sizes))
    load(by_rows, binaries(by_rows)).bind(132, a_desc=x, b_desc=w, c_desc=y, M=rows, N=n, K=k, **given)()
    pairs = list(itertools.pairwise(ends))
    assert _error(y, torch.cat([x[i:j].double() @ w[e].double().t() for e, (i, j) in enumerate(pairs)])) < 4e-3
    dw = torch.randn(len(sizes), n, k, device="cuda")
    wanted = torch.stack([dw[e].double() + dy[i:j].double().t() @ x[i:j].double() for e, (i, j) in enumerate(pairs)])
    along_k = GemmSpec("grouped_k", "bf16", 256, 128, 4, "accumulate_f32", pair="b")
    transposed = _given(a_desc=dy.t().contiguous(), b_desc=x.t().contiguous(), c_desc=dw)
    load(along_k, binaries(along_k)).bind(132, M=n, N=k, K=rows, **transposed, **given)()
    assert _error(dw, wanted) < 1e-3
    as_they_lie = torch.full_like(dw, float("nan"))
    values = _given(a_desc=dy, b_desc=x, c_desc=as_they_lie)
    load(SUMMED, binaries(SUMMED)).bind(132, M=n, N=k, K=rows, **values, **given)()
    products = torch.stack([dy[i:j].double().t() @ x[i:j].double() for i, j in pairs])
    assert _error(as_they_lie, products) < 1e-3
    dx = torch.full_like(x, float("nan"))
    load(TURNED, binaries(TURNED)).bind(132, a_desc=dy, b_desc=w, c_desc=dx, M=rows, N=k, K=n, **given)()
    assert _error(dx, torch.cat([dy[i:j].double() @ w[e].double() for e, (i, j) in enumerate(pairs)])) < 4e-3
