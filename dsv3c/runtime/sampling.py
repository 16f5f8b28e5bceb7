"""Choose the next token from logits: greedy, temperature, top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dsv3c.errors import InputError, WorkError


@dataclass(frozen=True, slots=True)
class Sampling:
    """`temperature` 0 is greedy; `top_p` keeps the smallest set of tokens whose probability reaches it."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"--temperature {self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p} must be above 0 and at most 1")


def sample(logits: torch.Tensor, sampling: Sampling, position: int) -> torch.Tensor:
    """The next token of each row of logits [B, V] -> i64[B]; it depends on (logits, sampling, position) alone.

    Raises WorkError for logits that are no numbers.
    """
    likeliest = logits.argmax(-1, keepdim=True)
    best = logits.gather(-1, likeliest)
    if not all(map(math.isfinite, best.flatten().tolist())):  # argmax finds a NaN before every number
        raise WorkError("the model's output is not a number; its weights are damaged or its training diverged")
    if sampling.temperature == 0:
        return likeliest.squeeze(-1).cpu()
    # Below its maximum, so that no temperature overflows.
    probability = torch.softmax((logits.double() - best.double()).cpu() / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, index = probability.sort(stable=True, dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probability = torch.zeros_like(probability).scatter(-1, index, ordered.masked_fill(outside, 0.0))
    generator = torch.Generator().manual_seed((sampling.seed * 1_000_003 + position) % 2**63)
    return torch.multinomial(probability, 1, generator=generator).squeeze(-1)
