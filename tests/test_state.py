"""Checkpoints: bit-exact round trips, and a whole one whatever happens while the next is written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import load_file

from dsv3c.errors import InputError, WorkError
from dsv3c.runtime import checkpoint_files, state
from dsv3c.runtime.state import discard_states, latest_state, load_info, load_state, save_state, states, step_of

Tensors = dict[str, torch.Tensor]


def tensors(seed: int = 0) -> Tensors:
    """Every element type, odd sizes, no elements, no dimensions, not contiguous, NaN, a parameter."""
    g = torch.Generator().manual_seed(seed)
    return {
        "f32": torch.randn(3, 5, generator=g).requires_grad_(),
        "f64": torch.tensor([float("nan"), -0.0, 1e-310 * (1 + seed)], dtype=torch.float64),
        "bf16": torch.randn(7, generator=g).to(torch.bfloat16),
        "transposed": torch.randn(4, 6, generator=g).t(),
        "strided": torch.randn(10, generator=g)[::3],
        "fp8": torch.randn(5, generator=g).to(torch.float8_e4m3fn),
        "steps": torch.tensor(seed),
        "flags": torch.tensor([True, False, seed % 2 == 0]),
        "none": torch.empty(0, 4),
        "bytes": torch.arange(9, dtype=torch.uint8) + seed,
    }


def blank() -> Tensors:
    return {name: torch.zeros_like(t) for name, t in tensors().items()}


def same(a: Tensors, b: Tensors) -> bool:
    def raw(t: torch.Tensor) -> torch.Tensor:
        return t.detach().contiguous().reshape(-1).view(torch.uint8)

    return a.keys() == b.keys() and all(torch.equal(raw(a[name]), raw(b[name])) for name in a)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_round_trip_is_exact_and_in_place(tmp_path: Path) -> None:
    info: dict[str, state.Scalar] = {"seed": 3, "lr": 0.1 + 0.2, "plan": "ü", "done": False, "data": None}
    path = save_state(tmp_path, 123, tensors(1), info)
    assert path == tmp_path / "checkpoints" / "step-000123" == latest_state(tmp_path)
    assert sorted(p.name for p in path.iterdir()) == ["info.json", "state.safetensors"]
    target = blank()
    target["transposed"] = torch.zeros(6, 4)[:, :]
    target["f32"] = torch.zeros(5, 3).t()
    target["f32"].requires_grad_()
    before = {name: t.data_ptr() for name, t in target.items()}
    assert load_state(path, target) == {**info, "step": 123} == load_info(path)
    assert same(target, tensors(1))
    assert {name: t.data_ptr() for name, t in target.items()} == before
    assert step_of(path) == 123


def test_other_programs_read_the_file_and_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    path = save_state(tmp_path / "a", 1, tensors(), {"x": 1})
    assert same(load_file(path / "state.safetensors"), tensors())
    shuffled = dict(reversed(tensors().items()))
    assert contents(save_state(tmp_path / "b", 1, shuffled, {"x": 1})) == contents(path)


def test_large_tensors_are_written_in_blocks_and_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "_BLOCK", 100)
    big = torch.randn(1001)
    target = torch.zeros(1001)
    load_state(save_state(tmp_path, 1, {"big": big}, {}), {"big": target})
    assert torch.equal(target, big)
    assert checkpoint_files._bytes(big).nbytes == 4004
    checkpoint_files._bytes(target)[:4] = bytes(4)
    assert target[0] == 0.0


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 1000000):
        save_state(tmp_path, step, tensors(), {}, keep=2)
    assert [step_of(p) for p in states(tmp_path)] == [10, 1000000]
    save_state(tmp_path, 11, tensors(), {}, keep=1)  # a run that went back: later ones are not its to delete
    assert [step_of(p) for p in states(tmp_path)] == [11, 1000000]
    discard_states(tmp_path)
    assert states(tmp_path) == []
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert latest_state(tmp_path) is None
    assert latest_state(tmp_path / "nowhere") is None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_state(tmp_path, 5, tensors(1), {})
    path = save_state(tmp_path, 5, tensors(2), {})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    target = blank()
    load_state(path, target)
    assert same(target, tensors(2))


def test_a_checkpoint_set_aside_counts_until_it_is_replaced(tmp_path: Path) -> None:
    path = save_state(tmp_path, 5, tensors(1), {})
    aside = path.with_name("step-000005.old")
    path.rename(aside)
    assert latest_state(tmp_path) == aside
    target = blank()
    assert load_state(aside, target) == {"step": 5}
    assert same(target, tensors(1))
    assert save_state(tmp_path, 5, tensors(2), {}) == latest_state(tmp_path)
    assert not aside.exists()


def test_leftovers_of_a_kill_are_ignored_and_cleaned(tmp_path: Path) -> None:
    save_state(tmp_path, 1, tensors(), {})
    folder = tmp_path / "checkpoints"
    for name in (".tmp-step-000002-77", ".trash-step-000000-77", "step-000003"):
        (folder / name).mkdir()
        (folder / name / "state.safetensors").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    assert [step_of(p) for p in states(tmp_path)] == [1]
    save_state(tmp_path, 2, tensors(), {})
    assert sorted(p.name for p in folder.iterdir()) == ["notes.txt", "step-000001", "step-000002", "step-000003"]


def test_another_model_is_refused_with_every_difference(tmp_path: Path) -> None:
    path = save_state(tmp_path, 1, tensors(), {})
    target = blank()
    target["f32"] = torch.zeros(3, 6)
    target["bf16"] = torch.zeros(7)
    target["extra"] = torch.zeros(2)
    del target["flags"]
    with pytest.raises(InputError) as caught:
        load_state(path, target)
    message = str(caught.value)
    assert message.startswith(f"--resume: the checkpoint in {path} was written by another model: 4 tensors differ; ")
    assert message.splitlines()[1:] == [
        "  bf16: BF16[7] in the checkpoint, F32[7] in this model",
        "  extra: F32[2] is not in the checkpoint",
        "  f32: F32[3, 5] in the checkpoint, F32[3, 6] in this model",
        "  flags: BOOL[3] is not in this model",
    ]
    assert not any(t.any() for name, t in target.items() if name != "fp8")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0, 20, -1])
def test_an_altered_file_is_named_and_an_older_checkpoint_suggested(tmp_path: Path, at: int) -> None:
    older = save_state(tmp_path, 1, tensors(1), {})
    path = save_state(tmp_path, 2, tensors(2), {})
    flip(path / "state.safetensors", at)
    target = blank()
    with pytest.raises(InputError) as caught:
        load_state(path, target)
    assert str(caught.value) == (
        f"--resume: {path}/state.safetensors is damaged (its hash does not match); "
        f"{older} is whole: delete {path} to resume from it."
    )
    assert same(target, blank())
    flip(older / "state.safetensors", at)
    with pytest.raises(InputError, match="there is no older one that is whole"):
        load_state(path, target)


def test_truncated_or_missing_files_are_named(tmp_path: Path) -> None:
    path = save_state(tmp_path, 1, tensors(), {"seed": 1})
    file = path / "state.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(InputError, match=rf"state.safetensors is damaged \(it has {len(whole) - 3:,} bytes of"):
        load_state(path, blank())
    file.unlink()
    with pytest.raises(InputError, match=r"state.safetensors is damaged \(No such file"):
        load_state(path, blank())
    info = path / "info.json"
    text = info.read_text()
    for damaged, why in (
        (text.replace('"seed": 1', '"seed": 2'), "its hash does not match"),
        (text[:-5], "it is not JSON"),
        ("\udcff", "it is not JSON"),
        ("[]", "it is not a JSON object"),
    ):
        info.write_text(damaged, errors="surrogateescape")
        with pytest.raises(InputError, match=rf"info.json is damaged \({why}\)"):
            load_state(path, blank())
    info.write_text(json.dumps(json.loads(text) | {"format": 3}))
    with pytest.raises(InputError, match="format 3, this dsv3c reads 2"):
        load_info(path)
    with pytest.raises(InputError, match="there is no checkpoint in"):
        load_state(tmp_path / "step-000009", blank())
    with pytest.raises(InputError, match="is not a checkpoint"):
        load_state(tmp_path, blank())


@pytest.mark.parametrize("at_step", [1, 2])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int
) -> None:
    path = save_state(tmp_path, 1, tensors(1), {})
    before = contents(tmp_path)

    def full(_: Path) -> IO[bytes]:
        return io.BufferedWriter(io.FileIO("/dev/full", "w"))

    monkeypatch.setattr(checkpoint_files, "_create", full)
    with pytest.raises(
        WorkError, match=r"step \d to .*: No space left on device; the one of step 1 is untouched.*--resume"
    ):
        save_state(tmp_path, at_step, tensors(2), {})
    assert contents(tmp_path) == before
    assert latest_state(tmp_path) == path
    with pytest.raises(WorkError, match="there is no earlier one"):
        save_state(tmp_path / "new", 1, tensors(2), {})


def test_a_failure_at_any_call_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renames and syncs fail in turn, by an error or Ctrl-C; step 1 stays whole, old or new."""
    rename, fsync = os.rename, os.fsync
    for error in (OSError(5, "Input/output error"), KeyboardInterrupt()):
        for failing in range(1, 12):
            out = tmp_path / f"{type(error).__name__}-{failing}"
            save_state(out, 1, tensors(1), {})
            calls = 0

            def count(failing: int = failing, error: BaseException = error) -> None:
                nonlocal calls
                calls += 1
                if calls == failing:
                    raise error

            monkeypatch.setattr(os, "rename", lambda a, b, count=count: (count(), rename(a, b)))
            monkeypatch.setattr(os, "fsync", lambda handle, count=count: (count(), fsync(handle)))
            with contextlib.suppress(WorkError, KeyboardInterrupt):
                save_state(out, 1, tensors(2), {})
            monkeypatch.undo()
            path = latest_state(out)
            target = blank()
            assert path is not None
            load_state(path, target)
            assert same(target, tensors(1)) or same(target, tensors(2))
            assert not [p for p in (out / "checkpoints").iterdir() if p.name.startswith(".tmp")]


