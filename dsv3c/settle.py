"""Decide what a pipeline leaves open by trying: the price of memory at which a plan fits, and the kind of schedule."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dsv3c.capacity import capacity
from dsv3c.costs import Times
from dsv3c.ir import Graph
from dsv3c.passes._rank_memory import GraphLayouts
from dsv3c.passes.differentiate import JOINT
from dsv3c.passes.dualpipe import DualPipe
from dsv3c.passes.fuse import Fuse
from dsv3c.passes.overlap import Overlap
from dsv3c.passes.plan_buffers import PlanBuffers, plan_memory, rank_memory
from dsv3c.passes.recompute import Recompute
from dsv3c.rewrite import called, crosses_ranks
from dsv3c.schedules import AUTO
from dsv3c.state import Pass, State, TakeNote

LOWEST_PRICE, HIGHEST_PRICE, PRICE_STEPS = 2.0**-4, 2.0**10, 8
"""Milliseconds per GiB between which the price is searched, and by how many halvings of their ratio."""

SPARING, SPARING_STEPS, CHEAP = 4.0, 4, 1e-3
"""Where experts on other ranks may get more rows than balanced load brings, memory is spared beyond what must be: up to
so many times the price, in so many steps, as long as that adds less than this share to the time."""

OVERSIZE_PRICE = 3.6
"""The price where no price makes the plan fit and `--allow-oversize` wants one all the same: norms, up-projections
and activation functions are computed again and attention is not, which costs a few percent of the time."""


@dataclass
class Settler:
    """Gives passes the options that were left open, as `pipeline.run` reaches them: the price of `recompute`, and with
    it the kind of `dualpipe`, without which nothing is known of memory."""

    _kind: str | None = None
    _told: list[tuple[str, str, str]] = field(default_factory=list)

    def __call__(self, one: Pass, state: State, rest: tuple[Pass, ...], note: TakeNote) -> Pass:
        if isinstance(one, DualPipe) and self._kind is not None:
            for told in self._told:
                note(*told)
            return DualPipe(self._kind, one.ranks, one.micro_batches)
        planned = next((i for i, p in enumerate(rest) if isinstance(p, PlanBuffers)), None)
        if not isinstance(one, Recompute) or one.price is not None or state.job is None or planned is None:
            return one
        state = self._scheduled(state, rest[:planned])
        # What only orders nodes or says when things run does not change what must be kept.
        behind = tuple(p for p in rest[:planned] if not isinstance(p, DualPipe | Overlap))
        return Recompute(_price(state, behind, note))

    def _scheduled(self, state: State, behind: tuple[Pass, ...]) -> State:
        """The state with the schedule that the passes behind would make at the middle of all prices, if they do."""
        maker = next((i for i, p in enumerate(behind) if isinstance(p, DualPipe)), None)
        if maker is None:
            return state
        after = Recompute((LOWEST_PRICE * HIGHEST_PRICE) ** 0.5).run(state, _silent)
        for p in behind[:maker]:
            after = p.run(after, _silent)
        told: list[tuple[str, str, str]] = []
        after = behind[maker].run(after, lambda *note: told.append(note))
        one = behind[maker]
        assert isinstance(one, DualPipe) and after.schedule is not None
        if one.kind == AUTO and state.job is not None and state.job.schedule == AUTO:
            self._kind = after.schedule.kind
            self._told = [t for t in told if t[0] != "verified"]
        return state.but(schedule=after.schedule)


def _price(state: State, behind: tuple[Pass, ...], note: TakeNote) -> float:
    """The lowest price at which the plan that the passes `behind` make fits the machine, or a little more."""
    assert state.job is not None
    limit = state.machine.memory_bytes if state.machine else 0
    known: dict[tuple[Graph, ...], bool] = {}
    layouts: GraphLayouts = {}
    fused: dict[Graph, tuple[Graph, ...]] = {}

    def fits(price: float) -> bool:
        after = Recompute(price).run(state, _silent)
        choice = after.program.graphs
        if choice not in known:
            for p in behind:
                after = _fused(p, after, fused) if isinstance(p, Fuse) else p.run(after, _silent)
            known[choice] = plan_memory(after, both=False, known=layouts).peak.peak <= limit
        return known[choice]

    there = f"the {limit / 2**30:.1f} GiB of {state.job.target}"
    if state.mesh.world > 1 or rank_memory(state.program, (), state).peak <= limit:
        if fits(0.0):
            note("priced", "memory", f"0 ms per GiB: everything fits {there}")
            return 0.0
        if fits(HIGHEST_PRICE):
            low, high = LOWEST_PRICE, HIGHEST_PRICE
            for _ in range(PRICE_STEPS):
                middle = float(f"{(low * high) ** 0.5:.4g}")
                low, high = (low, middle) if fits(middle) else (middle, high)
            note("priced", "memory", f"{high:g} ms per GiB: the lowest price at which the plan fits {there}")
            more = _spared(high, state)
            if more > high:
                note("priced", "headroom", f"{more:g} ms per GiB: room for uneven experts that costs hardly any time")
            return more
    price = OVERSIZE_PRICE if state.job.allow_oversize else HIGHEST_PRICE
    note("priced", "memory", f"{price:g} ms per GiB, since at no price the plan fits {there}")
    return price


def _fused(fuse: Fuse, state: State, known: dict[Graph, tuple[Graph, ...]]) -> State:
    """What `fuse` makes of a program, with each graph (and the regions that it then calls) done once for all trials."""
    program = state.program
    if any(called(g) for g in program.graphs):
        return fuse.run(state, _silent)
    missing = tuple(g for g in program.graphs if g not in known)
    if missing:
        made = fuse.run(state.with_program(program.but(graphs=missing, sequences=(), weights=())), _silent).program
        for g in missing:
            new = made.graph(g.name)
            known[g] = (*map(made.graph, called(new)), new)
    graphs = {new.name: new for g in program.graphs for new in known[g]}
    return state.with_program(program.with_graphs(tuple(graphs.values())))


def _spared(price: float, state: State) -> float:
    """The highest price, up to SPARING times `price`, that adds less than CHEAP to the time of all layers; `price`
    itself if no rows are exchanged, whose number varies."""
    if state.machine is None or not capacity(state.program, state.sizes):
        return price
    times = Times.of(state.program, state.registry, state.sizes, state.machine)
    uses = Counter(y.graph + JOINT for s in state.program.sequences if s.losses for y in s.layers)

    def seconds(at: float) -> float:
        total = 0.0
        for g in Recompute(at).run(state, _silent).program.graphs:
            if g.name in uses:
                total += uses[g.name] * sum(times.seconds(n) for n in g.nodes if not crosses_ranks(n))
        return total

    limit = seconds(price) * (1 + CHEAP)
    tried = (float(f"{price * SPARING ** (k / SPARING_STEPS):.4g}") for k in range(SPARING_STEPS, 0, -1))
    return next((p for p in tried if seconds(p) <= limit), price)


def _silent(action: str, node: str, reason: str) -> None:
    pass
