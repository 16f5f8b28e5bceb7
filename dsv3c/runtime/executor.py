"""Execute a sequence of a program: bind every value to memory once, then run a flat list of prepared calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from dsv3c import interp
from dsv3c.arena import SequenceLayout, graph_layout, sequence_layout
from dsv3c.errors import InputError
from dsv3c.ir import Graph, IRError, Layer, Node, Phase, Program, Sequence, Value
from dsv3c.op import Registry
from dsv3c.plan import Plan
from dsv3c.rewrite import crosses_ranks, shares_memory
from dsv3c.runtime.runner import Call, Memory, Prepare, Runner, Step
from dsv3c.target import Implementation, Target
from dsv3c.tensors import torch_dtype

PrepareNode: TypeAlias = Callable[[Node, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], Call]


@dataclass(frozen=True)
class Engine:
    """What executing needs to know: the program, how its target implements ops, and the loaded region kernels.

    `exchange` prepares what sends rows to other ranks (nodes for which `crosses_ranks` holds); one rank needs none.
    """

    program: Program
    registry: Registry
    target: Target
    kernels: Mapping[str, Prepare]
    exchange: PrepareNode | None = None

    @classmethod
    def of(cls, plan: Plan, target: Target, registry: Registry, exchange: PrepareNode | None = None,
           lent: int = 0) -> Engine:  # fmt: skip
        """The engine of a plan: its regions by its kernels, its matrix products by what it chose for each.

        `lent`: units of the device that products leave to communication beside them.

        Raises InputError if this machine cannot run the target's code.
        """
        trouble = target.trouble() if target.device is not None and target.load is not None else "it has no runtime"
        if trouble or target.load is None:
            raise InputError(f"a plan for {target.name} cannot run here: {trouble}. Or compile for --target cpu")
        regions = {g.name for g in plan.program.graphs}
        kernels = {k.op: target.load(k) for k in plan.kernels if k.op in regions}
        if target.selector is not None:
            chosen = target.selector.implementations(plan.choices, plan.kernels, lent)
            target = replace(target, implementations=chosen)
        return cls(plan.program, registry, target, kernels, exchange)

    def prepare(self, node: Node, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...],
                accumulate: bool = False) -> Call:  # fmt: skip
        """The call that executes `node` on these tensors; with `accumulate` it adds to the (only) output."""
        implementation = self.target.implementations.get(node.op)
        if accumulate and implementation is not None and implementation.accumulates:
            return implementation.prepare(inputs, outputs, accumulate=True, **dict(node.attrs))
        if not accumulate:
            return self._prepare(node, inputs, outputs)
        scratch = torch.empty_like(outputs[0])
        compute = self._prepare(node, inputs, (scratch,))

        def add() -> None:
            compute()
            outputs[0].add_(scratch)

        return add

    def _prepare(self, node: Node, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
        if node.op == "call":
            name = str(node.attr("graph"))
            if name in self.kernels:
                return self.kernels[name](inputs, outputs)
            return self._inline(self.program.graph(name), inputs, outputs)
        if crosses_ranks(node):
            if self.exchange is None:
                raise IRError(f"{node.path}: {node.op} sends rows to other ranks, and there is one")
            return self.exchange(node, inputs, outputs)
        implementation = self.target.implementations.get(node.op) or reference_implementation(self.registry, node.op)
        return implementation.prepare(inputs, outputs, **dict(node.attrs))

    def _inline(self, graph: Graph, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
        """A region without a kernel runs by the references of its ops."""
        tensors = {v.name: t for v, t in zip(graph.params, inputs, strict=True)}

        def run() -> None:
            values = interp.run(graph, tensors, self.registry)
            for v, out in zip(graph.results, outputs, strict=True):
                out.copy_(values[v.name])

        return run

    def _views(self, node: Node, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        result = self.registry[node.op].reference(*inputs, **dict(node.attrs))
        views = result if isinstance(result, tuple) else (result,)
        if any(t.untyped_storage().data_ptr() != inputs[0].untyped_storage().data_ptr() for t in views):
            raise IRError(f"{node.path}: {node.op} of strided rows is no view of them; copy them first")
        return {v.name: t for v, t in zip(node.outputs, views, strict=True)}


def _fresh(v: Value, sizes: Mapping[str, int], device: torch.device) -> torch.Tensor:
    return torch.empty(v.type.bound(sizes), dtype=torch_dtype(v.type.dtype), device=device)


def bound_sizes(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The sizes of the symbols that stand alone as a dimension of some parameter."""
    sizes: dict[str, int] = {}
    for v in graph.params:
        for dim, size in zip(v.type.shape, tensors[v.name].shape, strict=True):
            if not isinstance(dim, int) and dim.is_Symbol:
                sizes[str(dim)] = size
    return sizes


def reference_implementation(registry: Registry, op: str) -> Implementation:
    """Run an op by its reference and copy: right on every device, fast on none."""
    reference = registry[op].reference

    def prepare(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], **attrs: object) -> Call:
        def run() -> None:
            result = reference(*inputs, **attrs)
            for out, value in zip(outputs, result if isinstance(result, tuple) else (result,), strict=True):
                out.copy_(value)

        return run

    return Implementation(op, prepare)


