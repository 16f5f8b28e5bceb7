"""What a user can get wrong, seen from outside: a clear sentence, the right exit status, and nothing half-written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from small import SMALL

import dsv3c
from dsv3c import cli, driver
from dsv3c.errors import InputError, WorkError
from dsv3c.models.config import ModelConfig
from dsv3c.plan import Plan
from dsv3c.runtime.export import write_hf
from dsv3c.runtime.sampling import Sampling, sample
from dsv3c.runtime.session import Session
from dsv3c.runtime.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]


def compile_small(**flags: object) -> Plan:
    return dsv3c.compile(SMALL, **{"seq": 16, "kernels": "none", **flags})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan, a checkpoint of it, its model, and a text. Tests only read it."""
    folder = tmp_path_factory.mktemp("made")
    plan = compile_small()
    plan.save(folder / "small.plan")
    session = dsv3c.load(plan)
    write_hf(folder / "hf", session.config, session.weights.tensors, load_tokenizer("bytes"))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(SMALL.to_hf_dict()))
    (folder / "text.txt").write_text("Old pond, a frog leaps in, water's sound. " * 20)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the test's own with all of `made`; commands make no kernels unless told to."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "compile", functools.partial(driver.compile, kernels="none"))
    return tmp_path


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must fail with `status`; gives what it said, which is no traceback."""

    def run(line: str | Sequence[str], status: int = 2) -> str:
        words = shlex.split(line) if isinstance(line, str) else list(line)
        assert cli.main(words) == status
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        said = err[err.index("dsv3c: ") :]
        assert len(said.splitlines()[0]) > len("dsv3c: ")
        return said

    return run


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, hidden files too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- what is to be compiled -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("compile deepseek-v3-tony", "did you mean 'deepseek-v3-tiny'?"),
        ("compile no/such/config.json", "neither a preset nor a config.json nor a directory with one"),
        ("compile .", "config.json: no such file; give a config.json or a directory that holds one"),
        ("compile model/config.json:n_grop=2", "unknown field n_grop, did you mean 'n_group'?"),
        ("compile model --seq 0", "--seq: '0' is not a whole number from 1"),
        ("compile model --seq 1", "--seq 1: the loss needs at least 2 tokens"),
        ("compile model --seq 65", "--seq 65 exceeds the model's 64 positions (max_position_embeddings)"),
        ("compile model --mesh nonsense", "--mesh nonsense: 'nonsense' is not an axis"),
        ("compile model --mesh pp=0", "'pp=0' is not an axis; write for example pp=4,dp=2,ep=2"),
        ("compile model --mesh pp=²", "'pp=²' is not an axis"),
        ("compile model --mesh dp=2,dp=4", "'dp=4' is not an axis"),
        ("compile model --mesh dp=4,ep=3", "ep=3 does not divide dp=4"),
        ("compile model --precision fp8", "--precision fp8 needs FP8 tensor cores, which cpu lacks"),
        ("compile model --target h800 --precision fp64", "--precision fp64 runs on --target cpu only"),
        ("compile model --target h8000", "did you mean 'h800'?"),
        ("compile model --micro-batch 2 --global-batch 3", "--global-batch 3 is not a multiple of micro-batch"),
        ("compile model --document-end 257", "--document-end 257 is not a token of the model's 257"),
        ("compile model --expert-headroom 0.5", "--expert-headroom 0.5 must be at least 1"),
        ("compile model -p differentiate,fuze", "unknown pass 'fuze'; did you mean 'fuse'?"),
        ("compile model -p recompute{prize=1}", "has no option 'prize'; did you mean 'price'?"),
        ("compile model -p 'fuse,,cut'", "expected the name of a pass"),
        ("compile model --print-after fuze -p fuse,eliminate,eliminate", "no such pass; did you mean 'fuse'?"),
        ("compile model --stop-after x -p fuse,eliminate,eliminate", "no such pass; known: eliminate, fuse\n"),
        ("list foo", "dsv3c: foo: no such choice; known: models, ops, passes, schedules, targets"),
        ("compil model", "dsv3c: compil: no such choice; did you mean 'compile'?"),
    ],
)
def test_nothing_is_compiled(line: str, message: str, place: Path, refused: Refused) -> None:
    before = files(place)
    assert message in refused(line)
    assert files(place) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON: Expecting property name"),
        ('{"vocab_size": 7}', "missing fields hidden_size, intermediate_size"),
        ({"hidden_size": "32"}, 'hidden_size = "32", but it must be a positive integer'),
        ({"num_experts_per_tok": 8, "topk_group": 1}, "num_experts_per_tok = 8 is more than the 2 experts left"),
        ({"num_key_value_heads": 1}, "it must equal num_attention_heads"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7 is odd"),
    ],
)
def test_a_configuration_that_cannot_be(content: str | dict[str, object], message: str, place: Path,
                                        refused: Refused) -> None:  # fmt: skip
    text = content if isinstance(content, str) else json.dumps(SMALL.to_hf_dict() | content)
    (place / "model" / "config.json").write_text(text)
    said = refused("compile model")
    assert "model/config.json: " in said and message in said


def test_as_many_overrides_as_one_likes() -> None:
    fields = [f for f in dataclasses.fields(ModelConfig) if f.type == "int" and f.name != "moe_layer_freq"]
    overrides = ",".join(f"{f.name}={getattr(SMALL, f.name)}" for f in fields)
    assert len(overrides) > 255  # more than a file name may have
    plan = dsv3c.compile(f"deepseek-v3-tiny:{overrides}", seq=16, passes="eliminate")
    assert plan.config["hidden_size"] == SMALL.hidden_size


def test_a_type_error_in_a_program_has_a_caret(place: Path, refused: Refused) -> None:
    lines = ["def f(x: f32[4, 8], *, w: f32[2, 9]):", "    y = linear(x, w)", "    return y"]
    (place / "f.ir").write_text("\n".join(lines))
    said = refused("opt f.ir -p eliminate").splitlines()
    assert said[0].startswith("dsv3c: f.ir:2:9: linear: ")
    shown = said.index("  " + lines[1])
    assert said[shown + 1].index("^") == 2 + lines[1].index("linear")


# ---- what a plan is used for ----------------------------------------------------------------------------------------

TRAIN = "train x.plan --data text.txt --tokenizer bytes --steps 1 --out run"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"job": "decode"}, "was compiled for --job decode; compile with --job train to train"),
        ({"target": "h800", "precision": "bf16"}, "Or compile for --target cpu"),
        ({"mesh": "dp=2"}, "RANK is not set; start it with torchrun --nproc-per-node 2 -m dsv3c train"),
        ({"passes": "eliminate"}, "the passes of this plan, 'eliminate', make no backward pass"),
        ({"passes": "differentiate"}, "make no backward pass; compile with differentiate and then cut among them"),
    ],
)
def test_a_plan_that_cannot_be_trained(flags: dict[str, object], message: str, place: Path, refused: Refused) -> None:
    compile_small(**flags).save("x.plan")
    assert message in refused(TRAIN)
    assert not (place / "run" / "checkpoints").exists() and not (place / "run" / "hf").exists()


def test_a_plan_for_many_ranks_is_started_by_torchrun(
    place: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--seq 16 --kernels none --mesh pp=2,dp=4,ep=2"
    assert cli.main(["compile", "model", *flags.split(), "-o", "x.plan"]) == 0
    assert "pp=2,dp=4,ep=2,tp=1 (8 ranks)" in capsys.readouterr().out
    message = r"for 8 ranks \(pp=2,.*\), which train together, .*; start it with torchrun --nproc-per-node 8 "
    assert re.search(message, refused("generate x.plan --tokens 1"))
    assert re.search(message, refused(TRAIN))
    with pytest.raises(InputError, match=message):
        dsv3c.load("x.plan")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate hf --tokens 300", "token 300 is outside the vocabulary of 257"),
        ("generate hf --tokens 99999999999999999999999", "token 99999999999999999999999 is outside the vocabulary"),
        ("generate hf --tokens 1,-2", "is not a list of token numbers"),
        (f"generate hf --prompt {'a' * 65}", "65 tokens and 64 new ones exceed the model's 64 positions"),
        ("generate hf --prompt a --max-new-tokens 64", "1 tokens and 64 new ones exceed"),
        ("generate hf --prompt a --temperature -1", "--temperature: '-1' is not a number from 0"),
        ("generate hf --prompt a --temperature nan", "'nan' is not a number from 0"),
        ("generate hf --prompt a --top-p 0", "--top-p 0.0: must be above 0 and at most 1"),
        ("generate hf --prompt a --tokenizer text.txt", "text.txt is not a Hugging Face tokenizer.json"),
        ("generate hf --prompt a --tokenizer none", "there is no file none; give 'bytes' or a Hugging Face tokenizer"),
        ("generate small.plan --prompt a", "a text needs a tokenizer"),
        ("generate small.plan --tokens 1 --weights none", "none: no such directory"),
        ("generate small.plan --tokens 1 --weights model", "holds neither model.safetensors nor model.safetensors.i"),
        ("generate none.plan --tokens 1", "none.plan: no such file"),
        ("generate hf/model.safetensors --tokens 1", "is not a plan; give a file that dsv3c compile wrote"),
        (
            "generate . --tokens 1",
            "config.json: no such file; give a config.json or a directory that holds one",
        ),
        ("verify . ", "a model trained there is in its folder hf"),
        ("verify hf --length 65", "--length 65 exceeds the model's 64 positions"),
        ("verify text.txt", "text.txt: not JSON"),
        ("inspect hf", "hf: is a directory; give the path of a plan"),
        ("diff small.plan text.txt", "text.txt: is not a plan"),
        ("export model --format hf -o out", "holds neither model.safetensors nor"),
        ("export text.txt --format hf -o out", "text.txt: no such folder"),
        ("train small.plan --data none --steps 1 --out run", "--data: none does not exist"),
        ("train small.plan --data hf/model.safetensors --steps 1 --out run", "model.safetensors is binary"),
        (
            "train small.plan --data text.txt --steps 1 --out run --tokenizer hf/config.json",
            "is not a Hugging Face",
        ),
        ("train small.plan --data text.txt --steps 1 --out run --lr nan", "--lr: 'nan' is not a number from 0"),
    ],
)
def test_nothing_is_run(line: str, message: str, place: Path, refused: Refused) -> None:
    before = files(place)
    assert message in refused(line)
    assert files(place) == before


def test_the_tokenizer_of_a_larger_model(place: Path, refused: Refused) -> None:
    import tokenizers

    words = {"[UNK]": 0, "</s>": 1, "pond": 999}
    body = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    body.save(str(place / "large.json"))
    said = refused("generate hf --prompt pond --tokenizer large.json --max-new-tokens 2")
    assert "token 999 is outside the vocabulary of 257; large.json is another model's tokenizer" in said


# ---- damaged and foreign weights ------------------------------------------------------------------------------------


def cut_short(hf: Path) -> None:
    data = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(data[:-100])


def bad_index(hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": 3}}')


def lost_shard(hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-00001.safetensors"}}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "model.safetensors: truncated or altered, not a whole safetensors file"),
        (bad_index, "model.safetensors.index.json: not an index of safetensors"),
        (lost_shard, "model-00001.safetensors: missing, though the checkpoint's index names it"),
    ],
)
def test_damaged_weights(damage: Callable[[Path], None], message: str, place: Path, refused: Refused) -> None:
    damage(place / "hf")
    assert message in refused("generate small.plan --tokens 1 --weights hf")
    assert message in refused("verify hf")
    assert message in refused("export hf --format hf -o out")
    assert not (place / "out").exists()
    with pytest.raises(InputError, match=message):
        dsv3c.load("small.plan", weights="hf")


def test_weights_of_another_model_are_refused_with_every_difference(place: Path) -> None:
    other = dsv3c.compile(SMALL.override("moe_intermediate_size=16,q_lora_rank=none"), passes="eliminate", seq=16)
    with pytest.raises(InputError) as error:
        dsv3c.load(other, weights="hf")
    said = str(error.value)
    assert "missing: " in said and "self_attn.q_proj.weight" in said  # this model's
    assert "unexpected: " in said and "self_attn.q_a_proj.weight" in said  # the checkpoint's
    assert said.count("gate_proj.weight is [32, 32], the model's is [16, 32]") == 2 * (8 + 1)  # each expert is named


def test_a_configuration_that_promises_mtp_weights_which_are_not_there(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What transformers saves: it keeps the count of MTP modules, but none of their weights."""
    import transformers

    config: Any = transformers.DeepseekV3Config
    model: Any = transformers.DeepseekV3ForCausalLM
    model(config(**SMALL.to_hf_dict())).save_pretrained("theirs")
    assert json.loads(Path("theirs/config.json").read_text())["num_nextn_predict_layers"] == 1
    assert cli.main(["verify", "theirs", "--length", "8", "--json"]) == 0
    assert cli.main(["generate", "theirs", "--tokens", "1", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].count(",") == 1


def test_a_model_whose_output_is_not_a_number_is_failed_work(place: Path, refused: Refused) -> None:
    session = dsv3c.load("small.plan")
    session.weights.tensors["model.norm.weight"].fill_(float("nan"))
    session.save_hf("hf")
    for flags in ("", " --temperature 1"):
        assert "its weights are damaged or its training diverged" in refused(
            f"generate hf --tokens 1 --max-new-tokens 2{flags}", 1
        )


def test_every_temperature_and_seed_samples() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0]])
    assert int(sample(logits, Sampling(temperature=1e-320), 0)) == 1
    assert int(sample(logits, Sampling(temperature=1e300, seed=10**30), 0)) in (0, 1, 2)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(WorkError, match="not a number"):
            sample(torch.tensor([[0.0, bad]]), Sampling(), 0)


