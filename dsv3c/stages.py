"""Pipeline stages as sequences `stage.0`, `stage.1`, ...: what each reads from its neighbours, and which weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dsv3c.ir import Layer, Program, Sequence, Type

STAGE = "stage."
PROLOGUE = "prologue"
COTANGENT = "d:"
"""What the name of every cotangent begins with; `cut` names them so."""


def stage_name(stage: int) -> str:
    """The name of the sequence of a stage."""
    return f"{STAGE}{stage}"


def stage_count(program: Program) -> int:
    """How many stages a program is divided into; 0 if it is not."""
    return sum(s.name.startswith(STAGE) for s in program.sequences)


@dataclass(frozen=True, slots=True)
class Border:
    """What a stage exchanges with its neighbours, by name, in the order of sending.

    `received` and `cotangents_sent`: from and to the stage before it; `sent` and `cotangents_received`: to and from
    the stage after it.
    """

    received: tuple[str, ...]
    sent: tuple[str, ...]
    cotangents_received: tuple[str, ...]
    cotangents_sent: tuple[str, ...]


def borders(program: Program) -> tuple[Border, ...]:
    """The border of each stage."""
    found = []
    for stage in range(stage_count(program)):
        (forward, back), (onward, home) = received(program, stage), sent(program, stage)
        found.append(Border(forward, onward, back, home))
    return tuple(found)


def received(program: Program, stage: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a stage is sent: values by the stage before it, cotangents by the one after it; each in order of sending."""
    before, after = _neighbour(program, stage - 1), _neighbour(program, stage + 1)
    return (sent(program, stage - 1)[0] if before else ()), (sent(program, stage + 1)[1] if after else ())


def sent(program: Program, stage: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a stage sends: values to the stage after it, cotangents to the one before it."""
    results = program.sequence(stage_name(stage)).results
    before, after = _neighbour(program, stage - 1), _neighbour(program, stage + 1)
    forward = tuple(n for n in results if after and n in after.inputs and not n.startswith(COTANGENT))
    return forward, tuple(n for n in results if before and n in before.inputs and n.startswith(COTANGENT))


def value_types(program: Program) -> dict[str, Type]:
    """The type of every value that layers hand on, are given or make, by name."""
    found: dict[str, Type] = {}
    for layer in (y for s in program.sequences for y in s.layers):
        graph = program.graph(layer.graph)
        found.update((n, v.type) for n, v in zip(layer.outputs, graph.results, strict=True))
        for n, v in zip(layer.inputs, graph.inputs, strict=True):
            found.setdefault(n, v.type)
    return found


def _neighbour(program: Program, stage: int) -> Sequence | None:
    return program.sequence(stage_name(stage)) if 0 <= stage < stage_count(program) else None


def prologue_of(program: Program, stages: Iterable[int]) -> Sequence | None:
    """The part of the prologue that these stages need; None if the program has no prologue.

    Its layers keep their order; its results are what the stages read.
    """
    if not program.has_sequence(PROLOGUE):
        return None
    whole = program.sequence(PROLOGUE)
    needed = {name for s in stages for name in program.sequence(stage_name(s)).inputs}
    results = tuple(name for name in whole.results if name in needed)
    layers: list[Layer] = []
    for layer in reversed(whole.layers):
        if any(name in needed for name in layer.outputs):
            layers.append(layer)
            needed.update(layer.inputs)
    inputs = tuple(name for name in whole.inputs if any(name in y.inputs for y in layers))
    return replace(whole, inputs=inputs, layers=tuple(reversed(layers)), results=results)


def weights_of(program: Program, stages: Iterable[int]) -> tuple[str, ...]:
    """Names of the weights that these stages hold, in the program's order: those that their layers or their part of
    the prologue read, and those whose gradients they make."""
    chosen = tuple(stages)
    sequences = [program.sequence(stage_name(s)) for s in chosen]
    prologue = prologue_of(program, chosen)
    read = {name for s in (*sequences, *([prologue] if prologue else [])) for y in s.layers
            for name in (*y.inputs, *y.weights)}  # fmt: skip
    read |= {weight for s in sequences for _, weight in s.gradients}
    return tuple(w.name for w in program.weights if w.name in read)


def bound_directly(program: Program, stages: Iterable[int]) -> tuple[str, ...]:
    """Names of the weights that layers of these stages read, not only the prologue, in the program's order."""
    read = {name for s in stages for y in program.sequence(stage_name(s)).layers for name in (*y.inputs, *y.weights)}
    return tuple(w.name for w in program.weights if w.name in read)
