"""Run generated Triton kernels on a CPU with Triton's interpreter, whose casts and reductions need mending.

A process either interprets or compiles: the variable TRITON_INTERPRET must be 1 before Triton is imported, so this is
for a process of its own (`Worker`). Mended: conversions between float types (the interpreter rounds wrongly, and does
not saturate), fused multiply-add (it rounds twice), reductions with a combining function of one's own (it goes number
by number, in minutes), loop bounds.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dsv3c.lazy import lazy
from dsv3c.targets._triton_math import SIGMOID_HELPER, SIGMOID_PLAIN

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

VECTOR = 16
"""Numbers that a kernel stores at once at most."""
MAXIMUM = {"fp8e4nv": 448.0, "fp8e5": 57344.0}


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: the kernel's name in the source, its grid, and its arguments: a number, or the position of a
    tensor as `[n]`."""

    entry: str
    grid: tuple[int, ...]
    arguments: tuple[int | tuple[int], ...]


def module_of(source: str, name: str = "dsv3c_generated") -> ModuleType:
    """The module of generated Triton source, which must be a real file for as long as the module lives."""
    folder = tempfile.mkdtemp(prefix="dsv3c-")
    path = Path(folder) / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    weakref.finalize(module, shutil.rmtree, folder, ignore_errors=True)
    spec.loader.exec_module(module)
    return module


def _mend() -> None:
    """Replace what is wrong in the interpreter of Triton 3.6 and 3.7."""
    import numpy as np
    import triton.runtime.interpreter as interpreter

    types = {
        "fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64, "bf16": torch.bfloat16,
        "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2,
    }  # fmt: skip
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any = None) -> Any:
        if source.name not in types or target.name not in types:
            return original(data, source, target, rounding)
        raw = np.ascontiguousarray(data)
        values = torch.frombuffer(bytearray(raw.tobytes()), dtype=types[source.name]) if raw.size else torch.empty(0)
        if target.name in MAXIMUM:
            values = values.float().clamp(-MAXIMUM[target.name], MAXIMUM[target.name])
        made = values.to(types[target.name])
        width = made.element_size()
        return np.frombuffer(made.view(torch.uint8).numpy().tobytes(), dtype=bits[width]).reshape(raw.shape)

    def reduce(self: Any, inputs: Any) -> Any:
        """Halves combined with each other until one number is left, for a combining function of one tensor."""
        (x,) = inputs
        data = x.handle.data
        while data.shape[self.axis] > 1:
            left, right = np.array_split(data, 2, axis=self.axis)
            width = right.shape[self.axis]
            head, rest = np.split(left, [width], axis=self.axis)
            joined = self.combine_fn.fn(self.to_tensor(head, x.dtype), self.to_tensor(right, x.dtype)).handle.data
            data = np.concatenate([joined, rest], axis=self.axis)
        return (self.to_tensor(data if self.keep_dims else data.squeeze(self.axis), x.dtype),)

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        """One rounding: a product of two float32 numbers is exact in float64."""
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_fma = fused
    plain = interpreter.ReduceOps.generic_reduce
    interpreter.ReduceOps.generic_reduce = lambda self, inputs: (
        reduce(self, inputs) if len(inputs) == 1 and self.axis is not None else plain(self, inputs)
    )
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        """Numbers as bounds of loops are arrays of one element, which NumPy 2 does not take for a number."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_tensor


def _start(path: Sequence[str]) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [p for p in path if p not in sys.path]
    torch.set_num_threads(1)
    _mend()


Packed = tuple[bytes, str, tuple[int, ...], tuple[int, ...]]


def _pack(t: torch.Tensor) -> Packed:
    """The storage under a tensor, so that strides survive, and what its last vector may reach into behind it."""
    t = t.detach()
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    room = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    flat = t.as_strided((min(last + VECTOR, room) if t.numel() else 0,), (1,))
    return flat.contiguous().view(torch.uint8).numpy().tobytes(), str(t.dtype), tuple(t.shape), tuple(t.stride())


def _unpack(packed: Packed) -> torch.Tensor:
    data, dtype, shape, stride = packed
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).clone() if data else torch.empty(0, dtype=torch.uint8)
    return flat.view(getattr(torch, dtype.removeprefix("torch."))).as_strided(shape, stride)


def _run(source: str, launches: tuple[Launch, ...], packed: tuple[Packed, ...]) -> tuple[Packed, ...]:
    module = module_of(source.replace(SIGMOID_HELPER, SIGMOID_PLAIN))
    tensors = [_unpack(p) for p in packed]
    for launch in launches:
        kernel: Callable[..., object] = getattr(module, launch.entry)[launch.grid]
        kernel(*(a if isinstance(a, int) else tensors[a[0]] for a in launch.arguments))
    return tuple(_pack(t) for t in tensors)


class Worker:
    """A process that interprets kernels; close it when done."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _start, (tuple(sys.path),))

    def run(self, source: str, launches: tuple[Launch, ...], tensors: tuple[torch.Tensor, ...]) -> None:
        """Execute the launches one after the other; `tensors` hold the results afterwards."""
        made = self._pool.submit(_run, source, launches, tuple(map(_pack, tensors))).result()
        for t, p in zip(tensors, made, strict=True):
            if t.numel():
                t.copy_(_unpack(p))

    def close(self) -> None:
        self._pool.shutdown()
