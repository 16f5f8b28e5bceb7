"""Generated Triton kernels: interpreted on the CPU against two oracles, and the sm_90a binaries looked at."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator

import pytest
import torch
from triton_regions import (
    BF16,
    EPS,
    F32,
    REGIONS,
    TILES,
    Tensors,
    as_rows,
    built,
    check_region,
    close,
    drawn,
    fresh,
)

from dsv3c.build import Builder
from dsv3c.errors import WorkError
from dsv3c.ir import DType, IRError, Node, Type, Value
from dsv3c.op import OpDef
from dsv3c.ops import REGISTRY
from dsv3c.rows import (
    BINARY,
    Operand,
    Row,
    binary,
    columns,
    evaluate,
    interleave,
    join,
    largest,
    repeat,
    rounded,
    select,
    total,
    unary,
)
from dsv3c.target import Kernel
from dsv3c.targets._regions import RegionOperand, RegionProgram, RegionResult, single_node_region
from dsv3c.targets._row_pieces import pieces
from dsv3c.targets._triton_blocks import Blocks
from dsv3c.targets._triton_interpreter import Launch, Worker
from dsv3c.targets._triton_kernel import region_kernel
from dsv3c.targets._triton_launcher import RegionLauncher
from dsv3c.targets._triton_rows import Script, generate
from dsv3c.tensors import torch_dtype


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    process = Worker()
    yield process
    process.close()


def execute(worker: Worker, kernel: Kernel | None, inputs: Tensors, outputs: Tensors) -> None:
    assert kernel is not None
    bound = RegionLauncher(kernel).bind(inputs, outputs)
    for call in bound.before:
        call()
    worker.run(kernel.file("py").decode(), bound.launches, bound.tensors)
    for call in bound.after:
        call()


ROWWISE = [(op, i) for op in REGISTRY if op.rows for i in range(len(op.samples))]


def resized(op: OpDef, types: tuple[Type, ...], rows: int) -> tuple[Type, ...]:
    """`types` with another number of rows, where no dims are shared."""
    assert op.rows is not None
    if "prefix" in op.rows.operands or any(t.rank == 0 for t in types):
        return types
    kinds = op.rows.operands
    return tuple(
        Type(t.dtype, (rows,) if k == "scalar" else (rows, t.shape[-1])) if k in ("row", "scalar") else t
        for t, k in zip(types, kinds, strict=True)
    )


@pytest.mark.parametrize(("op", "number"), ROWWISE, ids=[f"{op.name}-{i}" for op, i in ROWWISE])
def test_every_rowwise_op(worker: Worker, op: OpDef, number: int) -> None:
    sample, ran = op.samples[number], 0
    assert op.rows is not None
    for dtype, rows, strided in ((F32, 37, False), (BF16, 3, True), (BF16, 1, False)):
        types = tuple(t.with_dtype(dtype) if t.dtype is DType.f64 else t for t in sample.inputs)
        types = resized(op, types, rows)
        attrs = tuple((k, "f32" if v == "f64" else v) for k, v in sample.attrs)
        try:
            outputs = op.infer_types(types, attrs)
        except IRError:
            continue
        inputs = tuple(Value(f"x{i}", t) for i, t in enumerate(types))
        node = Node(op.name, inputs, attrs, tuple(Value(f"y{i}", t) for i, t in enumerate(outputs)))
        if DType.f64 in [v.type.dtype for v in (*node.inputs, *node.outputs)]:
            continue
        generator = torch.Generator().manual_seed(rows)
        given = tuple(
            drawn(v.type, generator, strided and k == "row", op.name.startswith("normalize"))
            for v, k in zip(node.inputs, op.rows.operands, strict=True)
        )
        made = tuple(map(fresh, node.outputs))
        execute(worker, region_kernel(single_node_region(node), {}, "source"), given, made)
        right = op.reference(*given, **dict(attrs))
        for a, b in zip(made, right if isinstance(right, tuple) else (right,), strict=True):
            close(a, b, f"{op.name} {dtype} {rows} rows")
        ran += 1
    assert ran


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize(("rows", "n"), [(5, 256), (33, 64), (2, 1088)])
def test_fused_regions(worker: Worker, name: str, rows: int, n: int) -> None:
    if name == "swiglu_backward_rows" and n > 128 and n % 128:
        assert region_kernel(REGIONS[name](rows, n), {}, "source") is None
        return
    check_region(functools.partial(execute, worker), REGIONS[name](rows, n), "source", torch.device("cpu"))


# Random row programs, generated where the generators differ most: slices, joins, groups, repetitions.


class Random:
    """Expressions over three operands of `cols` columns, one number per row and a column, all positive."""

    def __init__(self, seed: int, cols: int, groups: bool = True) -> None:
        self.random, self.cols, self.groups = random.Random(seed), cols, groups
        self.leaves = [Operand(cols, 0), Operand(cols, 1), Operand(2 * cols, 2), Operand(0, 3), Operand(cols, 4)]

    def row(self, cols: int, depth: int) -> Row:
        """Some expression of `cols` columns, or of one number per row for 0."""
        r = self.random
        if not cols:
            return total(self.row(self.cols, depth - 1)) * (1.0 / self.cols) if depth > 0 and r.random() < 0.5 \
                else self.leaves[3]  # fmt: skip
        kinds = ["binary", "binary", "unary", "select", "round", "scalar"]
        kinds += ["join"] * (cols > 3) + ["interleave"] * (cols % 2 == 0) + ["slice"] + ["group"] * (2 * self.groups)
        kind = r.choice(kinds) if depth > 0 else "leaf"
        match kind:
            case "binary":
                f = r.choice([b for b in BINARY if b != "div"])
                return binary(f, self.row(cols, depth - 1), self.row(cols, depth - 1))
            case "unary":
                x = self.row(cols, depth - 1)
                return r.choice([unary("sigmoid", x), unary("abs", x), -x])
            case "select":
                less = binary("less", self.row(cols, 0), self.row(cols, 0))
                return select(less, self.row(cols, depth - 1), self.row(cols, depth - 1))
            case "round":
                return rounded(self.row(cols, depth - 1), BF16) if r.random() < 0.3 else self.row(cols, depth - 1)
            case "scalar":
                return self.row(cols, depth - 1) * self.row(0, depth - 1)
            case "join":
                at = r.randrange(1, cols)
                return join(self.row(at, depth - 1), self.row(cols - at, depth - 1))
            case "interleave":
                return interleave(self.row(cols // 2, depth - 1), self.row(cols // 2, depth - 1))
            case "slice":
                step = r.choice([1, 1, 2, 3])
                start = r.randrange(0, 4)
                return columns(self.row(start + cols * step, depth - 1), start, start + (cols - 1) * step + 1, step)
            case "group":
                group = r.choice([g for g in (2, 3, 4, 8, 16, 32, cols) if cols % g == 0] or [cols])
                x = self.row(cols, depth - 1)
                return repeat(r.choice([largest, total])(x, group), group)
            case _:
                return self.leaf(cols)

    def leaf(self, cols: int) -> Row:
        x = self.random.choice([leaf for leaf in self.leaves if leaf.cols >= cols] or [None])
        if x is None:
            pieces = [self.leaves[2]] * (cols // (2 * self.cols) + 1)
            return columns(join(*pieces), 0, cols)
        start = self.random.randrange(0, x.cols - cols + 1)
        return columns(x, start, start + cols)


def random_program(seed: int, cols: int, groups: bool = True) -> RegionProgram:
    made = Random(seed, cols, groups)
    rows = [made.row(made.random.choice([cols, 2 * cols, cols // 2]), 4) for _ in range(2)]
    results = [RegionResult("row", r.cols, F32, r) for r in rows]
    results.append(RegionResult("column", cols, F32, made.row(cols, 2)))
    results.append(RegionResult("scalar", 0, F32, made.row(0, 3)))
    kinds = (("row", cols), ("row", cols), ("row", 2 * cols), ("scalar", 0), ("column", cols))
    operands = tuple(RegionOperand(k, c, BF16 if i == 1 else F32) for i, (k, c) in enumerate(kinds))
    return RegionProgram(f"random{seed}", (1,), 1, operands, tuple(results[seed % 2 :]), F32)


def run_program(worker: Worker, program: RegionProgram, script: Script, tensors: Tensors, rows: int) -> Tensors:
    """The results of a script that was generated from `program` directly."""
    shapes = [{"row": (rows, r.cols), "scalar": (rows,), "column": (r.cols,)}[r.kind] for r in program.results]
    outputs = tuple(torch.full(s, 77.0) for s in shapes)
    operands = " ".join(f"{o.kind}:{o.cols}:{o.dtype}" for o in program.operands)
    results = " ".join(f"{r.kind}:{r.cols}:{r.dtype}" for r in program.results)
    arguments = " ".join(f"{a.name}:{a.kind}:{a.dtype}:{a.divisible}" for a in script.arguments)
    launch: tuple[tuple[str, str | int], ...] = (
        ("entry", script.entry), ("rows", script.rows), ("chunks", script.chunks), ("programs", script.programs),
        ("arguments", arguments), ("operands", operands), ("results", results),
        ("sums", " ".join(map(str, script.sums))),
    )  # fmt: skip
    kernel = Kernel(script.entry, program.name, "triton", (), (), launch)
    bound = RegionLauncher(kernel).bind(tensors, outputs)
    for call in bound.before:
        call()
    worker.run(script.text, bound.launches, bound.tensors)
    for call in bound.after:
        call()
    return outputs


def check_program(worker: Worker, program: RegionProgram, rows: int, script: Script | None = None) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [{"row": (rows, o.cols), "scalar": (rows,), "column": (o.cols,)}[o.kind] for o in program.operands]
    tensors = tuple(
        (torch.rand(s, generator=generator) + 0.1).to(torch_dtype(o.dtype))
        for s, o in zip(shapes, program.operands, strict=True)
    )
    script = script or generate(program, "kernel")
    outputs = run_program(worker, program, script, tensors, rows)
    values = tuple(as_rows(t, o, program) for t, o in zip(tensors, program.operands, strict=True))
    for mine, r in zip(outputs, program.results, strict=True):
        right = evaluate(r.row, values)
        right = right.expand(rows, -1).sum(0) if r.kind == "column" else right.expand(rows, -1)
        close(mine, right.expand(*mine.shape, -1)[..., 0] if r.kind == "scalar" else right.expand(mine.shape),
              program.name, 1e-4)  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_random_programs(worker: Worker, seed: int) -> None:
    program = random_program(seed, (48, 64, 96)[seed % 3])
    check_program(worker, program, 1 + 6 * (seed % 2))


@pytest.mark.parametrize(("lanes", "most"), [(32, 64), (16, 1 << 20), (512, 1 << 20)])
def test_random_programs_in_blocks_of_other_sizes(worker: Worker, monkeypatch: pytest.MonkeyPatch, lanes: int,
                                                  most: int) -> None:  # fmt: skip
    """Long rows are walked in passes; every size of block gives the same numbers."""
    monkeypatch.setattr("dsv3c.targets._triton_blocks.LANES", lanes)
    monkeypatch.setattr("dsv3c.targets._triton_blocks.MOST_LANES", most)
    ran, modes = 0, set()
    for seed in range(100, 110):
        program = random_program(seed, 96, seed % 2 == 0)
        modes.add(Blocks(pieces(tuple(r.row for r in program.results)), (96,), True).mode)
        try:
            script = generate(program, "kernel")
        except IRError as error:
            assert "too long" in str(error)
            continue
        check_program(worker, program, 5, script)
        ran += 1
    assert ran >= 5
    assert ("loop" in modes) == (most == 64)


def norm_program(cols: int) -> RegionProgram:
    x, w = Operand(cols, 0), Operand(cols, 1)
    y = x * unary("rsqrt", total(x * x) * (1 / cols)) * w
    centred = y - total(y) * (1 / cols)
    operands = (RegionOperand("row", cols, F32), RegionOperand("column", cols, F32))
    results = (RegionResult("row", cols, F32, centred), RegionResult("column", cols, F32, y),
               RegionResult("scalar", 0, F32, total(centred * centred)))  # fmt: skip
    return RegionProgram("long", (1,), 1, operands, results, F32)


def test_a_row_longer_than_registers_is_read_in_passes(worker: Worker) -> None:
    program = norm_program(20000)
    script = generate(program, "kernel")
    assert len(re.findall(r"^ +for c\d+ in range", script.text, re.MULTILINE)) == 4
    check_program(worker, program, 2, script)


EDGES = (
    [0.0] * 128,
    [-0.0] * 127 + [1e-45],
    [448.0, -448.0, 449.0, -1e-3] * 32,
    [float("nan")] + [1.0] * 127,
    [1.0, float("-inf")] * 64,
    [3e38, -3.4e38] + [1e30] * 126,
    [2.0**-133, 2.0**-127] * 64,
    [448.0 * 2**-20, 2.0**-20] * 64,
)


@pytest.mark.parametrize("name", ["quantize_tile", "quantize_tile_2", "quantize_e5m6"])
def test_quantizing_edges_bit_for_bit(worker: Worker, name: str) -> None:
    """Zero tiles, subnormals, saturation, NaN and infinity: the same codes and scales as the reference."""
    x = torch.tensor(EDGES)
    attrs = () if name == "quantize_e5m6" else (("power_of_two", name.endswith("2")),)
    op = REGISTRY[name.removesuffix("_2")]
    types = (Type(F32, tuple(x.shape)),)
    outputs = tuple(Value(f"y{i}", t) for i, t in enumerate(op.infer_types(types, attrs)))
    node = Node(op.name, (Value("x", types[0]),), attrs, outputs)
    made = tuple(map(fresh, outputs))
    execute(worker, region_kernel(single_node_region(node), {}, "source"), (x,), made)
    right = op.reference(x, **dict(attrs))
    assert isinstance(right, tuple)
    q, s = made
    assert torch.equal(s.nan_to_num(-1), right[1].nan_to_num(-1))
    assert torch.equal(s.isnan(), right[1].isnan())
    if q.dtype == torch.uint8:
        assert torch.equal(q, right[0])
    else:
        assert torch.equal(q.float().isnan(), right[0].float().isnan())
        assert torch.equal(q.view(torch.uint8)[~q.float().isnan()], right[0].view(torch.uint8)[~q.float().isnan()])


def test_sums_over_rows_are_repeatable(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs give identical bits, also where programs take several blocks of rows."""
    monkeypatch.setattr("dsv3c.targets._triton_rows.PROGRAMS", 4)
    program = norm_program(64)
    generator = torch.Generator().manual_seed(5)
    tensors = (torch.randn(600, 64, generator=generator), torch.randn(64, generator=generator))
    script = generate(program, "kernel")
    first = run_program(worker, program, script, tensors, 600)
    second = run_program(worker, program, script, tensors, 600)
    assert all(map(torch.equal, first, second))
    expected = evaluate(program.results[1].row, tensors).double().sum(0)
    close(first[1], expected, "sum", 1e-4)


