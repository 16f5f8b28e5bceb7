"""TIR expressions for what row programs compute: rounding to storage types bit by bit, and a vectorizable exp.

TVM's own casts to 8-bit floats are wrong and its exp is a call per number, hence these. It may fold `x != x` and
`(x + c) - c`, so NaN, and what a sum rounded off, are recognized by bits. Each function takes and gives TIR text.
"""

from __future__ import annotations

import math
import struct
from typing import Protocol

from dsv3c.ir import DType


class Let(Protocol):
    """`let(text)` emits a statement that computes `text` and gives its name; `dtype` if it is not the wide type."""

    def __call__(self, text: str, dtype: str = "") -> str: ...


STORAGE = {
    DType.f64: "float64", DType.f32: "float32", DType.bf16: "uint16", DType.f16: "float16", DType.e4m3: "uint8",
    DType.e5m6: "float32", DType.i64: "int64", DType.i32: "int32", DType.u8: "uint8", DType.bool: "uint8",
}  # fmt: skip
"""The TIR element type of a tensor in memory; bf16 and e4m3 are handled as bits."""

_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440054690583e-4
_ROUNDER = 12582912.0
"""1.5·2^23: adding it rounds a float32 to an integer, which then stands in the low bits."""


def number(value: float, wide: str) -> str:
    """A constant of type `wide`."""
    return f"T.{wide}({value!r})" if math.isfinite(value) else f'T.{wide}("{value}")'


def _bits(x: str) -> str:
    return f'T.reinterpret("uint32", {x})'


def _word(value: float, word: str) -> str:
    """The bits of a constant as an integer of type `word`; TVM's CUDA would take the address of the constant."""
    single = word.endswith("32")
    bits: int = struct.unpack("<I" if single else "<Q", struct.pack("<f" if single else "<d", value))[0]
    return f"T.{word}({bits})"


def _is_nan(x: str, wide: str) -> str:
    if wide == "float64":
        return f'T.bitwise_and(T.reinterpret("uint64", {x}), T.uint64({2**63 - 1})) > T.uint64({0x7FF << 52})'
    return f"T.bitwise_and({_bits(x)}, T.uint32({2**31 - 1})) > T.uint32({0xFF << 23})"


def load(text: str, dtype: DType, wide: str) -> str:
    """The element `text` of a tensor of `dtype`, as a number of type `wide`."""
    if dtype is DType.bf16:
        text, have = f'T.reinterpret("float32", T.shift_left(T.Cast("uint32", {text}), T.uint32(16)))', "float32"
    elif dtype is DType.e4m3:
        text, have = _from_e4m3(text), "float32"
    else:
        have = STORAGE[dtype]
    return text if have == wide else f'T.Cast("{wide}", {text})'


def _from_e4m3(x: str) -> str:
    """Exponent and mantissa moved into a float32's place are 2^120 too small, subnormals included."""
    magnitude = f'T.bitwise_and(T.Cast("uint32", {x}), T.uint32(127))'
    sign = f'T.shift_left(T.shift_right(T.Cast("uint32", {x}), T.uint32(7)), T.uint32(31))'
    value = f'T.reinterpret("float32", T.shift_left({magnitude}, T.uint32(20))) * T.float32({2.0**120!r})'
    bits = f"T.Select({magnitude} == T.uint32(127), T.uint32({0x7FC00000}), {_bits(value)})"
    return f'T.reinterpret("float32", T.bitwise_or({sign}, {bits}))'


def store(x: str, dtype: DType, wide: str, let: Let) -> str:
    """The number named `x` as it stands in a tensor of `dtype`."""
    if dtype is DType.bf16:
        return f'T.Cast("uint16", T.shift_right({_to_bf16(_single(x, wide, let), let)}, T.uint32(16)))'
    if dtype is DType.e4m3:
        return _to_e4m3(_single(x, wide, let), let)
    if dtype is DType.e5m6:
        x = let(rounded(x, dtype, wide, let))
    if dtype is DType.f16:
        x, wide = _single(x, wide, let), "float32"
    return x if STORAGE[dtype] == wide else f'T.Cast("{STORAGE[dtype]}", {x})'


