"""The rules every graph and program keeps; an error shows the message, the node among its neighbours, the source."""

from __future__ import annotations

import keyword
from collections.abc import Mapping

from dsv3c.ir import Attr, Graph, IRError, Node, Program, Type, Value
from dsv3c.op import Registry

NEIGHBOURS = 4


def node_types(node_op: str, inputs: tuple[Type, ...], node: Node, registry: Registry,
               graphs: Mapping[str, Graph]) -> tuple[Type, ...]:  # fmt: skip
    """Output types of a node: by its op's rule, or for `call` by the called graph.

    Raises IRError with the bare reason.
    """
    if node_op != "call":
        return registry[node_op].infer_types(inputs, node.attrs)
    name = dict(node.attrs).get("graph")
    if not isinstance(name, str) or name not in graphs:
        raise IRError(f"call of the unknown graph {name!r}")
    called = graphs[name]
    expected = tuple(v.type for v in called.params)
    if inputs != expected:
        raise IRError(f"{name} takes ({_types(expected)}), got ({_types(inputs)})")
    return tuple(v.type for v in called.results)


def verify(graph: Graph, registry: Registry, graphs: Mapping[str, Graph] | None = None) -> None:
    """Check one graph: each value defined once and before use, each type as its op infers it.

    Raises IRError.
    """
    graphs = graphs or {}
    known: dict[str, Value] = {}
    for name in (graph.name, *(v.name for v in graph.values())):
        if not name.isidentifier() or keyword.iskeyword(name):
            raise IRError(f"{graph.name}: '{name}' cannot be a name; use letters, digits and _, and no Python keyword")
    for v in graph.params:
        if v.name in known:
            raise IRError(f"{graph.name}: the parameter '{v.name}' is declared twice")
        known[v.name] = v
    for index, node in enumerate(graph.nodes):
        for v in node.inputs:
            if v.name not in known:
                raise node_error(graph, index, f"'{v.name}' is not defined before this node")
            if v is not known[v.name] and v.type != known[v.name].type:
                raise node_error(graph, index, f"'{v.name}' is used as {v.type} but defined as {known[v.name].type}")
        try:
            types = node_types(node.op, tuple(v.type for v in node.inputs), node, registry, graphs)
        except IRError as error:
            raise node_error(graph, index, str(error)) from None
        if len(types) != len(node.outputs):
            raise node_error(graph, index, f"{node.op} has {len(types)} results, {len(node.outputs)} are named")
        for v, inferred in zip(node.outputs, types, strict=True):
            if v.name in known:
                raise node_error(graph, index, f"'{v.name}' is defined twice")
            if v.type != inferred:
                raise node_error(graph, index, f"'{v.name}' is declared as {v.type} but {node.op} gives {inferred}")
            known[v.name] = v
    for v in graph.results:
        if v.name not in known:
            raise IRError(f"{graph.name}: the result '{v.name}' is not defined")
        if known[v.name].type != v.type:
            raise IRError(f"{graph.name}: the result '{v.name}' is {known[v.name].type}, not {v.type}")


def verify_program(program: Program, registry: Registry, before: Program | None = None) -> None:
    """Check a program: its graphs (only those that are not the same object in `before`) and its sequences.

    Raises IRError.
    """
    graphs = {g.name: g for g in program.graphs}
    if len(graphs) != len(program.graphs):
        raise IRError(f"{program.name}: two graphs have the same name")
    if len({w.name for w in program.weights}) != len(program.weights):
        raise IRError(f"{program.name}: two weights have the same name")
    old = {id(g) for g in before.graphs} if before else set()
    for graph in program.graphs:
        if id(graph) not in old:
            verify(graph, registry, graphs)
    weights = {w.name: w for w in program.weights}
    for sequence in program.sequences:
        known: dict[str, Type | None] = dict.fromkeys(sequence.inputs)
        for layer in sequence.layers:
            where = f"{program.name}: layer '{layer.name}' of '{sequence.name}'"
            if layer.graph not in graphs:
                raise IRError(f"{where} uses the unknown graph '{layer.graph}'")
            graph = graphs[layer.graph]
            counts = (len(layer.inputs), len(layer.weights), len(layer.outputs))
            expected = (len(graph.inputs), len(graph.weights), len(graph.results))
            if counts != expected:
                raise IRError(f"{where} binds {counts} inputs, weights and results, '{graph.name}' has {expected}")
            for name, v in zip(layer.inputs, graph.inputs, strict=True):
                if name not in known and name not in weights:
                    raise IRError(f"{where} reads '{name}', which no earlier layer writes")
                if name in known and (known[name] or v.type) != v.type:
                    raise IRError(f"{where} reads '{name}', which is {known[name]}, as {v.name}: {v.type}")
                if name in known:
                    known[name] = v.type
            for name, v in zip(layer.weights, graph.weights, strict=True):
                if name not in weights:
                    raise IRError(f"{where} binds the unknown weight '{name}'")
                if weights[name].type.shape != v.type.shape:
                    raise IRError(f"{where} binds {name} of shape {weights[name].type} to {v.name}: {v.type}")
            for name, v in zip(layer.outputs, graph.results, strict=True):
                if name in known:
                    raise IRError(f"{where} writes '{name}' a second time")
                known[name] = v.type
        for name in (*sequence.results, *sequence.losses):
            if name not in known:
                raise IRError(f"{program.name}: '{sequence.name}' returns '{name}', which no layer writes")


def node_error(graph: Graph, index: int, message: str) -> IRError:
    """An IRError that shows node number `index` among its neighbours and where the model wrote it."""
    node = graph.nodes[index]
    lines = [f"{graph.name}: {node.path + ': ' if node.path else ''}{node.op}: {message}"]
    for i in range(max(0, index - NEIGHBOURS), min(len(graph.nodes), index + NEIGHBOURS + 1)):
        lines.append(f"  {'>' if i == index else ' '} {show_node(graph.nodes[i])}")
    if node.line:
        lines.append(f"  written at {node.line}")
    return IRError("\n".join(lines))


def show_node(node: Node) -> str:
    """One node as text, without its types."""
    arguments = [v.name for v in node.inputs] + [f"{k}={_literal(v)}" for k, v in node.attrs]
    return f"{', '.join(v.name for v in node.outputs)} = {node.op}({', '.join(arguments)})"


def _literal(value: Attr) -> str:
    """`value` as Python reads it back; infinity has no literal of its own."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' * (len(value) == 1)})"
    return repr(value).replace("inf", "1e999") if isinstance(value, float) else repr(value)


def _types(types: tuple[Type, ...]) -> str:
    return ", ".join(map(str, types))
