"""Run passes in order: read `a,b{k=1}`, verify after each, take notes, number the dumps, stop where asked."""

from __future__ import annotations

import dataclasses
import json
import re
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeAlias

from dsv3c.errors import InputError, WorkError, did_you_mean
from dsv3c.files import write_text
from dsv3c.ir import IRError, Program
from dsv3c.job import Job
from dsv3c.op import Registry
from dsv3c.state import Note, Pass, PassReport, State, TakeNote
from dsv3c.target import Target
from dsv3c.text import parse_program, show_program
from dsv3c.verify import verify_program

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_BARE = re.compile(r"[^,{}=\s\"']+")
_BARE_STRING = re.compile(r"[A-Za-z_][A-Za-z0-9_./:-]*")
_WORDS: Mapping[str, bool] = {"true": True, "false": False}

Settle: TypeAlias = Callable[[Pass, State, tuple[Pass, ...], TakeNote], Pass]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The state after the last pass, every pass's notes in order, and one report per pass.

    `steps` holds (dump name, text) before the first and after each pass if it was asked for. `passes` are all that
    were given, with the options that those run were settled on.
    """

    state: State
    notes: tuple[Note, ...]
    reports: tuple[PassReport, ...]
    steps: tuple[tuple[str, str], ...] = ()
    passes: tuple[Pass, ...] = ()


# ---- text -> passes -----------------------------------------------------------------------------------------------


def parse(text: str, passes: Mapping[str, type[Pass]] | None = None) -> tuple[Pass, ...]:
    """The passes that `a,b{k=1,flag=true}` names, with their options; `passes` are those known, by default all.

    Options are read as the types their fields have; a string is bare or in double quotes, `none` is None.
    Raises InputError with a caret for an unknown pass or option (and the nearest name), or a value of a wrong type.
    """
    return _PipelineText(text, _known(passes)).all()


def _known(passes: Mapping[str, type[Pass]] | None) -> Mapping[str, type[Pass]]:
    if passes is not None:
        return passes
    from dsv3c.passes import PASSES

    return PASSES


class _PipelineText:
    def __init__(self, text: str, passes: Mapping[str, type[Pass]]) -> None:
        self.text, self.passes, self.at = text, passes, 0

    def fail(self, reason: str, at: int | None = None) -> NoReturn:
        column = self.at if at is None else at
        raise InputError(f"pipeline, character {column + 1}: {reason}\n  {self.text}\n  {' ' * column}^")

    def take(self, literal: str) -> bool:
        self.skip()
        found = self.text.startswith(literal, self.at)
        self.at += len(literal) if found else 0
        return found

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def match(self, pattern: re.Pattern[str], expected: str) -> str:
        self.skip()
        found = pattern.match(self.text, self.at)
        if found is None:
            self.fail(f"expected {expected}")
        self.at = found.end()
        return found.group()

    def all(self) -> tuple[Pass, ...]:
        result: list[Pass] = []
        self.skip()
        while self.at < len(self.text):
            if result and not self.take(","):
                self.fail("expected ',' between two passes")
            result.append(self.one())
            self.skip()
        return tuple(result)

    def one(self) -> Pass:
        name = self.match(_NAME, "the name of a pass")
        start = self.at - len(name)
        if name not in self.passes:
            self.fail(f"unknown pass '{name}'; {did_you_mean(name, self.passes)}", start)
        kind = self.passes[name]
        options: dict[str, object] = {}
        if self.take("{") and not self.take("}"):
            self.option(kind, options)
            while self.take(","):
                self.option(kind, options)
            if not self.take("}"):
                self.fail("expected ',' or '}'")
        try:
            return kind(**options)
        except InputError as error:
            self.fail(str(error), start)

    def option(self, kind: type[Pass], options: dict[str, object]) -> None:
        known = option_types(kind)
        name = self.match(_NAME, "the name of an option")
        start = self.at - len(name)
        if name not in known:
            hint = did_you_mean(name, known) if known else "it has none"
            self.fail(f"the pass '{kind.name}' has no option '{name}'; {hint}", start)
        if name in options:
            self.fail(f"the option '{name}' is given twice", start)
        if not self.take("="):
            self.fail(f"expected '=' and a value for '{name}'")
        self.skip()
        start = self.at
        quoted = self.text.startswith('"', self.at)
        word = self.match(_QUOTED if quoted else _BARE, "a value")
        try:
            options[name] = read_option(word, known[name])
        except ValueError as error:
            self.fail(f"{kind.name}: {name} must be {error}, not {word}", start)


def option_types(kind: type[Pass]) -> dict[str, object]:
    """The type of each option of a pass, by name, in order."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]


