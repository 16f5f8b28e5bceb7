"""Small steps on graphs that passes are made of: who needs what, renaming, replacing, regions in and out of line."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from dsv3c.ir import Graph, IRError, Node, Value
from dsv3c.op import Effect, Registry

CALL = "call"

# ---- who needs what -----------------------------------------------------------------------------------------------


def ancestors(graph: Graph, values: Iterable[Value]) -> set[str]:
    """Names of all values that `values` are computed from, themselves included."""
    found = {v.name for v in values}
    for node in reversed(graph.nodes):
        if any(v.name in found for v in node.outputs):
            found.update(v.name for v in node.inputs)
    return found


def descendants(graph: Graph, values: Iterable[Value]) -> set[str]:
    """Names of all values computed from `values`, themselves included."""
    found = {v.name for v in values}
    for node in graph.nodes:
        if any(v.name in found for v in node.inputs):
            found.update(v.name for v in node.outputs)
    return found


def pure(node: Node, registry: Registry, graphs: Mapping[str, Graph] | None = None) -> bool:
    """Whether `node` may be removed, shared, moved and recomputed; a call may if all nodes of its graph may."""
    if node.op != CALL:
        return registry[node.op].effect is Effect.PURE
    return all(pure(n, registry, graphs) for n in _called(node, graphs or {}).nodes)


def is_view(node: Node, registry: Registry) -> bool:
    """Whether `node` only looks at its first input in another way, so that running it twice costs nothing."""
    return node.op != CALL and registry[node.op].view and pure(node, registry) and len(node.outputs) == 1


def crosses_ranks(node: Node) -> bool:
    """Whether `node` sends rows to other ranks."""
    ranks = dict(node.attrs).get("ranks", 1)
    return isinstance(ranks, int) and ranks > 1


def shares_memory(node: Node, registry: Registry) -> bool:
    """Whether the output of `node` lies in its first input's memory: views, and on one rank also what sends rows."""
    return node.op != CALL and registry[node.op].view and len(node.outputs) == 1 and not crosses_ranks(node)


def called(graph: Graph) -> tuple[str, ...]:
    """Names of the graphs that `graph` calls, each once, in order."""
    return tuple(dict.fromkeys(str(n.attr("graph")) for n in graph.nodes if n.op == CALL))


def place_of(node: Node) -> str:
    """What a note calls `node`: its path in the model, or its first value where it has none."""
    return node.path or node.outputs[0].name


def live(graph: Graph, registry: Registry, graphs: Mapping[str, Graph] | None = None) -> set[int]:
    """Indices of the nodes that the results need, and of those that have an effect with all that they need."""
    needed = {v.name for v in graph.results}
    found: set[int] = set()
    for index, node in reversed(list(enumerate(graph.nodes))):
        if any(v.name in needed for v in node.outputs) or not pure(node, registry, graphs):
            found.add(index)
            needed.update(v.name for v in node.inputs)
    return found


def keep(graph: Graph, nodes: Collection[int]) -> Graph:
    """A copy with only the nodes of these indices, in their order; the same graph if that is all of them.

    Raises IRError if what is kept or returned reads a value that is dropped.
    """
    kept = tuple(n for i, n in enumerate(graph.nodes) if i in nodes)
    if len(kept) == len(graph.nodes):
        return graph
    dropped = {v.name for i, n in enumerate(graph.nodes) if i not in nodes for v in n.outputs}
    for reader, values in (*((n.op, n.inputs) for n in kept), ("return", graph.results)):
        for v in values:
            if v.name in dropped:
                raise IRError(f"{graph.name}: {reader} reads '{v.name}', whose node is dropped")
    return graph.but(nodes=kept)


def topological(graph: Graph) -> Graph:
    """A copy in which every node stands after those it reads, otherwise in the order it had.

    The same graph if it is in order. Raises IRError if nodes need each other in a circle.
    """
    makers = {v.name: i for i, n in enumerate(graph.nodes) for v in n.outputs}
    needs = [{makers[v.name] for v in n.inputs if v.name in makers} for n in graph.nodes]
    if all(all(maker < i for maker in made) for i, made in enumerate(needs)):
        return graph
    readers: list[list[int]] = [[] for _ in graph.nodes]
    for i, made in enumerate(needs):
        for maker in made:
            readers[maker].append(i)
    missing = list(map(len, needs))
    ready = [i for i, count in enumerate(missing) if count == 0]
    order: list[int] = []
    while ready:
        order.append(heapq.heappop(ready))
        for i in readers[order[-1]]:
            missing[i] -= 1
            if missing[i] == 0:
                heapq.heappush(ready, i)
    if len(order) < len(graph.nodes):
        stuck = next(n for i, n in enumerate(graph.nodes) if missing[i])
        raise IRError(f"{graph.name}: '{stuck.op}' needs its own result, in a circle")
    return graph.but(nodes=tuple(graph.nodes[i] for i in order))


# ---- renaming and replacing ---------------------------------------------------------------------------------------


def map_values(graph: Graph, new: Callable[[Value], Value]) -> Graph:
    """A copy in which every value, defined, used or returned, is what `new` makes of it."""

    def mapped(node: Node) -> Node:
        return replace(node, inputs=tuple(map(new, node.inputs)), outputs=tuple(map(new, node.outputs)))

    return Graph(graph.name, tuple(map(new, graph.inputs)), tuple(map(new, graph.weights)),
                 tuple(map(mapped, graph.nodes)), tuple(map(new, graph.results)))  # fmt: skip


