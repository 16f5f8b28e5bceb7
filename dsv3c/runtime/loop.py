"""The training loop, for one rank or many: steps, what they tell, checkpoints, and stopping in between."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Protocol

import torch

from dsv3c.console import tell
from dsv3c.errors import WorkError
from dsv3c.files import reason
from dsv3c.job import Recipe
from dsv3c.runtime.data import Sampler
from dsv3c.runtime.metrics import Metrics, Progress, Value, load_balance
from dsv3c.runtime.peers import ALONE, Peers
from dsv3c.runtime.session import BadStepError, StepResult
from dsv3c.runtime.state import Scalar, State, save_state

TIMING = "timing.jsonl"
"""In a run's folder: how long each step took."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a call of `train` did. `steps`: done in all, of `goal`; `loss`: main loss of the last one made now.

    `tokens` and `seconds` count what was trained now. `hf`: the finished model's folder, None if `interrupted`.
    """

    out: str
    steps: int
    goal: int
    loss: float | None
    tokens: int
    seconds: float
    hf: str | None
    interrupted: bool = False
    rank: int = 0

    def __str__(self) -> str:
        if self.interrupted:
            return f"stopped after step {self.steps} of {self.goal}; the same command with --resume goes on from there"
        if self.loss is None:
            return f"all {self.goal} steps were done before; the model is in {self.hf}"
        rate = self.tokens / max(self.seconds, 1e-9)
        return f"step {self.steps}: loss {self.loss:.4f}, {rate:,.0f} tokens/s; the model is in {self.hf}"


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """The learning rate of step `step` (from 1) of `steps`: linear warm-up, then half a cosine to `final_lr` times
    the peak at the last step."""
    warmup = max(1, round(recipe.warmup * steps))
    if step <= warmup:
        return recipe.lr * step / warmup
    done = (step - warmup) / (steps - warmup)
    return recipe.lr * (recipe.final_lr + (1.0 - recipe.final_lr) * 0.5 * (1.0 + math.cos(math.pi * done)))


class Weights(Protocol):
    """What a checkpoint is made of."""

    def state(self) -> State: ...


class Trainer(Protocol):
    """What makes steps: `dsv3c.runtime.session.Session`, or `RankSession` on each of many ranks."""

    steps: int

    @property
    def weights(self) -> Weights: ...

    def step(self, tokens: torch.Tensor, lr: float | None = None) -> StepResult: ...


class Teller(Protocol):
    """Where steps are told."""

    def write(self, done: StepResult, seconds: float) -> None: ...

    def show(self, done: StepResult) -> None: ...

    def close(self) -> None: ...


class Books:
    """What a run tells of its steps: metrics.jsonl, TensorBoard, timing.jsonl and a progress display."""

    def __init__(self, out: Path, first: int, goal: int, tensorboard: bool) -> None:
        """`first`: steps that are done. Raises WorkError if nothing can be written."""
        self._metrics = Metrics(out, first, tensorboard=tensorboard)
        self._timing = _Timing(out / TIMING, fresh=first == 0)
        self._progress = Progress(goal, start=first)

    def write(self, done: StepResult, seconds: float) -> None:
        """The lines of a step."""
        self._metrics.write(done.step, _values(done))
        self._timing.write(done.step, seconds, done.tokens)

    def show(self, done: StepResult) -> None:
        """A step that went well, for the person at the terminal."""
        self._progress.update(done.step, tokens=done.tokens, loss=done.loss, expert_load=_balance(done))

    def close(self) -> None:
        self._progress.close()
        try:
            self._timing.close()
        finally:
            self._metrics.close()


class Silence:
    """Tells nothing: that is for rank 0."""

    def write(self, done: StepResult, seconds: float) -> None:
        pass

    def show(self, done: StepResult) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Run:
    """The loop, once everything is in place; `session.steps` are done. `interrupts`: entered by the caller if given."""

    session: Trainer
    sampler: Sampler
    recipe: Recipe
    goal: int
    out: Path
    facts: Mapping[str, Scalar]
    save_every: int
    peers: Peers = ALONE
    interrupts: Interrupts | None = None

    def go(self, teller: Teller) -> TrainResult:
        """Train to the goal or until interrupted; either way the last step made is saved."""
        session, begin = self.session, time.monotonic()
        saved = session.steps
        loss, tokens = None, 0
        with Interrupts() if self.interrupts is None else nullcontext(self.interrupts) as interrupts:
            try:
                while session.steps < self.goal and not self.stopping(interrupts):
                    done = self._step(teller)
                    loss, tokens = done.loss, tokens + done.tokens
                    teller.show(done)
                    if done.step % self.save_every == 0:
                        saved = self.save()
                if saved != session.steps:
                    self.save()
            finally:
                teller.close()
        seconds, interrupted = time.monotonic() - begin, session.steps < self.goal
        return TrainResult(
            str(self.out), session.steps, self.goal, loss, tokens, seconds, None, interrupted, self.peers.rank
        )

    def stopping(self, interrupts: Interrupts) -> bool:
        """Whether no other step is to be made."""
        return interrupts.requested

    def save(self) -> int:
        """Save what the steps so far made; gives their number."""
        save_state(self.out, self.session.steps, self.session.weights.state(), self.facts, peers=self.peers)
        return self.session.steps

    def _step(self, teller: Teller) -> StepResult:
        """A step; its line is written even if its numbers are none, and then BadStepError goes on."""
        step, begin = self.session.steps + 1, time.monotonic()
        try:
            done = self.session.step(self.sampler.batch(step), learning_rate(step, self.goal, self.recipe))
        except BadStepError as error:
            teller.write(error.result, time.monotonic() - begin)
            raise
        teller.write(done, time.monotonic() - begin)
        return done


def _values(done: StepResult) -> dict[str, Value]:
    """The line of one step. Nothing that depends on the clock or the machine's load, so that runs can be compared."""
    values: dict[str, Value] = {"loss": done.loss}
    if done.mtp_loss:
        values["mtp_loss"] = sum(done.mtp_loss) / len(done.mtp_loss)
    values |= {"balance_loss": done.balance_loss, "grad_norm": done.grad_norm, "lr": done.lr}
    values |= {"tokens": done.step * done.tokens, "expert_load": _balance(done)}
    values["expert_load_by_layer"] = [load_balance(load) for load in done.expert_load.values()]
    return values


