"""Import a heavy library on first use, so that commands that never touch it start fast."""

from __future__ import annotations

import importlib
from types import ModuleType


class LazyModule(ModuleType):
    """Stands for a module until the first attribute is asked of it."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        module = importlib.import_module(self.__name__)
        self.__dict__.update(module.__dict__)
        return getattr(module, name)


def lazy(name: str) -> ModuleType:
    """The module called `name`, imported when first used."""
    return LazyModule(name)
