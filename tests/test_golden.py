"""Golden files: what each pass makes of a program, as text that is reviewed, and proof that it still means the same.

`tests/golden/<pass>/<case>.txt` holds header lines, a program, then what was expected of it:

    # passes: fuse{limit=4}
    # tolerance: 1e-6             (optional; without it results must have equal bits)
    # target: h800                (optional) the machine that cost-driven passes assume
    # precision: bf16             (optional) of the job on that target
    # sizes: B=2, S=8             (optional; a symbol without a size has 3)
    # below: tokens=16            (optional; whole-number inputs are drawn below this bound, otherwise 2)
    # values: offsets=[0, 4, 8]   (optional; inputs given outright)
    def block(x: f32[B, 4]):
        ...
    # --- notes
    # --- schedule                (if a pass made one: a row per rank, its makespan if F, I and W of a stage take 1)
    # --- after

`pytest --update-golden` rewrites everything from the first `# ---` on.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from meaning import Draw, Proof

from dsv3c import pipeline
from dsv3c.ir import Program
from dsv3c.ops import REGISTRY
from dsv3c.passes import PASSES
from dsv3c.schedule import Schedule, parse_csv, show_csv
from dsv3c.schedules import equal_stages, simulate, verify
from dsv3c.text import parse_program, show_program

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(GOLDEN.rglob("*.txt"))
MOST_LINES = 120
HEADERS = ("passes", "tolerance", "target", "precision", "sizes", "below", "values")


@dataclass(frozen=True)
class Case:
    """One golden file, read."""

    path: Path
    headers: dict[str, str]
    source: str
    expected: str

    @classmethod
    def read(cls, path: Path) -> Case:
        """Split a file into its headers, its program and what is expected. Raises AssertionError if it has no form."""
        text = path.read_text(encoding="utf-8")
        start = re.search(r"^# ---", text, re.MULTILINE)
        source = text[: start.start()] if start else text.rstrip() + "\n"
        headers: dict[str, str] = {}
        for line in source.splitlines():
            if not line.startswith("# "):
                break
            key, colon, value = line.removeprefix("# ").partition(":")
            assert colon and key in HEADERS, f"{path.name}: '{line}' is no header; known: {', '.join(HEADERS)}"
            headers[key] = value.strip()
        assert "passes" in headers, f"{path.name}: the first lines need '# passes: ...'"
        return cls(path, headers, source, text[start.start() :] if start else "")

    def run(self) -> tuple[Program, pipeline.Outcome]:
        """The program and what the passes make of it."""
        target = None
        if "target" in self.headers:
            from dsv3c.targets import find

            target = find(self.headers["target"])
        state = pipeline.text_state(
            self.source, REGISTRY, file=self.path.name, target=target, precision=self.headers.get("precision"),
            sizes=pipeline.parse_sizes(self.headers.get("sizes", "")),
        )  # fmt: skip
        return state.program, pipeline.run(state, pipeline.parse(self.headers["passes"]))

    def made(self, outcome: pipeline.Outcome) -> str:
        """The text that stands from the first `# ---` on."""
        notes = "".join(str(n).replace("\n", "; ") + "\n" for n in outcome.notes)
        schedule = outcome.state.schedule
        planned = "" if schedule is None else shown_schedule(schedule)
        return f"# --- notes\n{notes}{planned}# --- after\n{show_program(outcome.state.program)}"

    def draw(self) -> Draw:
        """How inputs are drawn for the proof."""
        values = ast.parse(f"dict({self.headers.get('values', '')})", mode="eval").body
        assert isinstance(values, ast.Call)
        return Draw(
            pipeline.parse_sizes(self.headers.get("sizes", "")),
            pipeline.parse_sizes(self.headers.get("below", "")),
            {str(k.arg): ast.literal_eval(k.value) for k in values.keywords},
        )


def shown_schedule(schedule: Schedule) -> str:
    """A schedule with its makespan, once it is proven: it can run, and its text means the same."""
    verify(schedule)
    assert parse_csv(show_csv(schedule), schedule.kind) == schedule
    makespan = simulate(schedule, equal_stages(schedule.stages)).makespan
    return f"# --- schedule {schedule.kind}, makespan {makespan:g}\n{show_csv(schedule)}"


def name_of(path: Path) -> str:
    """`fuse/norm_residual`."""
    return path.relative_to(GOLDEN).with_suffix("").as_posix()


@pytest.mark.parametrize("path", CASES, ids=map(name_of, CASES))
def test_golden(path: Path, update_golden: bool) -> None:
    case = Case.read(path)
    before, outcome = case.run()
    after = outcome.state.program
    Proof(before, after, REGISTRY, case.draw(), float(case.headers.get("tolerance", "0"))).run()
    made = case.made(outcome)
    assert show_program(parse_program(show_program(after), REGISTRY)) == show_program(after)
    if update_golden:
        path.write_text(case.source + made, encoding="utf-8")
    else:
        assert made == case.expected, (
            f"{path.name} differs; if that is meant: pytest --update-golden, and read the diff"
        )


@pytest.mark.parametrize("path", CASES, ids=map(name_of, CASES))
def test_golden_files_can_be_reviewed(path: Path) -> None:
    case = Case.read(path)
    assert path.read_text(encoding="utf-8").count("\n") < MOST_LINES
    passes = pipeline.parse(case.headers["passes"])
    assert path.parent.name in [p.name for p in passes], f"{name_of(path)} does not run {path.parent.name}"
    assert pipeline.show(passes) == case.headers["passes"]
    assert not set(path.stem) - set("abcdefghijklmnopqrstuvwxyz0123456789_")


def test_golden_covers_every_pass_that_changes_programs() -> None:
    without = {"plan_buffers"}  # it lays out memory and leaves the program alone
    assert {*PASSES} - without <= {p.parent.name for p in CASES}


def digest() -> str:
    """A hash of what all golden files make."""
    total = hashlib.sha256()
    for path in CASES:
        case = Case.read(path)
        total.update(case.made(case.run()[1]).encode())
    return total.hexdigest()


def test_golden_texts_do_not_depend_on_the_hash_seed() -> None:
    root = Path(__file__).parents[1]
    code = "import sys; sys.path.insert(0, 'tests'); import test_golden; print(test_golden.digest())"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
        assert run.stdout.strip() == digest(), run.stderr


# ---- the proof itself can fail --------------------------------------------------------------------------------------

BLOCK = """\
def block(x: f64[B, 4], *, w: f64[4]):
    y = rms_norm(x, w, eps=1e-06)
    return y
