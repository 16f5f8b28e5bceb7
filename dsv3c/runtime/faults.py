"""What went wrong and where: the first value of a step that is no number, and memory that ran out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dsv3c.errors import WorkError
from dsv3c.ir import Phase
from dsv3c.plan import Memory
from dsv3c.runtime.runner import Runner

PIECE = 1 << 26
"""Numbers that are looked at together, so that looking takes little memory."""

_PHASES = {Phase.F: "forward", Phase.B: "backward", Phase.W: "weight gradient"}


@dataclass(frozen=True, slots=True)
class Fault:
    """A value that holds nan or +inf (`what`), the op that made it, where in the model, and in which phase."""

    what: str
    value: str
    op: str
    layer: str
    path: str
    phase: str

    def __str__(self) -> str:
        place = f"{self.layer}, {self.path or self.op} ({self.phase})"
        return f"{self.value} = {self.op}(...) in {place}, holds {self.what}"


def unusable(t: torch.Tensor) -> str | None:
    """`nan` or `inf` if floating-point `t` holds one, nan first; -inf is allowed, since masks are made of it."""
    if not t.is_floating_point():
        return None
    for piece in t.detach().reshape(-1).split(PIECE):
        if t.dtype is torch.float8_e4m3fn:  # it has no infinity, and nan is all ones
            if bool((piece.view(torch.uint8) & 0x7F).eq(0x7F).any()):
                return "nan"
        elif not bool((piece < float("inf")).all()):
            return "nan" if bool(piece.isnan().any()) else "inf"
    return None


def first_fault(runner: Runner) -> Fault | None:
    """Execute `runner` once, looking at what every call writes; gives the first value that is no number."""
    with torch.inference_mode():
        for step in runner.first:
            step.call()
            for v, t in zip(step.node.outputs, step.outputs, strict=False):
                what = unusable(t)
                if what is not None:
                    op = str(step.node.attr("graph")) if step.node.op == "call" else step.node.op
                    return Fault(what, v.name, op, step.layer, step.node.path, _PHASES[step.phase])
    return None


def first_unusable(tensors: Mapping[str, torch.Tensor]) -> tuple[str, str] | None:
    """The first tensor that holds nan or inf: its name and which."""
    for name, t in tensors.items():
        what = unusable(t)
        if what is not None:
            return name, what
    return None


def show_gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


@contextmanager
def memory_explained(plan: Memory) -> Iterator[None]:
    """Turn running out of GPU memory into WorkError: what was predicted, what is free, what to change."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise WorkError(f"the GPU ran out of memory: {_situation(plan)}") from error


def check_room(plan: Memory, device: str | None) -> None:
    """WorkError if the GPU has not the memory that the plan needs, beside what this process already holds."""
    if device != "cuda":
        return
    free, _ = torch.cuda.mem_get_info()
    if plan.peak_bytes > free + torch.cuda.memory_reserved():
        raise WorkError(f"the GPU has too little memory: {_situation(plan)}")


def _situation(plan: Memory) -> str:
    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved()
    return (
        f"the plan needs {show_gib(plan.peak_bytes)}, this process holds {show_gib(held)}, and {show_gib(free)} of "
        f"{show_gib(total)} are free; stop what else uses the GPU, or compile with a smaller --micro-batch or --seq"
    )
