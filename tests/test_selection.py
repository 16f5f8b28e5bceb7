"""Which implementation executes each matrix product: the choice, its reasons, the plan that records it, the table."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3c
from dsv3c import cli
from dsv3c.errors import InputError, WorkError
from dsv3c.ops import REGISTRY
from dsv3c.plan import Plan, plan_from_bytes, summary
from dsv3c.plandiff import diff
from dsv3c.target import Product
from dsv3c.targets import _cuda_device, _gluon_kernel, _measured, find
from dsv3c.targets._cuda_products import Products
from dsv3c.targets._gluon_kernel import gemm_kernel, load_gemm, spec_of_kernel
from dsv3c.targets._gluon_launch import Binary, Refused
from dsv3c.targets._gluon_spec import GemmSpec
from dsv3c.targets._measured import Row, Table, read_table, show_table
from dsv3c.targets._products import KINDS, TILES, candidates, generated, product_of, spec_of
from dsv3c.targets._select import choose

SQUARE = Product("linear_fp8", "e4m3", 4096, 4096, 4096)
SLOW = Product("linear_fp8", "e4m3", 4096, 512, 4096)
TABLE = Table("made up", "a GPU", {"torch": "2"}, (
    Row(SQUARE, (("gluon 128x256x4b", 1300.0), ("gluon 128x128x5b", 900.0), ("cublaslt", 1200.0))),
    Row(SLOW, (("gluon 128x256x4b", 500.0), ("cublaslt", 700.0))),
))  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own: what was tuned on this machine must not matter."""
    monkeypatch.setenv("DSV3C_CACHE", str(tmp_path / "cache"))


# ---- what a product is, and what can execute it ----------------------------------------------------------------------


@pytest.mark.parametrize("op", [o.name for o in REGISTRY if "linear" in o.name])
def test_products_do_the_work_that_the_ops_cost(op: str) -> None:
    for sample in REGISTRY[op].samples:
        outputs = REGISTRY[op].infer_types(sample.inputs, sample.attrs)
        product = product_of(op, [(str(t.dtype), t.bound({})) for t in sample.inputs])
        assert product is not None
        assert product.flops == REGISTRY[op].cost(sample.inputs, outputs).flops
        n, k = product.n, product.k
        if op.endswith("_wgrad"):
            assert outputs[0].bound({})[-2:] == (n, k)
        else:
            assert outputs[0].bound({})[-1] == n


def test_what_is_no_product_has_none() -> None:
    assert product_of("rms_norm", [("bf16", (4, 8)), ("f32", (8,))]) is None


def test_every_candidate_has_a_kernel_or_a_library() -> None:
    for op in KINDS:
        dtype = "e4m3" if "fp8" in op else "bf16"
        for adds in (False, True) if op.endswith("wgrad") else (False,):
            p = Product(op, dtype, 4096, 512, 1024, 4 if op.startswith("grouped") else 1, adds)
            specs = [spec_of(p, c) for c in candidates(p) if generated(c)]
            assert specs, op
            assert {s.output for s in specs} == {("accumulate_f32" if adds else "f32") if "wgrad" in op else "bf16"}
    assert all(len(set(tiles)) == len(tiles) for tiles in TILES.values())


@pytest.mark.parametrize("rows, n, k, found", [
    (4096, 512, 1024, True), (1, 512, 1024, False), (4096, 512, 576, False), (4090, 512, 1024, False),
])  # fmt: skip
def test_cublaslt_takes_whole_tiles_only(rows: int, n: int, k: int, found: bool) -> None:
    assert ("cublaslt" in candidates(Product("linear_fp8", "e4m3", rows, n, k))) is found


def test_results_of_groups_that_are_no_whole_stores_are_added_to_zeros() -> None:
    for n, groups, output in ((576, 4, "f32"), (592, 4, "accumulate_f32"), (592, 1, "f32")):
        p = Product("grouped_linear_fp8_wgrad", "e4m3", 4096, n, 512, groups)
        assert spec_of(p, candidates(p)[0]).output == output


def test_odd_sizes_go_through_float32_and_say_so() -> None:
    choice = choose(Product("linear_fp8", "e4m3", 4096, 70, 50), "auto", TABLE)
    assert choice.implementation == "torch" and not choice.kernel
    assert choice.reason == "torch, by way of float32: no kernel takes e4m3 of these sizes"


