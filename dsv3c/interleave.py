"""Two layers at once on two streams: which order of their segments hides most communication behind computation.

A forward layer and a backward layer, of different micro-batches, depend on each other in nothing, so the segments of
one can be computed while the other communicates. All orders are compared, under a cost model, in a row of such pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv3c.ir import Graph, Phase
from dsv3c.lazy import lazy
from dsv3c.segments import segments

if TYPE_CHECKING:
    import numpy

    from dsv3c.costs import Times
else:
    numpy = lazy("numpy")

FORWARD, BACKWARD = "forward", "backward"

MOST_ORDERS = 20_000
"""So many orders of one pair are compared at most; a pair of the report's layers has 1008."""

CLOSE = 1e-9
"""Orders whose times differ by less than this share are equally good: the first of them is taken."""


@dataclass(frozen=True, slots=True)
class Step:
    """One segment in the order of a pair: of the `forward` or the `backward` layer, in which phase, its name."""

    which: str
    phase: Phase
    segment: str

    def __str__(self) -> str:
        return f"{self.segment}({self.phase.value})"


@dataclass(frozen=True, slots=True)
class Work:
    """A segment to be placed: how long it takes, on which stream, and which others of the pair must be done before."""

    step: Step
    seconds: float
    comm: bool
    needs: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Placed:
    """A segment with its start and end, in seconds from the start of its pair."""

    work: Work
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class PairOrder:
    """The order in which the segments of two kinds of layer are started, each on the stream of its kind.

    `forward`, `backward`: the layers' graphs, without `_F` and `_B`. `seconds`: of one pair in a row of them;
    `compute_seconds`: of all its computation on all units; `communication_seconds`: of all its exchanges;
    `hidden`: the share of these behind which something is computed.
    """

    forward: str
    backward: str
    steps: tuple[Step, ...]
    seconds: float
    compute_seconds: float
    communication_seconds: float
    hidden: float


@dataclass(frozen=True)
class Overlap:
    """How every pair of layers overlaps, with `communication_units` SMs for communication and the rest to compute."""

    communication_units: int
    pairs: tuple[PairOrder, ...]

    @functools.cached_property
    def _orders(self) -> Mapping[tuple[str, str], PairOrder]:
        return {(p.forward, p.backward): p for p in self.pairs}

    def order(self, forward: str, backward: str) -> PairOrder | None:
        """The order of these two kinds of layer; None if nothing is gained by overlapping them."""
        return self._orders.get((forward, backward))


def works(times: Times, graphs: Mapping[str, Graph], forward: str, backward: str) -> tuple[Work, ...]:
    """The segments of a forward layer and a backward layer: F, B, W, each in its own order.

    F and B are chains; a segment of W needs the segments of B whose values it reads. A graph that does not exist has
    no segments.
    """
    found: list[Work] = []
    makers: dict[str, Step] = {}
    for which, phase in ((FORWARD, Phase.F), (BACKWARD, Phase.B), (BACKWARD, Phase.W)):
        graph = graphs.get(f"{forward if which == FORWARD else backward}_{phase.value}")
        last: tuple[Step, ...] = ()
        for segment in segments(graph, times.registry) if graph else ():
            assert graph is not None
            step = Step(which, phase, segment.name)
            nodes = [graph.nodes[i] for i in segment.nodes]
            if phase is Phase.W:
                given = {v.name for v in graph.inputs}
                read = (v.name for n in nodes for v in n.inputs if v.name in given)
                last = tuple(dict.fromkeys(makers[name] for name in read if name in makers))
            if phase is Phase.B:
                makers.update((v.name, step) for n in nodes for v in n.outputs)
            found.append(Work(step, times.segment(graph, segment), segment.comm, last))
            last = (step,)
    return tuple(found)


# ---- one order -------------------------------------------------------------------------------------------------------


