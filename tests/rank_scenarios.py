"""What four processes do for the tests of rank weights and of checkpoints on other meshes; a script."""

from __future__ import annotations

import functools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
from rank_process import both, divided, gradient, own, process

from dsv3c.errors import Dsv3cError
from dsv3c.job import Mesh, Recipe
from dsv3c.models import MODELS
from dsv3c.models.config import ModelConfig
from dsv3c.ops import REGISTRY
from dsv3c.plan import Plan, load_plan
from dsv3c.runtime import checkpoint_files
from dsv3c.runtime.epilogue import Epilogue
from dsv3c.runtime.executor import Engine
from dsv3c.runtime.export import write_hf_together
from dsv3c.runtime.peers import GroupPeers
from dsv3c.runtime.rank_weights import RankWeights
from dsv3c.runtime.state import load_state, save_state
from dsv3c.runtime.tokenizer import load_tokenizer
from dsv3c.runtime.world import World
from dsv3c.targets import find

SEED = 3
RECIPE = Recipe(lr=1e-2)
MESHES = {
    "dualpipe": (Mesh(2, 2, 2), both, 2),
    "1f1b": (Mesh(2, 2, 1), own, 2),
    "experts": (Mesh(1, 4, 4), lambda stage: (0,), 1),
    "replicas": (Mesh(1, 4, 2), lambda stage: (0,), 1),
}
"""Mesh, the pipeline ranks that hold a stage, and stages, of four ranks."""
READ = {
    "dualpipe": ["one"],
    "1f1b": ["dualpipe"],
    "experts": ["one", "dualpipe", "1f1b"],
    "replicas": ["experts"],
}
"""The checkpoints of other meshes that each of them reads."""


@functools.cache
def the_plan(out: Path) -> Plan:
    return load_plan(out / "small.plan")


def made(world: World, name: str, out: Path) -> RankWeights:
    mesh, holders, stages = MESHES[name]
    program = divided(the_plan(out).program, stages, mesh.ep)
    return RankWeights(program, holders, replace(world, mesh=mesh, _groups={}))


def give_gradients(weights: RankWeights) -> None:
    """Every rank adds its own part, as one micro-batch would."""
    weights.zero_gradients()
    ep = weights.mesh.ep
    for name, target in weights.gradients().items():
        if ".experts." in name and ep > 1:
            whole = gradient(name, weights.world.rank, (target.shape[0] * ep, *target.shape[1:]))
            target.add_(whole[weights.world.ep_index * target.shape[0] :][: target.shape[0]])
        else:
            target.add_(gradient(name, weights.world.rank, tuple(target.shape)))


def whole_weights(world: World, out: Path) -> None:
    plan = the_plan(out)
    parts, config = MODELS[plan.program.name].parts, ModelConfig.from_dict(plan.config)
    peers = GroupPeers()
    os.fsync = lambda handle: None  # type: ignore[assignment]  # no machine is lost here, and others wait for the disk
    told: dict[str, object] = {}
    for name in MESHES:
        weights = made(world, name, out)
        weights.initialize(SEED, parts)
        assert not any(g.any() for g in weights.gradients().values())
        save_state(out / name, 1, weights.state(), {"seed": SEED}, peers=peers)
        weights.gather()
        weights.copy_bound()
        told[f"{name} bound"] = sorted(weights.tensors)
        told[f"{name} held"] = {n: t.double().sum().item() for n, t in weights.gathered().items()}
        told[f"{name} equal"] = all(
            torch.equal(weights.tensors[n], t) for n, t in weights.gathered().items() if n in weights.tensors
        )
        give_gradients(weights)
        weights.reduce()
        engine = Engine.of(plan, find("cpu"), REGISTRY)
        epilogue = Epilogue(engine, weights, RECIPE)
        squares = epilogue.squares()
        weights.add_ranks(squares)
        told[f"{name} squares"] = squares.item()
        epilogue.update(RECIPE.lr, 1, squares)
        for router in (n for n in weights.tensors if n.endswith("e_score_correction_bias")):
            epilogue.update_bias(router, torch.arange(8.0))
        save_state(out / name, 2, weights.state(), {"seed": SEED}, peers=peers)
        write_hf_together(out / name / "hf", config, weights, parts, load_tokenizer("bytes"), peers)
        told[f"{name} written"] = sum(1 for _ in weights.hf_tensors(parts))
        again = made(world, name, out)
        again.load_hf(out / name / "hf", parts, peers)
        save_state(out / f"{name}-hf", 1, again.state(), {}, peers=peers)
        for other in READ[name]:
            again = made(world, name, out)
            load_state(out / other / "checkpoints" / "step-000002", again.state(), peers=peers)
            save_state(out / f"{other}-{name}", 2, again.state(), {}, peers=peers)
    failures(world, out, peers, told)
    (out / f"told-{world.rank}.json").write_text(json.dumps(told))


def failures(world: World, out: Path, peers: GroupPeers, told: dict[str, object]) -> None:
    """What every rank says about files that are damaged or cannot be written, by one of them."""

    def message(act: object) -> str:
        assert callable(act)
        try:
            act()
        except Dsv3cError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    weights = made(world, "dualpipe", out)
    weights.initialize(SEED, MODELS["deepseek-v3"].parts)
    create = checkpoint_files._create

    def full(path: Path) -> IO[bytes]:
        raise OSError(28, "No space left on device")

    if world.rank == 2:
        checkpoint_files._create = full
    told["full"] = message(lambda: save_state(out / "dualpipe", 3, weights.state(), {}, peers=peers))
    checkpoint_files._create = create
    if world.rank == 0:
        shutil.copytree(out / "dualpipe", out / "damaged")
        path = out / "damaged" / "checkpoints" / "step-000002" / "state-00001-of-00004.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    peers.share("")
    before = {n: t.clone() for n, t in weights.tensors.items()}
    damaged = out / "damaged" / "checkpoints" / "step-000002"
    told["damaged"] = message(lambda: load_state(damaged, weights.state(), peers=peers))
    told["kept"] = all(torch.equal(before[n], t) for n, t in weights.tensors.items())
    other = made(world, "1f1b", out)
    contents = other.state()
    stored = {n: s for n, s in contents.stored.items() if "layers.0.mlp.down" not in n}
    pieces = tuple(p for p in contents.pieces if p.name in stored)
    told["other"] = message(
        lambda: load_state(
            out / "dualpipe" / "checkpoints" / "step-000002",
            checkpoint_files.Contents(stored, pieces, contents.copies),
            peers=peers,
        )
    )
    told["no hf"] = message(lambda: weights.load_hf(out / "nowhere", MODELS["deepseek-v3"].parts, peers))


if __name__ == "__main__":
    process(whole_weights, Mesh(1, 4))
