"""The CPU's generated kernels: every row-wise op and whole regions against their references, binding, caching."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_checks import FLOATS, close, draw, fresh, node_of, resized, retyped, run

from dsv3c.build import Builder
from dsv3c.errors import WorkError
from dsv3c.interp import run as interpret
from dsv3c.ir import DType, Graph, IRError, Type, Value
from dsv3c.op import OpDef
from dsv3c.ops import REGISTRY
from dsv3c.target import Kernel
from dsv3c.targets import _tvm_build
from dsv3c.targets._regions import compose, single_node_region
from dsv3c.targets._tvm_kernel import load_kernel, region_kernel
from dsv3c.targets._tvm_rows import CHUNKS, generate

ROWS = (1, 3, 257)

POSITIVE = ("normalize", "normalize_grad")
"""Ops that divide by the sum of a row."""

ROWWISE = [(op, i) for op in REGISTRY if op.rows for i in range(len(op.samples)) if "turned" not in op.rows.results]


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


def region(build: Callable[[Builder], tuple[Value, ...]]) -> Graph:
    b = Builder(REGISTRY, "region")
    return b.graph(build(b))


def norm_block(dtype: DType, rows: int, cols: int) -> Graph:
    """A residual addition, the norm of it, and the first half of the normed row; all three leave the region."""

    def build(b: Builder) -> tuple[Value, ...]:
        x, y = (b.input(n, Type(dtype, (2, rows, cols))) for n in "xy")
        w = b.weight("w", Type(DType.f64 if dtype is DType.f64 else DType.f32, (cols,)))
        added = b.add(x, y)
        normed = b.rms_norm(added, w, eps=1e-6)
        return added, normed, b.scale(b.slice_last(normed, start=0, stop=cols // 2), by=2.0)

    return region(build)


def backward_block(dtype: DType, rows: int, cols: int) -> Graph:
    """Both gradients of a norm share the row's mean square; the weight's is summed over all rows."""

    def build(b: Builder) -> tuple[Value, ...]:
        dy, x = (b.input(n, Type(dtype, (2, rows, cols))) for n in ("dy", "x"))
        w = b.weight("w", Type(DType.f64 if dtype is DType.f64 else DType.f32, (cols,)))
        return b.rms_norm_dx(dy, x, w, eps=1e-6), b.rms_norm_dw(dy, x, eps=1e-6)

    return region(build)


def rope_block(dtype: DType, rows: int, cols: int) -> Graph:
    """Heads split off a projection, a part of each rotated and joined to the rest."""
    heads = 3

    def build(b: Builder) -> tuple[Value, ...]:
        flat = b.input("flat", Type(dtype, (2, rows, heads * cols)))
        cos, sin = (b.input(n, Type(DType.f32, (2, rows, cols // 4))) for n in ("cos", "sin"))
        x = b.split_heads(flat, heads=heads)
        part = b.slice_last(x, start=cols // 2, stop=cols // 2 + 2 * (cols // 4))
        turned = b.rotary(part, cos, sin, interleave=True, inverse=False)
        return (b.join_last(b.slice_last(x, start=0, stop=cols // 2), turned),)

    return region(build)


def key_block(dtype: DType, rows: int, cols: int) -> Graph:
    """The shared RoPE key is repeated for each head without being copied."""
    heads = 3

    def build(b: Builder) -> tuple[Value, ...]:
        nope = b.input("nope", Type(dtype, (2, rows, heads, cols)))
        pe = b.input("pe", Type(dtype, (2, rows, 8)))
        return (b.join_last(nope, b.expand_heads(pe, heads=heads)),)

    return region(build)


@pytest.mark.parametrize("block", [norm_block, backward_block, rope_block, key_block])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_composed_regions(block: Callable[[DType, int, int], Graph], dtype: DType) -> None:
    for rows, cols in ((1, 40), (129, 40)):
        graph = block(dtype, rows, cols)
        generator = torch.Generator().manual_seed(rows)
        tensors = {v.name: draw(v.type, generator, v.type.rank == 3) for v in graph.params}
        right = interpret(graph, tensors, REGISTRY)
        outputs = tuple(fresh(v) for v in graph.results)
        run(region_kernel(graph, {}, "binary"), tuple(tensors[v.name] for v in graph.params), outputs)
        for v, mine in zip(graph.results, outputs, strict=True):
            close(mine, right[v.name], f"{block.__name__} {v.name} {dtype} {rows} rows")


def test_expanded_tensor_is_walked_where_it_lies() -> None:
    """A stride of 0 between heads needs no copy: the rows are [outer, inner]."""
    types = (Type(DType.f32, (2, 5, 3, 8)), Type(DType.f32, (2, 5, 3, 8)))
    add = REGISTRY["add"]
    kernel = region_kernel(single_node_region(node_of(add, types, add.samples[0])), {}, "binary")
    x, shared = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 8)
    made = torch.empty(2, 5, 3, 8)
    run(kernel, (x, shared.unsqueeze(2).expand(2, 5, 3, 8)), (made,))
    assert torch.equal(made, x + shared.unsqueeze(2))
    run(kernel, (x.transpose(1, 2).contiguous().transpose(1, 2), x), (made,))
    assert torch.equal(made, x + x)


def norm_kernel(results: int = 1) -> tuple[Graph, Kernel]:
    graph = norm_block(DType.f32, 21, 40) if results == 3 else backward_block(DType.f32, 21, 40)
    kernel = region_kernel(graph, {}, "binary")
    assert kernel is not None
    return graph, kernel


def test_results_in_the_memory_of_operands() -> None:
    """In place where the code allows it, through a copy where it does not; right either way."""
    graph, kernel = norm_kernel()
    assert ("in_place", "0:0 1:0") in kernel.launch
    dy, x, w = (torch.randn(v.type.bound({})) for v in graph.params)
    right = interpret(graph, {"dy": dy.clone(), "x": x.clone(), "w": w}, REGISTRY)
    for position in (0, 1):
        inputs = [dy.clone(), x.clone(), w]
        dw = torch.empty(40)
        out = inputs[position]
        run(kernel, tuple(inputs), (out, dw))
        close(out, right[graph.results[0].name], "dx in place")
        close(dw, right[graph.results[1].name], "dw")
    memory = torch.randn(2 * 21 * 40 + 40)
    shifted, out = memory[40:].view(2, 21, 40), memory[:-40].view(2, 21, 40)
    right = interpret(graph, {"dy": shifted.clone(), "x": x, "w": w}, REGISTRY)
    run(kernel, (shifted, x, w), (out, torch.empty(40)))
    close(out, right[graph.results[0].name], "dx over a shifted dy")


def test_sums_do_not_depend_on_threads() -> None:
    graph, kernel = norm_kernel()
    inputs = tuple(torch.randn(v.type.bound({})) for v in graph.params)
    big = tuple(x.repeat(1, 40, 1) if x.dim() == 3 else x for x in inputs)
    threads = torch.get_num_threads()
    made = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs = (torch.empty_like(big[0]), torch.empty(40))
            run(kernel, big, outputs)
            made.append(outputs[1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    assert CHUNKS == 16


def test_no_rows() -> None:
    _graph, kernel = norm_kernel()
    dw = torch.ones(40)
    run(kernel, (torch.empty(2, 0, 40), torch.empty(2, 0, 40), torch.ones(40)), (torch.empty(2, 0, 40), dw))
    assert not dw.any()


def test_symbolic_rows_give_one_kernel() -> None:
    """The code depends on columns and types, not on how many rows there are."""
    first, second = (region_kernel(norm_block(DType.f32, rows, 40), {}, "source") for rows in (3, 500))
    assert first is not None and second is not None
    assert first.files == second.files and first.id == second.id and not first.has_binary
    assert region_kernel(norm_block(DType.f32, 3, 40), {}, "none") is None


def test_source_only_kernel_is_compiled_when_loaded() -> None:
    graph = norm_block(DType.f32, 4, 40)
    kernel = region_kernel(graph, {}, "source")
    tensors = {v.name: torch.randn(v.type.bound({})) for v in graph.params}
    outputs = tuple(fresh(v) for v in graph.results)
    run(kernel, tuple(tensors.values()), outputs)
    right = interpret(graph, tensors, REGISTRY)
    close(outputs[1], right[graph.results[1].name], "norm")


def test_compiled_text_is_cached_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV3C_CACHE", str(tmp_path / "kernels"))
    script = generate(compose(norm_block(DType.f32, 4, 24), REGISTRY), "entry").text
    data = _tvm_build.compile_text(script, "entry")
    (file,) = (tmp_path / "kernels").iterdir()
    assert file.read_bytes() == data and b"!dbg" not in data
    monkeypatch.setattr(_tvm_build, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert _tvm_build.compile_text(script, "entry") == data


def test_compiles_without_a_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("DSV3C_CACHE", str(blocked / "kernels"))
    script = generate(compose(norm_block(DType.f32, 4, 8), REGISTRY), "entry").text
    assert b"dsv3c_launch" in _tvm_build.compile_text(script, "entry")


def test_runs_on_tvm_threads_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tvm_build, "_has_openmp", lambda: False)
    graph, kernel = norm_kernel(3)
    tensors = {v.name: torch.randn(v.type.bound({})) for v in graph.params}
    outputs = tuple(fresh(v) for v in graph.results)
    load_kernel(kernel)(tuple(tensors.values()), outputs)()
    right = interpret(graph, tensors, REGISTRY)
    for v, mine in zip(graph.results, outputs, strict=True):
        close(mine, right[v.name], v.name)


def test_wrong_tensors_are_refused() -> None:
    graph, kernel = norm_kernel()
    dy, x, w = (torch.randn(v.type.bound({})) for v in graph.params)
    dx, dw = torch.empty_like(dy), torch.empty(40)
    prepare = load_kernel(kernel)
    with pytest.raises(WorkError, match="takes 5 tensors, got 4"):
        prepare((dy, x), (dx, dw))
    with pytest.raises(WorkError, match="expects f32 on the CPU"):
        prepare((dy.double(), x, w), (dx, dw))
    with pytest.raises(WorkError, match="does not fit"):
        prepare((dy, x[:1], w), (dx, dw))
    with pytest.raises(WorkError, match="does not fit"):
        prepare((dy, x, w[:39]), (dx, dw))


def test_what_is_no_region_is_refused() -> None:
    def product(b: Builder) -> tuple[Value, ...]:
        x, w = b.input("x", Type(DType.f32, (4, 6))), b.weight("w", Type(DType.f32, (5, 6)))
        return (b.scale(b.linear(x, w), by=2.0),)

    def two_spaces(b: Builder) -> tuple[Value, ...]:
        x, y = b.input("x", Type(DType.f32, (4, 6))), b.input("y", Type(DType.f32, (3, 6)))
        return b.scale(x, by=2.0), b.scale(y, by=2.0)

    def sum_inside(b: Builder) -> tuple[Value, ...]:
        x = b.input("x", Type(DType.f32, (4, 6)))
        return (b.rms_norm(x, b.rms_norm_dw(x, x, eps=1e-6), eps=1e-6),)

    def two_readings(b: Builder) -> tuple[Value, ...]:
        x = b.input("x", Type(DType.f32, (6,)))
        return (b.rms_norm(x, x, eps=1e-6),)

    def input_back(b: Builder) -> tuple[Value, ...]:
        x = b.input("x", Type(DType.f32, (4, 6)))
        return b.scale(x, by=2.0), x

    for build, message in (
        (product, "linear is not row-wise"),
        (two_spaces, r"has the rows \[3\], the region has \[4\]"),
        (sum_inside, "reads rms_norm_dw as column, which needs all rows first"),
        (two_readings, "read both as column and as row"),
        (input_back, "the result x is an input"),
    ):
        with pytest.raises(IRError, match=message):
            compose(region(build), REGISTRY)
        assert region_kernel(region(build), {}, "binary") is None


def test_unknown_cpu_is_refused() -> None:
    with pytest.raises(WorkError, match="known: x86-64-v3"):
        _tvm_build.compile_text("", "entry", "z80")


def test_other_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any code runs that would stop the process."""
    graph, kernel = norm_kernel()
    tensors = tuple(torch.randn(v.type.bound({})) for v in graph.params)
    outputs = tuple(fresh(v) for v in graph.results)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(WorkError, match=r"are for x86-64-v3, .* compile with --kernels none"):
        load_kernel(kernel)(tensors, outputs)
    monkeypatch.undo()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(WorkError, match="this machine is aarch64"):
        load_kernel(kernel)(tensors, outputs)


SAME_BYTES = """
import sys
sys.path.insert(0, "tests")
from test_cpu_kernels import DType, backward_block, region_kernel, rope_block
for block in (backward_block, rope_block):
    print(region_kernel(block(DType.bf16, 4, 40), {}, "binary"))
"""


def test_same_bytes_in_another_process(tmp_path: Path) -> None:
    """Neither hash order nor what was compiled before shows in a kernel."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "DSV3C_CACHE": str(tmp_path), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", SAME_BYTES]
    other = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    mine = [region_kernel(block(DType.bf16, 4, 40), {}, "binary") for block in (backward_block, rope_block)]
    assert other.stdout == "".join(f"{k}\n" for k in mine), other.stderr


def test_refused_script_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV3C_CACHE", str(tmp_path))
    with pytest.raises(WorkError, match="TVM could not compile the kernel entry") as error:
        _tvm_build.compile_text("@T.prim_func\ndef entry(a: T.handle):\n    nonsense(a)\n", "entry")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    with pytest.raises(WorkError, match="does not load here"):
        _tvm_build.load_text(b"this is not LLVM", "entry")
