"""The plan file: round trip, reproducible bytes, refusal of what is no plan, summary and differences."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3c.errors import InputError, WorkError
from dsv3c.ir import Program
from dsv3c.job import Job, Mesh, Recipe
from dsv3c.ops import REGISTRY
from dsv3c.plan import (
    FORMAT,
    MEMORY_KINDS,
    Memory,
    Parameters,
    Plan,
    StoredWeight,
    load_plan,
    plan_from_bytes,
    summary,
)
from dsv3c.plandiff import as_json, diff
from dsv3c.state import Note, PassReport
from dsv3c.target import Choice, Kernel, KernelFile, Product
from dsv3c.text import parse_program, show_program

IR = """\
name = 'model'

def norm(x: f32[B, 4], *, w: f32[4]):
    y = rms_norm(x, w, eps=1e-06)  # f32[B, 4] @F:block.norm
    return y

def twice(x: f32[B, 4], *, w: f32[4]):
    y = rms_norm(x, w, eps=1e-06)  # f32[B, 4] @F:block.norm
    z = rms_norm(y, w, eps=1e-06)  # f32[B, 4] @F:block.norm
    return z
"""


def program(text: str = IR) -> Program:
    return parse_program(text, REGISTRY)


def reports(seconds: float) -> tuple[PassReport, ...]:
    share = PassReport("share", 4, 3, ("norm", "twice"), ("old",), 1, seconds)
    return share, PassReport("fuse", 3, 3, (), (), 1, seconds)


def make_plan(**changes: object) -> Plan:
    files = (KernelFile("tir.py", b"# tir\n"), KernelFile("ll", b"; llvm \x00\xff\n"))
    fields: dict[str, object] = {
        "model": "toy",
        "config": {"vocab_size": 8, "hidden_size": 4, "rms_norm_eps": 1e-6, "rope_scaling": None},
        "parameters": Parameters(1000, 900, 10),
        "job": Job("train", "cpu", "fp32", 16, 2, 4, Mesh(1, 2, 2), recipe=Recipe(lr=1e-3)),
        "pipeline": 'share,fuse{label="a, b"}',
        "notes": (
            Note("share", "merged", "block.norm", "same inputs:\t'x'\nand \\n no newline"),
            Note("fuse", "kept", "attention.core", ""),
        ),
        "reports": (
            PassReport("share", 4, 3, ("norm", "twice"), ("old",), 1, 0.25),
            PassReport("fuse", 3, 3, (), (), 1),
        ),
        "weights": (StoredWeight("model.norm.weight", "f32", (4,)), StoredWeight("b", "bf16", (2, 3), "ep")),
        "memory": Memory(100, tuple(zip(MEMORY_KINDS, (50, 20, 10, 15, 5), strict=True)), (100, 90), 1000),
        "kernels": (Kernel("fused_1", "norm", "tvm", ("f32[B, 4]",), files, (("entry", "main"), ("threads", 2))),),
        "missing_kernels": ("twice",),
        "buffers": {"slots": [{"name": "x", "offset": 0, "bytes": 64}]},
        "comm": {"groups": []},
        "schedule": "0F0,0B0\n",
        "steps": (("00-input.ir", "def a(x: f32[4]):\n    return x\n"), ("01-share.ir", IR)),
        "choices": (Choice(Product("linear_wgrad", "bf16", 16, 8, 4, 1, True), "cublas", "", "the fastest"),),
        "measured": "measured/h100.json sha256:00",
    }
    return Plan.of(program(), **{**fields, **changes})


def test_round_trip(tmp_path: Path) -> None:
    plan = make_plan()
    plan.save(tmp_path / "new" / "toy.plan")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["toy.plan"]
    loaded = load_plan(tmp_path / "new" / "toy.plan")
    assert loaded == plan
    assert show_program(loaded.program) == show_program(plan.program)
    assert loaded.to_bytes() == plan.to_bytes()
    assert loaded.kernels[0].has_binary and loaded.kernels[0].file("ll") == b"; llvm \x00\xff\n"
    bare = make_plan(kernels=(), steps=(), notes=(), reports=(), schedule="", missing_kernels=(), pipeline="")
    assert plan_from_bytes(bare.to_bytes()) == bare


def test_the_file_is_as_described() -> None:
    data = make_plan().to_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        manifest = json.loads(archive.read("manifest.json"))
        for info in infos:
            if info.filename != "manifest.json":
                assert manifest["members"].pop(info.filename) == hashlib.sha256(archive.read(info)).hexdigest()
        comment = archive.comment
        passes = archive.read("passes.txt").decode()
    names = [i.filename for i in infos]
    assert names == sorted(names)
    assert {*names} == {
        "manifest.json", "config.json", "passes.txt", "ir/program.ir", "ir/00-input.ir", "ir/01-share.ir",
        "schedule.csv", "comm.json", "buffers.json", "kernels/fused_1.json", "kernels/fused_1.tir.py",
        "kernels/fused_1.ll", "weights.json", "implementations.json",
    }  # fmt: skip
    assert manifest["members"] == {}
    assert manifest["format"] == FORMAT and manifest["target"] == "cpu" and manifest["mesh"]["ep"] == 2
    assert {(i.compress_type, i.date_time) for i in infos} == {(zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))}
    assert comment == hashlib.sha256(data[:-64]).hexdigest().encode()
    assert passes.startswith('pipeline share,fuse{label="a, b"}\n') and "0.25" not in passes


def test_equal_plans_give_equal_bytes_whatever_the_hash_seed() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_plan, hashlib;"
        "print(hashlib.sha256(test_plan.make_plan().to_bytes()).hexdigest())"
    )
    root = Path(__file__).parents[1]
    outputs = [
        subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True,
                       env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert outputs[0] == outputs[1] == hashlib.sha256(make_plan().to_bytes()).hexdigest() + "\n"
    assert make_plan(reports=reports(9.0)).to_bytes() == make_plan().to_bytes()
    config = {"rope_scaling": None, "rms_norm_eps": 1e-6, "hidden_size": 4, "vocab_size": 8}
    assert make_plan(config=config).to_bytes() == make_plan().to_bytes()


def repacked(data: bytes, change: Callable[[dict[str, bytes]], None], sign: bool = True) -> bytes:
    """The plan with its members changed, its hashes made right again if `sign`."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
        comment = archive.comment
    change(members)
    if sign:
        manifest = json.loads(members["manifest.json"])
        manifest["members"] = {n: hashlib.sha256(d).hexdigest() for n, d in members.items() if n != "manifest.json"}
        members["manifest.json"] = json.dumps(manifest).encode()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, body in members.items():
            archive.writestr(name, body)
        archive.comment = comment
    body = stream.getvalue()[:-64]
    return body + (hashlib.sha256(body).hexdigest().encode() if sign else comment)


