"""A loaded plan on one of many ranks: the same training step as on one, divided as the plan says."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from dsv3c.comm import CommPlan, check, from_json
from dsv3c.dims import bind
from dsv3c.errors import InputError, WorkError
from dsv3c.ir import Program
from dsv3c.job import Recipe
from dsv3c.models import MODELS
from dsv3c.models.config import ModelConfig
from dsv3c.ops import REGISTRY
from dsv3c.plan import Plan
from dsv3c.runtime.actions import Actions, Border
from dsv3c.runtime.collectives import CHANNELS
from dsv3c.runtime.epilogue import Epilogue
from dsv3c.runtime.exchange import Exchange
from dsv3c.runtime.executor import Engine, prepare_sequence
from dsv3c.runtime.lanes import Lanes
from dsv3c.runtime.peers import GroupPeers
from dsv3c.runtime.rank_weights import RankWeights
from dsv3c.runtime.runner import Runner
from dsv3c.runtime.session import StepResult
from dsv3c.runtime.stages import Chunk, bind_stages
from dsv3c.runtime.world import World
from dsv3c.schedule import Schedule, parse_csv
from dsv3c.schedules import verify
from dsv3c.stages import prologue_of, stage_name
from dsv3c.target import Target
from dsv3c.targets import find
from dsv3c.tensors import torch_dtype


def division(plan: Plan) -> tuple[Schedule, CommPlan]:
    """The schedule and the communication of a plan for many ranks, proven to fit together.

    Raises InputError if a dependency is not met, a message has no counterpart, or the ranks would wait for each other.
    """
    comm = from_json(plan.comm)
    schedule = parse_csv(plan.schedule, comm.schedule)
    verify(schedule)
    check(comm, schedule)
    return schedule, comm


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


class RankSession:
    """Trains one rank's part of a plan. All ranks make one together, and call its methods together.

    `weights`: a Hugging Face directory, or None to draw them from `seed`. `recording`: keep a timeline in `lanes`.
    `watch(cell)` is called before each cell of the schedule.
    """

    def __init__(self, plan: Plan, world: World, weights: str | Path | None = None, seed: int = 0,
                 recording: bool = False, watch: Callable[[str], None] = lambda cell: None) -> None:  # fmt: skip
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
        self.device = str(world.device)
        target = find(plan.target)
        self.schedule, self.comm = division(plan)
        occupancy = verify(self.schedule)
        held = self.schedule.held(world.pp_index)
        sizes = {"B": job.micro_batch, "S": job.seq, "C": job.seq, **dict(self.comm.rows)}
        exchange = _exchange(self.program, self.comm, world, sizes, target)
        self.engine = Engine.of(plan, target, REGISTRY, exchange.prepare, self.comm.units)
        self.weights = RankWeights(self.program, self.schedule.holders, world)
        if weights is None:
            self.weights.initialize(seed, self.family.parts)
        else:
            self.weights.load_hf(weights, self.family.parts, GroupPeers())
        self._epilogue = Epilogue(self.engine, self.weights, self.recipe)
        self._prologue, self._hoisted = self._bind_prologue(held)
        tensors = self.weights.tensors | self._hoisted
        chunks = {s: occupancy.chunks[world.pp_index, s] for s in held}
        share = job.micro_batch / job.global_batch
        self._losses = tuple(n for s in range(self.schedule.stages)
                             for n in self.program.sequence(stage_name(s)).losses)  # fmt: skip
        shares = {n: self._weight(n) * share for n in self._losses}
        self.stages = bind_stages(self.engine, chunks, sizes, tensors, self.weights.gradients(), shares, self.device)
        self._biases = self._routers()
        wide = torch.float64
        count = self.schedule.micro_batches * job.mesh.dp
        self._loss_table = torch.zeros(len(self._losses), count, dtype=wide, device=self.device)
        experts = self.config.n_routed_experts
        self._load_table = torch.zeros(len(self._biases), experts, dtype=wide, device=self.device)
        self.lanes = Lanes(self.device, recording)
        orders = {(p.forward, p.backward): p.steps for p in self.comm.overlap.pairs} if self.comm.overlap else {}
        self._actions = Actions(
            self.schedule, world.pp_index, self.stages, borders(self.comm), {c: world.channel(c) for c in CHANNELS},
            self.lanes, orders, self._collect, lambda i: watch(str(i)),
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
        self.weights.reduce()
        squares = self._epilogue.squares()
        self.weights.add_ranks(squares)
        losses, loads = self._shared()
        norm = math.sqrt(float(squares))
        bad = [n for n, v in losses.items() if not math.isfinite(v)]
        if bad or not math.isfinite(norm):
            wrong = f"{bad[0]} is {losses[bad[0]]}" if bad else f"the gradient norm is {norm}"
            raise WorkError(
                f"step {self.steps + 1}: {wrong}. Nothing of this step was applied; start again with a lower --lr or "
                "other data, or resume from the last checkpoint."
            )
        self.steps += 1
        rate = self.recipe.lr if lr is None else lr
        self._epilogue.update(rate, self.steps, squares)
        by_layer = {}
        for (layer, bias), load in zip(self._biases, loads, strict=True):
            by_layer[layer] = load
            if bias in self.weights.tensors:
                self._epilogue.update_bias(bias, load.to(self.device))
        self._stale = True
        mtp = tuple(v for n, v in losses.items() if n.startswith("loss.mtp"))
        balance = sum(v for n, v in losses.items() if n.startswith("balance"))
        return StepResult(self.steps, losses["loss.main"], mtp, balance, norm, rate, tokens.numel(), by_layer)

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
        host = torch.cat((self._loss_table.flatten(), self._load_table.flatten())).cpu()
        if self.world.size > 1:
            dist.all_reduce(host)  # every loss is there once, all others zero, and loads are whole numbers: exact
        table, loads = host.split((self._loss_table.numel(), self._load_table.numel()))
        rows = table.view_as(self._loss_table)
        losses = {}
        for name, row in zip(self._losses, rows.tolist(), strict=True):
            total = 0.0
            for value in row:
                total += value
            losses[name] = total / len(row)
        return losses, loads.view_as(self._load_table).to(torch_dtype(self.weights.wide))
