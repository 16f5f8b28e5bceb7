"""The plan: one file that holds everything a run needs, written so that equal inputs give equal bytes.

A zip whose members are stored uncompressed, sorted and undated; its comment is the SHA-256, in hexadecimal, of all
bytes before the comment. Nothing in it is ever executed when it is read.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from dsv3c import __version__
from dsv3c.errors import InputError
from dsv3c.files import read_bytes, write_bytes
from dsv3c.ir import Program
from dsv3c.job import Job, Mesh, Recipe
from dsv3c.notes import read_notes, show_notes
from dsv3c.state import Note, PassReport
from dsv3c.target import Choice, Kernel, KernelFile, Product
from dsv3c.text import parse_program, show_program

FORMAT = 1
"""Version of the file's layout; a file with a higher one is refused."""

MEMORY_KINDS = ("weights", "gradients", "optimizer", "activations", "communication")

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many parameters a checkpoint of the model holds: the main model, what one token uses of it, MTP apart."""

    total: int
    active: int
    mtp: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the largest rank at balanced load, those of each kind at that peak, and each pipeline rank's own peak.

    `by_kind` has the kinds of MEMORY_KINDS in that order. `limit_bytes` is what the machine offers, 0 if unknown.
    `with_headroom_bytes`: the largest rank with buffers for as uneven experts as `expert_headroom` says.
    """

    peak_bytes: int
    by_kind: tuple[tuple[str, int], ...]
    per_rank: tuple[int, ...]
    limit_bytes: int = 0
    with_headroom_bytes: int = 0

    @property
    def fits(self) -> bool:
        return not self.limit_bytes or self.peak_bytes <= self.limit_bytes


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One tensor of the checkpoint as the plan expects it; `shard` says how ranks divide it, `whole` if they don't."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str = "whole"


