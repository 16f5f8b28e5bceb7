"""Between IR types and torch: element types, rounding, random tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.ir import DType
from dsv3c.lazy import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

E4M3_MAX = 448.0

_TORCH_NAMES = {
    DType.f64: "float64", DType.f32: "float32", DType.bf16: "bfloat16", DType.f16: "float16",
    DType.e4m3: "float8_e4m3fn", DType.e5m6: "float32", DType.i64: "int64", DType.i32: "int32",
    DType.u8: "uint8", DType.bool: "bool",
}  # fmt: skip


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch element type that holds `dtype` (e5m6 is computed in float32)."""
    return getattr(torch, _TORCH_NAMES[dtype])  # type: ignore[no-any-return]


def ir_dtype(dtype: torch.dtype) -> DType:
    """The IR element type of a torch one; KeyError if the IR has none."""
    name = str(dtype).removeprefix("torch.")
    for key, value in _TORCH_NAMES.items():
        if value == name:
            return key
    raise KeyError(name)


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the type that arithmetic is done in: float64 if it is that, else float32."""
    return x if x.dtype == torch.float64 else x.float()


def round_to(x: torch.Tensor, dtype: DType) -> torch.Tensor:
    """`x` (float32 or float64) rounded to the values of `dtype`, nearest even; e4m3 saturates and keeps NaN."""
    if dtype is DType.e4m3:
        return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)
    if dtype is DType.e5m6:
        return _round_e5m6(x)
    return x.to(torch_dtype(dtype)).to(x.dtype)


def _round_e5m6(x: torch.Tensor) -> torch.Tensor:
    """5 exponent bits (bias 15, float16's range), 6 mantissa bits, subnormals kept, saturating, nearest even."""
    _mantissa, exponent = torch.frexp(x)
    exponent = exponent.clamp(min=-13)
    step = torch.ldexp(torch.ones_like(x), exponent - 7)
    top = 2.0**15 * (2 - 2.0**-6)
    rounded = (torch.round(x / step) * step).clamp(-top, top)
    return torch.where(x.isnan(), x, rounded)
