"""Triton expressions for what row programs compute: float32 arithmetic with explicit conversions at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable

from dsv3c.ir import DType

Let = Callable[[str], str]
"""`let(text)` emits an assignment and gives its name."""

POINTER = {
    DType.f32: "fp32", DType.bf16: "bf16", DType.f16: "fp16", DType.e4m3: "fp8e4nv", DType.e5m6: "fp32",
    DType.i64: "i64", DType.i32: "i32", DType.u8: "u8", DType.bool: "u8",
}  # fmt: skip
"""Triton's names of the element types in memory."""

_TYPES = {
    DType.bf16: "tl.bfloat16", DType.f16: "tl.float16", DType.e4m3: "tl.float8e4nv", DType.i64: "tl.int64",
    DType.i32: "tl.int32", DType.u8: "tl.uint8", DType.bool: "tl.uint8",
}  # fmt: skip

FLOAT32 = "tl.float32"
LEAST, MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""The least and the largest normal number."""
MAX_HELPER = """@triton.jit
def larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
"""
"""How a maximum is taken in reductions: NaN wins, which Triton's own does not promise."""


QUOTIENT_HELPER = """@triton.jit
def quotient(x, y: tl.constexpr, inverse_y: tl.constexpr):
    q = x * inverse_y
    near = tl.fma(tl.fma(q, -y, x), inverse_y, q)
    return tl.where(tl.abs(q) < float("inf"), near, q)
"""
"""x / y rounded to nearest where that is a normal number, a third of the work of a division."""
INVERSE_HELPER = """@triton.jit
def inverse(x):
    r = 1.0 / x
    return tl.fma(tl.fma(-x, r, 1.0), r, r)
"""
"""1 / x rounded to nearest where both are normal numbers."""
SIGMOID_HELPER = '''@triton.jit
def sigmoid_of(x):
    return tl.inline_asm_elementwise(
        """{
        mul.f32 $0, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 $0, $0;
        add.f32 $0, $0, 0f3F800000;
        rcp.approx.ftz.f32 $0, $0;
        }""", "=&f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
'''
"""Within 4 units in the last place: four instructions, where Triton's own takes care of subnormal numbers in twelve."""
SIGMOID_PLAIN = """@triton.jit
def sigmoid_of(x):
    return 1.0 / (1.0 + tl.exp(-x))
"""
"""The same for the interpreter, which does not read PTX."""
HELPERS = {"sigmoid": SIGMOID_HELPER, "larger": MAX_HELPER, "quotient": QUOTIENT_HELPER, "inverse": INVERSE_HELPER}


def number(value: float) -> str:
    """A float32 constant; Triton takes magnitudes outside float32's normal numbers for float64 unless told."""
    if not math.isfinite(value):
        return f'float("{value}")'
    return repr(float(value)) if value == 0 or LEAST <= abs(value) <= MOST else scalar(repr(float(value)))


def scalar(text: str) -> str:
    """A constant as a tensor without dims."""
    return f"tl.full([], {text}, {FLOAT32})"


def load(text: str, dtype: DType) -> str:
    """What was loaded from memory of `dtype`, in float32."""
    return text if dtype in (DType.f32, DType.e5m6) else f"{text}.to({FLOAT32})"


def store(x: str, dtype: DType, let: Let) -> str:
    """The number named `x` as it stands in memory of `dtype`, rounded to nearest even; e4m3 saturates."""
    if dtype is DType.e5m6:
        return rounded(x, dtype, let)
    return x if dtype is DType.f32 else f"{x}.to({_TYPES[dtype]})"


def rounded(x: str, dtype: DType, let: Let) -> str:
    """The number named `x` rounded to what `dtype` can hold."""
    if dtype in (DType.f32, DType.f64):
        return x
    if dtype is DType.e5m6:
        return _rounded_e5m6(x, let)
    return f"{x}.to({_TYPES[dtype]}).to({FLOAT32})"


def _bits(x: str) -> str:
    return f"{x}.to(tl.int32, bitcast=True)"


def _rounded_e5m6(x: str, let: Let) -> str:
    """6 bits of mantissa, multiples of 2^-20 below 2^-14, saturating; NaN stays."""
    size = let(f"tl.minimum(tl.abs({x}), 65024.0)")
    bits = let(_bits(size))
    near = let(f"(({bits} + 0xFFFF + (({bits} >> 17) & 1)) >> 17 << 17).to({FLOAT32}, bitcast=True)")
    value = let(f"tl.where({size} < {number(2.0**-14)}, ({size} + 8.0) - 8.0, {near})")
    return f"tl.where({x} != {x}, {x}, tl.where({x} < 0.0, -{value}, {value}))"


def unary(function: str, x: str, let: Let) -> str:
    """A function of `dsv3c.rows.UNARY` of the number named `x`."""
    match function:
        case "neg":
            return f"-{x}"
        case "abs" | "exp" | "log" | "rsqrt":
            return f"tl.{function}({x})"
        case "sqrt":
            return f"tl.sqrt_rn({x})"
        case "reciprocal":
            return f"tl.div_rn({scalar('1.0')}, {x})"
        case "sigmoid":
            return f"sigmoid_of({x})"
        case "floor":
            return f"tl.floor({x})"
        case "half_bits":
            return f"({x}.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF).to({FLOAT32})"
        case "half_of_bits":
            return f"{x}.to(tl.int32).to(tl.int16).to(tl.float16, bitcast=True).to({FLOAT32})"
        case "power_of_two_above":
            small = let(f"{x} < {number(LEAST)}")
            lifted = let(f"tl.where({small}, {x} * {number(2.0**24)}, {x})")
            power = let(f"(({_bits(lifted)} + 0x7FFFFF) >> 23 << 23).to({FLOAT32}, bitcast=True)")
            return f"tl.where({small}, {power} * {number(2.0**-24)}, {power})"
        case _:
            raise AssertionError(f"no rule for {function}")


def condition(function: str, x: str, y: str) -> str:
    """Whether a comparison of `dsv3c.rows.BINARY` holds."""
    return f"{x} {'<' if function == 'less' else '=='} {y}"


def binary(function: str, x: str, y: str) -> str:
    """A function of `dsv3c.rows.BINARY`; division is rounded to nearest, NaN wins in max and min."""
    sign = {"add": "+", "sub": "-", "mul": "*"}.get(function)
    if sign:
        return f"{x} {sign} {y}"
    match function:
        case "div":
            return f"tl.div_rn({x}, {y})"
        case "max":
            return f"tl.maximum({x}, {y}, propagate_nan=tl.PropagateNan.ALL)"
        case "min":
            return f"tl.minimum({x}, {y}, propagate_nan=tl.PropagateNan.ALL)"
        case _:
            return f"({condition(function, x, y)}).to({FLOAT32})"
