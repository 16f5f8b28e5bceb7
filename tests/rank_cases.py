"""What several real processes check together: exchanges of rows, collectives, channels. Run by test_exchange.py.

Each case is run by every rank, which draws the inputs of all ranks and so knows what it must get.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.distributed.distributed_c10d import PrefixStore

from dsv3c.errors import InputError, WorkError
from dsv3c.ir import Attrs, DType, Node, Type, Value
from dsv3c.job import Mesh, parse_mesh
from dsv3c.ops import dispatch as lockstep
from dsv3c.runtime.collectives import Pending, exchange_shards, gather_shards
from dsv3c.runtime.exchange import Dispatch, Exchange
from dsv3c.runtime.world import World, _agree

Tensors = tuple[torch.Tensor, ...]
TOKENS, K, EXPERTS, COLS = (2, 12), 3, 16, 24
GENEROUS = 4 * 24

CASES: dict[str, Callable[[World], None]] = {}


def case(function: Callable[[World], None]) -> Callable[[World], None]:
    CASES[function.__name__] = function
    return function


def work(rank: int, size: int, port: int, device: str, mesh: str, folder: Path) -> None:
    """Run every case as one rank; FOLDER/RANK.json gets {case: '' or what went wrong}."""
    torch.set_num_threads(1)
    environment = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": port}  # fmt: skip
    os.environ.update({k: str(v) for k, v in environment.items()})
    world = World.connect(parse_mesh(mesh), 2, device, "plan", timeout=60.0, code="code", ctas=8)
    found: dict[str, str] = {}
    with torch.inference_mode():
        for name, check in CASES.items():
            try:
                check(world)
                found[name] = ""
            except Exception:
                found[name] = f"rank {rank}: {traceback.format_exc()}"
    world.barrier()
    file = folder / f"{rank}.json"
    file.with_suffix(".part").write_text(json.dumps(found))
    file.with_suffix(".part").replace(file)
    if rank == size - 1:
        os._exit(0)  # as a killed rank: closes nothing
    with pytest.raises(WorkError, match="a rank stopped while rank"):
        world.barrier()
    (folder / f"{rank}.lost").write_text("noticed")
    os._exit(0)


def nodes_of(world: World, ranks_per_node: int, mesh: Mesh | None = None) -> World:
    """The same processes with another mesh; process groups are made anew."""
    return replace(world, ranks_per_node=ranks_per_node, mesh=mesh or world.mesh, _groups={})


# ---- exchanges of rows -----------------------------------------------------------------------------------------------


def node(op: str, attrs: Attrs, *names: str) -> Node:
    return Node(op, (), attrs, tuple(Value(n, Type(DType.f32, ())) for n in names), "moe.dispatch")


@dataclass
class Way:
    """One rank's dispatch with all its tensors, prepared."""

    exchange: Exchange
    node: Node
    inputs: Tensors
    outputs: Tensors
    call: Callable[[], None]

    @property
    def handle(self) -> torch.Tensor:
        return self.outputs[3]

    @property
    def ranks(self) -> Attrs:
        return (("ranks", self.exchange.ranks),)

    @classmethod
    def prepare(cls, exchange: Exchange, inputs: Tensors, rows: int) -> Way:
        ranks, x = exchange.ranks, inputs[0]
        sends = node("dispatch", (("ranks", ranks), ("experts", EXPERTS), ("rows", "D")), "rows", "e", "p", "handle")
        shapes = [(rows, t.shape[-1]) for t in inputs] + [(*x.shape[:-1], ranks)]
        kinds = [t.dtype for t in inputs] + [torch.int32]
        outputs = tuple(torch.empty(s, dtype=d, device=x.device) for s, d in zip(shapes, kinds, strict=True))
        for t in outputs:
            t.view(torch.uint8).fill_(0x7F)  # no number, for most types
        own = tuple(t.clone() for t in inputs)
        return cls(exchange, sends, own, outputs, exchange.prepare(sends, own, outputs))


def draw(world: World, kind: str, dtype: torch.dtype) -> list[Tensors]:
    """(x, e, p) of every rank of the expert group."""
    found: list[Tensors] = []
    for rank in range(world.mesh.ep):
        generator = torch.Generator().manual_seed(100 + rank)
        x = torch.randn(*TOKENS, COLS, generator=generator, dtype=torch.float64).to(dtype)
        p = torch.rand(*TOKENS, K, generator=generator, dtype=torch.float64)
        scores = torch.rand(*TOKENS, EXPERTS, generator=generator)
        each = EXPERTS // world.mesh.ep
        if kind == "uneven":
            scores[..., :5] += 0.8 * rank
        elif kind == "one":  # all on the experts of rank 1
            scores[..., each : each + K] += 2
        elif kind == "empty":  # nobody on the experts of rank 0, and on some others
            scores[..., :each] -= 2
            scores[..., -2:] -= 2
        else:
            assert kind == "own"
            scores[..., rank * each : rank * each + K] += 2
        e = scores.topk(K, -1).indices.int()
        found.append((x.to(world.device), e.to(world.device), p.to(dtype if p.dtype == dtype else torch.float32)
                      .to(world.device)))  # fmt: skip
    return found


