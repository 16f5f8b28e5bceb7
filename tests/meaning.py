"""Proves that two programs mean the same: both are run by the ops' references on the same random numbers.

Three kinds of proof. A graph that kept its parameters gives the same results. A sequence gives the same results,
losses, and gradient of every weight. A graph that was differentiated or cut gives the same results and gradients.
Joint graphs beside a sequence stand for its backward pass: `cut` writes it out. Where the first program has none,
torch's autograd of the references stands in. A program divided into stages runs them one after the other, each on what
its neighbours send; one whose experts are divided runs on all ranks in lockstep, each on inputs of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dsv3c import interp
from dsv3c.ir import Graph, Layer, Phase, Program, Type
from dsv3c.ir import Sequence as Layers
from dsv3c.op import Registry
from dsv3c.passes.cut import Cut
from dsv3c.passes.differentiate import JOINT
from dsv3c.rewrite import crosses_ranks
from dsv3c.stages import sent, stage_count, stage_name
from dsv3c.state import State
from dsv3c.tensors import round_to, torch_dtype

PROLOGUE = "prologue"
DEFAULT_SIZE = 3
DEFAULT_BELOW = 2

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Draw:
    """How inputs are made: sizes of symbols, whole numbers drawn below a bound, or given outright; all by name."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    below: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)

    def tensor(self, name: str, type: Type) -> torch.Tensor:
        """A tensor that depends on `name` and `type` alone; normal numbers, or whole ones below the bound."""
        dtype = torch_dtype(type.dtype)
        short = name.rsplit(":", 1)[-1]
        if short in self.values:
            return torch.tensor(self.values[short], dtype=dtype)
        shape = type.bound({s: DEFAULT_SIZE for d in type.shape for s in _symbols(d)} | dict(self.sizes))
        seed = torch.Generator().manual_seed(zlib.crc32(f"{name} {type}".encode()))
        if not type.dtype.is_float:
            return torch.randint(self.below.get(short, DEFAULT_BELOW), shape, generator=seed).to(dtype)
        return round_to(torch.randn(shape, generator=seed, dtype=torch.float64), type.dtype).to(dtype)


