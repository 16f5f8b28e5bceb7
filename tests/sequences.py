"""Run the sequences of a program by the references of its ops, and draw what they need: the oracle of pass tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dsv3c import interp
from dsv3c.ir import DType, Program, Type
from dsv3c.ops import REGISTRY
from dsv3c.tensors import torch_dtype

Tensors = dict[str, torch.Tensor]


def execute(program: Program, name: str, given: Mapping[str, torch.Tensor]) -> Tensors:
    """Every value of the sequence `name` by name; `given` are its inputs and the program's weights.

    Where the program has a prologue, it runs first.
    """
    values = dict(given)
    if name != "prologue" and program.has_sequence("prologue"):
        values |= execute(program, "prologue", given)
    graphs = {g.name: g for g in program.graphs}
    for layer in program.sequence(name).layers:
        graph = graphs[layer.graph]
        bound = zip(graph.params, layer.inputs + layer.weights, strict=True)
        made = interp.run(graph, {v.name: values[n] for v, n in bound}, REGISTRY, graphs)
        values.update((n, made[v.name]) for v, n in zip(graph.results, layer.outputs, strict=True))
    return values


def draw(type: Type, sizes: Mapping[str, int], generator: torch.Generator, below: int = 2) -> torch.Tensor:
    """Standard normal numbers, or integers from 0 to `below` - 1."""
    shape = type.bound(sizes)
    if type.dtype in (DType.i32, DType.i64):
        return torch.randint(0, below, shape, generator=generator, dtype=torch_dtype(type.dtype))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(torch_dtype(type.dtype))


def draw_weights(program: Program, generator: torch.Generator) -> Tensors:
    """Weights: norms around one, matrices scaled so that activations stay near one, other state small."""
    found: Tensors = {}
    for w in program.weights:
        x = draw(w.type, {}, generator)
        if w.group == "norm":
            found[w.name] = 1 + x / 10
        else:
            found[w.name] = x / 10 if w.group == "state" else x / x.shape[-1] ** 0.5
    return found


def autograd(program: Program, name: str, given: Mapping[str, torch.Tensor], scales: Mapping[str, float]) -> Tensors:
    """The losses of the sequence by name, and under each weight's name its gradient by torch, through the references.

    `scales` are the weights of the losses.
    """
    trained = [w.name for w in program.weights if w.group != "state"]
    leaves = {n: given[n].clone().requires_grad_() for n in trained}
    values = execute(program, name, {**given, **leaves})
    total = torch.stack([values[n] * s for n, s in scales.items()]).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {n: values[n].detach() for n in scales}
    return found | {n: g for n, g in zip(trained, grads, strict=True) if g is not None}


def gradients(program: Program, name: str, given: Mapping[str, torch.Tensor], scales: Mapping[str, float]) -> Tensors:
    """The same by the backward layers of a cut program."""
    wide = any(t.dtype is torch.float64 for t in given.values())
    kind = torch.float64 if wide else torch.float32
    told = {f"d:{n}": torch.tensor(s, dtype=kind) for n, s in scales.items()}
    values = execute(program, name, {**given, **told})
    found = {n: values[n] for n in scales}
    for value, weight in program.sequence(name).gradients:
        found[weight] = found[weight] + values[value] if weight in found else values[value]
    return found
