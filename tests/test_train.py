"""Training: stopped at any moment a run goes on to the last bit, and what is wrong is said before it hurts."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from small import SMALL

import dsv3c
from dsv3c import cli
from dsv3c.errors import InputError, WorkError
from dsv3c.job import Recipe
from dsv3c.models.config import load_config
from dsv3c.plan import Plan
from dsv3c.runtime import checkpoint_files, state
from dsv3c.runtime.export import export
from dsv3c.runtime.metrics import read_metrics
from dsv3c.runtime.session import Session, StepResult
from dsv3c.runtime.train import Interrupts, TrainResult, learning_rate, train
from dsv3c.runtime.weights import Weights

ROOT = Path(__file__).parents[1]
STEPS = 12
RECIPE = Recipe(lr=1e-2)


def make_plan(model: Any = SMALL, **given: Any) -> Plan:
    return dsv3c.compile(model, **{"seq": 16, "micro_batch": 2, "global_batch": 4, "recipe": RECIPE, **given})


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{i} plus {i} makes {2 * i}.\n" for i in range(400)))
    return path


@pytest.fixture(scope="module")
def undisturbed(plan: Plan, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    go(plan, text, out)
    return out


def go(plan: Plan, text: Path, out: Path, **given: Any) -> TrainResult:
    """A run of STEPS steps in this process."""
    options = {"steps": STEPS, "save_every": 2, "tokenizer": "bytes", "tensorboard": False, **given}
    return train(plan, [text], out=out, **options)


def lines(out: Path) -> bytes:
    return (out / "metrics.jsonl").read_bytes()


def whole(out: Path, plan: Plan) -> list[int]:
    """The steps of the checkpoints under `out`, each read completely."""
    for path in state.states(out):
        state.load_state(path, Weights(plan.program, "cpu").state())
    return [state.step_of(path) for path in state.states(out)]


# ---- the learning rate ----------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_to_the_last_step() -> None:
    recipe = Recipe(lr=2.0, warmup=0.1, final_lr=0.25)
    rates = [learning_rate(step, 100, recipe) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.5) and rates[54] == pytest.approx((2.0 + 0.5) / 2)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 1.0), (2, 0.0), (3, 1.0), (7, 0.3)])
def test_learning_rate_reaches_its_peak_in_any_run(steps: int, warmup: float) -> None:
    rates = [learning_rate(step, steps, Recipe(lr=2.0, warmup=warmup, final_lr=0.25)) for step in range(1, steps + 1)]
    assert max(rates) == 2.0 and min(rates) > 0


# ---- a whole run ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_metrics_checkpoints_and_a_model(plan: Plan, undisturbed: Path) -> None:
    told = read_metrics(undisturbed)
    assert [line["step"] for line in told] == [*range(1, STEPS + 1)]
    first = told[0]
    assert {*first} == {
        "step", "loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "tokens", "expert_load", "expert_load_by_layer",
    }  # fmt: skip
    assert isinstance(first["loss"], float) and 5.4 < first["loss"] < 5.7  # ln 257 = 5.55
    last = told[-1]["loss"]
    assert isinstance(last, float) and last < first["loss"] - 1
    assert [line["lr"] for line in told] == [learning_rate(i, STEPS, RECIPE) for i in range(1, STEPS + 1)]
    assert told[-1]["tokens"] == STEPS * 4 * 16
    assert whole(undisturbed, plan) == [STEPS - 2, STEPS]
    assert load_config(undisturbed / "hf").eos_token_id == 256
    assert {p.name for p in (undisturbed / "hf").iterdir()} >= {"tokenizer.json", "model.safetensors", "config.json"}
    timing = [json.loads(line) for line in (undisturbed / "timing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timing] == [*range(1, STEPS + 1)] and timing[0]["seconds"] > 0


def test_the_saved_model_is_the_trained_one(plan: Plan, undisturbed: Path) -> None:
    trained = dsv3c.load(plan)
    state.load_state(undisturbed / "checkpoints" / f"step-{STEPS:06d}", trained.weights.state())
    tokens = torch.arange(16)[None]
    assert torch.equal(dsv3c.load(plan, undisturbed / "hf").forward(tokens), trained.forward(tokens))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tokens of every step that sessions make."""
    found: list[torch.Tensor] = []
    original = Session.step

    def step(self: Session, tokens: torch.Tensor, lr: float | None = None) -> StepResult:
        found.append(tokens.clone())
        return original(self, tokens, lr)

    monkeypatch.setattr(Session, "step", step)
    return found


