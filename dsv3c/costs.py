"""How long things take on a machine: nodes, segments and layers by what they compute, move and send.

Computation takes the longest of arithmetic and memory traffic, and the start of a kernel. An exchange in two hops takes
one after the other: between nodes, then inside one. Rows are counted as they are at balanced expert load.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from dsv3c.capacity import capacity
from dsv3c.dims import bind, multiply
from dsv3c.ir import Graph, Node, Program, Type, Value
from dsv3c.op import Registry
from dsv3c.rewrite import CALL, crosses_ranks
from dsv3c.segments import Segment, communicates
from dsv3c.target import Machine

SATURATING = 0.75
"""The share of the units that is enough to use all of the memory's bandwidth (assumed)."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens choose: `k` of `experts`, all of them in `kept` of the `groups` of consecutive experts."""

    experts: int
    k: int
    groups: int
    kept: int

    def reached(self, parts: int) -> float:
        """Of `parts` equal runs of consecutive experts, how many a token reaches in the mean at balanced load.

        Each set of kept groups is equally likely, and so is each choice of k experts in them.
        """
        size, group = self.experts // parts, self.experts // self.groups
        left = self.kept * group
        if group % size and size % group:
            missed = _without(self.experts, size, self.k)
        elif size <= group:
            missed = 1 - self.kept / self.groups * (1 - _without(left, size, self.k))
        else:
            inside = size // group
            ways = math.comb(self.groups, self.kept)
            missed = sum(
                math.comb(inside, j) * math.comb(self.groups - inside, self.kept - j) / ways
                * _without(left, j * group, self.k) for j in range(min(inside, self.kept) + 1)
            )  # fmt: skip
        return parts * (1 - missed)


def _without(all: int, marked: int, chosen: int) -> float:
    """The probability that of `all` things none of the `marked` is among the `chosen`."""
    return math.comb(all - marked, chosen) / math.comb(all, chosen) if marked <= all else 0.0