def rename(graph: Graph, names: Mapping[str, str], prefix: str = "", suffix: str = "") -> Graph:
    """A copy with values renamed as `names` says; all others get `prefix` and `suffix`.

    Raises IRError if two values would have the same name.
    """
    values: dict[str, Value] = {}
    for v in graph.values():
        name = names.get(v.name, f"{prefix}{v.name}{suffix}")
        values[v.name] = v if name == v.name else Value(name, v.type)
    owners: dict[str, str] = {}
    for old, v in values.items():
        if owners.setdefault(v.name, old) != old:
            raise IRError(f"{graph.name}: '{owners[v.name]}' and '{old}' would both be called '{v.name}'")
    return map_values(graph, lambda v: values[v.name])


def substitute(graph: Graph, by: Mapping[str, Value]) -> Graph:
    """A copy in which every use of a value named in `by`, results included, reads another value instead.

    Replacements are not themselves replaced. The values named in `by` stay defined; the caller sees to it that the
    new ones are defined before they are read.
    """

    def new(values: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(by.get(v.name, v) for v in values)

    def changed(node: Node) -> Node:
        return replace(node, inputs=new(node.inputs)) if any(v.name in by for v in node.inputs) else node

    return graph.but(nodes=tuple(map(changed, graph.nodes)), results=new(graph.results))


def fresh(taken: Collection[str], name: str) -> str:
    """`name` if it is not taken, else the first free of `name_1`, `name_2`, ..."""
    if name not in taken:
        return name
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


# ---- regions ------------------------------------------------------------------------------------------------------


def outline(graph: Graph, nodes: Collection[int], name: str) -> tuple[Graph, Graph]:
    """Move the nodes of these indices into a graph of their own, called `name`; gives it and the graph that calls it.

    The region's inputs are the values it reads from outside, weights too, in order of first use; its results those
    read outside or returned, in order of definition. Names stay. The call stands where the last of the nodes stood;
    nodes in between that need the region come after it.
    Raises IRError if the region is empty, not convex (something outside needs one of its values and makes another
    that it needs), of several phases, or of use to nobody.
    """
    chosen = [i for i in range(len(graph.nodes)) if i in nodes]
    inside = [graph.nodes[i] for i in chosen]
    if not inside:
        raise IRError(f"{graph.name}: the region '{name}' is empty")
    if len({n.phase for n in inside}) > 1:
        phases = ", ".join(sorted({n.phase.value for n in inside}))
        raise IRError(f"{graph.name}: the region '{name}' mixes the phases {phases}")
    made = {v.name: v for n in inside for v in n.outputs}
    inputs = tuple(dict.fromkeys(v for n in inside for v in n.inputs if v.name not in made))
    outside = [n for i, n in enumerate(graph.nodes) if i not in nodes]
    later = {v.name for n in _dependent(outside, set(made)) for v in n.outputs}
    for v in inputs:
        if v.name in later:
            raise IRError(
                f"{graph.name}: the region '{name}' is not convex: it reads '{v.name}', which needs its results"
            )
    read = {v.name for n in outside for v in n.inputs} | {v.name for v in graph.results}
    results = tuple(v for v in made.values() if v.name in read)
    if not results:
        raise IRError(f"{graph.name}: nothing outside reads what the region '{name}' makes")
    region = Graph(name, inputs, (), tuple(inside), results)
    call = Node(CALL, inputs, (("graph", name),), results, _common_path(inside), inside[0].phase, inside[0].line)
    placed = (call if i == chosen[-1] else n for i, n in enumerate(graph.nodes) if i == chosen[-1] or i not in nodes)
    return region, topological(graph.but(nodes=tuple(placed)))


def inline(graph: Graph, call: Node, graphs: Mapping[str, Graph]) -> Graph:
    """A copy in which `call` is replaced by the nodes of the graph it calls: the inverse of `outline`.

    Results keep the names they have in `graph`; other values of the called graph keep theirs where they are free.
    Raises IRError if `call` is not a call in `graph` of a graph in `graphs`.
    """
    position = next((i for i, n in enumerate(graph.nodes) if n is call), None)
    if position is None or call.op != CALL:
        raise IRError(f"{graph.name}: '{call.op}' is not a call in this graph")
    called = _called(call, graphs)
    new: dict[str, Value] = dict(zip((p.name for p in called.params), call.inputs, strict=True))
    instead: dict[str, Value] = {}
    for v, output in zip(called.results, call.outputs, strict=True):
        if v.name in new:
            instead[output.name] = new[v.name]
        else:
            new[v.name] = output
    taken = {v.name for v in graph.values()}
    for n in called.nodes:
        for v in n.outputs:
            if v.name not in new:
                new[v.name] = Value(fresh(taken, v.name), v.type)
                taken.add(new[v.name].name)
    body = tuple(
        replace(n, path=n.path or call.path,
                inputs=tuple(new[v.name] for v in n.inputs), outputs=tuple(new[v.name] for v in n.outputs))
        for n in called.nodes
    )  # fmt: skip
    flat = graph.but(nodes=(*graph.nodes[:position], *body, *graph.nodes[position + 1 :]))
    return substitute(flat, instead) if instead else flat


def _called(call: Node, graphs: Mapping[str, Graph]) -> Graph:
    name = call.attr("graph")
    if not isinstance(name, str) or name not in graphs:
        raise IRError(f"call of the unknown graph {name!r}")
    return graphs[name]


def _dependent(nodes: Iterable[Node], names: set[str]) -> Iterator[Node]:
    """Those of `nodes` (in order) that need values called `names`, directly or not; grows `names`."""
    for node in nodes:
        if any(v.name in names for v in node.inputs):
            names.update(v.name for v in node.outputs)
            yield node


def _common_path(nodes: Iterable[Node]) -> str:
    """The part of the model that all `nodes` belong to: what their dotted paths begin with alike."""
    common: list[str] = []
    for words in zip(*(n.path.split(".") for n in nodes), strict=False):
        if len(set(words)) > 1:
            break
        common.append(words[0])
    return ".".join(common)
