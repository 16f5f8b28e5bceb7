"""`torchrun -m dsv3c train`: what a new user does, and what happens when a rank dies, hangs, or is told to stop."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rank_runs import free_port
from rank_training import MODEL

import dsv3c
from dsv3c import cli
from dsv3c.errors import InputError
from dsv3c.job import Recipe
from dsv3c.plan import Plan, load_plan
from dsv3c.runtime.metrics import read_metrics
from dsv3c.runtime.state import states, step_of
from dsv3c.runtime.train import train
from dsv3c.runtime.train_ranks import weights_digest

ROOT = Path(__file__).parents[1]
STEPS = 12

Lines = list[dict[str, object]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plans of the same run on one rank and on many, and a text."""
    made = tmp_path_factory.mktemp("ranks")
    for name, given in {"one": {}, "four": {"mesh": "pp=2,dp=2,ep=2"}, "pipe": {"mesh": "pp=2"}}.items():
        plan = dsv3c.compile(MODEL, precision="fp64", seq=16, global_batch=8, recipe=Recipe(lr=3e-3), kernels="none",
                             **given)  # type: ignore[arg-type]  # fmt: skip
        plan.save(made / f"{name}.plan")
    (made / "text.txt").write_text("".join(f"{i} plus {i} makes {2 * i}.\n" for i in range(400)))
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> Lines:
    """The metrics of one rank."""
    train(load_plan(folder / "one.plan"), [folder / "text.txt"], steps=STEPS, out=folder / "alone", tokenizer="bytes",
          save_every=4, tensorboard=False)  # fmt: skip
    return [dict(line) for line in read_metrics(folder / "alone")]


