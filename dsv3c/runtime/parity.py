"""Compares a session with transformers' DeepSeek-V3, so that nobody need take our word for what the model computes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsv3c.errors import InputError

if TYPE_CHECKING:
    import torch

GRADIENT_FLOOR = 1e-5  # a gradient's error is relative to its own norm, or to this share of the global norm if larger
SHOWN = 8


class SessionLike(Protocol):
    """The part of a Session that is compared; tokens are LongTensor [B, S]."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V]."""

    def gradients(self, tokens: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Gradients of the main loss by checkpoint name."""

    def expert_choices(self, tokens: torch.Tensor) -> Mapping[int, torch.Tensor]:
        """Chosen experts [B, S, k] by layer, in any order within a token."""


@dataclass(frozen=True, slots=True)
class ReferenceResult:
    """What the independent implementation says of `tokens` [B, S]."""

    tokens: torch.Tensor
    dtype: str  # fp32 or fp64
    logits: torch.Tensor  # [B, S, V]
    loss: float  # next-token cross entropy, mean over B*(S-1) positions
    gradients: dict[str, torch.Tensor]  # by checkpoint name, experts apart
    experts: dict[int, torch.Tensor]  # layer: i64 [B, S, k], ascending
    margins: dict[int, torch.Tensor]  # layer: [B, S], how far the choice is from a different one
    source: str  # name and version of the implementation


@dataclass(frozen=True, slots=True)
class Tolerances:
    """Largest accepted relative errors."""

    logits: float
    gradients: float


TOLERANCES: Mapping[str, Tolerances] = {"fp32": Tolerances(1e-5, 1e-4), "fp64": Tolerances(1e-10, 1e-10)}


@dataclass(frozen=True, slots=True)
class GradientError:
    """The error of one gradient, relative to the larger of its norm and GRADIENT_FLOOR of the global norm."""

    name: str
    error: float
    norm: float


@dataclass(frozen=True, slots=True)
class ChoiceMismatch:
    """A token sent to other experts than the reference's; `margin` is the score by which the reference chose."""

    layer: int
    sequence: int
    position: int
    ours: tuple[int, ...]
    reference: tuple[int, ...]
    margin: float


@dataclass(frozen=True, slots=True)
class Certificate:
    """The outcome of a comparison; `failures` is empty when everything agrees within the tolerances."""

    source: str
    dtype: str
    sequences: int
    length: int
    tolerances: Tolerances
    loss: float
    logits_error: float
    gradients: tuple[GradientError, ...]  # largest error first
    choices: int  # tokens times MoE layers compared
    mismatches: tuple[ChoiceMismatch, ...]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def gradients_error(self) -> float:
        return max((g.error for g in self.gradients), default=0.0)

    def to_json(self) -> str:
        """One JSON object; not-a-number and infinity become null, so that any reader takes it."""
        record = asdict(self) | {"passed": self.passed, "gradients_error": self.gradients_error}
        return json.dumps(_finite(record), indent=2)

    def render(self) -> str:
        """A page of plain text."""
        verdict = "PASSED" if self.passed else "FAILED"
        lines = [
            f"{verdict}: agreement with {self.source}, {self.dtype}, {self.sequences} x {self.length} tokens",
            "",
            f"  {'what':<34}{'error':>12}{'tolerance':>12}",
            f"  {'logits':<34}{self.logits_error:>12.2e}{self.tolerances.logits:>12.0e}",
            f"  {f'gradients, worst of {len(self.gradients)}':<34}"
            f"{self.gradients_error:>12.2e}{self.tolerances.gradients:>12.0e}",
            f"  {f'expert choices, of {self.choices}':<34}{f'{len(self.mismatches)} differ':>12}{'0':>12}",
            f"  {'loss of the reference':<34}{self.loss:>12.6f}",
        ]
        if self.gradients:
            lines += ["", "  gradients with the largest error"]
            lines += [f"    {g.error:.2e}  {g.name}" for g in self.gradients[:SHOWN]]
        if self.mismatches:
            lines += ["", "  expert choices that differ (margin: the score by which the reference chose)"]
            for m in self.mismatches[:SHOWN]:
                lines.append(
                    f"    layer {m.layer}, sequence {m.sequence}, position {m.position}: "
                    f"{list(m.ours)}, reference {list(m.reference)}, margin {m.margin:.1e}"
                )
            if len(self.mismatches) > SHOWN:
                lines.append(f"    and {len(self.mismatches) - SHOWN} more")
        if self.failures:
            lines += ["", *(f"  failed: {reason}" for reason in self.failures)]
        return "\n".join(lines)


def reference_run(hf_dir: str | Path, tokens: torch.Tensor, dtype: str = "fp32") -> ReferenceResult:
    """transformers' word on tokens [B, S] for the checkpoint in `hf_dir`, in fp32 or fp64; see runtime.reference."""
    from dsv3c.runtime import reference

    return reference.reference_run(hf_dir, tokens, dtype)


def compare(ours: SessionLike, reference: ReferenceResult, tolerances: Tolerances | None = None) -> Certificate:
    """Runs `ours` on the reference's tokens and measures every difference, in float64.

    Raises InputError if the reference's precision has no tolerance and none is given.
    """
    import torch

    limits = tolerances or TOLERANCES.get(reference.dtype)
    if limits is None:
        raise InputError(f"no tolerance for precision '{reference.dtype}'; compare in {' or '.join(TOLERANCES)}")
    failures: list[str] = []

    logits = ours.forward(reference.tokens).detach().cpu()
    if logits.shape != reference.logits.shape:
        failures.append(f"logits have shape {list(logits.shape)}, not {list(reference.logits.shape)}")
        logits_error = math.inf
    else:
        norm = reference.logits.double().norm().item()
        logits_error = _ratio((logits.double() - reference.logits.double()).norm().item(), norm)
        if not logits_error <= limits.logits:
            failures.append(f"logits differ by {logits_error:.2e}, tolerance {limits.logits:.0e}")

    gradients, reasons = _compare_gradients(ours.gradients(reference.tokens), reference.gradients, limits.gradients)
    failures += reasons

    choices = ours.expert_choices(reference.tokens)
    mismatches: list[ChoiceMismatch] = []
    failures += [f"expert choices of layer {n} are missing" for n in reference.experts if n not in choices]
    failures += [f"layer {n} chooses experts, but not in the reference" for n in choices if n not in reference.experts]
    for layer, theirs in reference.experts.items():
        if layer not in choices:
            continue
        mine = choices[layer].detach().cpu().long()
        if mine.shape != theirs.shape:
            failures.append(f"expert choices of layer {layer} have shape {list(mine.shape)}, not {list(theirs.shape)}")
            continue
        mine = mine.sort(dim=-1).values
        for b, s in torch.nonzero((mine != theirs).any(dim=-1)).tolist():
            margin = reference.margins[layer][b, s].item()
            mismatches.append(
                ChoiceMismatch(layer, b, s, tuple(mine[b, s].tolist()), tuple(theirs[b, s].tolist()), margin)
            )
    if mismatches:
        failures.append(f"{len(mismatches)} expert choices differ, the first in layer {mismatches[0].layer}")

    sequences, length = reference.tokens.shape
    return Certificate(
        source=reference.source,
        dtype=reference.dtype,
        sequences=sequences,
        length=length,
        tolerances=limits,
        loss=reference.loss,
        logits_error=logits_error,
        gradients=gradients,
        choices=sum(e.shape[0] * e.shape[1] for e in reference.experts.values()),
        mismatches=tuple(mismatches),
        failures=tuple(failures),
    )


def _compare_gradients(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], tolerance: float
) -> tuple[tuple[GradientError, ...], list[str]]:
    reasons = []
    missing = [name for name in theirs if name not in ours]
    if missing:
        reasons.append(f"{len(missing)} gradients are missing: {_some(missing)}")
    norms = {name: g.double().norm().item() for name, g in theirs.items()}
    floor = GRADIENT_FLOOR * math.sqrt(sum(n * n for n in norms.values()))
    # A weight the main loss does not reach (the MTP modules') may be given, but then it must be zero.
    extra = [name for name in ours if name not in theirs and bool((ours[name] != 0).any())]
    if extra:
        reasons.append(f"{len(extra)} gradients of weights the reference does not train: {_some(extra)}")
    errors = []
    for name, reference in theirs.items():
        if name not in ours:
            continue
        mine = ours[name].detach().cpu()
        if mine.shape != reference.shape:
            reasons.append(f"gradient of {name} has shape {list(mine.shape)}, not {list(reference.shape)}")
            continue
        difference = (mine.double() - reference.double()).norm().item()
        errors.append(GradientError(name, _ratio(difference, max(norms[name], floor)), norms[name]))
    errors.sort(key=lambda e: (-(math.inf if math.isnan(e.error) else e.error), e.name))
    wrong = [e.name for e in errors if not e.error <= tolerance]
    if wrong:
        reasons.append(f"{len(wrong)} gradients differ by more than {tolerance:.0e}: {_some(wrong)}")
    return tuple(errors), reasons


def _ratio(difference: float, scale: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0.0 else math.inf


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
