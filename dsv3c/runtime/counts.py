"""How many rows go where, before they go: counted on the device, told to the expert group, read by the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsv3c.runtime.collectives import Group, Pending, gather
from dsv3c.runtime.routes import Hop


def by_node(hit: torch.Tensor, nodes: int) -> torch.Tensor:
    """bool[nodes, tokens]: whether a token goes to any rank of the node; `hit`: bool[ranks, tokens]."""
    return hit.view(nodes, len(hit) // nodes, -1).any(1)


class Counts:
    """What the ranks of an expert group tell each other of one dispatch: [source, round, ranks + nodes + experts].

    For each round, how many tokens the source sends to each rank, to each node, and how often it chose each expert.
    """

    def __init__(self, group: Group, nodes: int, experts: int) -> None:
        self._group, self._nodes, self._experts = group, nodes, experts
        self._pending = Pending()
        self._told: torch.Tensor | None = None
        self._host: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def tell(self, hit: torch.Tensor, e: torch.Tensor, rounds: int) -> None:
        """Begin to gather everyone's counts of `hit` bool[ranks, tokens] and choices `e` i32[tokens, k]."""
        tokens, experts = hit.shape[1], self._experts
        turn = torch.arange(tokens, device=hit.device) % rounds
        to = torch.cat((hit, by_node(hit, self._nodes)))
        if rounds == 1:
            sums = to.sum(1, dtype=torch.int32).unsqueeze(0)
        else:
            sums = torch.zeros(rounds, len(to), dtype=torch.int32, device=hit.device).index_add_(0, turn, to.t().int())
        chosen = torch.zeros(rounds * (experts + 1), dtype=torch.int32, device=hit.device)
        slot = turn.unsqueeze(1) * (experts + 1) + torch.where(e < 0, experts, e)
        chosen.scatter_add_(0, slot.flatten(), torch.ones_like(e, dtype=torch.int32).flatten())
        counts = torch.cat((sums, chosen.view(rounds, -1)[:, :experts]), 1)
        self._told = counts.new_empty(self._group.size, *counts.shape)
        self._pending = gather(counts, self._told, self._group)
        if hit.is_cuda:
            self._pending.wait()
            if self._host is None or self._host.shape != self._told.shape:
                self._host = torch.empty(self._told.shape, dtype=torch.int32, pin_memory=True)
            self._host.copy_(self._told, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> torch.Tensor:
        """The counts on the host, once they are there."""
        assert self._told is not None
        if self._event is not None and self._host is not None:
            self._event.synchronize()
            return self._host.long()
        self._pending.wait()
        return self._told.long()


def put(route: Sequence[Hop], counts: torch.Tensor, me: int, ranks: int, nodes: int) -> None:
    """Tell the hops of one round how many rows they send and receive; `counts`: [source, ranks + nodes + experts]."""
    to, local = counts[:, :ranks], ranks // nodes
    if len(route) == 1:
        route[0].sends, route[0].receives = to[me].tolist(), to[:, me].tolist()
        return
    node, place = divmod(me, local)
    across = counts[:, ranks : ranks + nodes]
    route[0].sends, route[0].receives = across[me].tolist(), across[place::local, node].tolist()
    through = to.view(nodes, local, ranks).sum(0)  # [place of the source, destination]
    route[1].sends = through[place, node * local : (node + 1) * local].tolist()
    route[1].receives = through[:, me].tolist()