"""
JOINED = """\
def block_joint(x: f64[B, 4], d_y: f64[B, 4], *, w: f64[4]):
    y = rms_norm(x, w, eps=1e-06)
    d_x = rms_norm_dx(d_y, x, w, eps=1e-06)  # @B
    d_w = rms_norm_dw(d_y, x, eps=1e-06)  # @W
    return y, d_x, d_w
"""
CUT = """\
def block_F(x: f64[B, 4], *, w: f64[4]):
    y = rms_norm(x, w, eps=1e-06)
    return y

def block_B(x: f64[B, 4], d_y: f64[B, 4], *, w: f64[4]):
    d_x = rms_norm_dx(d_y, x, w, eps=1e-06)  # @B
    return d_x

def block_W(x: f64[B, 4], d_y: f64[B, 4]):
    d_w = rms_norm_dw(d_y, x, eps=1e-06)  # @W
    return d_w
"""
TRAIN = """\
def sum(x: f64[B, 4], *, w: f64[4]):
    y = rms_norm(x, w, eps=1e-06)
    s = sum_all(y)
    return s

weights = [('norm', 'f64[4]', 'ones', 0.0, 'norm')]
sequences = [('train', ('x',), ('s',), ('s',), (), [('F', 'first', 'sum', ('x',), ('norm',), ('s',))])]
"""

TRAINED = show_program(
    pipeline.run(pipeline.text_state(TRAIN, REGISTRY), pipeline.parse("differentiate")).state.program
)


def proof(before: str, after: str, tolerance: float = 1e-12) -> tuple[str, ...]:
    return Proof(parse_program(before, REGISTRY), parse_program(after, REGISTRY), REGISTRY, Draw(), tolerance).run()


def test_a_right_change_is_proven() -> None:
    assert proof(BLOCK, BLOCK, tolerance=0.0) == ("block",)
    assert proof(BLOCK, JOINED) == ("block",)
    assert proof(JOINED, CUT, tolerance=0.0) == ("block_joint",)
    assert proof(TRAIN, TRAIN) == ("train", "sum")
    assert proof(TRAIN, TRAINED) == ("train", "sum")
    assert proof(TRAINED, TRAINED, tolerance=0.0) == ("train", "sum", "sum_joint")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (BLOCK, BLOCK.replace("1e-06", "1e-02"), "block: y differs by"),
        (BLOCK, BLOCK.replace("block", "other"), "nothing proves what became of block"),
        (BLOCK, BLOCK.replace("return y", "return y, y"), "nothing proves what became of block"),
        (BLOCK, JOINED.replace("rms_norm(x, w, eps=1e-06)", "rms_norm(x, w, eps=1e-02)"), "block_joint: y differs"),
        (BLOCK, JOINED.replace("dx(d_y, x, w, eps=1e-06", "dx(d_y, x, w, eps=1e-02"), "block_joint: d_x differs"),
        (BLOCK, JOINED.replace("dw(d_y, x, eps=1e-06", "dw(d_y, x, eps=1e-02"), "block_joint: d_w differs"),
        (JOINED, CUT.replace("dw(d_y, x, eps=1e-06", "dw(d_y, x, eps=1e-02"), "block: d_w differs"),
        (JOINED, CUT.split("def block_W")[0], "no part of the cut graph returns d_w"),
        (TRAIN, TRAIN.replace("1e-06", "1e-02"), "train: s differs"),
        (TRAIN, TRAINED.replace("_dw(spread, x, eps=1e-06", "_dw(spread, x, eps=1e-02"), "gradient of norm differs"),
        (TRAINED, TRAINED.replace("_dw(spread, x, eps=1e-06", "_dw(spread, x, eps=1e-02"), "gradient of norm differs"),
        (TRAIN, TRAIN.replace("'train'", "'trian'").replace("eps=1e-06", "eps=1e-02"), "sum: s differs"),
    ],
)  # fmt: skip
def test_a_wrong_change_is_caught(before: str, after: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        proof(before, after)


def test_a_file_without_its_form_is_refused(tmp_path: Path) -> None:
    for text, message in (
        (BLOCK, "the first lines need '# passes: ...'"),
        ("# pases: fuse\n" + BLOCK, "'# pases: fuse' is no header"),
    ):
        (tmp_path / "case.txt").write_text(text)
        with pytest.raises(AssertionError, match=re.escape(message)):
            Case.read(tmp_path / "case.txt")


def test_updating_rewrites_below_the_first_mark_only(tmp_path: Path) -> None:
    path = tmp_path / "case.txt"
    path.write_text("# passes: differentiate\n# tolerance: 1e-12\n" + BLOCK + "# --- notes\nold\n")
    case = Case.read(path)
    assert case.expected == "# --- notes\nold\n"
    path.write_text(case.source + case.made(case.run()[1]))
    again = Case.read(path)
    assert again.source == case.source and again.expected == again.made(again.run()[1])
    assert "\ndef block_joint(" in again.expected.partition("# --- after\n")[2]