def test_an_unforeseen_op_changes_the_source_and_stays_right(worker: Worker) -> None:
    """A row-wise op put before a quantization becomes part of the kernel, and the result that of the references."""

    def plain(b: Builder) -> list[Value]:
        x = b.input("x", Type(BF16, (6, 256)))
        return [*b.quantize_tile(b.rms_norm(x, b.input("w", Type(BF16, (256,))), **EPS), **TILES)]

    def changed(b: Builder) -> list[Value]:
        x = b.input("x", Type(BF16, (6, 256)))
        y = b.rms_norm(x, b.input("w", Type(BF16, (256,))), **EPS)
        return [*b.quantize_tile(b.multiply(b.sigmoid(y), b.pad_last(b.slice_last(x, start=3, stop=200), before=50,
                                                                     after=9)), **TILES)]  # fmt: skip

    sources = []
    for build in (plain, changed):
        kernel = region_kernel(built(build), {}, "source")
        assert kernel is not None
        sources.append(kernel.file("py"))
        check_region(functools.partial(execute, worker), built(build), "source", torch.device("cpu"))
    assert sources[0] != sources[1]
    assert b"sigmoid_of(" in sources[1] and b"sigmoid_of(" not in sources[0]


def test_tensors_that_do_not_fit_are_refused() -> None:
    def normed(b: Builder) -> list[Value]:
        return [b.rms_norm(b.input("x", Type(BF16, (4, 64))), b.input("w", Type(BF16, (64,))), **EPS)]

    kernel = region_kernel(built(normed), {}, "source")
    assert kernel is not None
    launcher = RegionLauncher(kernel)
    x, w, y = torch.zeros(4, 64).bfloat16(), torch.ones(64).bfloat16(), torch.zeros(4, 64).bfloat16()
    launcher.bind((x, w), (y,))
    with pytest.raises(WorkError, match="takes 3 tensors, got 2"):
        launcher.bind((x,), (y,))
    with pytest.raises(WorkError, match=r"expects bf16, got torch\.float32"):
        launcher.bind((x.float(), w), (y,))
    with pytest.raises(WorkError, match="does not fit"):
        launcher.bind((x, w[:32]), (y,))
    with pytest.raises(WorkError, match="does not fit"):
        launcher.bind((x, w), (y[:3],))


