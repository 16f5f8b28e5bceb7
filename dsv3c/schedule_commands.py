"""`dsv3c schedule`: make a pipeline schedule or read one, check it, run it on paper, and draw it."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace

from dsv3c.console import table, tell, write_json
from dsv3c.errors import InputError, did_you_mean
from dsv3c.files import read_text, write_text
from dsv3c.picture import svg_picture, text_picture
from dsv3c.schedule import Schedule, parse_csv, show_csv
from dsv3c.schedules import (
    AUTO,
    KINDS,
    Candidate,
    Durations,
    Occupancy,
    Timeline,
    Times,
    choose,
    equal_stages,
    find,
    generate,
    simulate,
    verify,
)

WIDTH = 120
"""Columns of a picture that does not go to a terminal."""


def schedule(a: argparse.Namespace) -> int:
    """`dsv3c schedule`: a picture and the figures of one schedule; with `auto` also those of the others."""
    times, pair = parse_times(a.times or "")

    def durations(stages: int) -> Durations:
        return equal_stages(stages, times, pair, a.transfer)

    made, timeline, candidates = _made(a, durations)
    held = verify(made)
    if a.csv is not None:
        write_text(a.csv, show_csv(made))
    if a.svg is not None:
        title = f"{made.kind}: {made.ranks} ranks, {made.micro_batches} micro-batches"
        write_text(a.svg, svg_picture(made, timeline, title))
    if a.json:
        write_json(_summary(made, timeline, held, candidates))
        return 0
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((WIDTH, 24)).columns if terminal else WIDTH
    print(text_picture(made, timeline, width, colour=terminal and "NO_COLOR" not in os.environ))
    print()
    print(_figures(made, timeline, held))
    if candidates:
        print()
        print(_comparison(candidates, made.kind))
    for path in filter(None, (a.csv, a.svg)):
        tell(f"wrote {path}")
    return 0


def _made(a: argparse.Namespace,
          durations: Callable[[int], Durations]) -> tuple[Schedule, Timeline, tuple[Candidate, ...]]:  # fmt: skip
    """The schedule that the flags ask for, its timeline, and with `auto` what it was chosen from."""
    if a.kind != AUTO and a.kind not in KINDS:
        raise InputError(f"schedule {a.kind}: there is no such kind; {did_you_mean(a.kind, [AUTO, *KINDS])}")
    if a.read is not None:
        if a.kind == AUTO or a.pp is not None or a.micro_batches is not None:
            raise InputError(
                "--read takes ranks and micro-batches from the file; give its kind, and leave out the rest"
            )
        made = parse_csv(read_text(a.read, "a schedule"), a.kind, a.read)
        verify(made)
        return made, simulate(made, durations(made.stages)), ()
    for flag, value in (("--pp", a.pp), ("--micro-batches", a.micro_batches)):
        if value is None:
            raise InputError(f"schedule {a.kind}: {flag} is missing; write for example --pp 8 --micro-batches 20")
    if a.kind == AUTO:
        # The times are those of a whole rank, so a kind that gives a rank two stages has half of them in each.
        choice = choose(a.pp, a.micro_batches, lambda stages: _scaled(durations(stages), a.pp / stages))
        return choice.schedule, choice.timeline, choice.candidates
    made = generate(find(a.kind).name, a.pp, a.micro_batches)
    return made, simulate(made, durations(made.stages)), ()


def _scaled(d: Durations, by: float) -> Durations:
    stages = tuple(Times(t.F * by, t.I * by, t.W * by, t.B * by) for t in d.stages)
    return replace(d, stages=stages, pairs=tuple(tuple(x * by for x in row) for row in d.pairs))


def parse_times(text: str) -> tuple[Times, float | None]:
    """`F=1,I=1,W=1,B=2,FB=3` as times of a stage and that of an overlapped pair; omitted F, I and W are 1, omitted B
    is I + W, omitted FB is F + B. Raises InputError for anything else."""
    given: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, _, value = (p.strip() for p in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if key not in ("F", "I", "W", "B", "FB") or key in given or not 0 <= number < math.inf:
            raise InputError(f"--times {text}: '{part}' is no time; write for example F=1,I=1,W=1,B=2,FB=3")
        given[key] = number
    forward, own, weight = (given.get(k, 1.0) for k in "FIW")
    return Times(forward, own, weight, given.get("B", own + weight)), given.get("FB")


def _figures(s: Schedule, t: Timeline, held: Occupancy) -> str:
    facts = [
        ("schedule", f"{s.kind}: {s.ranks} ranks, {s.stages} stages, {s.micro_batches} micro-batches"),
        ("makespan", f"{t.makespan:g}"),
        ("busy", _range(t.busy)),
        ("bubble", f"{_range(t.bubbles)}, {t.bubble_fraction:.1%} of the time"),
        ("in flight", f"{_range(held.in_flight)} chunks at most on a rank"),
        ("deferred", f"{_range(held.deferred)} weight gradients at most on a rank"),
    ]
    return table(facts)


def _range(values: tuple[float, ...]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _comparison(candidates: tuple[Candidate, ...], chosen: str) -> str:
    rows = [("kind", "makespan", "idle", "")]
    for c in candidates:
        if c.timeline is None:
            rows.append((c.kind, "", "", c.refusal or ""))
        else:
            told = c.refusal or ("chosen" if c.kind == chosen else "")
            rows.append((c.kind, f"{c.timeline.makespan:g}", f"{c.timeline.bubble_fraction:.1%}", told))
    return table(rows, right=(1, 2))


def _summary(s: Schedule, t: Timeline, held: Occupancy, candidates: tuple[Candidate, ...]) -> dict[str, object]:
    ranks = [
        {
            "rank": r,
            "stages": [*s.held(r)],
            "busy": t.busy[r],
            "bubble": t.bubbles[r],
            "peak_in_flight": held.in_flight[r],
            "deferred": held.deferred[r],
            "chunks": {str(stage): held.chunks[r, stage] for stage in s.held(r)},
        }
        for r in range(s.ranks)
    ]
    summary: dict[str, object] = {
        "kind": s.kind,
        "ranks": s.ranks,
        "stages": s.stages,
        "micro_batches": s.micro_batches,
        "makespan": t.makespan,
        "busy": max(t.busy),
        "bubble": t.bubble,
        "bubble_fraction": t.bubble_fraction,
        "peak_in_flight": max(held.in_flight),
        "deferred": max(held.deferred),
        "per_rank": ranks,
        "rows": show_csv(s).splitlines(),
    }
    if candidates:
        summary["candidates"] = [
            {
                "kind": c.kind,
                "makespan": None if c.timeline is None else c.timeline.makespan,
                "bubble_fraction": None if c.timeline is None else c.timeline.bubble_fraction,
                "refusal": c.refusal,
            }
            for c in candidates
        ]
    return summary
