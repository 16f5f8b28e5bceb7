"""The training loop: the same metrics to the last bit, however often the run is stopped and resumed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from dsv3c.console import tell
from dsv3c.errors import InputError, WorkError
from dsv3c.files import reason
from dsv3c.job import Recipe
from dsv3c.plan import Plan
from dsv3c.runtime.data import Corpus, Sampler, TokenFile, choose_tokenizer, prepare, scan
from dsv3c.runtime.export import PLAN, write_hf
from dsv3c.runtime.identity import differences, moved, run_facts
from dsv3c.runtime.metrics import Meter, Metrics, Progress, Value, load_balance
from dsv3c.runtime.session import Session, StepResult
from dsv3c.runtime.state import Scalar, latest_state, load_info, load_state, save_state, step_of
from dsv3c.runtime.tokenizer import Tokenizer

DATA, HF, TIMING = "data", "hf", "timing.jsonl"
"""In a run's folder: the token file, the finished model, and how long each step took."""
_MOST_STEPS_UNSAVED = 1000


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


def train(plan: Plan, data: Sequence[str | Path], *, steps: int, out: str | Path, init: str | Path | None = None,
          resume: bool = False, seed: int = 0, save_every: int | None = None, lr: float | None = None,
          tokenizer: str | None = None, tensorboard: bool = True) -> TrainResult:  # fmt: skip
    """Train `plan` on the text of `data` until `steps` steps are done, and write the model to OUT/hf.

    `init`: a Hugging Face checkpoint to start from, whose tokenizer is used too. `resume`: go on from the newest
    checkpoint in `out`, if there is one. `save_every`: steps between checkpoints, by default a tenth of the run, at
    most 1,000. `lr` replaces the recipe's. `tokenizer`: a tokenizer.json, or `bytes`; by default one is trained.
    The first Ctrl-C or SIGTERM lets the step end, saves and returns; the second stops at once.

    Raises InputError for a plan that cannot be trained here, unusable data, and an `out` that holds another run;
    WorkError when a loss is no number or nothing can be written; checkpoints saved before then stay whole.
    """
    _check(plan, steps, save_every)
    checkpoint = latest_state(out)
    if checkpoint is not None and not resume:
        raise InputError(
            f"--out: {out} holds a run that got to step {step_of(checkpoint)}; go on with --resume, "
            "or name another folder"
        )
    recipe = plan.job.recipe if lr is None else dataclasses.replace(plan.job.recipe, lr=lr)
    with Meter("reading the data") as meter:
        corpus = scan(data, tell, meter)
    _make_folder(Path(out))
    beside = str(init) if init is not None and (Path(init) / "tokenizer.json").is_file() else None
    if tokenizer is None:
        tokenizer = beside if checkpoint is None else _saved_tokenizer(checkpoint)
    words, tokens = _tokens(corpus, tokenizer, plan, Path(out))
    sampler = Sampler(tokens, plan.job.seq, plan.job.global_batch, seed)
    facts = run_facts(plan, recipe, seed=seed, steps=steps, data=tokens.key, tokenizer=words.identity)
    facts["init"] = None if init is None else str(Path(init).resolve())
    if checkpoint is not None:
        _check_same(checkpoint, facts)
    session = Session(plan, None if init is None or checkpoint is not None else init, seed)
    if checkpoint is not None:
        load_state(checkpoint, session.weights.state())
        session.steps = step_of(checkpoint)
    else:
        plan.save(Path(out) / PLAN)
        words.save(Path(out))
        if resume:
            tell(f"{out} has no checkpoint to resume from; starting afresh")
    run = _Run(session, sampler, recipe, steps, Path(out), facts, save_every or _spacing(steps))
    with Metrics(out, session.steps, tensorboard=tensorboard) as metrics:
        result = run.go(metrics)
    if result.interrupted:
        return result
    write_hf(Path(out) / HF, session.config, session.weights.tensors, words)
    return dataclasses.replace(result, hf=str(Path(out) / HF))


def _check(plan: Plan, steps: int, save_every: int | None) -> None:
    if plan.job.kind != "train":
        raise InputError(f"this plan was compiled for --job {plan.job.kind}; compile with --job train to train")
    if plan.job.mesh.world != 1:
        raise InputError(f"this plan is for {plan.job.mesh.world} ranks, but one runs; compile it without --mesh")
    if steps < 1:
        raise InputError(f"--steps {steps} must be at least 1")
    if save_every is not None and save_every < 1:
        raise InputError(f"--save-every {save_every} must be at least 1")


