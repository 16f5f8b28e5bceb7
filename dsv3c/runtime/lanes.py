"""Where prepared calls run: one stream for computation, one for communication among experts, and a record of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

from dsv3c.files import write_bytes
from dsv3c.ir import Phase
from dsv3c.runtime.stages import Part

COMPUTE, COMMUNICATION = "compute", "communication"

Chain: TypeAlias = tuple[int, bool]
"""Parts that depend on each other in their order: the number of the action, and whether they are weight gradients."""


@dataclass(frozen=True, slots=True)
class Span:
    """What ran on a lane of this rank; seconds since the record began."""

    lane: str
    name: str
    cell: str
    start: float
    end: float


@dataclass
class Lanes:
    """Runs the parts of a cell in order. On a GPU those that communicate go to a stream of their own, and a chain of
    parts waits where it changes stream; on a CPU one runs after the other.

    Where a part begins with a call that has `start`, what it starts is given to the device and the call itself, for
    which the host must wait, comes as late as order allows: what is computed meanwhile is queued first.

    `recording`: whether spans are kept. `serial`: everything on one stream, to see what each part takes alone.
    """

    device: str
    recording: bool = False
    serial: bool = False
    spans: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._gpu = self.device.startswith("cuda")
        self._marks: list[tuple[str, str, str, torch.cuda.Event, torch.cuda.Event]] = []
        self._begin = time.perf_counter()
        self._steps: list[int] = []  # how many spans there were at the end of each of the last steps
        if self._gpu:
            self._communication = torch.cuda.Stream(priority=-1)
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()

    @torch.inference_mode()
    def run(self, cell: str, parts: Iterable[tuple[int, Part]]) -> None:
        """Run `parts`, each with the number of the chain that it belongs to."""
        if self._gpu:
            self._run_on_gpu(cell, parts)
            return
        for _, part in parts:
            start = time.perf_counter()
            for call in part.calls:
                call()
            if part.further is not None and part.further.needed():
                part.further.run()
            if self.recording:
                lane = COMMUNICATION if part.comm else COMPUTE
                now = time.perf_counter()
                self.spans.append(Span(lane, _title(part), cell, start - self._begin, now - self._begin))

    def _run_on_gpu(self, cell: str, parts: Iterable[tuple[int, Part]]) -> None:
        compute = torch.cuda.current_stream()
        other = compute if self.serial else self._communication
        last: dict[Chain, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}
        waiting: tuple[Chain, Part, torch.cuda.Event | None] | None = None

        def finish(chain: Chain, part: Part, start: torch.cuda.Event | None) -> None:
            stream, beside = (other, compute) if part.comm else (compute, other)
            with torch.cuda.stream(stream):
                for call in part.calls:
                    call()
                if part.further is not None and part.further.needed():
                    stream.wait_stream(beside)
                    part.further.run()
                    beside.wait_stream(stream)
                end = torch.cuda.Event(enable_timing=self.recording)
                end.record(stream)
            if start is not None:
                self._marks.append((COMMUNICATION if part.comm else COMPUTE, _title(part), cell, start, end))
            last[chain] = (stream, end)

        for number, part in parts:
            chain = number, part.phase is Phase.W  # W reads what B computed; it waits for no exchange of gradients
            if waiting is not None and (part.comm or chain == waiting[0]):
                finish(*waiting)
                waiting = None
            stream = other if part.comm else compute
            before = last.get(chain)
            if before is None and part.comm:
                stream.wait_stream(compute)
            elif before is not None and before[0] is not stream:
                stream.wait_event(before[1])
            with torch.cuda.stream(stream):
                start = self._event() if self.recording else None
                begin = getattr(part.calls[0], "start", None) if part.comm and part.calls else None
                if begin is not None:
                    begin()
            if begin is None or self.serial:
                finish(chain, part, start)
            else:
                waiting = chain, part, start
        if waiting is not None:
            finish(*waiting)
        compute.wait_stream(other)

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def keep(self, steps: int) -> None:
        """A step ended: forget what lies before the last `steps` of these calls."""
        self.finish()
        self._steps = [*self._steps[-steps:], len(self.spans)]
        forgotten = self._steps[0] if len(self._steps) > steps else 0
        del self.spans[:forgotten]
        self._steps = [n - forgotten for n in self._steps]

    def finish(self) -> list[Span]:
        """All spans so far, in seconds; on a GPU this waits for it."""
        if self._marks:
            torch.cuda.synchronize()
            for lane, name, cell, start, end in self._marks:
                at = self._start.elapsed_time(start) / 1e3
                self.spans.append(Span(lane, name, cell, at, at + start.elapsed_time(end) / 1e3))
            self._marks.clear()
        return self.spans


def _title(part: Part) -> str:
    return f"{part.phase.value} {part.layer} {part.name}"


def write_trace(path: str | Path, spans: Iterable[Span], rank: int) -> None:
    """A Chrome trace of one rank, one track per lane. Raises WorkError if it cannot be written."""
    lanes = {COMPUTE: 0, COMMUNICATION: 1}
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}},
        *({"ph": "M", "name": "thread_name", "pid": rank, "tid": i, "args": {"name": n}} for n, i in lanes.items()),
    ]
    for s in spans:
        events.append({"ph": "X", "pid": rank, "tid": lanes.setdefault(s.lane, len(lanes)), "name": s.name,
                       "cat": s.lane, "ts": round(s.start * 1e6, 3), "dur": round((s.end - s.start) * 1e6, 3),
                       "args": {"cell": s.cell}})  # fmt: skip
    write_bytes(path, json.dumps({"traceEvents": events}).encode())
