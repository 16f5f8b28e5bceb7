"""The command line: flags reach the calls they stand for, results and errors go where they belong."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from test_plan import make_plan

import dsv3c
from dsv3c import cli, job
from dsv3c.errors import InputError, WorkError
from dsv3c.ops import REGISTRY
from dsv3c.plan import load_plan
from dsv3c.state import Pass, PassReport, State, TakeNote
from dsv3c.text import parse_program, show_program

ROOT = Path(__file__).parents[1]
IR = """\
def block(x: f64[B, 4], *, w: f64[4]):
    y = rms_norm(x, w, eps=1e-06)  # f64[B, 4] @F:block.norm
    unused = rms_norm(y, w, eps=1e-06)  # f64[B, 4] @F:block.norm
    return y
"""
COMMANDS = (
    "compile", "opt", "inspect", "diff", "list", "schedule", "simulate", "report", "train", "generate", "verify",
    "tune", "export",
)  # fmt: skip


@dataclass(frozen=True)
class DropLast(Pass):
    """Remove the last node of every graph."""

    name: ClassVar[str] = "drop_last"
    count: int = 1

    def run(self, state: State, note: TakeNote) -> State:
        note("removed", "block.norm", f"{self.count} at the end; sizes {state.sizes}")
        graphs = tuple(g.but(nodes=g.nodes[: len(g.nodes) - self.count]) for g in state.program.graphs)
        return state.with_program(state.program.with_graphs(graphs))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv3c import passes

    monkeypatch.setattr(passes, "PASSES", {"drop_last": DropLast})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "block.ir").write_text(IR)
    return tmp_path / "block.ir"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    (sub,) = (a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {str(name): parser for name, parser in sub.choices.items()}


# ---- flags ----------------------------------------------------------------------------------------------------------


def test_help_loads_nothing_but_the_standard_library() -> None:
    code = (
        "import sys\nbefore = {*sys.modules}\nsys.argv = ['dsv3c', '--help']\nfrom dsv3c import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "top = {m.split('.')[0] for m in {*sys.modules} - before}\n"
        "print('extra:', *sorted(top - {*sys.stdlib_module_names} - {'dsv3c'}))\n"
        "print('own:', *sorted(m for m in sys.modules if m.startswith('dsv3c')))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr
    extra, own = run.stdout.splitlines()[-2:]
    assert extra == "extra:"
    assert own == "own: dsv3c dsv3c.cli dsv3c.errors"


def test_every_command_is_there_and_every_flag_is_explained() -> None:
    assert tuple(parsers()) == COMMANDS
    from dsv3c import commands

    for name, parser in parsers().items():
        assert callable(getattr(commands, name))
        assert "--json" in parser.format_help()
        for action in parser._actions:
            assert action.help, f"{name} {action.dest}"


def test_choices_are_those_of_the_compiler() -> None:
    assert cli.JOBS == job.JOBS and cli.PRECISIONS == job.PRECISIONS


def test_compile_flags_are_the_keywords_of_the_driver() -> None:
    import inspect

    from dsv3c import driver

    flags = {a.dest for a in parsers()["compile"]._actions} - {"help", "json", "out", "plugin"}
    assert flags <= {*inspect.signature(driver.compile).parameters}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert not end.value.code and capsys.readouterr().out == f"dsv3c {dsv3c.__version__}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: COMMAND; see 'dsv3c --help'"),
        ("compil x", "did you mean 'compile'?"),
        ("compile", "the following arguments are required: MODEL; see 'dsv3c compile --help'"),
        ("compile m --job trian", "--job trian: no such choice; did you mean 'train'?"),
        ("compile m --seq 0", "argument --seq: '0' is not a whole number from 1"),
        ("compile m --seq many", "'many' is not a whole number from 1"),
        ("compile m --expert-headroom -1", "--expert-headroom"),
        ("compile m --expert-headroom nan", "'nan' is not a number from 0"),
        ("compile m --sq 3", "unrecognized arguments: --sq 3"),
        ("opt a.ir", "the following arguments are required: -p/--passes"),
        ("generate p", "one of the arguments --prompt --tokens is required"),
        ("generate p --tokens 1,x", "'1,x' is not a list of token numbers such as 1,2,3"),
        ("generate p --tokens 1 --prompt a", "not allowed with argument"),
        ("generate p --prompt a --top-p 1.5", "--top-p 1.5: must be above 0 and at most 1"),
        ("train p --data d --out o --steps 3 --seed -1", "--seed"),
        ("export d --format onyx -o o", "--format onyx: no such choice; known: hf"),
        ("list things", "no such choice; known: models, ops, passes, schedules, targets"),
        ("inspect none.plan", "none.plan: no such file; give the path of a plan, as dsv3c compile writes it"),
        ("opt none.ir -p cut", "none.ir: no such file; give the path of a program's text"),
        ("verify d --length 1", "--length 1: the loss needs at least 2 tokens"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_sentence_and_status_2(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("dsv3c: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("bad"), 2, "dsv3c: bad\n"),
        (WorkError("failed"), 1, "dsv3c: failed\n"),
        (KeyboardInterrupt(), 130, "dsv3c: interrupted\n"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "dsv3c: /x/y: permission denied\n"),
        (OSError(28, "No space left on device"), 1, "dsv3c: no space left on device\n"),
        (MemoryError(), 1, "dsv3c: out of memory; choose a smaller model, batch or sequence\n"),
    ],
)
def test_errors_have_their_status(error: BaseException, status: int, message: str, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    def fail(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("dsv3c.commands.inspect", fail)
    assert cli.main(["inspect", "x.plan"]) == status
    assert capsys.readouterr().err == message


def test_a_fault_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("dsv3c.commands.inspect", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", "x.plan"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from dsv3c.cli import main; sys.exit(main(['list', 'ops']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == cli.BROKEN_PIPE


# ---- opt ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("passes")
def test_opt_prints_the_program_and_tells_the_notes(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["opt", str(source), "-p", "drop_last", "--sizes", "B=2"]) == 0
    out, err = capsys.readouterr()
    assert len(parse_program(out, REGISTRY).graph("block").nodes) == 1
    assert err == "drop_last: removed block.norm: 1 at the end; sizes {'B': 2}\n"
    assert cli.main(["opt", str(source), "-p", ""]) == 0
    assert capsys.readouterr().out == show_program(parse_program(IR, REGISTRY))


@pytest.mark.usefixtures("passes")
def test_opt_writes_dumps_and_files(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["-p", "drop_last{count=0},drop_last,drop_last", "--stop-after", "drop_last", "--print-after", "all"]
    dump, out = tmp_path / "dump", tmp_path / "out.ir"
    assert cli.main(["opt", str(source), "-p", "drop_last", "--dump", str(dump), "-o", str(out)]) == 0
    assert sorted(p.name for p in dump.iterdir()) == ["00-input.ir", "01-drop_last.ir"]
    assert out.read_text() == (dump / "01-drop_last.ir").read_text()
    assert capsys.readouterr().out == ""
    assert cli.main(["opt", str(source), *flags, "--json"]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert result["passes"] == ["drop_last"] and "# after drop_last{count=0}\n" in told.err
    assert result["notes"][0]["pass"] == "drop_last" and result["ir"].startswith("def block(")


@pytest.mark.usefixtures("passes")
def test_opt_reads_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(IR))
    assert cli.main(["opt", "-", "-p", "drop_last"]) == 0
    assert "unused" not in capsys.readouterr().out


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (IR, ["-p", "drop_lst"], "unknown pass 'drop_lst'; did you mean 'drop_last'?"),
        (IR, ["-p", "drop_last{n=1}"], "the pass 'drop_last' has no option 'n'; known: count"),
        (IR, ["-p", "drop_last", "--sizes", "B=x"], "sizes 'B=x': 'B=x' is not a symbol's value; write"),
        (IR, ["-p", "drop_last", "--stop-after", "cut"], "--stop-after cut: the pipeline has no such pass"),
        (IR.replace("f64[4]", "f64[5]"), ["-p", "drop_last"], "block.ir:2:9: rms_norm: the weight f64[5]"),
        (IR.replace("f64[B, 4] @", "f64[B, 5] @"), ["-p", "drop_last"], "declared f64[B, 5] but rms_norm gives f64[B"),
        ("", ["-p", "drop_last"], "no graph here"),
        ("\0", ["-p", "drop_last"], "block.ir:1:1: "),
    ],
)  # fmt: skip
def test_opt_refuses_bad_input(text: str, flags: list[str], message: str, source: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    source.write_text(text)
    assert cli.main(["opt", str(source), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err


@pytest.mark.usefixtures("passes")
def test_an_invalid_program_made_by_a_pass_is_status_1(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["opt", str(source), "-p", "drop_last{count=2}"]) == 1
    assert "the pass 'drop_last' made an invalid program" in capsys.readouterr().err


def test_opt_refuses_what_is_not_text(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source.write_bytes(b"\xff\xfe\x00")
    assert cli.main(["opt", str(source), "-p", ""]) == 2
    assert "is not text" in capsys.readouterr().err


def test_a_plugin_is_run_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    from dsv3c import passes

    monkeypatch.setattr(passes, "_passes", {})
    monkeypatch.setattr(passes, "PASSES", passes._passes)
    plugin = tmp_path / "mine.py"
    plugin.write_text("from dsv3c.passes import register\nfrom test_cli import DropLast\nregister(DropLast)\n")
    assert cli.main(["opt", str(source), "-p", "drop_last", "--plugin", str(plugin)]) == 0
    assert "unused" not in capsys.readouterr().out
    assert cli.main(["list", "ops", "--plugin", str(tmp_path / "none.py")]) == 2
    assert "none.py: is not a Python file" in capsys.readouterr().err


# ---- plans ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plans(tmp_path: Path) -> tuple[str, str]:
    make_plan().save(tmp_path / "a.plan")
    make_plan(model="other").save(tmp_path / "b.plan")
    return str(tmp_path / "a.plan"), str(tmp_path / "b.plan")


def test_inspect(plans: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", plans[0]]) == 0
    out = capsys.readouterr().out
    assert "train on cpu, fp32, 4 x 16 tokens a step" in out and "100 B on the largest rank, which has 1000 B\n" in out
    assert "1 with binary, 0 as source only" in out and "4 -> 3 nodes" in out and "1 merged" in out
    assert all(word in out for word in ("toy", "1,000", "missing", "twice", "share"))
    assert "attention.core" not in out
    assert cli.main(["inspect", plans[0], "--notes"]) == 0
    assert "attention.core" in capsys.readouterr().out
    assert cli.main(["inspect", plans[0], "--ir"]) == 0
    assert capsys.readouterr().out == load_plan(plans[0]).ir
    assert cli.main(["inspect", plans[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["params_total"] == 1000


def test_diff(plans: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diff", plans[0], plans[0]]) == 0
    assert capsys.readouterr().out == "the plans are equal\n"
    assert cli.main(["diff", *plans]) == 0
    assert capsys.readouterr().out == "model.name: toy -> other\n"
    assert cli.main(["diff", *plans, "--json"]) == 0
    assert [d["name"] for d in json.loads(capsys.readouterr().out)] == ["name"]


def test_an_altered_plan_is_refused(plans: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(plans[0])
    path.write_bytes(path.read_bytes()[:-10])
    for line in (["inspect", plans[0]], ["diff", plans[1], plans[0]]):
        assert cli.main(line) == 2
        assert capsys.readouterr().err.startswith(f"dsv3c: {plans[0]}: is truncated")


@pytest.mark.parametrize("what", ["ops", "passes", "models"])
def test_list(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["name"] and row["doc"] for row in rows)
    expected = {"ops": "rms_norm", "passes": "differentiate", "models": "deepseek-v3"}[what]
    assert expected in [row["name"] for row in rows]
    assert cli.main(["list", what]) == 0
    assert expected in capsys.readouterr().out


# ---- what the other modules are asked for ---------------------------------------------------------------------------

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]
Fake = Callable[..., None]


@pytest.fixture
def calls() -> Calls:
    return []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> Iterator[Fake]:
    """`fake("driver", compile=result)` replaces dsv3c.driver by functions that record their calls."""

    def install(name: str, **results: Any) -> None:
        module = ModuleType(f"dsv3c.{name}")
        for function, result in results.items():

            def record(*args: Any, _name: str = function, _result: Any = result, **kwargs: Any) -> Any:
                calls.append((_name, args, kwargs))
                return _result(*args, **kwargs) if callable(_result) else _result

            setattr(module, function, record)
        monkeypatch.setitem(sys.modules, f"dsv3c.{name}", module)
        package, _, leaf = f"dsv3c.{name}".rpartition(".")
        __import__(package)
        monkeypatch.setattr(sys.modules[package], leaf, module, raising=False)

    yield install


def compiled(*args: Any, on_pass: Callable[..., None], **flags: Any) -> Any:
    on_pass(PassReport("share", 4, 3, ("norm",), (), 1, 0.5), ())
    print("# from a pass")
    return make_plan()


def test_compile(fake: Fake, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    fake("driver", compile=compiled)
    monkeypatch.chdir(tmp_path)
    flags = (
        "--job train --target h800 --mesh pp=2 --seq 8 --micro-batch 2 --precision bf16 --expert-headroom 2 -p share"
        " --keep-ir --allow-oversize"
    )
    assert cli.main(["compile", "toy", *flags.split()]) == 0
    (_, args, given) = calls.pop()
    given.pop("on_pass")
    assert args == ("toy",) and given == {
        "job": "train", "target": "h800", "mesh": "pp=2", "seq": 8, "micro_batch": 2, "precision": "bf16",
        "expert_headroom": 2.0, "passes": "share", "keep_ir": True, "allow_oversize": True,
    }  # fmt: skip
    out, err = capsys.readouterr()
    assert "parameters" in out and "1 with binary" in out and "# from a pass" in out
    assert err.startswith("share ") and "wrote toy.plan (" in err
    assert load_plan("toy.plan") == make_plan()

    assert cli.main(["compile", "toy", "-o", "sub/x.plan", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["file"] == "sub/x.plan" and "# from a pass" in err
    assert load_plan("sub/x.plan") == make_plan()
    assert {*calls.pop()[2]} == {"keep_ir", "allow_oversize", "on_pass"}


def test_compile_that_stops_early_writes_no_plan(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    fake("driver", compile=compiled)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compile", "toy", "--stop-after", "share"]) == 0
    assert [*tmp_path.iterdir()] == []
    assert capsys.readouterr().out == "# from a pass\n" + make_plan().ir


def test_a_plan_that_cannot_be_written(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake("driver", compile=compiled)
    (tmp_path / "file").write_text("")
    assert cli.main(["compile", "toy", "-o", str(tmp_path / "file" / "x.plan")]) == 1
    assert "x.plan: cannot be written" in capsys.readouterr().err


@dataclass(frozen=True)
class FakeResult:
    """Stands for what training and generation give back."""

    text: str = "done"
    rank: int = 0
    interrupted: bool = False

    def __str__(self) -> str:
        return self.text


def test_train(fake: Fake, calls: Calls, plans: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    fake("runtime.train", train=FakeResult())
    line = ["train", plans[0], "--data", "a", "b", "--steps", "3", "--out", "o", "--resume", "--lr", "0.1"]
    assert cli.main([*line, "--tokenizer", "bytes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "done"
    (_, args, given) = calls.pop()
    assert args == (make_plan(), ["a", "b"])
    assert given == {"steps": 3, "out": "o", "init": None, "resume": True, "seed": 0, "save_every": None, "lr": 0.1,
                     "tokenizer": "bytes", "trace": None}  # fmt: skip
    fake("runtime.train", train=FakeResult(interrupted=True))
    assert cli.main(line) == 130
    assert capsys.readouterr().out == "done\n"
    fake("runtime.train", train=FakeResult(rank=1))
    assert cli.main(line) == 0 and capsys.readouterr().out == ""


def test_generate_from_a_plan(fake: Fake, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    def generated(*args: Any, on_text: Callable[[str], None] | None, **flags: Any) -> FakeResult:
        for piece in ("ab", "c"):
            if on_text is not None:
                on_text(piece)
        return FakeResult()

    fake("driver", load="session")
    fake("runtime.generate", generate_text=generated)
    assert cli.main(["generate", "m.plan", "--prompt", "hi", "--temperature", "0.5", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == "abc\n" and err == "no --weights: the model is random\n"
    load, generate = calls
    assert load == ("load", ("m.plan",), {"weights": None, "seed": 3})
    generate[2].pop("on_text")
    assert generate[1] == ("session", "hi")
    assert generate[2] == {"max_new_tokens": 64, "temperature": 0.5, "top_p": 1.0, "stop": None, "seed": 3,
                           "tokenizer": None}  # fmt: skip
    assert cli.main(["generate", "m.plan", "--weights", "w", "--tokens", "1, 2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["text"] == "done" and err == ""
    assert calls[3][1] == ("session", [1, 2]) and calls[3][2]["tokenizer"] == "w"


def test_generate_from_a_checkpoint(
    fake: Fake, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake("driver", load="session", compile="plan")
    fake("runtime.generate", generate_text=FakeResult())
    assert cli.main(["generate", str(tmp_path), "--prompt", "hi"]) == 0
    assert [c[0] for c in calls] == ["compile", "load", "generate_text"]
    assert calls[0][1:] == ((str(tmp_path),), {"job": "decode"})
    assert calls[1][1:] == (("plan",), {"weights": str(tmp_path)})
    assert calls[2][2]["tokenizer"] == str(tmp_path)
    assert cli.main(["generate", str(tmp_path), "--prompt", "hi", "--weights", "w"]) == 2
    assert "is a checkpoint itself; leave --weights out" in capsys.readouterr().err


@pytest.mark.parametrize("passed", [True, False])
def test_verify(passed: bool, fake: Fake, calls: Calls, monkeypatch: pytest.MonkeyPatch,
                capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    certificate = SimpleNamespace(passed=passed, render=lambda: "PAGE", to_json=lambda: "{}")
    fake("driver", compile="plan", load="session")
    fake("runtime.parity", reference_run="expected", compare=lambda *_: certificate)
    fake("runtime.reference", sample_tokens="tokens")
    config = SimpleNamespace(vocab_size=7, max_position_embeddings=64)
    monkeypatch.setattr("dsv3c.runtime.hf.checkpoint_config", lambda _: config)
    assert cli.main(["verify", "d", "--precision", "fp64", "--length", "5"]) == (0 if passed else 1)
    assert capsys.readouterr().out == "PAGE\n"
    assert calls == [
        ("sample_tokens", (7, 2, 5, 0), {}),
        ("compile", (config,), {"job": "train", "target": "cpu", "precision": "fp64", "seq": 5, "micro_batch": 2}),
        ("load", ("plan",), {"weights": "d"}),
        ("reference_run", ("d", "tokens", "fp64"), {}),
        ("compare", ("session", "expected"), {}),
    ]
    cli.main(["verify", "d", "--json"])
    assert capsys.readouterr().out == "{}\n"


def test_export(fake: Fake, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    fake("runtime.export", export=Path("o"))
    assert cli.main(["export", "d", "--format", "hf", "-o", "o"]) == 0
    assert calls == [("export", ("d",), {"format": "hf", "out": "o"})]
    assert capsys.readouterr().out == "wrote o\n"


# ---- the whole way --------------------------------------------------------------------------------------------------

SMALL = "deepseek-v3-tiny:num_hidden_layers=2,hidden_size=32,vocab_size=64,moe_intermediate_size=16"


def test_a_model_becomes_a_plan_and_every_dump_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, dump = tmp_path / "small.plan", tmp_path / "dump"
    flags = ["--seq", "16", "--kernels", "none", "--keep-ir", "--dump", str(dump), "-o", str(path), "--json"]
    assert cli.main(["compile", SMALL, *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["file"] == str(path) and printed["model"]["name"] == "deepseek-v3-tiny"
    plan = load_plan(path)
    names = sorted(p.name for p in dump.iterdir())
    assert names == [name for name, _ in plan.steps] and len(names) == len(plan.reports) + 1
    assert [(dump / name).read_text() for name in names] == [text for _, text in plan.steps]
    passes = plan.pipeline.split(",")
    assert [name.split("-")[1] for name in names[1:]] == [f"{p.split(chr(123))[0]}.ir" for p in passes]
    for done in sorted({*range(0, len(names), 3), len(names) - 1}):
        assert cli.main(["opt", str(dump / names[done]), "-p", ",".join(passes[done:])]) == 0
        assert capsys.readouterr().out == plan.ir, f"resumed from {names[done]}"
    assert cli.main(["inspect", str(path), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {**again, "file": str(path)} == printed
    assert cli.main(["generate", str(path), "--tokens", "1,2,3", "--max-new-tokens", "2"]) == 0
    assert len(capsys.readouterr().out.split(",")) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("compile deepseek-v3-tony", "unknown model 'deepseek-v3-tony'"),
        ("compile deepseek-v3-tiny --target h80", "--target h80 is unknown; did you mean 'h800'?"),
        ("compile deepseek-v3-tiny -p fuze", "unknown pass 'fuze'; did you mean 'fuse'?"),
        ("compile deepseek-v3-tiny --mesh pp=2,xp=2", "'xp=2' is not an axis"),
        ("compile deepseek-v3-tiny --stop-after fuze", "--stop-after fuze: the pipeline has no such pass"),
        ("compile deepseek-v3-tiny --seq 9999999", "--seq 9999999 exceeds the model's 4096 positions"),
        ("compile deepseek-v3-16b --target h800", "this job needs"),
    ],
)
def test_what_cannot_be_compiled(line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and [*tmp_path.iterdir()] == []
