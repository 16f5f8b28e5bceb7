"""passes.txt of a plan: the pipeline, what each pass changed, and every note, for people and for `read_notes`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dsv3c.state import Note, PassReport

_REPORT = re.compile(
    r"pass (?P<name>\S+) nodes (?P<before>\d+) -> (?P<after>\d+) notes (?P<notes>\d+)"
    r" changed \[(?P<changed>[^\]]*)\] removed \[(?P<removed>[^\]]*)\]"
)
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_RAW = {v: k for k, v in _ESCAPES.items()}


def show_notes(pipeline: str, reports: Sequence[PassReport], notes: Sequence[Note]) -> str:
    """The text of passes.txt: the pipeline, a line per pass, then a line per note, its fields tab-separated."""
    lines = [f"pipeline {pipeline}"]
    for r in reports:
        lists = f"changed [{' '.join(r.changed)}] removed [{' '.join(r.removed)}]"
        lines.append(f"pass {r.name} nodes {r.nodes_before} -> {r.nodes_after} notes {r.notes} {lists}")
    lines += ["\t".join(map(_escape, (n.pass_name, n.action, n.node, n.reason))) for n in notes]
    return "\n".join(lines) + "\n"


def read_notes(text: str) -> tuple[str, tuple[PassReport, ...], tuple[Note, ...]]:
    """What `show_notes` was given, without times. Raises ValueError for another text."""
    first, *rest = text.removesuffix("\n").split("\n")
    if not first.startswith("pipeline "):
        raise ValueError("passes.txt does not start with the pipeline")
    reports: list[PassReport] = []
    notes: list[Note] = []
    for line in rest:
        if "\t" in line:
            name, action, node, reason = map(_unescape, line.split("\t"))
            notes.append(Note(name, action, node, reason))
        elif found := _REPORT.fullmatch(line):
            counts = int(found["before"]), int(found["after"])
            lists = tuple(found["changed"].split()), tuple(found["removed"].split())
            reports.append(PassReport(found["name"], *counts, *lists, int(found["notes"])))
        else:
            raise ValueError(f"passes.txt has the line {line!r}")
    return first.removeprefix("pipeline "), tuple(reports), tuple(notes)


def _escape(text: str) -> str:
    return re.sub(r"[\\\t\n\r]", lambda m: _ESCAPES[m.group()], text)


def _unescape(text: str) -> str:
    return re.sub(r"\\[\\tnr]", lambda m: _RAW[m.group()], text)