def chain(orders: Iterable[Sequence[Work]]) -> list[Placed]:
    """When each segment of a row of pairs runs if all are started in these orders, on two streams that keep them.

    The layers of the next pair follow those of this one: their first segments wait for the last ones of F and B.
    """
    free = {True: 0.0, False: 0.0}
    behind = {FORWARD: 0.0, BACKWARD: 0.0}
    found: list[Placed] = []
    for order in orders:
        ends: dict[Step, float] = {}
        for work in order:
            ready = max((ends[s] for s in work.needs), default=behind[work.step.which])
            start = max(free[work.comm], ready)
            ends[work.step] = free[work.comm] = start + work.seconds
            found.append(Placed(work, start, start + work.seconds))
        for step, end in ends.items():
            if step.phase is not Phase.W:
                behind[step.which] = max(behind[step.which], end)
    return found


def placed(order: Sequence[Work], rows: int = 1) -> list[Placed]:
    """When each segment runs in a row of so many equal pairs; see `chain`."""
    return chain([order] * rows)


def span(order: Sequence[Work], rows: int = 1) -> float:
    """Seconds from the first start to the last end."""
    return max((p.end for p in placed(order, rows)), default=0.0)


# ---- all orders ------------------------------------------------------------------------------------------------------


def best_order(options: Sequence[Sequence[Work]], rows: int) -> tuple[int, tuple[Work, ...], float]:
    """Of several options for the times of the same works, and all orders, the quickest: its option, order and seconds.

    Compares every order that each stream can keep (see MOST_ORDERS), in a row of `rows` pairs. Among equals it takes
    the first option and the first order.
    """
    first = options[0]
    index = {w.step: i for i, w in enumerate(first)}
    shape = tuple((w.comm, tuple(sorted(index[s] for s in w.needs))) for w in first)
    orders = numpy.array(_orders(shape), dtype=numpy.int64).reshape(-1, len(first))
    spans = _spans(orders, first, index, numpy.array([[w.seconds for w in o] for o in options]), rows)
    good = spans <= spans.min() * (1 + CLOSE)
    option, row = (int(i) for i in numpy.unravel_index(int(good.argmax()), good.shape))
    order = [options[option][i] for i in orders[row]]
    starts = {p.work.step: p.start for p in placed(order)}
    order.sort(key=lambda w: starts[w.step])
    return option, tuple(order), float(spans[option, row]) / rows


def _spans(orders: numpy.ndarray, works: Sequence[Work], index: Mapping[Step, int], seconds: numpy.ndarray,
           rows: int) -> numpy.ndarray:  # fmt: skip
    """`span` of each option (row of `seconds`) and each order at once: [options, orders]."""
    size = (len(seconds), len(orders))
    most = max((len(w.needs) for w in works), default=0)
    pad = len(works)
    needs = numpy.full((pad, max(1, most)), pad)
    for i, w in enumerate(works):
        needs[i, : len(w.needs)] = [index[s] for s in w.needs]
    comm = numpy.array([w.comm for w in works], dtype=bool)
    which = numpy.array([w.step.which == BACKWARD for w in works])
    behind = numpy.zeros((2, *size))
    free = numpy.zeros((2, *size))
    every = numpy.arange(len(orders))
    for _ in range(rows):
        ends = numpy.zeros((*size, pad + 1))
        for column in orders.T:
            ready = ends[:, every[:, None], needs[column]].max(-1)
            alone = (needs[column] == pad).all(-1)
            ready = numpy.where(alone, numpy.where(which[column], behind[1], behind[0]), ready)
            stream = comm[column]
            end = numpy.maximum(numpy.where(stream, free[1], free[0]), ready) + seconds[:, column]
            free[1] = numpy.where(stream, end, free[1])
            free[0] = numpy.where(stream, free[0], end)
            ends[:, every, column] = end
        for side, phase in ((0, Phase.F), (1, Phase.B)):
            mine = [i for i, w in enumerate(works) if w.step.phase is phase]
            if mine:
                behind[side] = ends[:, :, mine].max(-1)
    last: numpy.ndarray = free.max(0)
    return last