class Torchrun:
    """A training run of so many processes of this machine."""

    def __init__(self, folder: Path, size: int, *arguments: str) -> None:
        line = ["--nproc-per-node", str(size), "--master-port", str(free_port()), "-m", "dsv3c", *arguments]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.run = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=folder, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.out = folder / arguments[arguments.index("--out") + 1] if "--out" in arguments else folder

    def ranks(self) -> dict[int, int]:
        """Process numbers by rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[1]) == self.run.pid and fields[0] != "Z":
                    rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", (path / "environ").read_bytes())
                    if rank:
                        found[int(rank[1])] = int(path.name)
            except (OSError, IndexError):
                continue
        return found

    def wait_for(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while len(read_metrics(self.out)) < step:
            assert self.run.poll() is None and time.monotonic() < deadline, self.run.communicate()[1]
            time.sleep(0.02)

    def end(self, seconds: float = 120) -> tuple[str, list[str]]:
        """What was printed, and what dsv3c said on standard error."""
        try:
            out, error = self.run.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        assert "Traceback" not in error.split("torch/distributed/elastic")[0], error
        return out, [line for line in error.splitlines() if line.startswith("dsv3c: ")]

    def kill(self) -> None:
        for process in self.ranks().values():
            os.kill(process, signal.SIGKILL)
        self.run.kill()
        self.run.wait()


def command(plan: str, out: str, *more: str, steps: int = STEPS) -> tuple[str, ...]:
    line = f"train {plan}.plan --data text.txt --steps {steps} --tokenizer bytes --save-every 4 --out {out}"
    return (*line.split(), *more)


def close(found: Lines, wanted: Lines, tolerance: float = 1e-9) -> bool:
    return len(found) == len(wanted) and all(
        a.keys() == b.keys() and all(b[k] == pytest.approx(a[k], rel=tolerance) for k in a)
        for a, b in zip(found, wanted, strict=True)
    )


def told(out: Path) -> Lines:
    return [dict(line) for line in read_metrics(out)]


@pytest.fixture(scope="module")
def hung(folder: Path) -> Iterator[tuple[Torchrun, float]]:
    """A run of two ranks of which rank 0 hangs, and when that began. It is noticed while other tests run."""
    run = Torchrun(folder, 2, *command("pipe", "hung", steps=2000))
    try:
        run.wait_for(3)
        os.kill(run.ranks()[0], signal.SIGSTOP)
        yield run, time.monotonic()
    finally:
        run.kill()


KILLED = (
    r"dsv3c: rank 2 stopped at step (\d+) in (\(?\d+[FIWB]\d+.*|the sum of the gradients|the update of the weights"
    r"|saving the checkpoint), so all ranks stop\. "
    r"The last checkpoint is of step (4|8): the same command with --resume goes on from there\."
)


def test_a_killed_rank_is_named_and_the_run_goes_on_elsewhere(folder: Path, alone: Lines,
                                                              hung: tuple[Torchrun, float]) -> None:  # fmt: skip
    """Four ranks, one of them killed; on with two ranks, stopped by Ctrl-C; from there to the end with one, and with
    four."""
    run = Torchrun(folder, 4, *command("four", "run"))
    run.wait_for(5)
    os.kill(run.ranks()[2], signal.SIGKILL)
    begin = time.monotonic()
    _, said = run.end(60)
    assert time.monotonic() - begin < 60 and run.run.returncode != 0
    (line,) = said
    match = re.fullmatch(KILLED, line)
    assert match, line
    step = len(read_metrics(folder / "run"))
    assert int(match[1]) in (step, step + 1)

    run = Torchrun(folder, 2, *command("pipe", "run", "--resume"))
    run.wait_for(step + 1)
    os.kill(run.ranks()[1], signal.SIGINT)
    out, said = run.end()
    done = step_of(states(folder / "run")[-1])
    assert out == f"stopped after step {done} of {STEPS}; the same command with --resume goes on from there\n"
    assert said == [] and len(read_metrics(folder / "run")) == done < STEPS

    shutil.copytree(folder / "run", folder / "copy")
    train(load_plan(folder / "one.plan"), [folder / "text.txt"], steps=STEPS, out=folder / "copy", resume=True,
          save_every=4, tensorboard=False)  # fmt: skip
    assert close(told(folder / "copy"), alone)

    run = Torchrun(folder, 4, *command("four", "run", "--resume", "--json", "--trace", "trace.json"))
    out, said = run.end()
    assert run.run.returncode == 0 and said == []
    result = json.loads(out)
    assert (result["steps"], result["hf"], result["rank"]) == (STEPS, "run/hf", 0)
    assert close(told(folder / "run"), alone)
    assert [step_of(s) for s in states(folder / "run")] == [8, 12]
    assert {p.name for p in (folder / "run").iterdir()} == {p.name for p in (folder / "alone").iterdir()} | {
        "tensorboard"
    }
    one, many = (dsv3c.load(folder / "one.plan", folder / name / "hf") for name in ("alone", "run"))
    for name, tensor in one.weights.tensors.items():
        assert tensor.allclose(many.weights.tensors[name], rtol=1e-7, atol=1e-10), name
    for rank in range(4):
        events = json.loads((folder / f"trace.rank{rank}.json").read_text())["traceEvents"]
        cells = {e["args"]["cell"] for e in events if e["ph"] == "X"}
        assert {e["pid"] for e in events} == {rank} and any(re.fullmatch(r"\dF\d\+\d[IB]\d", c) for c in cells)


def test_a_hung_rank_is_named(hung: tuple[Torchrun, float]) -> None:
    run, begin = hung
    while 1 in run.ranks():
        assert time.monotonic() - begin < 60
        time.sleep(0.1)
    if 0 in run.ranks():  # torchrun would do it half a minute later
        os.kill(run.ranks()[0], signal.SIGKILL)
    _, said = run.end()
    (line,) = said
    assert re.match(r"dsv3c: rank 0 does not answer at step \d+ in .*, so all ranks stop\. ", line)


def test_what_cannot_work_is_said_once(folder: Path) -> None:
    run = Torchrun(folder, 2, *command("pipe", "no", "--init", "nowhere"))
    _, said = run.end()
    (line,) = said
    assert line.startswith("dsv3c: nowhere: no such directory") and run.run.returncode == 1
    assert not states(folder / "no")


def swapped(plan: Plan) -> Plan:
    """The plan with a forward and the backward that depends on it exchanged; saving it makes new hashes."""
    rows = [row.split(",") for row in plan.schedule.splitlines()]
    row = rows[1]
    last = plan.schedule.count("\n") - 1
    first = next(i for i, cell in enumerate(row) if re.fullmatch(rf"{last}F\d+", cell))
    micro_batch = row[first].split("F")[1]
    then = next(i for i, cell in enumerate(row) if re.fullmatch(rf"{last}[IB]{micro_batch}", cell))
    row[first], row[then] = row[then], row[first]
    return replace(plan, schedule="".join(",".join(r) + "\n" for r in rows))


def test_swapped_actions_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "exchanged.plan"
    swapped(load_plan(folder / "pipe.plan")).save(path)
    assert cli.main(["inspect", str(path)]) == 2
    assert "rank" in capsys.readouterr().err
    for act in (lambda: dsv3c.load(path), lambda: train(load_plan(path), ["x"], steps=1, out=folder / "no")):
        with pytest.raises(InputError, match="step"):
            act()


def test_a_plan_for_many_ranks_names_the_command(folder: Path) -> None:
    with pytest.raises(InputError, match=r"for 2 ranks .* is not set; start it with torchrun --nproc-per-node 2 -m"):
        dsv3c.load(folder / "pipe.plan")


def test_a_plan_for_one_rank_is_not_trained_by_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="this plan is for one rank and 2 were started; compile it with a --mesh"):
        train(load_plan(folder / "one.plan"), ["x"], steps=1, out=folder / "no")


def test_weights_are_told_apart_by_samples(tmp_path: Path) -> None:
    for name, value in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        body = bytes(100_000) + bytes([value]) * 20_000
        (tmp_path / name / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + body)
    a, b, c = (weights_digest(tmp_path / n) for n in "abc")
    assert a == b != c