# ---- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product, mode, implementation, reason", [
    (SQUARE, "auto", "gluon 128x256x4b", "gluon 128x256x4b 1300 TFLOP/s, cublaslt 1200"),
    (SQUARE, "library", "cublaslt", "cublaslt 1200 TFLOP/s, gluon 128x256x4b 1300; as --implementations library asks"),
    (SLOW, "auto", "cublaslt", "cublaslt 700 TFLOP/s, gluon 128x256x4b 500"),
    (SLOW, "generated", "gluon 128x256x4b",
     "gluon 128x256x4b 500 TFLOP/s, cublaslt 700; as --implementations generated asks"),
    (dataclasses.replace(SLOW, n=768), "auto", "cublaslt",
     "cublaslt 700 TFLOP/s, gluon 128x256x4b 500; as measured for 4096×512×4096"),
    (dataclasses.replace(SQUARE, dtype="f32", op="linear"), "generated", "cublas",
     "cublas is the only implementation for f32"),
])  # fmt: skip
def test_the_fastest_allowed_one_is_chosen_and_both_rates_are_told(
    product: Product, mode: str, implementation: str, reason: str
) -> None:
    choice = choose(product, mode, TABLE)
    assert (choice.implementation, choice.reason) == (implementation, reason)
    assert bool(choice.kernel) is generated(implementation)


def test_an_unmeasured_one_is_not_preferred_to_a_measured_one() -> None:
    row = Row(SQUARE, (("gluon 192x128x4", 10.0),))
    assert choose(SQUARE, "auto", dataclasses.replace(TABLE, rows=(row,))).implementation == "gluon 192x128x4"
    empty = choose(SQUARE, "auto", dataclasses.replace(TABLE, rows=()))
    assert empty.implementation == candidates(SQUARE)[0] and "since nothing like it is measured" in empty.reason


# ---- the table -------------------------------------------------------------------------------------------------------


def test_tables_round_trip_and_their_hash_is_of_the_rows() -> None:
    text = show_table(TABLE)
    in_order = dataclasses.replace(TABLE, rows=tuple(sorted(TABLE.rows, key=lambda r: r.product)))
    assert read_table(text, "made up") == in_order
    assert read_table(text, "x").digest == TABLE.digest
    assert dataclasses.replace(TABLE, rows=TABLE.rows[:1]).digest != TABLE.digest
    assert len([line for line in text.splitlines() if '"op"' in line]) == 2


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 1}', '{"format": 1, "device": "", "versions": {}, "products": [1]}']
)
def test_a_file_that_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="somewhere: is no table that 'dsv3c tune' wrote"):
        read_table(text, "somewhere")
    with pytest.raises(InputError, match="written by a newer dsv3c"):
        read_table('{"format": 99}', "somewhere")


def test_the_shipped_table_is_of_this_program() -> None:
    table = _measured.shipped()
    assert len({r.product for r in table.rows}) == len(table.rows) > 10
    for row in table.rows:
        assert {name for name, _ in row.tflops} <= {*candidates(row.product)}
        assert all(0 < rate < 2000 for _, rate in row.tflops)


def test_what_was_tuned_replaces_what_is_shipped() -> None:
    before = find("h100").selector.measured()  # type: ignore[union-attr]
    product = next(r.product for r in _measured.shipped().rows if r.product.op == "linear_fp8")
    row = Row(product, (("cublaslt", 1.0), ("gluon 128x128x5b", 2.0)))
    path = _measured.keep("h100", "a GPU", {"torch": "2"}, (row,))
    assert path.name == "measured-h100.json" and [p.name for p in path.parent.iterdir()] == [path.name]
    selector = find("h100").selector
    assert selector is not None and selector.measured() != before and "tuned for h100" in selector.measured()
    assert selector.choose([product], "auto")[0].implementation == "gluon 128x128x5b"
    other = dataclasses.replace(product, n=product.n * 64)
    _measured.keep("h100", "a GPU", {"torch": "2"}, (Row(other, (("cublaslt", 1.0),)),))
    assert {r.product for r in read_table(path.read_text(), "").rows} == {product, other}
    _measured.keep("h100", "another GPU", {"torch": "2"}, (Row(other, (("cublaslt", 1.0),)),))
    assert {r.product for r in read_table(path.read_text(), "").rows} == {other}
    assert find("h800").selector.measured() == before  # type: ignore[union-attr]
    path.write_text("{")
    with pytest.raises(InputError, match="remove it and tune again"):
        selector.choose([product], "auto")


# ---- plans -----------------------------------------------------------------------------------------------------------


