"""One of several processes that hold a small model's weights together; the tests of rank weights start them.

A program is divided here by hand, without the passes that do it: what matters is which rank holds what.
"""

from __future__ import annotations

import datetime
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from dsv3c.ir import Program, Sequence, Type, Weight
from dsv3c.job import Mesh
from dsv3c.runtime.peers import GroupPeers
from dsv3c.runtime.world import World
from dsv3c.stages import stage_name

EXPERTS = ".experts."


def divided(program: Program, stages: int, ep: int) -> Program:
    """The program with its train sequence in one or two stages, and weights as one of `ep` ranks has them.

    The second stage begins after the first layer of the model; positions are computed in both.
    """
    train = program.sequence("train")
    first = [y for y in train.layers if y.name in ("embedding", "model.layers.0")]
    parts = [first, [y for y in train.layers if y not in first]] if stages == 2 else [list(train.layers)]
    sequences: list[Sequence] = []
    for k, layers in enumerate(parts):
        read = {n for y in layers for n in y.inputs}
        made = {n for y in layers for n in y.outputs}
        inputs = tuple(n for n in train.inputs if n in read)
        gradients = tuple((v, w) for v, w in train.gradients if v in made)
        sequences.append(Sequence(stage_name(k), inputs, tuple(layers), (), (), gradients))
    prologue = [s for s in program.sequences if s.name == "prologue"]
    weights = tuple(_of_one_rank(w, ep) if EXPERTS in w.name else w for w in program.weights)
    return program.but(sequences=(*prologue, *sequences), weights=weights)


def _of_one_rank(w: Weight, ep: int) -> Weight:
    experts, *inner = w.type.bound({})
    return replace(w, type=Type(w.type.dtype, (experts // ep, *inner)), parts=ep)


def both(stage: int) -> tuple[int, ...]:
    """DualPipe with two ranks: each holds both stages."""
    return (0, 1)


def own(stage: int) -> tuple[int, ...]:
    """One stage on each pipeline rank."""
    return (stage,)


def gradient(name: str, rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What `rank` contributes to the gradient of the whole weight `name`."""
    seed = sum((i + 1) * c for i, c in enumerate(name.encode())) * 64 + rank
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def process(scenario: Callable[[World, Path], None], mesh: Mesh, seconds: float = 60.0) -> None:
    """Be rank RANK of SIZE: join the others, run `scenario`, and leave OUT/rank-RANK.txt: 'done' or what failed."""
    rank, size, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=size, timeout=wait)
    try:
        scenario(World(rank, mesh, 2, torch.device("cpu")), out)
        (out / f"rank-{rank}.txt").write_text("done")
    except BaseException:
        (out / f"rank-{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


__all__ = ["GroupPeers", "both", "divided", "gradient", "own", "process"]
