"""Flat buffers: every weight once, padded to equal shards, and who sums which of them."""

from __future__ import annotations

import functools

import pytest

from dsv3c import driver
from dsv3c.ir import Program
from dsv3c.job import LANE, Mesh, parse_mesh
from dsv3c.layout import FlatGroup, flat_groups, optimizer_bytes, ranks_of, shard_count
from dsv3c.schedules import generate
from dsv3c.stages import weights_of

MODEL = "deepseek-v3-tiny:num_hidden_layers=3"


@functools.cache
def program(stages: int, ep: int = 1) -> Program:
    passes = f"differentiate,shard{{ep={ep}}},eliminate,share,hoist,cut,partition{{stages={stages}}}"
    return driver.compile(MODEL, target="h800", precision="bf16", seq=8, kernels="none", passes=passes).program


def groups(kind: str, mesh: Mesh) -> tuple[Program, tuple[FlatGroup, ...]]:
    schedule = generate(kind, mesh.pp, 2 * mesh.pp)
    divided = program(schedule.stages, mesh.ep)
    return divided, flat_groups(divided, schedule.holders, mesh)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("1f1b", "pp=2"), ("dualpipe", "pp=2,dp=4,ep=2"), ("dualpipev", "pp=2,dp=2"), ("zb1p", "pp=4,dp=2,ep=2")],
)
def test_every_weight_lies_in_one_buffer_that_its_ranks_share(kind: str, mesh: str) -> None:
    axes = parse_mesh(mesh)
    divided, found = groups(kind, axes)
    trained = [w for w in divided.weights if w.group != "state"]
    assert sorted(s.name for g in found for s in g.weights) == sorted(w.name for w in trained)
    schedule = generate(kind, axes.pp, 2 * axes.pp)
    for g in found:
        end = 0
        for span in g.weights:
            w = divided.weight(span.name)
            assert (span.offset, span.shape) == (end, w.type.bound({})) and span.offset % LANE == 0
            assert (g.optimizer, g.expert) == (w.group, w.parts > 1)
            bound = {r for s in range(schedule.stages) if w.name in weights_of(divided, (s,))
                     for r in schedule.holders(s)}  # fmt: skip
            assert g.holders == tuple(sorted(bound))
            end = -(-(span.offset + span.size) // LANE) * LANE
        shards = shard_count(g.holders, g.expert, axes)
        assert end <= g.rows * LANE < end + shards * LANE and g.rows % shards == 0


def test_ranks_that_sum_a_gradient_together() -> None:
    mesh = Mesh(4, 4, 2)
    shared = FlatGroup("matrix.1-2", "matrix", (1, 2), False, (), 0)
    experts = FlatGroup("matrix.experts.1-2", "matrix", (1, 2), True, (), 0)
    assert ranks_of(shared, mesh, 6) == ranks_of(shared, mesh, 11) == tuple(range(4, 12))
    assert ranks_of(experts, mesh, 6) == (4, 6, 8, 10) and ranks_of(experts, mesh, 11) == (5, 7, 9, 11)
    assert (shard_count((1, 2), False, mesh), shard_count((1, 2), True, mesh)) == (8, 4)


@pytest.mark.parametrize("mesh", ["pp=2,dp=4,ep=2", "pp=2,dp=4,ep=4", "pp=4,dp=2"])
def test_each_rank_is_in_one_reduction_of_each_buffer_it_holds(mesh: str) -> None:
    axes = parse_mesh(mesh)
    for g in groups("dualpipe", axes)[1]:
        members = [r for r in range(axes.world) if r // axes.dp in g.holders]
        for rank in members:
            mine = ranks_of(g, axes, rank)
            assert rank in mine and list(mine) == sorted(mine) and len(mine) == shard_count(g.holders, g.expert, axes)
            assert all(ranks_of(g, axes, other) == mine for other in mine)


def test_optimizer_state_of_a_rank_is_its_share() -> None:
    mesh = Mesh(2, 4, 2)
    _, found = groups("dualpipe", mesh)
    for g in found:
        assert optimizer_bytes(g, mesh, 8) * shard_count(g.holders, g.expert, mesh) == g.rows * LANE * 8


def test_what_two_stages_share_is_summed_over_the_ranks_of_both() -> None:
    """The embedding is read by the first stage and by the MTP module in the last."""
    for kind, holders in (("1f1b", (0, 3)), ("dualpipe", (0, 3))):
        _, found = groups(kind, Mesh(4, 1))
        (group,) = (g for g in found if g.optimizer == "embedding")
        assert group.holders == holders
    _, found = groups("dualpipev", Mesh(4, 1))
    (group,) = (g for g in found if g.optimizer == "embedding")
    assert group.holders == (0,)
