"""Pictures of schedules, the command that shows them, and the pass that makes schedules."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3c import cli, pipeline
from dsv3c.errors import InputError
from dsv3c.job import Job, Mesh
from dsv3c.ops import REGISTRY
from dsv3c.passes.dualpipe import DualPipe
from dsv3c.picture import svg_picture, text_picture
from dsv3c.schedule import parse_csv, show_csv
from dsv3c.schedule_commands import parse_times
from dsv3c.schedules import Times, equal_stages, generate, simulate
from dsv3c.state import State
from dsv3c.targets import find

PUBLISHED = Path(__file__).parent / "schedules" / "dualpipe_8_20.csv"
FIGURE = {  # of the DeepSeek-V3 report, figure 5, one letter a step; there B also stands for what is I here
    0: "FFFFFFFFBWFBWFBWFFBBFBBFBBFBBFBBFBBBBFBBBBFBBBBFBBBBBWBWBWBW",
    3: "FFFFFFFFFBBFBBFBBFBBFBBFBBFBBFBBFBBFBBFBBFBBBBBBBBBBBBBBWWWW",
}
MOST_LINE = 60


def drawn(kind: str, ranks: int, count: int, width: int = 100, colour: bool = False) -> str:
    schedule = generate(kind, ranks, count)
    return text_picture(schedule, simulate(schedule, equal_stages(schedule.stages)), width, colour)


# ---- text -----------------------------------------------------------------------------------------------------------


def test_text_of_a_small_schedule() -> None:
    assert drawn("1f1b", 2, 3) == (
        "rank 0  F0 F1 ......B0    F2 B1    ...B2    \n"
        "rank 1  ...F0 B0    F1 B1    F2 B2    ......"
    )  # fmt: skip


def test_text_of_pairs_shows_the_forward_first() -> None:
    assert "F3 B5" in drawn("dualpipe", 4, 8).splitlines()[0]


def test_text_has_the_letters_of_the_published_figure() -> None:
    lines = drawn("dualpipe", 8, 20, width=80).splitlines()
    for rank, letters in FIGURE.items():
        shown = lines[rank].split()[-1]
        assert len(shown) == 66
        assert shown.replace(".", "").replace("I", "B") == letters


def test_a_long_picture_goes_on_below_or_gets_coarser() -> None:
    schedule = drawn("1f1b", 4, 40, width=MOST_LINE)
    blocks = schedule.split("\n\n")
    assert len(blocks) == 3 and all(block.count("\n") == 3 for block in blocks)
    coarse = drawn("1f1b", 4, 400, width=MOST_LINE).split("\n\n")
    assert len(coarse) == 4
    for text in (schedule, *coarse):
        assert max(map(len, text.splitlines())) <= MOST_LINE


def test_colour_changes_nothing_but_colour() -> None:
    plain, coloured = drawn("zb1p", 3, 6), drawn("zb1p", 3, 6, colour=True)
    assert "\x1b[" not in plain and "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


# ---- SVG ------------------------------------------------------------------------------------------------------------


def test_svg_shows_every_cell_and_says_what_it_is() -> None:
    schedule = generate("dualpipe", 4, 8)
    text = svg_picture(schedule, simulate(schedule, equal_stages(4)), "DualPipe <8>")
    root = ElementTree.fromstring(text)
    tag = "{http://www.w3.org/2000/svg}"
    ids = {e.get("id"): e.text or "" for e in root if e.get("id")}
    assert root.get("role") == "img" and root.get("aria-labelledby") == "title about"
    assert ids["title"] == "DualPipe <8>"
    assert "4 pipeline ranks" in ids["about"] and "it takes 26" in ids["about"]
    told = [t.text for t in root.iterfind(f"{tag}rect/{tag}title")]
    assert "3I4: input gradient, stage 3, micro-batch 4, 4 to 5" in told
    pairs = sum(len(cell) == 2 for row in schedule.rows for cell in row)
    assert len(told) == pairs + sum(len(cell) for row in schedule.rows for cell in row)
    legend = {t.text for t in root.iterfind(f"{tag}text")}
    assert legend >= {"F: forward", "overlapped pair", "lighter: second direction", "idle", "rank 3"}


def test_svg_has_no_legend_for_what_does_not_occur() -> None:
    schedule = generate("1f1b", 2, 3)
    text = svg_picture(schedule, simulate(schedule, equal_stages(2)), "1F1B")
    assert "overlapped" not in text and "lighter" not in text and "I: input" not in text


def test_pictures_where_nothing_takes_time() -> None:
    schedule = generate("1f1b", 2, 2)
    timeline = simulate(schedule, equal_stages(2, Times(0, 0, 0, 0)))
    assert text_picture(schedule, timeline).count("\n") == 1
    ElementTree.fromstring(svg_picture(schedule, timeline, "nothing"))


# ---- the command ----------------------------------------------------------------------------------------------------


def test_times_as_text() -> None:
    assert parse_times("") == (Times(1, 1, 1, 2), None)
    assert parse_times("F=1,I=1,W=1,B=2,FB=3") == (Times(1, 1, 1, 2), 3)
    assert parse_times("F=0.5, W=2") == (Times(0.5, 1, 2, 3), None)
    for text in ("F", "F=", "F=-1", "F=inf", "F=nan", "X=1", "F=1,F=2", "f=1"):
        with pytest.raises(InputError, match="is no time; write for example F=1"):
            parse_times(text)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["schedule", *arguments])
    return (status, *capsys.readouterr())


def test_the_command_writes_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = "--csv", str(tmp_path / "s.csv"), "--svg", str(tmp_path / "s.svg")
    numbers = "--pp", "8", "--micro-batches", "20", "--times", "F=1,I=1,W=1,B=2,FB=3"
    status, out, err = run(capsys, "dualpipe", *numbers, *files)
    assert status == 0
    assert "makespan   66" in out and "busy       60" in out and "in flight  9 chunks" in out
    assert (tmp_path / "s.csv").read_text() == PUBLISHED.read_text()
    assert "dualpipe: 8 ranks, 20 micro-batches" in (tmp_path / "s.svg").read_text()
    assert err.count("wrote") == 2


def test_the_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "dualpipe", "--pp", "8", "--micro-batches", "20", "--json")
    told = json.loads(out)
    assert status == 0
    assert [told[k] for k in ("makespan", "busy", "bubble", "peak_in_flight", "stages")] == [66, 60, 6, 9, 8]
    assert told["per_rank"][0]["stages"] == [0, 7]
    assert "\n".join(told["rows"]) + "\n" == PUBLISHED.read_text()


def test_the_command_chooses(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "auto", "--pp", "4", "--micro-batches", "6")
    assert status == 0
    assert re.search(r"zb1p +21 +14.3% +chosen", out)
    assert re.search(r"dualpipe +it needs an even number of micro-batches, at least 2 per rank \(8\)", out)
    told = json.loads(run(capsys, "auto", "--pp", "4", "--micro-batches", "8", "--json")[1])
    assert told["kind"] == "dualpipe"
    # A kind with two stages a rank has half of a rank's time in each, so all do the same work.
    assert {c["kind"]: c["makespan"] for c in told["candidates"]} == {
        "1f1b": 33, "dualpipe": 26, "dualpipev": 27, "zb1p": 27,
    }  # fmt: skip


def test_the_command_reads_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "dualpipe", "--read", str(PUBLISHED), "--transfer", "0.5")
    assert status == 0 and "8 ranks, 8 stages, 20 micro-batches" in out
    (tmp_path / "wrong.csv").write_text(PUBLISHED.read_text().replace("0F1,0F2", "0F2,0F1"))
    status, out, err = run(capsys, "dualpipe", "--read", str(tmp_path / "wrong.csv"))
    assert status == 2 and out == "" and ">1F1<" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("dualpip --pp 4 --micro-batches 8", "schedule dualpip: there is no such kind; did you mean 'dualpipe'?"),
        ("dualpipe --micro-batches 8", "--pp is missing"),
        ("dualpipe --pp 4", "--micro-batches is missing"),
        ("dualpipe --pp 3 --micro-batches 8", "it needs an even number of ranks"),
        ("dualpipe --pp 4 --micro-batches 8 --times F=x", "--times F=x: 'F=x' is no time"),
        ("dualpipe --read missing.csv", "missing.csv: no such file; give the path of a schedule"),
        ("auto --read missing.csv", "give its kind"),
        ("dualpipe --pp 4 --read missing.csv", "leave out the rest"),
    ],
)
def test_wrong_flags(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *arguments.split())
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1


def test_the_kinds_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "schedules", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {name for name, row in rows.items() if row["auto"]} == {"1f1b", "dualpipe", "dualpipev", "zb1p"}
    assert {*cli.SCHEDULES} - {"auto"} == {name for name, row in rows.items() if row["auto"]}


# ---- the pass -------------------------------------------------------------------------------------------------------

TRAIN = """\
def part(x: f64[B, 512], *, w: f64[512]):
    y = rms_norm(x, w, eps=1e-06)
    return y