def read_option(word: str, kind: object) -> object:
    """The value that `word` denotes for an option of type `kind`. Raises ValueError saying what is expected."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = typing.get_args(kind)
        if type(None) in members and word.lower() == "none":
            return None
        reasons = []
        for member in members:
            if member is not type(None):
                try:
                    return read_option(word, member)
                except ValueError as error:
                    reasons.append(str(error))
        raise ValueError(" or ".join([*reasons, "none"] if type(None) in members else reasons))
    if kind is bool:
        if word.lower() not in _WORDS:
            raise ValueError("true or false")
        return _WORDS[word.lower()]
    if kind is int or kind is float:
        try:
            return int(word.replace("_", "")) if kind is int else float(word)
        except ValueError:
            raise ValueError("a whole number" if kind is int else "a number") from None
    string = _unquote(word)
    if typing.get_origin(kind) is typing.Literal and string not in typing.get_args(kind):
        raise ValueError("one of " + ", ".join(map(str, typing.get_args(kind))))
    return string


def _unquote(word: str) -> str:
    return str(json.loads(word)) if word.startswith('"') else word


def show(passes: Sequence[Pass]) -> str:
    """The canonical text of a pipeline: options that differ from their defaults, in the order of the fields."""
    return ",".join(map(show_pass, passes))


def show_pass(one: Pass) -> str:
    """The text of one pass with the options that differ from their defaults; `parse` reads it back."""
    default = type(one)()
    changed = [n for n in option_types(type(one)) if getattr(one, n) != getattr(default, n)]
    options = ",".join(f"{n}={_show_value(getattr(one, n))}" for n in changed)
    return one.name + (f"{{{options}}}" if options else "")


def _show_value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and (not _BARE_STRING.fullmatch(value) or value.lower() == "none"):
        return json.dumps(value)
    return str(value)


# ---- running ------------------------------------------------------------------------------------------------------


def parse_sizes(text: str) -> dict[str, int]:
    """`B=2,S=8` as a mapping. Raises InputError for what is no such list."""
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = (p.strip() for p in part.partition("="))
        if not name.isidentifier() or not value.isdecimal() or int(value) < 1 or name in sizes:
            raise InputError(f"sizes '{text}': '{part}' is not a symbol's value; write for example B=2,S=8")
        sizes[name] = int(value)
    return sizes


def text_state(text: str, registry: Registry, *, file: str = "<text>", target: Target | None = None,
               precision: str | None = None, sizes: Mapping[str, int] | None = None) -> State:  # fmt: skip
    """The state that a program's text stands for, for example a dump.

    With a `target` there is a training job on it, one micro-batch of `sizes` B sequences of S tokens (default 1),
    in `precision` or the target's own. All `sizes` bind symbols. Raises IRError with a caret for a wrong text.
    """
    program = parse_program(text, registry, file)
    known = dict(sizes or {})
    job = None
    if target is not None:
        batch = known.get("B", 1)
        job = Job("train", target.name, precision or target.precision, known.get("S", 1), batch, batch)
    return State(program, registry, job, target, tuple(sorted(known.items())))


def run(state: State, passes: Sequence[Pass], *, dump: Path | None = None, print_after: str | None = None,
        stop_after: str | None = None, keep_steps: bool = False, out: Callable[[str], None] = print,
        on_pass: Callable[[PassReport, tuple[Note, ...]], None] | None = None,
        settle: Settle | None = None) -> Outcome:  # fmt: skip
    """Apply `passes` to `state` in order and verify after each the graphs that it changed.

    dump         a folder that gets 00-input.ir and NN-NAME.ir after each pass; any of them can be fed in again
    print_after  the name of a pass, or `all`: hand its result as text to `out`
    stop_after   the name of a pass: leave out those behind it
    keep_steps   give the texts of all steps in the outcome
    on_pass      called after each pass with its report and its notes
    settle       called before each pass with it, the state, the passes behind it and its `note`: gives the pass to
                 run instead, with options decided that were left open

    Raises WorkError naming the pass if its result breaks a rule of the IR; InputError if a pass refuses its input,
    or for a name in `print_after` or `stop_after` that the pipeline lacks.
    """
    whole, passes = tuple(passes), list(passes)
    names = [p.name for p in passes]
    for flag, name in (("--print-after", print_after), ("--stop-after", stop_after)):
        if name is not None and name not in names and not (flag == "--print-after" and name == "all"):
            hint = did_you_mean(name, names) if names else "it is empty"
            raise InputError(f"{flag} {name}: the pipeline has no such pass; {hint}")
    if stop_after is not None:
        passes = passes[: names.index(stop_after) + 1]
    notes: list[Note] = []
    reports: list[PassReport] = []
    steps: list[tuple[str, str]] = []

    def keep(index: int, name: str, program: Program) -> None:
        if dump is None and not keep_steps:
            return
        step, text = f"{index:02d}-{name}.ir", show_program(program)
        if dump is not None:
            write_text(dump / step, text)
        if keep_steps:
            steps.append((step, text))

    keep(0, "input", state.program)
    for index, one in enumerate(passes, 1):
        before, first_note = state.program, len(notes)
        state, seconds, one = _apply(one, state, notes, settle, whole[index:])
        passes[index - 1] = one
        keep(index, one.name, state.program)
        if state.program is not before:
            try:
                verify_program(state.program, state.registry, before)
            except IRError as error:
                message = f"the pass '{one.name}' made an invalid program, which is a fault of the pass"
                raise WorkError(f"{message}: {error}") from None
        report = _report(one.name, seconds, before, state.program, len(notes) - first_note)
        reports.append(report)
        if on_pass is not None:
            on_pass(report, tuple(notes[first_note:]))
        if print_after in (one.name, "all"):
            out(f"# after {show_pass(one)}\n{show_program(state.program)}")
    return Outcome(state, tuple(notes), tuple(reports), tuple(steps), (*passes, *whole[len(passes) :]))


def _apply(one: Pass, state: State, notes: list[Note], settle: Settle | None,
           rest: tuple[Pass, ...]) -> tuple[State, float, Pass]:  # fmt: skip
    """The state after one pass, the seconds it took, and the pass as it was settled."""

    def note(action: str, node: str, reason: str) -> None:
        notes.append(Note(one.name, action, node, reason))

    start = time.perf_counter()
    try:
        settled = settle(one, state, rest, note) if settle else one
        result = settled.run(state, note)
    except IRError as error:
        raise IRError(f"the pass '{one.name}': {error}") from error
    return result, time.perf_counter() - start, settled


def _report(name: str, seconds: float, before: Program, after: Program, notes: int) -> PassReport:
    old = {id(g) for g in before.graphs}
    changed = tuple(g.name for g in after.graphs if id(g) not in old)
    removed = tuple(g.name for g in before.graphs if not after.has_graph(g.name))
    return PassReport(name, _nodes(before), _nodes(after), changed, removed, notes, seconds)


def _nodes(program: Program) -> int:
    return sum(len(g.nodes) for g in program.graphs)
