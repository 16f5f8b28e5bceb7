"""Binding of the Hopper target's own kernels, given as Triton text, to tensors: compiled once and kept by content."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dsv3c.lazy import lazy
from dsv3c.targets._triton_build import Entry, Prepared, compile_source, driver
from dsv3c.targets._triton_math import POINTER
from dsv3c.tensors import ir_dtype

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Call = Callable[[], None]

ROOM = 512
"""Bytes; rooms of scratch memory are a multiple of it."""


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


_pool: dict[tuple[int, str], list[torch.Tensor]] = {}


def scratch(slot: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for one call's own duration, at an address that stays: calls of one stream that name the same `slot` share
    it, in the first room made for it that is large enough."""
    size = max(1, math.prod(shape)) * dtype.itemsize
    rooms = _pool.setdefault((slot, str(device)), [])
    room = next((r for r in rooms if r.numel() >= size), None)
    if room is None:
        room = torch.zeros(-(-size // ROOM) * ROOM, dtype=torch.uint8, device=device)
        rooms.append(room)
    return room[:size].view(dtype).view(shape)


def in_turn(*calls: Callable[[], object]) -> Call:
    """One call that makes all of them."""

    def run() -> None:
        for call in calls:
            call()

    return run