def compile_tiny(**flags: object) -> Plan:
    given = {"target": "h100", "precision": "fp8", "seq": 128, "kernels": "none"} | flags
    return dsv3c.compile("deepseek-v3-tiny", **given)  # type: ignore[arg-type]


def test_a_plan_records_each_choice_and_why() -> None:
    plan = compile_tiny()
    assert plan_from_bytes(plan.to_bytes()) == plan and plan.to_bytes() == compile_tiny().to_bytes()
    assert re.fullmatch(r"measured/h100\.json sha256:[0-9a-f]{64}", plan.measured)
    told = {n.node for n in plan.notes if (n.pass_name, n.action) == ("select", "chosen")}
    assert {"attention.q_down", "mlp.gate_up", "head", "moe.router"} <= told
    assert {c.product.rows for c in plan.choices if c.product.op == "linear_fp8"} == {1, 128}, "decoding and the rest"
    data = summary(plan)
    assert json.loads(json.dumps(data["implementations"]))[0]["implementation"]
    assert data["measured"] == plan.measured


@pytest.mark.parametrize("mode", ["generated", "library"])
def test_implementations_decide_what_a_plan_runs(mode: str) -> None:
    plan = compile_tiny(implementations=mode)
    for c in plan.choices:
        others = [n for n in candidates(c.product) if generated(n) == (mode == "generated")]
        assert not others or c.implementation in others
    other = compile_tiny(implementations="library" if mode == "generated" else "generated")
    assert {d.area for d in diff(other, plan)} >= {"job", "implementations", "notes"}


def test_the_cpu_has_one_implementation_of_each() -> None:
    plan = dsv3c.compile("deepseek-v3-tiny", target="cpu", seq=16, kernels="none", implementations="generated")
    assert [n.action for n in plan.notes if n.pass_name == "select"] == ["kept"] and not plan.choices


def test_kernels_of_products_are_in_the_plan_as_source() -> None:
    plan = compile_tiny(kernels="source", precision="bf16", implementations="generated")
    gluon = {k.id: k for k in plan.kernels if k.lang == "gluon"}
    assert {c.kernel for c in plan.choices if c.kernel} == {*gluon} and gluon
    for kernel in gluon.values():
        assert [f.suffix for f in kernel.files] == ["py"] and b"@gluon.jit" in kernel.file("py")
        assert gemm_kernel(spec_of_kernel(kernel), "source") == kernel
    assert not compile_tiny().kernels


def test_binaries_of_products_depend_on_the_spec_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    spec = GemmSpec("dense", "bf16", 128, 128, 5, pair="b")
    made = []
    for folder in ("a", "b"):
        monkeypatch.setenv("DSV3C_CACHE", str(tmp_path / folder))
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / f"triton-{folder}"))
        made.append(gemm_kernel(spec, "binary"))
    assert made[0] == made[1] and made[0].has_binary
    assert str(tmp_path).encode() not in made[0].file("cubin")
    monkeypatch.setattr("dsv3c.targets._gluon_launch.build", None)
    assert gemm_kernel(spec, "binary") == made[0], "the second time it comes from the cache"


def test_other_numbers_of_rows_take_the_nearest_choice() -> None:
    plan = compile_tiny(implementations="library")
    products = Products(plan.choices)
    w, ws = torch.zeros(512, 128, dtype=torch.float8_e4m3fn), torch.zeros(4, 1)
    for rows in (128, 256):
        q, s = torch.zeros(1, rows, 128, dtype=torch.float8_e4m3fn), torch.zeros(1, rows, 1)
        picked = products.pick("linear_fp8", (q, s, w, ws))
        assert picked.product.rows == rows and picked.generated, "K=128 is too little for cuBLASLt"
    first = next(c for c in plan.choices if c.product.op == "linear" and c.product.dtype == "bf16")
    x, weight = torch.zeros(7, first.product.k, dtype=torch.bfloat16), torch.zeros(first.product.n, first.product.k)
    assert products.pick("linear", (x, weight)).name == "cublas"
    assert Products(forced="gluon 128x64x8").pick("linear_fp8", (q, s, w, ws)).name == "gluon 128x64x8"


# ---- what can go wrong -----------------------------------------------------------------------------------------------


class _Cuda:
    """What torch says of a GPU."""

    def __init__(self, capability: tuple[int, int] | None, name: str = "NVIDIA A100") -> None:
        self._capability, self._name = capability, name

    def is_available(self) -> bool:
        return self._capability is not None

    def device_count(self) -> int:
        return int(self.is_available())

    def get_device_capability(self) -> tuple[int, int]:
        assert self._capability is not None
        return self._capability

    def get_device_name(self) -> str:
        return self._name