@functools.cache
def _orders(shape: tuple[tuple[bool, tuple[int, ...]], ...]) -> list[tuple[int, ...]]:
    """Every pair of orders of the two streams that does not block, each as one order in which to start the works."""
    found: list[tuple[int, ...]] = []
    before = _before(shape)
    compute = list(_extensions([i for i, (comm, _) in enumerate(shape) if not comm], before))
    for exchanges in _extensions([i for i, (comm, _) in enumerate(shape) if comm], before):
        for order in compute:
            merged = _merged(order, exchanges, shape)
            if merged is not None:
                found.append(merged)
                if len(found) == MOST_ORDERS:
                    return found
    return found


def _before(shape: Sequence[tuple[bool, tuple[int, ...]]]) -> list[frozenset[int]]:
    """All works, direct or not, that each one needs."""
    found: list[frozenset[int]] = []
    for _, needs in shape:
        found.append(frozenset(needs).union(*(found[i] for i in needs)))
    return found


def _extensions(items: list[int], before: Sequence[frozenset[int]]) -> Iterator[tuple[int, ...]]:
    """Every order of `items` in which each stands after those it needs."""
    if not items:
        yield ()
    for i in items:
        if not before[i].intersection(items):
            for rest in _extensions([j for j in items if j != i], before):
                yield (i, *rest)


def _merged(compute: Sequence[int], exchanges: Sequence[int],
            shape: Sequence[tuple[bool, tuple[int, ...]]]) -> tuple[int, ...] | None:  # fmt: skip
    """Both streams in one order, an exchange as soon as it may start; None if they wait for each other."""
    done: list[int] = []
    left = [list(exchanges), list(compute)]
    while any(left):
        for stream in left:
            if stream and all(i in done for i in shape[stream[0]][1]):
                done.append(stream.pop(0))
                break
        else:
            return None
    return tuple(done)


# ---- what comes out --------------------------------------------------------------------------------------------------


def hidden(order: Sequence[Work], rows: int) -> float:
    """The share of the exchanges' time in a row of pairs in which something is computed; 1 if there is none."""
    found = placed(order, rows)
    computed = [(p.start, p.end) for p in found if not p.work.comm]
    sent = sum(p.work.seconds for p in found if p.work.comm)
    both = sum(max(0.0, min(p.end, end) - max(p.start, start))
               for p in found if p.work.comm for start, end in computed)  # fmt: skip
    return both / sent if sent else 1.0


def behind(order: Sequence[Work]) -> list[tuple[Step, tuple[Step, ...]]]:
    """For each exchange of a pair in the middle of a row, what is computed meanwhile, also of the pairs around it."""
    found = placed(order, 3)
    compute = [p for p in found if not p.work.comm]
    middle = found[len(order) : 2 * len(order)]
    return [
        (p.work.step, tuple(c.work.step for c in compute
                            if min(p.end, c.end) - max(p.start, c.start) > CLOSE * p.end))
        for p in middle if p.work.comm
    ]  # fmt: skip


def picture(order: Sequence[Work], width: int = 96) -> tuple[str, str]:
    """The two streams of a pair in the middle of a row as lines of text: computation, communication."""
    found = placed(order, 3)
    middle = found[len(order) : 2 * len(order)]
    start, end = min(p.start for p in middle), max(p.end for p in middle)
    lines = []
    for comm in (False, True):
        line = [" "] * (width + 1)
        for p in (p for p in found if p.work.comm is comm and p.end > start and p.start < end):
            left, right = (round((min(max(t, start), end) - start) / (end - start) * width) for t in (p.start, p.end))
            label = str(p.work.step)[: max(0, right - left - 1)]
            line[left:right] = list(("|" + label.ljust(right - left - 1, "-"))[: right - left])
            line[right] = "|"
        lines.append("".join(line).rstrip())
    return lines[0], lines[1]
