"""Find what the files of a folder define, so that adding an op, a pass, a target or a model is one new file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def defined_in(package: ModuleType | str, kind: type[T]) -> Iterator[T]:
    """Every module-level object of type `kind` in the modules of `package`, by module name, then as written.

    Modules whose name starts with an underscore are passed over; an object imported from another module counts
    once.
    """
    if isinstance(package, str):
        package = importlib.import_module(package)
    seen: set[int] = set()
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, kind) and id(value) not in seen:
                seen.add(id(value))
                yield value