def _symbols(dim: object) -> list[str]:
    return [] if isinstance(dim, int) else [s.name for s in dim.free_symbols]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Proof:
    """Runs `before` and `after`; `run` gives what was proven and raises AssertionError for what differs.

    `tolerance` is the largest relative error of any tensor, in the Euclidean norm; 0 asks for equal bits.
    """

    before: Program
    after: Program
    registry: Registry
    draw: Draw = Draw()
    tolerance: float = 0.0

    def run(self) -> tuple[str, ...]:
        """Names of all graphs and sequences of `before` that are proven; at least every graph it uses."""
        before, after = self.before, self.after
        if _has_joints(after):
            before, after = self._finished(before), self._finished(after)
        proven: list[str] = []
        ranks = max((w.parts for w in after.weights), default=1)
        for s in before.sequences:
            if after.has_sequence(s.name) and ranks > max((w.parts for w in before.weights), default=1):
                self._in_lockstep(before, s, after, after.sequence(s.name), ranks)
            elif after.has_sequence(s.name):
                self._sequence(before, s, after, after.sequence(s.name))
            elif s.name == "train" and stage_count(after):
                self._in_stages(before, s, after)
            else:
                continue
            proven.append(s.name)
        for g in self.before.graphs:
            if self._graph(g):
                proven.append(g.name)
        covered = self._covered(proven)
        left = [g.name for g in self.before.graphs if g.name not in covered]
        assert not left, f"nothing proves what became of {', '.join(left)}"
        return tuple(proven)

    def _finished(self, program: Program) -> Program:
        """The program with its backward pass written out, if it has one."""
        if not _has_joints(program) or not program.sequences:
            return program
        return Cut().run(State(program, self.registry), lambda action, node, reason: None).program

    def _covered(self, proven: Sequence[str]) -> set[str]:
        """Graphs that are proven, reached from what is proven, or used by nothing and gone."""
        program = self.before
        used = {y.graph for s in program.sequences for y in s.layers}
        reached = {g.name for g in program.graphs if g.name in proven}
        for s in program.sequences:
            if s.name in proven:
                reached |= {y.graph for y in s.layers} | {y.graph + JOINT for y in s.layers if s.losses}
        calls = {g.name: [str(n.attr("graph")) for n in g.nodes if n.op == "call"] for g in program.graphs}
        todo = sorted(reached)
        while todo:
            for name in calls.get(todo.pop(), []):
                if name not in reached:
                    reached.add(name)
                    todo.append(name)
        if not program.sequences:
            return reached
        called = {name for names in calls.values() for name in names}
        return reached | ({g.name for g in program.graphs if not self.after.has_graph(g.name)} - used - called)

    # ---- graphs -----------------------------------------------------------------------------------------------------

    def _graph(self, old: Graph) -> bool:
        """Prove what became of one graph; False if its signature changed in a way that only sequences can prove."""
        name = old.name.removesuffix(JOINT)
        versions = [self.after.graph(n) for n in (name, name + JOINT) if self.after.has_graph(n)]
        if any(crosses_ranks(n) for g in versions for n in g.nodes):
            return False
        same = False
        if self.after.has_graph(old.name) and len(self.after.graph(old.name).results) == len(old.results):
            new = self.after.graph(old.name)
            same = {(v.name, v.type) for v in new.params} == {(v.name, v.type) for v in old.params}
            if same:
                self._same_graph(old, new)
        if self.after.has_graph(name + JOINT) and not self.before.has_graph(name + JOINT):
            joint = self.after.graph(name + JOINT)
            cotangents = {f"d_{v.name}" for v in old.results}
            if [v.name for v in joint.params if v.name not in cotangents] != [v.name for v in old.params]:
                return False
            self._differentiated(old, joint)
            return True
        if old.name.endswith(JOINT) and self.after.has_graph(f"{name}_F"):
            return self._cut(old, name)
        return same

    def _inputs(self, graph: Graph) -> Tensors:
        return {v.name: self.draw.tensor(v.name, v.type) for v in graph.params}

    def _values(self, program: Program, graph: Graph, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        copies = {v.name: tensors[v.name].clone() for v in graph.params}
        return interp.run(graph, copies, self.registry, {g.name: g for g in program.graphs})

    def _same_graph(self, old: Graph, new: Graph) -> None:
        tensors = self._inputs(old)
        a, b = self._values(self.before, old, tensors), self._values(self.after, new, tensors)
        for x, y in zip(old.results, new.results, strict=True):
            self._equal(f"{old.name}: {x.name}", a[x.name], b[y.name])

    def _cut(self, joint: Graph, name: str) -> bool:
        """F, B and W one after the other against the joint graph; False if they read what neither of them makes."""
        known = self._inputs(joint)
        parts = [self.after.graph(f"{name}_{p}") for p in "FBW" if self.after.has_graph(f"{name}_{p}")]
        made = set(known)
        for part in parts:
            if not {v.name for v in part.params} <= made:
                return False
            made |= {v.name for v in part.results}
        whole = self._values(self.before, joint, known)
        primal = sum(f"d_{v.name}" in known or not v.name.startswith("d_") for v in joint.results)
        for x, y in zip(joint.results[:primal], parts[0].results[:primal], strict=True):
            assert x.name == y.name, f"{parts[0].name} returns {y.name} in the place of {x.name}"
        for part in parts:
            values = self._values(self.after, part, known)
            known |= {v.name: values[v.name] for v in part.results}
        for v in joint.results:
            assert v.name in known, f"{name}: no part of the cut graph returns {v.name}"
            self._equal(f"{name}: {v.name}", whole[v.name], known[v.name])
        return True

    def _differentiated(self, old: Graph, joint: Graph) -> None:
        """F against the graph itself, B and W against autograd of it."""
        tensors = self._inputs(joint)
        values = self._values(self.after, joint, tensors)
        count = len(old.results)
        wanted = [v for v in old.params if v.name in {r.name.removeprefix("d_") for r in joint.results[count:]}]
        assert len(wanted) == len(joint.results) - count, f"{joint.name}: results beyond the gradients of parameters"
        leaves = {v.name: tensors[v.name].clone().requires_grad_(v in wanted) for v in old.params}
        expected = interp.run(old, leaves, self.registry, {g.name: g for g in self.before.graphs})
        for x, y in zip(old.results, joint.results[:count], strict=True):
            self._equal(f"{joint.name}: {x.name}", expected[x.name], values[y.name])
        seeds = [(expected[v.name], tensors[f"d_{v.name}"]) for v in dict.fromkeys(old.results)
                 if f"d_{v.name}" in tensors]  # fmt: skip
        flowing = [(y, d) for y, d in seeds if y.requires_grad]
        gradients = torch.autograd.grad([y for y, _ in flowing], [leaves[v.name] for v in wanted],
                                        [d.to(y.dtype) for y, d in flowing], allow_unused=True)  # fmt: skip
        for v, g in zip(wanted, gradients, strict=True):
            own = values[f"d_{v.name}"]
            self._equal(f"{joint.name}: d_{v.name}", torch.zeros_like(own) if g is None else g, own)

    # ---- sequences --------------------------------------------------------------------------------------------------

    def _sequence(self, before: Program, old: Layers, after: Program, new: Layers) -> None:
        backward = bool(new.gradients)
        a = self._execute(before, old, autograd=backward and not old.gradients)
        b = self._execute(after, new)
        for name in (*old.results, *old.losses):
            assert name in b, f"{old.name}: nothing writes {name} any more"
            self._equal(f"{old.name}: {name}", a[name], b[name])
        if backward:
            mine, theirs = self._gradients(new, b), self._expected_gradients(old, a)
            assert mine.keys() == theirs.keys(), f"{old.name}: gradients of {sorted(mine.keys() ^ theirs.keys())}"
            for weight, g in theirs.items():
                self._equal(f"{old.name}: gradient of {weight}", g, mine[weight])

    def _execute(self, program: Program, sequence: Layers, autograd: bool = False, rank: str = "") -> Tensors:
        """Every value of a sequence by name, weights included; what a prologue makes is made first.

        `rank` goes before the names of inputs when they are drawn.
        """
        (known,) = self._execute_ranks(program, sequence, autograd, (rank,), program)
        return known

    def _execute_ranks(self, program: Program, sequence: Layers, autograd: bool, ranks: tuple[str, ...],
                       whole: Program) -> list[Tensors]:  # fmt: skip
        """The same on several ranks in lockstep; each has its part of the weights of `whole`."""
        known: list[Tensors] = [{} for _ in ranks]
        if program.has_sequence(PROLOGUE) and sequence.name != PROLOGUE:
            made = self._execute_ranks(program, program.sequence(PROLOGUE), False, ranks, whole)
            for k, values in zip(known, made, strict=True):
                k |= {name: values[name] for name in program.sequence(PROLOGUE).results}
        for w in program.weights:
            for i, k in enumerate(known):
                tensor = _part(self.draw.tensor(w.name, whole.weight(w.name).type), w.parts, i)
                k[w.name] = tensor.requires_grad_(autograd and w.type.dtype.is_float and w.group != "state")
        for layer in sequence.layers:
            self._layer(program, sequence, layer, known, autograd, ranks)
        return known

    def _layer(self, program: Program, sequence: Layers, layer: Layer, known: list[Tensors], autograd: bool,
               ranks: tuple[str, ...]) -> None:  # fmt: skip
        """Run one layer on all ranks; inputs that nothing made are drawn."""
        table = {g.name: g for g in program.graphs}
        graph = table[layer.graph]
        for v, name in zip(graph.inputs, layer.inputs, strict=True):
            for k, rank in zip(known, ranks, strict=True):
                if name not in k:
                    assert name in sequence.inputs, f"{sequence.name}: nothing writes {name}"
                    k[name] = torch.ones(()).to(torch_dtype(v.type.dtype)) if _is_loss_weight(name, sequence) \
                        else self.draw.tensor(rank + name, v.type)  # fmt: skip
        bound = layer.inputs + layer.weights
        arguments = [{v.name: k[n] if autograd else k[n].clone() for v, n in zip(graph.params, bound, strict=True)}
                     for k in known]  # fmt: skip
        made = interp.run_ranks(graph, arguments, self.registry, table)
        for k, values in zip(known, made, strict=True):
            k |= {name: values[v.name] for v, name in zip(graph.results, layer.outputs, strict=True)}

    # ---- many ranks -------------------------------------------------------------------------------------------------

    def _in_lockstep(self, before: Program, old: Layers, after: Program, new: Layers, ranks: int) -> None:
        """Each rank's results are those of one rank on the same inputs; the gradient of its experts is its part of the
        sum over all ranks."""
        names = tuple(f"rank{r}:" for r in range(ranks))
        many = self._execute_ranks(after, new, False, names, before)
        alone = [self._execute(before, old, bool(new.gradients) and not old.gradients, r) for r in names]
        expected = [self._expected_gradients(old, a) for a in alone] if new.gradients else []
        for r, (a, b) in enumerate(zip(alone, many, strict=True)):
            for name in (*old.results, *old.losses):
                self._equal(f"{old.name} on rank {r}: {name}", a[name], b[name])
            mine = self._gradients(new, b)
            for weight, found in mine.items():
                parts = after.weight(weight).parts
                total = torch.stack([e[weight] for e in expected]).sum(0) if parts > 1 else expected[r][weight]
                self._equal(f"{old.name} on rank {r}: gradient of {weight}", _part(total, parts, r), found)
            assert not expected or mine.keys() == expected[r].keys()

    def _in_stages(self, before: Program, old: Layers, after: Program) -> None:
        """Forward through all stages and back, each stage knowing only what its neighbours sent it."""
        a = self._execute(before, old, autograd=not old.gradients)
        count = stage_count(after)
        stages = [after.sequence(stage_name(i)) for i in range(count)]
        lasting = self._execute(after, Layers("nothing", (), (), ()))
        known = [dict(lasting) for _ in stages]
        for i, stage in enumerate(stages):
            if i:
                known[i] |= {name: known[i - 1][name] for name in sent(after, i - 1)[0]}
            for y in (y for y in stage.layers if y.phase is Phase.F):
                self._layer(after, stage, y, [known[i]], False, ("",))
        for i, stage in reversed(list(enumerate(stages))):
            if i + 1 < count:
                known[i] |= {name: known[i + 1][name] for name in sent(after, i + 1)[1]}
            for y in (y for y in stage.layers if y.phase is not Phase.F):
                self._layer(after, stage, y, [known[i]], False, ("",))
        found: Tensors = {}
        for stage, values in zip(stages, known, strict=True):
            for name in stage.results:
                assert name in values, f"{stage.name} returns {name}, which it does not have"
            for weight, g in self._gradients(stage, values).items():
                found[weight] = found[weight] + g if weight in found else g
        for name in (*old.results, *old.losses):
            (home,) = [k for s, k in zip(stages, known, strict=True) if name in s.results and name in (*s.losses, *k)]
            self._equal(f"{old.name}: {name}", a[name], home[name])
        theirs = self._expected_gradients(old, a)
        assert found.keys() == theirs.keys(), f"{old.name}: gradients of {sorted(found.keys() ^ theirs.keys())}"
        for weight, g in theirs.items():
            self._equal(f"{old.name}: gradient of {weight}", g, found[weight])

    def _gradients(self, sequence: Layers, values: Tensors) -> Tensors:
        total: Tensors = {}
        for value, weight in sequence.gradients:
            total[weight] = total[weight] + values[value] if weight in total else values[value]
        return total

    def _expected_gradients(self, old: Layers, values: Tensors) -> Tensors:
        if old.gradients:
            return self._gradients(old, values)
        used = dict.fromkeys(name for y in old.layers for name in y.weights if values[name].requires_grad)
        loss = torch.stack([values[name].double() for name in old.losses]).sum()
        found = torch.autograd.grad(loss, [values[n] for n in used], allow_unused=True)
        return {n: g for n, g in zip(used, found, strict=True) if g is not None}

    # ---- comparison -------------------------------------------------------------------------------------------------

    def _equal(self, what: str, expected: torch.Tensor, found: torch.Tensor) -> None:
        a, b = expected.detach(), found.detach()
        assert a.shape == b.shape, f"{what} has shape {list(b.shape)}, not {list(a.shape)}"
        a, b = a.to(torch.float64), b.to(torch.float64)
        if self.tolerance == 0.0 or not expected.is_floating_point():
            same = torch.equal(a.nan_to_num(nan=1e300), b.nan_to_num(nan=1e300))
            assert same, f"{what} differs by {(a - b).abs().max().item():.2e}, and equal bits are asked for"
            return
        error = (a - b).norm().item() / max(a.norm().item(), 1e-30) if not torch.equal(a, b) else 0.0
        assert error <= self.tolerance, f"{what} differs by {error:.2e}, tolerance {self.tolerance:.0e}"


def _part(tensor: torch.Tensor, parts: int, rank: int) -> torch.Tensor:
    """One rank's part of the leading axis."""
    return tensor.chunk(parts)[rank % parts].clone() if parts > 1 else tensor


def _has_joints(program: Program) -> bool:
    return any(g.name.endswith(JOINT) for g in program.graphs)


def _is_loss_weight(name: str, sequence: Layers) -> bool:
    return name.startswith("d:") and name.removeprefix("d:") in sequence.losses
