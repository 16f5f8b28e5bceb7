"""The model's state on one device: FP32 master weights in flat groups, their gradients and BF16 moments."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from dsv3c.ir import DType, Program, Weight
from dsv3c.job import LANE
from dsv3c.models.checkpoint import Part
from dsv3c.tensors import torch_dtype

GROUPS = ("embedding", "head", "norm", "matrix")
"""Optimizer groups, each one flat buffer; `state` (router biases) is kept apart and never trained by gradient."""
BIAS, MASTER = "bias.", "master."
KINDS = (MASTER, "m.", "v.")
"""What stands before a weight's name in a checkpoint: a router bias, or a trained weight and its two moments."""


@dataclass
class Group:
    """One flat buffer [rows, LANE] of weights that share the optimizer settings `name`, or a shard of one, and what
    the optimizer keeps beside it."""

    name: str
    master: torch.Tensor
    gradient: torch.Tensor | None = None
    m: torch.Tensor | None = None
    v: torch.Tensor | None = None


class Trained(Protocol):
    """What the optimizer works on: flat groups, and router biases among `tensors`."""

    device: str

    @property
    def groups(self) -> Mapping[str, Group]: ...

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...

    @property
    def wide(self) -> DType: ...

    def start_optimizer(self) -> None: ...


class Weights:
    """All weights of a program. `tensors`: by name, views of the flat masters; router biases are their own tensors.

    Gradients and moments are allocated when first asked for, so that inference does not pay for them.
    """

    def __init__(self, program: Program, device: str) -> None:
        self.device = device
        self.program = program
        self.groups: dict[str, Group] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self._spans: dict[str, tuple[str, int, tuple[int, ...]]] = {}
        for group in GROUPS:
            members = [w for w in program.weights if w.group == group]
            if members:
                self._allocate(group, members)
        for w in program.weights:
            if w.group not in GROUPS:
                self.tensors[w.name] = torch.zeros(w.type.bound({}), dtype=torch_dtype(w.type.dtype), device=device)

    def _allocate(self, group: str, members: list[Weight]) -> None:
        length = 0
        for w in members:
            shape = w.type.bound({})
            self._spans[w.name] = (group, length, shape)
            length += -(-torch.Size(shape).numel() // LANE) * LANE
        dtype = torch_dtype(members[0].type.dtype)
        self.groups[group] = Group(group, torch.zeros(length // LANE, LANE, dtype=dtype, device=self.device))
        for w in members:
            self.tensors[w.name] = self._view(self.groups[group].master, w.name)

    def _view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        _, offset, shape = self._spans[name]
        return flat.view(-1)[offset : offset + torch.Size(shape).numel()].view(shape)

    @property
    def wide(self) -> DType:
        return self.program.weights[0].type.dtype

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradient of each trained weight, views of flat buffers; zero at first."""
        for group in self.groups.values():
            if group.gradient is None:
                group.gradient = torch.zeros_like(group.master)
        return {name: self._view(_there(self.groups[span[0]].gradient), name) for name, span in self._spans.items()}

    def start_optimizer(self) -> None:
        """Allocate the moments, zero: BF16 (report, section 3.3.3), float64 in a float64 program."""
        for group in self.groups.values():
            if group.m is None:
                moment = torch.float64 if self.wide is DType.f64 else torch.bfloat16
                group.m = torch.zeros_like(group.master, dtype=moment)
                group.v = torch.zeros_like(group.master, dtype=moment)

    def initialize(self, seed: int, parts: Callable[[str, tuple[int, ...]], tuple[Part, ...]]) -> None:
        """Fill with the initial distribution; each checkpoint tensor depends on (seed, its name) alone."""
        for w in self.program.weights:
            tensor = self.tensors[w.name]
            if w.init == "normal":
                for part in parts(w.name, tuple(tensor.shape)):
                    draw(tensor[part.index], seed, part.hf_name, w.std)
            else:
                tensor.fill_(1.0 if w.init == "ones" else 0.0)

    def state(self) -> Mapping[str, torch.Tensor]:
        """Everything that training changes, for checkpoints: each weight's master and moments, router biases."""
        self.start_optimizer()
        tensors = {BIAS + n: t for n, t in self.tensors.items() if n not in self._spans}
        for name, (key, _, _) in self._spans.items():
            group = self.groups[key]
            for prefix, flat in zip(KINDS, (group.master, _there(group.m), _there(group.v)), strict=True):
                tensors[prefix + name] = self._view(flat, name)
        return tensors


def draw(target: torch.Tensor, seed: int, hf_name: str, std: float) -> None:
    """Fill a tensor of the checkpoint with normal numbers that depend on (seed, its name) alone."""
    digest = hashlib.sha256(f"{seed}:{hf_name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    target.copy_(torch.randn(target.shape, generator=generator).mul_(std))


def _there(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor
