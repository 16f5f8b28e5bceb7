"""The pipeline: its text, options, verification, notes, dumps, stopping and resuming."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from dsv3c.errors import InputError, WorkError
from dsv3c.ir import Graph, IRError, Node, Program, Value
from dsv3c.ops import REGISTRY
from dsv3c.pipeline import parse, run, show, text_state
from dsv3c.state import Note, Pass, PassReport, State, TakeNote, check_pass
from dsv3c.text import parse_program, show_program
from dsv3c.verify import verify_program

TEXT = """\
def block(x: f64[B, 4], *, w: f64[4]):
    y = rms_norm(x, w, eps=1e-06)  # f64[B, 4] @F:block.norm
    unused = rms_norm(y, w, eps=1e-06)
    return y
"""


@dataclass(frozen=True)
class Drop(Pass):
    """Remove what is never read.

    More words.
    """

    name: ClassVar[str] = "drop"
    keep: int = 0
    ratio: float = 0.5
    loud: bool = False
    mode: Literal["fast", "safe"] = "fast"
    price: float | None = None
    label: str = "a"

    def run(self, state: State, note: TakeNote) -> State:
        graphs = []
        for graph in state.program.graphs:
            results = {v.name for v in graph.results}
            dead = [n for n in graph.nodes if not any(graph.users[o.name] or o.name in results for o in n.outputs)]
            for n in dead[self.keep :]:
                note("removed", n.path or graph.name, "nobody reads it")
            left = tuple(n for n in graph.nodes if n not in dead[self.keep :])
            graphs.append(graph if len(left) == len(graph.nodes) else graph.but(nodes=left))
        return state.with_program(state.program.with_graphs(tuple(graphs)))


@dataclass(frozen=True)
class Break(Pass):
    """Forget the first node."""

    name: ClassVar[str] = "break_it"

    def run(self, state: State, note: TakeNote) -> State:
        return state.with_program(
            state.program.with_graphs(tuple(g.but(nodes=g.nodes[1:]) for g in state.program.graphs))
        )


@dataclass(frozen=True)
class Refuse(Pass):
    """Refuse everything."""

    name: ClassVar[str] = "refuse"

    def run(self, state: State, note: TakeNote) -> State:
        raise IRError("block: cannot do this")


PASSES: dict[str, type[Pass]] = {p.name: p for p in (Drop, Break, Refuse)}


def state() -> State:
    return text_state(TEXT, REGISTRY)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("drop", (Drop(),)),
        (" drop , refuse ", (Drop(), Refuse())),
        ("drop{}", (Drop(),)),
        ("drop{keep=3,ratio=2}", (Drop(keep=3, ratio=2.0),)),
        ("drop{ loud = true , mode=safe },break_it", (Drop(loud=True, mode="safe"), Break())),
        ("drop{price=1e-9},drop{price=none}", (Drop(price=1e-9), Drop())),
        ('drop{label="x, {y}=1"}', (Drop(label="x, {y}=1"),)),
        ("drop{label=a/b.c,keep=1_000}", (Drop(label="a/b.c", keep=1000),)),
    ],
)
def test_parse_and_show_agree(text: str, expected: tuple[Pass, ...]) -> None:
    assert parse(text, PASSES) == expected
    assert parse(show(expected), PASSES) == expected


def test_show_is_canonical() -> None:
    assert show((Drop(price=0.5, keep=2), Refuse())) == "drop{keep=2,price=0.5},refuse"
    assert show((Drop(label="none"),)) == 'drop{label="none"}'


@pytest.mark.parametrize(
    ("text", "column", "reason"),
    [
        ("dorp", 1, "unknown pass 'dorp'; did you mean 'drop'?"),
        ("drop,zzz", 6, "unknown pass 'zzz'; known: break_it, drop, refuse"),
        ("drop{rate=1}", 6, "the pass 'drop' has no option 'rate'; did you mean 'ratio'?"),
        ("refuse{k=1}", 8, "the pass 'refuse' has no option 'k'; it has none"),
        ("drop{keep=x}", 11, "drop: keep must be a whole number, not x"),
        ("drop{keep=1.5}", 11, "keep must be a whole number"),
        ("drop{ratio=much}", 12, "ratio must be a number"),
        ("drop{loud=1}", 11, "loud must be true or false"),
        ("drop{mode=slow}", 11, "mode must be one of fast, safe"),
        ("drop{price=cheap}", 12, "price must be a number or none"),
        ("drop{keep=1,keep=2}", 13, "the option 'keep' is given twice"),
        ("drop{keep}", 10, "expected '=' and a value for 'keep'"),
        ("drop{keep=1", 12, "expected ',' or '}'"),
        ("drop drop", 6, "expected ',' between two passes"),
        ("drop,", 6, "expected the name of a pass"),
        ("drop{keep=", 11, "expected a value"),
    ],
)
def test_errors_of_a_pipeline_show_the_place(text: str, column: int, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text, PASSES)
    message = str(caught.value)
    assert message.startswith(f"pipeline, character {column}: ")
    assert reason in message
    assert message.splitlines()[-2:] == [f"  {text}", "  " + " " * (column - 1) + "^"]


def test_run_gives_notes_and_reports_and_leaves_the_input_alone() -> None:
    start = state()
    seen: list[tuple[PassReport, tuple[Note, ...]]] = []
    outcome = run(start, parse("drop,drop", PASSES), on_pass=lambda report, notes: seen.append((report, notes)))
    assert [n.op for n in outcome.state.program.graph("block").nodes] == ["rms_norm"]
    assert show_program(start.program) == show_program(parse_program(TEXT, REGISTRY))
    assert outcome.notes == (Note("drop", "removed", "block", "nobody reads it"),)
    first, second = outcome.reports
    assert (first.nodes_before, first.nodes_after, first.changed, first.notes) == (2, 1, ("block",), 1)
    assert (second.nodes_before, second.nodes_after, second.changed, second.notes) == (1, 1, (), 0)
    assert [r for r, _ in seen] == [first, second]
    assert seen[0][1] == outcome.notes
    assert "block" in str(first) and "nothing changed" in str(second)


def test_an_invalid_result_names_the_pass_and_is_still_dumped(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"the pass 'break_it' made an invalid program.*'y' is not defined"):
        run(state(), parse("break_it", PASSES), dump=tmp_path)
    assert (tmp_path / "01-break_it.ir").exists()


def test_a_refusal_names_the_pass() -> None:
    with pytest.raises(InputError, match="the pass 'refuse': block: cannot do this"):
        run(state(), parse("refuse", PASSES))


def test_only_changed_graphs_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    real = verify_program

    def spy(program: Program, registry: Any, before: Program | None = None) -> None:
        assert before is not None
        calls.append(tuple(g.name for g in program.graphs if all(g is not b for b in before.graphs)))
        real(program, registry, before)

    monkeypatch.setattr("dsv3c.pipeline.verify_program", spy)
    clean = TEXT.replace("block", "clean").replace("    unused = rms_norm(y, w, eps=1e-06)\n", "")
    run(text_state(f"{TEXT}\n{clean}", REGISTRY), parse("drop,drop", PASSES))
    assert calls == [("block",)]


def test_dumps_are_numbered_and_any_of_them_resumes(tmp_path: Path) -> None:
    passes = parse("drop,drop{keep=1},drop", PASSES)
    whole = run(state(), passes, dump=tmp_path, keep_steps=True)
    names = ["00-input.ir", "01-drop.ir", "02-drop.ir", "03-drop.ir"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert whole.steps == tuple((n, (tmp_path / n).read_text()) for n in names)
    for index, name in enumerate(names):
        resumed = text_state((tmp_path / name).read_text(), REGISTRY)
        rest = run(resumed, passes[index:])
        assert show_program(rest.state.program) == show_program(whole.state.program)


def test_stop_after_and_print_after() -> None:
    printed: list[str] = []
    outcome = run(state(), parse("drop,refuse", PASSES), stop_after="drop", print_after="drop", out=printed.append)
    assert len(outcome.reports) == 1
    assert printed == ["# after drop\n" + show_program(outcome.state.program)]
    assert parse_program(printed[0], REGISTRY)
    run(state(), parse("drop,drop{keep=1}", PASSES), print_after="all", out=printed.append)
    assert [p.splitlines()[0] for p in printed[1:]] == ["# after drop", "# after drop{keep=1}"]
    with pytest.raises(InputError, match="--stop-after dorp: the pipeline has no such pass; did you mean 'drop'"):
        run(state(), parse("drop", PASSES), stop_after="dorp")
    with pytest.raises(InputError, match="--stop-after all"):
        run(state(), parse("drop", PASSES), stop_after="all")


def test_a_dump_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkError, match=r"00-input[.]ir: cannot be written"):
        run(state(), parse("drop", PASSES), dump=tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_sizes_given_by_hand_win() -> None:
    assert text_state(TEXT, REGISTRY, sizes={"B": 3}).sizes == {"B": 3}
    assert state().sizes == {} and state().machine is None and state().mesh.world == 1


def test_the_rules_of_a_pass_are_checked() -> None:
    assert check_pass(Drop) is Drop and Drop.help() == "Remove what is never read."

    class Bare(Pass):
        name = "bare"

        def run(self, state: State, note: TakeNote) -> State:
            return state

    @dataclass(frozen=True)
    class Wordless(Pass):
        name: ClassVar[str] = "wordless"

        def run(self, state: State, note: TakeNote) -> State:
            return state

    @dataclass(frozen=True)
    class Demanding(Drop):
        """Wants an option."""

        name: ClassVar[str] = "De manding"

    for kind, rule in ((Bare, "frozen dataclass"), (Wordless, "docstring"), (Demanding, "lower-case name")):
        with pytest.raises(IRError, match=rule):
            check_pass(kind)


def test_registering_refuses_a_second_pass_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv3c import passes

    monkeypatch.setattr(passes, "_passes", {})
    passes.register(Drop)
    passes.register(Drop)
    other = type("Other", (Drop,), {"__doc__": "x", "__dataclass_params__": Drop.__dataclass_params__})  # type: ignore[attr-defined]
    with pytest.raises(IRError, match="'drop' is registered twice"):
        passes.register(other)


def test_every_pass_of_the_package_keeps_the_rules() -> None:
    from dsv3c.passes import PASSES as known

    for name, kind in known.items():
        assert check_pass(kind) is kind and kind.name == name
        assert parse(name) == (kind(),)
        assert kind.help().endswith(".")


def test_values_shared_by_graphs_are_untouched() -> None:
    """A pass that makes a value's type wrong is caught although every name resolves."""

    @dataclass(frozen=True)
    class Retype(Pass):
        """Declare a wrong type."""

        name: ClassVar[str] = "retype"

        def run(self, state: State, note: TakeNote) -> State:
            (graph,) = state.program.graphs
            node: Node = graph.nodes[0]
            wrong = Value(node.output.name, graph.weights[0].type)
            changed: Graph = graph.but(nodes=(replace(node, outputs=(wrong,)), *graph.nodes[1:]))
            return state.with_program(state.program.with_graphs((changed,)))

    with pytest.raises(WorkError, match=r"'retype' made an invalid program.*declared as f64\[4\]"):
        run(state(), (Retype(),))
