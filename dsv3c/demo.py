"""The whole arrow on a laptop: compile a small DeepSeek-V3, train it on Python's own sources, sample it, and compile
the 671B model as well.

`make demo` runs this. It needs no network and no files but those of the Python that runs it.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3c.console import number, size, table
from dsv3c.errors import Dsv3cError, InputError, WorkError
from dsv3c.job import Recipe
from dsv3c.models.config import ModelConfig
from dsv3c.plan import Plan

OUT = Path("out") / "demo"
STEPS = 240
WINDOW = 20
"""Steps at the beginning and at the end whose mean losses are compared."""
FALL = 1.0
"""By how many nats the loss must fall."""
PROMPTS = ("def ", "import ", "class ")
RECIPE = Recipe(lr=1e-3, final_lr=0.05, warmup=0.05, embedding_lr=20.0, head_lr=3.0, bias_speed=0.01)
TESTS = ("test", "tests", "idle_test")
LEFT_OUT = frozenset(("encodings", "pydoc_data", "lib2to3", "idlelib", "site-packages", "dist-packages", *TESTS))
"""Folders below the standard library that hold tables, test data or other people's packages."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is trained and on what; tests make it small. `data` None: the standard library's sources."""

    model: str | ModelConfig = "deepseek-v3-tiny"
    large: str = "deepseek-v3"
    large_target: str = "h800"
    seq: int = 128
    batch: int = 8
    steps: int = STEPS
    out: Path = OUT
    data: tuple[Path, ...] | None = None
    tokenizer: str | None = None
    new_tokens: int = 48
    fall: float = FALL


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m dsv3c.demo`: exit status 0, or 1 if the loss does not fall by a nat, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("python -m dsv3c.demo", description=run.__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"optimizer steps (default {STEPS})")
    arguments = parser.parse_args(argv)
    try:
        return run(Settings(steps=arguments.steps))
    except Dsv3cError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130


def run(settings: Settings) -> int:
    """Compile, train, sample and save a small DeepSeek-V3, then compile the large one; prints what happens."""
    from dsv3c import driver
    from dsv3c.runtime.state import discard_states
    from dsv3c.runtime.train import train

    begin = time.monotonic()
    _title(f"1. Compile {_name(settings.model)}")
    plan = driver.compile(
        settings.model, job="train", target="cpu", precision="fp32", seq=settings.seq, micro_batch=settings.batch,
        recipe=RECIPE,
    )  # fmt: skip
    _describe(plan, time.monotonic() - begin)

    files = settings.data if settings.data is not None else standard_library()
    _title(f"2. Train it: {settings.steps} steps of {settings.batch} x {settings.seq} tokens")
    total = sum(f.stat().st_size for f in files)
    print(f"text: {len(files)} files, {total / 1e6:.1f} MB, {_origin(settings)}", flush=True)
    discard_states(settings.out)
    result = train(
        plan, files, steps=settings.steps, out=settings.out, save_every=settings.steps, tokenizer=settings.tokenizer
    )
    if result.interrupted or result.hf is None:
        print("stopped; 'make demo' begins anew")
        return 130
    print(result)
    fallen = show_losses(losses(settings.out))

    _title("3. Sample it")
    _sample(result.hf, settings)

    _title(f"4. Compile {settings.large} for {settings.large_target} the same way")
    begin = time.monotonic()
    _describe(
        driver.compile(settings.large, job="train", target=settings.large_target, allow_oversize=True),
        time.monotonic() - begin,
    )
    print("One device cannot hold it; the plan says so, and what each part would take.")
    if not fallen >= settings.fall:
        raise WorkError(
            f"the loss fell by {fallen:.2f} nats only, from the mean of the first steps to that of the last; "
            f"{settings.fall:g} are expected. See {settings.out}/metrics.jsonl."
        )
    return 0


def standard_library() -> tuple[Path, ...]:
    """The sources of this Python's standard library, sorted, without LEFT_OUT.

    Raises InputError if this Python came without them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, inside, names in os.walk(root):
        inside[:] = sorted(name for name in inside if name not in LEFT_OUT)
        found += [path for name in sorted(names) if name.endswith(".py") and _is_text(path := Path(folder) / name)]
    if not found:
        raise InputError(f"{root} holds no Python sources to train on; use a Python that comes with them")
    return tuple(found)


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError):
        return False


def losses(out: Path) -> list[float]:
    """The main loss of each step of the run in `out`."""
    from dsv3c.runtime.metrics import read_metrics

    return [float(line["loss"]) for line in read_metrics(out) if isinstance(line["loss"], float)]


def show_losses(found: Sequence[float], rows: int = 10, width: int = 40) -> float:
    """Print the losses as bars; gives how far the mean of the last steps lies below that of the first, in nats."""
    group = -(-len(found) // rows)
    means = [(i, found[i : i + group]) for i in range(0, len(found), group)]
    top = max(found)
    print("\nloss (cross entropy, nats per token)")
    for first, part in means:
        mean = sum(part) / len(part)
        steps = f"{first + 1}-{first + len(part)}"
        print(f"  {steps:>9}  {mean:6.3f}  {'█' * round(width * mean / top)}")
    window = min(WINDOW, max(1, len(found) // 2))
    before, after = sum(found[:window]) / window, sum(found[-window:]) / window
    print(f"  first {window} steps {before:.3f}, last {window} steps {after:.3f}: {before - after:.3f} nats lower")
    return before - after


def _sample(weights: str, settings: Settings) -> None:
    from dsv3c import driver
    from dsv3c.runtime.generate import generate_text

    session = driver.load(driver.compile(weights, job="decode"), weights=weights)
    for i, prompt in enumerate(PROMPTS):
        print("\n" * (i > 0) + prompt, end="", flush=True)
        generate_text(
            session, prompt, max_new_tokens=settings.new_tokens, temperature=0.8, top_p=0.9, seed=i, tokenizer=weights,
            on_text=_show,
        )  # fmt: skip
        print()
    print(f"\nThe model is in {weights}; sample it yourself with")
    print(f"  {sys.executable} -m dsv3c generate {weights} --prompt 'class '")


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def _name(model: str | ModelConfig) -> str:
    return model if isinstance(model, str) else "a small model"


def _origin(settings: Settings) -> str:
    return "given" if settings.data is not None else f"this Python's own sources in {sysconfig.get_path('stdlib')}"


def _describe(plan: Plan, seconds: float) -> None:
    memory = plan.memory
    generated = f"{len(plan.kernels)} generated" + (
        f", {len(plan.missing_kernels)} regions without one" if plan.missing_kernels else ""
    )
    limit = f" of {size(memory.limit_bytes)}" if memory.limit_bytes else ""
    rows = [
        ("parameters", number(plan.parameters.total)),
        ("  active per token", number(plan.parameters.active)),
        ("  MTP module", number(plan.parameters.mtp)),
        ("memory of one rank", f"{size(memory.peak_bytes)}{limit}"),
        *((f"  {kind}", size(count)) for kind, count in memory.by_kind if count),
        ("kernels", generated),
        ("compiled in", f"{seconds:.1f} s"),
    ]
    print(table(rows), flush=True)


if __name__ == "__main__":
    sys.exit(main())
