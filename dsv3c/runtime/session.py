"""A loaded plan: forward, training steps, gradients and generation on one device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv3c.errors import InputError, WorkError
from dsv3c.ir import Sequence
from dsv3c.job import Recipe
from dsv3c.models import MODELS
from dsv3c.models.checkpoint import hf_tensors
from dsv3c.models.config import ModelConfig
from dsv3c.ops import REGISTRY
from dsv3c.plan import Plan
from dsv3c.runtime.epilogue import Epilogue, Sums
from dsv3c.runtime.executor import Engine, prepare_sequence
from dsv3c.runtime.faults import check_room, first_fault, first_unusable, memory_explained
from dsv3c.runtime.hf import load_hf, save_hf
from dsv3c.runtime.runner import Runner
from dsv3c.runtime.sampling import Sampling, sample
from dsv3c.runtime.weights import Weights
from dsv3c.target import Target
from dsv3c.targets import find
from dsv3c.tensors import torch_dtype

LOSSES = ("main", "mtp", "balance")


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. Losses are means over the global batch; `expert_load` is tokens per expert by layer name;
    `tokens` counts those read."""

    step: int
    loss: float
    mtp_loss: tuple[float, ...]
    balance_loss: float
    grad_norm: float
    lr: float
    tokens: int
    expert_load: Mapping[str, torch.Tensor]


class BadStepError(WorkError):
    """A step gave numbers that are none, and nothing of it was applied; `result`: what it gave."""

    def __init__(self, message: str, result: StepResult) -> None:
        super().__init__(message)
        self.result = result


def refuse_bad(result: StepResult, losses: Mapping[str, float], where: Callable[[], str]) -> None:
    """Raise BadStepError if a loss or the gradient norm of a step is no number; `where` finds the first such value."""
    if math.isfinite(result.grad_norm) and all(map(math.isfinite, losses.values())):
        return
    wrong = f"gradient norm is {result.grad_norm}" if math.isfinite(result.loss) else f"loss is {result.loss}"
    raise BadStepError(
        f"step {result.step}: the {wrong}. {where()}. Nothing of this step was applied; start again with a lower --lr "
        "or other data, or resume from the last checkpoint.",
        result,
    )


