"""What processes that save or load together must tell each other: short texts, and whose work failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from dsv3c.errors import Dsv3cError, InputError, WorkError

if TYPE_CHECKING:
    import torch


class Peers(Protocol):
    """The processes that do something together; all of them call `share` the same number of times."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def share(self, text: str) -> list[str]:
        """What every rank gave, in order of ranks; returns when all have given theirs."""
        ...


class _Alone:
    """One process by itself."""

    rank = 0
    size = 1

    def share(self, text: str) -> list[str]:
        return [text]


ALONE: Peers = _Alone()


class GroupPeers:
    """The ranks of a process group of torch.distributed, by default of all; texts travel from memory of `device`."""

    def __init__(self, group: torch.distributed.ProcessGroup | None = None, device: str = "cpu") -> None:
        import torch.distributed as dist

        self._group, self._device = group, device
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)

    def share(self, text: str) -> list[str]:
        import torch
        import torch.distributed as dist

        from dsv3c.runtime.collectives import LostPeerError

        data = text.encode()
        length = torch.tensor([len(data)], device=self._device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        try:
            dist.all_gather(lengths, length, group=self._group)
            sizes = [int(n) for n in lengths]
            padded = bytearray(data.ljust(max(*sizes, 1), b"\0"))
            sent = torch.frombuffer(padded, dtype=torch.uint8).to(self._device)
            received = [torch.empty_like(sent) for _ in sizes]
            dist.all_gather(received, sent, group=self._group)
        except RuntimeError as error:
            raise LostPeerError(f"a rank stopped while rank {self.rank} waited for all: {error}") from error
        return [bytes(t[:n].cpu().numpy()).decode() for t, n in zip(received, sizes, strict=True)]


def together(peers: Peers, act: Callable[[], str]) -> list[str]:
    """What `act` gave on every rank, once all are done with it.

    If it raises InputError or WorkError on some rank, every rank raises that of the first one; so none waits for
    another that gave up.
    """
    if peers.size == 1:
        return [act()]
    failed: Dsv3cError | None = None
    try:
        said = json.dumps({"said": act()})
    except (InputError, WorkError) as error:
        failed = error
        said = json.dumps({"failed": str(error), "input": isinstance(error, InputError)})
    answers = [json.loads(text) for text in peers.share(said)]
    for rank, answer in enumerate(answers):
        if "failed" in answer:
            kind = InputError if answer["input"] else WorkError
            raise kind(answer["failed"] if rank == 0 else f"rank {rank}: {answer['failed']}") from failed
    return [answer["said"] for answer in answers]