def test_every_micro_batch_size_sees_the_same_sequences(text: Path, tmp_path: Path, seen: list[torch.Tensor]) -> None:
    for micro in (1, 4):
        go(make_plan(micro_batch=micro), text, tmp_path / str(micro), steps=3)
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    one, four = (read_metrics(tmp_path / str(micro)) for micro in (1, 4))
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in four], rel=1e-4)


def test_the_seed_changes_weights_and_order(plan: Plan, text: Path, tmp_path: Path, seen: list[torch.Tensor]) -> None:
    for seed in (0, 1):
        go(plan, text, tmp_path / str(seed), steps=1, seed=seed)
    assert not torch.equal(*seen)
    assert read_metrics(tmp_path / "0") != read_metrics(tmp_path / "1")


def test_init_starts_from_a_checkpoint_and_takes_its_tokenizer(plan: Plan, text: Path, undisturbed: Path,
                                                               tmp_path: Path) -> None:  # fmt: skip
    go(plan, text, tmp_path / "run", steps=1, init=undisturbed / "hf", tokenizer=None)
    (line,), before = read_metrics(tmp_path / "run"), read_metrics(undisturbed)
    assert isinstance(line["loss"], float) and isinstance(before[0]["loss"], float)
    assert line["loss"] < before[0]["loss"] - 1
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (undisturbed / "tokenizer.json").read_bytes()


# ---- stopped and resumed --------------------------------------------------------------------------------------------


def start(plan: Plan, text: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    """The command in a process of its own, with a run that takes seconds."""
    plan.save(out.parent / "small.plan")
    line = f"train {out.parent / 'small.plan'} --data {text} --steps 40 --save-every 2 --tokenizer bytes --out {out}"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "dsv3c", *line.split(), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, cwd=out.parent,
    )  # fmt: skip


def wait_for(run: subprocess.Popen[str], out: Path, step: int) -> None:
    """Until the run has told of `step`."""
    deadline = time.monotonic() + 120
    while len(read_metrics(out)) < step:
        if run.poll() is not None or time.monotonic() > deadline:
            run.kill()
            raise AssertionError(f"the run did not get to step {step}: {run.communicate()[1]}")
        time.sleep(0.002)