def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="is not a folder"):
        save_state(tmp_path / "file", 1, tensors(), {})
    assert latest_state(tmp_path / "file") is None
    save_state(tmp_path, 1, tensors(), {})
    before = contents(tmp_path)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(WorkError, match=r"Read-only file system; the one of step 1 is untouched"):
        save_state(tmp_path, 2, tensors(), {})
    assert contents(tmp_path) == before


KILLED = """
import itertools, os, random, shutil, signal, sys, time
import torch
from dsv3c.runtime.state import latest_state, load_state, save_state, step_of

out = sys.argv[1]
os.fsync = lambda handle: None  # a killed process loses nothing that it wrote; only a machine does

def save(step):
    save_state(out, step, {"a": torch.full((200_000,), float(step)), "b": torch.full((3,), step)}, {"mark": step})

def check(*steps):
    path = latest_state(out)
    step = step_of(path)
    assert step in steps, (step, steps)
    target = {"a": torch.zeros(200_000), "b": torch.zeros(3, dtype=torch.int64)}
    assert load_state(path, target) == {"mark": step, "step": step}
    assert (target["a"] == step).all() and target["b"].tolist() == [step] * 3
    return step
"""

AT_EACH_CALL = """
def dying(call):
    def before(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return before

for again in (True, False):  # replacing step 2, then adding step 3 and deleting step 1
    kills = 0
    for left in itertools.count(1):
        shutil.rmtree(out, ignore_errors=True)
        save(1)
        save(2)
        child = os.fork()
        if child == 0:
            for name in ("fsync", "rename", "mkdir", "unlink", "rmdir", "open"):
                setattr(os, name, dying(getattr(os, name)))
            save(2 if again else 3)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        step = check(2, 2 if again else 3)
        if status == 0:
            break
        kills += 1
        save(4)
        check(4)
        assert sorted(os.listdir(out + "/checkpoints")) == [f"step-{step:06d}", "step-000004"], left
    print("kills", kills)
"""

AT_RANDOM = """
shutil.rmtree(out)
delay, announced = random.Random(0), 0
for _ in range(20):
    end, to = os.pipe()
    child = os.fork()
    if child == 0:
        last = latest_state(out)
        for step in itertools.count(step_of(last) if last else 1):
            save(step)
            os.write(to, b"%d\\n" % step)
    os.close(to)
    if not announced:
        announced = int(os.read(end, 20).split()[-1])
    time.sleep(delay.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(end) as lines:
        announced = max([announced, *map(int, lines)])
    check(announced, announced + 1)
print("kills", 20)
"""


def test_whatever_a_kill_leaves_is_loadable(tmp_path: Path) -> None:
    """SIGKILL before each call that changes the disk, and at random: the last step announced, or the next, is whole."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED + AT_EACH_CALL + AT_RANDOM, tmp_path / "out"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    kills = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(kills) == 3
    assert min(kills) >= 10