def newer(members: dict[str, bytes]) -> None:
    members["manifest.json"] = json.dumps({**json.loads(members["manifest.json"]), "format": FORMAT + 1}).encode()


def test_every_flipped_byte_is_refused() -> None:
    data = make_plan().to_bytes()
    for position in [0, *range(1, len(data), 97), *range(len(data) - 100, len(data))]:
        wrong = bytearray(data)
        wrong[position] ^= 0x41
        with pytest.raises(InputError) as caught:
            plan_from_bytes(bytes(wrong), "toy.plan")
        message = str(caught.value)
        assert message.startswith("toy.plan: ") and message.count("\n") == 0 and len(message) < 200


def test_every_truncation_is_refused() -> None:
    data = make_plan().to_bytes()
    for length in (*range(0, len(data), 211), *range(len(data) - 90, len(data))):
        with pytest.raises(InputError, match=r"is truncated|is not a plan"):
            plan_from_bytes(data[:length], "toy.plan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "is not a plan; give a file that dsv3c compile wrote"),
        (lambda data: b"hello", "is not a plan"),
        (lambda data: data + b"x", "was altered"),
        (lambda data: data[:200] + b"y" + data[201:], "was altered"),
        (lambda data: repacked(data, lambda m: m.update({"extra": b"1"}), sign=False), "was altered"),
        (lambda data: repacked(data, newer), f"has plan format {FORMAT + 1}, this dsv3c reads up to {FORMAT}; update"),
        (lambda data: repacked(data, newer, sign=False), f"has plan format {FORMAT + 1}"),
        (lambda data: repacked(data, lambda m: m.__delitem__("weights.json")), "is not a plan that dsv3c wrote"),
        (lambda data: repacked(data, lambda m: m.update({"weights.json": b"{"})), "is not a plan that dsv3c wrote"),
        (lambda data: repacked(data, lambda m: m.update({"passes.txt": b"x"})), "is not a plan that dsv3c wrote"),
        (lambda data: repacked(data, lambda m: m.update({"buffers.json": b"[]"})), "is not a plan that dsv3c wrote"),
    ],
)
def test_what_is_no_good_plan_is_refused(change: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_from_bytes(change(make_plan().to_bytes()), "toy.plan")
    assert message in str(caught.value) and str(caught.value).startswith("toy.plan: ")


def test_another_zip_is_refused() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(InputError, match="is a zip archive but not a plan"):
        plan_from_bytes(stream.getvalue())


def test_paths_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.plan: no such file"):
        load_plan(tmp_path / "none.plan")
    with pytest.raises(InputError, match="is a directory"):
        load_plan(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(WorkError, match="cannot be written"):
        make_plan().save(tmp_path / "file" / "toy.plan")
    (tmp_path / "dir").mkdir()
    with pytest.raises(WorkError, match="cannot be written"):
        make_plan().save(tmp_path / "dir")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir", "file"]


def test_kernel_ids_are_file_names() -> None:
    for id in ("a/b", "..", "", "fused.x"):
        with pytest.raises(ValueError, match="kernel id"):
            make_plan(kernels=(Kernel(id, "norm", "tvm", (), ()),)).to_bytes()


def test_summary_has_what_inspect_prints() -> None:
    found = json.loads(json.dumps(summary(make_plan())))
    assert found["model"] == {"name": "toy", "params_total": 1000, "params_active": 900, "params_mtp": 10}
    assert (found["target"], found["job"], found["mesh"]) == ("cpu", "train", {"pp": 1, "dp": 2, "ep": 2, "tp": 1})
    assert found["passes"] == ["share", "fuse"]
    assert found["notes"][1] == {"pass": "fuse", "action": "kept", "node": "attention.core", "reason": ""}
    assert found["kernels"] == [{"id": "fused_1", "op": "norm", "lang": "tvm", "has_binary": True}]
    assert found["memory"]["peak_bytes"] == 100 and found["memory"]["per_rank"] == [100, 90]
    assert [*found["memory"]["by_kind"]] == [*MEMORY_KINDS]
    assert found["graphs"] == [{"name": "norm", "nodes": 1}, {"name": "twice", "nodes": 2}]
    assert found["missing_kernels"] == ["twice"] and found["memory"]["fits"]
    assert not summary(make_plan(memory=dataclasses.replace(make_plan().memory, limit_bytes=99)))["memory"]["fits"]  # type: ignore[index,call-overload]


def test_differences() -> None:
    plan = make_plan()
    assert diff(plan, make_plan()) == ()
    changed_ir = IR.replace("    z = rms_norm(y, w, eps=1e-06)", "    z = rms_norm(y, w, eps=1e-05)")
    files = (KernelFile("tir.py", b"# other\n"), KernelFile("ll", b"; llvm \x00\xff\n"))
    other = dataclasses.replace(
        plan,
        config={**plan.config, "vocab_size": 16},
        job=dataclasses.replace(plan.job, seq=32, mesh=Mesh(2, 2, 2)),
        ir=changed_ir,
        pipeline="share",
        notes=plan.notes[:1],
        reports=plan.reports[:1],
        kernels=(dataclasses.replace(plan.kernels[0], files=files),),
        memory=dataclasses.replace(plan.memory, peak_bytes=120),
        weights=plan.weights[:1],
    )
    found = diff(plan, other)
    titles = {f"{d.area}.{d.name}": (d.first, d.second) for d in found}
    assert titles["config.vocab_size"] == ("8", "16")
    assert titles["job.seq"] == ("16", "32") and titles["job.mesh.pp"] == ("1", "2")
    assert titles["graphs.twice"] == ("4 lines", "4 lines (+1 -1)")
    assert "graphs.norm" not in titles
    assert titles["passes.02-fuse"][1] == "absent" and titles["weights.b"][1] == "absent"
    assert titles["notes."] == ("2 notes", "1 notes (+0 -1)")
    assert titles["memory.peak_bytes"] == ("100", "120")
    assert "kernels.fused_1" in titles
    (graph,) = (d for d in found if d.area == "graphs")
    assert any(line.startswith("+    z = rms_norm(y, w, eps=1e-05)") for line in graph.detail)
    assert str(graph).startswith("graphs.twice: 4 lines -> 4 lines (+1 -1)\n    ")
    assert json.loads(json.dumps(as_json(found)))[0]["area"] == found[0].area
    assert {d.area for d in diff(plan, dataclasses.replace(plan, ir=IR.replace("def norm", "def nurm")))} == {"graphs"}
    assert {d.area for d in diff(plan, dataclasses.replace(plan, ir=IR.replace("'model'", "'x'")))} == {"program"}


def test_every_field_of_a_plan_shows_in_the_differences() -> None:
    plan = make_plan()
    other: dict[str, object] = {
        "model": "x", "config": {}, "parameters": Parameters(1, 1, 1), "job": dataclasses.replace(plan.job, seq=1),
        "ir": IR.replace("twice", "thrice"), "pipeline": "", "notes": (), "reports": (), "weights": (),
        "memory": dataclasses.replace(plan.memory, per_rank=(1,)), "kernels": (), "missing_kernels": (),
        "buffers": {}, "comm": {}, "schedule": "", "steps": (), "version": "9", "choices": (), "measured": "",
    }  # fmt: skip
    assert {*other} == {f.name for f in dataclasses.fields(Plan)}
    for name, value in other.items():
        assert diff(plan, dataclasses.replace(plan, **{name: value})), name  # type: ignore[arg-type]