def routing_of(program: Program) -> Routing | None:
    """How the tokens of a program choose their experts, None if they have none to choose."""
    for node in (n for g in program.graphs for n in g.nodes if n.op == "choose_experts"):
        k, groups, kept = (node.attr(name) for name in ("k", "groups", "kept"))
        experts = node.inputs[0].type.shape[-1]
        if isinstance(experts, int) and isinstance(k, int) and isinstance(groups, int) and isinstance(kept, int):
            return Routing(experts, k, groups, kept)
    return None


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a rank sends by one exchange: to other nodes, and to other ranks of its own node."""

    slow: float
    fast: float


def local_ranks(ranks: int, node: int) -> int:
    """How many of a group of consecutive ranks lie on one node."""
    return math.gcd(ranks, node)


def traffic(payload: float, ranks: int, node: int, routing: Routing, two_hop: bool) -> Traffic:
    """What a rank sends for tokens of `payload` bytes in all, each going to every rank that has an expert of it.

    With two hops a token crosses to each other node once, to the same local rank there, and goes on from there. Rows
    that come back, summed on the way, take the same roads.
    """
    local = local_ranks(ranks, node)
    nodes = ranks // local
    reached = routing.reached(ranks)
    if two_hop:
        return Traffic(payload * routing.reached(nodes) * (nodes - 1) / nodes, payload * reached * (local - 1) / local)
    return Traffic(payload * reached * (ranks - local) / ranks, payload * reached * (local - 1) / ranks)


def balanced_sizes(program: Program, sizes: Mapping[str, int], routing: Routing | None) -> dict[str, int]:
    """`sizes`, and those of rows received and sorted as balanced load brings them, not as many as buffers hold."""
    found = {**sizes, **capacity(program, sizes)}
    for node in (n for g in program.graphs for n in g.nodes if n.op == "dispatch" and crosses_ranks(n)):
        ranks, tokens = node.attr("ranks"), multiply(*node.inputs[0].type.shape[:-1])
        if routing is not None and isinstance(ranks, int):
            found[str(node.attr("rows"))] = round(bind(tokens, sizes) * routing.reached(ranks))
    return found


@dataclass(frozen=True, slots=True)
class Times:
    """How long nodes take on a machine of which `lent` units belong to communication.

    `graphs` are those that nodes call, by name. `routing` and `two_hop` are needed for what communicates only.
    """

    registry: Registry
    sizes: Mapping[str, int]
    machine: Machine
    graphs: Mapping[str, Graph] = field(default_factory=dict)
    routing: Routing | None = None
    two_hop: bool = True
    lent: int = 0

    @classmethod
    def of(cls, program: Program, registry: Registry, sizes: Mapping[str, int], machine: Machine) -> Times:
        """The times of a program with all units for computation; `sizes` are those of tokens."""
        routing = routing_of(program)
        graphs = {g.name: g for g in program.graphs}
        return cls(registry, balanced_sizes(program, sizes, routing), machine, graphs, routing)

    def with_lent(self, units: int) -> Times:
        """The same with that many units for communication."""
        return replace(self, lent=units)

    @property
    def share(self) -> float:
        """The share of the units that computes."""
        return 1 - self.lent / self.machine.units

    # ---- nodes

    def seconds(self, node: Node, handed: tuple[Value, ...] = (), fused: Collection[str] = ()) -> float:
        """Time of one node that computes; a view takes none.

        Of the inputs `handed`, which row-wise producers hand over, those called `fused` are made in the same kernel:
        they are not read from memory, and if the first is among them no kernel starts.
        """
        if node.op == CALL:
            return self._called(node)
        op = self.registry[node.op]
        if op.view and not crosses_ranks(node):
            return 0.0
        cost = op.cost(self._bound(node.inputs), self._bound(node.outputs), **dict(node.attrs))
        own = max(0, bind(cost.bytes, {}) - sum(v.type.bytes(self.sizes) for v in handed))
        matrix = node.inputs[0].type.dtype if node.inputs else node.outputs[0].type.dtype
        share = min(1.0, self.share * self.machine.few_units)
        rate = self.machine.matrix_rate(matrix) * self.machine.reached(node.op, matrix.text) * share
        longest = max(bind(cost.flops, {}) / rate, self._vector(bind(cost.vector_flops, {})), self._moving(own))
        start = 0.0 if handed and handed[0].name in fused else self.machine.latency
        return longest + start + sum(self.reading(v) for v in handed if v.name not in fused)

    def reading(self, v: Value) -> float:
        """Time to read `v` from memory."""
        return self._moving(v.type.bytes(self.sizes))

    def _called(self, node: Node) -> float:
        """A region reads its operands once, or only the columns that it slices off, and writes its results."""
        region = self.graphs[str(node.attr("graph"))]
        moved = sum(v.type.bytes(self.sizes) for v in region.results)
        for v in region.params:
            readers = region.users[v.name]
            parts = sum(w.type.bytes(self.sizes) for n in readers for w in n.outputs)
            whole = v.type.bytes(self.sizes)
            moved += min(whole, parts) if all(n.op == "slice_last" for n in readers) else whole
        operations = 0
        for n in region.nodes:
            cost = self.registry[n.op].cost(self._bound(n.inputs), self._bound(n.outputs), **dict(n.attrs))
            operations += bind(cost.vector_flops, {})
        return max(self._vector(operations), self._moving(moved)) + self.machine.latency

    def _bound(self, values: Iterable[Value]) -> tuple[Type, ...]:
        return tuple(Type(v.type.dtype, v.type.bound(self.sizes)) for v in values)

    def _vector(self, operations: float) -> float:
        return operations / (self.machine.vector_flops * self.share)

    def _moving(self, moved: float) -> float:
        used = min(1.0, self.share / SATURATING)
        return moved / (self.machine.memory_bandwidth * self.machine.reached("memory") * used)

    # ---- exchanges

    def exchange(self, node: Node, units: int | None = None) -> float:
        """Time of a node that sends rows among ranks, by so many units (all that it can use if None)."""
        return self.sending(self.traffic_of(node), units)

    def carried(self, node: Node) -> tuple[float, float]:
        """Of a node that sends rows: the tokens of this rank, and the bytes of one token's row."""
        tokens = (node.outputs if node.op == "combine" else node.inputs)[0].type
        rows = node.inputs if node.op == "dispatch" else node.inputs[:1]
        count = bind(multiply(*tokens.shape[:-1]), self.sizes)
        return count, sum(bind(v.type.shape[-1], self.sizes) * v.type.dtype.bits / 8 for v in rows)

    def traffic_of(self, node: Node) -> Traffic:
        """What this rank sends by a node that sends rows, at balanced load."""
        ranks = node.attr("ranks")
        assert isinstance(ranks, int) and self.routing is not None
        tokens, row = self.carried(node)
        return traffic(tokens * row, ranks, self.machine.node, self.routing, self.two_hop)

    def sending(self, sent: Traffic, units: int | None = None) -> float:
        """Time to send so much over both links, one hop after the other but for what the machine does of both at
        once."""
        m = self.machine
        speed = 1.0 if units is None else m.exchange_share(units)
        slow = sent.slow / (m.slow_link * speed) if sent.slow else 0.0
        fast = sent.fast / (m.fast_link * speed) if sent.fast else 0.0
        latency = (m.slow_latency if slow else 0.0) + (m.fast_latency if fast else 0.0)
        together = m.hops_together if self.two_hop else 1.0
        return max(slow, fast) + (1 - together) * min(slow, fast) + latency

    # ---- what is made of nodes

    def segment(self, graph: Graph, segment: Segment) -> float:
        """Time of one segment on its own stream; an exchange is done by the lent units, if there are any."""
        nodes = [graph.nodes[i] for i in segment.nodes]
        if segment.comm:
            return sum(self.exchange(n, self.lent or None) for n in nodes)
        return sum(self.seconds(n) for n in nodes)

    def graph(self, graph: Graph) -> float:
        """Time of all nodes one after another, exchanges too."""
        units = self.lent or None
        return sum(self.exchange(n, units) if communicates(n, self.registry) else self.seconds(n) for n in graph.nodes)


def crossing(machine: Machine, moved: float, apart: bool) -> float:
    """Time to send so many bytes from one rank to one other, on another node if they are `apart`."""
    link, latency = (machine.slow_link, machine.slow_latency) if apart else (machine.fast_link, machine.fast_latency)
    return moved / link + latency if link else 0.0
