"""What ranks say to each other: groups, pipeline channels, and shards gathered and summed in a fixed order.

The same calls run on gloo, where waiting blocks the host, and on NCCL, where it makes the current stream wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from dsv3c.errors import WorkError
from dsv3c.tensors import wide

CHANNELS = ("f0", "b0", "f1", "b1")
"""Forward and backward where forward goes up the pipeline (0) and where it goes down (1); see `dsv3c.comm.channel_of`.
NCCL takes the transfers of one channel in their order on both sides, so all messages of a pair must go one way."""

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13

CHUNK_BYTES = 256 << 20
"""Temporary memory of one step of `exchange_shards`."""


class LostPeerError(WorkError):
    """A transfer failed, most likely since another rank is gone."""


@dataclass(frozen=True)
class Group:
    """Some ranks, ascending, and this rank's place among them; `handle` is None for a group of one.

    `ordered`: transfers are ordered by streams (NCCL), not by the host (gloo).
    """

    ranks: tuple[int, ...]
    index: int
    handle: dist.ProcessGroup | None
    ordered: bool = False

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass
class Pending:
    """Transfers under way. Their tensors must live, and those sent stay unchanged, until `wait`."""

    works: list[dist.Work] = field(default_factory=list)
    peers: str = ""
    tensors: tuple[torch.Tensor, ...] = ()
    after: Callable[[], None] | None = None

    def wait(self) -> None:
        """Block the host (gloo) or the current stream (NCCL) until done. Raises WorkError if a peer is lost."""
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise _lost(self.peers, error) from error
        if self.after is not None:
            self.after()
        self.works, self.tensors, self.after = [], (), None


def _lost(peers: str, error: RuntimeError) -> LostPeerError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
    return LostPeerError(f"a transfer with {peers} failed: {reason}; is it still running?")


def swap(group: Group, sends: Sequence[Sequence[torch.Tensor]], receives: Sequence[Sequence[torch.Tensor]]) -> Pending:
    """Send `sends[i]` to member i and fill `receives[i]` with what it sends here, all at once; own part is copied.

    All members call it. All tensors are contiguous; what two members have for each other matches in order and bytes.
    """
    for a, b in zip(sends[group.index], receives[group.index], strict=True):
        if a.numel():
            b.copy_(a)
    if group.handle is None:
        return Pending()
    peers = f"one of the ranks {', '.join(str(r) for i, r in enumerate(group.ranks) if i != group.index)}"
    if not group.ordered:
        return _swap_packed(group, sends, receives, peers)
    others = [(group.index + i) % group.size for i in range(1, group.size)]
    steps = [dist.P2POp(dist.irecv, _bytes(t), group=group.handle, group_peer=i)
             for i in others for t in receives[i] if t.numel()]  # fmt: skip
    steps += [dist.P2POp(dist.isend, _bytes(t), group=group.handle, group_peer=i)
              for i in others for t in sends[i] if t.numel()]  # fmt: skip
    return _begin(steps, peers)


def _swap_packed(group: Group, sends: Sequence[Sequence[torch.Tensor]], receives: Sequence[Sequence[torch.Tensor]],
                 peers: str) -> Pending:  # fmt: skip
    """`swap` as one call of gloo, whose messages cost more than copies: 3 to 4 times faster for small tensors."""
    out, into = (
        [[_bytes(t) for t in ts if t.numel() and i != group.index] for i, ts in enumerate(given)]
        for given in (sends, receives)
    )
    sent = torch.cat([t for ts in out for t in ts] or [torch.empty(0, dtype=torch.uint8)])
    out_bytes, into_bytes = ([sum(t.numel() for t in ts) for ts in given] for given in (out, into))
    received = torch.empty(sum(into_bytes), dtype=torch.uint8)
    targets = [t for ts in into for t in ts]

    def unpack() -> None:
        for t, part in zip(targets, received.split([t.numel() for t in targets]), strict=True):
            t.copy_(part)

    try:
        work = dist.all_to_all_single(received, sent, into_bytes, out_bytes, group=group.handle, async_op=True)
    except RuntimeError as error:
        raise _lost(peers, error) from error
    return Pending([work], peers, (sent, received), unpack)


def _bytes(t: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor: a form that every backend sends, whatever the element type."""
    return t.view(-1).view(torch.uint8)


def _begin(steps: list[dist.P2POp], peers: str) -> Pending:
    if not steps:
        return Pending()
    try:
        works = dist.batch_isend_irecv(steps)
    except RuntimeError as error:
        raise _lost(peers, error) from error
    return Pending(works, peers, tuple(s.tensor for s in steps))