def same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    """To the bit."""
    assert a.shape == b.shape and a.dtype == b.dtype, (what, a.shape, b.shape, a.dtype, b.dtype)
    if a.numel():
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), what


def exchanged(world: World, two_hop: bool, kind: str, dtype: torch.dtype, fast: bool = False) -> None:
    """All three ops against what they mean."""
    every = draw(world, kind, dtype)
    ranks, me, local = world.mesh.ep, world.ep_index, world.local_ranks
    unpermute = None
    if fast:
        from dsv3c.targets import TARGETS

        unpermute = TARGETS["h100"].implementations["unpermute"]
    exchange = Exchange(world, two_hop, unpermute=unpermute)
    way = Way.prepare(exchange, every[me], GENEROUS)
    for early in (False, True):
        if early:
            assert isinstance(way.call, Dispatch)
            way.call.start()
        way.call()
    expected = lockstep.dispatch_ranks(every, ranks_per_node=local, ranks=ranks, experts=EXPERTS)
    count = len(expected[me][0])
    for got, right, name in zip(way.outputs[:3], expected[me], ("rows", "row_experts", "row_p"), strict=False):
        same(got[:count], right, name)
    same(way.handle, expected[me][3], "handle")
    assert (way.outputs[1][count:] == -1).all() and (way.outputs[2][count:] == 0).all()
    assert exchange.rounds(way.handle) == 1 and exchange.bytes > 0

    payload = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    handles = [r[3] for r in expected]
    dy = [(x.double() * 3).to(payload) for x, _, _ in every]
    again = node("dispatch_again", (*way.ranks, ("rows", "D")), "dy_rows")
    out = torch.empty(GENEROUS, COLS, dtype=payload, device=world.device)
    exchange.prepare(again, (dy[me], way.handle), (out,))()
    right = lockstep.dispatch_again_ranks(list(zip(dy, handles, strict=True)), ranks_per_node=local)[me][0]
    same(out[:count], right, "dispatch_again")

    results = []
    for r in range(ranks):
        generator = torch.Generator().manual_seed(r)
        y = torch.randn(GENEROUS, COLS, generator=generator, dtype=torch.float64).to(payload).to(world.device)
        results.append((y, handles[r]))
    back = torch.empty(*TOKENS, COLS, dtype=payload, device=world.device)
    exchange.prepare(node("combine", way.ranks, "y"), (results[me][0], way.handle), (back,))()
    right = lockstep.combine_ranks(results, ranks_per_node=local, ranks=ranks)[me][0]
    same(back, right, "combine")


@case
def flat_one_node(world: World) -> None:
    for kind in ("uneven", "one", "empty", "own"):
        exchanged(nodes_of(world, world.size), False, kind, torch.float32)


@case
def flat_and_two_hop_over_nodes(world: World) -> None:
    for kind in ("uneven", "one", "empty", "own"):
        for two_hop in (False, True):
            exchanged(world, two_hop, kind, torch.bfloat16)


@case
def one_rank_on_each_node(world: World) -> None:
    exchanged(nodes_of(world, 1), True, "uneven", torch.float32)


@case
def sums_are_bound_once(world: World) -> None:
    """However often rows come back, straight from ranks each on a node of its own."""
    from dsv3c.targets import TARGETS

    alone = nodes_of(world, 1)
    target = TARGETS["cpu" if world.device.type == "cpu" else "h100"]
    exchange = Exchange(alone, False, unpermute=target.implementations["unpermute"])
    every = draw(alone, "uneven", torch.float32)
    way = Way.prepare(exchange, every[alone.ep_index], GENEROUS)
    rows, back = torch.ones(GENEROUS, COLS, device=world.device), torch.empty(*TOKENS, COLS, device=world.device)
    combine = exchange.prepare(node("combine", way.ranks, "y"), (rows, way.handle), (back,))
    way.call()
    found = []
    for _ in range(3):
        combine()
        found.append(len(exchange._sums))
    assert found == [found[0]] * 3 and exchange.room.bytes >= rows.nbytes
    same(back.mean(-1), (way.handle >= 0).sum(-1).float(), "combine")


@case
def every_payload(world: World) -> None:
    for dtype in (torch.float64, torch.float8_e4m3fn, torch.float16):
        for two_hop in (False, True):
            exchanged(world, two_hop, "uneven", dtype)


