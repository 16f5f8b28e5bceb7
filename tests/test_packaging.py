"""The package as people get it: a checkout, a checkout whose links were lost, and a wheel, all import alike."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dsv3c

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("models", "passes", "targets")


def python(*args: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run this Python in `cwd` with `path` first on its module path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True)


def assert_imports(tree: Path, cwd: Path) -> None:
    """A Python started in `cwd` imports all of dsv3c from below `tree`, and the linked folders with it."""
    lines = "".join(f"import dsv3c.{name}; print(dsv3c.{name}.__file__)\n" for name in LINKED)
    run = python("-c", f"import dsv3c\nprint(dsv3c.__file__, dsv3c.__version__)\n{lines}", cwd=cwd, path=tree)
    assert run.returncode == 0, run.stderr
    first, *others = run.stdout.splitlines()
    assert first == f"{tree / 'dsv3c' / '__init__.py'} {dsv3c.__version__}"
    assert len(others) == len(LINKED)
    assert all(line.startswith(f"{tree}{os.sep}") for line in others), others


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    run = python("-m", "hatchling", "build", "-t", "wheel", "-d", str(out), cwd=ROOT)
    assert run.returncode == 0, run.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.parametrize("name", LINKED)
def test_bare_name_is_refused(name: str) -> None:
    run = python("-c", f"import {name}", cwd=ROOT, path=ROOT)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("ImportError: ")
    assert f"dsv3c.{name}" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative(name: str) -> None:
    link = ROOT / "dsv3c" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_checkout_without_links_imports(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    for name in LINKED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    shutil.copytree(ROOT / "dsv3c", tmp_path / "dsv3c", ignore=shutil.ignore_patterns("__pycache__", *LINKED))
    for name in LINKED:
        (tmp_path / "dsv3c" / name).write_text(f"../{name}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert_imports(tmp_path, elsewhere)


def test_wheel_has_the_linked_folders_as_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    for name in LINKED:
        here = {f"dsv3c/{name}/{p.relative_to(ROOT / name).as_posix()}": p for p in (ROOT / name).rglob("*.py")}
        assert f"dsv3c/{name}/__init__.py" in here
        assert {m: members.get(m) for m in here} == {m: p.read_bytes() for m, p in here.items()}
    tops = {member.partition("/")[0] for member in members}
    assert tops == {"dsv3c", f"dsv3c-{dsv3c.__version__}.dist-info"}


def test_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = python(
        "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site), str(wheel), cwd=elsewhere
    )
    assert run.returncode == 0, run.stderr
    assert_imports(site, elsewhere)
    assert (site / "bin" / "dsv3c").is_file()


def test_a_users_own_folder_is_not_shadowed(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("mine = True\n")
    run = python("-c", "import models, dsv3c.models; print(models.mine)", cwd=tmp_path, path=site)
    assert run.stdout == "True\n", run.stderr


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dsv3c' has no attribute 'compyle'"):
        _ = dsv3c.compyle  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", dsv3c.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(dsv3c, name) is not None
    assert name in dir(dsv3c)


def lock() -> dict[str, Requirement]:
    """The lines of requirements.lock by project name."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(w.name): w for w in wanted}


def test_lock_is_exact_and_portable() -> None:
    for name, pin in lock().items():
        assert pin.url is None
        assert [s.operator for s in pin.specifier] == ["=="], name
        assert "+" not in str(pin.specifier), name
        assert not name.startswith("nvidia-")


def test_lock_holds_all_that_is_needed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = lock()
    todo = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["dev"])]
    seen: set[str] = set()
    while todo:
        need = todo.pop()
        name = canonicalize_name(need.name)
        if name in seen or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        # torch brings its own GPU libraries, and only in its GPU builds.
        if name.startswith(("nvidia-", "cuda-")):
            continue
        seen.add(name)
        assert name in pins, f"{name} is needed and is not in requirements.lock"
        (pin,) = pins[name].specifier
        assert need.specifier.contains(pin.version, prereleases=True), f"{name}: {pin} does not meet {need}"
        todo += map(Requirement, requires(name) or ())
