"""The report's segments of a layer: attention, dispatch, MLP, combine, so that a schedule can interleave two layers.

A graph is cut where it communicates. What could stand on either side of a cut goes where its path says (the shared
experts with the MLP, the router with attention), or as early as it can.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3c.ir import Graph, Node, Phase
from dsv3c.op import Effect, Registry
from dsv3c.rewrite import CALL, crosses_ranks

ATTENTION, MLP, HEAD, TAIL = "attention", "mlp", "head", "tail"

COMPUTE = {
    Phase.F: (ATTENTION, MLP, TAIL),
    Phase.B: (HEAD, MLP, ATTENTION),
    Phase.W: (MLP, ATTENTION),
}
"""The compute segments of a layer by phase; in F and B communication stands between each two."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Nodes of a graph that are executed together: `nodes` are indices, ascending.

    `comm`: whether they are exchanges among ranks (then all of them), or computation.
    """

    name: str
    comm: bool
    nodes: tuple[int, ...]


def communicates(node: Node, registry: Registry) -> bool:
    """Whether `node` exchanges data among ranks: what sends rows does only if its attribute `ranks` is above 1."""
    if node.op == CALL or registry[node.op].effect is not Effect.COMM:
        return False
    return crosses_ranks(node)


def segments(graph: Graph, registry: Registry) -> tuple[Segment, ...]:
    """The segments of an F, B or W graph in order of execution.

    Every node is in exactly one; executed in this order, each node stands after all that it reads. F: attention,
    dispatch, mlp, combine, tail. B: head, combine, mlp, dispatch, attention. W, and any layer that does not
    communicate: what it has of attention and mlp. A graph with neither is one segment, called by its first path.
    Segments without nodes are left out.
    """
    if not graph.nodes:
        return ()
    comm = [communicates(n, registry) for n in graph.nodes]
    names = _by_communication(graph, comm) if any(comm) else _by_path(graph)
    return tuple(
        Segment(name, comm[members[0]], tuple(members))
        for stage, name in enumerate(names.titles)
        if (members := [i for i, s in enumerate(names.stages) if s == stage])
    )


def arranged(graph: Graph, registry: Registry) -> Graph:
    """A copy whose nodes stand in the order of their segments; the same graph if they do."""
    order = [i for s in segments(graph, registry) for i in s.nodes]
    if order == list(range(len(order))):
        return graph
    return graph.but(nodes=tuple(graph.nodes[i] for i in order))


@dataclass(frozen=True, slots=True)
class _Stages:
    """The segment of each node as a position in `titles`."""

    stages: tuple[int, ...]
    titles: tuple[str, ...]


def _role(node: Node) -> str | None:
    """The compute segment that a path asks for; the norm before the MLP has its gradient when attention has it."""
    first, _, rest = node.path.partition(".")
    if node.path == "mlp.norm":
        return ATTENTION
    if first == "moe":
        return ATTENTION if rest.startswith("router") else MLP
    return first if first in (ATTENTION, MLP) else None


def _by_path(graph: Graph) -> _Stages:
    """Segments of a graph that does not communicate."""
    phase = graph.nodes[0].phase
    titles = [t for t in COMPUTE[phase] if t in (ATTENTION, MLP)]
    roles = [_role(n) for n in graph.nodes]
    if not any(roles):
        return _Stages((0,) * len(graph.nodes), (_title(graph),))
    wanted = [None if r is None else titles.index(r) for r in roles]
    if phase is Phase.W:
        wanted = _with_readers(graph, wanted, len(titles) - 1)
    return _Stages(_settle(graph, wanted, [False] * len(wanted), len(titles) - 1), tuple(titles))


def _with_readers(graph: Graph, wanted: list[int | None], last: int) -> list[int | None]:
    """Where nothing is wanted, what the first reader wants; what nobody reads may wait for the last inputs from B."""
    index = {n.outputs[0].name: i for i, n in enumerate(graph.nodes)}
    found: list[int] = [last] * len(wanted)
    for i in reversed(range(len(wanted))):
        readers = [found[index[n.outputs[0].name]] for v in graph.nodes[i].outputs for n in graph.users[v.name]]
        want = wanted[i]
        found[i] = min(readers, default=last) if want is None else want
    return [*found]


def _title(graph: Graph) -> str:
    return next((n.path.partition(".")[0] for n in graph.nodes if n.path), graph.name)


def _by_communication(graph: Graph, comm: list[bool]) -> _Stages:
    """Segments of a graph that communicates: even stages compute, odd ones communicate."""
    earliest = _settle(graph, [None] * len(comm), comm, None)
    last = max(earliest)
    last += last % 2
    compute = COMPUTE[graph.nodes[0].phase]
    if last != 4:
        compute = tuple(f"compute{i}" for i in range(last // 2 + 1))
    wanted = [None if c or r not in compute else 2 * compute.index(r)
              for c, r in zip(comm, map(_role, graph.nodes), strict=True)]  # fmt: skip
    stages = _settle(graph, wanted, comm, last)
    titles: list[str] = []
    for stage in range(last + 1):
        here = (n.path.rpartition(".")[2] for n, s in zip(graph.nodes, stages, strict=True) if s == stage)
        title = next(here) if stage % 2 else compute[stage // 2]
        titles.append(f"exchange{stage // 2}" if title in ("", *titles) else title)
    return _Stages(stages, tuple(titles))


def _settle(graph: Graph, wanted: list[int | None], comm: list[bool], last: int | None) -> tuple[int, ...]:
    """The stage of each node: the wanted one, or else the earliest, within what its neighbours allow.

    An exchange stands on an odd stage, and what reads it on a later one, unless that is an exchange too. Without any
    exchange all stages compute.
    """
    step = any(comm)
    maker = {v.name: i for i, n in enumerate(graph.nodes) for v in n.outputs}
    reads = [sorted({maker[v.name] for v in n.inputs if v.name in maker}) for n in graph.nodes]
    latest = [last if last is not None else 10**9] * len(comm)
    if last is not None:
        for i in reversed(range(len(comm))):
            if comm[i]:
                latest[i] = min(latest[i], latest[i] - 1 + latest[i] % 2)
            for j in reads[i]:
                same = comm[i] == comm[j] or not step
                latest[j] = min(latest[j], latest[i] - (not same))
    found: list[int] = []
    for i, want in enumerate(wanted):
        low = 1 if comm[i] else 0
        for j in reads[i]:
            low = max(low, found[j] + (step and comm[i] != comm[j]))
        found.append(low if want is None else max(low, min(want, latest[i])))
    return tuple(found)
