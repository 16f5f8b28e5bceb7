"""Run a graph by its ops' references: slow, plain, and the oracle for everything generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dsv3c.ir import Graph, IRError
from dsv3c.op import Registry

if TYPE_CHECKING:
    import torch


def run(graph: Graph, tensors: Mapping[str, torch.Tensor], registry: Registry,
        graphs: Mapping[str, Graph] | None = None) -> dict[str, torch.Tensor]:  # fmt: skip
    """Execute `graph` on `tensors` (one per parameter, by name); gives every value by name.

    `graphs` are those that `call` nodes may name. Raises IRError naming the node if a reference fails.
    """
    known = {v.name: tensors[v.name] for v in graph.params}
    for node in graph.nodes:
        arguments = tuple(known[v.name] for v in node.inputs)
        if node.op == "call":
            called = (graphs or {})[str(node.attr("graph"))]
            inner = run(called, {p.name: t for p, t in zip(called.params, arguments, strict=True)}, registry, graphs)
            outputs = tuple(inner[v.name] for v in called.results)
        else:
            try:
                result = registry[node.op].reference(*arguments, **dict(node.attrs))
            except (RuntimeError, IndexError, ValueError) as error:
                where = f" written at {node.line}" if node.line else ""
                raise IRError(f"{graph.name}: {node.path}: {node.op} failed: {error}{where}") from error
            outputs = result if isinstance(result, tuple) else (result,)
        known.update((v.name, t) for v, t in zip(node.outputs, outputs, strict=True))
    return known
