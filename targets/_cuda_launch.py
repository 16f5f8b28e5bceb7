"""Binding of the Hopper target's own kernels to tensors: Triton text and generated matrix products, compiled once and
kept by content."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dsv3c.lazy import lazy
from dsv3c.targets import _gluon_gemm, _gluon_launch
from dsv3c.targets._gluon_gemm import GemmSpec
from dsv3c.targets._triton_build import Entry, Prepared, _write, compile_source, driver
from dsv3c.targets._triton_math import POINTER
from dsv3c.targets._tvm_build import cache_folder
from dsv3c.tensors import ir_dtype

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Call = Callable[[], None]


def _given(values: Mapping[str, object]) -> dict[str, torch.Tensor | int]:
    given: dict[str, torch.Tensor | int] = {}
    for name, v in values.items():
        assert isinstance(v, int | torch.Tensor), name
        given[name] = v
    return given


@functools.cache
def _loaded(source: str, entry: Entry) -> tuple[ctypes.c_void_p, int, int]:
    torch.cuda.current_stream()  # makes torch's context current
    made = compile_source(source, entry)
    return driver().load(made.cubin, entry.name, made.shared), made.warps, made.shared


def launch(source: str, name: str, grid: tuple[int, ...], values: Mapping[str, object], warps: int = 4,
           **constants: int) -> Call:  # fmt: skip
    """A call that starts kernel `name` of `source` on torch's current stream; nothing if the grid is empty.

    `values` by parameter in order: tensors by address, numbers as 32-bit. `constants` follow them.
    """
    if 0 in grid:
        return lambda: None
    given = _given(values)
    kinds = {n: "i32" if isinstance(v, int) else f"*{POINTER[ir_dtype(v.dtype)]}" for n, v in given.items()}
    sizes = {n: v if isinstance(v, int) else v.data_ptr() for n, v in given.items()}
    entry = Entry(
        name,
        (*kinds.items(), *((n, "constexpr") for n in constants)),
        tuple((n, 16) for n, v in sizes.items() if v % 16 == 0),
        warps,
        constants=tuple(constants.items()),
    )
    function, made_warps, shared = _loaded(source, entry)
    bound = tuple((kinds[n], v) for n, v in given.items())
    return Prepared(function, name, grid, made_warps, shared, bound)


def words(x: torch.Tensor) -> torch.Tensor:
    """Contiguous `x` [rows, n] as 32-bit words, or bytes where a row is not a whole number of words."""
    flat = x.view(torch.uint8) if x.dtype.itemsize == 1 else x
    return flat.view(torch.int32) if x.shape[-1] * x.dtype.itemsize % 4 == 0 else flat.view(torch.uint8)


def width(columns: int, most: int) -> int:
    """The power of two that covers `columns`, at most `most`."""
    return min(most, 1 << max(0, math.ceil(math.log2(max(columns, 1)))))


def _key(spec: GemmSpec) -> str:
    from dsv3c.targets import _gluon_ptx

    makers = "".join(inspect.getsource(m) for m in (_gluon_launch, _gluon_ptx))
    return hashlib.sha256(f"{spec}\n{_gluon_gemm.source(spec)}\n{makers}".encode()).hexdigest()


def gemm_binary(spec: GemmSpec) -> _gluon_launch.Binary:
    """The sm_90a binary of `spec`, from the cache if it is there; needs no GPU."""
    key, folder = _key(spec), cache_folder()
    try:
        facts = json.loads((folder / f"{key}.json").read_text())
        cubin = (folder / f"{key}.cubin").read_bytes()
        if hashlib.sha256(cubin).hexdigest() == facts.pop("digest"):
            return _gluon_launch.Binary(cubin, **facts)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    made = _gluon_launch.build(spec, folder)
    facts = {"entry": made.entry, "shared": made.shared, "threads": made.threads, "cluster": made.cluster,
             "digest": hashlib.sha256(made.cubin).hexdigest()}  # fmt: skip
    _write(folder / f"{key}.cubin", made.cubin)
    _write(folder / f"{key}.json", json.dumps(facts).encode())
    return made


@functools.cache
def _gemm(spec: GemmSpec) -> _gluon_launch.Loaded:
    return _gluon_launch.load(spec, gemm_binary(spec))


def gemm(spec: GemmSpec, values: Mapping[str, object]) -> Call:
    """A call that runs the generated matrix product `spec` on all SMs of the current device."""
    units = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return _gemm(spec).bind(units, **_given(values))


_pool: dict[tuple[int, int, str], torch.Tensor] = {}


def scratch(slot: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for one call's own duration, at an address that stays: calls of one stream that name the same `slot` and
    size share it."""
    size = max(1, math.prod(shape)) * dtype.itemsize
    room = 1 << (size - 1).bit_length()
    key = (slot, room, str(device))
    if key not in _pool:
        _pool[key] = torch.zeros(room, dtype=torch.uint8, device=device)
    return _pool[key][:size].view(dtype).view(shape)


def in_turn(*calls: Callable[[], object]) -> Call:
    """One call that makes all of them."""

    def run() -> None:
        for call in calls:
            call()

    return run
