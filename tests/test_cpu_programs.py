"""Row programs on the CPU: arithmetic bit by bit, and random expressions against torch."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from kernel_checks import FLOATS, apply, draw, program, run

from dsv3c.ir import DType, Type
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
from dsv3c.targets._regions import RegionOperand, RegionResult
from dsv3c.targets._tvm_kernel import program_kernel
from dsv3c.tensors import round_to, torch_dtype


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
@pytest.mark.parametrize("function", [f for f in UNARY if not f.startswith("half")])
def test_functions(function: str, wide: DType) -> None:
    x = torch.logspace(-30, 30, 320, dtype=torch.float64).to(torch_dtype(wide)).view(-1, 32)
    x = torch.cat((x, torch.exp2(torch.arange(-126, 66)).to(x.dtype).view(-1, 32), x * 2.0**-30))
    if function not in ("log", "sqrt", "rsqrt", "power_of_two_above"):
        x = torch.cat((x, -x))
    made = apply(unary(function, Operand(32, 0)), x, wide, wide)
    right = evaluate(unary(function, Operand(32, 0)), (x,))
    exact = function in ("neg", "abs", "floor", "power_of_two_above")
    tolerance = 0.0 if exact else 5e-7 if wide is DType.f32 else 5e-15
    torch.testing.assert_close(made, right, rtol=tolerance, atol=0 if function != "log" else 1e-15)


@pytest.mark.parametrize("wide", [DType.f32, DType.f64], ids=str)
def test_bits_of_float16(wide: DType) -> None:
    codes = torch.arange(2**16, dtype=torch_dtype(wide))
    codes = codes[codes % 2**15 < 0x7C00].view(-1, 32)  # no infinity, no NaN
    halves = codes.int().to(torch.int16).view(torch.half).to(codes.dtype)
    made = apply(unary("half_of_bits", Operand(32, 0)), codes, wide, wide)
    assert torch.equal(made, halves) and torch.equal(made.signbit(), halves.signbit())
    assert torch.equal(apply(unary("half_bits", Operand(32, 0)), halves, wide, wide), codes)


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


@pytest.mark.parametrize("seed", range(8))
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
        shapes: dict[str, tuple[int, ...]]
        shapes = {"row": (outer, inner, -1), "scalar": (outer, inner), "prefix": (outer, -1)}
        inputs = []
        wide = []
        for o in grower.operands:
            fallback = () if o.kind == "single" else (-1,)
            shape = tuple(o.cols if n == -1 else n for n in shapes.get(o.kind, fallback))
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


def test_constant_columns() -> None:
    """Numbers of the program itself can be rows, as in padding."""
    padded = join(as_row(1.5) + columns(Operand(4, 0), 0, 0 + 4), columns(Operand(4, 0), 1, 3))
    x = torch.randn(3, 4)
    made = torch.empty(3, 6)
    result = RegionResult("row", 6, DType.f32, padded)
    run(program_kernel(program([RegionOperand("row", 4, DType.f32)], [result], DType.f32)), (x,), (made,))
    assert torch.equal(made, torch.cat((x + 1.5, x[:, 1:3]), 1))
