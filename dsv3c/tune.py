"""`dsv3c tune`: measure what can execute the matrix products of plans and models on this GPU, for the next compile."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dsv3c.errors import InputError

if TYPE_CHECKING:
    import rich.progress

    from dsv3c.target import Product, Target

QUIET = 2.0
"""Seconds between lines where the output is no terminal."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tuned:
    """What was measured: for which target, how many products, and the file that `dsv3c compile` will read."""

    target: str
    products: int
    seconds: float
    path: str


def tune(sources: list[str], *, target: str | None = None, precision: str | None = None, seq: int | None = None,
         micro_batch: int = 1, rounds: int = 20, stream: TextIO | None = None) -> Tuned:  # fmt: skip
    """Measure the products of plans and models; of the shipped table if no source is given.

    `target`: None for the one that describes this GPU. `precision`, `seq` and `micro_batch` are for models. Raises
    InputError where there is no Hopper GPU, or for a source that is neither a plan nor a model.
    """
    from dsv3c.targets import find

    machine = find(target or _here())
    if machine.selector is None:
        raise InputError(f"--target {machine.name} has one implementation of each product; tune h100, h200 or h800")
    trouble = machine.trouble()
    if trouble:
        raise InputError(f"nothing can be measured here: {trouble}")
    products = sorted({p for source in sources for p in _products(source, machine, precision, seq, micro_batch)})
    start = time.monotonic()
    with _Bar(sys.stderr if stream is None else stream) as tell:
        path = machine.selector.tune(products, rounds, tell.update)
    return Tuned(machine.name, tell.total, round(time.monotonic() - start, 1), str(path))


def _here() -> str:
    """The target of this GPU; any Hopper target where there is none, for its word on why."""
    from dsv3c.targets import find
    from dsv3c.targets._cuda_device import device_target

    return "h100" if find("h100").trouble() else device_target()


def _products(source: str, machine: Target, precision: str | None, seq: int | None,
              micro_batch: int) -> tuple[Product, ...]:  # fmt: skip
    from dsv3c import driver
    from dsv3c.plan import load_plan

    if Path(source).is_file() and not source.endswith(".json"):
        plan = load_plan(source)
        if not plan.choices:
            raise InputError(f"{source}: is a plan for {plan.target}, which has nothing to choose; give one for Hopper")
    else:
        plan = driver.compile(
            source, target=machine.name, precision=precision, seq=seq, micro_batch=micro_batch, kernels="none",
            allow_oversize=True,
        )  # fmt: skip
    return tuple(c.product for c in plan.choices)


class _Bar:
    """A bar on a terminal with a line for each product above it; elsewhere a line now and then."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: rich.progress.Progress | None = None
        self._next = 0.0
        self.total = 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, line: str) -> None:
        """After `done` of `total` products; `line` says what came of the last."""
        self.total = total
        if not self._stream.isatty():
            if time.monotonic() >= self._next or done == total:
                print(f"{done}/{total} · {line}", file=self._stream, flush=True)
                self._next = time.monotonic() + QUIET
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

            columns = (BarColumn(bar_width=32), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(file=self._stream))
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.console.print(line, markup=False, highlight=False)
        self._bar.update(self._task, completed=done)
