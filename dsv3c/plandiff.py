"""What differs between two plans, by area and name, for people and as data."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from dsv3c.plan import Json, Plan, graph_sizes

ABSENT = "absent"
CONTEXT = 1
SHOWN_LINES = 40


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that differs: where (`config`, `graphs`, ...), its name, both sides in words, and lines of detail."""

    area: str
    name: str
    first: str
    second: str
    detail: tuple[str, ...] = ()

    def __str__(self) -> str:
        title = f"{self.area}.{self.name}" if self.name else self.area
        return "\n".join([f"{title}: {self.first} -> {self.second}", *(f"    {line}" for line in self.detail)])


def diff(a: Plan, b: Plan) -> tuple[Difference, ...]:
    """Every difference between two plans, in a fixed order."""
    found = [
        *_fields("dsv3c", {"version": a.version}, {"version": b.version}),
        *_fields("model", {"name": a.model}, {"name": b.model}),
        *_fields("model", dataclasses.asdict(a.parameters), dataclasses.asdict(b.parameters)),
        *_fields("config", a.config, b.config),
        *_fields("job", _flat(dataclasses.asdict(a.job)), _flat(dataclasses.asdict(b.job))),
        *_fields("passes", {"pipeline": a.pipeline}, {"pipeline": b.pipeline}),
        *_fields("passes", _reports(a), _reports(b)),
        *_lines("notes", "", [*map(str, a.notes)], [*map(str, b.notes)], "notes"),
        *_graphs(a, b),
        *_kernels(a, b),
        *_fields("missing_kernels", dict.fromkeys(a.missing_kernels, "missing"),
                 dict.fromkeys(b.missing_kernels, "missing")),
        *_fields("implementations", {"measured": a.measured}, {"measured": b.measured}),
        *_fields("implementations", *({str(c.product): c.implementation for c in p.choices} for p in (a, b))),
        *_fields("memory", _flat(dataclasses.asdict(a.memory) | {"by_kind": dict(a.memory.by_kind)}),
                 _flat(dataclasses.asdict(b.memory) | {"by_kind": dict(b.memory.by_kind)})),
        *_fields("weights", {w.name: f"{w.dtype}{list(w.shape)} {w.shard}" for w in a.weights},
                 {w.name: f"{w.dtype}{list(w.shape)} {w.shard}" for w in b.weights}),
        *_fields("buffers", a.buffers, b.buffers),
        *_fields("comm", a.comm, b.comm),
        *_lines("schedule", "", a.schedule.splitlines(), b.schedule.splitlines(), "ranks"),
        *_fields("steps", {n: _count(t) for n, t in a.steps}, {n: _count(t) for n, t in b.steps}),
    ]  # fmt: skip
    return tuple(found)


def _fields(area: str, a: Mapping[str, object], b: Mapping[str, object]) -> list[Difference]:
    names = [*a, *(n for n in b if n not in a)]
    return [
        Difference(area, n, _word(a, n), _word(b, n)) for n in names if (n in a) != (n in b) or a.get(n) != b.get(n)
    ]


def _word(mapping: Mapping[str, object], name: str) -> str:
    if name not in mapping:
        return ABSENT
    text = str(mapping[name])
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _flat(record: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in record.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _reports(plan: Plan) -> dict[str, object]:
    return {
        f"{i:02d}-{r.name}": f"{r.nodes_before} -> {r.nodes_after} nodes, changed {' '.join(r.changed) or 'nothing'}"
        for i, r in enumerate(plan.reports, 1)
    }


def _count(text: str) -> str:
    return f"{sum(graph_sizes(text).values())} nodes, hash {hash_of(text)}"


def hash_of(text: str | bytes) -> str:
    """The first 12 hexadecimal digits of a SHA-256."""
    return hashlib.sha256(text if isinstance(text, bytes) else text.encode()).hexdigest()[:12]


def _graphs(a: Plan, b: Plan) -> list[Difference]:
    if a.ir == b.ir:
        return []
    first, second = _parts(a.ir), _parts(b.ir)
    graphs = {**graph_sizes(a.ir), **graph_sizes(b.ir)}
    found: list[Difference] = []
    for name in [*first, *(n for n in second if n not in first)]:
        left, right = first.get(name, []), second.get(name, [])
        found += _lines("graphs" if name in graphs else "program", name, left, right, "lines")
    return found


def _parts(ir: str) -> dict[str, list[str]]:
    """The lines of each graph, and of each other statement under the name it assigns."""
    lines, parts = ir.splitlines(), {}
    for statement in ast.parse(ir).body:
        name = statement.name if isinstance(statement, ast.FunctionDef) else ast.unparse(statement).split(" =")[0]
        parts[name] = lines[statement.lineno - 1 : statement.end_lineno]
    return parts


def _lines(area: str, name: str, a: list[str], b: list[str], unit: str) -> list[Difference]:
    if a == b:
        return []
    changes = list(difflib.unified_diff(a, b, lineterm="", n=CONTEXT))[2:]
    added = sum(line.startswith("+") for line in changes)
    removed = sum(line.startswith("-") for line in changes)
    detail = changes[:SHOWN_LINES]
    if len(changes) > SHOWN_LINES:
        detail.append(f"... and {len(changes) - SHOWN_LINES} more lines")
    words = [f"{len(side)} {unit}" if side else ABSENT for side in (a, b)]
    return [Difference(area, name, words[0], f"{words[1]} (+{added} -{removed})", tuple(detail))]


def _kernels(a: Plan, b: Plan) -> list[Difference]:
    def described(plan: Plan) -> dict[str, object]:
        return {
            k.id: f"{k.op} in {k.lang}, " + ", ".join(f"{f.suffix} {hash_of(f.data)}" for f in k.files)
            + f", {', '.join(k.signature)}, {dict(sorted(k.launch))}"
            for k in plan.kernels
        }  # fmt: skip

    return _fields("kernels", described(a), described(b))


def as_json(differences: tuple[Difference, ...]) -> list[Json]:
    """The differences as data."""
    return [
        {"area": d.area, "name": d.name, "first": d.first, "second": d.second, "detail": list(d.detail)}
        for d in differences
    ]
