"""The passes, one file each; every Pass defined in this folder is in `PASSES`."""

from __future__ import annotations

from collections.abc import Mapping

if __name__ != "dsv3c.passes":
    raise ImportError("import this folder as dsv3c.passes")

from dsv3c.discover import defined_in
from dsv3c.ir import IRError
from dsv3c.state import P, Pass, check_pass

_passes: dict[str, type[Pass]] = {}
PASSES: Mapping[str, type[Pass]] = _passes
"""Pass classes by name."""


def register(pass_class: P) -> P:
    """Add a pass; returns it, so that it can stand above a class. Raises IRError if it breaks the rules of one."""
    check_pass(pass_class)
    if _passes.get(pass_class.name, pass_class) is not pass_class:
        raise IRError(f"the pass '{pass_class.name}' is registered twice; choose another name")
    _passes[pass_class.name] = pass_class
    return pass_class


for _class in defined_in(__name__, type):
    if issubclass(_class, Pass) and _class.__module__.startswith(f"{__name__}."):
        register(_class)