@dataclass(frozen=True)
class Blocks:
    """The memory of a bound sequence: what layers hand on lies in `spans`, what stays inside a graph in the workspace
    of the layer's phase. Phases that run at the same time need workspaces of their own.

    `spans`: blocks, each with the offset of its first byte in the sequence's layout, ascending.
    """

    spans: tuple[tuple[int, Memory], ...]
    workspace: Mapping[Phase, Memory]

    def slot(self, offset: int, v: Value, sizes: Mapping[str, int]) -> torch.Tensor:
        """The tensor of type `v.type` at `offset` of the layout."""
        begin, memory = next(span for span in reversed(self.spans) if span[0] <= offset)
        return memory.tensor(offset - begin, v, sizes)

    @classmethod
    def allocate(cls, layout: SequenceLayout, device: str) -> Blocks:
        """One block for both; all phases share the workspace."""
        whole = Memory.allocate(layout.bytes, device)
        behind = Memory(whole.block[layout.peak :])
        return cls(((0, whole),), dict.fromkeys(Phase, behind))


@dataclass(frozen=True)
class Room:
    """Where to bind a sequence, planned elsewhere: its layout, memory, and tensors for gradients that a node cannot
    add to the weight's own. Gradients are then only ever added to."""

    layout: SequenceLayout
    blocks: Blocks
    parts: Mapping[str, torch.Tensor]


def prepare_sequence(engine: Engine, sequence: Sequence, sizes: Mapping[str, int],
                     tensors: Mapping[str, torch.Tensor],
                     gradients: Mapping[str, torch.Tensor] | None = None, taps: Iterable[str] = (),
                     room: Room | None = None) -> Runner:  # fmt: skip
    """Bind `sequence` to memory.

    `tensors`: its inputs and all weights, by name. `gradients`: for each weight the tensor that its gradient is
    written to (needed if the sequence has gradients). `taps`: names of values inside graphs whose tensor is copied
    each time to `Runner.taps["LAYER:NAME"]`. `room`: where to bind it instead of in newly allocated memory.
    """
    gradients = gradients or {}
    sinks = gradients_in_place(engine, sequence, gradients)
    if room is None:
        layout = sequence_layout(engine.program, sequence, engine.registry, sizes, outside=lambda n: n in sinks)
        room = Room(layout, Blocks.allocate(layout, str(next(iter(tensors.values())).device)), {})
        written: set[str] = set()
    else:
        layout, written = room.layout, set(gradients)
    runner = Runner(layout=layout)
    runner.values = {name: tensors[name] for name in sequence.inputs if name in tensors}
    binder = _Binder(engine, room, sizes, dict(tensors), sinks, frozenset(taps), runner)
    offsets = {s.name: s.offset for s in layout.slots}
    parts = {name: weight for name, weight in sequence.gradients if name not in sinks}
    for layer in sequence.layers:
        binder.layer(layer, offsets, written)
        for name in layer.outputs:
            if name in parts:
                _add_part(runner, binder.tensors[name], gradients[parts[name]], parts[name] in written, layer, engine)
                written.add(parts[name])
    runner.values = binder.tensors
    return runner.finish()


def _add_part(runner: Runner, part: torch.Tensor, total: torch.Tensor, add: bool, layer: Layer, engine: Engine) -> None:
    """A gradient that could not be written in place is copied or added to the weight's gradient."""
    nodes = engine.program.graph(layer.graph).nodes
    at = (layer.name, nodes[-1], layer.phase, len(nodes) - 1)
    runner.first.append(Step((lambda: total.add_(part)) if add else (lambda: total.copy_(part)), *at))  # type: ignore[arg-type]
    runner.again.append(Step(lambda: total.add_(part), *at))  # type: ignore[arg-type]


def gradients_in_place(
    engine: Engine, sequence: Sequence, gradients: Mapping[str, torch.Tensor]
) -> dict[str, tuple[str, torch.Tensor]]:
    """Gradient values that a node can write straight into the weight's gradient: value -> (weight, tensor)."""
    weights = dict(sequence.gradients)
    sinks: dict[str, tuple[str, torch.Tensor]] = {}
    for layer in sequence.layers:
        graph = engine.program.graph(layer.graph)
        for v, name in zip(graph.results, layer.outputs, strict=True):
            if name not in weights:
                continue
            target, producer = gradients[weights[name]], graph.producers.get(v.name)
            if producer is None or shares_memory(producer, engine.registry) or producer.op == "call":
                continue
            whole = graph.results.count(v) == 1 and not graph.users[v.name] and len(producer.outputs) == 1
            if whole and torch_dtype(v.type.dtype) == target.dtype and v.type.shape == tuple(target.shape):
                sinks[name] = (weights[name], target)
    return sinks


Place: TypeAlias = tuple[str, Node, Phase, int]
"""The layer, the node, the layer's phase, and which of its graph's nodes this is."""


