"""Execute one rank's row of the schedule: receive, compute, send, in the plan's order and in no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from dsv3c.comm import channel_of
from dsv3c.interleave import FORWARD, Step
from dsv3c.ir import Phase
from dsv3c.runtime.collectives import Channel, Pending
from dsv3c.runtime.lanes import Lanes
from dsv3c.runtime.stages import Chunk, Part, Stages
from dsv3c.schedule import Action, Cell, Schedule

Names: TypeAlias = tuple[str, ...]
Border: TypeAlias = tuple[tuple[Names, Names], tuple[Names, Names]]
"""What a stage receives and what it sends: each values for forward, and cotangents."""

Orders: TypeAlias = Mapping[tuple[str, str], tuple[Step, ...]]
"""For the kinds of a forward and a backward layer, the order of their segments."""

PHASES = {"F": (Phase.F,), "I": (Phase.B,), "W": (Phase.W,), "B": (Phase.B, Phase.W)}


@dataclass
class Box:
    """Buffers for one message of a stage and channel, so that a chunk's memory is bound to no transfer. The verifier
    lets a rank go on after one."""

    pending: Pending = field(default_factory=Pending)
    tensors: list[torch.Tensor] = field(default_factory=list)

    def buffers(self, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors like these, once the last transfer of the box is done."""
        self.pending.wait()
        if not self.tensors:
            self.tensors = [torch.empty_like(t) for t in like]
        return self.tensors


@dataclass
class Actions:
    """One rank's part of a schedule.

    `orders`: how the segments of two layers that overlap are interleaved. `on_forward(stage, micro_batch, chunk)` is
    called once a chunk's forward values are there; `watch(cell index)` before each cell.
    """

    schedule: Schedule
    rank: int
    stages: Stages
    borders: Sequence[Border]
    channels: Mapping[str, Channel]
    lanes: Lanes
    orders: Orders
    on_forward: Callable[[int, int, Chunk], None]
    watch: Callable[[int], None]
    _out: dict[tuple[str, int], Box] = field(default_factory=dict)
    _in: dict[tuple[str, int], Box] = field(default_factory=dict)
    _arriving: dict[tuple[int, int, bool], tuple[Pending, list[torch.Tensor]]] = field(default_factory=dict)
    _posted: int = 0

    def run(self, tokens: list[torch.Tensor]) -> None:
        """Execute the row once; `tokens`: [B, S] of each micro-batch."""
        row = self.schedule.rows[self.rank]
        self._posted = 0
        for index, cell in enumerate(row):
            self.watch(index)
            self._post(row, index + 1)
            chunks = [self._begin(a, tokens) for a in cell]
            self._post(row, index + 2)  # what the next cell receives may come while this one computes
            work = list(zip(cell, chunks, strict=True))
            self.lanes.run("+".join(map(str, cell)), merged(work, self.orders))
            for action, chunk in work:
                if action.kind == "F":
                    self.on_forward(action.stage, action.micro_batch, chunk)
                if action.kind != "W":
                    self._send(action, chunk)

    # ---- receiving -------------------------------------------------------------------------------------------------

    def _post(self, row: tuple[Cell, ...], end: int) -> None:
        """Post what the cells before `end` receive, in order."""
        for cell in row[self._posted : end]:
            for action in cell:
                self._receive(action)
        self._posted = max(self._posted, min(end, len(row)))

    def _receive(self, action: Action) -> None:
        message = self._message(action, sends=False)
        if message is not None and message[1] != self.rank:
            (channel, peer), box = message, self._box(self._in, action, message[0])
            chunk = self.stages.chunk(action.stage, action.micro_batch)
            buffers = box.buffers([chunk.values[n] for n in self._names(action, sends=False)])
            box.pending = self.channels[channel].recv(buffers, peer)
            self._arriving[_key(action)] = box.pending, buffers

    def _begin(self, action: Action, tokens: list[torch.Tensor]) -> Chunk:
        """The chunk of `action` with everything it reads in place."""
        chunk = self.stages.chunk(action.stage, action.micro_batch)
        if action.kind == "F" and "tokens" in chunk.values:
            chunk.values["tokens"].copy_(tokens[action.micro_batch])
        if action.kind != "W" and _key(action) in self._arriving:
            pending, buffers = self._arriving.pop(_key(action))
            pending.wait()
            for name, buffer in zip(self._names(action, sends=False), buffers, strict=True):
                chunk.values[name].copy_(buffer)
        return chunk

    # ---- sending ---------------------------------------------------------------------------------------------------

    def _send(self, action: Action, chunk: Chunk) -> None:
        message = self._message(action, sends=True)
        if message is None:
            return
        channel, peer = message
        values = [chunk.values[n] for n in self._names(action, sends=True)]
        if peer == self.rank:  # the next stage lies here too
            step = 1 if action.kind == "F" else -1
            key = _key(replace(action, stage=action.stage + step))
            self._arriving[key] = Pending(), [v.clone() for v in values]
            return
        box = self._box(self._out, action, channel)
        copies = box.buffers(values)
        for copy, value in zip(copies, values, strict=True):
            copy.copy_(value)
        box.pending = self.channels[channel].send(copies, peer)

    # ---- who and what ----------------------------------------------------------------------------------------------

    def _names(self, action: Action, sends: bool) -> Names:
        """What an action receives or sends, by name."""
        return self.borders[action.stage][sends][action.kind != "F"]

    def _message(self, action: Action, sends: bool) -> tuple[str, int] | None:
        """The channel and the pipeline rank of what an action receives or sends; None if there is no such message."""
        forward = action.kind == "F"
        other = action.stage + (1 if forward is sends else -1)
        if action.kind == "W" or not 0 <= other < self.schedule.stages or not self._names(action, sends):
            return None
        peer = self.schedule.rank_of(other, action.micro_batch)
        way = (self.rank, peer) if sends else (peer, self.rank)
        return channel_of(forward, *way), peer

    def _box(self, boxes: dict[tuple[str, int], Box], action: Action, channel: str) -> Box:
        return boxes.setdefault((channel, action.stage), Box())


def _key(action: Action) -> tuple[int, int, bool]:
    """What a message is for: the stage, the micro-batch, and whether it goes forward."""
    return action.stage, action.micro_batch, action.kind == "F"


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
    """The parts of an action that overlaps with no other, layer by layer: what B makes for W lies in memory that the
    layers share."""
    for layer in _layers(tuple(p for p in chunk.parts if p.phase in PHASES[action.kind])):
        yield from layer


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