@case
def sums_by_the_target(world: World) -> None:
    if world.device.type == "cuda":
        for dtype in (torch.bfloat16, torch.float32):
            for two_hop in (False, True):
                exchanged(world, two_hop, "uneven", dtype, fast=True)


@case
def several_expert_groups(world: World) -> None:
    if world.size == 4:
        exchanged(nodes_of(world, 4, Mesh(pp=2, dp=2, ep=2)), False, "uneven", torch.float32)


def experts_at_work(rows: Tensors, again: torch.Tensor | None, scales: torch.Tensor) -> torch.Tensor:
    """A stand-in for a rank's experts: each row is scaled by what its experts and weights say; padding is no number."""
    x, e, p = rows
    factor = torch.where(e >= 0, scales[e.clamp(min=0).long()] * p.to(x.dtype), 0).sum(-1, keepdim=True)
    y = x * factor if again is None else x * factor * again
    return torch.where((e >= 0).any(-1, keepdim=True), y, float("nan"))


def computed(exchange: Exchange, inputs: Tensors, capacity: int, limit: Callable[[torch.Tensor], None]
             ) -> tuple[int, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Rounds, a forward result, and a backward one, with the plan's memory overwritten as soon as it may be."""
    world = exchange.world
    way = Way.prepare(exchange, inputs, capacity)
    x = way.inputs[0]
    scales = (torch.arange(EXPERTS // exchange.ranks, device=x.device) + 1 + world.ep_index).to(x.dtype)
    dy = x * 0.5
    dy_rows = torch.empty(capacity, COLS, dtype=x.dtype, device=x.device)
    y_rows = torch.empty_like(dy_rows)
    y, dx = torch.empty_like(x), torch.empty_like(x)
    again = node("dispatch_again", (*way.ranks, ("rows", "D")), "dy_rows")
    forward, backward = node("combine", way.ranks, "y"), node("combine", way.ranks, "dx")
    send_again = exchange.prepare(again, (dy, way.handle), (dy_rows,))
    collect = exchange.prepare(forward, (y_rows, way.handle), (y,))
    later_rows = exchange.bind_round(way.node, way.inputs, way.outputs)
    later_again = exchange.bind_round(again, (dy, way.handle), (dy_rows,))
    later_y = exchange.bind_round(forward, (y_rows, way.handle), (y,))
    later_dx = exchange.bind_round(backward, (y_rows, way.handle), (dx,))

    way.call()
    rounds = exchange.rounds(way.handle)
    if rounds > 1:
        for t in way.inputs:
            t.view(torch.uint8).fill_(0x7F)
    for c in range(rounds):
        if c:
            later_rows(c)
        limit(way.outputs[1])
        y_rows.copy_(experts_at_work(way.outputs[:3], None, scales))
        later_y(c) if c else collect()
        if c + 1 < rounds:
            y.fill_(float("nan"))
    result = y.clone()
    for c in range(rounds):
        if rounds > 1:
            later_rows(c)
        later_again(c) if c else send_again()
        if rounds > 1 and not c:
            dy.fill_(float("nan"))
        y_rows.copy_(experts_at_work(way.outputs[:3], dy_rows, scales))
        later_dx(c)
    assert exchange.rounds(way.handle) == rounds
    exchange.release(way.handle)
    return rounds, result, dx


@case
def overflow_in_rounds(world: World) -> None:
    """More rows than the buffers hold: the same bits, in several rounds."""
    for kind, capacity in (("uneven", 32), ("one", 16), ("own", 20)):
        inputs = draw(world, kind, torch.float32)[world.ep_index]
        whole = computed(Exchange(world, False), inputs, GENEROUS, lambda e: None)
        assert whole[0] == 1 and whole[1].isfinite().all() and whole[2].isfinite().all()
        for two_hop in (False, True):
            rounds, y, dx = computed(Exchange(world, two_hop), inputs, capacity, lambda e: None)
            assert rounds > 1 and rounds & (rounds - 1) == 0
            same(y, whole[1], f"{kind}: result in {rounds} rounds")
            same(dx, whole[2], f"{kind}: gradient in {rounds} rounds")


@case
def overflow_of_sorted_rows(world: World) -> None:
    align, sorted_rows, each = 4, 48, EXPERTS // world.mesh.ep

    def limit(e: torch.Tensor) -> None:
        counts = torch.bincount(e[e >= 0].long(), minlength=each)
        assert int((-(-counts // align) * align).sum()) <= sorted_rows

    inputs = draw(world, "one", torch.float64)[world.ep_index]
    whole = computed(Exchange(world, False), inputs, GENEROUS, lambda e: None)
    rounds, y, dx = computed(Exchange(world, True, sorted_rows, align), inputs, GENEROUS, limit)
    assert rounds > 1
    same(y, whole[1], "result")
    same(dx, whole[2], "gradient")


@case
def routes_are_made_anew(world: World) -> None:
    """One handle, one dispatch after another: with and without overflow."""
    kinds = ("own", "one", "own")
    exchange = Exchange(world, True)
    every = {kind: draw(world, kind, torch.float32) for kind in kinds}
    way = Way.prepare(exchange, every["own"][world.ep_index], 40)
    for kind, overflows in zip(kinds, (False, True, False), strict=True):
        for t, new in zip(way.inputs, every[kind][world.ep_index], strict=True):
            t.copy_(new)
        way.call()
        assert (exchange.rounds(way.handle) > 1) == overflows
    expected = lockstep.dispatch_ranks(every["own"], ranks_per_node=world.local_ranks, ranks=world.mesh.ep,
                                       experts=EXPERTS)[world.ep_index]  # fmt: skip
    same(way.outputs[0][: len(expected[0])], expected[0], "rows")


@case
def hopeless_capacity(world: World) -> None:
    inputs = draw(world, "one", torch.float32)[world.ep_index]
    way = Way.prepare(Exchange(world, True), inputs, world.mesh.ep - 1)
    with pytest.raises(WorkError, match="larger --expert-headroom"):
        way.call()


# ---- collectives, channels, agreement --------------------------------------------------------------------------------


@case
def shards(world: World) -> None:
    everyone = world.group(tuple(range(world.size)))
    for dtype, chunk in ((torch.float32, 64), (torch.float32, 1 << 20), (torch.float64, 200)):
        count = 37 * world.size
        flats = [torch.randn(count, generator=torch.Generator().manual_seed(r), dtype=dtype) for r in range(world.size)]
        mine = slice(37 * world.rank, 37 * (world.rank + 1))
        flat, out = flats[world.rank].to(world.device), torch.empty(37, dtype=dtype, device=world.device)
        exchange_shards(flat, out, everyone, chunk_bytes=chunk)
        total = flats[0].clone()
        for other in flats[1:]:
            total += other
        same(out.cpu(), total[mine], "the sum of shards, in the order of ranks")
        room = torch.full((1 << 10,), 0xFF, dtype=torch.uint8, device=world.device)
        exchange_shards(flat, flat[mine], everyone, chunk_bytes=chunk, room=room)
        assert (room != 0xFF).any() == (chunk < 1 << 20), "as large as it must be, or not used"
        same(flat[mine].cpu(), total[mine], "the sum in place")
        for shard in (out, flat[mine]):
            gather_shards(flat, shard, everyone)
            same(flat.cpu(), total, "all shards")


@case
def channels(world: World) -> None:
    """Both stages send before they receive, messages cross, and each channel keeps its own order."""
    if world.size % 2:
        return
    half = world.size // 2
    pipeline = nodes_of(world, 2, Mesh(pp=2, dp=half, ep=half))
    peer = 1 - pipeline.pp_index
    there, back = (pipeline.channel(n) for n in ("f0", "b0"))
    second = pipeline.channel("f1" if peer else "b1")
    ahead: list[Pending] = []

    def message(sender: int, number: int) -> Sequence[torch.Tensor]:
        base = torch.full((300, 70), float(10 * sender + number), device=world.device)
        return base, base[:, :3].to(torch.float8_e4m3fn).contiguous(), base[:0]

    out, into = (there, back) if peer else (back, there)
    got = [[torch.zeros_like(t) for t in message(peer, i)] for i in range(4)]
    for i in range(2):
        ahead.append(into.recv(got[i], peer))
    sent = [out.send(message(pipeline.pp_index, i), peer) for i in range(4)]
    for i in range(2, 4):
        ahead.append(into.recv(got[i], peer))
    for pending in (*ahead, *sent):
        pending.wait()
    for i in range(4):
        for t, right in zip(got[i], message(peer, i), strict=True):
            same(t, right, f"message {i}")
    assert second.pairs[peer].handle is not there.pairs[peer].handle


@case
def texts(world: World) -> None:
    assert world.share("é" * world.rank) == ["é" * r for r in range(world.size)]


@case
def agreement(world: World) -> None:
    """A plan or a version that differs on one rank is refused on all."""
    last = world.rank == world.size - 1
    for name, plan, code, text in (
        ("a", "other" if last else "plan", "code", f"rank {world.size - 1} has another plan than rank 0"),
        ("b", "plan", "other" if last else "code", f"rank {world.size - 1} runs another version of dsv3c"),
    ):
        with pytest.raises(InputError, match=text):
            assert world.store is not None
            _agree(PrefixStore(name, world.store), world.rank, world.size, plan, code)


@case
def failure_is_told(world: World) -> None:
    assert world.failure() is None
    world.barrier()
    if world.rank == 1:
        world.fail("rank 1, step 3: out of paper")
    world.barrier()
    assert world.failure() == "rank 1, step 3: out of paper"
