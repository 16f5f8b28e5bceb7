"""dsv3c: compile a DeepSeek-V3-class model description into a plan that can be read, costed and executed."""

from __future__ import annotations

import importlib
import os.path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv3c.driver import compile, load
    from dsv3c.models.config import ModelConfig
    from dsv3c.plan import Plan
    from dsv3c.runtime.session import Session

__version__ = "0.1.0"
__all__ = ["ModelConfig", "Plan", "Session", "__version__", "compile", "load"]

# Where each public name lives; it is imported when first used, so that `import dsv3c` stays instant.
_HOME = {
    "compile": "dsv3c.driver",
    "load": "dsv3c.driver",
    "ModelConfig": "dsv3c.models.config",
    "Plan": "dsv3c.plan",
    "Session": "dsv3c.runtime.session",
}

# passes, targets and models are links to the folders beside this one. Where the links were lost (some archives
# and file systems turn them into text files), the folders themselves are found through the package's path.
_here = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_here, "passes")):
    __path__.append(os.path.dirname(_here))


if not TYPE_CHECKING:  # a type checker reads the imports above, and so knows which names do not exist

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module 'dsv3c' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