@dataclass(frozen=True)
class Plan:
    """A compiled model. `ir` is the final program's text, `program` the same parsed when first asked for.

    model            the name the user gave, and `config` its config.json
    pipeline         the passes as `dsv3c.pipeline.parse` reads them; `notes` and `reports` are what they said
    missing_kernels  regions that no generator of the target covers, by name; they run by their ops' references
    buffers, comm    the contents of buffers.json and comm.json
    schedule         the contents of schedule.csv, one row per pipeline rank
    steps            (NN-name.ir, text) of every pass, with `--keep-ir`
    choices          how each matrix product is executed, and `measured` the table that says so, with its hash
    """

    model: str
    config: Mapping[str, Json]
    parameters: Parameters
    job: Job
    ir: str
    pipeline: str
    notes: tuple[Note, ...]
    reports: tuple[PassReport, ...]
    weights: tuple[StoredWeight, ...]
    memory: Memory
    kernels: tuple[Kernel, ...] = ()
    missing_kernels: tuple[str, ...] = ()
    buffers: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    comm: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    schedule: str = ""
    steps: tuple[tuple[str, str], ...] = ()
    choices: tuple[Choice, ...] = ()
    measured: str = ""
    version: str = __version__

    @classmethod
    def of(cls, program: Program, /, **fields: object) -> Plan:
        """The plan of a program at hand; `fields` are all the others but `ir`."""
        plan = cls(ir=show_program(program), **fields)  # type: ignore[arg-type]
        plan.__dict__["program"] = program
        return plan

    @functools.cached_property
    def program(self) -> Program:
        """The program. Raises IRError if it uses an op that is not registered here."""
        from dsv3c.ops import REGISTRY

        return parse_program(self.ir, REGISTRY, "ir/program.ir")

    @property
    def target(self) -> str:
        """The name of the target."""
        return self.job.target

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file at once or not at all. Raises WorkError saying why it cannot be written."""
        write_bytes(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The contents of the file; the same for equal plans."""
        members = _members(self)
        manifest: dict[str, Json] = {
            "format": FORMAT,
            "dsv3c": self.version,
            "model": self.model,
            "parameters": dataclasses.asdict(self.parameters),
            "target": self.target,
            "mesh": dataclasses.asdict(self.job.mesh),
            "job": dataclasses.asdict(self.job),
            "missing_kernels": list(self.missing_kernels),
            "measured": self.measured,
            "members": {name: _digest(data) for name, data in sorted(members.items())},
        }
        members["manifest.json"] = _json(manifest)
        return _archive(members)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file. Raises InputError with one sentence if it is no plan, truncated, altered or too new."""
    return plan_from_bytes(read_bytes(path, "a plan, as dsv3c compile writes it"), str(path))


def plan_from_bytes(data: bytes, where: str = "plan") -> Plan:
    """The plan in `data`; `where` names it in errors. See `load_plan`."""
    members = _open(data, where)
    try:
        return _decode(members)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: is not a plan that dsv3c wrote ({error}); compile the model again") from None


# ---- the archive ----------------------------------------------------------------------------------------------------

_END_BYTES = 22  # the zip's end record, without its comment
_COMMENT_BYTES = 64


def _archive(members: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o100644 << 16
            archive.writestr(info, members[name])
        archive.comment = b"0" * _COMMENT_BYTES
    body = stream.getvalue()[:-_COMMENT_BYTES]
    return body + _digest(body).encode()


def _open(data: bytes, where: str) -> dict[str, bytes]:
    """The members of the archive, every hash checked."""
    if not data.startswith(b"PK\x03\x04"):
        raise InputError(f"{where}: is not a plan; give a file that dsv3c compile wrote")
    truncated = InputError(f"{where}: is truncated: its end is missing; copy it again or compile the model again")
    altered = InputError(f"{where}: was altered: its contents do not match its hash; compile the model again")
    end = data.rfind(b"PK\x05\x06")
    whole = end + _END_BYTES + _COMMENT_BYTES
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            if "manifest.json" not in names:
                raise InputError(f"{where}: is a zip archive but not a plan; give a file that dsv3c compile wrote")
            newer = _newer(archive)
            if newer is not None:
                raise InputError(
                    f"{where}: has plan format {newer}, this dsv3c reads up to {FORMAT}; update dsv3c or compile again"
                )
            if len(data) < whole:
                raise truncated
            if len(data) > whole or _digest(data[:-_COMMENT_BYTES]).encode() != data[-_COMMENT_BYTES:]:
                raise altered
            members = {name: archive.read(name) for name in names}
    except zipfile.BadZipFile:
        raise (truncated if end < 0 or len(data) < whole else altered) from None
    except (OSError, ValueError, NotImplementedError, EOFError, RuntimeError):
        raise altered from None
    try:
        hashes = json.loads(members["manifest.json"])["members"]
    except (ValueError, KeyError, TypeError):
        raise altered from None
    if hashes != {name: _digest(body) for name, body in members.items() if name != "manifest.json"}:
        raise altered
    return members


def _newer(archive: zipfile.ZipFile) -> int | None:
    """The format of an archive if it is newer than this program; None also if that cannot be read."""
    try:
        number = json.loads(archive.read("manifest.json"))["format"]
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError):
        return None
    return number if isinstance(number, int) and number > FORMAT else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


# ---- members --------------------------------------------------------------------------------------------------------

_KERNEL_ID = re.compile(r"[A-Za-z0-9_-]+")


def _members(plan: Plan) -> dict[str, bytes]:
    """Every member but the manifest."""
    buffers = {"memory": {**dataclasses.asdict(plan.memory), "by_kind": dict(plan.memory.by_kind)}, **plan.buffers}
    members = {
        "config.json": _json(plan.config),
        "passes.txt": show_notes(plan.pipeline, plan.reports, plan.notes).encode(),
        "ir/program.ir": plan.ir.encode(),
        "schedule.csv": plan.schedule.encode(),
        "comm.json": _json(plan.comm),
        "buffers.json": _json(buffers),
        "weights.json": _json([dataclasses.asdict(w) for w in plan.weights]),
        "implementations.json": _json([_choice(c) for c in plan.choices]),
    }
    members |= {f"ir/{name}": text.encode() for name, text in plan.steps}
    for kernel in plan.kernels:
        if not _KERNEL_ID.fullmatch(kernel.id) or f"kernels/{kernel.id}.json" in members:
            raise ValueError(f"the kernel id {kernel.id!r} must be a file name and unique")
        head: dict[str, Json] = {
            "op": kernel.op,
            "lang": kernel.lang,
            "signature": list(kernel.signature),
            "launch": dict(kernel.launch),
            "files": [f.suffix for f in kernel.files],
        }
        members[f"kernels/{kernel.id}.json"] = _json(head)
        members |= {f"kernels/{kernel.id}.{f.suffix}": f.data for f in kernel.files}
    return members


def _choice(c: Choice) -> dict[str, Json]:
    return {**dataclasses.asdict(c.product), "implementation": c.implementation, "kernel": c.kernel, "reason": c.reason}


def _read_choice(line: dict[str, object]) -> Choice:
    words = [str(line.pop(name)) for name in ("implementation", "kernel", "reason")]
    return Choice(Product(**line), *words)  # type: ignore[arg-type]


def _decode(members: Mapping[str, bytes]) -> Plan:
    manifest = json.loads(members["manifest.json"])
    job = manifest["job"]
    buffers = json.loads(members["buffers.json"])
    memory = buffers.pop("memory")
    pipeline, reports, notes = read_notes(members["passes.txt"].decode())
    return Plan(
        model=manifest["model"],
        config=json.loads(members["config.json"]),
        parameters=Parameters(**manifest["parameters"]),
        job=Job(**{**job, "mesh": Mesh(**job["mesh"]), "recipe": Recipe(**job["recipe"])}),
        ir=members["ir/program.ir"].decode(),
        pipeline=pipeline,
        notes=notes,
        reports=reports,
        weights=tuple(StoredWeight(**{**w, "shape": tuple(w["shape"])}) for w in json.loads(members["weights.json"])),
        memory=Memory(
            memory["peak_bytes"],
            tuple((kind, memory["by_kind"][kind]) for kind in MEMORY_KINDS),
            tuple(memory["per_rank"]),
            memory["limit_bytes"],
            memory["with_headroom_bytes"],
        ),
        kernels=tuple(
            _kernel(name.removeprefix("kernels/").removesuffix(".json"), members)
            for name in sorted(members)
            if re.fullmatch(r"kernels/[^.]+\.json", name)
        ),
        missing_kernels=tuple(manifest["missing_kernels"]),
        buffers=buffers,
        comm=json.loads(members["comm.json"]),
        schedule=members["schedule.csv"].decode(),
        steps=tuple(
            (name.removeprefix("ir/"), members[name].decode())
            for name in sorted(members)
            if re.fullmatch(r"ir/\d\d+-.+\.ir", name)
        ),
        choices=tuple(map(_read_choice, json.loads(members["implementations.json"]))),
        measured=manifest["measured"],
        version=manifest["dsv3c"],
    )


def _kernel(id: str, members: Mapping[str, bytes]) -> Kernel:
    head = json.loads(members[f"kernels/{id}.json"])
    files = tuple(KernelFile(suffix, members[f"kernels/{id}.{suffix}"]) for suffix in head["files"])
    return Kernel(id, head["op"], head["lang"], tuple(head["signature"]), files, tuple(sorted(head["launch"].items())))


# ---- reading a plan -------------------------------------------------------------------------------------------------


def graph_sizes(ir: str) -> dict[str, int]:
    """Number of nodes of each graph in a program's text, without checking types."""
    return {
        f.name: sum(isinstance(s, ast.Assign) for s in f.body)
        for f in ast.parse(ir).body
        if isinstance(f, ast.FunctionDef)
    }


