"""What executing is made of: planned memory, prepared calls, and a list of them that can be run, recorded and timed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from dsv3c.arena import SequenceLayout
from dsv3c.errors import WorkError
from dsv3c.ir import Node, Phase, Value
from dsv3c.tensors import torch_dtype

PROFILE_HEAD_START = 200_000_000
"""Cycles, about a tenth of a second, that a GPU waits while the calls of a profile are queued."""

Call = Callable[[], None]
Prepare = Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], Call]


@dataclass
class Memory:
    """One block of bytes, handed out as typed tensors at planned offsets."""

    block: torch.Tensor

    @classmethod
    def allocate(cls, size: int, device: str) -> Memory:
        """Raises WorkError if the device has not that much left."""
        try:
            return cls(torch.empty(max(size, 1), dtype=torch.uint8, device=device))
        except torch.cuda.OutOfMemoryError as error:
            free = torch.cuda.mem_get_info()[0] / 2**30
            raise WorkError(
                f"the plan needs {size / 2**30:.1f} GiB more for activations and the GPU has {free:.1f} GiB free; "
                "compile with a smaller --micro-batch or --seq"
            ) from error

    def tensor(self, offset: int, v: Value, sizes: Mapping[str, int]) -> torch.Tensor:
        """The tensor of type `v.type` that begins at `offset`."""
        size = v.type.bytes(sizes)
        return self.block[offset : offset + size].view(torch_dtype(v.type.dtype)).view(v.type.bound(sizes))


@dataclass
class Step:
    """One prepared call and where it comes from: the layer, which of its phases, and the node with its place there;
    `outputs` is what it writes."""

    call: Call
    layer: str
    node: Node
    phase: Phase = Phase.F
    index: int = 0
    outputs: tuple[torch.Tensor, ...] = ()


@dataclass
class Runner:
    """A sequence bound to tensors. `values` holds what layers hand on; results stay valid until the next run.

    `bindings`: for each layer and phase the tensor of every value of its graph.
    """

    first: list[Step] = field(default_factory=list)
    again: list[Step] = field(default_factory=list)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    taps: dict[str, torch.Tensor] = field(default_factory=dict)
    bindings: dict[tuple[str, Phase], dict[str, torch.Tensor]] = field(default_factory=dict)
    layout: SequenceLayout | None = None

    def __post_init__(self) -> None:
        self._first: list[Call] = []
        self._again: list[Call] = []
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    def finish(self) -> Runner:
        self._first = [s.call for s in self.first]
        self._again = [s.call for s in self.again]
        return self

    def run(self, accumulate: bool = False) -> None:
        """Execute once; weight gradients are overwritten, or with `accumulate` added to."""
        graph = self._graphs.get(accumulate)
        if graph is not None:
            graph.replay()
            return
        with torch.inference_mode():  # no gradient is ever asked of torch here, and its calls are cheaper so
            for call in self._again if accumulate else self._first:
                call()

    def capture(self, accumulates: bool = True) -> None:
        """Record `run`, and with `accumulates` also `run(accumulate=True)`, as CUDA graphs that `run` then replays.

        Does nothing a second time, or without a GPU. The runner must have run before: what is made ready at the first
        call may not be recorded.
        """
        if self._graphs or not self._on_gpu():
            return
        for accumulate, calls in ((False, self._first), (True, self._again))[: 1 + accumulates]:
            pool = self._graphs[False].pool() if self._graphs else None
            graph = torch.cuda.CUDAGraph()
            with torch.inference_mode(), torch.cuda.graph(graph, pool=pool):
                for call in calls:
                    call()
            self._graphs[accumulate] = graph

    def _on_gpu(self) -> bool:
        return any(t.is_cuda for t in self.values.values())

    def profile(self) -> dict[tuple[str, str], float]:
        """Execute once and give seconds by (op, path)."""
        spent: dict[tuple[str, str], float] = {}
        for step, seconds in zip(self.first, self._timed(), strict=True):
            name = str(step.node.attr("graph")) if step.node.op == "call" else step.node.op
            key = (name, f"{step.node.phase.value}:{step.node.path}")
            spent[key] = spent.get(key, 0.0) + seconds
        return spent

    @torch.inference_mode()
    def _timed(self) -> list[float]:
        """Seconds of each call of `first`: on a GPU by its own clock, work queued ahead so that it never waits."""
        if not self._on_gpu():
            marks = [time.perf_counter()]
            for step in self.first:
                step.call()
                marks.append(time.perf_counter())
            return [b - a for a, b in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(self.first) + 1)]
        torch.cuda._sleep(PROFILE_HEAD_START)
        events[0].record()
        for step, event in zip(self.first, events[1:], strict=True):
            step.call()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