def _balance(done: StepResult) -> float | None:
    """Rows of the busiest expert over the mean, in the worst layer; None without experts."""
    return max((load_balance(load) for load in done.expert_load.values()), default=None)


class Interrupts:
    """While this is entered, the first Ctrl-C or SIGTERM sets `requested`, the second raises KeyboardInterrupt.

    If not `patient`, already the first does, which may be changed later. With `quiet` nothing is told: torchrun also
    sends SIGTERM when another rank failed.
    """

    def __init__(self, quiet: bool = False, patient: bool = True) -> None:
        self.requested = False
        self.patient = patient
        self._quiet = quiet
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self.patient:
            raise KeyboardInterrupt
        self.requested = True
        if not self._quiet:
            tell("stopping after this step; press Ctrl-C again to stop at once")


class _Timing:
    """OUT/timing.jsonl: how long each step took. It has its own file, since no two runs agree on it."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self._path = path
        try:
            self._file: IO[str] = path.open("w" if fresh else "a", encoding="utf-8")
        except OSError as error:
            raise self._failed(error) from None

    def write(self, step: int, seconds: float, tokens: int) -> None:
        line = {"step": step, "seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-9)}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as failed:
            raise self._failed(failed) from None

    def _failed(self, error: OSError) -> WorkError:
        return WorkError(f"{self._path}: cannot be written: {reason(error)}; make room, then continue with --resume")


__all__ = ["Books", "Interrupts", "Run", "Silence", "Teller", "TrainResult", "Trainer", "learning_rate"]
