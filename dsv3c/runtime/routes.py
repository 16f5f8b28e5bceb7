"""Which row goes to which rank and back: computed on the device from the choices of experts, without a loop over
tokens, and kept for everything that later takes the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dsv3c.runtime.collectives import Group, swap
from dsv3c.tensors import wide

AddUp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(rows [N, n], index i32[T, c], out [T, n]): out[t] = Σ_j rows[index[t, j]], −1 is none, j ascending, in float32
(float64) and rounded once."""


def add_up(rows: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """AddUp by torch, on every device and for every type."""
    if not rows.shape[0]:
        out.zero_()
        return
    total: torch.Tensor | None = None
    for j in range(index.shape[1]):
        place = index[:, j]
        part = wide(torch.index_select(words(rows), 0, place.clamp(min=0)).view(rows.dtype))
        part.masked_fill_((place < 0).unsqueeze(1), 0)
        total = part if total is None else total.add_(part)
    assert total is not None
    out.copy_(total)


def hits(to: torch.Tensor, ranks: int) -> torch.Tensor:
    """bool[ranks, tokens]: whether any of a token's destinations to[tokens, k] is the rank; others are none.

    Tokens lie innermost: a GPU counts along them in parallel.
    """
    outside = (to < 0) | (to >= ranks)
    marked = torch.zeros(to.shape[0], ranks + 1, dtype=torch.bool, device=to.device)
    return marked.scatter_(1, to.masked_fill(outside, ranks).long(), True).t()[:ranks].contiguous()


def places(hit: torch.Tensor) -> torch.Tensor:
    """For hit[ranks, tokens], the place of each token among those of the rank; −1 where it is none."""
    return torch.where(hit, hit.cumsum(1, dtype=torch.int32) - 1, -1)


def words(t: torch.Tensor) -> torch.Tensor:
    """Contiguous rows [..., n] as [rows, words] of the widest integer that fits: moving them needs no more, and torch
    moves no float8."""
    flat = t.reshape(-1, t.shape[-1])
    size = t.shape[-1] * t.dtype.itemsize
    for kind in (torch.int64, torch.int32):
        if size % kind.itemsize == 0 and t.storage_offset() * t.dtype.itemsize % kind.itemsize == 0:
            return flat.view(kind)
    return flat.view(torch.uint8)


class Room:
    """Memory for rows on their way, by the part of the way; calls of one stream take turns with it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._size: dict[str, int] = {}
        self._block: dict[str, torch.Tensor] = {}
        self._taken: dict[tuple[object, ...], list[torch.Tensor]] = {}

    @property
    def bytes(self) -> int:
        return sum(self._size.values())

    def reserve(self, part: str, rows: int, like: Sequence[torch.Tensor]) -> None:
        """Room for `rows` rows as wide as those of each of `like`, at the same time."""
        need = sum(_aligned(rows * t.shape[-1] * t.dtype.itemsize) for t in like)
        self._size[part] = max(need, self._size.get(part, 0))

    def take(self, part: str, rows: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors [rows, n] with the width and element type of each of `like`."""
        key = (part, rows, *((t.dtype, t.shape[-1]) for t in like))
        block = self._block.get(part)
        if block is None or len(block) < self._size[part]:
            self._taken = {k: v for k, v in self._taken.items() if k[0] != part}
            with torch.inference_mode(False):
                block = self._block[part] = torch.empty(self._size[part], dtype=torch.uint8, device=self._device)
        if key not in self._taken:
            start, found = 0, []
            for t in like:
                size = rows * t.shape[-1] * t.dtype.itemsize
                found.append(block[start : start + size].view(t.dtype).view(rows, t.shape[-1]))
                start += _aligned(size)
            self._taken[key] = found
        return self._taken[key]


def _aligned(size: int) -> int:
    return -(-size // 256) * 256


@dataclass
class Hop:
    """One transfer among the members of a group, and the same way back.

    `most`: rows that can be sent; `limit`: rows that can be here before. `order`: members in the order in which their
    rows lie where they arrive. Returning rows are added up within `nodes` blocks of members first. `source[i]`: the
    row here that is sent as i-th, by member. `back[node, row, member of node]`: its place among the returned rows, −1
    if it was not sent there. `sends`, `receives`: rows by member.
    """

    group: Group
    order: tuple[int, ...]
    nodes: int
    most: int
    limit: int
    device: torch.device
    source: torch.Tensor = field(init=False)
    back: torch.Tensor = field(init=False)
    sends: list[int] = field(init=False, default_factory=list)
    receives: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        size = self.group.size
        self.source = torch.zeros(self.most + 1, dtype=torch.int32, device=self.device)
        self.back = torch.full((self.nodes, self.limit, size // self.nodes), -1, dtype=torch.int32, device=self.device)

    @property
    def sent(self) -> int:
        return sum(self.sends)

    @property
    def received(self) -> int:
        return sum(self.receives)

    @property
    def bytes(self) -> int:
        return (self.source.numel() + self.back.numel()) * 4

    def mark(self, hit: torch.Tensor) -> torch.Tensor:
        """Lay the routes for hit[members, rows]; gives each row's place among those sent to a member, −1 if none.

        If more than `most` are to be sent, what is beyond it is lost: the caller must find out and take fewer.
        """
        members, rows = hit.shape
        place = places(hit)
        counts = hit.sum(1, keepdim=True, dtype=torch.int32)
        position = torch.where(hit, place + (counts.cumsum(0, dtype=torch.int32) - counts), -1)
        row = torch.arange(rows, dtype=torch.int32, device=hit.device).expand(members, rows)
        target = position.masked_fill(~hit, self.most).clamp_(max=self.most)
        self.source.scatter_(0, target.flatten().long(), row.flatten())
        self.back[:, :rows].copy_(position.view(self.nodes, members // self.nodes, rows).transpose(1, 2))
        self.back[:, rows:].fill_(-1)
        return place

    def go(self, rows: Sequence[torch.Tensor], staged: Sequence[torch.Tensor], arrived: Sequence[torch.Tensor]) -> None:
        """Send the rows of each tensor; those that arrive lie first in each of `arrived`, by source in `order`."""
        me, count = self.group.index, self.sent
        sends = self._parts([s[:count] for s in staged], self.sends, range(self.group.size))
        receives = self._parts([a[: self.received] for a in arrived], self.receives, self.order)
        first = sum(self.sends[:me])
        last = first + self.sends[me]
        for t, s, own in zip(rows, staged, receives[me], strict=True):
            # What stays here goes straight to its place.
            for begin, end, target in ((0, first, s[:first]), (first, last, own), (last, count, s[last:count])):
                if end > begin:
                    torch.index_select(words(t), 0, self.source[begin:end], out=words(target))
        sends[me], receives[me] = [], []
        swap(self.group, sends, receives).wait()

    def come(self, rows: torch.Tensor, returned: torch.Tensor, out: torch.Tensor, partial: torch.Tensor | None,
             add: AddUp) -> None:  # fmt: skip
        """Send rows that arrived back to where they were; `out` is the sum of what came back for each row.

        `partial`: a tensor like `out`, needed if there are several nodes.
        """
        sends = self._parts([rows[: self.received]], self.receives, self.order)
        receives = self._parts([returned[: self.sent]], self.sends, range(self.group.size))
        swap(self.group, sends, receives).wait()
        if not self.sent:
            out.zero_()
        elif self.nodes == 1:
            add(returned, self.back[0, : out.shape[0]], out)
        else:
            assert partial is not None
            total: torch.Tensor | None = None
            for index in self.back[:, : out.shape[0]]:
                add(returned, index, partial)
                total = wide(partial).clone() if total is None else total.add_(wide(partial))
            assert total is not None
            out.copy_(total)

    def _parts(self, tensors: Sequence[torch.Tensor], counts: list[int], order: Sequence[int]
               ) -> list[list[torch.Tensor]]:  # fmt: skip
        """For each member its part of every tensor, which lie in `order`."""
        parts: list[list[torch.Tensor]] = [[] for _ in counts]
        for t in tensors:
            for member, part in zip(order, t.split([counts[i] for i in order]), strict=True):
                parts[member].append(part)
        return parts
