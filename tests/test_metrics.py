"""Metrics: what stands in the files after any interruption, and what the display says."""

from __future__ import annotations

import io
import json
import math
import struct
from pathlib import Path

import pytest
import torch

from dsv3c.errors import InputError, WorkError
from dsv3c.runtime.metrics import Meter, Metrics, Progress, load_balance, read_metrics


def lines(out: Path) -> list[str]:
    return (out / "metrics.jsonl").read_text().splitlines()


def run(out: Path, first: int, last: int, resume_from: int = 0) -> None:
    with Metrics(out, resume_from, tensorboard=False) as metrics:
        for step in range(first, last + 1):
            metrics.write(step, {"loss": 1 / step})


def test_each_line_is_on_disk_at_once_and_in_full_precision(tmp_path: Path) -> None:
    loss = struct.unpack("<d", b"\x01\x02\x03\x04\x05\x06\x07\x40")[0]
    with Metrics(tmp_path / "deep" / "out", tensorboard=False) as metrics:
        metrics.write(
            1, {"loss": loss, "tokens": 2**40, "expert_load": [1, 2.5], "dtype": "ü", "last": True, "x": None}
        )
        text = lines(tmp_path / "deep" / "out")[0]
    line = json.loads(text)
    assert list(line) == ["step", "loss", "tokens", "expert_load", "dtype", "last", "x"]
    assert line["loss"] == loss
    assert line["tokens"] == 2**40
    assert line["expert_load"] == [1, 2.5]
    assert "ü" in text


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.write(1, {"loss": math.nan, "norm": math.inf, "each": [1.0, -math.inf]})
    assert lines(tmp_path) == ['{"step": 1, "loss": null, "norm": null, "each": [1.0, null]}']


def test_resuming_drops_later_steps_and_a_half_written_line(tmp_path: Path) -> None:
    run(tmp_path / "whole", 1, 9)
    run(tmp_path / "cut", 1, 7)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert [line["step"] for line in read_metrics(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6, 7]
    run(tmp_path / "cut", 6, 9, resume_from=5)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.parametrize("damage", ['{"step": 3, "lo', '{"step": 3}', "", "garbage\n", "[1]\n", '{"step": "3"}\n'])
def test_resuming_at_the_end_keeps_whole_lines_only(tmp_path: Path, damage: str) -> None:
    run(tmp_path, 1, 2)
    kept = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(damage)
    with Metrics(tmp_path, 2, tensorboard=False) as metrics:
        metrics.write(3, {"loss": 0.5})
    assert lines(tmp_path) == [*kept, '{"step": 3, "loss": 0.5}']
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_fresh_start_begins_an_empty_file(tmp_path: Path) -> None:
    run(tmp_path, 1, 4)
    run(tmp_path, 1, 1)
    assert lines(tmp_path) == ['{"step": 1, "loss": 1.0}']
    assert read_metrics(tmp_path / "nowhere") == []


def test_tensorboard_gets_the_numbers_and_forgets_what_is_repeated(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 3), (3, 4)):
        with Metrics(tmp_path, first - 1) as metrics:
            for step in range(first, last + 1):
                metrics.write(step, {"loss": first + step / 8, "name": "x", "done": False, "each": [1.0]})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.125), (2, 1.25), (3, 3.375), (4, 3.5)]


def test_a_full_disk_is_a_work_error(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=False)
    metrics._file.close()
    metrics._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(WorkError, match=r"metrics.jsonl: No space left on device; .*--resume"):
        metrics.write(1, {"loss": 1.0})


def test_an_output_that_is_a_file_or_read_only_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="is not a folder"):
            Metrics(out)
    assert (tmp_path / "file").read_text() == "precious"

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(WorkError, match="Read-only file system"):
        Metrics(tmp_path / "new")


def test_load_balance_is_that_of_the_worst_layer() -> None:
    assert load_balance(torch.tensor([4, 4, 4, 4])) == 1.0
    assert load_balance(torch.tensor([[4, 4, 4, 4], [0, 8, 6, 2], [0, 0, 0, 0]])) == 2.0
    assert load_balance(torch.tensor([[0, 0]])) == 1.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_plain_lines_come_every_few_seconds_and_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(100, start=10, stream=stream, interval=5.0, clock=clock) as progress:
        for step in range(11, 25):
            clock.now += 1
            progress.update(step, tokens=500, loss=step / 4, expert_load=1.5 if step > 11 else None)
        progress.note("[saved]")
    assert stream.getvalue().splitlines() == [
        "step 11/100 · loss 2.7500 · 500 tokens/s",
        "step 16/100 · loss 4.0000 · 500 tokens/s · expert load 1.50",
        "step 21/100 · loss 5.2500 · 500 tokens/s · expert load 1.50",
        "[saved]",
        "step 24/100 · loss 6.0000 · 500 tokens/s · expert load 1.50",
    ]


def test_the_rate_is_that_of_the_last_steps() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(60, stream=stream, interval=0.0, clock=clock) as progress:
        for step in range(1, 61):
            clock.now += 10 if step == 1 else 0.5
            progress.update(step, tokens=100, loss=1.0)
    shown = stream.getvalue().splitlines()
    assert "10 tokens/s" in shown[0]
    assert "200 tokens/s" in shown[-1]


def test_on_a_terminal_there_is_a_bar() -> None:
    stream = Terminal()
    with Progress(10, stream=stream) as progress:
        progress.update(3, tokens=10, loss=2.5, expert_load=1.25)
        progress.note("a note [with brackets]")
    text = stream.getvalue()
    assert "loss 2.5000" in text
    assert "expert load 1.25" in text
    assert "3/10" in text
    assert "a note [with brackets]" in text


def test_a_meter_is_silent_about_quick_work() -> None:
    clock, stream = Clock(), io.StringIO()
    with Meter("tokenizing", stream=stream, interval=5.0, clock=clock) as meter:
        meter(10_000_000, 40_000_000)
        clock.now += 6
        meter(20_000_000, 40_000_000)
        meter(30_000_000, 40_000_000)
    assert stream.getvalue() == "tokenizing: 20.0 of 40.0 MB\n"
    terminal = Terminal()
    with Meter("tokenizing", stream=terminal) as meter:
        meter(20_000_000, 40_000_000)
    assert "tokenizing" in terminal.getvalue()
    assert "20.0 of 40.0 MB" in terminal.getvalue()
