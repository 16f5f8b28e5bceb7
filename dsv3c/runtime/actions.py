"""Execute one rank's row of the schedule: receive, compute, send, in the plan's order and in no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from dsv3c.interleave import FORWARD, Step
from dsv3c.ir import Phase
from dsv3c.runtime.collectives import Channel, Pending
from dsv3c.runtime.lanes import Lanes
from dsv3c.runtime.stages import Chunk, Part, Stage
from dsv3c.schedule import Action, Cell, Schedule

Names: TypeAlias = tuple[str, ...]
Border: TypeAlias = tuple[tuple[Names, Names], tuple[Names, Names]]
"""What a stage receives and what it sends: each values for forward, and cotangents."""

Orders: TypeAlias = Mapping[tuple[str, str], tuple[Step, ...]]
"""For the kinds of a forward and a backward layer, the order of their segments."""

PHASES = {"F": (Phase.F,), "I": (Phase.B,), "W": (Phase.W,), "B": (Phase.B, Phase.W)}


LETTERS = 2
"""Messages of one stage and channel that may be under way at once. The verifier lets a rank go on after one."""


@dataclass
class Outbox:
    """Copies of what is being sent, so that a chunk is free again before the other rank took its values."""

    letters: list[tuple[Pending, list[torch.Tensor]]] = field(default_factory=list)

    def send(self, channel: Channel, values: list[torch.Tensor], peer: int) -> None:
        """Send copies of `values`; waits only for the last message but LETTERS."""
        if len(self.letters) < LETTERS:
            copies = [torch.empty_like(v) for v in values]
        else:
            pending, copies = self.letters.pop(0)
            pending.wait()
        for copy, value in zip(copies, values, strict=True):
            copy.copy_(value)
        self.letters.append((channel.send(copies, peer), copies))


@dataclass
class Actions:
    """One rank's part of a schedule.

    `orders`: how the segments of two layers that overlap are interleaved.
    `on_forward(stage, micro_batch, chunk)` is called once a chunk's forward values are there; `watch(cell index)`
    before each cell.
    """

    schedule: Schedule
    rank: int
    stages: Mapping[int, Stage]
    borders: Sequence[Border]
    channels: Mapping[str, Channel]
    lanes: Lanes
    orders: Orders
    on_forward: Callable[[int, int, Chunk], None]
    watch: Callable[[int], None]
    _outboxes: dict[tuple[str, int], Outbox] = field(default_factory=dict)
    _local: dict[tuple[str, int, int], list[torch.Tensor]] = field(default_factory=dict)
    _arriving: dict[Action, Pending] = field(default_factory=dict)
    _posted: int = 0

    def run(self, tokens: list[torch.Tensor]) -> None:
        """Execute the row once; `tokens`: [B, S] of each micro-batch."""
        row = self.schedule.rows[self.rank]
        self._posted = 0
        for index, cell in enumerate(row):
            self._post(row, index + 1)
            self._post(row, index + 2)
            self.watch(index)
            chunks = [self._begin(a, tokens) for a in cell]
            self.lanes.run(f"{'+'.join(map(str, cell))}", merged([(a, c) for a, c in zip(cell, chunks, strict=True)],
                                                                 self.orders))  # fmt: skip
            for action, chunk in zip(cell, chunks, strict=True):
                self._end(action, chunk)

    # ---- receiving -------------------------------------------------------------------------------------------------

    def _post(self, row: tuple[Cell, ...], end: int) -> None:
        """Post what cells up to `end` receive, in order, as far as there are chunks to receive into."""
        while self._posted < min(end, len(row)):
            cell = row[self._posted]
            if not all(a.kind != "F" or self.stages[a.stage].free for a in cell):
                return
            for action in cell:
                self._receive(action)
            self._posted += 1

    def _receive(self, action: Action) -> None:
        if action.kind == "W":
            return
        stage, forward = self.stages[action.stage], action.kind == "F"
        chunk = stage.take(action.micro_batch) if forward else stage.chunk(action.micro_batch)
        peer_stage = action.stage + (-1 if forward else 1)
        names = self.borders[action.stage][0][not forward]
        if not names or not 0 <= peer_stage < self.schedule.stages:
            return
        peer = self.schedule.rank_of(peer_stage, action.micro_batch)
        if peer != self.rank:
            channel = f"{'f' if forward else 'b'}{self.schedule.route_of(action.micro_batch)}"
            self._arriving[action] = self.channels[channel].recv([chunk.values[n] for n in names], peer)

    def _begin(self, action: Action, tokens: list[torch.Tensor]) -> Chunk:
        """The chunk of `action` with everything it reads in place."""
        chunk = self.stages[action.stage].chunk(action.micro_batch)
        if action.kind == "F" and "tokens" in chunk.values:
            chunk.values["tokens"].copy_(tokens[action.micro_batch])
        transfer = self._arriving.pop(action, None)
        if transfer is not None:
            transfer.wait()
        if action.kind != "W":
            forward = action.kind == "F"
            names = self.borders[action.stage][0][not forward]
            near = self._local.pop(("F" if forward else "B", action.stage, action.micro_batch), None)
            if near is not None:
                for name, source in zip(names, near, strict=True):
                    chunk.values[name].copy_(source)
        return chunk

    # ---- sending ---------------------------------------------------------------------------------------------------

    def _end(self, action: Action, chunk: Chunk) -> None:
        stage = self.stages[action.stage]
        if action.kind == "F":
            self.on_forward(action.stage, action.micro_batch, chunk)
        if action.kind != "W":
            self._send(action, chunk)
        if action.kind in "WB":
            stage.release(action.micro_batch)

    def _send(self, action: Action, chunk: Chunk) -> None:
        forward = action.kind == "F"
        peer_stage = action.stage + (1 if forward else -1)
        names = self.borders[action.stage][1][not forward]
        if not names or not 0 <= peer_stage < self.schedule.stages:
            return
        peer = self.schedule.rank_of(peer_stage, action.micro_batch)
        values = [chunk.values[n] for n in names]
        if peer == self.rank:
            self._local["F" if forward else "B", peer_stage, action.micro_batch] = values
        else:
            channel = f"{'f' if forward else 'b'}{self.schedule.route_of(action.micro_batch)}"
            box = self._outboxes.setdefault((channel, action.stage), Outbox())
            box.send(self.channels[channel], values, peer)


def merged(work: list[tuple[Action, Chunk]], orders: Orders) -> Iterator[tuple[int, Part]]:
    """The parts of a cell in order, each with the number of the action that it belongs to.

    A pair takes one layer of the forward action and one of the backward action at a time, as long as both have
    layers that communicate, and interleaves their segments as `orders` says; the rest follows one after the other.
    """
    if len(work) == 1:
        for part in alone(*work[0]):
            yield 0, part
        return
    (forward, f), (backward, b) = work
    ahead = _layers(tuple(alone(forward, f)))
    behind = _layers(tuple(alone(backward, b)))
    plain = [_split(ahead), _split(behind)]
    for side, (before, _, _) in enumerate(plain):
        for layer in before:
            yield from ((side, p) for p in layer)
    rows = [list(x[1]) for x in plain]
    while rows[0] and rows[1]:
        left, right = rows[0].pop(0), rows[1].pop(0)
        waiting: list[tuple[int, Part]] = [*((0, p) for p in left), *((1, p) for p in right)]
        for step in orders.get((left[0].kind, right[0].kind), ()):
            side = 0 if step.which == FORWARD else 1
            for item in [w for w in waiting if w[0] == side and w[1].phase is step.phase and w[1].name == step.segment]:
                waiting.remove(item)
                yield item
        yield from waiting
    for side in (0, 1):
        for layer in (*rows[side], *plain[side][2]):
            yield from ((side, p) for p in layer)


def alone(action: Action, chunk: Chunk) -> Iterator[Part]:
    """The parts of an action that overlaps with no other."""
    return (p for p in chunk.parts if p.phase in PHASES[action.kind])


def _layers(parts: tuple[Part, ...]) -> list[list[Part]]:
    """Parts by layer, in order of first appearance, so that W of a layer stands with its B."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(part.layer, []).append(part)
    return list(found.values())


def _split(layers: list[list[Part]]) -> tuple[list[list[Part]], list[list[Part]], list[list[Part]]]:
    """Layers before the first that communicates, those up to the last that does, and those after."""
    where = [i for i, layer in enumerate(layers) if any(p.comm for p in layer)]
    if not where:
        return layers, [], []
    return layers[: where[0]], layers[where[0] : where[-1] + 1], layers[where[-1] + 1 :]