@pytest.fixture(scope="module")
def forty(plan: Plan, text: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The metrics of an undisturbed run of 40 steps."""
    out = tmp_path_factory.mktemp("forty") / "run"
    go(plan, text, out, steps=40, save_every=40)
    return lines(out)


@pytest.mark.parametrize("moments", [(6, 17), (1,)])
def test_killed_at_any_moment_a_run_goes_on_to_the_last_bit(moments: Sequence[int], plan: Plan, text: Path,
                                                            forty: bytes, tmp_path: Path) -> None:  # fmt: skip
    out = tmp_path / "run"
    for step in moments:
        with start(plan, text, out, "--resume") as run:
            wait_for(run, out, step)
            run.kill()
        assert run.returncode == -signal.SIGKILL
        assert all(saved % 2 == 0 and saved <= step + 2 for saved in whole(out, plan))
    result = go(plan, text, out, steps=40, resume=True)
    assert result.steps == 40 and lines(out) == forty


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_run_goes_on(number: int, plan: Plan, text: Path, forty: bytes,
                                          tmp_path: Path) -> None:  # fmt: skip
    out = tmp_path / "run"
    with start(plan, text, out) as run:
        wait_for(run, out, 5)
        run.send_signal(number)
        told, error = run.communicate(timeout=60)
    (done,) = {len(read_metrics(out)), whole(out, plan)[-1]}  # the last step made is the last one saved
    assert run.returncode == 130 and 5 <= done < 40
    assert told == f"stopped after step {done} of 40; the same command with --resume goes on from there\n"
    assert "stopping after this step" in error and "Traceback" not in error
    assert not (out / "hf").exists()
    go(plan, text, out, steps=40, resume=True)
    assert lines(out) == forty


def test_a_second_ctrl_c_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.requested
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_disk_loses_nothing(plan: Plan, text: Path, undisturbed: Path, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out = tmp_path / "run"

    def create(path: Path) -> IO[bytes]:
        if "step-000006" in str(path) and path.name == state.INFO:
            raise OSError(errno.ENOSPC, "No space left on device")
        return path.open("xb")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "_create", create)
        with pytest.raises(WorkError) as error:
            go(plan, text, out)
    assert "checkpoint of step 6" in str(error.value) and "No space left" in str(error.value)
    assert "the one of step 4 is untouched" in str(error.value)
    assert whole(out, plan) == [2, 4]
    go(plan, text, out, resume=True)
    assert lines(out) == lines(undisturbed)


def test_resume_with_nothing_to_resume_starts_afresh(plan: Plan, text: Path, undisturbed: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0}\n')
    go(plan, text, tmp_path, resume=True)
    assert lines(tmp_path) == lines(undisturbed)
    assert "has no checkpoint to resume from; starting afresh" in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", ["bytes", None])
def test_resume_needs_no_tokenizer_flag(tokenizer: str | None, plan: Plan, text: Path, tmp_path: Path) -> None:
    go(plan, text, tmp_path, steps=2, tokenizer=tokenizer)
    before = (tmp_path / "tokenizer.json").read_bytes()
    assert go(plan, text, tmp_path, steps=2, tokenizer=None, resume=True).steps == 2
    assert (tmp_path / "tokenizer.json").read_bytes() == before


def test_resume_with_all_steps_done_only_writes_the_model_again(plan: Plan, text: Path, undisturbed: Path,
                                                                tmp_path: Path) -> None:  # fmt: skip
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "hf")
    result = go(plan, text, out, resume=True)
    assert result.loss is None and "all 12 steps were done before" in str(result)
    assert lines(out) == lines(undisturbed)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (out / "hf" / name).read_bytes() == (undisturbed / "hf" / name).read_bytes()


# ---- refused --------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_overwritten(plan: Plan, text: Path, undisturbed: Path) -> None:
    before = lines(undisturbed)
    with pytest.raises(InputError, match="holds a run that got to step 12; go on with --resume"):
        go(plan, text, undisturbed)
    assert lines(undisturbed) == before


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"model": replace(SMALL, num_hidden_layers=3)}, {}, "model.num_hidden_layers is 3, was 2."),
        ({"seq": 8}, {}, "job.seq is 8, was 16."),
        ({"micro_batch": 4}, {}, "job.micro_batch is 4, was 2."),
        ({"precision": "fp64"}, {}, "job.precision is fp64, was fp32."),
        ({"passes": "differentiate,cut,plan_buffers"}, {}, "the plan was compiled to another program."),
        ({}, {"steps": 13, "seed": 5}, "steps is 13, was 12; seed is 5, was 0."),
        ({}, {"lr": 0.5}, "recipe.lr is 0.5, was 0.01."),
        ({}, {"tokenizer": "other"}, "the tokenizer is another."),
        ({}, {"text": "other text, long enough for one sequence"}, "the text of --data is another."),
        ({}, {"init": "HF"}, "was None."),
    ],
)
def test_resume_names_what_differs(changes: dict[str, Any], given: dict[str, Any], message: str, plan: Plan,
                                   text: Path, undisturbed: Path, tmp_path: Path) -> None:  # fmt: skip
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    given = dict(given)
    if "text" in given:
        text = tmp_path / "other.txt"
        text.write_text(given.pop("text"))
    if "tokenizer" in given:
        body = json.loads((undisturbed / "tokenizer.json").read_text())
        body["model"]["vocab"] |= {"a": 98, "b": 97}
        (tmp_path / "tokenizer.json").write_text(json.dumps(body))
        given["tokenizer"] = str(tmp_path / "tokenizer.json")
    if "init" in given:
        given["init"] = undisturbed / "hf"
    before = {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.parent.name != "data"}
    with pytest.raises(InputError) as error:
        go(make_plan(**changes) if changes else plan, text, out, resume=True, **given)
    told = str(error.value)
    assert told.startswith(f"--resume: {out / 'checkpoints' / 'step-000012'} belongs to another run: ")
    assert message in told and "or choose another --out." in told
    assert before == {p: p.read_bytes() for p in before}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text.txt is empty"),
        (b"\x00\xff\xfe\x00", "text.txt is binary"),
        (b"short", "one sequence needs 16"),
        (None, "text.txt does not exist"),
    ],
)
def test_unusable_data(content: bytes | None, message: str, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        go(plan, path, tmp_path / "run")
    assert message in str(error.value)


def test_a_place_that_cannot_be_written(plan: Plan, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a folder; name a new or an existing folder"):
        go(plan, text, tmp_path / "file")
    with pytest.raises(InputError, match="is not a folder"):
        go(plan, text, tmp_path / "file" / "run")
    with pytest.raises(WorkError, match="/proc/run cannot be made"):
        go(plan, text, Path("/proc/run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place(plan: Plan, text: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for out in (tmp_path, tmp_path / "run"):
        with pytest.raises(WorkError, match="choose another --out"):
            go(plan, text, out)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"job": "decode"}, {}, "compiled for --job decode; compile with --job train to train"),
        ({"mesh": "dp=2"}, {}, "for 2 ranks .* RANK is not set; start it with torchrun --nproc-per-node 2"),
        ({}, {"steps": 0}, "--steps 0 must be at least 1"),
        ({}, {"trace": "trace.json"}, "--trace shows what ranks do beside each other, and this plan is for one"),
        ({}, {"save_every": 0}, "--save-every 0 must be at least 1"),
        ({"model": replace(SMALL, vocab_size=256)}, {}, "257 entries but the model's vocab_size is 256"),
        ({}, {"init": "nowhere"}, "nowhere: no such directory"),
    ],
)
def test_a_run_that_cannot_be(changes: dict[str, Any], given: dict[str, Any], message: str, plan: Plan, text: Path,
                              tmp_path: Path) -> None:  # fmt: skip
    with pytest.raises(InputError) as error:
        go(make_plan(**changes) if changes else plan, text, tmp_path / "run", **given)
    assert re.search(message, str(error.value)) and not state.states(tmp_path / "run")


def test_a_loss_that_is_no_number_stops_the_run(plan: Plan, text: Path, tmp_path: Path) -> None:
    message = (
        r"^step \d+: the (loss|gradient norm) is (nan|inf)\. The first value that is no number, in micro-batch 1 of 2: "
        r"\w+ = \w+\(\.\.\.\) in [\w.]+, [\w.]+ \([a-z ]+\), holds (nan|inf)\. Nothing of this step was applied"
    )
    with pytest.raises(WorkError, match=message) as e:
        go(plan, text, tmp_path, lr=1e30, save_every=1)
    bad = int(str(e.value).split(":")[0].removeprefix("step "))
    assert whole(tmp_path, plan)[-1] == bad - 1
    told = read_metrics(tmp_path)
    assert [line["step"] for line in told] == [*range(1, bad + 1)]
    assert None in (told[-1]["loss"], told[-1]["grad_norm"]), "the line of the bad step is there"


# ---- export ---------------------------------------------------------------------------------------------------------


def test_export_writes_the_newest_checkpoint(undisturbed: Path, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert cli.main(["export", str(undisturbed), "--format", "hf", "-o", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'a'}\n"
    export(undisturbed / "hf", out=tmp_path / "b")
    for out in ("a", "b"):
        assert {p.name for p in (tmp_path / out).iterdir()} == {p.name for p in (undisturbed / "hf").iterdir()}
        for path in (undisturbed / "hf").iterdir():
            assert (tmp_path / out / path.name).read_bytes() == path.read_bytes()


def test_export_refuses_what_it_cannot_read(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for source, message in (
        (tmp_path / "none", "no such folder; give what dsv3c train --out wrote, or a checkpoint"),
        (tmp_path, "config.json"),
    ):
        with pytest.raises(InputError, match=message):
            export(source, out=tmp_path / "out")
    with pytest.raises(InputError, match="--format onnyx is unknown"):
        export(run, format="onnyx", out=tmp_path / "out")
    with pytest.raises(InputError, match="is the folder that is to be exported"):
        export(run / "hf", out=run / "hf")
    (run / "train.plan").rename(run / "aside.plan")
    with pytest.raises(InputError, match=r"train\.plan is missing"):
        export(run, out=tmp_path / "out")
    (run / "aside.plan").rename(run / "train.plan")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="has no checkpoint yet"):
        export(run, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