@pytest.fixture(scope="module")
def session(made: Path) -> Session:
    return dsv3c.load(made / "small.plan")


@pytest.mark.parametrize("call", ["forward", "generate", "step", "gradients", "losses"])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], "must be a LongTensor [B, S], got a list"),
        (torch.zeros(4, dtype=torch.long), "got torch.int64 [4]"),
        (torch.zeros(1, 4), "got torch.float32 [1, 4]"),
        (torch.zeros(0, 4, dtype=torch.long), "got torch.int64 [0, 4]"),
        (torch.full((1, 4), 257), "token 257 is outside the vocabulary of 257"),
        (torch.full((1, 4), -1), "token -1 is outside"),
        (torch.zeros(1, 65, dtype=torch.long), "exceed the model's 64 positions"),
    ],
)
def test_tokens_that_a_session_refuses(call: str, tokens: object, message: str, session: Session) -> None:
    few = {"max_new_tokens": 2} if call == "generate" else {}
    with pytest.raises(InputError) as error:
        getattr(session, call)(tokens, **few)
    assert message in str(error.value)


def test_a_single_token_has_nothing_to_predict(session: Session) -> None:
    one = torch.zeros(1, 1, dtype=torch.long)
    assert session.forward(one).shape == (1, 1, 257)
    for call in (session.step, session.gradients, session.losses):
        with pytest.raises(InputError, match="the loss needs at least 2"):
            call(one)


