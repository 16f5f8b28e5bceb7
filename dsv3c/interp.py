"""Run a graph by its ops' references, on one rank or on all in lockstep: slow, plain, and the oracle for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dsv3c.ir import Graph, IRError, Node
from dsv3c.op import Registry
from dsv3c.ops.dispatch import IN_LOCKSTEP
from dsv3c.rewrite import CALL, crosses_ranks

if TYPE_CHECKING:
    import torch


def run(graph: Graph, tensors: Mapping[str, torch.Tensor], registry: Registry,
        graphs: Mapping[str, Graph] | None = None) -> dict[str, torch.Tensor]:  # fmt: skip
    """Execute `graph` on `tensors` (one per parameter, by name); gives every value by name.

    `graphs` are those that `call` nodes may name. Raises IRError naming the node if a reference fails.
    """
    (known,) = run_ranks(graph, (tensors,), registry, graphs)
    return known


def run_ranks(graph: Graph, tensors: Sequence[Mapping[str, torch.Tensor]], registry: Registry,
              graphs: Mapping[str, Graph] | None = None,
              ranks_per_node: int = 8) -> list[dict[str, torch.Tensor]]:  # fmt: skip
    """Execute `graph` on all ranks in lockstep, each on its own `tensors`; gives every rank's values by name.

    An op that sends rows among n ranks does so within each n consecutive ranks, of which `ranks_per_node` share a node.
    Raises IRError naming the node if a reference fails or the ranks do not divide into such groups.
    """
    known = [{v.name: t[v.name] for v in graph.params} for t in tensors]
    for node in graph.nodes:
        arguments = [tuple(k[v.name] for v in node.inputs) for k in known]
        if node.op == CALL:
            called = (graphs or {})[str(node.attr("graph"))]
            given = [{p.name: t for p, t in zip(called.params, a, strict=True)} for a in arguments]
            inner = run_ranks(called, given, registry, graphs, ranks_per_node)
            outputs = [tuple(values[v.name] for v in called.results) for values in inner]
        else:
            try:
                outputs = _applied(node, arguments, registry, ranks_per_node)
            except (RuntimeError, IndexError, ValueError) as error:
                where = f" written at {node.line}" if node.line else ""
                raise IRError(f"{graph.name}: {node.path}: {node.op} failed: {error}{where}") from error
        for values, made in zip(known, outputs, strict=True):
            values.update((v.name, t) for v, t in zip(node.outputs, made, strict=True))
    return known


def _applied(node: Node, arguments: list[tuple[torch.Tensor, ...]], registry: Registry,
             ranks_per_node: int) -> list[tuple[torch.Tensor, ...]]:  # fmt: skip
    """The outputs of one node on every rank."""
    attrs = dict(node.attrs)
    if crosses_ranks(node) and len(arguments) > 1:
        size = attrs["ranks"]
        assert isinstance(size, int)
        if len(arguments) % size:
            raise ValueError(f"{len(arguments)} ranks do not divide into groups of {size}")
        groups = (arguments[i : i + size] for i in range(0, len(arguments), size))
        within = min(ranks_per_node, size)
        return [made for group in groups for made in IN_LOCKSTEP[node.op](group, ranks_per_node=within, **attrs)]
    results = (registry[node.op].reference(*a, **attrs) for a in arguments)
    return [r if isinstance(r, tuple) else (r,) for r in results]