class Session:
    """Runs one plan. `weights`: a Hugging Face directory, or None to draw them from `seed`."""

    def __init__(self, plan: Plan, weights: str | Path | None = None, seed: int = 0) -> None:
        self.plan = plan
        self.program = plan.program
        self.config = ModelConfig.from_dict(plan.config, where=f"the plan of {plan.model}")
        if self.program.name not in MODELS:
            raise InputError(f"{plan.model} is of the unknown family '{self.program.name}'; name its --plugin")
        self.family = MODELS[self.program.name]
        self.target: Target = find(plan.target)
        if plan.job.mesh.world != 1:
            raise InputError(
                f"a plan for {plan.job.mesh.world} ranks cannot run: many ranks are not executed yet; "
                "compile it without --mesh"
            )
        self.engine = Engine.of(plan, self.target, REGISTRY)
        assert self.target.device is not None
        self.device: str = self.target.device
        with memory_explained(plan.memory):
            self.weights = Weights(self.program, self.device)
        self.recipe: Recipe = plan.job.recipe
        self._epilogue = Epilogue(self.engine, self.weights, self.recipe)
        self.steps = 0
        self._generation = 0  # which `stream` the caches belong to
        if weights is None:
            self.weights.initialize(seed, self.family.parts)
        else:
            load_hf(weights, self.weights.tensors, self.family.parts)
        self._runners: dict[tuple[object, ...], Runner] = {}
        self._stale = True

    # ---- inference -------------------------------------------------------------------------------------------------

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V] of tokens [B, S]."""
        batch, length = self._check(tokens)
        runner = self._runner("forward", batch, length)
        self._prologue()
        runner.values["tokens"].copy_(tokens)
        runner.run()
        return runner.values["logits"].clone()

    def expert_choices(self, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
        """The experts chosen in each MoE layer, [B, S, k] by layer index, descending score."""
        batch, length = self._check(tokens)
        runner = self._runner("forward", batch, length, taps=("chosen",))
        self._prologue()
        runner.values["tokens"].copy_(tokens)
        runner.run()
        return {int(name.split(":")[0].rsplit(".", 1)[1]): t.long() for name, t in runner.taps.items()}

    def generate(self, tokens: torch.Tensor, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0,
                 stop: int | tuple[int, ...] | None = None, seed: int = 0) -> torch.Tensor:  # fmt: skip
        """Continue tokens [B, S] -> the new tokens [B, N], N = max_new_tokens unless `stop` ends every row sooner."""
        columns = list(self.stream(tokens, max_new_tokens, temperature, top_p, stop, seed))
        return torch.stack(columns, 1) if columns else torch.empty(tokens.shape[0], 0, dtype=torch.long)

    def stream(self, tokens: torch.Tensor, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0,
               stop: int | tuple[int, ...] | None = None, seed: int = 0) -> Iterator[torch.Tensor]:  # fmt: skip
        """As `generate`, one column [B] at a time, as soon as it is known. A row that met `stop` repeats it.

        A session has one stream at a time: InputError if it is asked on after another began or the weights changed.
        """
        batch, length = self._check(tokens, extra=max_new_tokens)
        sampling = Sampling(temperature, top_p, seed)
        stops = torch.tensor((stop,) if isinstance(stop, int) else stop or (), dtype=torch.long)
        if max_new_tokens < 1:
            return
        capacity = self._capacity(batch, length + max_new_tokens)
        self._generation += 1
        generation = self._generation
        prefill = self._runner("prefill", batch, length, capacity)
        self._prologue()
        prefill.values["tokens"].copy_(tokens)
        prefill.values["start"].fill_(0)
        prefill.run()
        column = sample(prefill.values["logits"][:, -1], sampling, 0)
        done = torch.isin(column, stops)
        yield column
        decode = self._runner("decode", batch, 1, capacity) if max_new_tokens > 1 else prefill
        for i in range(1, max_new_tokens):
            if len(stops) and bool(done.all()):
                return
            if generation != self._generation:
                raise InputError("a stream goes on after another began or a step was made; load a session for each")
            decode.values["tokens"].copy_(column.view(batch, 1))
            decode.values["start"].fill_(length + i - 1)
            decode.run()
            if decode is not prefill:
                decode.capture(accumulates=False)
            following = sample(decode.values["logits"][:, -1], sampling, i)
            column = torch.where(done, column, following) if len(stops) else following
            if len(stops):
                done |= torch.isin(column, stops)
            yield column

    def _capacity(self, batch: int, tokens: int) -> int:
        """Tokens that the cache for `batch` sequences is to hold: those of the one at hand if it is not far too large,
        so that what is bound to it serves again."""
        at_hand = [int(key[2]) for key in self._runners if key[:2] == ("cache", batch)]  # type: ignore[call-overload]
        return next((c for c in at_hand if tokens <= c <= 2 * tokens), tokens)

    def cache(self, batch: int, capacity: int) -> dict[str, torch.Tensor]:
        """The latent cache of `batch` sequences: by name, [batch, capacity, kv rank + rotary] for each layer."""
        key = ("cache", batch, capacity)
        if key not in self._runners:
            names = [n for n in self.program.sequence("decode").inputs if n.startswith("cache.")]
            width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
            dtype = torch_dtype(self.plan.job.dtype)
            made = {n: torch.zeros(batch, capacity, width, dtype=dtype, device=self.device) for n in names}
            self._forget(lambda k: k[0] in ("cache", "prefill", "decode"))
            self._runners[key] = Runner(values=made)
        return self._runners[key].values

    # ---- training --------------------------------------------------------------------------------------------------

    def step(self, tokens: torch.Tensor, lr: float | None = None) -> StepResult:
        """One optimizer step on tokens [global_batch, seq]; `lr` replaces the recipe's learning rate."""
        sequence = self._train_sequence()
        job = self.plan.job
        batch, length = self._check_training(tokens)
        if batch % job.micro_batch:
            raise InputError(f"a batch of {batch} sequences does not divide into micro-batches of {job.micro_batch}")
        with memory_explained(self.plan.memory):
            if length >= job.seq and ("train", job.micro_batch, length, 0, ()) not in self._runners:
                check_room(self.plan.memory, self.device)
            runner = self._runner("train", job.micro_batch, length)
            self.weights.start_optimizer()
            return self._step(runner, sequence, tokens, self.recipe.lr if lr is None else lr)

    def _step(self, runner: Runner, sequence: Sequence, tokens: torch.Tensor, rate: float) -> StepResult:
        """The host waits for the device once: for the losses, the norm and the loads, before anything is updated."""
        parts = tokens.to(self.device).split(self.plan.job.micro_batch)
        self._prologue()
        self._set_losses(runner, sequence, LOSSES, 1.0 / len(parts))
        sums = Sums(sequence, runner)
        for i, part in enumerate(parts):
            runner.values["tokens"].copy_(part)
            runner.run(accumulate=i > 0)
            sums.add()
        runner.capture()
        squares = self._epilogue.squares()
        losses, norm, loads = sums.read(squares)
        main = losses["loss.main"]
        mtp = tuple(v for n, v in losses.items() if n.startswith("loss.mtp"))
        balance = sum(v for n, v in losses.items() if n.startswith("balance"))
        routed = {y: n for y in sequence.layers for n in y.outputs if n in loads}
        by_layer = {y.name: loads[n] for y, n in routed.items()}
        result = StepResult(self.steps + 1, main, mtp, balance, norm, rate, tokens.numel(), by_layer)
        refuse_bad(result, losses, lambda: self._where(runner, parts))
        self.steps += 1
        self._epilogue.update(rate, self.steps, squares)
        self._generation += 1
        for layer, name in routed.items():
            bias = next(n for n in layer.inputs if n in self.weights.tensors)
            self._epilogue.update_bias(bias, sums.load(name))
        self._stale = True
        return result

    def _where(self, runner: Runner, parts: tuple[torch.Tensor, ...]) -> str:
        """A sentence on the first value of this step that is no number, found by doing it again."""
        held = first_unusable(self.weights.tensors)
        if held is not None:
            return f"The weight {held[0]} held {held[1]} before it"
        if self.program.has_sequence("prologue"):
            fault = first_fault(self._runners[("prologue",)])
            if fault is not None:
                return f"The first value that is no number: {fault}"
        for i, part in enumerate(parts):
            runner.values["tokens"].copy_(part)
            fault = first_fault(runner)
            if fault is not None:
                return f"The first value that is no number, in micro-batch {i + 1} of {len(parts)}: {fault}"
        return "Every value is a number; what overflows is the sum over micro-batches or of the gradients' squares"

    def gradients(self, tokens: torch.Tensor, losses: tuple[str, ...] = ("main",)) -> dict[str, torch.Tensor]:
        """Gradients by Hugging Face weight name, on tokens [B, S] as one batch.

        `losses`: which of main, mtp (times λ / modules) and balance (times α) are differentiated, weights as in the
        recipe. MTP weights are present only with "mtp".
        """
        unknown = set(losses) - set(LOSSES)
        if unknown:
            raise InputError(f"unknown loss {', '.join(sorted(unknown))}; known: {', '.join(LOSSES)}")
        sequence = self._train_sequence()
        batch, length = self._check_training(tokens)
        runner = self._runner("train", batch, length)
        self._prologue()
        self._set_losses(runner, sequence, losses, 1.0)
        runner.values["tokens"].copy_(tokens)
        runner.run()
        found: dict[str, torch.Tensor] = {}
        mtp = {f"model.layers.{i}." for i in self.config.mtp_layers}
        for name, gradient in self.weights.gradients().items():
            if "mtp" not in losses and any(name.startswith(m) for m in mtp):
                continue
            for part in self.family.parts(name, tuple(gradient.shape)):
                found[part.hf_name] = gradient[part.index].clone()
        return found

    def losses(self, tokens: torch.Tensor) -> dict[str, float]:
        """Every loss of tokens [B, S] by name (`loss.main`, `loss.mtp.K`, `balance.LAYER`), unweighted."""
        sequence = self._train_sequence()
        runner = self._runner("train", *self._check_training(tokens))
        self._prologue()
        runner.values["tokens"].copy_(tokens)
        runner.run()
        return {name: float(runner.values[name]) for name in sequence.losses}

    def save_hf(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint that transformers, vLLM and SGLang load; with MTP weights if this plan holds them."""
        config, held = self.config, self.weights.tensors
        if not any(n.startswith(f"model.layers.{i}.") for i in config.mtp_layers for n in held):
            config = dataclasses.replace(config, num_nextn_predict_layers=0)
        save_hf(directory, config, hf_tensors(config, held), dtype=dtype)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _train_sequence(self) -> Sequence:
        if not self.program.has_sequence("train"):
            raise InputError(
                f"this plan was compiled for --job {self.plan.job.kind}; compile with --job train to train"
            )
        sequence = self.program.sequence("train")
        if not sequence.gradients:
            raise InputError(
                f"the passes of this plan, '{self.plan.pipeline}', make no backward pass; "
                "compile with differentiate and then cut among them"
            )
        return sequence

    def _check_training(self, tokens: torch.Tensor) -> tuple[int, int]:
        batch, length = self._check(tokens)
        if length < 2:
            raise InputError("a sequence of 1 token has nothing to predict; the loss needs at least 2")
        return batch, length

    def _check(self, tokens: torch.Tensor, extra: int = 0) -> tuple[int, int]:
        """Batch and length of valid tokens; raises InputError for any others."""
        limit, vocab = self.config.max_position_embeddings, self.config.vocab_size
        if not isinstance(tokens, torch.Tensor):
            raise InputError(f"tokens must be a LongTensor [B, S], got a {type(tokens).__name__}")
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32) or 0 in tokens.shape:
            raise InputError(f"tokens must be a LongTensor [B, S], got {tokens.dtype} {list(tokens.shape)}")
        if tokens.shape[1] + extra > limit:
            new = f" and {extra} new ones" if extra else ""
            raise InputError(f"{tokens.shape[1]} tokens{new} exceed the model's {limit} positions")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab:
            raise InputError(f"token {low if low < 0 else high} is outside the vocabulary of {vocab}")
        return tokens.shape[0], tokens.shape[1]

    def _runner(self, name: str, batch: int, length: int, capacity: int = 0, taps: tuple[str, ...] = ()) -> Runner:
        caches = self.cache(batch, capacity) if capacity else {}
        key = (name, batch, length, capacity, taps)
        if key not in self._runners:
            self._forget(lambda k: k[0] == name)
            sequence = self.program.sequence(name)
            inputs: dict[str, torch.Tensor] = {
                "tokens": torch.zeros(batch, length, dtype=torch.long, device=self.device),
                "start": torch.zeros((), dtype=torch.int32, device=self.device),
                **caches, **self._hoisted(),
            }  # fmt: skip
            scalar = torch_dtype(self.weights.wide)
            inputs |= {
                n: torch.zeros((), dtype=scalar, device=self.device) for n in sequence.inputs if n.startswith("d:")
            }
            inputs = {n: t for n, t in inputs.items() if n in sequence.inputs} | self.weights.tensors
            gradients = self.weights.gradients() if sequence.gradients else None
            sizes = {"B": batch, "S": length, "C": capacity}
            self._runners[key] = prepare_sequence(self.engine, sequence, sizes, inputs, gradients, taps)
        return self._runners[key]

    def _forget(self, which: object) -> None:
        assert callable(which)
        for key in [k for k in self._runners if which(k)]:
            del self._runners[key]

    def _hoisted(self) -> dict[str, torch.Tensor]:
        """What the prologue computes from the weights once per step."""
        if not self.program.has_sequence("prologue"):
            return {}
        sequence = self.program.sequence("prologue")
        key = ("prologue",)
        if key not in self._runners:
            self._runners[key] = prepare_sequence(self.engine, sequence, {}, self.weights.tensors)
        return {n: self._runners[key].values[n] for n in sequence.results}

    def _prologue(self) -> None:
        if self._stale and self.program.has_sequence("prologue"):
            self._hoisted()
            runner = self._runners[("prologue",)]
            runner.run()
            runner.capture(accumulates=False)
        self._stale = False

    def _set_losses(self, runner: Runner, sequence: Sequence, losses: tuple[str, ...], share: float) -> None:
        modules = max(1, self.config.num_nextn_predict_layers)
        weights = {
            "loss.main": ("main", 1.0),
            "loss.mtp": ("mtp", self.recipe.mtp / modules),
            "balance": ("balance", self.recipe.balance),
        }
        for name in sequence.losses:
            kind, weight = next(w for prefix, w in weights.items() if name.startswith(prefix))
            runner.values[f"d:{name}"].fill_(weight * share if kind in losses else 0.0)