def test_a_session_has_one_stream_at_a_time(session: Session) -> None:
    tokens = torch.arange(8).view(1, 8)
    for other in (lambda: session.generate(tokens, 4), lambda: session.step(tokens)):
        stream = session.stream(tokens, 4)
        next(stream)
        other()
        with pytest.raises(InputError, match="a stream goes on after another began or a step was made"):
            next(stream)


# ---- where results go -----------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
from dsv3c.cli import main
for line in sys.argv[1:]:
    print(main(line.split()), flush=True)
"""


def own_process(code: str, *words: str, cwd: Path, stdin: IO[str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, env=environment, stdin=stdin, text=True,
                          capture_output=True, timeout=120)  # fmt: skip


def test_a_full_disk_leaves_what_was_there(place: Path) -> None:
    (place / "out.plan").write_text("old")
    before = files(place)
    lines = (
        "compile model --seq 16 -p eliminate -o out.plan",
        "export hf --format hf -o out",
        "export hf --format hf -o model",
        "train small.plan --data text.txt --tokenizer bytes --steps 1 --out run",
    )
    ran = own_process(LIMITED, *lines, cwd=place)
    assert (ran.returncode, ran.stdout) == (0, "1\n" * len(lines))
    assert ran.stderr.lower().count("file too large") == len(lines) and "Traceback" not in ran.stderr
    assert {name: data for name, data in files(place).items() if not name.startswith("run/")} == before
    assert not (place / "out").exists() and [n for n in files(place) if n.endswith(".tmp")] == []


@pytest.mark.parametrize("line", ["compile model --seq 16 -p eliminate -o hf", "opt f.ir -p eliminate -o text.txt/f"])
def test_an_output_that_is_something_else(line: str, place: Path, refused: Refused) -> None:
    (place / "f.ir").write_text("def f(x: f32[4]):\n    return x\n")
    before = files(place)
    assert "cannot be written: " in refused(line, 1)
    assert files(place) == before


CLOSED = """
import os, sys
for name in sys.argv[1].split(","):
    setattr(sys, name, None)  # as Python does for a stream that its caller closed
