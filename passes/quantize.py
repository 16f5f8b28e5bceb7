"""FP8 where the report has it: Fprop, Dgrad and Wgrad in E4M3, saved activations in FP8 and E5M6, FP8 dispatch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dsv3c.build import Builder
from dsv3c.ir import DType, Graph, Node, Phase, Value
from dsv3c.op import Registry
from dsv3c.state import Pass, State, TakeNote

KEPT = {
    "embedding": "the report keeps the embedding in BF16",
    "head": "the report keeps the output head in BF16",
    "moe.router": "the report keeps the router in FP32",
    "attention.core": "the report keeps the attention core in BF16",
}
"""Parts of the model whose matrix products stay as they are (section 3.3.1)."""

PRODUCTS = {
    "linear": "linear_fp8",
    "linear_dgrad": "linear_fp8_dgrad",
    "linear_wgrad": "linear_fp8_wgrad",
    "grouped_linear": "grouped_linear_fp8",
    "grouped_linear_dgrad": "grouped_linear_fp8_dgrad",
    "grouped_linear_wgrad": "grouped_linear_fp8_wgrad",
}


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize matrix products to FP8 as in the report (section 3.3).

    Fprop, Dgrad and Wgrad of every linear and expert linear take E4M3 operands: activations and their gradients in
    1×128 tiles (128×1 along the rows for Wgrad), weights in 128×128 blocks. What backward needs of a product's input
    is its FP8 form; the input of the attention output projection is kept in E5M6, SwiGLU's inputs in FP8 with its
    output computed again. Rows are dispatched in FP8. Scales are powers of two where rows are dispatched, before the
    output projection, and for SwiGLU; `power_of_two=true` makes all of them so.
    """

    name: ClassVar[str] = "quantize"
    power_of_two: bool = False

    def run(self, state: State, note: TakeNote) -> State:
        graphs = tuple(
            _Quantizer(g, state.registry, self.power_of_two, note).graph() if _has_products(g) else g
            for g in state.program.graphs
        )
        return state.with_program(state.program.with_graphs(graphs))


def _has_products(graph: Graph) -> bool:
    return any(n.op in PRODUCTS for n in graph.nodes)