def _check_same(checkpoint: Path, facts: Mapping[str, Scalar]) -> None:
    # The weights are those of the checkpoint, so a run may leave --init out when it goes on.
    now = {name: value for name, value in facts.items() if name != "init" or value is not None}
    saved = load_info(checkpoint)
    told = differences(saved, now)
    if told:
        raise InputError(
            f"--resume: {checkpoint} belongs to another run: {'; '.join(told)}. Resume with the plan "
            f"{checkpoint.parents[1] / PLAN} and the flags of that run, or choose another --out."
        )
    note = moved(saved, now)
    if note is not None:
        tell(note)


def _make_folder(out: Path) -> None:
    """Say before the long work if nothing can be written to `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--out: {out} is not a folder; name a new or an existing folder") from None
    except OSError as error:
        raise WorkError(f"--out: {out} cannot be made: {reason(error)}; choose another --out") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise WorkError(f"--out: {out} cannot be written; choose another --out")


def _saved_tokenizer(checkpoint: Path) -> str | None:
    """How `--tokenizer` calls the tokenizer of the run that `checkpoint` belongs to; None if its file is lost."""
    name = load_info(checkpoint).get("tokenizer")
    if name == "bytes":
        return "bytes"
    out = checkpoint.parents[1]
    return str(out) if (out / "tokenizer.json").is_file() else None


def _tokens(corpus: Corpus, choice: str | None, plan: Plan, out: Path) -> tuple[Tokenizer, TokenFile]:
    """The tokenizer of the run, not yet saved, and the data in its tokens."""
    vocabulary = plan.config["vocab_size"]
    assert isinstance(vocabulary, int)
    words = choose_tokenizer(choice, vocabulary, corpus, None)
    with Meter("tokenizing") as meter:
        return words, prepare(corpus, words, out / DATA, progress=meter)


def _spacing(steps: int) -> int:
    return max(1, min(_MOST_STEPS_UNSAVED, steps // 10))


@dataclass(frozen=True, slots=True)
class _Run:
    """The loop, once everything is in place; `session.steps` are done."""

    session: Session
    sampler: Sampler
    recipe: Recipe
    goal: int
    out: Path
    facts: Mapping[str, Scalar]
    save_every: int

    def go(self, metrics: Metrics) -> TrainResult:
        """Train to the goal or until interrupted; either way the last step made is saved."""
        session, begin = self.session, time.monotonic()
        first = saved = session.steps
        loss, tokens = None, 0
        with (
            Interrupts() as interrupts,
            Progress(self.goal, start=first) as progress,
            _Timing(self.out / TIMING, fresh=first == 0) as timing,
        ):
            while session.steps < self.goal and not interrupts.requested:
                done = self._step(metrics, timing)
                loss, tokens = done.loss, tokens + done.tokens
                progress.update(done.step, tokens=done.tokens, loss=loss, expert_load=_balance(done))
                if done.step % self.save_every == 0:
                    saved = self._save()
            if saved != session.steps:
                self._save()
        seconds, interrupted = time.monotonic() - begin, session.steps < self.goal
        return TrainResult(str(self.out), session.steps, self.goal, loss, tokens, seconds, None, interrupted)

    def _save(self) -> int:
        save_state(self.out, self.session.steps, self.session.weights.state(), self.facts)
        return self.session.steps

    def _step(self, metrics: Metrics, timing: _Timing) -> StepResult:
        step, begin = self.session.steps + 1, time.monotonic()
        done = self.session.step(self.sampler.batch(step), learning_rate(step, self.goal, self.recipe))
        seconds = time.monotonic() - begin
        metrics.write(step, _values(done))
        timing.write(step, seconds, done.tokens)
        if not (math.isfinite(done.loss) and math.isfinite(done.grad_norm)):
            what = "loss" if not math.isfinite(done.loss) else "gradient norm"
            raise WorkError(
                f"step {step}: the {what} is {done.loss if what == 'loss' else done.grad_norm}; nothing of this step "
                "is saved. Start again with a lower --lr or other data, or resume from the last checkpoint."
            )
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
    """While this is entered, the first Ctrl-C or SIGTERM sets `requested`, the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
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
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
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

    def __enter__(self) -> _Timing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError as failed:
            raise self._failed(failed) from None

    def _failed(self, error: OSError) -> WorkError:
        return WorkError(f"{self._path}: cannot be written: {reason(error)}; make room, then continue with --resume")


__all__ = ["HF", "PLAN", "Interrupts", "TrainResult", "learning_rate", "train"]
