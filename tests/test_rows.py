"""Row programs: every expression against torch, shapes that do not combine, and rounding to storage types."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3c.ir import DType, IRError
from dsv3c.rows import (
    BINARY,
    UNARY,
    Constant,
    Operand,
    Row,
    Rowwise,
    as_row,
    binary,
    columns,
    evaluate,
    exp,
    interleave,
    join,
    largest,
    mean,
    repeat,
    rounded,
    rsqrt,
    select,
    sigmoid,
    total,
    unary,
)
from dsv3c.tensors import ir_dtype, round_to, torch_dtype

ROWS, COLS = 3, 8
X, Y, ONE, COLUMN = Operand(COLS, 0), Operand(COLS, 1), Operand(0, 2), Operand(COLS, 3)


def operands(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (ROWS, COLS), (ROWS, COLS), (ROWS, 1), (1, COLS)
    return tuple(torch.rand(s, generator=generator, dtype=torch.float64).to(dtype) + 0.1 for s in shapes)


def value(row: Row, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return evaluate(row, operands(dtype)).expand(ROWS, row.cols or 1)


def check(row: Row, expected: torch.Tensor) -> None:
    torch.testing.assert_close(value(row), expected.expand(ROWS, row.cols or 1), rtol=1e-14, atol=0)


x, y, one, column = operands()

UNARY_MEANING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "neg": lambda t: -t, "abs": abs, "exp": torch.exp, "log": torch.log, "sqrt": lambda t: t**0.5,
    "rsqrt": lambda t: t**-0.5, "reciprocal": lambda t: 1 / t, "sigmoid": lambda t: 1 / (1 + torch.exp(-t)),
    "power_of_two_above": lambda t: 2 ** torch.ceil(torch.log2(t)), "floor": lambda t: t - t % 1,
    "half_bits": lambda t: t.half().view(torch.int16).double() % 2**16,
    "half_of_bits": lambda t: t.int().to(torch.int16).view(torch.half).double(),
}  # fmt: skip
BINARY_MEANING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "max": torch.maximum, "min": torch.minimum, "less": lambda a, b: (a < b).double(),
    "equal": lambda a, b: (a == b).double(),
}  # fmt: skip


def test_every_function_has_a_meaning_here() -> None:
    assert set(UNARY_MEANING) == set(UNARY)
    assert set(BINARY_MEANING) == set(BINARY)


@pytest.mark.parametrize("function", UNARY)
def test_unary(function: str) -> None:
    check(unary(function, X), UNARY_MEANING[function](x))


@pytest.mark.parametrize("function", BINARY)
def test_binary(function: str) -> None:
    for a, b, u, v in ((X, Y, x, y), (X, ONE, x, one), (COLUMN, X, column, x), (ONE, COLUMN, one, column)):
        check(binary(function, a, b), BINARY_MEANING[function](u, v))
    check(binary(function, X, X), BINARY_MEANING[function](x, x))
    check(binary(function, 0.5, X), BINARY_MEANING[function](torch.full_like(x, 0.5), x))


def test_operators_and_named_functions() -> None:
    check(1 + X - 2 * Y / 3, 1 + x - 2 * y / 3)
    check(-X + (1 - X) * (2 / Y) + X * 3, -x + (1 - x) * (2 / y) + x * 3)
    check(exp(X) + rsqrt(Y) + sigmoid(ONE), x.exp() + y.rsqrt() + one.sigmoid())


def test_select_takes_what_is_not_zero() -> None:
    check(select(binary("less", X, 0.5), X, ONE), torch.where(x < 0.5, x, one))
    check(select(as_row(0.0), X, Y), y)
    check(select(as_row(-2.0), 1.0, Y), torch.ones_like(y))


def test_reductions() -> None:
    check(total(X), x.sum(-1, keepdim=True))
    check(mean(X), x.mean(-1, keepdim=True))
    check(largest(X), x.amax(-1, keepdim=True))
    check(total(X, 4), x.unflatten(-1, (2, 4)).sum(-1))
    check(largest(X, 2), x.unflatten(-1, (4, 2)).amax(-1))
    check(X / repeat(largest(X, 2), 2), x / x.unflatten(-1, (4, 2)).amax(-1).repeat_interleave(2, -1))
    assert total(X).cols == mean(X).cols == 0
    assert (total(X, 4).cols, repeat(total(X, 4), 3).cols) == (2, 6)


def test_a_column_or_a_constant_counts_in_every_column() -> None:
    check(total(Constant(COLS, 2.0)), torch.full((1, 1), 16.0, dtype=torch.float64))
    check(total(COLUMN), column.sum(-1, keepdim=True))
    check(columns(Constant(COLS, 2.0), 3, 7), torch.full((1, 4), 2.0, dtype=torch.float64))
    check(repeat(Constant(2, 5.0), 3), torch.full((1, 6), 5.0, dtype=torch.float64))
    check(interleave(Constant(2, 1.0), Constant(2, 2.0)), torch.tensor([[1.0, 2, 1, 2]], dtype=torch.float64))


def test_columns_move() -> None:
    check(columns(X, 1, 8, 3), x[:, 1:8:3])
    assert columns(X, 1, 8, 3).cols == 3
    check(columns(X, 0, 8), x)
    check(join(X, COLUMN, Constant(2, 0.0)), torch.cat((x, column.expand_as(x), torch.zeros_like(x[:, :2])), -1))
    check(interleave(columns(X, 0, 8, 2), columns(X, 1, 8, 2)), x)
    check(interleave(X, ONE), torch.stack((x, one.expand_as(x)), -1).flatten(-2))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: X + Operand(4, 1), "row expressions of 4 and 8 columns do not combine"),
        (lambda: select(X, Operand(4, 1), 0.0), "do not combine"),
        (lambda: total(ONE), "a reduction needs columns"),
        (lambda: mean(ONE), "a reduction needs columns"),
        (lambda: total(X, 3), "8 columns do not divide into groups of 3"),
        (lambda: largest(X, -2), "do not divide into groups of -2"),
        (lambda: columns(X, 4, 9), "columns 4:9:1 do not exist in a row of 8"),
        (lambda: columns(X, 4, 4), "do not exist"),
        (lambda: columns(X, -1, 4), "do not exist"),
        (lambda: columns(X, 0, 4, 0), "do not exist"),
        (lambda: join(X, ONE), "a join needs columns"),
        (lambda: interleave(ONE, ONE), "interleaving needs columns"),
        (lambda: repeat(ONE, 3), "repeating needs columns"),
    ],
)
def test_shapes_that_do_not_fit(build: Callable[[], Row], reason: str) -> None:
    with pytest.raises(IRError, match=reason):
        build()


def test_unknown_words_are_caught_at_import() -> None:
    with pytest.raises(AssertionError):
        Rowwise(("rows",), ("row",), lambda x: x)
    with pytest.raises(AssertionError):
        Rowwise(("row",), ("prefix",), lambda x: x)
    with pytest.raises(AssertionError):
        unary("cosine", X)
    with pytest.raises(AssertionError):
        binary("pow", X, Y)


def test_arithmetic_is_as_wide_as_the_widest_operand() -> None:
    row = binary("less", X, Y) + X * 0.1
    assert evaluate(row, operands(torch.float32)).dtype == torch.float32
    mixed = operands(torch.float32)[:1] + operands()[1:]
    assert evaluate(row, mixed).dtype == torch.float64
    torch.testing.assert_close(evaluate(X + Y, mixed), mixed[0].double() + mixed[1], rtol=0, atol=0)


def test_not_a_number_wins_the_maximum() -> None:
    spoiled = x.clone()
    spoiled[1, 3] = float("nan")
    assert evaluate(largest(X), (spoiled,)).isnan().flatten().tolist() == [False, True, False]
    assert evaluate(largest(X, 4), (spoiled,)).isnan().tolist() == [[False] * 2, [True, False], [False] * 2]


def test_shared_expressions_are_evaluated_once() -> None:
    s = sigmoid(X)
    known: dict[Row, torch.Tensor] = {}
    first = evaluate(s, operands(), known)
    evaluate(s * s, operands(), known)
    assert known[s] is first
    doubled: Row = X
    for _ in range(50):
        doubled = (doubled + doubled) * 0.5
    torch.testing.assert_close(evaluate(doubled, operands()), x)


def test_power_of_two_above_is_exact() -> None:
    powers = 2.0 ** torch.arange(-120.0, 121.0)
    row = unary("power_of_two_above", Operand(len(powers), 0))
    assert torch.equal(evaluate(row, (powers[None],))[0], powers)
    assert torch.equal(evaluate(row, (torch.nextafter(powers, powers * 0)[None],))[0], powers)
    assert torch.equal(evaluate(row, (torch.nextafter(powers, powers * 4)[None],))[0], powers * 2)


# ---- rounding -----------------------------------------------------------------------------------------------------


def representable(dtype: DType) -> torch.Tensor:
    """Every finite value of an 8- or 12-bit type, in ascending order."""
    if dtype is DType.e4m3:
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    else:
        values = (torch.arange(4096, dtype=torch.int32) * 16).to(torch.uint16).view(torch.float16).double()
    finite: torch.Tensor = torch.unique(values[values.isfinite()])
    return finite


@pytest.mark.parametrize("dtype", [DType.e4m3, DType.e5m6])
def test_rounding_takes_the_nearest_value_ties_to_even(dtype: DType) -> None:
    values = representable(dtype)
    assert torch.equal(round_to(values, dtype), values)
    assert torch.equal(round_to(values.float(), dtype), values.float())
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2
    assert torch.equal(round_to(torch.lerp(low, high, 0.49), dtype), low)
    assert torch.equal(round_to(torch.lerp(low, high, 0.51), dtype), high)
    # Of two neighbours the one with an even last mantissa bit is the even one: every second, counted from 0.
    even = (torch.arange(len(values)) - int((values == 0).nonzero())) % 2 == 0
    assert torch.equal(round_to(middle, dtype), torch.where(even[:-1], low, high))
    edge = torch.tensor([1e30, -1e30, float("inf"), float("nan"), 0.0])
    top = values[-1].item()
    assert round_to(edge, dtype)[:3].tolist() == [top, -top, top]
    assert round_to(edge, dtype)[3].isnan()
    assert top == (448.0 if dtype is DType.e4m3 else 65024.0)


def test_rounding_in_a_row_program() -> None:
    for dtype in (DType.bf16, DType.f32, DType.e4m3, DType.e5m6):
        check(rounded(X, dtype), round_to(x, dtype))
        assert not torch.equal(value(rounded(X, dtype)), x)
    check(rounded(X, DType.f64), x)


def test_element_types_have_one_torch_type_each() -> None:
    for dtype in DType:
        if dtype is not DType.e5m6:
            assert ir_dtype(torch_dtype(dtype)) is dtype
    with pytest.raises(KeyError):
        ir_dtype(torch.complex64)


# ---- any expression -----------------------------------------------------------------------------------------------


@given(st.randoms(use_true_random=False))
def test_random_expressions(random: random.Random) -> None:
    """Grow expressions and, beside each, what torch makes of them."""
    pool: list[tuple[Row, torch.Tensor]] = [(X, x), (Y, y), (ONE, one), (COLUMN, column)]
    pool.append((Constant(0, 0.3), torch.full((1, 1), 0.3, dtype=torch.float64)))
    for _ in range(random.randint(1, 12)):
        row, t = random.choice(pool)
        wide = [(r, v) for r, v in pool if r.cols in (0, row.cols) or not row.cols]
        other, u = random.choice(wide)
        kind = random.randint(0, 5 if row.cols > 1 else 1)
        whole = t.expand(ROWS, row.cols or 1)
        if kind == 0:
            pool.append((sigmoid(row), t.sigmoid()))
        elif kind == 1:
            pool.append((row * other, t * u))
        elif kind == 2:
            group = random.choice([g for g in range(1, row.cols + 1) if row.cols % g == 0])
            pool.append((total(row, group), whole.unflatten(-1, (-1, group)).sum(-1)))
        elif kind == 3:
            start, step = random.randrange(row.cols), random.randint(1, 3)
            pool.append((columns(row, start, row.cols, step), whole[:, start::step]))
        elif kind == 4:
            pool.append((join(row, row), torch.cat((whole, whole), -1)))
        else:
            pool.append((repeat(row, 2), whole.repeat_interleave(2, -1)))
    for row, t in pool:
        check(row, t)
