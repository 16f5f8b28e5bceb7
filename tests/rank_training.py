"""What the ranks of `tests/test_ranks.py` do: several plans for as many ranks, one after the other."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from small import SMALL

import dsv3c
from dsv3c.job import Recipe
from dsv3c.models.config import ModelConfig
from dsv3c.plan import Plan, load_plan
from dsv3c.runtime.ranks import RankSession, connect
from dsv3c.runtime.session import Session, StepResult

SEED, SEQ, BATCH = 3, 16, 8
MODEL: ModelConfig = replace(SMALL, num_hidden_layers=4)
"""Four layers, three with experts, and an MTP module: up to eight stages, some of them without a layer."""


@dataclass(frozen=True)
class Told:
    """What a step told, as numbers: losses and norm, and the tokens of each expert by layer."""

    numbers: tuple[float, ...]
    loads: dict[str, list[float]]

    @classmethod
    def of(cls, done: StepResult) -> Told:
        numbers = (done.loss, *done.mtp_loss, done.balance_loss, done.grad_norm)
        return cls(numbers, {layer: load.tolist() for layer, load in done.expert_load.items()})


def plan(precision: str, **given: object) -> Plan:
    options = {"seq": SEQ, "global_batch": BATCH, "recipe": Recipe(lr=1e-3), "kernels": "none", **given}
    return dsv3c.compile(MODEL, precision=precision, **options)  # type: ignore[arg-type]


def trained(session: Session | RankSession, steps: int) -> list[Told]:
    found = []
    for step in range(steps):
        tokens = torch.randint(257, (BATCH, SEQ), generator=torch.Generator().manual_seed(step))
        found.append(Told.of(session.step(tokens)))
    return found


@functools.cache
def alone(precision: str, steps: int) -> list[Told]:
    """The same steps by one rank."""
    return trained(dsv3c.load(plan(precision), seed=SEED), steps)


def all_of(paths: Sequence[Path], steps: Sequence[int]) -> list[list[Told]]:
    """On one rank: each plan for its steps."""
    plans = [load_plan(p) for p in paths]
    found = []
    with connect(plans[0]) as world:
        for one, count in zip(plans, steps, strict=True):
            here = replace(world, mesh=one.job.mesh, ranks_per_node=one.job.ranks_per_node, _groups={})
            found.append(trained(RankSession(one, here, seed=SEED), count))
    return found


def distance(found: Iterable[Told], wanted: Iterable[Told], norm: bool = True) -> float:
    """The largest relative difference of any number of any step; without `norm` of losses only."""
    return max(abs(a - b) / abs(b) for x, y in zip(found, wanted, strict=True)
               for a, b in zip(x.numbers if norm else x.numbers[:-1], y.numbers if norm else y.numbers[:-1],
                               strict=True))  # fmt: skip


def flipped(found: Iterable[Told], wanted: Iterable[Told]) -> list[str]:
    """Where experts got other numbers of tokens."""
    return [f"step {i + 1}, {layer}: {x.loads[layer]} instead of {y.loads[layer]}"
            for i, (x, y) in enumerate(zip(found, wanted, strict=True))
            for layer in y.loads if x.loads[layer] != y.loads[layer]]  # fmt: skip