@dataclass
class _Binder:
    engine: Engine
    room: Room
    sizes: Mapping[str, int]
    tensors: dict[str, torch.Tensor]
    sinks: Mapping[str, tuple[str, torch.Tensor]]
    taps: frozenset[str]
    runner: Runner

    def layer(self, layer: Layer, offsets: Mapping[str, int], written: set[str]) -> None:
        """Prepare every node of one layer and bind its outputs."""
        graph = self.engine.program.graph(layer.graph)
        inner, blocks = self.room.layout.graphs[graph.name], self.room.blocks
        local = {v.name: self.tensors[n] for v, n in zip(graph.params, layer.inputs + layer.weights, strict=True)}
        slots = {s.name: s.offset for s in inner.slots}
        workspace = blocks.workspace[layer.phase]
        sinks: dict[str, tuple[str, torch.Tensor]] = {}
        escaping: dict[str, int] = {}
        parts: dict[str, torch.Tensor] = {}
        for v, name in zip(graph.results, layer.outputs, strict=True):
            if name in self.sinks:
                sinks[v.name] = self.sinks[name]
            elif name in self.room.parts:
                parts[inner.roots[v.name]] = self.room.parts[name]
            elif inner.roots[v.name] not in local:
                escaping[inner.roots[v.name]] = offsets[self.room.layout.roots[name]]

        def place(v: Value) -> torch.Tensor:
            root = inner.roots[v.name]
            if root in slots:
                return workspace.tensor(slots[root], v, self.sizes)
            if root in escaping:
                return blocks.slot(escaping[root], v, self.sizes)
            return parts[root] if root in parts else local[root]

        for index, node in enumerate(graph.nodes):
            at = (layer.name, node, layer.phase, index)
            inputs = tuple(local[v.name] for v in node.inputs)
            if shares_memory(node, self.engine.registry):
                local.update(self.engine._views(node, inputs))
            elif len(node.outputs) == 1 and node.output.name in sinks:
                self._sink(at, inputs, sinks[node.output.name], written)
                local[node.output.name] = sinks[node.output.name][1]
            else:
                outputs = tuple(map(place, node.outputs))
                local.update((v.name, t) for v, t in zip(node.outputs, outputs, strict=True))
                step = Step(self.engine.prepare(node, inputs, outputs), *at, outputs)
                self.runner.first.append(step)
                self.runner.again.append(step)
            for v in node.outputs:
                if v.name in self.taps:
                    self._tap(at, v, local[v.name])
        self.runner.bindings[layer.name, layer.phase] = local
        for v, name in zip(graph.results, layer.outputs, strict=True):
            self.tensors[name] = local[v.name]

    def _sink(self, at: Place, inputs: tuple[torch.Tensor, ...], sink: tuple[str, torch.Tensor],
              written: set[str]) -> None:  # fmt: skip
        weight, target = sink
        node = at[1]
        add = Step(self.engine.prepare(node, inputs, (target,), accumulate=True), *at, (target,))
        first = add if weight in written else Step(self.engine.prepare(node, inputs, (target,)), *at, (target,))
        written.add(weight)
        self.runner.first.append(first)
        self.runner.again.append(add)

    def _tap(self, at: Place, v: Value, tensor: torch.Tensor) -> None:
        copy = torch.empty_like(tensor)
        self.runner.taps[f"{at[0]}:{v.name}"] = copy
        step = Step(lambda: copy.copy_(tensor), *at)  # type: ignore[arg-type]
        self.runner.first.append(step)
        self.runner.again.append(step)


def prepare_graph(engine: Engine, name: str, tensors: Mapping[str, torch.Tensor],
                  results: Mapping[str, torch.Tensor] | None = None) -> Runner:  # fmt: skip
    """Bind one graph by itself: `tensors` for its parameters, and for results that are to lie in given tensors (they
    may be the parameters' own where the op allows it)."""
    graph = engine.program.graph(name)
    given = dict(results or {})
    sizes = bound_sizes(graph, tensors)
    inner = graph_layout(graph, engine.registry, sizes)
    device = next(iter(tensors.values())).device
    memory = Memory.allocate(inner.peak, str(device))
    slots = {s.name: s.offset for s in inner.slots}
    local = dict(tensors)
    runner = Runner()
    for node in graph.nodes:
        inputs = tuple(local[v.name] for v in node.inputs)
        if shares_memory(node, engine.registry):
            local.update(engine._views(node, inputs))
            continue
        outputs = []
        for v in node.outputs:
            root = inner.roots[v.name]
            if v.name in given:
                outputs.append(given[v.name])
            elif root in slots:
                outputs.append(memory.tensor(slots[root], v, sizes))
            else:
                outputs.append(_fresh(v, sizes, device))
        local.update((v.name, t) for v, t in zip(node.outputs, outputs, strict=True))
        step = Step(engine.prepare(node, inputs, tuple(outputs)), name, node)
        runner.first.append(step)
        runner.again.append(step)
    runner.values = {v.name: local[v.name] for v in graph.results}
    return runner.finish()
