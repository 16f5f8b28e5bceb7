"""Memory that one call needs for its own duration, kept from call to call: fresh pages cost more than the work."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from dsv3c.lazy import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

_KEEP = 64 * 2**20
"""Larger requests are handed back after the call."""


class _Pool(threading.local):
    def __init__(self) -> None:
        self.blocks: dict[int, torch.Tensor] = {}


_pool = _Pool()


def scratch(slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of any contents, valid until this thread asks for the same `slot` again."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    block = _pool.blocks.get(slot)
    if block is None or block.numel() < size:
        block = torch.empty(max(size, 1), dtype=torch.uint8)
        if size <= _KEEP:
            _pool.blocks[slot] = block
    return block[:size].view(dtype).view(shape)


def widened(slot: int, x: torch.Tensor) -> torch.Tensor:
    """`x` in float32 (float64 stays), in `slot` if it has to be converted."""
    if x.dtype in (torch.float32, torch.float64):
        return x
    return scratch(slot, tuple(x.shape), torch.float32).copy_(x)
