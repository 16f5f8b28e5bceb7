"""The demo in small: it runs from text to text, and fails unless the loss falls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import SMALL

from dsv3c import demo
from dsv3c.demo import Settings, losses, run, show_losses, standard_library
from dsv3c.errors import InputError, WorkError
from dsv3c.runtime.hf import checkpoint_config
from dsv3c.runtime.state import save_state, states, step_of
from dsv3c.runtime.train import TrainResult


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A demo of a few seconds."""
    (tmp_path / "text.py").write_text("".join(f"value_{i} = {i}\n" for i in range(300)))
    return Settings(
        model=SMALL, large="deepseek-v3-tiny", large_target="h800", seq=32, batch=4, steps=30, out=tmp_path / "out",
        data=(tmp_path / "text.py",), tokenizer="bytes", new_tokens=12, fall=0.5,
    )  # fmt: skip


def test_the_demo_trains_samples_and_compiles(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    save_state(settings.out, 99, {"left": torch.zeros(1)}, {})  # an earlier demo may have been here
    assert run(settings) == 0
    out = capsys.readouterr().out
    assert out.count("nats lower") == 1 and "7.49 M" in out
    for prompt in demo.PROMPTS:
        assert f"\n{prompt}" in out
    assert len(losses(settings.out)) == 30 and [step_of(path) for path in states(settings.out)] == [30]
    assert checkpoint_config(settings.out / "hf").vocab_size == SMALL.vocab_size


def test_the_demo_fails_if_the_loss_does_not_fall(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = TrainResult(str(settings.out), 30, 30, 5.5, 1, 1.0, str(settings.out / "hf"))
    monkeypatch.setattr("dsv3c.runtime.train.train", lambda *_, **__: stuck)
    monkeypatch.setattr(demo, "losses", lambda _: [5.5] * 30)
    monkeypatch.setattr(demo, "_sample", lambda *_: None)
    with pytest.raises(WorkError, match=r"the loss fell by 0\.00 nats only"):
        run(settings)


def test_an_interrupted_demo_says_so(settings: Settings, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    stopped = TrainResult(str(settings.out), 3, 30, 5.5, 1, 1.0, None, interrupted=True)
    monkeypatch.setattr("dsv3c.runtime.train.train", lambda *_, **__: stopped)
    assert run(settings) == 130
    assert "'make demo' begins anew" in capsys.readouterr().out


def test_losses_are_shown_as_bars(capsys: pytest.CaptureFixture[str]) -> None:
    fallen = show_losses([8.0] * 20 + [6.0] * 60 + [4.0] * 20, rows=5, width=8)
    assert fallen == 4.0
    bars = [line.count("█") for line in capsys.readouterr().out.splitlines()]
    assert [count for count in bars if count] == [8, 6, 6, 6, 4]


def test_errors_of_the_demo_are_one_sentence(monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    def fail(_: Settings) -> int:
        raise WorkError("the disk is full")

    monkeypatch.setattr(demo, "run", fail)
    assert demo.main([]) == 1
    assert capsys.readouterr().err == "demo: the disk is full\n"


def test_the_standard_library_is_text_enough() -> None:
    files = standard_library()
    assert files == standard_library() and len(files) == len({*files}) > 100
    assert 5e6 < sum(path.stat().st_size for path in files) < 15e6
    assert not any({*path.parts} & {"site-packages", "idlelib", "encodings"} for path in files)


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(InputError, match="holds no Python sources to train on"):
        standard_library()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_bytes(b"\xff")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text("x = 1\n")
    assert standard_library() == (tmp_path / "a.py",)