def rounded(x: str, dtype: DType, wide: str, let: Let) -> str:
    """The number named `x` rounded to what `dtype` can hold, nearest even."""
    if STORAGE[dtype] == wide and dtype is not DType.e5m6:
        return x
    if dtype is DType.e5m6:
        return _rounded_small(x, wide, 6, -14, 65024.0, let)
    single = _single(x, wide, let)
    match dtype:
        case DType.bf16:
            text = f'T.reinterpret("float32", {_to_bf16(single, let)})'
        case DType.e4m3:
            text = _rounded_small(single, "float32", 3, -6, 448.0, let)
        case DType.f16:
            text = f'T.Cast("float32", T.Cast("float16", {single}))'
        case DType.f32:
            text = single
        case _:
            raise AssertionError(f"rounding to {dtype} is not defined")
    return text if wide == "float32" else f'T.Cast("{wide}", {text})'


def _single(x: str, wide: str, let: Let) -> str:
    return x if wide == "float32" else let(f'T.Cast("float32", {x})', "float32")


def _to_bf16(x: str, let: Let) -> str:
    """The bits of a float32 with the lower half rounded away; NaN becomes the quiet one."""
    u = let(_bits(x), "uint32")
    up = f"T.bitwise_and(T.shift_right({u}, T.uint32(16)), T.uint32(1))"
    near = let(f"T.bitwise_and({u} + T.uint32(32767) + {up}, T.uint32({0xFFFF0000}))", "uint32")
    return let(f"T.Select({_is_nan(x, 'float32')}, T.uint32({0x7FC00000}), {near})", "uint32")


def _rounded_small(x: str, wide: str, mantissa: int, least: int, top: float, let: Let) -> str:
    """`x` with `mantissa` bits, exponents from `least`, subnormals below, saturating at `top`; NaN stays."""
    word, width, full = ("uint64", 64, 52) if wide == "float64" else ("uint32", 32, 23)
    drop = full - mantissa
    a = let(f"T.Select(T.abs({x}) < {number(top, wide)}, T.abs({x}), {number(top, wide)})", wide)
    u = let(f'T.reinterpret("{word}", {a})', word)
    up = f"T.bitwise_and(T.shift_right({u}, T.{word}({drop})), T.{word}(1))"
    cut = f"T.shift_right({u} + T.{word}({2 ** (drop - 1) - 1}) + {up}, T.{word}({drop}))"
    normal = let(f"T.shift_left({cut}, T.{word}({drop}))", word)
    magic = 2.0 ** (full + least - mantissa)
    tiny = let(f"{a} + {number(magic, wide)}", wide)
    steps = let(f'T.reinterpret("{word}", {tiny}) - {_word(magic, word)}', word)
    small = let(f'T.Cast("{wide}", {steps}) * {number(2.0 ** (least - mantissa), wide)}', wide)
    near = f'T.Select({a} < {number(2.0**least, wide)}, T.reinterpret("{word}", {small}), {normal})'
    sign = f'T.shift_left(T.shift_right(T.reinterpret("{word}", {x}), T.{word}({width - 1})), T.{word}({width - 1}))'
    value = let(f'T.reinterpret("{wide}", T.bitwise_or({sign}, {near}))', wide)
    return f"T.Select({_is_nan(x, wide)}, {x}, {value})"


def _to_e4m3(x: str, let: Let) -> str:
    a = let(f"T.Select(T.abs({x}) < T.float32(448.0), T.abs({x}), T.float32(448.0))", "float32")
    u = let(_bits(a), "uint32")
    up = f"T.bitwise_and(T.shift_right({u}, T.uint32(20)), T.uint32(1))"
    normal = let(f"T.shift_right({u} - T.uint32({120 << 23}) + T.uint32({0x7FFFF}) + {up}, T.uint32(20))", "uint32")
    tiny = let(f"{a} + T.float32(16384.0)", "float32")
    near = f"T.Select({a} < T.float32(0.015625), {_bits(tiny)} - {_word(16384.0, 'uint32')}, {normal})"
    kept = let(f"T.Select({_is_nan(x, 'float32')}, T.uint32(127), {let(near, 'uint32')})", "uint32")
    return f'T.Cast("uint8", T.bitwise_or(T.shift_left(T.shift_right({_bits(x)}, T.uint32(31)), T.uint32(7)), {kept}))'


def unary(function: str, x: str, wide: str, let: Let) -> str:
    """A function of `dsv3c.rows.UNARY` of the number named `x`."""
    one = number(1.0, wide)
    match function:
        case "neg":
            return f"{x} * {number(-1.0, wide)}"
        case "abs" | "log" | "sqrt" | "floor":
            return f"T.{function}({x})"
        case "rsqrt":
            return f"{one} / T.sqrt({x})"
        case "half_bits":
            return _half_bits(x, wide, let)
        case "half_of_bits":
            return _half_of_bits(x, wide, let)
        case "reciprocal":
            return f"{one} / {x}"
        case "exp":
            return _exp(x, wide, let)
        case "sigmoid":
            negative = let(f"{x} * {number(-1.0, wide)}")
            return f"{one} / ({one} + {let(_exp(negative, wide, let))})"
        case "power_of_two_above":
            return _power_of_two_above(x, wide, let)
        case _:
            raise AssertionError(f"no rule for {function}")


