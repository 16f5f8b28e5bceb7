"""The model's state on one of many ranks: whole gradients of the stages held here, masters and moments of a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv3c.ir import DType, Program
from dsv3c.job import LANE, Mesh
from dsv3c.layout import STATE, FlatGroup, Span, flat_groups, ranks_of
from dsv3c.models.checkpoint import Part, part_shape
from dsv3c.runtime.checkpoint_files import Contents, Piece, Stored, code_of
from dsv3c.runtime.collectives import Group as Members
from dsv3c.runtime.collectives import exchange_shards, gather_shards
from dsv3c.runtime.hf import load_parts
from dsv3c.runtime.peers import ALONE, Peers, together
from dsv3c.runtime.weights import BIAS, GROUPS, KINDS, MASTER, Group, draw
from dsv3c.runtime.world import World
from dsv3c.stages import bound_directly, stage_count
from dsv3c.tensors import torch_dtype

Shape = tuple[int, ...]
Parts = Callable[[str, Shape], tuple[Part, ...]]


@dataclass(frozen=True)
class _Flat:
    """A flat group that this rank is a member of: the ranks that reduce it, the whole buffer, and the shard in it."""

    layout: FlatGroup
    members: Members
    whole: torch.Tensor
    own: torch.Tensor

    def view(self, span: Span) -> torch.Tensor:
        """The weight's place in the whole buffer."""
        return self.whole.view(-1)[span.offset : span.offset + span.size].view(span.shape)

    @property
    def begin(self) -> int:
        """The number of the whole buffer that the shard begins with."""
        return self.members.index * self.own.numel()

    def owned(self) -> Iterator[tuple[Span, int, int]]:
        """Weights of which some numbers lie in the shard: those from `start` to `stop` of the flattened weight."""
        for span in self.layout.weights:
            start = max(span.offset, self.begin) - span.offset
            stop = min(span.offset + span.size, self.begin + self.own.numel()) - span.offset
            if start < stop:
                yield span, start, stop


