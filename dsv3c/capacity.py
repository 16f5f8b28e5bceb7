"""How many rows of experts the buffers of a rank hold: closed forms of tokens, choices, ranks and headroom."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from dsv3c.dims import bind, multiply
from dsv3c.ir import Node, Program
from dsv3c.ops.permute import padding
from dsv3c.rewrite import crosses_ranks

ROUNDED = 128
"""Capacities are multiples of this many rows, so that no tile of a product ends beyond them."""

ALIGNED = 256
"""Bytes to which a tensor on its way begins."""


def capacity(program: Program, sizes: Mapping[str, int], headroom: float = 1.0) -> dict[str, int]:
    """The size of each symbol that counts rows received from other ranks (D) or rows sorted by expert (R).

    With T tokens on a rank, k choices of E experts, n ranks, and at most m of them for one token:
    D = min(n·T, headroom·T·m), R = min(n·T·min(k, E/n), headroom·T·k) and each expert's padding, rounded up. If more
    arrive, they come in several rounds. `headroom` 1 is balanced load; `sizes` are those of the other symbols.
    """
    found: dict[str, int] = {}
    sends = {str(n.attr("rows")): n for n in _nodes(program, "dispatch") if crosses_ranks(n)}
    for name, node in sends.items():
        tokens, ranks, k, _ = _numbers(node, sizes)
        found[name] = _rounded(min(ranks * tokens, headroom * tokens * reach(program, node)))
    for sort in _nodes(program, "sort_by_expert"):
        send = sends.get(str(sort.inputs[0].type.shape[0]))
        symbol, align = dict(sort.attrs).get("rows"), sort.attr("align")
        if send is None or not symbol:
            continue
        tokens, ranks, k, experts = _numbers(send, sizes)
        local = experts // ranks
        assert isinstance(align, int)
        here = min(ranks * tokens * min(k, local), headroom * tokens * k)
        found[str(symbol)] = _rounded(here + padding(local, align))
    return found


def reach(program: Program, dispatch: Node) -> int:
    """The most ranks that a token is sent to by `dispatch`, given how many groups of experts a router keeps."""
    _, ranks, k, experts = _numbers(dispatch, None)
    each, most = experts // ranks, 0
    for node in _nodes(program, "choose_experts"):
        if node.inputs[0].type.shape[-1] == experts:
            groups, kept = (value for name, value in sorted(node.attrs) if name in ("groups", "kept"))
            assert isinstance(groups, int) and isinstance(kept, int)
            size = experts // groups
            touched = max((g * size + size - 1) // each - g * size // each + 1 for g in range(groups))
            most = max(most, kept * touched)
    return min(k, ranks, most or ranks)


def exchange_room(program: Program, sizes: Mapping[str, int], ranks: int, ranks_per_node: int) -> int:
    """Bytes for rows on their way between `ranks`, beside the tensors of the plan; `sizes` with all capacities.

    On each part of the way there is room for the rows of one exchange, the largest: those that are sent, with two
    hops also those at the rank in between and those that it passes on, and with one hop from node to node what was
    added up of one node.
    """
    parts: dict[str, int] = {}
    for node in (n for g in program.graphs for n in g.nodes if crosses_ranks(n)):
        carried = node.inputs if node.op == "dispatch" else node.inputs[:1]
        tokens, here = _tokens_and_rows(node, sizes, ranks)
        local = math.gcd(ranks, ranks_per_node)
        if 1 < local < ranks:
            crossing = min(tokens * (ranks // local), here)
            rows = {"first": crossing, "middle": crossing, "second": here}
        else:
            rows = {"first": min(tokens * ranks, here)}
            if local < ranks and node.op == "combine":
                rows["partial"] = tokens
        for part, count in rows.items():
            each = (count * bind(v.type.shape[-1], sizes) * v.type.dtype.bits // 8 for v in carried)
            parts[part] = max(parts.get(part, 0), sum(-(-n // ALIGNED) * ALIGNED for n in each))
    return sum(parts.values())


def route_bytes(dispatch: Node, sizes: Mapping[str, int], ranks: int, ranks_per_node: int) -> int:
    """Bytes of what is kept of the way of one dispatch's rows, for all that takes the same way later."""
    local = math.gcd(ranks, ranks_per_node)
    tokens, here = _tokens_and_rows(dispatch, sizes, ranks)
    if not 1 < local < ranks:
        return 4 * (min(tokens * ranks, here) + 1 + tokens * ranks)
    nodes = ranks // local
    crossing = min(tokens * nodes, here)
    return 4 * (crossing + 1 + tokens * nodes + here + 1 + crossing * local)


def _tokens_and_rows(node: Node, sizes: Mapping[str, int], ranks: int) -> tuple[int, int]:
    """Tokens of a rank, and rows that it has from others, of a node that sends rows."""
    handle = node.outputs[3] if node.op == "dispatch" else node.inputs[1]
    rows = (node.inputs if node.op == "combine" else node.outputs)[0].type.bound(sizes)[0]
    return bind(handle.type.elements, sizes) // ranks, rows


def _numbers(dispatch: Node, sizes: Mapping[str, int] | None) -> tuple[int, int, int, int]:
    """Tokens on a rank (0 without `sizes`), ranks, choices per token, experts of all ranks."""
    e, handle = dispatch.inputs[1].type, dispatch.outputs[3].type
    ranks, experts, k = dispatch.attr("ranks"), dispatch.attr("experts"), e.shape[-1]
    assert isinstance(ranks, int) and isinstance(experts, int) and isinstance(k, int)
    return 0 if sizes is None else bind(multiply(*handle.shape[:-1]), sizes), ranks, k, experts


def _rounded(rows: float) -> int:
    return -(-math.ceil(rows) // ROUNDED) * ROUNDED


def _nodes(program: Program, op: str) -> Iterator[Node]:
    return (n for g in program.graphs for n in g.nodes if n.op == op)