def _half_bits(x: str, wide: str, let: Let) -> str:
    """Exponents of float16 are those of float32 less 112; its subnormal numbers become those of float32."""
    single = _single(x, wide, let)
    small = let(f"T.abs({single}) * T.float32({2.0**-112!r})", "float32")
    sign = f"T.shift_left(T.shift_right({_bits(single)}, T.uint32(31)), T.uint32(15))"
    return f'T.Cast("{wide}", T.bitwise_or({sign}, T.shift_right({_bits(small)}, T.uint32(13))))'


def _half_of_bits(x: str, wide: str, let: Let) -> str:
    n = let(f'T.Cast("uint32", {x})', "uint32")
    size = f'T.reinterpret("float32", T.shift_left(T.bitwise_and({n}, T.uint32(32767)), T.uint32(13)))'
    value = let(f"{size} * T.float32({2.0**112!r})", "float32")
    sign = f"T.shift_left(T.shift_right({n}, T.uint32(15)), T.uint32(31))"
    text = f'T.reinterpret("float32", T.bitwise_or({sign}, {_bits(value)}))'
    return text if wide == "float32" else f'T.Cast("{wide}", {text})'


def _exp(x: str, wide: str, let: Let) -> str:
    """e^x; in float32 within 2 units in the last place: x = n·ln 2 + r, a polynomial in r, and 2^n in two factors."""
    if wide == "float64":
        return f"T.exp({x})"
    below = let(f"T.Select({x} < T.float32(89.0), {x}, T.float32(89.0))")
    a = let(f"T.Select({below} > T.float32(-104.0), {below}, T.float32(-104.0))")
    shifted = let(f"{a} * T.float32({_LOG2_E!r}) + T.float32({_ROUNDER!r})")
    power = let(f'T.reinterpret("int32", {shifted}) - {_word(_ROUNDER, "int32")}', "int32")
    n = let(f'T.Cast("float32", {power})')
    high = let(f"{a} - {n} * T.float32({_LN2_HIGH!r})")
    r = let(f"{high} - {n} * T.float32({_LN2_LOW!r})")
    p = let(f"{r} * T.float32({1 / 5040!r}) + T.float32({1 / 720!r})")
    for k in (120, 24, 6, 2, 1, 1):
        p = let(f"{p} * {r} + T.float32({1 / k!r})")
    half = let(f"T.shift_right({power}, 1)", "int32")
    first = let(f'T.reinterpret("float32", T.shift_left({half} + 127, 23))')
    second = let(f'T.reinterpret("float32", T.shift_left({power} - {half} + 127, 23))')
    return f"T.Select({_is_nan(x, wide)}, {x}, {p} * {first} * {second})"


def _power_of_two_above(x: str, wide: str, let: Let) -> str:
    """The exponent of x, one more unless x is a power of two; subnormal x is scaled up first."""
    word, full, bias = ("uint64", 52, 1023) if wide == "float64" else ("uint32", 23, 127)
    lift = 2.0 ** (full + 1)
    small = f"{x} < {number(2.0 ** (1 - bias), wide)}"
    a = let(f"T.Select({small}, {x} * {number(lift, wide)}, {x})")
    up = f'T.reinterpret("{word}", {a}) + T.{word}({2**full - 1})'
    power = let(f'T.reinterpret("{wide}", T.shift_left(T.shift_right({up}, T.{word}({full})), T.{word}({full})))')
    return f"T.Select({small}, {power} * {number(1 / lift, wide)}, {power})"


def binary(function: str, x: str, y: str, wide: str) -> str:
    """A function of `dsv3c.rows.BINARY` of the numbers named `x` and `y`; NaN wins in max and min."""
    sign = {"add": "+", "sub": "-", "mul": "*", "div": "/"}.get(function)
    if sign:
        return f"{x} {sign} {y}"
    if function in ("max", "min"):
        wins = f"{x} {'>' if function == 'max' else '<'} {y}"
        return f"T.Select(T.Or({wins}, {_is_nan(x, wide)}), {x}, {y})"
    holds = f"{x} {'<' if function == 'less' else '=='} {y}"
    return f"T.Select({holds}, {number(1.0, wide)}, {number(0.0, wide)})"
