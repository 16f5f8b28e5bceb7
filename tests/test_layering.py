"""Imports go downward only: the rows of the architecture, no circles, and heavy libraries only where they are used."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Row by row, low to high. A folder stands for every module in it.
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(row.split())
    for row in (
        "errors files lazy discover dims ir",
        "op rows target schedule schedules tensors job",
        "text verify build",
        "ops interp rewrite capacity state arena chunks notes plan plandiff layout stages selection "
        "segments costs interleave comm machines paper",
        "models passes targets",
        "console pipeline plugins report simulate picture runtime",
        "settle driver",
        "commands report_commands schedule_commands cli demo tune __init__ __main__",
    )
)
# Folders of one row that must not know each other, and one that must not know the compiler.
FORBIDDEN = {
    "models": {"passes", "targets"},
    "passes": {"models", "targets"},
    "targets": {"models", "passes"},
    "runtime": {"passes"},
}
LINKED = ("models", "passes", "targets")
HEAVY = frozenset({"tensorboard", "tokenizers", "torch", "transformers", "triton", "tvm", "tvm_ffi"})
LIGHT_ROWS = 3
"""Rows 1 to this one import nothing of HEAVY at the top of a module."""


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module: from where, which name (empty for a whole module), and when."""

    module: str
    name: str
    line: int
    at_start: bool  # it happens when the importing module is loaded


def sources() -> dict[str, str]:
    """The text of every module of dsv3c, by its full name."""
    found = {}
    for top, prefix in [(ROOT / "dsv3c", "dsv3c"), *((ROOT / name, f"dsv3c.{name}") for name in LINKED)]:
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top).with_suffix("").parts
            if top.name == "dsv3c" and parts[0] in LINKED:
                continue
            found[".".join((prefix, *(p for p in parts if p != "__init__")))] = path.read_text(encoding="utf-8")
    return found


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a module, wherever it stands."""

    def visit(node: ast.AST, at_start: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, "", node.lineno, at_start)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                yield Import(base, alias.name, node.lineno, at_start)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in node.body:
                yield from visit(statement, False)
            for statement in node.orelse:
                yield from visit(statement, at_start)
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_start and not inside)

    yield from visit(tree, True)


def part(module: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def row(module: str) -> int:
    """The row (from 1) of a module, 0 if it has none."""
    return next((i for i, names in enumerate(LAYERS, 1) if part(module) in names), 0)


def problems(texts: Mapping[str, str]) -> list[str]:
    """What is wrong with the imports of `texts` ({module name: source}), one sentence each."""
    wrong: list[str] = []
    at_start: dict[str, set[str]] = {}
    packages = {m.rpartition(".")[0] for m in texts}
    for module, text in texts.items():
        at_start[module] = set()
        if not row(module):
            wrong.append(f"{module} has no row: add '{part(module)}' to LAYERS")
            continue
        for item in imports(ast.parse(text), module, module in packages):
            where = f"{module}, line {item.line}"
            top = item.module.partition(".")[0]
            if top in LINKED:
                wrong.append(f"{where}: import {item.module} as dsv3c.{item.module}")
            if top in HEAVY and item.at_start and row(module) <= LIGHT_ROWS:
                wrong.append(f"{where}: imports {top} when loaded; use dsv3c.lazy, or import it in the function")
            if top != "dsv3c" or (item.module, item.name) == ("dsv3c", "__version__"):
                continue
            full = f"{item.module}.{item.name}"
            used = full if full in texts or item.module == "dsv3c" else item.module
            if item.at_start and used != module:
                at_start[module].add(used)
            if row(used) > row(module):
                wrong.append(f"{where}: row {row(module)} imports {used} of row {row(used)}")
            if part(used) in FORBIDDEN.get(part(module), ()):
                wrong.append(f"{where}: {part(module)} must not import {part(used)}")
    try:
        graphlib.TopologicalSorter(at_start).prepare()
    except graphlib.CycleError as e:
        wrong.append("imports run in a circle: " + " → ".join(reversed(e.args[1])))
    return wrong


def test_imports_go_downward() -> None:
    assert problems(sources()) == []


def test_linked_folders_are_seen() -> None:
    assert {part(m) for m in sources()} >= {*LINKED, "ir", "ops", "runtime", "__init__"}


@pytest.mark.parametrize(
    ("module", "text", "sentence"),
    [
        ("dsv3c.ir", "def f():\n    import dsv3c.plan", "dsv3c.ir, line 2: row 1 imports dsv3c.plan of row 4"),
        ("dsv3c.ir", "from dsv3c import plan", "dsv3c.ir, line 1: row 1 imports dsv3c.plan of row 4"),
        ("dsv3c.ir", "from .plan import Plan", "dsv3c.ir, line 1: row 1 imports dsv3c.plan of row 4"),
        ("dsv3c.passes.a", "from dsv3c.models.b import C", "dsv3c.passes.a, line 1: passes must not import models"),
        ("dsv3c.runtime.a", "import dsv3c.passes", "dsv3c.runtime.a, line 1: runtime must not import passes"),
        ("dsv3c.cli", "from models import config", "dsv3c.cli, line 1: import models as dsv3c.models"),
        ("dsv3c.ir", "import torch.nn", "dsv3c.ir, line 1: imports torch when loaded; use dsv3c.lazy, or"),
        ("dsv3c.ir", "try:\n    import tvm\nexcept E: pass", "dsv3c.ir, line 2: imports tvm when loaded"),
        ("dsv3c.novel", "", "dsv3c.novel has no row: add 'novel' to LAYERS"),
        ("dsv3c.cli", "import dsv3c.__main__", "imports run in a circle: "),
    ],
)
def test_a_wrong_import_is_named(module: str, text: str, sentence: str) -> None:
    found = problems({"dsv3c.plan": "", "dsv3c.__main__": "import dsv3c.cli", module: text})
    assert len(found) == 1
    assert found[0].startswith(sentence)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("dsv3c.ir", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("dsv3c.ir", "def f():\n    import torch"),
        ("dsv3c.plan", "import torch\nfrom dsv3c import __version__"),
        ("dsv3c.driver", "from dsv3c.passes import PASSES\nfrom dsv3c.models import load"),
    ],
)
def test_a_right_import_is_let_through(module: str, text: str) -> None:
    assert problems({module: text}) == []


@pytest.mark.parametrize("command", ["import dsv3c", "import runpy; runpy.run_module('dsv3c', run_name='__main__')"])
def test_starting_loads_nothing_heavy(command: str) -> None:
    heavy = sorted(HEAVY | {"networkx", "sympy"})
    code = (
        "import sys\nsys.argv = ['dsv3c', '--help']\n"
        f"try:\n    {command}\nexcept SystemExit as e:\n    assert not e.code, e\n"
        f"print('loaded:', *(name for name in {heavy} if name in sys.modules))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "loaded:"