def gather(part: torch.Tensor, whole: torch.Tensor, group: Group) -> Pending:
    """Begin to fill `whole` with the equal `part` of each member, in order; `part` may be its own place in `whole`."""
    if group.handle is None:
        whole.view(-1).copy_(part.view(-1))
        return Pending()
    peers = f"one of the ranks {', '.join(map(str, group.ranks))}"
    try:
        work = _all_gather(whole.view(-1), part.view(-1), group=group.handle, async_op=True)
    except RuntimeError as error:
        raise _lost(peers, error) from error
    return Pending([work], peers, (part, whole))


@dataclass(frozen=True)
class Channel:
    """One kind of message along a pipeline. `pairs`: for each neighbour's pp index, the group of the two ranks.

    Sends begin at once and are waited for before their tensors are overwritten; receives may be posted ahead. It
    never blocks for good if on each directed pair both sides post the same messages in the same order, and no rank
    waits for a message before it posted what that message depends on: pairs and channels do not wait for each other.
    A posted receive on NCCL occupies its SMs until the message came: post it when its sender is about to send.
    """

    name: str
    pairs: Mapping[int, Group]

    def send(self, tensors: Sequence[torch.Tensor], peer: int) -> Pending:
        """Begin to send contiguous `tensors` to the rank with pp index `peer`."""
        return self._post(dist.isend, tensors, peer)

    def recv(self, tensors: Sequence[torch.Tensor], peer: int) -> Pending:
        """Begin to fill contiguous `tensors` with the next message from the rank with pp index `peer`."""
        return self._post(dist.irecv, tensors, peer)

    def _post(self, way: object, tensors: Sequence[torch.Tensor], peer: int) -> Pending:
        pair = self.pairs[peer]
        other = 1 - pair.index
        steps = [dist.P2POp(way, _bytes(t), group=pair.handle, group_peer=other) for t in tensors if t.numel()]  # type: ignore[arg-type]
        return _begin(steps, f"rank {pair.ranks[other]} (channel {self.name})")


def gather_shards(flat: torch.Tensor, shard: torch.Tensor, group: Group) -> None:
    """Fill the flat buffer with the equal shards of all members, in their order; `shard` may be its part of `flat`."""
    own = _shards(flat, group)[group.index]
    if own.data_ptr() != shard.data_ptr():
        own.copy_(shard.view(-1))
    gather(own, flat, group).wait()


def exchange_shards(flat: torch.Tensor, out: torch.Tensor, group: Group, chunk_bytes: int = CHUNK_BYTES,
                    room: torch.Tensor | None = None) -> None:  # fmt: skip
    """out = the sum over members, in their order, of this rank's shard of each member's flat buffer.

    Sums are taken in float32, in float64 for float64, so that bits repeat; at most about `chunk_bytes` of temporary
    memory, which lies in `room` (bytes) if that is given and as large. `out` may be this rank's shard of `flat`.
    """
    shards, target = _shards(flat, group), out.view(-1)
    count = target.numel()
    if group.handle is None:
        if target.data_ptr() != shards[0].data_ptr():
            target.copy_(shards[0])
        return
    step = max(1, chunk_bytes // (2 * group.size * flat.element_size()))
    shape = 2, group.size, min(step, count)
    need = math.prod(shape) * flat.element_size()
    if room is None or room.numel() < need:
        rooms = torch.empty(shape, dtype=flat.dtype, device=flat.device)
    else:
        rooms = room[:need].view(flat.dtype).view(shape)
    under_way: list[tuple[slice, torch.Tensor, Pending]] = []

    def finish() -> None:
        part, parts, pending = under_way.pop(0)
        pending.wait()
        first = wide(parts[0])
        total = target[part] if target.dtype == first.dtype else torch.empty_like(first)
        torch.add(first, wide(parts[1]), out=total)
        for i in range(2, group.size):
            total += parts[i]
        if total.dtype != target.dtype:
            target[part] = total

    for number, begin in enumerate(range(0, count, step)):
        part = slice(begin, min(begin + step, count))
        parts = rooms[number % 2][:, : part.stop - part.start]
        sends = [[s[part]] for s in shards]
        receives = [[parts[i]] for i in range(group.size)]
        under_way.append((part, parts, swap(group, sends, receives)))
        if len(under_way) == 2:
            finish()
    while under_way:
        finish()


def _shards(flat: torch.Tensor, group: Group) -> tuple[torch.Tensor, ...]:
    """The flat buffer in as many equal parts as the group has members."""
    size, rest = divmod(flat.numel(), group.size)
    assert rest == 0, f"{flat.numel()} numbers do not divide into {group.size} shards"
    return flat.view(-1).split(size) if size else (flat.view(-1),) * group.size
