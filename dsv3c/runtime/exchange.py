"""Rows to the ranks that hold their experts and back, while a plan runs: `dispatch`, `dispatch_again`, `combine`.

*Flat*, a row goes straight to its rank. *Two-hop*, it goes once to each node that needs it, to the rank at the same
place there, which passes it on inside the node; on the way back that rank adds up what its node computed. Both give
the same bits: rows arrive sorted by (place of the source in its node, node of the source, token), and sums are taken
within each node first, then over nodes, ascending, in float32 at least, each rounded to the payload's type.

`dispatch` computes the routes on the device and tells all ranks how many rows go where: one small gather, the only
time that the host waits. `dispatch_again` and `combine` reuse routes and counts, found by the memory of the handle
tensor, whose address therefore names one dispatch at a time. All calls of an Exchange belong to one stream, in the
same order on every rank of the expert group.

Rows of the outputs beyond those received: `row_experts` is −1, `row_p` 0, and the others keep whatever they held.
Nothing that reaches a result may read them; `permute` by rows sorted by expert does not.

Rounds: if on some rank more rows would arrive than the outputs of `dispatch` hold (D), or sorted by expert and padded
more than `sorted_rows` (R), all ranks of the group agree on n = 2, 4, ... rounds; round c sends tokens c, c+n, c+2n,
... of every source, and no token is dropped. After `dispatch` ran, `rounds(handle)` is n, and

- the prepared calls do round 0; calls made by `bind_round` do the round that they are given, any number of times,
  into the tensors that they were bound to (the same ones may serve);
- `dispatch` and `dispatch_again` keep private copies of what they send, since the plan's memory may be used again
  before the last round, and later rounds, in backward too, send those: the prepared call of each must run first;
- `combine` collects the sum of rounds 0, 1, ... privately; its output is complete after round n−1 and means nothing
  before;
- what lies between (sorting, experts) is run again for each round by the executor, and what it saved for backward is
  made again there, round by round: dispatch, forward, dispatch_again, backward and weight gradients, combine;
- `release(handle)` after backward gives the copies back; the next dispatch of the handle does so too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dsv3c.errors import WorkError
from dsv3c.ir import IRError, Node
from dsv3c.ops.dispatch import source_order
from dsv3c.runtime.counts import Counts, by_node, put
from dsv3c.runtime.routes import AddUp, Hop, Room, add_up, hits, places
from dsv3c.runtime.world import World
from dsv3c.target import Implementation

Call = Callable[[], None]
RoundCall = Callable[[int], None]
Tensors = tuple[torch.Tensor, ...]


@dataclass
class _Sent:
    """What is known of one dispatch: its routes round by round, and on overflow what its rounds send and collected."""

    tokens: int
    rows: int
    routes: list[tuple[Hop, ...]]
    kept: dict[str, Tensors] = field(default_factory=dict)
    collected: dict[str, torch.Tensor] = field(default_factory=dict)


class Exchange:
    """Prepares the ops that send rows, for this rank of `world`.

    `sorted_rows`, `align`: how many rows `sort_by_expert` has and to how many it pads each expert (0: no limit).
    `unpermute`: the target's implementation of that op, which adds rows up faster than torch.
    """

    def __init__(self, world: World, two_hop: bool, sorted_rows: int = 0, align: int = 1,
                 unpermute: Implementation | None = None) -> None:  # fmt: skip
        self.world = world
        self.ranks = world.mesh.ep
        self.local = world.local_ranks
        self.nodes = self.ranks // self.local
        self.two_hop = two_hop and self.nodes > 1 and self.local > 1
        self.sorted_rows, self.align = sorted_rows, align
        self.room = Room(world.device)
        self._sent: dict[int, _Sent] = {}
        self._unpermute = unpermute
        self._sums: dict[tuple[object, ...], Call] = {}
        self._order = source_order(self.ranks, self.local)

    # ---- for the executor ------------------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Memory beside the plan's own: rows on their way, and the routes of every handle."""
        hops = sum(h.bytes for s in self._sent.values() for route in s.routes for h in route)
        return self.room.bytes + hops

    def prepare(self, node: Node, inputs: Tensors, outputs: Tensors) -> Call:
        """The call that executes `node` (all of it, unless `rounds` says otherwise)."""
        self._check(node, inputs, outputs)
        if node.op == "dispatch":
            return Dispatch(self, node, inputs, outputs)
        sent = self._of(inputs[1], outputs[0] if node.op == "dispatch_again" else inputs[0])
        if node.op == "dispatch_again":
            return lambda: self._again(sent, node, inputs[0], outputs[0])
        return lambda: self._combine(sent, node, inputs[0], outputs[0], 0)

    def bind_round(self, node: Node, inputs: Tensors, outputs: Tensors) -> RoundCall:
        """A call that executes the given round of `node`. What `dispatch` and `dispatch_again` send was kept when
        their prepared calls ran; of their `inputs` only the handle is used."""
        self._check(node, inputs, outputs)
        if node.op == "dispatch":
            sent = self._of(outputs[3], outputs[0])
            return lambda c: self._dispatch(sent, sent.kept[_name(node)], outputs[:3], node, c)
        sent = self._of(inputs[1], outputs[0] if node.op == "dispatch_again" else inputs[0])
        if node.op == "dispatch_again":
            return lambda c: self._move(sent.routes[c], sent.kept[_name(node)], outputs)
        return lambda c: self._combine(sent, node, inputs[0], outputs[0], c)

    def rounds(self, handle: torch.Tensor) -> int:
        """In how many rounds the last dispatch with this handle goes."""
        sent = self._sent.get(handle.data_ptr())
        return 1 if sent is None else len(sent.routes)

    def release(self, handle: torch.Tensor) -> None:
        """Give back what several rounds kept for this handle."""
        sent = self._sent.get(handle.data_ptr())
        if sent is not None:
            _reset(sent)

    # ---- binding ---------------------------------------------------------------------------------------------------

    def _check(self, node: Node, inputs: Tensors, outputs: Tensors) -> None:
        if node.op not in ("dispatch", "dispatch_again", "combine"):
            raise IRError(f"{node.path}: {node.op} sends no rows to other ranks")
        if node.attr("ranks") != self.ranks:
            raise IRError(f"{node.path}: {node.op} among {node.attr('ranks')} ranks on a mesh with ep={self.ranks}")
        if not all(t.is_contiguous() for t in (*inputs, *outputs)):
            raise IRError(f"{node.path}: {node.op} of strided rows; copy them first")
        carried = {"dispatch": inputs, "dispatch_again": inputs[:1], "combine": inputs[:1]}[node.op]
        rows = outputs[0].shape[0] if node.op != "combine" else inputs[0].shape[0]
        tokens = (outputs[3] if node.op == "dispatch" else inputs[1]).numel() // self.ranks
        first, middle = self._sizes(tokens, rows)
        self.room.reserve("first", first, carried)
        if self.two_hop:
            self.room.reserve("middle", middle, carried)
            self.room.reserve("second", rows, carried)
        elif node.op == "combine" and self.nodes > 1:
            self.room.reserve("partial", tokens, carried)

    def _sizes(self, tokens: int, rows: int) -> tuple[int, int]:
        """Rows that the first hop sends at most, and rows that it brings at most."""
        if not self.two_hop:
            return min(tokens * self.ranks, rows), rows
        return (min(tokens * self.nodes, rows),) * 2

    def _of(self, handle: torch.Tensor, rows: torch.Tensor) -> _Sent:
        """What is kept for a handle; made when it is first seen."""
        tokens, count = handle.numel() // self.ranks, rows.shape[0]
        known = self._sent.get(handle.data_ptr())
        if known is None or (known.tokens, known.rows) != (tokens, count):
            with torch.inference_mode(False):
                known = _Sent(tokens, count, [self._route(tokens, count)])
            self._sent[handle.data_ptr()] = known
        return known

    def _route(self, tokens: int, rows: int) -> tuple[Hop, ...]:
        world, device = self.world, self.world.device
        first, middle = self._sizes(tokens, rows)
        if not self.two_hop:
            return (Hop(world.experts, self._order, self.nodes, first, tokens, device),)
        across = Hop(world.across_nodes, tuple(range(self.nodes)), 1, first, tokens, device)
        return across, Hop(world.within_node, tuple(range(self.local)), 1, rows, middle, device)

    def _fits(self, counts: torch.Tensor, sent: _Sent, experts: int) -> bool:
        """Whether no rank overflows in any round; `counts` as all ranks know them, so that all agree."""
        ranks, local, nodes = self.ranks, self.local, self.nodes
        to = counts[..., :ranks]
        loads = [to.sum(0), to.sum(-1)]
        if self.two_hop:
            by_node = counts[..., ranks : ranks + nodes]
            first, middle = self._sizes(sent.tokens, sent.rows)
            arriving = by_node.view(nodes, local, -1, nodes).sum(0)
            if int(by_node.sum(-1).max()) > first or int(arriving.max()) > middle:
                return False
            loads.append(to.view(nodes, local, -1, nodes, local).sum((0, 4)))  # passed on by each rank of each node
        if max(int(load.max()) for load in loads) > sent.rows:
            return False
        if not self.sorted_rows:
            return True
        padded = -(-counts[..., ranks + nodes :].sum(0) // self.align) * self.align
        return int(padded.view(-1, ranks, experts // ranks).sum(-1).max()) <= self.sorted_rows

    # ---- moving rows -----------------------------------------------------------------------------------------------

    def _move(self, route: tuple[Hop, ...], rows: Sequence[torch.Tensor], arrived: Sequence[torch.Tensor]) -> None:
        """Send rows along a known route."""
        staged = self.room.take("first", route[0].most, rows)
        if len(route) == 1:
            route[0].go(rows, staged, arrived)
            return
        middle = self.room.take("middle", route[1].limit, rows)
        route[0].go(rows, staged, middle)
        route[1].go(middle, self.room.take("second", route[1].most, rows), arrived)

    def _dispatch(self, sent: _Sent, inputs: Tensors, outputs: Tensors, node: Node, c: int,
                  lay: bool = False) -> None:  # fmt: skip
        """Round c of a dispatch; with `lay` the second hop's route is made on the way."""
        route = sent.routes[c]
        each = _experts(node) // self.ranks
        if len(route) == 2 and lay:
            staged = self.room.take("first", route[0].most, inputs)
            middle = self.room.take("middle", route[1].limit, inputs)
            route[0].go(inputs, staged, middle)
            first = self.world.ep_index // self.local * self.local
            to = middle[1][: route[0].received].div(each, rounding_mode="floor").sub_(first)
            route[1].mark(hits(to, self.local))
            route[1].go(middle, self.room.take("second", route[1].most, inputs), outputs)
        else:
            self._move(route, inputs, outputs)
        count = route[-1].received
        experts, weights = outputs[1], outputs[2]
        local = experts[:count].sub_(self.world.ep_index * each)
        local.masked_fill_((local < 0) | (local >= each), -1)
        experts[count:].fill_(-1)
        weights[count:].zero_()

    def _again(self, sent: _Sent, node: Node, dy: torch.Tensor, rows: torch.Tensor) -> None:
        if len(sent.routes) > 1:
            sent.kept[_name(node)] = (dy.clone(),)
        self._move(sent.routes[0], (dy,), (rows,))

    def _combine(self, sent: _Sent, node: Node, rows: torch.Tensor, out: torch.Tensor, c: int) -> None:
        target = out.view(-1, out.shape[-1])
        last = len(sent.routes) - 1
        self._come(sent.routes[c], rows, target)
        if not last:
            return
        if c == 0:
            sent.collected[_name(node)] = target.clone()
            return
        total = sent.collected[_name(node)].add_(target)  # in all but one round a token's sum is 0
        if c == last:
            target.copy_(total)
            del sent.collected[_name(node)]

    def _come(self, route: tuple[Hop, ...], rows: torch.Tensor, out: torch.Tensor) -> None:
        (returned,) = self.room.take("first", route[0].most, (rows,))
        if len(route) == 1:
            partial = self.room.take("partial", len(out), (rows,))[0] if route[0].nodes > 1 else None
            route[0].come(rows, returned, out, partial, self._add)
            return
        (middle,) = self.room.take("middle", route[1].limit, (rows,))
        (inner,) = self.room.take("second", route[1].most, (rows,))
        if self._unpermute is None:  # which is bound once, to all rows
            middle = middle[: route[0].received]
        route[1].come(rows, inner, middle, None, self._add)
        route[0].come(middle, returned, out, None, self._add)

    @property
    def _add(self) -> AddUp:
        return add_up if self._unpermute is None else self._add_by_target

    def _add_by_target(self, rows: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        if rows.dtype not in (torch.bfloat16, torch.float32):
            add_up(rows, index, out)
            return
        key = (rows.dtype, rows.data_ptr(), index.data_ptr(), out.data_ptr(), *out.shape)
        if key not in self._sums:
            assert self._unpermute is not None
            self._sums[key] = self._unpermute.prepare((rows, index, index), (out,))
        self._sums[key]()


class Dispatch:
    """The prepared call of a `dispatch`. `start` counts and begins to tell the ranks; calling it does the rest, after
    `start` if that was not called. Between the two the host is free to queue other work."""

    def __init__(self, exchange: Exchange, node: Node, inputs: Tensors, outputs: Tensors) -> None:
        self._exchange, self._node = exchange, node
        self._inputs, self._outputs = inputs, outputs
        self._sent = exchange._of(outputs[3], outputs[0])
        self._counts = Counts(exchange.world.experts, exchange.nodes, _experts(node))
        self._hit: torch.Tensor | None = None

    def start(self) -> None:
        """Compute the routes, and begin to gather everyone's counts."""
        exchange, sent = self._exchange, self._sent
        _reset(sent)
        each = _experts(self._node) // exchange.ranks
        hit = self._hit = hits(self._choices.div(each, rounding_mode="floor"), exchange.ranks)
        place = self._lay(sent.routes[0], hit)
        self._outputs[3].view(sent.tokens, exchange.ranks).copy_(place.t())
        self._counts.tell(hit, self._choices, 1)

    def __call__(self) -> None:
        if self._hit is None:
            self.start()
        exchange, sent, hit = self._exchange, self._sent, self._hit
        assert hit is not None
        counts = self._counts.read()
        while not exchange._fits(counts, sent, _experts(self._node)):
            rounds = 2 * counts.shape[1]
            if rounds > 2 * sent.tokens:
                raise WorkError(
                    f"{self._node.path}: one token of each rank is more than the buffers of {sent.rows} rows and "
                    f"{exchange.sorted_rows} sorted rows hold; compile with a larger --expert-headroom"
                )
            self._counts.tell(hit, self._choices, rounds)
            counts = self._counts.read()
        self._hit = None
        rounds = counts.shape[1]
        if rounds > 1:
            self._lay_rounds(hit, rounds)
        for c, route in enumerate(sent.routes):
            put(route, counts[:, c], exchange.world.ep_index, exchange.ranks, exchange.nodes)
        inputs = self._inputs
        if rounds > 1:
            inputs = sent.kept[_name(self._node)] = tuple(t.clone() for t in inputs)
        later = range(1, rounds if exchange.two_hop else 1)  # only to lay their second hops
        for c in (*later, 0):
            exchange._dispatch(sent, inputs, self._outputs[:3], self._node, c, lay=True)

    @property
    def _choices(self) -> torch.Tensor:
        """i32[tokens, k]: the experts of each token."""
        return self._inputs[1].view(self._sent.tokens, -1)

    def _lay(self, route: tuple[Hop, ...], hit: torch.Tensor) -> torch.Tensor:
        """Routes of the first hop; gives places among what goes to each rank, as the handle has them."""
        if not self._exchange.two_hop:
            return route[0].mark(hit)
        route[0].mark(by_node(hit, self._exchange.nodes))
        return places(hit)

    def _lay_rounds(self, hit: torch.Tensor, rounds: int) -> None:
        """Routes of every round, and the handle: places within the token's own round."""
        exchange, sent = self._exchange, self._sent
        with torch.inference_mode(False):
            sent.routes += [exchange._route(sent.tokens, sent.rows) for _ in range(rounds - 1)]
        turn = torch.arange(sent.tokens, device=hit.device) % rounds
        handle = self._outputs[3].view(sent.tokens, exchange.ranks).fill_(-1)
        for c, route in enumerate(sent.routes):
            mine = hit & (turn == c)
            handle.copy_(torch.where(mine.t(), self._lay(route, mine).t(), handle))


def _reset(sent: _Sent) -> None:
    del sent.routes[1:]
    sent.kept.clear()
    sent.collected.clear()


def _experts(node: Node) -> int:
    experts = node.attr("experts")
    assert isinstance(experts, int)
    return experts


def _name(node: Node) -> str:
    return node.outputs[0].name
