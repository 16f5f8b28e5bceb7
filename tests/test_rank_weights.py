"""Weights divided among ranks: on one rank they train as the undivided do, and a lost rank loses no checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_process import gradient
from small import SMALL
from test_checkpoint_meshes import HERE, environment

import dsv3c
from dsv3c.errors import InputError
from dsv3c.ir import Sequence
from dsv3c.job import Mesh, Recipe
from dsv3c.models import MODELS
from dsv3c.models.checkpoint import Part
from dsv3c.ops import REGISTRY
from dsv3c.plan import Plan
from dsv3c.runtime.checkpoint_files import Contents, Piece, Stored
from dsv3c.runtime.epilogue import Epilogue
from dsv3c.runtime.executor import Engine, prepare_sequence
from dsv3c.runtime.rank_weights import RankWeights
from dsv3c.runtime.session import Session
from dsv3c.runtime.state import latest_state, load_state, save_state, step_of
from dsv3c.runtime.world import World
from dsv3c.targets import find
from dsv3c.tensors import torch_dtype

RECIPE = Recipe(lr=1e-2)


def make_plan(precision: str) -> Plan:
    passes = "differentiate,hoist,eliminate,cut"
    return dsv3c.compile(SMALL, seq=16, micro_batch=2, global_batch=4, precision=precision, passes=passes,
                         recipe=RECIPE)  # fmt: skip


def first(stage: int) -> tuple[int, ...]:
    return (0,)


class OneRank:
    """The steps of a session, done with `RankWeights` in the order that many ranks do them."""

    def __init__(self, plan: Plan) -> None:
        self.plan, program = plan, plan.program
        engine = Engine.of(plan, find("cpu"), REGISTRY)
        self.weights = RankWeights(program, first, World.local())
        self.weights.initialize(5, MODELS[program.name].parts)
        self.epilogue = Epilogue(engine, self.weights, RECIPE)
        self.prologue = None
        given = {"tokens": torch.zeros(2, 16, dtype=torch.long), **self.weights.tensors}
        if program.has_sequence("prologue"):
            first_of_all = program.sequence("prologue")
            self.prologue = prepare_sequence(engine, first_of_all, {}, self.weights.gathered())
            given |= {n: self.prologue.values[n] for n in first_of_all.results}
        self.sequence: Sequence = program.sequence("train")
        wide = torch_dtype(self.weights.wide)
        given |= {n: torch.zeros((), dtype=wide) for n in self.sequence.inputs if n.startswith("d:")}
        sizes = {"B": 2, "S": 16, "C": 0}
        self.runner = prepare_sequence(engine, self.sequence, sizes, given, self.weights.gradients())
        self.steps = 0

    def step(self, tokens: torch.Tensor) -> float:
        weights = self.weights
        weights.gather()
        if self.prologue is not None:
            self.prologue.run()
        weights.copy_bound()
        weights.zero_gradients()
        shares = {"loss.main": 1.0, "loss.mtp": RECIPE.mtp, "balance": RECIPE.balance}
        for name in self.sequence.losses:
            share = next(v for k, v in shares.items() if name.startswith(k))
            self.runner.values[f"d:{name}"].fill_(share / 2)
        loads: dict[str, torch.Tensor] = {}
        for part in tokens.split(2):
            self.runner.values["tokens"].copy_(part)
            self.runner.run(accumulate=True)
            for layer in self.sequence.layers:
                for name in layer.outputs:
                    if name.startswith("load."):
                        bias = next(n for n in layer.inputs if n.endswith("e_score_correction_bias"))
                        loads[bias] = loads.get(bias, 0) + self.runner.values[name]
        weights.reduce()
        squares = self.epilogue.squares()
        weights.add_ranks(squares)
        self.steps += 1
        norm = float(squares.sqrt())
        self.epilogue.update(RECIPE.lr, self.steps, squares)
        for bias, load in loads.items():
            self.epilogue.update_bias(bias, load)
        return norm


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_one_rank_trains_to_the_bit_as_a_session(precision: str, tmp_path: Path) -> None:
    plan = make_plan(precision)
    session, divided = Session(plan, seed=5), OneRank(plan)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        tokens = torch.randint(257, (4, 16), generator=generator)
        assert session.step(tokens, RECIPE.lr).grad_norm == divided.step(tokens)
    mine = session.weights.state()
    theirs = {n: torch.zeros_like(t) for n, t in mine.items()}
    load_state(save_state(tmp_path, 3, divided.weights.state(), {}), theirs)
    assert all(torch.equal(t, theirs[n]) for n, t in mine.items())
    again = OneRank(plan)
    load_state(save_state(tmp_path, 4, mine, {}), again.weights.state())
    again.steps = 3
    tokens = torch.randint(257, (4, 16), generator=generator)
    assert again.step(tokens) == divided.step(tokens) == session.step(tokens, RECIPE.lr).grad_norm


def test_the_optimizer_state_of_experts_of_all_ranks_is_known(tmp_path: Path) -> None:
    """A rank that holds a part of the experts knows the shapes of them all, and where its own lie."""
    program = make_plan("fp32").program
    weights = tuple(
        replace(w, type=replace(w.type, shape=(2, *w.type.bound({})[1:])), parts=4) if ".experts." in w.name else w
        for w in program.weights
    )
    world = replace(World.local(), rank=2, mesh=Mesh(1, 4, 4))
    world._groups.update({("reduce", r): World.local().group((0,)) for r in ((2,), (0, 1, 2, 3))})
    held = RankWeights(program.but(weights=weights), first, world)
    name = "m.model.layers.1.mlp.experts.gate_up_proj"
    contents = held.state()
    assert str(contents.stored[name]) == "BF16[8, 64, 32]"
    pieces = [p for p in contents.pieces if p.name == name]
    assert [(p.start, p.stop) for p in pieces] == [(4 * 64 * 32, 6 * 64 * 32)]
    assert not [p for p in contents.pieces if p.name.startswith("bias.")], "rank 0 saves them"
    assert {p.name.partition(".")[0] for p in contents.copies} == {"bias"}


def test_experts_that_share_a_tensor_cannot_be_divided() -> None:
    program = make_plan("fp32").program
    weights = tuple(replace(w, parts=2) if ".experts." in w.name else w for w in program.weights)
    world = replace(World.local(), mesh=Mesh(1, 2, 2))
    world._groups.update({("reduce", r): World.local().group((0,)) for r in ((0,), (0, 1))})
    held = RankWeights(program.but(weights=weights), first, world)
    with pytest.raises(ValueError, match="holds several experts"):
        held.initialize(0, lambda name, shape: (Part(name, ()),))


# ---- pieces ---------------------------------------------------------------------------------------------------------


def piece(start: int, count: int) -> Piece:
    return Piece("w", start, torch.arange(start, start + count, dtype=torch.float32))


@pytest.mark.parametrize("spans", [[(0, 5)], [(0, 5), (4, 6)], [(1, 9)], [(0, 10), (0, 10)], []])
def test_pieces_that_do_not_make_up_a_tensor_are_never_a_checkpoint(spans: list[tuple[int, int]],
                                                                    tmp_path: Path) -> None:  # fmt: skip
    contents = Contents({"w": Stored("F32", (2, 5))}, tuple(piece(*span) for span in spans))
    with pytest.raises(ValueError, match=r"do not cover w F32\[2, 5\] exactly once"):
        save_state(tmp_path, 1, contents, {})
    assert latest_state(tmp_path) is None and not list((tmp_path / "checkpoints").iterdir())


def test_any_numbers_of_a_tensor_can_be_read(tmp_path: Path) -> None:
    stored = {"w": Stored("F32", (4, 5)), "b": Stored("F32", (2,))}
    pieces = (piece(7, 13), piece(0, 7), Piece("b", 0, torch.ones(2)))
    path = save_state(tmp_path, 1, Contents(stored, pieces), {})
    for start in range(20):
        for count in range(21 - start):
            target = torch.full((count,), -1.0)
            load_state(path, Contents(stored, (Piece("w", start, target),)))
            assert torch.equal(target, torch.arange(start, start + count, dtype=torch.float32))


# ---- a rank is lost -------------------------------------------------------------------------------------------------

LOST = """
import os, signal, sys
from pathlib import Path
import torch
from rank_process import gradient, process
from dsv3c.job import Mesh
from dsv3c.runtime import checkpoint_files
from dsv3c.runtime.checkpoint_files import Contents, Piece, Stored
from dsv3c.runtime.peers import GroupPeers
from dsv3c.runtime.state import save_state

def scenario(world, out):
    half = gradient("w", 0, (10,))[5 * world.rank:][:5]
    contents = Contents({"w": Stored("F32", (10,))}, (Piece("w", 5 * world.rank, half),))
    save_state(out, 1, contents, {}, peers=GroupPeers())
    if world.rank == 1:
        checkpoint_files._create = lambda path: os.kill(os.getpid(), signal.SIGKILL)
    save_state(out, 2, contents, {}, peers=GroupPeers())

process(scenario, Mesh(1, 2), 20)
"""


def test_a_rank_killed_while_it_saves_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", LOST, str(rank), "2", tmp_path], env=environment(), cwd=HERE,
                         stderr=subprocess.PIPE)
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert ranks[1].returncode == -signal.SIGKILL and ranks[0].returncode not in (0, -signal.SIGKILL), said[0]
    path = latest_state(tmp_path)
    assert path is not None and step_of(path) == 1
    target = torch.zeros(10)
    load_state(path, {"w": target})
    assert torch.equal(target, gradient("w", 0, (10,)))
    assert os.listdir(path.parent) == ["step-000001"]
    with pytest.raises(InputError, match="1 tensor differs"):
        load_state(path, {"w": torch.zeros(11)})