class _Quantizer:
    """Rewrites one graph.

    `tiles`: by value name, its E4M3 form in 1×128 tiles. `backward`: by value name, what B and W read instead.
    `moved`: names of rows that exist in tiles only. `merged`: by name of what is split into heads, the whole of it.
    """

    def __init__(self, graph: Graph, registry: Registry, power_of_two: bool, note: TakeNote) -> None:
        self.source, self.registry, self.note, self.power_of_two = graph, registry, note, power_of_two
        self.b = Builder.rewriting(registry, graph)
        self.name = graph.name.removesuffix("_joint")
        self.trained = any(n.phase is not Phase.F for n in graph.nodes)
        self.tiles: dict[str, tuple[Value, Value]] = {}
        self.blocks: dict[tuple[str, bool], tuple[Value, Value]] = {}
        self.backward: dict[str, Value] = {}
        self.moved: set[str] = set()
        self.merged: dict[str, Value] = {}

    def graph(self) -> Graph:
        for node in self.source.nodes:
            if node.op in PRODUCTS:
                self._product(node)
            elif node.op in ("dispatch", "dispatch_again", "permute") and self._travels(node.outputs[0]):
                self._move(node)
            else:
                self.b.append(self._reading(node))
                if self.trained and node.phase is Phase.F:
                    self._keep(node)
        return self.b.graph(self.source.results)

    # ---- products --------------------------------------------------------------------------------------------------

    def _product(self, node: Node) -> None:
        reason = self._stays(node)
        where = f"{self.name}.{node.path}"
        if reason is not None:
            self.note("kept", where, f"{node.op}: {reason}")
            self.b.append(self._reading(node))
            return
        first, second, *rest = node.inputs
        if node.op.endswith("wgrad"):
            operands = (*self._gradient_rows(first, node), *self._activation_rows(second, node), *rest)
            what = "dy and x in 128×1 tiles"
        elif node.op.endswith("dgrad"):
            operands = (*self._tiles(first, node), *self._blocks(second, True, node), *rest)
            what = "dy in 1×128 tiles, w in 128×128 blocks"
        else:
            operands = (*self._tiles(first, node), *self._blocks(second, False, node), *rest)
            what = "x in 1×128 tiles, w in 128×128 blocks"
        self.b.append(replace(node, op=PRODUCTS[node.op], inputs=operands, attrs=()))
        self.note("quantized", where, f"{node.op}: {what}, E4M3")

    def _stays(self, node: Node) -> str | None:
        """Why a product is left as it is, or None."""
        for part, reason in KEPT.items():
            if node.path == part or node.path.startswith(f"{part}."):
                return reason
        if node.inputs[0].type.dtype is not DType.bf16:
            return f"its operands are {node.inputs[0].type.dtype}, not BF16"
        return None

    def _tiles(self, x: Value, node: Node) -> tuple[Value, Value]:
        """1×128 tiles of `x`, made once, where they are first needed."""
        if x.name not in self.tiles:
            exact = self.power_of_two or node.op.startswith("dispatch") or node.path == "attention.output"
            with self.b.at(node.path, node.phase):
                source = x if node.phase is Phase.F else self.backward.get(x.name, x)
                self.tiles[x.name] = self.b.quantize_tile(source, power_of_two=exact)
        return self.tiles[x.name]

    def _blocks(self, w: Value, transposed: bool, node: Node) -> tuple[Value, Value]:
        """128×128 blocks of a weight, from its stored full precision."""
        producer = self.source.producers.get(w.name)
        master = producer.inputs[0] if producer is not None and producer.op == "cast" else w
        key = (master.name, transposed)
        if key not in self.blocks:
            plain = self._blocks(w, False, node) if transposed else None
            with self.b.at(node.path, Phase.F):
                if plain is None:
                    self.blocks[key] = self.b.quantize_block(master, power_of_two=self.power_of_two)
                else:
                    self.blocks[key] = self.b.transpose_blocks(*plain)
        return self.blocks[key]

    def _gradient_rows(self, dy: Value, node: Node) -> tuple[Value, Value]:
        """128×1 tiles of an output gradient, made in B so that W is handed FP8."""
        with self.b.at(node.path, Phase.B):
            source = self._dequantized(dy) if dy.name in self.moved else self.backward.get(dy.name, dy)
            rows: tuple[Value, Value] = self.b.quantize_rows(source, power_of_two=self.power_of_two)
        return rows

    def _activation_rows(self, x: Value, node: Node) -> tuple[Value, Value]:
        """128×1 tiles of a product's input, from the form that is saved: E5M6, recomputed SwiGLU, or its tiles."""
        saved = self.backward.get(x.name)
        with self.b.at(node.path, node.phase if saved is None else Phase.B):
            source = saved or (self._dequantized(x) if x.name in self.tiles else x)
            rows: tuple[Value, Value] = self.b.quantize_rows(source, power_of_two=self.power_of_two)
        return rows

    def _dequantized(self, x: Value) -> Value:
        value: Value = self.b.dequantize_tile(*self.tiles[x.name], dtype=str(x.type.dtype))
        return value

    # ---- rows on their way to experts ------------------------------------------------------------------------------

    def _travels(self, v: Value) -> bool:
        """Whether all who read `v` can take it in tiles."""
        users = self.source.users[v.name]
        return bool(users) and v not in self.source.results and all(self._takes(u, v) for u in users)

    def _takes(self, user: Node, v: Value) -> bool:
        if user.op in ("dispatch_again", "permute"):
            return v == user.inputs[0] and self._travels(user.outputs[0])
        return user.op in PRODUCTS and self._stays(user) is None and v in user.inputs[:2]

    def _move(self, node: Node) -> None:
        """Dispatch or permute the tiles and their scales instead of the rows."""
        q, s = self._tiles(node.inputs[0], node)
        rows = node.outputs[0]
        with self.b.at(node.path, node.phase):
            moved = self.b.fresh(f"{rows.name}_tiles", rows.type.with_dtype(DType.e4m3))
            outputs = (moved, *node.outputs[1:])
            self.b.append(replace(node, inputs=(q, *node.inputs[1:]), outputs=outputs))
            routes = (outputs[3],) if node.op == "dispatch" else node.inputs[1:]
            again = "dispatch_again" if node.op == "dispatch" else node.op
            (scales,) = self.b.emit(again, (s, *routes), out=(f"{rows.name}_scales",))
        self.tiles[rows.name] = (moved, scales)
        self.moved.add(rows.name)
        self.note("quantized", f"{self.name}.{node.path}", f"{node.op} moves E4M3 tiles and their scales")

    # ---- what backward reads ---------------------------------------------------------------------------------------

    def _reading(self, node: Node) -> Node:
        """The node; in B and W it reads the form that was saved."""
        if node.phase is Phase.F:
            return node
        return replace(node, inputs=tuple(self.backward.get(v.name, v) for v in node.inputs))

    def _keep(self, node: Node) -> None:
        """After a forward node: decide in which form backward gets its values (section 3.3.3)."""
        where = f"{self.name}.{node.path}"
        first = node.inputs[0] if node.inputs else None
        if node.op == "swiglu" and first is not None and first.type.dtype is DType.bf16:
            with self.b.at(node.path, Phase.F):
                q, s = self.b.quantize_tile(first, power_of_two=True)
            with self.b.at(node.path, Phase.B):
                self.backward[first.name] = self.b.dequantize_tile(q, s, dtype=str(first.type.dtype))
                self.backward[node.output.name] = self.b.swiglu(self.backward[first.name])
            self.note("saved", where, f"{first} in E4M3")
            self.note("recomputed", where, f"backward computes {node.output} again from it")
        elif node.op == "attention" and node.outputs[0].type.dtype is DType.bf16:
            o = node.outputs[0]
            heads = o.type.shape[-2]
            with self.b.at(node.path, Phase.F):
                packed = self.b.quantize_e5m6(self.b.merge_heads(o))
            with self.b.at(node.path, Phase.B):
                whole = self.b.dequantize_e5m6(*packed, dtype=str(o.type.dtype))
                self.backward[o.name] = self.b.split_heads(whole, heads=heads)
                self.merged[self.backward[o.name].name] = whole
            self.note("saved", where, f"{o}, the input of the output projection, in E5M6")
        elif first is not None and first.name in self.backward and (self._is_view(node) or node.op == "scale_rows"):
            again = self.backward[first.name]
            if node.op == "merge_heads" and again.name in self.merged:
                self.backward[node.output.name] = self.merged[again.name]
                return
            with self.b.at(node.path, Phase.B):
                inputs = (again, *node.inputs[1:])
                (self.backward[node.output.name],) = self.b.emit(node.op, inputs, dict(node.attrs))

    def _is_view(self, node: Node) -> bool:
        return self.registry[node.op].view and len(node.outputs) == 1