def test_what_the_kernel_cannot_walk_is_copied(worker: Worker) -> None:
    """Transposed, misaligned and overlapping tensors give the same numbers; no rows give no launch."""
    kernel = region_kernel(built(lambda b: [b.scale(b.input("x", Type(F32, (8, 16))), by=2.0)]), {}, "source")
    base = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    shifted = torch.empty(8 * 16 + 1)[1:].view(8, 16).copy_(base.t())
    shared = base.t().contiguous()
    for x in (base.t(), shifted, shared):
        expected = x.clone() * 2
        y = shared if x is shared else torch.empty(8, 16)
        execute(worker, kernel, (x,), (y,))
        assert torch.equal(y, expected)
    assert kernel is not None
    assert RegionLauncher(kernel).bind((torch.empty(0, 16),), (torch.empty(0, 16),)).launches == ()


def test_the_interpreter_rounds_like_torch(worker: Worker) -> None:
    source = """import triton
import triton.language as tl


@triton.jit
def f(x, a, b):
    j = tl.arange(0, 4096)
    v = tl.load(x + j)
    tl.store(a + j, v.to(tl.float8e4nv))
    tl.store(b + j, v.to(tl.bfloat16).to(tl.float32))
"""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 100
    x[:4] = torch.tensor([float("nan"), 1e9, -1e9, 0.001])
    a, b = torch.zeros(4096, dtype=torch.float8_e4m3fn), torch.zeros(4096)
    worker.run(source, (Launch("f", (1,), ((0,), (1,), (2,))),), (x, a, b))
    assert torch.equal(a.view(torch.uint8), x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(b.nan_to_num(-7), x.bfloat16().float().nan_to_num(-7))
