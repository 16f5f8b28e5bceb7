"""The implementation of every matrix product of a program, chosen for the sizes of its job, with notes that say why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dsv3c.capacity import capacity
from dsv3c.ir import Node, Program, Type
from dsv3c.job import Job
from dsv3c.state import Note
from dsv3c.target import Choice, Product, Target

STAGE = "select"
"""What notes of selection carry in the place of a pass."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Choices, each product once; the measured table they come from; notes, one for each product at each place."""

    choices: tuple[Choice, ...] = ()
    measured: str = ""
    notes: tuple[Note, ...] = ()


def select(program: Program, target: Target, job: Job) -> Selection:
    """Choose for every product that the program's sequences execute."""
    selector = target.selector
    if selector is None:
        if job.implementations == "auto":
            return Selection()
        reason = f"{target.name} has one implementation of each, whatever --implementations {job.implementations} asks"
        return Selection(notes=(Note(STAGE, "kept", "products", reason),))
    places: dict[Product, list[str]] = {}
    usual = {**job.sizes, **capacity(program, job.sizes)}
    for sequence, node in _executed(program):
        sizes = {**usual, "S": 1} if sequence == "decode" else usual
        for adds in (False, True) if node.op.endswith("_wgrad") else (False,):
            types = [(str(v.type.dtype), _shape(v.type, sizes)) for v in node.inputs]
            product = selector.product(node.op, types, adds)
            if product is not None and node.path not in places.setdefault(product, []):
                places[product].append(node.path)
    choices = selector.choose(sorted(places), job.implementations)
    notes = [
        Note(STAGE, "chosen", path, f"{choice.product}: {choice.reason}")
        for choice in choices
        for path in places[choice.product]
    ]
    order = {path: i for i, path in enumerate(dict.fromkeys(n.path for _, n in _executed(program)))}
    notes.sort(key=lambda note: order[note.node])
    return Selection(choices, selector.measured(), tuple(notes))


def _executed(program: Program) -> Iterator[tuple[str, Node]]:
    """Every node with the name of a sequence that executes it, once for each kind of sequence and graph."""
    seen: set[tuple[bool, str]] = set()
    for sequence in program.sequences:
        for layer in sequence.layers:
            key = (sequence.name == "decode", layer.graph)
            if key not in seen:
                seen.add(key)
                for node in program.graph(layer.graph).nodes:
                    yield sequence.name, node


def _shape(t: Type, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The concrete shape; a symbol that nothing gives a size counts as one."""
    free = {str(s): 1 for d in t.shape if not isinstance(d, int) for s in d.free_symbols}
    return t.bound({**free, **sizes})