class RankWeights:
    """What one rank holds of the weights, in flat groups as `dsv3c.layout` divides them (ZeRO-1).

    `tensors`: by name, whole weights that layers of this rank bind, and router biases. `groups`: for each flat group
    its shard: master, gradient, moments. Beside the shards there is one whole buffer per group. In it weights are
    gathered before the prologue; then gradients are added up in it, and reduced into the shard. So a step is:

        gather, prologue on `gathered()`, copy_bound, zero_gradients, micro-batches into `gradients()`, reduce,
        Epilogue.squares, add_ranks, Epilogue.update, Epilogue.update_bias with loads of all ranks

    `holders_of` gives the pipeline ranks that hold a stage. Experts have the types of one rank's. All ranks make this
    together, since process groups are made.
    """

    def __init__(self, program: Program, holders_of: Callable[[int], tuple[int, ...]], world: World) -> None:
        self.program, self.world, self.mesh = program, world, world.mesh
        self.device = str(world.device)
        self.groups: dict[str, Group] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self._layout = sorted(flat_groups(program, holders_of, self.mesh), key=lambda g: GROUPS.index(g.optimizer))
        self._flats: list[_Flat] = []
        for layout in self._layout:
            members = world.group(ranks_of(layout, self.mesh, world.rank))
            if world.pp_index in layout.holders:
                self._allocate(layout, members)
        self._spans = {s.name: (flat, s) for flat in self._flats for s in flat.layout.weights}
        held = _holders(program, holders_of)
        self._biases = {w.name: held[w.name] for w in program.weights if w.name in held and w.group == STATE}
        self._all = world.group(tuple(range(world.size)))
        stages = [k for k in range(max(1, stage_count(program))) if world.pp_index in holders_of(k)]
        for name in _bound(program, stages):
            kind = program.weight(name).type
            self.tensors[name] = torch.zeros(kind.bound({}), dtype=torch_dtype(kind.dtype), device=self.device)

    def _allocate(self, layout: FlatGroup, members: Members) -> None:
        whole = torch.zeros(layout.rows, LANE, dtype=torch_dtype(self.wide), device=self.device)
        rows = layout.rows // members.size
        own = whole[members.index * rows : (members.index + 1) * rows]
        self._flats.append(_Flat(layout, members, whole, own))
        self.groups[layout.name] = Group(layout.optimizer, torch.zeros_like(own), own)

    @property
    def wide(self) -> DType:
        return self.program.weights[0].type.dtype

    # ---- a step ----------------------------------------------------------------------------------------------------

    def gather(self) -> None:
        """Fill the whole buffers with the weights of all shards; gradients in them are lost."""
        for flat in self._flats:
            gather_shards(flat.whole, self.groups[flat.layout.name].master, flat.members)

    def gathered(self) -> dict[str, torch.Tensor]:
        """Every weight held here, whole, as views of the buffers: valid from `gather` to `zero_gradients`."""
        return {name: flat.view(span) for name, (flat, span) in self._spans.items()}

    def copy_bound(self) -> None:
        """Bring `tensors` up to date with what was gathered."""
        for name, tensor in self.tensors.items():
            if name in self._spans:
                flat, span = self._spans[name]
                tensor.copy_(flat.view(span))

    def zero_gradients(self) -> None:
        for flat in self._flats:
            flat.whole.zero_()

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradient of each weight held here, views of the buffers; always added to, from `zero_gradients` on."""
        return self.gathered()

    def reduce(self, room: torch.Tensor | None = None) -> None:
        """Sum the gradients of all ranks into the shards, in order of ranks. `room`: bytes that are free meanwhile."""
        for flat in self._flats:
            exchange_shards(flat.whole, flat.own, flat.members, room=room)

    def add_ranks(self, squares: torch.Tensor) -> None:
        """Replace one number by its sum over all ranks: the squares of this rank's shards by those of all gradients."""
        every = torch.empty(self.world.size, dtype=squares.dtype, device=squares.device)
        gather_shards(every, squares.view(1), self._all)
        squares.copy_(every.double().sum())

    def start_optimizer(self) -> None:
        """Allocate the moments, zero: BF16 (report, section 3.3.3), float64 in a float64 program."""
        for group in self.groups.values():
            if group.m is None:
                group.m = torch.zeros_like(group.master, dtype=self._moment)
                group.v = torch.zeros_like(group.master, dtype=self._moment)

    @property
    def _moment(self) -> torch.dtype:
        return torch.float64 if self.wide is DType.f64 else torch.bfloat16

    # ---- where weights come from -----------------------------------------------------------------------------------

    def initialize(self, seed: int, parts: Parts) -> None:
        """Fill with the initial distribution; each checkpoint tensor depends on (seed, its name) alone.

        Only weights of which this rank has a shard are drawn. Gradients are lost.
        """
        for name in self._biases:
            if name in self.tensors:
                self.tensors[name].fill_(1.0 if self.program.weight(name).init == "ones" else 0.0)
        for flat, span in self._wanted():
            w = self.program.weight(span.name)
            if w.init != "normal":
                flat.view(span).fill_(1.0 if w.init == "ones" else 0.0)
                continue
            for hf_name, target in self._hf_parts(flat, span, parts):
                draw(target, seed, hf_name, w.std)
        self._keep()

    def load_hf(self, directory: str | Path, parts: Parts, peers: Peers = ALONE) -> None:
        """Copy what this rank holds from a Hugging Face checkpoint. Gradients are lost.

        Errors as in `dsv3c.runtime.hf.load_hf`, for all tensors of the model and on every rank the same.
        """
        shapes = self._shapes() | {n: self.program.weight(n).type.bound({}) for n in self._biases}
        wanted = {p.hf_name: part_shape(shape, p.index) for n, shape in shapes.items() for p in parts(n, shape)}
        targets = {p.hf_name: self.tensors[n][p.index] for n in self._biases if n in self.tensors
                   for p in parts(n, shapes[n])}  # fmt: skip
        for flat, span in self._wanted():
            targets |= dict(self._hf_parts(flat, span, parts))
        together(peers, lambda: str(load_parts(directory, targets, wanted).tensors))
        self._keep()

    def _wanted(self) -> Iterator[tuple[_Flat, Span]]:
        for flat in self._flats:
            for span, _, _ in flat.owned():
                yield flat, span

    def _keep(self) -> None:
        """Take the shards' masters from the whole buffers."""
        for flat in self._flats:
            self.groups[flat.layout.name].master.copy_(flat.own)
            flat.whole.zero_()

    def _hf_parts(self, flat: _Flat, span: Span, parts: Parts) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors that lie in this rank's part of a weight, as views of the whole buffer."""
        view = flat.view(span)
        first = self.world.ep_index * span.shape[0] if flat.layout.expert else 0
        for part in parts(span.name, _whole_shape(flat.layout, span, self.mesh)):
            if not flat.layout.expert or self.mesh.ep == 1:
                yield part.hf_name, view[part.index]
                continue
            expert = part.index[0] if part.index else None
            if not isinstance(expert, int):
                raise ValueError(f"{part.hf_name} holds several experts; they cannot be divided among ranks")
            if first <= expert < first + span.shape[0]:
                yield part.hf_name, view[(expert - first, *part.index[1:])]

    # ---- where they go ---------------------------------------------------------------------------------------------

    def hf_tensors(self, parts: Parts) -> Iterator[tuple[str, torch.Tensor]]:
        """After `gather`: the tensors of a Hugging Face checkpoint that this rank is to write; each falls to one rank.

        Those of a flat group are dealt out to its members in turn.
        """
        for flat in self._flats:
            count = 0
            for span in flat.layout.weights:
                for hf_name, tensor in self._hf_parts(flat, span, parts):
                    if count % flat.members.size == flat.members.index:
                        yield hf_name, tensor
                    count += 1
        for name in self._first_of():
            for part in parts(name, tuple(self.tensors[name].shape)):
                yield part.hf_name, self.tensors[name][part.index]

    def _first_of(self) -> list[str]:
        """The router biases that this rank stands for: those of which it is the first holder."""
        first = self.world.dp_index == 0
        return [n for n, holders in self._biases.items() if first and self.world.pp_index == min(holders)]

    def state(self) -> Contents:
        """Everything that training changes, for checkpoints: pieces of each weight's master and moments in positions
        of the whole weight, all experts included, and router biases."""
        self.start_optimizer()
        codes = {kind: code_of(self._moment) for kind in KINDS} | {MASTER: code_of(torch_dtype(self.wide))}
        stored = {k + n: Stored(codes[k], shape) for n, shape in self._shapes().items() for k in KINDS}
        for name in self._biases:
            w = self.program.weight(name)
            stored[BIAS + name] = Stored(code_of(torch_dtype(w.type.dtype)), w.type.bound({}))
        biases = {n: Piece(BIAS + n, 0, self.tensors[n]) for n in self._biases if n in self.tensors}
        mine = self._first_of()
        copies = tuple(piece for n, piece in biases.items() if n not in mine)
        return Contents(stored, (*self._pieces(), *(biases[n] for n in mine)), copies, str(self.mesh))

    def _pieces(self) -> Iterator[Piece]:
        for flat in self._flats:
            group = self.groups[flat.layout.name]
            assert group.m is not None and group.v is not None
            for span, start, stop in flat.owned():
                base = self.world.ep_index * span.size if flat.layout.expert else 0
                local = span.offset - flat.begin
                for kind, shard in zip(KINDS, (group.master, group.m, group.v), strict=True):
                    yield Piece(kind + span.name, base + start, shard.view(-1)[local + start : local + stop])

    def _shapes(self) -> dict[str, Shape]:
        """Every trained weight of the model, on whatever rank, with all its experts."""
        return {s.name: _whole_shape(g, s, self.mesh) for g in self._layout for s in g.weights}


def _whole_shape(layout: FlatGroup, span: Span, mesh: Mesh) -> Shape:
    """The shape of a weight with the experts of all ranks."""
    return (span.shape[0] * mesh.ep, *span.shape[1:]) if layout.expert else span.shape


def _holders(program: Program, holders_of: Callable[[int], tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The pipeline ranks that hold a weight or state, ascending, by name."""
    found: dict[str, set[int]] = {}
    for stage in range(max(1, stage_count(program))):
        for name in _bound(program, (stage,)):
            found.setdefault(name, set()).update(holders_of(stage))
    return {name: tuple(sorted(ranks)) for name, ranks in found.items()}


def _bound(program: Program, stages: Iterable[int]) -> tuple[str, ...]:
    """The weights that layers of these stages read themselves; all of them if the program is not divided."""
    if not stage_count(program):
        return tuple(w.name for w in program.weights)
    return bound_directly(program, stages)


__all__ = ["RankWeights"]
