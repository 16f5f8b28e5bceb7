"""Chunks of many micro-batches in one arena: nothing that is alive is overwritten, and as little memory as can be."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from published import report_plan

from dsv3c import driver
from dsv3c.chunks import ChunkLayout, chunk_layout, rank_arena
from dsv3c.ir import Layer, Phase, Program, Sequence
from dsv3c.ops import REGISTRY
from dsv3c.plan import Plan
from dsv3c.schedules import find, generate
from dsv3c.stages import stage_name

MODEL = "deepseek-v3-tiny:num_hidden_layers=3"
KINDS = ("1f1b", "dualpipe", "dualpipev", "zb1p")
SIZES = {"B": 1, "S": 64, "C": 64}
GIB = 2**30


@functools.cache
def plan(kind: str, mesh: str = "pp=2,dp=2,ep=2") -> Plan:
    return driver.compile(MODEL, mesh=mesh, seq=64, global_batch=16, schedule=kind, kernels="none")


def layout(program: Program, stage: int) -> ChunkLayout:
    sequence = program.sequence(stage_name(stage))
    given = {n for n in sequence.inputs if n.startswith("d:") and n.removeprefix("d:") in sequence.losses}
    given |= {w.name for w in program.weights}
    if program.has_sequence("prologue"):
        given |= set(program.sequence("prologue").results)
    sizes = SIZES | {"D": 128, "R": 256}
    outside = {n for n, _ in sequence.gradients}
    return chunk_layout(program, sequence, REGISTRY, sizes, outside.__contains__, given.__contains__)


def orders(sequence: Sequence) -> Iterator[list[Layer]]:
    """The orders in which layers run: B and W in turn layer by layer, or all W after all B if they may."""
    forward = [y for y in sequence.layers if y.phase is Phase.F]
    backward = [y for y in sequence.layers if y.phase is not Phase.F]
    names = list(dict.fromkeys(y.name for y in backward))
    yield forward + [y for n in names for y in backward if y.name == n]
    if [y.phase for y in backward] == sorted((y.phase for y in backward), key=tuple(Phase).index):
        yield list(sequence.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_alive_is_overwritten_within_a_chunk(kind: str) -> None:
    """Replayed in every order in which layers may run: what a layer reads is what was last written there."""
    program = plan(kind).program
    for stage in range(len(find(kind).routes(2)[0])):
        sequence, chunk = program.sequence(stage_name(stage)), layout(program, stage)
        slots = {s.name: range(s.offset, s.offset + s.size) for s in chunk.slots.slots}
        for number, order in enumerate(orders(sequence)):
            together = number == 0 and bool(chunk.late)  # B and W at once: the late blocks are one memory
            owner: dict[tuple[int, int], str] = {}
            roots = chunk.slots.roots

            def cells(name: str, together: bool = together, chunk: ChunkLayout = chunk,
                      slots: dict[str, range] = slots) -> list[tuple[int, int]]:  # fmt: skip
                bounds = [0, *itertools.accumulate(chunk.blocks)]
                at = slots[name].start
                block = max(i for i in range(len(chunk.blocks)) if bounds[i] <= at)
                first = at - bounds[block]
                shown = 1 if together and 1 <= block <= chunk.alike else block
                return [(shown, i) for i in range(first // 256, (first + len(slots[name])) // 256)]

            def write(name: str, owner: dict[tuple[int, int], str] = owner) -> None:
                owner.update(dict.fromkeys(cells(name), name))

            phase = Phase.F
            for name in (n for n in sequence.inputs if n in slots and not n.startswith("d:")):
                write(name)
            for y in order:
                if y.phase is not Phase.F and phase is Phase.F:
                    for name in (n for n in sequence.inputs if n in slots and n.startswith("d:")):
                        write(name)
                    phase = y.phase
                for name in y.inputs:
                    root = roots.get(name, name)
                    if root in slots:
                        assert {owner.get(c) for c in cells(root)} <= {root}, f"{y.name} {y.phase} reads {name}"
                for name in y.outputs:
                    if roots[name] == name and name in slots:
                        write(name)
            for name in (n for n in sequence.results if n.startswith("d:") and roots[n] in slots):
                assert {owner[c] for c in cells(roots[name])} == {roots[name]}


def test_only_what_is_deferred_needs_blocks_of_its_own() -> None:
    assert layout(plan("1f1b").program, 0).late == ()
    apart = layout(plan("dualpipe").program, 0)
    assert apart.alike >= 2 and all(apart.late) and apart.slots.peak == apart.held + sum(apart.late)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 12), (8, 16)])
def test_chunks_that_are_held_at_once_share_nothing(kind: str, ranks: int, micro_batches: int) -> None:
    schedule = generate(kind, ranks, micro_batches)
    whole = layout(plan("dualpipe").program, 0)
    one = ChunkLayout(whole.slots, 1024 * 7, (1024 * 3, 1024 * 2, 1024), 2, {})
    for rank in range(ranks):
        arena = rank_arena(schedule, rank, dict.fromkeys(schedule.held(rank), one))
        most = 0
        alive: dict[tuple[int, int], list[range]] = {}
        for cell in schedule.rows[rank]:
            for a in cell:
                key, place = (a.stage, a.micro_batch), arena.places[a.stage, a.micro_batch]
                if a.kind == "F":
                    alive[key] = [range(place.held, place.held + one.held)]
                if a.kind in "IB":
                    blocks = [range(at, at + size) for at, size in zip(place.late, one.late, strict=True)]
                    assert a.kind == "I" or place.late[0] == place.late[1]
                    alive[key] += blocks if a.kind == "I" else [blocks[0], blocks[2]]
            spans = sorted((r.start, r.stop) for rs in alive.values() for r in rs)
            assert all(x[1] <= y[0] for x, y in itertools.pairwise(spans)), f"rank {rank}: {cell}"
            most = max(most, sum(b - a for a, b in spans))
            for a in cell:
                if a.kind in "WB":
                    del alive[a.stage, a.micro_batch]
        assert not alive and most <= arena.bytes <= 1.35 * most


def buffers(made: Plan) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What buffers.json says of each pipeline rank, and of its arena."""
    ranks: Any = made.buffers["ranks"]
    arenas: Any = made.buffers["arenas"]
    return ranks, arenas