class _Torch:
    def __init__(self, cuda: _Cuda, version: str | None) -> None:
        self.cuda, self.__version__ = cuda, "2.11.0"
        self.version = type("version", (), {"cuda": version})


@pytest.mark.parametrize("capability, built, driver, words", [
    (None, None, 13000, r"torch 2\.11\.0 was built without CUDA"),
    (None, "13.0", None, "there is no NVIDIA driver on this machine"),
    (None, "13.0", 12040, r"the NVIDIA driver is made for CUDA 12\.4 and CUDA 13\.0 is needed; update it"),
    (None, "13.0", 13000, "torch sees no GPU"),
    ((8, 0), "13.0", 13000, r"NVIDIA A100 is sm_80 and kernels are made for Hopper, sm_90a; use an H100"),
])  # fmt: skip
def test_a_machine_that_cannot_run_it_says_why(capability: tuple[int, int] | None, built: str | None,
                                               driver: int | None, words: str, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(_cuda_device, "torch", _Torch(_Cuda(capability), built))
    monkeypatch.setattr(_cuda_device, "_driver_number", lambda: driver)
    assert re.match(words, find("h100").trouble())
    with pytest.raises(InputError, match=f"a plan for h100 cannot run here: {words}"):
        dsv3c.load(compile_tiny())
    assert cli.main(["tune"]) == 2
    assert re.fullmatch(f"dsv3c: nothing can be measured here: {words}.*\n", capsys.readouterr().err)


def test_a_hopper_gpu_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_device, "torch", _Torch(_Cuda((9, 0), "NVIDIA H200"), "12.8"))
    monkeypatch.setattr(_cuda_device, "_driver_number", lambda: 12080)
    assert find("h200").trouble() == "" and _cuda_device.device_target() == "h200"


def test_tune_refuses_what_it_cannot_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--target", "cpu"]) == 2
    assert "has one implementation of each product; tune h100, h200 or h800" in capsys.readouterr().err


def test_another_version_of_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.9.0")
    with pytest.raises(WorkError, match=r"Triton 3\.9\.0 is installed and matrix products .* need 3\.6 or 3\.7"):
        _cuda_device.known_triton()


def test_a_kernel_for_other_hardware_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = gemm_kernel(GemmSpec("dense", "bf16", 128, 128, 5, pair="b"), "source")
    monkeypatch.setattr(_gluon_kernel, "torch", _Torch(_Cuda((8, 0)), "13.0"))
    with pytest.raises(WorkError, match=r"made of Hopper's own instructions \(sm_90a\) and this GPU is sm_80"):
        load_gemm(kernel)


def test_a_binary_that_the_driver_refuses_is_made_from_source(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = GemmSpec("dense", "bf16", 128, 128, 5, pair="b")
    source = gemm_kernel(spec, "source")
    facts = (*source.launch, ("entry", "kernel"), ("shared", 1), ("threads", 1), ("cluster", 1))
    kernel = dataclasses.replace(source, files=(*source.files, dsv3c.target.KernelFile("cubin", b"old")), launch=facts)
    tried: list[bytes] = []
    loaded: Any = object()

    def load(spec: GemmSpec, binary: Binary) -> object:
        tried.append(binary.cubin)
        if binary.cubin == b"old":
            raise Refused("the driver, made for CUDA 12.0, does not load the kernel")
        return loaded

    monkeypatch.setattr(_gluon_kernel, "require_hopper", lambda what: None)
    monkeypatch.setattr(_gluon_kernel, "load_binary", load)
    monkeypatch.setattr(_gluon_kernel, "gemm_binary", lambda spec: Binary(b"new", "kernel", 1, 1))
    assert load_gemm(kernel) is loaded and tried == [b"old", b"new"]

    def impossible(spec: GemmSpec) -> object:
        raise WorkError("Triton 3.9.0 is installed")

    monkeypatch.setattr(_gluon_kernel, "gemm_binary", impossible)
    with pytest.raises(WorkError, match=r"CUDA 12\.0, does not load the kernel, and from source: Triton 3\.9\.0"):
        load_gemm(kernel)
    strange = dataclasses.replace(kernel, signature=("x",))
    with pytest.raises(WorkError, match="takes other arguments than this dsv3c gives; compile the plan again"):
        load_gemm(strange)


def test_help_imports_no_table() -> None:
    code = "import sys; from dsv3c import cli; cli.build_parser(); print('dsv3c.targets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
