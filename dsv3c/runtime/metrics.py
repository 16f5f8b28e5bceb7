"""What a training run tells: one JSON line a step, TensorBoard scalars, and a progress display."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, TextIO

from dsv3c.errors import InputError, WorkError

if TYPE_CHECKING:
    import rich.progress
    import torch
    from torch.utils.tensorboard import SummaryWriter

Value = float | int | bool | str | None | Sequence[float] | Sequence[int]

FILE_NAME = "metrics.jsonl"
_WINDOW_STEPS = 20


class Metrics:
    """Appends to OUT/metrics.jsonl and OUT/tensorboard; a context manager."""

    def __init__(self, out_dir: str | Path, resume_from_step: int = 0, *, tensorboard: bool = True) -> None:
        """Keeps the whole lines of steps 1 to `resume_from_step` of an earlier run and drops everything else.

        Raises InputError if `out_dir` cannot be a folder, WorkError if it cannot be written.
        """
        self.path = Path(out_dir) / FILE_NAME
        self._board: SummaryWriter | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _keep_until(self.path, resume_from_step)
            self._file: IO[str] = self.path.open("a", encoding="utf-8")
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                folder = self.path.parent / "tensorboard"
                self._board = SummaryWriter(str(folder), purge_step=resume_from_step + 1)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"--out: {out_dir} is not a folder; name a new or an existing folder.") from error
        except OSError as error:
            raise self._failed(error) from error

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Writes and flushes the line of `step` (from 1): floats in full precision, NaN and infinities as null.

        Numbers also become TensorBoard scalars of the same name. Raises WorkError if the disk is full.
        """
        line = {"step": step} | {name: _plain(value) for name, value in values.items()}
        try:
            self._file.write(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in values.items():
                    if isinstance(value, int | float) and not isinstance(value, bool):
                        self._board.add_scalar(name, value, step)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Flushes and closes both; safe to call twice."""
        try:
            self._file.close()
            if self._board is not None:
                self._board.close()
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _failed(self, error: OSError) -> WorkError:
        return WorkError(
            f"cannot write {self.path}: {error.strerror or error}; "
            "make room or choose another --out, then continue with --resume."
        )


def read_metrics(out_dir: str | Path) -> list[dict[str, Value]]:
    """The lines of OUT/metrics.jsonl in order, without a half-written last one; empty if there is no file."""
    path = Path(out_dir) / FILE_NAME
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [line for raw in file if (line := _parsed(raw)) is not None]


def _parsed(raw: bytes) -> dict[str, Value] | None:
    """One whole line with a step, or None."""
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _keep_until(path: Path, last: int) -> None:
    """Leaves in `path` the whole lines of steps 1 .. `last`, replacing the file only if that drops something."""
    if not path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    dropped = False
    try:
        with path.open("rb") as source, temporary.open("wb") as target:
            for raw in source:
                line = _parsed(raw)
                step = line["step"] if line is not None else None
                if isinstance(step, int) and 1 <= step <= last:
                    target.write(raw)
                else:
                    dropped = True
            target.flush()
            os.fsync(target.fileno())
        if dropped:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Value) -> Value | list[float | None]:
    """`value` as JSON can hold it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int | str):
        return value
    return [_number(item) for item in value]


def _number(item: float) -> float | None:
    return item if math.isfinite(item) else None


def load_balance(counts: torch.Tensor) -> float:
    """Load of the busiest expert over the mean, of the worst layer: 1 is perfect balance.

    `counts`: rows routed to each expert, [layers, experts] or [experts]. A layer without rows counts as 1.
    """
    per_layer = counts.reshape(-1, counts.shape[-1]).double()
    mean = per_layer.mean(dim=-1)
    ratio = per_layer.amax(dim=-1) / mean
    return float(ratio.where(mean > 0, ratio.new_ones(())).max())


class Progress:
    """Where training stands: a live bar on a terminal, otherwise a plain line every few seconds; a context manager."""

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        stream: TextIO | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`total` steps of which `start` were done before; plain lines are at least `interval` seconds apart."""
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._interval = interval
        self._clock = clock
        self._next_line = clock()
        self._window: deque[tuple[float, int]] = deque([(clock(), 0)], maxlen=_WINDOW_STEPS + 1)
        self._tokens = 0
        self._bar: rich.progress.Progress | None = None
        self._pending: str | None = None
        if self._stream.isatty():
            self._bar, self._task = _bar(self._stream, total, start, "{task.completed}/{task.total}")

    def update(self, step: int, *, tokens: int, loss: float, expert_load: float | None = None) -> None:
        """After step `step`, which trained on `tokens` tokens; `expert_load` as `load_balance` gives it."""
        now = self._clock()
        self._tokens += tokens
        first, before = self._window[0]
        rate = (self._tokens - before) / max(now - first, 1e-9)
        self._window.append((now, self._tokens))
        text = f"loss {loss:.4f} · {rate:,.0f} tokens/s"
        if expert_load is not None:
            text += f" · expert load {expert_load:.2f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=text)
            return
        line = f"step {step}/{self._total} · {text}"
        if now >= self._next_line or step >= self._total:
            self._print(line)
            self._next_line = now + self._interval
            self._pending = None
        else:
            self._pending = line

    def note(self, text: str) -> None:
        """Prints a line of its own."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def close(self) -> None:
        """Ends the display; the last step is shown even if its line was not due."""
        if self._bar is not None:
            self._bar.stop()
        elif self._pending is not None:
            self._print(self._pending)
            self._pending = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class Meter:
    """Progress of work counted in bytes: call it with (done, total), as `data.prepare` does; a context manager.

    On a terminal a bar, otherwise a line when the work has taken `interval` seconds, and every `interval` from then.
    """

    def __init__(
        self,
        label: str,
        *,
        stream: TextIO | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._stream = sys.stderr if stream is None else stream
        self._interval = interval
        self._clock = clock
        self._next_line = clock() + interval
        self._bar: rich.progress.Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        text = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB"
        if self._stream.isatty():
            if self._bar is None:
                self._bar, self._task = _bar(self._stream, total, 0, self._label)
            self._bar.update(self._task, completed=done, status=text)
        elif self._clock() >= self._next_line:
            print(f"{self._label}: {text}", file=self._stream, flush=True)
            self._next_line = self._clock() + self._interval

    def close(self) -> None:
        """Ends the display."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _bar(stream: TextIO, total: int, start: int, label: str) -> tuple[rich.progress.Progress, rich.progress.TaskID]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn(label),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=Console(file=stream),
    )
    task = bar.add_task("", total=total, completed=start, status="")
    bar.start()
    return bar, task