def test_memory_of_a_small_plan_adds_up() -> None:
    """Two ranks of two by two: gradients of what is held, a share of the optimizer, and the arenas."""
    made = plan("dualpipe")
    ranks, arenas = buffers(made)
    assert len(ranks) == len(arenas) == 2
    assert made.memory.peak_bytes == max(made.memory.per_rank) and len(made.memory.per_rank) == 2
    program = made.program
    trained = sum(w.type.bytes() for w in program.weights if w.group != "state")
    for rank, arena in zip(ranks, arenas, strict=True):
        assert rank["gradients"] == pytest.approx(trained, rel=0.02)  # dualpipe on two ranks: both hold both stages
        shared = trained - sum(w.type.bytes() for w in program.weights if w.parts > 1)
        share = 2 * (shared / 4 + (trained - shared) / 2)  # float32 master and two bfloat16 moments
        assert rank["optimizer"] == pytest.approx(share, rel=0.05)
        assert rank["activations"] > arena["bytes"] > 0 and rank["communication"] > 0
        assert rank["with_headroom_bytes"] > rank["peak_bytes"]
        assert len(arena["chunks"]) == 8
    assert made.memory.with_headroom_bytes == max(r["with_headroom_bytes"] for r in ranks)


def test_what_does_not_fit_is_refused_with_a_table_of_ranks() -> None:
    from dsv3c.errors import InputError

    with pytest.raises(InputError, match=r"pipeline rank 1: [0-9.]+ GiB: weights .*, communication"):
        driver.compile("deepseek-v3", target="h800", precision="fp8", mesh="pp=2,dp=8,ep=8", seq=4096, global_batch=64,
                       kernels="none", passes="differentiate,quantize,shard,eliminate,share,hoist,recompute{price=9},"
                       "fuse,cut{early=true},dualpipe{kind=dualpipe},partition,plan_buffers")  # fmt: skip


# ---- the report's run ------------------------------------------------------------------------------------------------


def test_every_rank_of_the_published_run_fits() -> None:
    """Section 3.2: DualPipe over 16 stages. Estimates by hand, in GiB: weights in FP8 both ways 6.1, gradients 12.2,
    17 chunks of four layers 40.5 on the middle ranks."""
    made = report_plan()
    ranks, arenas = buffers(made)
    assert made.comm["schedule"] == "dualpipe" and len(ranks) == 16
    assert all(r["peak_bytes"] <= 77 * GIB for r in ranks) and made.memory.fits
    assert made.memory.per_rank == tuple(r["peak_bytes"] for r in ranks)
    middle = ranks[7]
    assert middle["weights"] / GIB == pytest.approx(6.1, abs=0.1)
    assert middle["gradients"] / GIB == pytest.approx(12.2, abs=0.1)
    assert middle["optimizer"] / GIB == pytest.approx(2.7, abs=0.1)
    stage: Any = made.buffers["stage.7"]
    assert 17 * stage["held"] / GIB == pytest.approx(42, abs=1.5)
    assert len({tuple(c[2:]) for c in arenas[7]["chunks"]}) <= 64  # so many bindings of the layers at most
    assert all(a["peak_bytes"] == b["peak_bytes"] for a, b in zip(ranks, reversed(ranks), strict=True))
    assert made.memory.with_headroom_bytes > made.memory.peak_bytes
    assert any(n.action == "planned" and "more than the 77.0 GiB there are" in n.reason for n in made.notes)
    assert sum(n.node.startswith("pipeline rank") for n in made.notes if n.pass_name == "plan_buffers") == 16


def test_the_plan_of_2048_ranks_is_small() -> None:
    assert len(report_plan().to_bytes()) < 8_000_000