from dsv3c.cli import main
os._exit(main(sys.argv[2:]))
"""


def test_closed_standard_streams(tmp_path: Path) -> None:
    ran = own_process(CLOSED, "stdin", "opt", "-", "-p", "fuse", cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (
        2, "dsv3c: -: standard input is closed; give the path of a program's text\n")  # fmt: skip
    assert own_process(CLOSED, "stdout,stderr", "list", "ops", cwd=tmp_path).returncode == 0
    assert own_process(CLOSED, "stdout,stderr", "list", "foo", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_standard_input_that_is_not_text(locale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", locale)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with open(tmp_path / "binary") as file:
        ran = own_process("from dsv3c.cli import main; raise SystemExit(main())", "opt", "-", "-p", "fuse",
                          cwd=tmp_path, stdin=file)  # fmt: skip
    assert (ran.returncode, ran.stderr) == (2, "dsv3c: -: standard input is not text; give a program's text\n")


def test_exhausted_memory_is_failed_work(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    def fail(_: object) -> int:
        with contextlib.suppress(MemoryError):
            torch.empty(2**60, dtype=torch.uint8)
        raise AssertionError("there cannot be so much memory")

    monkeypatch.setattr("dsv3c.commands.inspect", fail)
    assert refused("inspect x.plan", 1) == "dsv3c: out of memory; choose a smaller model, batch or sequence\n"