def summary(plan: Plan) -> dict[str, Json]:
    """What `dsv3c inspect --json` prints."""
    job, memory = plan.job, plan.memory
    return {
        "dsv3c": plan.version,
        "model": {
            "name": plan.model,
            "params_total": plan.parameters.total,
            "params_active": plan.parameters.active,
            "params_mtp": plan.parameters.mtp,
        },
        "target": plan.target,
        "job": job.kind,
        "precision": job.precision,
        "seq": job.seq,
        "micro_batch": job.micro_batch,
        "global_batch": job.global_batch,
        "mesh": dataclasses.asdict(job.mesh),
        "ranks": job.mesh.world,
        "pipeline": plan.pipeline,
        "passes": [r.name for r in plan.reports],
        "notes": [{"pass": n.pass_name, "action": n.action, "node": n.node, "reason": n.reason} for n in plan.notes],
        "kernels": [{"id": k.id, "op": k.op, "lang": k.lang, "has_binary": k.has_binary} for k in plan.kernels],
        "missing_kernels": list(plan.missing_kernels),
        "implementations": [_choice(c) for c in plan.choices],
        "measured": plan.measured,
        "memory": {
            "peak_bytes": memory.peak_bytes,
            "limit_bytes": memory.limit_bytes,
            "fits": memory.fits,
            "with_headroom_bytes": memory.with_headroom_bytes,
            "by_kind": dict(memory.by_kind),
            "per_rank": list(memory.per_rank),
        },
        "weights": len(plan.weights),
        "graphs": [{"name": name, "nodes": nodes} for name, nodes in graph_sizes(plan.ir).items()],
        "steps": [name for name, _ in plan.steps],
    }