def sum(x: f64[B, 512], *, w: f64[512]):
    y = rms_norm(x, w, eps=1e-06)
    s = sum_all(y)
    return s

weights = [('a', 'f64[512]', 'ones', 0.0, 'norm'), ('b', 'f64[512]', 'ones', 0.0, 'norm')]
sequences = [('train', ('x',), ('s',), ('s',), (), [
    ('F', 'first', 'part', ('x',), ('a',), ('y',)), ('F', 'last', 'sum', ('y',), ('b',), ('s',))])]
"""


def trained(mesh: Mesh, micro_batches: int, schedule: str = "auto") -> State:
    state = pipeline.text_state(TRAIN, REGISTRY, target=find("h800"), sizes={"B": 4096})
    job = Job("train", "h800", "bf16", 8, 1, micro_batches * mesh.dp, mesh, schedule=schedule)
    return pipeline.run(replace(state, job=job), pipeline.parse("differentiate,cut")).state


def noted(state: State, one: DualPipe) -> tuple[State, list[tuple[str, str, str]]]:
    notes: list[tuple[str, str, str]] = []
    return one.run(state, lambda *note: notes.append(note)), notes


def test_the_pass_follows_the_job() -> None:
    state, notes = noted(trained(Mesh(pp=2, dp=4), 6, "1f1b"), DualPipe())
    assert state.schedule == generate("1f1b", 2, 6)
    assert [n[:2] for n in notes] == [("verified", "1f1b")]
    assert noted(trained(Mesh(pp=2), 6, "1f1b"), DualPipe("zb1p"))[0].schedule == generate("zb1p", 2, 6)


def test_the_pass_chooses_by_the_cost_of_layers() -> None:
    state, notes = noted(trained(Mesh(pp=2), 4), DualPipe())
    assert state.schedule is not None and state.schedule.kind == "dualpipe"
    told = {node: reason for action, node, reason in notes if action == "simulated"}
    assert {*told} == {"1f1b", "dualpipe", "dualpipev", "zb1p"}
    assert all(re.match(r"[0-9.]+ ms, [0-9.]+% of it idle, [0-9.]+ GiB", reason) for reason in told.values())
    assert ("chose", "dualpipe", told["dualpipe"]) in notes


def test_the_pass_stays_within_memory() -> None:
    state = trained(Mesh(pp=2), 4)
    assert state.target is not None
    small = replace(state.target, machine=replace(state.target.machine, memory_bytes=1))
    found, notes = noted(state.but(target=small), DualPipe())
    assert ("kept", "memory", "by these estimates no kind fits, so the one that holds least is taken") in notes
    assert found.schedule is not None
    held = {node: float(reason.split(" GiB")[0].split()[-1]) for action, node, reason in notes if action == "simulated"}
    assert held[found.schedule.kind] == min(held.values())


def test_the_pass_refuses_what_cannot_be() -> None:
    with pytest.raises(InputError, match="--schedule dualpipe with 3 pipeline ranks and 6 micro-batches: it needs an"):
        noted(trained(Mesh(pp=3), 6, "dualpipe"), DualPipe())
    with pytest.raises(InputError, match="both must be at least 1"):
        noted(trained(Mesh(pp=3), 6), DualPipe(ranks=-1))


def test_the_text_of_the_passes_schedule_means_the_same() -> None:
    schedule = noted(trained(Mesh(pp=2), 4), DualPipe())[0].schedule
    assert schedule is not None and parse_csv(show_csv(schedule), schedule.kind) == schedule
