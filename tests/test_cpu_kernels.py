"""The CPU's generated kernels against two oracles: the row program evaluated by torch, and the op's reference."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsv3c.build import Builder
from dsv3c.errors import WorkError
from dsv3c.interp import run as interpret
from dsv3c.ir import DType, Graph, IRError, Node, Type, Value
from dsv3c.op import OpDef, Sample
from dsv3c.ops import REGISTRY
from dsv3c.rows import (
    UNARY,
    Operand,
    Row,
    as_row,
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
from dsv3c.targets import _tvm_build
from dsv3c.targets._regions import RegionOperand, RegionProgram, RegionResult, compose, single_node_region
from dsv3c.targets._tvm_kernel import load_kernel, program_kernel, region_kernel
from dsv3c.targets._tvm_rows import CHUNKS, generate
from dsv3c.tensors import round_to, torch_dtype

ROWS = (1, 3, 257)
FLOATS = (DType.f64, DType.f32, DType.bf16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def close(mine: torch.Tensor, right: torch.Tensor, note: str) -> None:
    """Equal within the storage type's rounding; NaN and infinity in the same places."""
    right = right.to(mine.dtype)
    tolerance = TOLERANCE.get(mine.dtype, 0.0)
    scale = right.double().nan_to_num(0, 0, 0).abs().max().item() if right.numel() else 0.0
    torch.testing.assert_close(
        mine.double(), right.double(), rtol=tolerance, atol=tolerance * max(scale, 1e-6), equal_nan=True,
        msg=lambda m: f"{note}: {m}",
    )  # fmt: skip


POSITIVE = ("normalize", "normalize_grad")
"""Ops that divide by the sum of a row."""

ROWWISE = [(op, i) for op in REGISTRY if op.rows for i in range(len(op.samples))]


def retyped(t: Type, dtype: DType) -> Type:
    return t.with_dtype(dtype) if t.dtype is DType.f64 else t


def resized(op: OpDef, types: tuple[Type, ...], rows: int) -> tuple[Type, ...]:
    """`types` with another number of rows; the dims that do not index a shared prefix stay as they are."""
    assert op.rows is not None
    heads = next((t.shape[2:-1] for t, k in zip(types, op.rows.operands, strict=True) if k == "row"), ())
    shared = "prefix" in op.rows.operands

    def one(t: Type, kind: str) -> Type:
        if kind in ("column", "single") or t.rank < 1 + (kind != "scalar"):
            return t
        if shared:
            return Type(t.dtype, (1, rows, *(heads if kind == "row" else ()), t.shape[-1]))
        return Type(t.dtype, (rows,) if kind == "scalar" else (rows, t.shape[-1]))

    return tuple(one(t, k) for t, k in zip(types, op.rows.operands, strict=True))


def node_of(op: OpDef, types: tuple[Type, ...], sample: Sample) -> Node:
    inputs = tuple(Value(f"x{i}", t) for i, t in enumerate(types))
    outputs = tuple(Value(f"y{i}", t) for i, t in enumerate(op.infer_types(types, sample.attrs)))
    return Node(op.name, inputs, sample.attrs, outputs)


def draw(t: Type, generator: torch.Generator, strided: bool, positive: bool = False) -> torch.Tensor:
    """Normal numbers; `strided` cuts the tensor out of a wider one, so that rows are apart."""
    shape = t.bound({})
    padded = (*shape[:-1], shape[-1] + 5) if shape and strided else shape
    x = torch.randn(padded, generator=generator, dtype=torch.float64)
    x = (x.abs() + 0.1 if positive else x).to(torch_dtype(t.dtype))
    return x[..., 2 : 2 + shape[-1]] if padded != shape else x


def fresh(v: Value) -> torch.Tensor:
    return torch.full(v.type.bound({}), 77, dtype=torch.float64).to(torch_dtype(v.type.dtype))


KERNELS: dict[str, Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], Callable[[], None]]] = {}


