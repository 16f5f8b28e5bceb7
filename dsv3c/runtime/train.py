"""Training a plan on text: the same metrics to the last bit, however often the run is stopped and resumed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3c.console import tell
from dsv3c.errors import InputError, WorkError
from dsv3c.files import reason
from dsv3c.job import Recipe
from dsv3c.plan import Plan
from dsv3c.runtime.data import Corpus, Sampler, TokenFile, choose_tokenizer, prepare, scan
from dsv3c.runtime.export import PLAN, write_hf
from dsv3c.runtime.identity import differences, moved, run_facts
from dsv3c.runtime.loop import Books, Interrupts, Run, TrainResult, learning_rate
from dsv3c.runtime.metrics import Meter
from dsv3c.runtime.session import Session
from dsv3c.runtime.state import Scalar, latest_state, load_info, load_state, step_of
from dsv3c.runtime.tokenizer import Tokenizer

DATA, HF = "data", "hf"
"""In a run's folder: the token file, and the finished model."""
_MOST_STEPS_UNSAVED = 1000


def train(plan: Plan, data: Sequence[str | Path], *, steps: int, out: str | Path, init: str | Path | None = None,
          resume: bool = False, seed: int = 0, save_every: int | None = None, lr: float | None = None,
          tokenizer: str | None = None, tensorboard: bool = True,
          trace: str | Path | None = None) -> TrainResult:  # fmt: skip
    """Train `plan` on the text of `data` until `steps` steps are done, and write the model to OUT/hf.

    A plan for many ranks is trained by as many processes, which all call this, as torchrun starts them; rank 0 writes
    what is not divided. `init`: a Hugging Face checkpoint to start from, whose tokenizer is used too. `resume`: go on
    from the newest checkpoint in `out`, if there is one. `save_every`: steps between checkpoints, by default a tenth
    of the run, at most 1,000. `lr` replaces the recipe's. `tokenizer`: a tokenizer.json, or `bytes`; by default one is
    trained. `trace`: of many ranks each writes what it did in the last steps to TRACE with its rank in the name.
    The first Ctrl-C or SIGTERM lets the step end, saves and returns; the second stops at once.

    Raises InputError for a plan that cannot be trained here, unusable data, and an `out` that holds another run;
    WorkError when a loss is no number or nothing can be written; checkpoints saved before then stay whole.
    """
    order = Order(
        plan, tuple(data), steps, Path(out), None if init is None else Path(init), resume, seed, save_every, lr,
        tokenizer, tensorboard, None if trace is None else Path(trace),
    )  # fmt: skip
    order.check()
    if plan.job.mesh.world > 1:
        from dsv3c.runtime.train_ranks import train_together

        return train_together(order)
    return _train_alone(order)


@dataclass(frozen=True, slots=True)
class Order:
    """What `train` was asked for."""

    plan: Plan
    data: tuple[str | Path, ...]
    steps: int
    out: Path
    init: Path | None
    resume: bool
    seed: int
    save_every: int | None
    lr: float | None
    tokenizer: str | None
    tensorboard: bool
    trace: Path | None

    @property
    def recipe(self) -> Recipe:
        """The plan's, with the learning rate that was asked for."""
        return self.plan.job.recipe if self.lr is None else dataclasses.replace(self.plan.job.recipe, lr=self.lr)

    @property
    def spacing(self) -> int:
        """Steps between checkpoints."""
        return self.save_every or max(1, min(_MOST_STEPS_UNSAVED, self.steps // 10))

    def check(self) -> None:
        """Raises InputError for what can be seen to be wrong at once."""
        job = self.plan.job
        if job.kind != "train":
            raise InputError(f"this plan was compiled for --job {job.kind}; compile with --job train to train")
        if self.steps < 1:
            raise InputError(f"--steps {self.steps} must be at least 1")
        if self.save_every is not None and self.save_every < 1:
            raise InputError(f"--save-every {self.save_every} must be at least 1")
        started = os.environ.get("WORLD_SIZE", "1")
        if job.mesh.world == 1 and started != "1":
            raise InputError(
                f"this plan is for one rank and {started} were started; compile it with a --mesh, or start one"
            )
        if job.mesh.world == 1 and self.trace is not None:
            raise InputError("--trace shows what ranks do beside each other, and this plan is for one; leave it out")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run before its session exists. `checkpoint`: to go on from, or None; `words`: None on all ranks but 0."""

    checkpoint: Path | None
    words: Tokenizer | None
    tokens: TokenFile
    sampler: Sampler
    facts: Mapping[str, Scalar]


def prepared(order: Order) -> Prepared:
    """Read the data, find the checkpoint to go on from, and make sure that it belongs to this run."""
    plan, out = order.plan, order.out
    checkpoint = latest_state(out)
    if checkpoint is not None and not order.resume:
        raise InputError(
            f"--out: {out} holds a run that got to step {step_of(checkpoint)}; go on with --resume, "
            "or name another folder"
        )
    with Meter("reading the data") as meter:
        corpus = scan(order.data, tell, meter)
    _make_folder(out)
    tokenizer = order.tokenizer
    if tokenizer is None:
        beside = str(order.init) if order.init is not None and (order.init / "tokenizer.json").is_file() else None
        tokenizer = beside if checkpoint is None else _saved_tokenizer(checkpoint)
    words, tokens = _tokens(corpus, tokenizer, plan, out)
    sampler = Sampler(tokens, plan.job.seq, plan.job.global_batch, order.seed)
    facts = run_facts(
        plan, order.recipe, seed=order.seed, steps=order.steps, data=tokens.key, tokenizer=words.identity
    )
    facts["init"] = None if order.init is None else str(order.init.resolve())
    if checkpoint is not None:
        _check_same(checkpoint, facts)
    return Prepared(checkpoint, words, tokens, sampler, facts)


def open_run(order: Order, ready: Prepared) -> None:
    """Write the plan and the tokenizer of a run that begins."""
    if ready.checkpoint is None and ready.words is not None:
        order.plan.save(order.out / PLAN)
        ready.words.save(order.out)
        if order.resume:
            tell(f"{order.out} has no checkpoint to resume from; starting afresh")


def _train_alone(order: Order) -> TrainResult:
    ready = prepared(order)
    session = Session(order.plan, None if ready.checkpoint is not None else order.init, order.seed)
    if ready.checkpoint is not None:
        load_state(ready.checkpoint, session.weights.state())
        session.steps = step_of(ready.checkpoint)
    open_run(order, ready)
    run = Run(session, ready.sampler, order.recipe, order.steps, order.out, ready.facts, order.spacing)
    result = run.go(Books(order.out, session.steps, order.steps, order.tensorboard))
    if result.interrupted:
        return result
    write_hf(order.out / HF, session.config, session.weights.tensors, ready.words)
    return dataclasses.replace(result, hf=str(order.out / HF))


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


__all__ = ["HF", "PLAN", "Interrupts", "Order", "Prepared", "TrainResult", "learning_rate", "open_run", "prepared",
           "train"]  # fmt: skip
