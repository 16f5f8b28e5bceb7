"""What a rank of many allocates is what its plan predicts."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import run
from small import SMALL

import dsv3c
from dsv3c.plan import load_plan

SEQ, BATCH = 64, 8


def storages() -> dict[int, int]:
    """Bytes of all memory of tensors that this process holds, by address."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def held(path: Path) -> tuple[int, int]:
    """On one rank: its place in the pipeline, and bytes that a session holds after two steps, but for further rounds
    and what the target's implementations keep for themselves."""
    from dsv3c.runtime.ranks import RankSession, connect
    from dsv3c.targets import _scratch

    plan = load_plan(path)
    with connect(plan) as world:
        before = storages()
        session = RankSession(plan, world, seed=1)
        tokens = torch.randint(257, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            session.step(tokens)
        gc.collect()
        other = (session.stages._rounds.memory.block, *_scratch._pool.blocks.values())
        apart = {t.untyped_storage().data_ptr() for t in other}
        found = sum(size for at, size in storages().items() if at not in before and at not in apart)
    return world.pp_index, found


@pytest.mark.parametrize(("kind", "mesh"), [("dualpipe", "pp=2,dp=2,ep=2"), ("1f1b", "pp=2"), ("zb1p", "dp=4,ep=4")])
def test_a_rank_holds_what_was_predicted(kind: str, mesh: str, tmp_path: Path) -> None:
    made = dsv3c.compile(SMALL, mesh=mesh, schedule=kind, seq=SEQ, global_batch=BATCH, precision="fp32",
                         kernels="none", ranks_per_node=2)  # fmt: skip
    made.save(tmp_path / "plan")
    predicted: Any = [r["with_headroom_bytes"] or r["peak_bytes"] for r in made.buffers["ranks"]]  # type: ignore
    for rank, found in run(made.job.mesh.world, held, tmp_path / "plan"):
        assert found == pytest.approx(predicted[rank], rel=0.03)