def run(kernel: Kernel | None, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> None:
    """Execute a kernel once; equal code is loaded once."""
    assert kernel is not None
    if kernel.id not in KERNELS:
        KERNELS[kernel.id] = load_kernel(kernel)
    KERNELS[kernel.id](inputs, outputs)()


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


def program(operands: list[RegionOperand], results: list[RegionResult], wide: DType, name: str = "k") -> RegionProgram:
    return RegionProgram(name, (0,), 1, tuple(operands), tuple(results), wide)


def apply(row: Row, x: torch.Tensor, out: DType, wide: DType = DType.f32) -> torch.Tensor:
    """One expression of one operand, rows [n, cols] in and out."""
    dtype = {torch_dtype(d): d for d in (DType.f64, DType.f32, DType.bf16, DType.f16, DType.e4m3)}[x.dtype]
    made = torch.empty(x.shape, dtype=torch_dtype(out))
    operand = RegionOperand("row", x.shape[1], dtype)
    run(program_kernel(program([operand], [RegionResult("row", x.shape[1], out, row)], wide)), (x,), (made,))
    return made


def every_kind_of_float(count: int) -> torch.Tensor:
    """float32 [n, 32] of all magnitudes and signs, the neighbours of rounding boundaries, and special values."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 448, 449, 464, 465, -500, 65024, 65520, 2**-9]
    special += [2**-10, 2**-6, 2**-14, 2**-20, 2**-21, 3 * 2**-21, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-45, 1e-39]
    exact = torch.randn(count, generator=generator).to(torch.float8_e4m3fn).float()
    x = torch.cat((bits.view(torch.float32), exact, exact * (1 + 2**-4), torch.tensor(special)))
    return torch.nn.functional.pad(x, (0, -len(x) % 32)).view(-1, 32)


@pytest.mark.parametrize("wide", [DType.f32, DType.f64], ids=str)
@pytest.mark.parametrize("to", [DType.bf16, DType.f16, DType.e4m3, DType.e5m6], ids=str)
def test_rounding_is_bit_exact(to: DType, wide: DType) -> None:
    """Rounded in arithmetic, and as it stands in memory, for every kind of number."""
    x = every_kind_of_float(20000).to(torch_dtype(wide))
    if wide is DType.f64:
        x = x * (1 + 2**-30)
    made = apply(rounded(Operand(32, 0), to), x, wide, wide)
    right = round_to(x, to)
    assert torch.equal(made.isnan(), right.isnan())
    assert torch.equal(made.nan_to_num(7), right.nan_to_num(7))
    assert torch.equal(made.signbit()[~made.isnan()], right.signbit()[~right.isnan()])
    stored = apply(Operand(32, 0), x, to, wide)
    assert torch.equal(stored.to(torch_dtype(wide)).nan_to_num(7), right.nan_to_num(7))


@pytest.mark.parametrize("dtype", [DType.bf16, DType.f16, DType.e4m3], ids=str)
def test_every_code_is_read(dtype: DType) -> None:
    codes = torch.arange(2 ** min(dtype.bits, 16), dtype=torch.int32)
    storage = codes.to(torch.uint8) if dtype.bits == 8 else codes.to(torch.uint16)
    x = storage.view(torch_dtype(dtype)).view(-1, 32)
    made = apply(Operand(32, 0), x, DType.f32)
    assert torch.equal(made.nan_to_num(7), x.float().nan_to_num(7)) and torch.equal(made.isnan(), x.float().isnan())


def ulps(made: torch.Tensor, right: torch.Tensor) -> float:
    """The largest error in units of the last place of float32, where the value is normal."""
    normal = right.abs().clamp(min=2.0**-126)
    unit = torch.exp2(torch.floor(torch.log2(normal)) - 23)
    return ((made.double() - right) / unit).abs().max().item()


def test_exp_within_two_units() -> None:
    x = torch.linspace(-104, 88.7, 320000).view(-1, 32)
    made = apply(unary("exp", Operand(32, 0)), x, DType.f32)
    assert ulps(made, x.double().exp()) < 2
    special = torch.tensor([[0.0, -0.0, math.inf, -math.inf, math.nan, 89, 1e30, -105, -1e30] + [1.0] * 23])
    special[0, 9] = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)
    made, right = apply(unary("exp", Operand(32, 0)), special, DType.f32), special.exp()
    torch.testing.assert_close(made, right, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("wide", [DType.f32, DType.f64], ids=str)
@pytest.mark.parametrize("function", UNARY)
def test_functions(function: str, wide: DType) -> None:
    x = torch.logspace(-30, 30, 320, dtype=torch.float64).to(torch_dtype(wide)).view(-1, 32)
    x = torch.cat((x, torch.exp2(torch.arange(-126, 66)).to(x.dtype).view(-1, 32), x * 2.0**-30))
    if function not in ("log", "sqrt", "rsqrt", "power_of_two_above"):
        x = torch.cat((x, -x))
    made = apply(unary(function, Operand(32, 0)), x, wide, wide)
    right = evaluate(unary(function, Operand(32, 0)), (x,))
    exact = function in ("neg", "abs", "power_of_two_above")
    tolerance = 0.0 if exact else 5e-7 if wide is DType.f32 else 5e-15
    torch.testing.assert_close(made, right, rtol=tolerance, atol=0 if function != "log" else 1e-15)


@pytest.mark.parametrize("function", ["max", "min", "less", "equal"])
def test_comparisons_and_nan(function: str) -> None:
    """Like torch: NaN wins in max and min, and compares as unequal."""
    values = [1.0, -1.0, 0.0, -0.0, math.nan, math.inf, -math.inf, 2.0]
    x = torch.tensor([list(p) for p in itertools.product(values, values)])
    row = binary(function, columns(Operand(2, 0), 0, 1), columns(Operand(2, 0), 1, 2))
    made = torch.empty(len(x), 1)
    kernel = program([RegionOperand("row", 2, DType.f32)], [RegionResult("row", 1, DType.f32, row)], DType.f32)
    run(program_kernel(kernel), (x,), (made,))
    torch.testing.assert_close(made, evaluate(row, (x,)), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cols", [1, 5, 16, 37])
def test_largest_keeps_nan(cols: int) -> None:
    x = torch.randn(6, cols, generator=torch.Generator().manual_seed(0))
    x[1, cols // 2], x[2, -1], x[3] = math.nan, math.inf, -math.inf
    made = torch.empty(6)
    result = RegionResult("scalar", 0, DType.f32, largest(Operand(cols, 0)))
    run(program_kernel(program([RegionOperand("row", cols, DType.f32)], [result], DType.f32)), (x,), (made,))
    torch.testing.assert_close(made, x.amax(1), rtol=0, atol=0, equal_nan=True)


class Grower:
    """Random row expressions over operands of every kind; values stay of moderate size."""

    def __init__(self, seed: int, cols: int) -> None:
        self.random = random.Random(seed)
        kinds = [("row", cols), ("row", cols), ("scalar", 0), ("prefix", cols // 2), ("column", cols), ("single", 0)]
        self.operands = [RegionOperand(k, c, self.random.choice(FLOATS)) for k, c in kinds]
        self.operands[0] = RegionOperand("row", cols, DType.f64)
        self.pool: list[Row] = [Operand(o.cols, i) for i, o in enumerate(self.operands)]

    def pick(self, *widths: int) -> Row:
        return self.random.choice([r for r in self.pool[-8:] + self.pool if not widths or r.cols in widths])

    def pick_wide(self, least: int = 2) -> Row:
        return self.random.choice([r for r in self.pool if r.cols >= least])

    def grow(self) -> None:
        """Add one expression made of those there are."""
        kind = self.random.choice(
            ["unary", "binary", "binary", "select", "total", "largest", "group", "slice", "join", "interleave",
             "repeat", "round"]
        )  # fmt: skip
        match kind:
            case "unary":
                x = self.pick()
                name = self.random.choice(["exp", "sigmoid", "neg", "abs", "rsqrt", "sqrt", "reciprocal", "log"])
                safe = unary("abs", x) + 1.0 if name in ("rsqrt", "sqrt", "reciprocal", "log") else binary("min", x, 2)
                new = unary(name, safe)
            case "binary":
                x = self.pick()
                y = self.pick(x.cols, 0) if x.cols else self.pick()
                name = self.random.choice(["add", "sub", "mul", "max", "min", "div", "less", "equal"])
                new = binary(name, x, unary("abs", y) + 1.0 if name == "div" else y)
            case "select":
                x = self.pick()
                new = select(binary("less", x, 0.3), x, self.pick(x.cols, 0))
            case "total":
                x = self.pick_wide(1)
                new = total(x) * (1.0 / x.cols)
            case "largest":
                new = largest(self.pick_wide(1))
            case "group":
                x = self.pick_wide()
                group = self.random.choice([g for g in range(1, x.cols + 1) if x.cols % g == 0])
                new = self.random.choice([total, largest])(x, group) * (1.0 / group)
            case "slice":
                x = self.pick_wide()
                step = self.random.choice([1, 1, 2, 3])
                start = self.random.randrange(x.cols - 1)
                new = columns(x, start, self.random.randrange(start + 1, x.cols + 1), step)
            case "join":
                new = join(self.pick_wide(1), self.pick_wide(1))
            case "interleave":
                x = self.pick_wide(1)
                new = interleave(x, self.pick(x.cols, 0))
            case "repeat":
                new = repeat(self.pick_wide(1), self.random.choice([2, 3, 8, 16]))
            case _:
                new = rounded(self.pick(), self.random.choice([DType.bf16, DType.e4m3, DType.f32]))
        if new.cols <= 600:
            self.pool.append(binary("max", binary("min", new, 50.0), -50.0) if new.cols else new * 0.5)


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed: int) -> None:
    """Expressions of every form, with sums over all rows, in float64 so that no decision hangs on rounding."""
    cols = random.Random(seed).choice([6, 16, 24, 34, 128])
    grower = Grower(seed, cols)
    for _ in range(22):
        grower.grow()
    results = []
    for row in grower.pool[-7:]:
        kind = grower.random.choice(["row", "column"]) if row.cols else "scalar"
        results.append(RegionResult(kind, row.cols, DType.f64, row))
    kernel = program_kernel(program(grower.operands, results, DType.f64, f"random{seed}"))
    generator = torch.Generator().manual_seed(seed)
    for outer, inner in ((1, 1), (19, 3), (40, 1)):
        rows = outer * inner
        shapes = {"row": (outer, inner, -1), "scalar": (outer, inner), "prefix": (outer, -1), "column": (-1,), "single": ()}
        inputs = []
        wide = []
        for o in grower.operands:
            shape = tuple(o.cols if n == -1 else n for n in shapes[o.kind])
            x = draw(Type(o.dtype, shape), generator, o.kind == "row")
            inputs.append(x)
            flat = x.double().repeat_interleave(inner, 0) if o.kind == "prefix" else x.double()
            wide.append(flat.reshape(1 if o.kind in ("column", "single") else rows, max(o.cols, 1)))
        made = tuple(
            torch.full({"row": (outer, inner, r.cols), "scalar": (outer, inner)}.get(r.kind, (r.cols,)), 7.0).double()
            for r in results
        )
        run(kernel, tuple(inputs), made)
        for r, mine in zip(results, made, strict=True):
            value = evaluate(r.row, tuple(wide)).expand(rows, max(r.cols, 1))
            right = value.sum(0) if r.kind == "column" else value
            torch.testing.assert_close(mine.reshape(right.shape), right, rtol=1e-10, atol=1e-9, msg=f"{seed} {r}")


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
    graph, kernel = norm_kernel()
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

    for build, message in ((product, "linear is not row-wise"), (two_spaces, "has the rows"), (sum_inside, "column")):
        if build is sum_inside:
            compose(region(build), REGISTRY)
            continue
        with pytest.raises(IRError, match=message):
            compose(region(build), REGISTRY)


def test_unknown_cpu_is_refused() -> None:
    with pytest.raises(WorkError, match="known: x86-64-v3"):
        _tvm_build.compile_text("", "entry", "z80")


def test_refused_script_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV3C_CACHE", str(tmp_path))
    with pytest.raises(WorkError, match="TVM could not compile the kernel entry") as error:
        _tvm_build.compile_text("@T.prim_func\ndef entry(a: T.handle):\n    nonsense(a)\n", "entry")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    with pytest.raises(WorkError, match="does not load here"):
        _tvm_build.load_text(b"this is not LLVM", "entry")


def test_constant_columns() -> None:
    """Numbers of the program itself can be rows, as in padding."""
    padded = join(as_row(1.5) + columns(Operand(4, 0), 0, 0 + 4), columns(Operand(4, 0), 1, 3))
    x = torch.randn(3, 4)
    made = torch.empty(3, 6)
    result = RegionResult("row", 6, DType.f32, padded)
    run(program_kernel(program([RegionOperand("row", 4, DType.f32)], [result], DType.f32)), (x,), (made,))
    assert torch.equal(made, torch.cat((x + 1.5, x[:, 1:3]), 1))
