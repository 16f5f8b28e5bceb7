"""The stages that a rank holds, bound to memory: a set of chunks for each, and workspaces that all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from dsv3c.errors import WorkError
from dsv3c.ir import IRError, Phase, Program, Type
from dsv3c.runtime.executor import Blocks, Engine, prepare_sequence, stage_layout, workspace_bytes
from dsv3c.runtime.runner import Call, Memory
from dsv3c.segments import Segment, segments
from dsv3c.stages import stage_name
from dsv3c.tensors import torch_dtype


@dataclass(frozen=True)
class Part:
    """Prepared calls of one segment of a layer: computation, or communication among the ranks of an expert group.

    `kind`: the layer's graph before it was cut into phases.
    """

    layer: str
    kind: str
    phase: Phase
    name: str
    comm: bool
    calls: tuple[Call, ...]


@dataclass
class Chunk:
    """Memory for one micro-batch on one stage, held from its F to its W.

    `parts`: the segments of its layers in the order of the stage's sequence.
    """

    values: Mapping[str, torch.Tensor]
    parts: tuple[Part, ...]


class Stage:
    """One stage: its free chunks, and those that hold a micro-batch."""

    def __init__(self, index: int, chunks: Iterable[Chunk]) -> None:
        self.index = index
        self._free = list(chunks)
        self._held: dict[int, Chunk] = {}

    @property
    def free(self) -> bool:
        """Whether another micro-batch can begin."""
        return bool(self._free)

    def take(self, micro_batch: int) -> Chunk:
        """A free chunk for `micro_batch`."""
        if not self._free:
            raise WorkError(f"stage {self.index} has no chunk left for micro-batch {micro_batch}; compile again")
        chunk = self._held[micro_batch] = self._free.pop()
        return chunk

    def chunk(self, micro_batch: int) -> Chunk:
        """The chunk that holds `micro_batch`."""
        return self._held[micro_batch]

    def release(self, micro_batch: int) -> None:
        self._free.append(self._held.pop(micro_batch))


def bind_stages(engine: Engine, chunks: Mapping[int, int], sizes: Mapping[str, int],
                tensors: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor],
                losses: Mapping[str, float], device: str) -> dict[int, Stage]:  # fmt: skip
    """Every stage of `chunks` (stage -> how many micro-batches it holds at once), bound to memory.

    `tensors`: weights and what the prologue makes, by name; `losses`: the weight of each loss in the gradient.
    """
    program, registry = engine.program, engine.registry
    sequences = {k: program.sequence(stage_name(k)) for k in chunks}
    needs = dict.fromkeys(Phase, 0)
    layouts = {}
    for k, sequence in sequences.items():
        layouts[k] = stage_layout(engine, sequence, sizes, gradients)
        for phase, size in workspace_bytes(program, sequence, layouts[k]).items():
            needs[phase] = max(needs[phase], size)
    workspace = {phase: Memory.allocate(size, device) for phase, size in needs.items()}
    bound: dict[int, Stage] = {}
    for k, sequence in sequences.items():
        made = []
        for _ in range(chunks[k]):
            given = _inputs(program, k, sizes, losses, device, tensors) | dict(tensors)
            blocks = Blocks(Memory.allocate(layouts[k].peak, device), workspace)
            runner = prepare_sequence(engine, sequence, sizes, given, gradients, blocks=blocks)
            parts: list[Part] = []
            steps = iter(runner.again)
            taken = next(steps, None)
            for layer in sequence.layers:
                graph = program.graph(layer.graph)
                kind = layer.graph.removesuffix(f"_{layer.phase.value}")
                for segment in _in_order(segments(graph, registry)):
                    calls = []
                    while taken is not None and taken.layer == layer.name and taken.phase is layer.phase \
                            and taken.index <= segment.nodes[-1]:  # fmt: skip
                        calls.append(taken.call)
                        taken = next(steps, None)
                    parts.append(Part(layer.name, kind, layer.phase, segment.name, segment.comm, tuple(calls)))
            assert taken is None
            made.append(Chunk(runner.values, tuple(parts)))
        bound[k] = Stage(k, made)
    return bound


def _in_order(found: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """The segments of a graph whose nodes stand in their order; all in one if they do not and nothing communicates."""
    nodes = [i for s in found for i in s.nodes]
    if nodes == sorted(nodes):
        return found
    if any(s.comm for s in found):
        raise IRError("the nodes of a layer that communicates do not stand in the order of its segments")
    return (Segment(found[0].name, False, tuple(sorted(nodes))),)


def _inputs(program: Program, stage: int, sizes: Mapping[str, int], losses: Mapping[str, float],
            device: str, known: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # fmt: skip
    """Tensors for what a stage is given and is not `known`: tokens, weights of its losses, values of other stages."""
    types: dict[str, Type] = {}
    for other in program.sequences:  # a stage without layers hands on what others made
        for layer in other.layers:
            graph = program.graph(layer.graph)
            types |= {name: v.type for v, name in zip(graph.inputs, layer.inputs, strict=True)}
            types |= {name: v.type for v, name in zip(graph.results, layer.outputs, strict=True)}
    made = {}
    for name in program.sequence(stage_name(stage)).inputs:
        if name in known:
            continue
        made[name] = torch.zeros(types[name].bound(sizes), dtype=torch_dtype(types[name].dtype), device=device)
        if name.startswith("d:") and name[2:] in losses:
            made[name].fill_(losses[name[2:]])
    return made


__all__ = ["Chunk", "Part", "Stage", "bind_stages"]
