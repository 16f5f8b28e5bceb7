"""The loss of FP8 training against BF16 training: deepseek-v3-mini on real text, same seed, same data.

    python -m benchmarks.loss_curve [--steps 1000] [--data PATH...] [--plan FILE] [--control] [--out DIR] [--record]

Each step takes 4×4096 tokens. Compared are running means of the main loss (factor 0.98); the figure is the largest gap
after step 200, relative to BF16. Without --data the text is what Python and its packages on this machine are written
in, with a tokenizer trained on it. `--control` trains a third time, in BF16 from weights that differ by a thousandth,
to show what gap chance makes. Writes loss_curve.json (every tenth step) and loss-curve.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import dsv3c
from benchmarks.common import RESULTS, record
from benchmarks.slice import draw_on_gpu
from dsv3c.job import Recipe
from dsv3c.plan import load_plan
from dsv3c.runtime.corpus import Corpus, scan
from dsv3c.runtime.data import Sampler, TokenFile, choose_tokenizer, prepare
from dsv3c.runtime.train import learning_rate
from dsv3c.runtime.weights import Weights

MODEL, SEQ, MICRO = "deepseek-v3-mini", 4096, 4
FACTOR, SETTLED, EVERY = 0.98, 200, 10
CONTROL = "control"
RECIPE = Recipe(bias_speed=0.02, balance=1e-2)
"""The published speed of router biases is for runs a hundred times as long: in 1,000 steps of 16,384 tokens it leaves
most experts without tokens, and then which ones are left, by chance, decides the loss."""
DISTURBANCE = 1e-3
HERE = Path(__file__).parent
BYTES_PER_TOKEN = 5
"""More text than any tokenizer needs per token, so that no sequence is read twice."""


def text(paths: Sequence[str | Path], most: int, seed: int) -> Corpus:
    """Documents below `paths` in a random order, as many as make `most` bytes."""
    documents = list(scan(paths).documents)
    random.Random(seed).shuffle(documents)
    kept, size = [], 0
    for document in documents:
        if size >= most:
            break
        kept.append(document)
        size += document.size
    return Corpus(tuple(kept))


def own_sources() -> list[Path]:
    """Where Python's and its packages' sources lie."""
    found = dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    return [path for path in found if path.is_dir()]


def means(losses: Iterable[float]) -> list[float]:
    """The running mean after each step, without the bias toward where it starts."""
    made: list[float] = []
    mean = 0.0
    for step, loss in enumerate(losses, 1):
        mean = FACTOR * mean + (1 - FACTOR) * loss
        made.append(mean / (1 - FACTOR**step))
    return made


def worst_gap(ours: Sequence[float], other: Sequence[float], settled: int = SETTLED) -> tuple[float, int]:
    """The largest relative difference of two curves after step `settled`, and at which step."""
    gaps = [(abs(a - b) / b, step) for step, (a, b) in enumerate(zip(ours, other, strict=True), 1) if step > settled]
    return max(gaps)


def train(precision: str, plan: str | None, target: str, sampler: Sampler, steps: int) -> list[float]:
    """The main loss of every step."""
    kind = "bf16" if precision == CONTROL else precision
    plan = plan and plan.format(kind)
    made = plan or dsv3c.compile(MODEL, target=target, precision=kind, seq=SEQ, micro_batch=MICRO, recipe=RECIPE)
    with mock.patch.object(Weights, "initialize", draw_on_gpu):
        session = dsv3c.load(made)
    if precision == CONTROL:
        generator = torch.Generator(device=session.weights.device).manual_seed(1)
        for t in (t for t in session.weights.tensors.values() if t.dim() > 1):
            for part in t.view(-1).split(1 << 26):  # the largest weights have no room beside them
                part.mul_(1 + DISTURBANCE * torch.randn(part.shape, generator=generator, device=part.device))
    losses: list[float] = []
    recipe, begin = session.recipe, time.monotonic()
    for step in range(1, steps + 1):
        done = session.step(sampler.batch(step), learning_rate(step, steps, recipe))
        losses.append(done.loss)
        if step % max(1, steps // 20) == 0:
            rate = step * done.tokens / (time.monotonic() - begin)
            busiest = max(float(load.max() / load.mean()) for load in done.expert_load.values())
            unused = max(int((load == 0).sum()) for load in done.expert_load.values())
            line = (f"{precision} step {step}: loss {done.loss:.4f}, norm {done.grad_norm:.3f}, {rate:,.0f} tokens/s; "
                    f"worst layer: busiest expert {busiest:.1f} times the mean, {unused} unused")  # fmt: skip
            print(line, file=sys.stderr, flush=True)
    return losses


def picture(curves: dict[str, list[float]], gap: float, step: int, every: int = 1) -> str:
    """The curves as SVG, of which every so many steps are given: the losses above, their relative difference below."""
    width, high, low, left, top = 720, 260, 120, 56, 28
    names, steps = list(curves), len(next(iter(curves.values())))
    ceiling = max(max(c[steps // 50 :]) for c in curves.values())
    floor = min(min(c) for c in curves.values())
    colours = {"bf16": "#888888", "fp8": "#c0392b", CONTROL: "#bbbbdd"}

    def x(i: int) -> float:
        return left + (width - left - 16) * (i + 1) / steps

    def line(values: Sequence[float], colour: str, bottom: float, top_value: float, y: float, height: float) -> str:
        every = max(1, steps // 400)
        span = max(top_value - bottom, 1e-9)
        points = " ".join(
            f"{x(i):.1f},{y + height * (1 - (min(v, top_value) - bottom) / span):.1f}"
            for i, v in enumerate(values) if i % every == 0
        )  # fmt: skip
        return f'<polyline fill="none" stroke="{colour}" stroke-width="1.4" points="{points}"/>'

    def label(at: float, y: float, words: str, anchor: str = "start") -> str:
        return f'<text x="{at:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'

    parts = [label(left, 18, "Training loss (running mean 0.98): " + ", ".join(names))]
    parts += [line(curves[n], colours.get(n, "#2c3e50"), floor, ceiling, top, high) for n in names]
    parts += [label(left - 6, top + 10, f"{ceiling:.2f}", "end"), label(left - 6, top + high, f"{floor:.2f}", "end")]
    if {"fp8", "bf16"} <= set(names):
        gaps = [100 * (a / b - 1) for a, b in zip(curves["fp8"], curves["bf16"], strict=True)]
        begin = top + high + 40
        words = f"FP8 above BF16 in %; worst after step {SETTLED}: {100 * gap:.2f} at {step}"
        parts.append(label(left, begin - 8, words))
        limit = max(0.5, math.ceil(2 * max(map(abs, gaps[SETTLED // every :]), default=0.0)) / 2)
        parts.append(line([max(-limit, g) for g in gaps], "#c0392b", -limit, limit, begin, low))
        parts.append(line([0.0] * steps, "#bbbbbb", -limit, limit, begin, low))
        parts += [label(left - 6, begin + 10, f"+{limit}", "end"), label(left - 6, begin + low, f"-{limit}", "end")]
    bottom = top + high + low + 62
    parts += [label(left, bottom, "step 1"), label(width - 16, bottom, f"{steps * every}", "end")]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + 12}" font-size="12"'
    body = ['<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""]
    return "\n".join([f'{head} font-family="sans-serif">', *body])


def write(losses: dict[str, list[float]], facts: dict[str, Any], out: Path) -> tuple[float, int]:
    """The files of a run; gives the worst gap and its step."""
    curves = {name: means(values) for name, values in losses.items()}
    settled = min(SETTLED, len(next(iter(curves.values()))) // 2)
    gap, step = worst_gap(curves["fp8"], curves["bf16"], settled)
    thin = {name: [round(v, 4) for v in values[EVERY - 1 :: EVERY]] for name, values in curves.items()}
    if CONTROL in curves:
        facts["chance_gap"] = worst_gap(curves[CONTROL], curves["bf16"], settled)[0]
    body = {**facts, "factor": FACTOR, "every": EVERY, "worst_gap": gap, "worst_step": step, "running_mean": thin}
    out.mkdir(parents=True, exist_ok=True)
    (out / "loss_curve.json").write_text(json.dumps(body) + "\n")
    drawn = (HERE.parent / "docs" if out == HERE else out) / "loss-curve.svg"
    drawn.write_text(picture(curves, gap, step))
    return gap, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--data", nargs="+", help="text files or folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan", help="a plan compiled elsewhere; {} stands for the precision")
    parser.add_argument("--target", default="h100")
    parser.add_argument("--control", action="store_true", help="train a third time, to see what gap chance makes")
    parser.add_argument("--out", type=Path, default=HERE, help="default: here, the picture in docs/")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a precision and a token file: print the losses
    given = parser.parse_args()
    vocab, batch, seq = 32768, MICRO, SEQ
    if given.plan:
        planned = load_plan(given.plan.format("fp8"))
        vocab, batch, seq = int(str(planned.config["vocab_size"])), planned.job.global_batch, planned.job.seq
    if given.one:
        precision, path = given.one
        sampler = Sampler(TokenFile.open(Path(path)), seq, batch, given.seed)
        print(json.dumps(train(precision, given.plan, given.target, sampler, given.steps)))
        return
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        corpus = text(given.data or own_sources(), BYTES_PER_TOKEN * given.steps * batch * seq, given.seed)
        tokens = prepare(corpus, choose_tokenizer(None, vocab, corpus, None), folder)
        print(f"{len(corpus.documents):,} documents, {corpus.size:,} bytes, {len(tokens):,} tokens, "
              f"{time.monotonic() - begin:.0f} s", flush=True)  # fmt: skip
        losses: dict[str, list[float]] = {}
        for precision in ("bf16", "fp8", CONTROL)[: 2 + given.control]:  # each in its own process, with the whole GPU
            again = [*sys.argv[1:], "--one", precision, str(tokens.path)]
            command = [sys.executable, "-m", "benchmarks.loss_curve", *again]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            losses[precision] = json.loads(done.stdout.splitlines()[-1])
    facts: dict[str, Any] = {
        "steps": given.steps, "tokens_per_step": batch * seq, "documents": len(corpus.documents), "bytes": corpus.size,
        "tokens": len(tokens), "data": corpus.digest, "seed": given.seed,
        "final_losses": {n: means(v)[-1] for n, v in losses.items()},
    }  # fmt: skip
    gap, step = write(losses, facts, given.out)
    chance = f"; by chance {facts['chance_gap']:.3%}" if CONTROL in losses else ""
    print(f"worst gap {gap:.3%} at step {step}{chance}; final {facts['final_losses']}")
    if given.record:
        path = RESULTS if given.out == HERE else given.out / RESULTS.name
        record("mini/loss of fp8 against bf16, worst gap after step 200", 100 * gap, "%", load=0.0, path=path)
        for name, values in losses.items():
            record(f"mini/{name}/loss after {given.steps} steps", means(values)[-1], "nats", load=0.0, path=path)


if __name__ == "__main__":
    main()
