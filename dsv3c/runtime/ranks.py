"""A loaded plan on one of many ranks: the same training step as on one, divided as the plan says."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist

from dsv3c.comm import CommPlan, division
from dsv3c.dims import bind
from dsv3c.errors import InputError
from dsv3c.ir import Program
from dsv3c.job import Recipe
from dsv3c.models import MODELS
from dsv3c.models.config import ModelConfig
from dsv3c.ops import REGISTRY
from dsv3c.plan import Plan
from dsv3c.runtime.actions import Actions, Border
from dsv3c.runtime.collectives import CHANNELS, LostPeerError
from dsv3c.runtime.epilogue import Epilogue
from dsv3c.runtime.exchange import Exchange
from dsv3c.runtime.executor import Engine, prepare_sequence
from dsv3c.runtime.export import write_hf_together
from dsv3c.runtime.faults import first_unusable, unusable
from dsv3c.runtime.lanes import Lanes
from dsv3c.runtime.peers import GroupPeers
from dsv3c.runtime.rank_weights import RankWeights
from dsv3c.runtime.runner import Runner
from dsv3c.runtime.session import StepResult, refuse_bad
from dsv3c.runtime.stages import Chunk, Given, Stages
from dsv3c.runtime.world import CHANNEL_CTAS, World
from dsv3c.schedule import Schedule, show_cell
from dsv3c.stages import prologue_of, stage_name
from dsv3c.target import Target
from dsv3c.targets import find
from dsv3c.tensors import torch_dtype


def connect(plan: Plan) -> World:
    """This process among the ranks of `plan`, as torchrun started them; see `World.connect`.

    Raises also what `division` raises, before any rank waits for another.
    """
    _, comm = division(plan)
    device = find(plan.target).device or "cpu"
    digest = hashlib.sha256(plan.to_bytes()).hexdigest()
    return World.connect(plan.job.mesh, plan.job.ranks_per_node, device, digest, ctas=comm.units or None)


def borders(comm: CommPlan) -> list[Border]:
    """For each stage what it receives and what it sends, forward and backward."""
    ends = [((), ()), *((tuple(n for n, _ in c.forward), tuple(n for n, _ in c.backward)) for c in comm.crossings),
            ((), ())]  # fmt: skip
    return [((before[0], after[1]), (after[0], before[1])) for before, after in itertools.pairwise(ends)]


def _exchange(program: Program, comm: CommPlan, world: World, sizes: Mapping[str, int], target: Target) -> Exchange:
    """What sends rows to experts, with the room that the sorted rows have."""
    sorts = [n for g in program.graphs for n in g.nodes if n.op == "sort_by_expert" and dict(n.attrs).get("rows")]
    rows = {bind(n.outputs[2].type.shape[0], sizes) for n in sorts}
    align = {int(str(n.attr("align"))) for n in sorts}
    return Exchange(world, comm.two_hop, min(rows, default=0), max(align, default=1),
                    target.implementations.get("unpermute"))  # fmt: skip


ONE_RANK = ("cache", "expert_choices", "forward", "generate", "gradients", "losses", "stream")
"""What a session on one rank does and one of many does not."""


class RankSession:
    """Trains one rank's part of a plan. All ranks make one together, and call its methods together.

    `weights`: a Hugging Face directory, or None to draw them from `seed`. `recording`: keep a timeline in `lanes`.
    `watch(i)` is called before `cells[i]` begins, in each step. `stop()`: whether this rank is to stop; if it says so
    on any rank before the end of a step, `stopping` is True on all of them after it.
    """

    def __init__(self, plan: Plan, world: World, weights: str | Path | None = None, seed: int = 0,
                 recording: bool = False, watch: Callable[[int], None] = lambda cell: None) -> None:  # fmt: skip
        job = plan.job
        if job.kind != "train":
            raise InputError(f"a plan of --job {job.kind} for {job.mesh.world} ranks cannot run; compile --job train")
        self.plan, self.program, self.world = plan, plan.program, world
        self.config = ModelConfig.from_dict(plan.config, where=f"the plan of {plan.model}")
        if self.program.name not in MODELS:
            raise InputError(f"{plan.model} is of the unknown family '{self.program.name}'; name its --plugin")
        self.family = MODELS[self.program.name]
        self.recipe: Recipe = job.recipe
        self.steps = 0
        self.stopping = False
        self.stop: Callable[[], bool] = lambda: False
        self.device = str(world.device)
        target = find(plan.target)
        self.schedule, self.comm = division(plan)
        self.cells = cells(self.schedule, world.pp_index)
        self._watch = watch
        held = self.schedule.held(world.pp_index)
        sizes = {"B": job.micro_batch, "S": job.seq, "C": job.seq, **dict(self.comm.rows)}
        exchange = _exchange(self.program, self.comm, world, sizes, target)
        waiting = 2 * CHANNEL_CTAS if job.mesh.pp > 1 else 0  # a cell awaits up to two messages for the next one
        self.engine = Engine.of(plan, target, REGISTRY, exchange.prepare, self.comm.units + waiting)
        self.weights = RankWeights(self.program, self.schedule.holders, world)
        if weights is None:
            self.weights.initialize(seed, self.family.parts)
        else:
            self.weights.load_hf(weights, self.family.parts, GroupPeers())
        self._epilogue = Epilogue(self.engine, self.weights, self.recipe)
        self._prologue, self._hoisted = self._bind_prologue(held)
        tensors = self.weights.tensors | self._hoisted
        share = job.micro_batch / job.global_batch
        self._losses = tuple(n for s in range(self.schedule.stages)
                             for n in self.program.sequence(stage_name(s)).losses)  # fmt: skip
        shares = {n: self._weight(n) * share for n in self._losses}
        given = Given(tensors, self.weights.gradients(), shares, sizes, self.device)
        self.stages = Stages(self.engine, self.schedule, world.pp_index, given, exchange)
        self._biases = self._routers()
        wide = torch.float64
        count = self.schedule.micro_batches * job.mesh.dp
        self._loss_table = torch.zeros(len(self._losses), count, dtype=wide, device=self.device)
        experts = self.config.n_routed_experts
        self._load_table = torch.zeros(len(self._biases), experts, dtype=wide, device=self.device)
        self.lanes = Lanes(self.device, recording)
        orders = {(p.forward, p.backward): p.steps for p in self.comm.overlap.pairs} if self.comm.overlap else {}
        self._borders = borders(self.comm)
        self._actions = Actions(
            self.schedule, world.pp_index, self.stages, self._borders, {c: world.channel(c) for c in CHANNELS},
            self.lanes, orders, self._collect, watch,
        )  # fmt: skip
        self._stale = True

    def step(self, tokens: torch.Tensor, lr: float | None = None) -> StepResult:
        """One optimizer step on tokens [global_batch, seq], the same on every rank; every rank gets the same result."""
        job = self.plan.job
        if tuple(tokens.shape) != (job.global_batch, job.seq):
            raise InputError(f"tokens are {list(tokens.shape)}; this plan takes [{job.global_batch}, {job.seq}]")
        parts = tokens.split(job.micro_batch)
        mine = [p.to(self.device) for p in parts[self.world.dp_index :: job.mesh.dp]]
        self._refresh()
        self._loss_table.zero_()
        self._load_table.zero_()
        self._actions.run(mine)
        self._watch(len(self.cells) - 2)
        self.weights.reduce(self.stages.room)
        squares = self._epilogue.squares()
        self.weights.add_ranks(squares)
        losses, loads = self._shared()
        self._watch(len(self.cells) - 1)
        norm = math.sqrt(float(squares))
        rate = self.recipe.lr if lr is None else lr
        mtp = tuple(v for n, v in losses.items() if n.startswith("loss.mtp"))
        balance = sum(v for n, v in losses.items() if n.startswith("balance"))
        by_layer = {layer: load for (layer, _), load in zip(self._biases, loads, strict=True)}
        main = losses["loss.main"]
        result = StepResult(self.steps + 1, main, mtp, balance, norm, rate, tokens.numel(), by_layer)
        refuse_bad(result, losses, lambda: self._where(mine))
        self.steps += 1
        self._epilogue.update(rate, self.steps, squares)
        for layer, bias in self._biases:
            if bias in self.weights.tensors:
                self._epilogue.update_bias(bias, by_layer[layer].to(self.device))
        self._stale = True
        return result

    def save_hf(self, directory: str | Path) -> None:
        """Write a checkpoint that transformers, vLLM and SGLang load; each rank writes what falls to it."""
        write_hf_together(directory, self.config, self.weights, self.family.parts, None, GroupPeers())
        self._stale = True

    def close(self) -> None:
        """Leave the other ranks, when all have come here."""
        self.world.close()

    def __enter__(self) -> RankSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.world.close(clean=kind is None)

    def __getattr__(self, name: str) -> NoReturn:
        if name in ONE_RANK:
            raise InputError(
                f"a plan for {self.plan.job.mesh.world} ranks only trains; save_hf, then load that on one rank for "
                f"{name}"
            )
        raise AttributeError(f"'RankSession' object has no attribute '{name}'")

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _bind_prologue(self, held: tuple[int, ...]) -> tuple[Runner | None, dict[str, torch.Tensor]]:
        """The prologue of the stages held here, on the gathered weights, and what it gives."""
        sequence = prologue_of(self.program, held)
        if sequence is None or not sequence.layers:
            return None, {}
        runner = prepare_sequence(self.engine, sequence, {}, self.weights.gathered())
        return runner, {n: runner.values[n] for n in sequence.results}

    def _refresh(self) -> None:
        """Whole weights from the shards, in the forms that layers read; then gradients start from zero."""
        if self._stale:
            self.weights.gather()
            if self._prologue is not None:
                self._prologue.run()
            self.weights.copy_bound()
        self.weights.zero_gradients()
        self._stale = False

    def _weight(self, loss: str) -> float:
        if loss.startswith("loss.mtp"):
            return self.recipe.mtp / max(1, self.config.num_nextn_predict_layers)
        return self.recipe.balance if loss.startswith("balance") else 1.0

    def _routers(self) -> tuple[tuple[str, str], ...]:
        """Every layer with a router, and its bias, in the order of stages."""
        found = []
        state = {w.name for w in self.program.weights if w.group == "state"}
        for stage in range(self.schedule.stages):
            for layer in self.program.sequence(stage_name(stage)).layers:
                if any(n.startswith("load.") for n in layer.outputs):
                    found.append((layer.name, next(n for n in layer.inputs if n in state)))
        return tuple(found)

    def _collect(self, stage: int, micro_batch: int, chunk: Chunk) -> None:
        """Keep the losses of a micro-batch and add up its loads."""
        place = micro_batch * self.plan.job.mesh.dp + self.world.dp_index
        sequence = self.program.sequence(stage_name(stage))
        for name in sequence.losses:
            self._loss_table[self._losses.index(name), place] = chunk.values[name]
        names = [layer for layer, _ in self._biases]
        for layer in sequence.layers:
            for name in layer.outputs:
                if name.startswith("load."):
                    self._load_table[names.index(layer.name)] += chunk.values[name]

    def _shared(self) -> tuple[dict[str, float], torch.Tensor]:
        """The mean of each loss and the loads [layers, E] over all ranks; micro-batches are added up in their order."""
        stop = self._loss_table.new_full((1,), float(self.stop()))
        host = torch.cat((self._loss_table.flatten(), self._load_table.flatten(), stop)).cpu()
        if self.world.size > 1:
            try:
                dist.all_reduce(host)  # every loss is there once, all others zero, and loads are whole numbers: exact
            except RuntimeError as error:
                raise LostPeerError(f"a rank stopped while rank {self.world.rank} waited for all") from error
        table, loads = host[:-1].split((self._loss_table.numel(), self._load_table.numel()))
        self.stopping = bool(host[-1])
        rows = table.view_as(self._loss_table)
        losses = {}
        for name, row in zip(self._losses, rows.tolist(), strict=True):
            total = 0.0
            for value in row:
                total += value
            losses[name] = total / len(row)
        return losses, loads.view_as(self._load_table).to(torch_dtype(self.weights.wide))

    def _where(self, mine: list[torch.Tensor]) -> str:
        """A sentence on the first value of this step that is no number, found by doing it again, on all ranks."""
        where, stages = f"on rank {self.world.rank}", self.schedule.stages
        found: list[tuple[int, str]] = []  # in the order in which they are computed
        held = first_unusable(self.weights.tensors)
        if held is not None:
            found.append((0, f"The weight {held[0]} held {held[1]} before it"))

        def look(stage: int, micro_batch: int, chunk: Chunk) -> None:
            for name in (*self.program.sequence(stage_name(stage)).losses, *self._borders[stage][1][0]):
                what = unusable(chunk.values[name])
                if what is not None:
                    found.append((1 + stage, f"The first value that is no number: {name}, which stage {stage} {where} "
                                             f"made of its micro-batch {micro_batch + 1}, holds {what}"))  # fmt: skip

        self.weights.zero_gradients()
        self._actions.on_forward = look
        try:
            self._actions.run(mine)
        finally:
            self._actions.on_forward = self._collect
        gradients = self.weights.gradients()
        for stage in self.schedule.held(self.world.pp_index):
            sequence = self.program.sequence(stage_name(stage))
            weight_of = dict(sequence.gradients)
            for name in (weight_of[n] for layer in sequence.layers for n in layer.outputs if n in weight_of):
                what = unusable(gradients[name])
                if what is not None:
                    found.append((2 * stages - stage, "The first value that is no number: the gradient of "
                                                      f"{name} {where} holds {what}"))  # fmt: skip
                    break
        told = [json.loads(text) for text in self.world.share(json.dumps(min(found, default=None))) if text != "null"]
        if told:
            return str(min(told)[1])
        return "Every value is a number; what overflows is a sum over micro-batches or ranks, or of squares"


def cells(schedule: Schedule, pp_index: int) -> tuple[str, ...]:
    """Where a rank can be in a step, in words: its cells of the schedule, and what comes behind them."""
    row = schedule.rows[pp_index]
    return (*(show_cell(c) for c in row), "the sum of the gradients", "the update of the weights")
